"""Channels padded to a multiple, so that tensor cores take every product; unseen outside.

A padded channel's weights and biases are zeros. It computes zeros (or is dropped, after a sigmoid),
receives no gradient, and so stays zero in training. Checkpoints hold the numbers without it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 8
"""Channels that tensor cores take at a time, in 16 bits."""


@dataclass(frozen=True)
class Axis:
    """One axis of a weight: ``groups`` runs of ``size`` numbers, each followed by zeros."""

    number: int
    groups: int
    size: int
    padding: int


Axes = tuple[Axis, ...]


def axis(number: int, groups: int, length: int, multiple: int) -> Axis:
    """The axis of ``length`` numbers in equal groups, each to be padded to a multiple."""
    size = length // groups
    return Axis(number, groups, size, -size % multiple)


def pad(tensor: Tensor, axes: Axes) -> Tensor:
    """The tensor with the zeros in their places, in the same memory layout."""
    for each in axes:
        shape = tensor.shape
        runs = tensor.movedim(each.number, -1).unflatten(-1, (each.groups, each.size))
        padded = F.pad(runs, (0, each.padding)).flatten(-2)
        tensor = padded.movedim(-1, each.number)
        assert tensor.dim() == len(shape)
    return _dense(tensor)


def crop(tensor: Tensor, axes: Axes) -> Tensor:
    """The tensor without the zeros: what `pad` was given."""
    for each in axes:
        runs = tensor.movedim(each.number, -1).unflatten(-1, (each.groups, -1))
        tensor = runs[..., : each.size].flatten(-2).movedim(-1, each.number)
    return _dense(tensor)


def _dense(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def pad_parameter(layer: nn.Module, name: str, axes: Axes) -> None:
    """Pad one parameter of a layer in place and remember how, for `axes_of`."""
    needed = tuple(each for each in axes if each.padding)
    parameter = getattr(layer, name)
    if parameter is None or not needed:
        return
    parameter.data = pad(parameter.data, needed)
    parameter.alignment = needed


def axes_of(parameter: Tensor) -> Axes:
    """How a parameter is padded; empty where it is not."""
    return getattr(parameter, "alignment", ())
