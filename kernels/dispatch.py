"""Devices on which operations launch kernels, and capture by a CUDA graph; tests use a CPU."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_interpreted = False


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` launches its kernels; else it runs in plain PyTorch."""
    # To be asked before each launch: where there is no driver, Triton raises at one.
    return tensor.is_cuda or _interpreted


def uses_cuda(device: torch.device) -> bool:
    """Whether an operation of libmien launches CUDA kernels; else it runs on threads of the CPU."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of the device."""
    if device.type != "cuda":
        return False
    # PyTorch asks of the stream that is current on the current device.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """CPU tensors go through Triton's interpreter inside.

    TRITON_INTERPRET=1 must be set before `mien.kernels` is imported.
    """
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
