"""Weights of a model by themselves, from wherever a user may have them."""

from pathlib import Path

from torch import Tensor

from ..system.durable_files import DamagedError
from .format import (
    MANIFEST,
    MODEL,
    most_tensor_bytes,
    read_manifest,
    read_state,
    read_tensor_file,
    read_tensors,
)
from .generations import FOLDER
from .model_folder import ModelFolder


def read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A model's tensors as saved, and its family where the file names it.

    ``path`` is a model folder (its newest whole generation is read), a generation's folder or a
    safetensors file.

    Raises:
        ValueError: There is none of these, or it is damaged.
    """
    try:
        if path.is_file():
            # A single file has no manifest, so its own header has to do.
            return read_tensor_file(path)
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            max_bytes = most_tensor_bytes(read_state(path, manifest)[1])
            return read_tensors(path, MODEL, manifest, max_bytes), manifest.trainer
    except (OSError, DamagedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read weights from {path}: {reason}") from error
    # Asked here: `ModelFolder` takes an empty folder, too, for a model that is to begin.
    if not (path / FOLDER).is_dir():
        raise ValueError(
            f"no weights in {path}: it must be a model folder, a generation of one, or a "
            "model.safetensors"
        )
    with ModelFolder(path, read_only=True) as folder:
        generation = folder.load()
    if generation is None:
        raise ValueError(f"nothing has been saved in model folder {path} yet; load from another")
    return generation.model, generation.state.get("trainer")
