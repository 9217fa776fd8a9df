"""Files of weights that the user has, as safetensors or as PyTorch saves them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_TORCH_BEGINS = (b"PK", b"\x80\x02")  # of its zip files, and of its files before 1.6
# torch unpickles weights alone, and says by the last one what else a file would have it make.
_UNREADABLE = (
    *(OSError, SafetensorError, RuntimeError, EOFError, ValueError),
    torch.serialization.pickle.UnpicklingError,
)


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors by name; ValueError where the file holds anything else."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ValueError(f"cannot read weights from {file}: it is no plain file; name another file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with open(file, "rb") as content:
            if content.read(2) not in _TORCH_BEGINS:
                raise ValueError("it is no file of torch's")
        # Weights alone: a stranger's file could else have code run when it is unpickled.
        found = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read weights from {file}: {reason}; name another file") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file} holds no weights by name; name another file")
    return found
