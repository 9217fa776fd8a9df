"""What stands between two convolutions: forward, and forward with backward, of models' layers.

Against the same in separate operations of torch, and those in `torch.compile`. "bytes" are those
of one read and one write each way: x and y forward; the gradient, y and x's gradient backward.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import activate, to_image, upscale
from ..models.blocks import depth_to_space

Function = Callable[..., Tensor]

BATCH = 16

LAYERS = (
    # layer, operation, channels and edge of x, what the operation is told
    ("original encoder", "activate", 128, 32, {"slope": 0.1, "border": (1, 2, 1, 2)}),
    ("original encoder", "activate", 256, 16, {"slope": 0.1, "border": (1, 2, 1, 2)}),
    ("original decoder", "upscale", 1024, 8, {"slope": 0.1}),
    ("original decoder", "upscale", 512, 16, {"slope": 0.1}),
    ("original decoder", "upscale", 256, 32, {"slope": 0.1}),
    ("original decoder", "to_image", 8, 64, {"channels": 3}),
    ("dfl_h128 encoder", "activate", 128, 64, {"slope": 0.1, "border": (1, 2, 1, 2)}),
    ("dfl_h128 decoder", "upscale", 2048, 16, {"slope": 0.1}),
    ("dfl_h128 decoder", "upscale", 1024, 32, {"slope": 0.1}),
    ("dfl_h128 decoder", "upscale", 512, 64, {"slope": 0.1}),
    ("dfl_h128 decoder", "to_image", 8, 128, {"channels": 3}),
)

_CACHE_BYTES = 64 * 2**20


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for layer, operation, channels, size_px, options in LAYERS:
        x_bchw = torch.randn(BATCH, channels, size_px, size_px, device=device, dtype=dtype)
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        for backward in (False, True):
            for variant, function in _variants(operation, options, device):
                run, num_bytes = _timed(function, x_bchw, backward)
                what = {
                    "kernel": "upscale",
                    "operation": operation,
                    "layer": layer,
                    "batch": BATCH,
                    "channels": channels,
                    "size_px": size_px,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backward": backward,
                    "variant": variant,
                    "bytes": num_bytes,
                }
                yield what, run


def _variants(
    operation: str, options: dict[str, Any], device: str
) -> Iterator[tuple[str, Function]]:
    ours, theirs = OPERATIONS[operation]
    yield "mien", functools.partial(ours, **options)
    yield "torch-eager", functools.partial(theirs, **options)
    if device == "cuda":
        torch.compiler.reset()  # else the cases before count against the limit of recompilations
        compiled = torch.compile(theirs, dynamic=False)
        yield "torch-compile", functools.partial(compiled, **options)


def plain_activate(
    x_bchw: Tensor, bias_c: Tensor, *, slope: float, border: tuple[int, int, int, int]
) -> Tensor:
    """`activate` as models have it without a kernel."""
    return F.pad(F.leaky_relu(x_bchw + bias_c.view(-1, 1, 1), slope), border)


def plain_upscale(x_bchw: Tensor, bias_c: Tensor, *, slope: float) -> Tensor:
    """`upscale` as models have it without a kernel."""
    return depth_to_space(F.leaky_relu(x_bchw + bias_c.view(-1, 1, 1), slope), 2)


def plain_to_image(x_bchw: Tensor, bias_c: Tensor, *, channels: int) -> Tensor:
    """`to_image` as models have it without a kernel."""
    return torch.sigmoid((x_bchw + bias_c.view(-1, 1, 1))[:, :channels].float())


OPERATIONS: dict[str, tuple[Function, Function]] = {
    "activate": (activate, plain_activate),
    "upscale": (upscale, plain_upscale),
    "to_image": (to_image, plain_to_image),
}
"""Ours, and the same in separate operations."""


def _timed(function: Function, x_bchw: Tensor, backward: bool) -> tuple[Callable[[], None], int]:
    """A function that runs on the next of several inputs, so that none is in a GPU's cache."""
    bias_c = torch.randn(x_bchw.shape[1], device=x_bchw.device, dtype=x_bchw.dtype)
    with torch.no_grad():
        y_bchw = function(x_bchw, bias_c)
    num_bytes = (x_bchw.nbytes + y_bchw.nbytes) + backward * (x_bchw.nbytes + 2 * y_bchw.nbytes)
    copies = 1 + math.ceil(_CACHE_BYTES / num_bytes) if x_bchw.is_cuda else 1
    inputs = [(x_bchw.clone(), torch.randn_like(y_bchw)) for _ in range(copies)]
    turn = itertools.cycle(inputs)
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                function(next(turn)[0], bias_c)

        return forward_only, num_bytes

    bias_c.requires_grad_()
    for x, _ in inputs:
        x.requires_grad_()

    def forward_and_backward() -> None:
        x, grad = next(turn)
        torch.autograd.grad(function(x, bias_c), (x, bias_c), grad)

    return forward_and_backward, num_bytes
