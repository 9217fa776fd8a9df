"""Weights of other programs that store them as ordered Keras arrays.

Order: the sub-networks in the order in which the family makes them, in each its layers in the order
in which they are made, in each layer the kernel, then the bias. Layouts: a convolution's kernel is
(kh, kw, in, out), a dense layer's (in, out) with both indices in NHWC flatten order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of another program and what puts it into its place."""

    shape: tuple[int, ...]
    """In Keras's layout."""

    load: Callable[[np.ndarray], None]
    """Takes an array of that shape."""


def ordered_parameters(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """``(name, its layer, parameter)`` in the order above."""
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            found.append((name, module, parameter))
    return found


def keras_shape(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """The shape under which Keras stores a parameter."""
    if parameter.dim() == 4 and isinstance(module, nn.Conv2d):
        out_channels, in_channels, rows, columns = parameter.shape
        return rows, columns, in_channels, out_channels
    return tuple(reversed(parameter.shape))


def load_keras_weights(model: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Fill a model with ordered Keras arrays.

    Raises:
        ValueError: There are more or fewer arrays than parameters, or a shape does not fit.
    """
    parameters = ordered_parameters(model)
    if len(arrays) != len(parameters):
        raise ValueError(f"the model has {len(parameters)} weights, got {len(arrays)} arrays")
    for (name, module, parameter), array in zip(parameters, arrays, strict=True):
        wanted = keras_shape(module, parameter)
        if array.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        with torch.no_grad():
            parameter.copy_(tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.t())
