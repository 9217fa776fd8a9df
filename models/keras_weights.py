"""Weights of other programs that store them as ordered Keras arrays.

Order: the sub-networks in the order in which the family makes them, in each its layers in the order
in which they are made, in each layer the kernel, then the bias (of a norm the gain, the bias, the
running mean and variance). Layouts: a convolution's kernel is (kh, kw, in, out), a depthwise one's
(kh, kw, in, 1), a transposed one's (kh, kw, out, in), a dense layer's (in, out) with both indices
in NHWC flatten order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """One array of the list, and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[Tensor], None]
    """Take up the array, a tensor of this shape."""


def keras_entries(module: nn.Module, path: str = "") -> Iterator[Entry]:
    """Every array that fills a model, in order.

    A module whose arrays are not its parameters one by one yields its own from a method
    ``keras_entries(path)``.
    """
    if path and hasattr(module, "keras_entries"):
        yield from cast(Any, module).keras_entries(path)
        return
    own = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, False)]
    for name, tensor in own:
        yield _entry(name, module, tensor)
    for name, child in module.named_children():
        yield from keras_entries(child, f"{path}.{name}" if path else name)


def _entry(name: str, module: nn.Module, tensor: Tensor) -> Entry:
    is_depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    order = {4: (2, 3, 0, 1) if is_depthwise else (2, 3, 1, 0), 2: (1, 0)}.get(tensor.dim(), (0,))
    shape = tuple(tensor.shape[axis] for axis in order)
    if hasattr(module, "keras_shape"):
        shape = cast(Any, module).keras_shape()

    def load(array: Tensor) -> None:
        view = array.reshape([tensor.shape[axis] for axis in order])
        back = [order.index(axis) for axis in range(len(order))]
        with torch.no_grad():
            tensor.copy_(view.permute(back))

    return Entry(name, shape, load)


def load_keras_weights(model: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Fill a model with ordered Keras arrays.

    Raises:
        ValueError: There are more or fewer arrays than the model takes, or a shape does not fit.
    """
    entries = [*keras_entries(model)]
    if len(arrays) != len(entries):
        raise ValueError(f"the model has {len(entries)} weights, got {len(arrays)} arrays")
    for entry, array in zip(entries, arrays, strict=True):
        if array.shape != entry.shape:
            raise ValueError(f"{entry.name} must have shape {entry.shape}, got {array.shape}")
    for entry, array in zip(entries, arrays, strict=True):
        entry.load(torch.from_numpy(np.ascontiguousarray(array)))
