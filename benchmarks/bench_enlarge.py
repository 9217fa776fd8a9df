"""Bilinear enlargement: forward, and forward with backward, as models use it.

Against the same in torch, and that in `torch.compile`. "bytes" are those of one read and one write
each way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.enlarge import enlarge

BATCH = 16

LAYERS = (
    # layer, channels and edge of x, factor
    ("dlight stem", 128, 4, 4),
    ("phaze-a hybrid", 256, 16, 2),
    ("phaze-a fast", 64, 64, 2),
)


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for layer, channels, size_px, factor in LAYERS:
        x_bchw = torch.randn(BATCH, channels, size_px, size_px, device=device, dtype=dtype)
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last).requires_grad_()
        for backward in (False, True):
            for variant, function in _variants(device):
                what = {
                    "kernel": "enlarge",
                    "layer": layer,
                    "batch": BATCH,
                    "channels": channels,
                    "size_px": size_px,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backward": backward,
                    "variant": variant,
                    "bytes": x_bchw.nbytes * (1 + factor**2) * (2 if backward else 1),
                }
                yield what, _timed(function, x_bchw, factor, backward)


def _variants(device: str) -> Iterator[tuple[str, Callable[[Tensor, int], Tensor]]]:
    yield "mien", enlarge
    yield "torch-eager", _plain
    if device == "cuda":
        torch.compiler.reset()  # else the cases before count against the limit of recompilations
        yield "torch-compile", torch.compile(_plain, dynamic=False)


def _plain(x_bchw: Tensor, factor: int) -> Tensor:
    return F.interpolate(x_bchw, scale_factor=factor, mode="bilinear", align_corners=False)


def _timed(
    function: Callable[[Tensor, int], Tensor], x_bchw: Tensor, factor: int, backward: bool
) -> Callable[[], None]:
    """A function that enlarges, and takes the gradient where it is asked for."""
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                function(x_bchw, factor)

        return forward_only

    grad = torch.randn_like(function(x_bchw, factor))

    def forward_and_backward() -> None:
        torch.autograd.grad(function(x_bchw, factor), x_bchw, grad)

    return forward_and_backward
