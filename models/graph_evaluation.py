"""Evaluation of a described model in plain PyTorch, layer by layer: what an export is checked by.

It knows only the description and the arrays of the weights, and shares no code with the modules
that a model is trained with. It computes in fp64, so that a difference from a model is the model's
own rounding: between two orders of fp32 sums it can pass 1e-4 where layers are large.

Shape letters: B faces, C channels, H rows, W columns, N numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Call, Layer, Network, Value, finishing_order, reflected_pixels

Values = dict[tuple[Call, int], Tensor]


@torch.no_grad()
def evaluate(
    network: Network, outputs: tuple[Value, ...], faces: dict[str, Tensor]
) -> list[Tensor]:
    """What outputs of a network are, outside training.

    Args:
        network: Model or sub-network.
        outputs: Values of it; inputs that they do not need may be missing.
        faces: (B, C, H, W) or (B, N) by the name of the InputLayer.

    Returns:
        (B, C, H, W) or (B, N), fp64, of each output.
    """
    given = {value.call: faces[value.call.layer.name].double() for value in _needed(network, faces)}
    return _evaluated(outputs, given)


def _needed(network: Network, faces: dict[str, Tensor]) -> list[Value]:
    return [value for value in network.inputs if value.call.layer.name in faces]


def _evaluated(outputs: tuple[Value, ...], given: dict[Call, Tensor]) -> list[Tensor]:
    values: Values = {(call, 0): tensor for call, tensor in given.items()}
    for call in finishing_order(outputs)[0]:
        if call in given:
            continue
        inputs = [values[value.call, value.index] for value in call.inputs]
        if isinstance(call.layer, Network):
            inner = call.layer
            # The inner network's own values begin anew: each side calls it with another face.
            by_input = dict(zip((value.call for value in inner.inputs), inputs, strict=True))
            results = _evaluated(inner.outputs, by_input)
        else:
            results = [_OPERATIONS[call.layer.kind](call.layer, inputs)]
        values |= {(call, index): result for index, result in enumerate(results)}
    return [values[value.call, value.index] for value in outputs]


def _arrays(layer: Layer) -> list[Tensor]:
    arrays = []
    for entry in layer.weights:
        if entry.read is None:
            raise ValueError(f"the weights of {layer.name} cannot be read")
        arrays.append(torch.from_numpy(np.asarray(entry.read(), np.float64)))
    return arrays


def _same_pixels(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _padded(layer: Layer, x_bchw: Tensor) -> Tensor:
    if layer.attributes["padding"] != "same":
        return x_bchw
    (rows, columns), strides = layer.attributes["kernel_size"], layer.attributes["strides"]
    left_right = _same_pixels(x_bchw.shape[3], columns, strides[1])
    return F.pad(x_bchw, (*left_right, *_same_pixels(x_bchw.shape[2], rows, strides[0])))


def _biased(product_bchw: Tensor, bias: list[Tensor]) -> Tensor:
    """The product of a convolution with its bias, if it has one."""
    return product_bchw + _along_channels(bias[0], product_bchw) if bias else product_bchw


def _convolution(layer: Layer, inputs: list[Tensor]) -> Tensor:
    kernel, *bias = _arrays(layer)
    # Keras's kernels are (rows, columns, in, out).
    x_bchw, weight = _padded(layer, inputs[0]), kernel.permute(3, 2, 0, 1)
    return _biased(F.conv2d(x_bchw, weight, stride=layer.attributes["strides"]), bias)


def _by_channel(layer: Layer, x_bchw: Tensor, kernel: Tensor) -> Tensor:
    rows, columns, channels, multiplier = kernel.shape
    weight = kernel.permute(2, 3, 0, 1).reshape(channels * multiplier, 1, rows, columns)
    strides = layer.attributes["strides"]
    return F.conv2d(_padded(layer, x_bchw), weight, stride=strides, groups=channels)


def _depthwise(layer: Layer, inputs: list[Tensor]) -> Tensor:
    kernel, *bias = _arrays(layer)
    return _biased(_by_channel(layer, inputs[0], kernel), bias)


def _separable(layer: Layer, inputs: list[Tensor]) -> Tensor:
    depthwise, pointwise, *bias = _arrays(layer)
    product_bchw = _by_channel(layer, inputs[0], depthwise)
    return _biased(F.conv2d(product_bchw, pointwise.permute(3, 2, 0, 1)), bias)


def _transposed(layer: Layer, inputs: list[Tensor]) -> Tensor:
    kernel, *bias = _arrays(layer)
    (size, _), (stride, _) = layer.attributes["kernel_size"], layer.attributes["strides"]
    x_bchw, weight = inputs[0], kernel.permute(3, 2, 0, 1)
    # Unpadded, and cut to size below: PyTorch's own padding would cut both ends alike.
    whole = _biased(F.conv_transpose2d(x_bchw, weight, stride=stride), bias)
    cut = (max(size - stride, 0) + 1) // 2  # the larger share first, as Keras does on torch
    rows, columns = x_bchw.shape[2] * stride, x_bchw.shape[3] * stride
    return whole[:, :, cut : cut + rows, cut : cut + columns]


def _dense(layer: Layer, inputs: list[Tensor]) -> Tensor:
    kernel, *bias = _arrays(layer)
    product = inputs[0] @ kernel
    return product + bias[0] if bias else product


def _flatten(_: Layer, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    return x.permute(0, 2, 3, 1).flatten(1) if x.dim() == 4 else x


def _reshape(layer: Layer, inputs: list[Tensor]) -> Tensor:
    flat, target = _flatten(layer, inputs), layer.attributes["target_shape"]
    shaped = flat.reshape(len(flat), *target)
    return shaped.permute(0, 3, 1, 2) if len(target) == 3 else shaped


def _shuffle(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """Depth to space; the channels of one offset lie together."""
    (down, right), x_bchw = layer.attributes["size"], inputs[0]
    faces, channels, rows, columns = x_bchw.shape
    parts = x_bchw.reshape(faces, down, right, channels // (down * right), rows, columns)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(faces, -1, rows * down, columns * right)


def _enlarge(layer: Layer, inputs: list[Tensor]) -> Tensor:
    down, right = layer.attributes["size"]
    mode = layer.attributes["interpolation"]
    factors = (float(down), float(right))
    if mode == "nearest":
        return F.interpolate(inputs[0], scale_factor=factors, mode=mode)
    return F.interpolate(inputs[0], scale_factor=factors, mode=mode, align_corners=False)


def _reflect(layer: Layer, inputs: list[Tensor]) -> Tensor:
    kernel, stride = layer.attributes["kernel_size"], layer.attributes["stride"]
    rows, columns = inputs[0].shape[2:]
    border = (*reflected_pixels(columns, kernel, stride), *reflected_pixels(rows, kernel, stride))
    return F.pad(inputs[0], border, mode="reflect")


def _activation(layer: Layer, inputs: list[Tensor]) -> Tensor:
    return {"sigmoid": torch.sigmoid, "relu": torch.relu}[layer.attributes["activation"]](inputs[0])


def _leaky_relu(layer: Layer, inputs: list[Tensor]) -> Tensor:
    return F.leaky_relu(inputs[0], layer.attributes["negative_slope"])


def _along_channels(array: Tensor, x: Tensor) -> Tensor:
    return array.reshape(-1, *(1,) * (x.dim() - 2))


def _batch_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    gain, offset, mean, variance = (_along_channels(a, inputs[0]) for a in _arrays(layer))
    return (inputs[0] - mean) / (variance + layer.attributes["epsilon"]).sqrt() * gain + offset


def _deviation(x: Tensor, axes: Any) -> tuple[Tensor, Tensor]:
    """The values less their mean, and their deviation."""
    centred = x - x.mean(axes, keepdim=True)
    return centred, centred.square().mean(axes, keepdim=True).sqrt()


def _instance_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    gain, offset = _arrays(layer)
    is_whole = layer.attributes["axis"] is None
    axes = tuple(range(1 if is_whole else 2, inputs[0].dim()))
    centred, deviation = _deviation(inputs[0], axes)
    gain, offset = (_along_channels(array, inputs[0]) for array in (gain, offset))
    # To the deviation, as the reference's layer has it.
    return centred / (deviation + layer.attributes["epsilon"]) * gain + offset


def _group_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    gain, offset = (_along_channels(array.flatten(), inputs[0]) for array in _arrays(layer))
    grouped = inputs[0].reshape(len(inputs[0]), layer.attributes["group"], -1)
    centred, deviation = _deviation(grouped, 2)
    normal = centred / (deviation.square() + layer.attributes["epsilon"]).sqrt()
    return normal.reshape(inputs[0].shape) * gain + offset


def _layer_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    gain, offset = (_along_channels(array, inputs[0]) for array in _arrays(layer))
    centred, deviation = _deviation(inputs[0], 1)
    return centred / (deviation.square() + layer.attributes["epsilon"]).sqrt() * gain + offset


def _rms_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    (gain,) = (_along_channels(array, inputs[0]) for array in _arrays(layer))
    mean_square = inputs[0].square().mean(1, keepdim=True)
    return inputs[0] / (mean_square + layer.attributes["epsilon"]).sqrt() * gain


def _adaptive_norm(layer: Layer, inputs: list[Tensor]) -> Tensor:
    x, offset, gain = inputs
    centred, deviation = _deviation(x, (2, 3))
    return centred / (deviation + layer.attributes["epsilon"]) * gain + offset


def _average_pool(layer: Layer, inputs: list[Tensor]) -> Tensor:
    return F.avg_pool2d(inputs[0], layer.attributes["pool_size"])


def _max_pool(layer: Layer, inputs: list[Tensor]) -> Tensor:
    return F.max_pool2d(inputs[0], layer.attributes["pool_size"])


_OPERATIONS: dict[str, Callable[[Layer, list[Tensor]], Tensor]] = {
    **dict.fromkeys(("Dropout", "GaussianNoise", "SpatialDropout2D"), lambda _, inputs: inputs[0]),
    "Activation": _activation,
    "AdaInstanceNormalization": _adaptive_norm,
    "Add": lambda _, inputs: sum(inputs[1:], inputs[0]),
    "AveragePooling2D": _average_pool,
    "BatchNormalization": _batch_norm,
    "Concatenate": lambda _, inputs: torch.cat(inputs, dim=1),
    "Conv2D": _convolution,
    "Conv2DTranspose": _transposed,
    "Dense": _dense,
    "DepthwiseConv2D": _depthwise,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": lambda _, inputs: inputs[0].mean((2, 3)),
    "GlobalMaxPooling2D": lambda _, inputs: inputs[0].amax((2, 3)),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "KResizeImages": _enlarge,
    "LayerNormalization": _layer_norm,
    "LeakyReLU": _leaky_relu,
    "MaxPooling2D": _max_pool,
    "PixelShuffler": _shuffle,
    "RMSNormalization": _rms_norm,
    "ReflectionPadding2D": _reflect,
    "Reshape": _reshape,
    "SeparableConv2D": _separable,
    "UpSampling2D": _enlarge,
}
