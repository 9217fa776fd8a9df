"""The weights that a swap needs as one file of tensors, compared with the model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...models.autoencoder import Autoencoder
from ..checkpoint.inference import Weights, refuse_target, weights_file
from ..data.sides import SIDES
from ..swapping import load_model
from ..system.durable_files import checked_output, write_file, writing
from .trained_model import Report, read_trained_model, sample_pictures, silent


@dataclass(frozen=True)
class TensorsExport:
    """What was written. difference: the largest of an output from the model's."""

    path: Path
    metadata: dict[str, str]
    size_bytes: int
    difference: float
    num_faces: int


def export_tensors(
    path: Path,
    target: Path,
    *,
    generation: str | None = None,
    weights: Weights = "auto",
    force: bool = False,
    report: Report = silent,
) -> TensorsExport:
    """Write the weights of both sides, and read them back.

    What was read of the save is let go before, so that no two models are in memory.

    Args:
        path: The model folder; it is only read.
        target: A file *.safetensors outside the saves.
        generation: Name of a save, or `backup`; None: the newest.
        weights: Same as for `read_model`.
        force: Replace the file where there is one.
        report: Called with each stage.

    Raises:
        ValueError: There is no such save, or it is damaged; the target is not allowed; the disk
            refuses, or gives back something else.
    """
    refuse_target(path, target, ".safetensors", force=force)
    model = read_trained_model(path, generation, report, weights)
    faces = model.faces()
    pictures_nssc = np.stack(sample_pictures(model.network.input_px, faces))
    pictures_ncss = torch.from_numpy(pictures_nssc).permute(0, 3, 1, 2).contiguous()
    wanted = _outputs(model.network, pictures_ncss)
    content, metadata = weights_file(
        model.source,
        model.state,
        model.config,
        model.network.state_dict(),
        model.metadata["weights"],
    )
    with writing(target), checked_output(target, force=force) as temporary:
        report("writing the weights")
        write_file(temporary, content)
        # Both, for either holds all of the weights.
        del model, content
        report("reading them back, to compare them with the model")
        # Of the file as it lies on the disk, before it takes the place of an older one.
        difference = _difference(_outputs(load_model(temporary).network, pictures_ncss), wanted)
    return TensorsExport(target, metadata, target.stat().st_size, difference, len(faces))


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of an output from the model's; ValueError where there is one."""
    pairs = zip(found, wanted, strict=True)
    # By torch's maximum: Python's would pass over a NaN that is not the first.
    difference = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    # Not a tolerance: the same numbers computed by the same code have the same bits.
    if difference != 0:
        raise ValueError(
            f"the file differs from the model by {difference:.1e}, so it was not kept: see to the "
            "disk, and `mien model verify` the folder"
        )
    return difference


@torch.inference_mode()
def _outputs(network: Autoencoder, pictures_ncss: Tensor) -> list[Tensor]:
    """All that the model makes of pictures, as both sides."""
    return [output for side in SIDES for output in network.swap(pictures_ncss, side)]
