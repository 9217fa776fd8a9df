"""What a checkpoint may hold of an optimizer; a stranger may have made it."""

import math

import torch
from torch import Tensor

from ...kernels.scalars_update import GROWTH_INTERVAL

# The loss is multiplied by the scale, and the gradient divided by it.
_ABOVE_ZERO = math.ulp(0.0)
_LARGEST_SCALE = 2.0**127  # of fp32
MOST = 1e12
"""Most steps, gradients, or squared rates: what no run reaches."""

_LARGEST = torch.finfo(torch.float32).max
_RANGES = {
    "mean": (-_LARGEST, _LARGEST),
    # Never below nought: the rule takes its root, and NaN would spread to every weight.
    "square": (0.0, _LARGEST),
    "largest": (0.0, _LARGEST),
    "ema": (-_LARGEST, _LARGEST),
    "base": (-_LARGEST, _LARGEST),
    "step": (0.0, MOST),
    # Adam divides by one less this; at 1 only before the first step.
    "beta_1_power": (0.0, 1.0),
    "beta_2_power": (0.0, 1.0),
    "momentum_product": (0.0, 1.0),
    "scale": (_ABOVE_ZERO, _LARGEST_SCALE),
    "good_steps": (0.0, GROWTH_INTERVAL),
    "accumulated": (0.0, MOST),
    "average_weight": (0.0, MOST),
    "history": (0.0, math.inf),
}
"""Lowest and highest number, by the last part of the name. An accumulator holds any: its step is
left out where they are not finite."""


def check(name: str, tensor: Tensor | None, like: Tensor) -> None:
    """Refuse a tensor of an optimizer's state that is not as the model's own.

    Args:
        name: Name of the tensor in the checkpoint.
        tensor: What it holds; None: nothing.
        like: Tensor of the shape and number format that it must have. A history may have any
            length.

    Raises:
        ValueError: It has another shape or number format, or holds a number out of range.
    """
    kind = name.rpartition(".")[2]
    shape = None if tensor is None else tuple(tensor.shape)
    if tensor is not None and kind == "history" and tensor.ndim == 1:
        # The setting of its length may have changed: what is there is cut or filled up.
        shape = tuple(like.shape)
    if tensor is None or shape != tuple(like.shape) or tensor.dtype != like.dtype:
        got = "none" if tensor is None else _described(tensor)
        raise ValueError(f"optimizer state of {name} must be {_described(like)}, got {got}")
    # An empty history has no least number.
    if kind not in _RANGES or not tensor.numel():
        return
    low, high = _RANGES[kind]
    least, most = (float(number) for number in tensor.aminmax())
    # Written so that NaN, which compares with nothing, is refused too.
    if not low <= least <= most <= high:
        got = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        raise ValueError(f"optimizer state of {name} must be from {low:g} to {high:g}, got {got}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
