"""Channels padded to a multiple, so that tensor cores take every product; unseen outside.

A padded channel's weights and biases are zeros. It computes zeros (or is dropped, after a sigmoid),
receives no gradient, and so stays zero in training. Checkpoints hold the numbers without it.

Where a tensor is a concatenation, each of its parts is padded by itself: its channels are *runs*.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MULTIPLE = 8
"""Channels that tensor cores take at a time, in 16 bits."""

Runs = tuple[int, ...]
"""Channels that lie together, each run to be followed by zeros of its own."""


@dataclass(frozen=True)
class Axis:
    """One axis of a weight, and where its numbers stand among the zeros."""

    number: int
    places: Tensor
    """(numbers of the axis,) int64, ascending."""

    length: int
    """Length of the padded axis."""


Axes = tuple[Axis, ...]


def runs_of(channels: int | Runs) -> Runs:
    """Channels as runs: a plain number is one."""
    return (channels,) if isinstance(channels, int) else channels


def axis(number: int, runs: Runs, repeats: int, multiple: int) -> Axis:
    """An axis of ``repeats`` times these runs, each of which is to be padded to a multiple."""
    begins, end = [], 0
    for size in runs:
        begins.append(torch.arange(end, end + size))
        end += size + -size % multiple
    # A shuffle takes groups of channels apart: each group has the same zeros again.
    places = torch.arange(repeats)[:, None] * end + torch.cat(begins)
    return Axis(number, places.flatten(), repeats * end)


def pad(tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The tensor with the zeros in their places, in the same memory layout."""
    for each in axes:
        shape = list(tensor.shape)
        shape[each.number] = each.length
        places = each.places.to(tensor.device)
        tensor = tensor.new_zeros(shape).index_copy(each.number, places, tensor)
    return _dense(tensor)


def crop(tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The tensor without the zeros: what `pad` was given."""
    for each in axes:
        tensor = tensor.index_select(each.number, each.places.to(tensor.device))
    return _dense(tensor)


def _dense(tensor: Tensor) -> Tensor:
    # Kernels and cuDNN want NHWC; index_copy and index_select may return another layout.
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def pad_parameter(layer: nn.Module, name: str, axes: Axes) -> None:
    """Pad one parameter of a layer in place and remember how, for `axes_of`."""
    # Axes that fit already are left out: to crop them at a save would copy for nothing.
    needed = tuple(each for each in axes if each.length > len(each.places))
    parameter = getattr(layer, name)
    if parameter is None or not needed:
        return
    parameter.data = pad(parameter.data, needed)
    # On the parameter itself, which the optimizer and the saves meet without its layer.
    parameter.alignment = needed


def axes_of(parameter: Tensor) -> Axes:
    """How a parameter is padded; empty where it is not."""
    return getattr(parameter, "alignment", ())
