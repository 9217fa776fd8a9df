"""What stands between two convolutions: forward, and forward with backward, of models' layers.

Against the same in separate operations of torch, and those in `torch.compile`. "bytes" are those
of one read and one write each way: x and y forward; the gradient, y and x's gradient backward.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.bias_act import bias_act, bias_act_depth_to_space

Function = Callable[..., Tensor]

Layer = tuple[str, str, int, int, dict[str, Any]]
"""Layer, operation, channels and edge of x, what the operation is told."""

BATCH = 16

_FRAMED = {"negative_slope": 0.1, "border": (1, 2, 1, 2)}
_LEAKY = {"negative_slope": 0.1}
LAYERS: tuple[Layer, ...] = (
    ("original encoder", "bias_act", 128, 32, _FRAMED),
    ("original encoder", "bias_act", 256, 16, _FRAMED),
    ("original decoder", "bias_act_depth_to_space", 1024, 8, _LEAKY),
    ("original decoder", "bias_act_depth_to_space", 512, 16, _LEAKY),
    ("original decoder", "bias_act_depth_to_space", 256, 32, _LEAKY),
    ("dfl_h128 encoder", "bias_act", 128, 64, _FRAMED),
    ("dfl_h128 decoder", "bias_act_depth_to_space", 2048, 16, _LEAKY),
    ("dfl_h128 decoder", "bias_act_depth_to_space", 1024, 32, _LEAKY),
    ("dfl_h128 decoder", "bias_act_depth_to_space", 512, 64, _LEAKY),
)

_OPERATIONS: dict[str, tuple[Function, Function]] = {
    "bias_act": (bias_act, reference.bias_act),
    "bias_act_depth_to_space": (bias_act_depth_to_space, reference.bias_act_depth_to_space),
}
"""Ours, and the same in separate operations."""

# More than the L2 of an H100, which has 50 MB.
_CACHE_BYTES = 64 * 2**20


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time)."""
    return cases_of(LAYERS, _OPERATIONS)


def cases_of(
    layers: Sequence[Layer], operations: Mapping[str, tuple[Function, Function]]
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield (what it is, function to time) of each layer; operations are ours and theirs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for layer, operation, channels, size_px, options in layers:
        x_bchw = torch.randn(BATCH, channels, size_px, size_px, device=device, dtype=dtype)
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        for backward in (False, True):
            for variant, function in _variants(*operations[operation], options, device):
                run, num_bytes = _timed(function, x_bchw, backward)
                what = {
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
    ours: Function, theirs: Function, options: dict[str, Any], device: str
) -> Iterator[tuple[str, Function]]:
    yield "mien", functools.partial(ours, **options)
    yield "torch-eager", functools.partial(theirs, **options)
    if device == "cuda":
        torch.compiler.reset()  # else the cases before count against the limit of recompilations
        # For each shape by itself, as our kernels are: a form for any shape would be slower.
        compiled = torch.compile(theirs, dynamic=False)
        yield "torch-compile", functools.partial(compiled, **options)


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
