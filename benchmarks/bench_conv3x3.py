"""3x3 convolutions on the CPU: forward, and forward with backward, as models use them.

Against PyTorch's own. On a GPU there is nothing to compare: its library chooses by itself. "flops"
are those of the direct convolution, so that a share of the ceiling may be above 1.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.conv3x3 import conv3x3

BATCH = 8

LAYERS = (
    # layer, channels in and out, edge in px
    ("upscale 4 px", 512, 1024, 4),
    ("upscale 8 px", 256, 2048, 8),
    ("upscale 16 px", 512, 1024, 16),
    ("upscale 32 px", 256, 512, 32),
    ("residual 64 px", 128, 128, 64),
)


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time); nothing on a GPU."""
    for layer, inputs, outputs, size_px in () if torch.cuda.is_available() else LAYERS:
        x_bchw = torch.randn(BATCH, inputs, size_px, size_px)
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last)
        weight.requires_grad_()
        for backward in (False, True):
            for variant, function in (("mien", conv3x3), ("torch-eager", _plain)):
                what = {
                    "kernel": "conv3x3",
                    "layer": layer,
                    "batch": BATCH,
                    "channels": [inputs, outputs],
                    "size_px": size_px,
                    "dtype": "float32",
                    "backward": backward,
                    "variant": variant,
                    # Two operations at nine taps; the backward pass has two products of that size.
                    "flops": 18 * BATCH * size_px**2 * inputs * outputs * (3 if backward else 1),
                }
                yield what, _timed(function, x_bchw, weight, backward)


def _plain(x_bchw: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x_bchw, weight, padding=1)


def _timed(
    function: Callable[[Tensor, Tensor], Tensor], x_bchw: Tensor, weight: Tensor, backward: bool
) -> Callable[[], None]:
    """A function that convolves, and takes both gradients where they are asked for."""
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                function(x_bchw, weight)

        return forward_only

    grad = torch.randn_like(function(x_bchw, weight))

    def forward_and_backward() -> None:
        torch.autograd.grad(function(x_bchw, weight), (x_bchw, weight), grad)

    return forward_and_backward
