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


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of another program and what puts it into its place."""

    shape: tuple[int, ...]
    """Shape in Keras's layout."""

    load: Callable[[np.ndarray], None]
    """Takes an array of that shape."""

    read: Callable[[], np.ndarray] | None = None
    """Gives the array as it is now; None where that cannot be told."""

    tensor: Tensor | None = None
    """Tensor of the model that holds the numbers, where one alone does."""


def keras_entries(module: nn.Module) -> Iterator[Entry]:
    """Every array that fills a model, in order.

    A module in it whose arrays are not its parameters one by one tells its own by a method
    ``keras_entries()``.
    """
    for _, parameter in module.named_parameters(recurse=False):
        yield _entry(module, parameter)
    for _, buffer in module.named_buffers(recurse=False):
        yield _entry(module, buffer)
    for child in module.children():
        if hasattr(child, "keras_entries"):
            yield from cast(Any, child).keras_entries()
        else:
            yield from keras_entries(child)


def _entry(module: nn.Module, tensor: Tensor) -> Entry:
    is_depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    order = {4: (2, 3, 0, 1) if is_depthwise else (2, 3, 1, 0), 2: (1, 0)}.get(tensor.dim(), (0,))
    turned = tuple(tensor.shape[axis] for axis in order)
    back = [order.index(axis) for axis in range(len(order))]

    def load(array: np.ndarray) -> None:
        # A norm's array has more axes in Keras than its tensor here.
        source = torch.from_numpy(np.ascontiguousarray(array)).reshape(turned)
        tensor.detach().copy_(source.permute(back))

    shape = cast(Any, module).keras_shape() if hasattr(module, "keras_shape") else turned

    def read() -> np.ndarray:
        # NumPy has no bfloat16.
        array = tensor.detach().float().cpu().permute(order).numpy()
        return np.ascontiguousarray(array).reshape(shape)

    return Entry(shape, load, read, tensor)


def load_keras_weights(model: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Fill a model with ordered Keras arrays.

    Raises:
        ValueError: There are more or fewer arrays than the model takes, or a shape does not fit.
    """
    entries = [*keras_entries(model)]
    if len(arrays) != len(entries):
        raise ValueError(f"the model has {len(entries)} weights, got {len(arrays)} arrays")
    for number, (entry, array) in enumerate(zip(entries, arrays, strict=True)):
        if array.shape != entry.shape:
            raise ValueError(f"array {number} must have shape {entry.shape}, got {array.shape}")
    # All shapes have been looked at: a set that is refused leaves the model as it was.
    for entry, array in zip(entries, arrays, strict=True):
        entry.load(array)
