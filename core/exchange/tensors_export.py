"""The weights that a swap needs as one file of tensors, compared with the model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.inference import write_inference
from ..data.sides import SIDES
from ..swapping import load_model
from .trained_model import read_trained_model, sample_pictures


@dataclass(frozen=True)
class TensorsExport:
    """What was written. difference: the largest of an output from the model's."""

    path: Path
    metadata: dict[str, str]
    size_bytes: int
    difference: float
    num_faces: int


def export_tensors(
    path: Path, target: Path, *, generation: str | None = None, force: bool = False
) -> TensorsExport:
    """Write the weights of both sides, and read them back.

    Args:
        path: The model folder; it is only read.
        target: A file *.safetensors outside the saves.
        generation: Name of a save, or `backup`; None: the newest.
        force: Replace the file where there is one.

    Raises:
        ValueError: There is no such save, or it is damaged; the target is not allowed; the disk
            refuses, or gives back something else.
    """
    model = read_trained_model(path, generation)
    metadata = write_inference(path, target, generation=generation, force=force)
    faces = model.faces()
    pictures_nssc = np.stack(sample_pictures(model.network.input_px, faces))
    pictures_ncss = torch.from_numpy(pictures_nssc).permute(0, 3, 1, 2).contiguous()
    written = load_model(target).network
    with torch.inference_mode():
        pairs = zip(
            (output for side in SIDES for output in written.swap(pictures_ncss, side)),
            (output for side in SIDES for output in model.network.swap(pictures_ncss, side)),
            strict=True,
        )
        difference = max(float((one - other).abs().max()) for one, other in pairs)
    # Not a tolerance: the same numbers computed by the same code have the same bits.
    if difference != 0:
        target.unlink()
        raise ValueError(
            f"the file differs from the model by {difference:.1e}, so it was not kept: see to the "
            "disk, and `mien model verify` the folder"
        )
    return TensorsExport(target, metadata, target.stat().st_size, difference, len(faces))
