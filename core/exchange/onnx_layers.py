"""Layers of a model's graph (`models.graph`) as ONNX operations.

Pictures are NHWC in the graph and NCHW here: what flattens one turns it first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...models.graph import Call, Layer, Network, Shape, reflected_pixels
from .onnx_graph import OnnxGraph

Names = tuple[str, ...]
"""Names of values of the ONNX graph."""


class ModelWriter:
    """Writer of networks into one graph; a layer that meets the same values twice is written once.

    Args:
        graph: Graph that they go to.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._written: dict[tuple[int, Names], Names] = {}

    def write(self, network: Network, *inputs: str) -> Names:
        """Write a network; names of its outputs.

        Args:
            network: Model, or sub-network of one.
            inputs: Names of what goes in, in the order of its inputs.

        Raises:
            ValueError: It has a layer that cannot be said in ONNX.
        """
        given = zip(network.inputs, inputs, strict=True)
        names = {(value.call, value.index): name for value, name in given}
        for call in network.calls:
            # Inputs have their names already: they are calls too, of layers that compute nothing.
            if (call, 0) not in names:
                taken = tuple(names[value.call, value.index] for value in call.inputs)
                for index, name in enumerate(self._called(call, taken)):
                    names[call, index] = name
        return tuple(names[value.call, value.index] for value in network.outputs)

    def _called(self, call: Call, inputs: Names) -> Names:
        # By what goes in: both sides' calls of a shared encoder on one face are one.
        key, layer = (id(call.layer), inputs), call.layer
        if key not in self._written:
            if isinstance(layer, Network):
                self._written[key] = self.write(layer, *inputs)
            else:
                shapes = tuple(value.shape for value in call.inputs)
                self._written[key] = (_written(_Step(self._graph, layer, inputs, shapes)),)
        return self._written[key]


@dataclass(frozen=True)
class _Step:
    """One call of a layer that is to be written."""

    graph: OnnxGraph
    layer: Layer
    inputs: Names
    shapes: tuple[Shape, ...]
    """Shapes of the inputs, as in the graph."""

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """Append an operation; an input that is a number becomes a constant."""
        names = (x if isinstance(x, str) else self.graph.constant(x) for x in inputs)
        return self.graph.add(operator, *names, **attributes)

    def weight(self, number: int, *, order: tuple[int, ...] = (), shape: Shape = ()) -> str:
        """Store a weight once, however often its layer is called; the name for it.

        Args:
            number: Number of the weight.
            order: Order in which ONNX has its axes, where another.
            shape: Shape that ONNX has it in, where another.
        """
        name = f"{self.layer.name}.{number}"
        if name not in self.graph.constants:
            read = self.layer.weights[number].read
            if read is None:
                raise ValueError(f"weight {name} cannot be written: how it is stored is unknown")
            array = read()
            array = array.transpose(order) if order else array
            self.graph.constant(array.reshape(shape) if shape else array, name)
        return name

    @property
    def x(self) -> str:
        """Name of the first input."""
        return self.inputs[0]

    @property
    def channels(self) -> int:
        """Channels of the first input."""
        return self.shapes[0][-1]

    def __getitem__(self, name: str) -> Any:
        """Attribute of the layer."""
        return self.layer.attributes[name]


def _written(step: _Step) -> str:
    """Write a layer; name of its output."""
    kind = step.layer.kind
    if kind not in LAYERS:
        raise ValueError(f"{step.layer.name} is a {kind}, which cannot be written as ONNX")
    return LAYERS[kind](step)


def _same(step: _Step) -> str:
    # Dropout and noise do nothing outside training.
    return step.x


def _padding(step: _Step) -> list[int]:
    """Pixels above, left, below and right of a picture that a convolution adds."""
    pads = [(0, 0), (0, 0)]
    if step["padding"] == "same":
        sizes = zip(step.shapes[0][:2], step["kernel_size"], step["strides"], strict=True)
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes]
        # An odd pixel goes behind, as TensorFlow's "same" has it.
        pads = [(total // 2, total - total // 2) for total in totals]
    (above, below), (left, right) = pads
    return [above, left, below, right]


def _convolution(step: _Step) -> str:
    # Rows, columns, in, out in Keras; out, in, rows, columns here.
    weights = [step.weight(0, order=(3, 2, 0, 1))]
    weights += [step.weight(1)] if step["use_bias"] else []
    return step.add("Conv", step.x, *weights, pads=_padding(step), strides=[*step["strides"]])


def _depthwise(step: _Step) -> str:
    # A group for each channel is how ONNX says depthwise.
    kernel = step.weight(0, order=(2, 3, 0, 1), shape=(-1, 1, *step["kernel_size"]))
    pads, strides = _padding(step), [*step["strides"]]
    return step.add("Conv", step.x, kernel, pads=pads, strides=strides, group=step.channels)


def _separable(step: _Step) -> str:
    x = _depthwise(step)
    pointwise = [step.weight(1, order=(3, 2, 0, 1))]
    pointwise += [step.weight(2)] if step["use_bias"] else []
    return step.add("Conv", x, *pointwise)


def _transposed(step: _Step) -> str:
    # Rows, columns, out, in in Keras; in, out, rows, columns here.
    kernel, bias = step.weight(0, order=(3, 2, 0, 1)), [step.weight(1)] if step["use_bias"] else []
    # What is too much is cut off at the begin first, as Keras does on PyTorch.
    excess = [max(k - s, 0) for k, s in zip(step["kernel_size"], step["strides"], strict=True)]
    pads = [-(-each // 2) for each in excess] + [each // 2 for each in excess]
    return step.add("ConvTranspose", step.x, kernel, *bias, pads=pads, strides=[*step["strides"]])


def _dense(step: _Step) -> str:
    bias = [step.weight(1)] if step["use_bias"] else []
    # As it lies: Keras and Gemm have dense weights as (in, out).
    return step.add("Gemm", step.x, step.weight(0), *bias)


def _flat(step: _Step) -> str:
    if len(step.shapes[0]) == 1:
        return step.x
    # Turned first: the rows of a dense weight stand in the order of NHWC.
    nhwc = step.add("Transpose", step.x, perm=[0, 2, 3, 1])
    return step.add("Reshape", nhwc, step.graph.sizes(-1, math.prod(step.shapes[0])))


def _reshaped(step: _Step) -> str:
    target = tuple(step["target_shape"])
    flat = _flat(step)
    if len(target) == 1:
        return flat
    nhwc = step.add("Reshape", flat, step.graph.sizes(-1, *target))
    return step.add("Transpose", nhwc, perm=[0, 3, 1, 2])


def _activation(step: _Step) -> str:
    return step.add({"sigmoid": "Sigmoid", "relu": "Relu"}[step["activation"]], step.x)


def _leaky_relu(step: _Step) -> str:
    return step.add("LeakyRelu", step.x, alpha=float(step["negative_slope"]))


def _shuffled(step: _Step) -> str:
    factor, _ = step["size"]
    # DCR: the order of channels in which TensorFlow, Keras and mien shuffle.
    return step.add("DepthToSpace", step.x, blocksize=factor, mode="DCR")


def _enlarged(step: _Step) -> str:
    modes: dict[str, dict[str, str]] = {
        "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        "nearest": {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    }
    scales = [1, 1, *step["size"]]
    # No region: only another way of choosing coordinates reads it.
    return step.add("Resize", step.x, "", scales, **modes[step["interpolation"]])


def _reflected(step: _Step) -> str:
    kernel, stride = step["kernel_size"], step["stride"]
    pads = [reflected_pixels(size, kernel, stride) for size in step.shapes[0][:2]]
    (above, below), (left, right) = pads
    # All begins, then all ends, as ONNX has them, and not in pairs.
    sizes = step.graph.sizes(0, 0, above, left, 0, 0, below, right)
    return step.add("Pad", step.x, sizes, mode="reflect")


def _pooled(operator: str) -> Callable[[_Step], str]:
    def write(step: _Step) -> str:
        edges = [*step["pool_size"]]
        return step.add(operator, step.x, kernel_shape=edges, strides=edges)

    return write


def _over_pixels(operator: str) -> Callable[[_Step], str]:
    # In opset 13 an attribute; from 18 on an input.
    return lambda step: step.add(operator, step.x, axes=[2, 3], keepdims=0)


def _sum(step: _Step) -> str:
    total = step.x
    for other in step.inputs[1:]:
        total = step.add("Add", total, other)
    return total


def _joined(step: _Step) -> str:
    return step.add("Concat", *step.inputs, axis=1)


def _normalized(step: _Step, x: str, axes: list[int], *, epsilon_in_root: bool) -> str:
    """The value less its mean over axes, by its deviation; epsilon is added to the variance or,
    else, to its root."""
    epsilon = float(step["epsilon"])
    # Of plain operators: ONNX has group and layer norms only in later versions.
    centred = step.add("Sub", x, step.add("ReduceMean", x, axes=axes))
    variance = step.add("ReduceMean", step.add("Mul", centred, centred), axes=axes)
    if epsilon_in_root:
        deviation = step.add("Sqrt", step.add("Add", variance, epsilon))
    else:
        deviation = step.add("Add", step.add("Sqrt", variance), epsilon)
    return step.add("Div", centred, deviation)


def _scaled(step: _Step, x: str) -> str:
    """The value times the layer's gain, plus its offset; either of one number a channel."""
    gain, offset = (step.weight(number, shape=(1, -1, 1, 1)) for number in (0, 1))
    return step.add("Add", step.add("Mul", x, gain), offset)


def _instance_norm(step: _Step) -> str:
    if step["axis"] is not None:
        # No family of mien's has it; a file of the reference may.
        raise ValueError(f"{step.layer.name} normalises by axis {step['axis']}, not over all")
    return _scaled(step, _normalized(step, step.x, [1, 2, 3], epsilon_in_root=False))


def _layer_norm(step: _Step) -> str:
    return _scaled(step, _normalized(step, step.x, [1], epsilon_in_root=True))


def _group_norm(step: _Step) -> str:
    rows, columns, channels = step.shapes[0]
    groups = step["group"]
    parts = step.graph.sizes(-1, groups, channels // groups * rows * columns)
    x = _normalized(step, step.add("Reshape", step.x, parts), [2], epsilon_in_root=True)
    return _scaled(step, step.add("Reshape", x, step.graph.sizes(-1, channels, rows, columns)))


def _rms_norm(step: _Step) -> str:
    square = step.add("ReduceMean", step.add("Mul", step.x, step.x), axes=[1])
    root = step.add("Sqrt", step.add("Add", square, float(step["epsilon"])))
    gain = step.weight(0, shape=(1, -1, 1, 1))
    return step.add("Mul", step.add("Div", step.x, root), gain)


def _adaptive_norm(step: _Step) -> str:
    x, offset, gain = step.inputs
    normalized = _normalized(step, x, [2, 3], epsilon_in_root=False)
    return step.add("Add", step.add("Mul", normalized, gain), offset)


def _batch_norm(step: _Step) -> str:
    weights = [step.weight(number) for number in range(4)]
    return step.add("BatchNormalization", step.x, *weights, epsilon=float(step["epsilon"]))


LAYERS: dict[str, Callable[[_Step], str]] = {
    "Activation": _activation,
    "AdaInstanceNormalization": _adaptive_norm,
    "Add": _sum,
    "AveragePooling2D": _pooled("AveragePool"),
    "BatchNormalization": _batch_norm,
    "Concatenate": _joined,
    "Conv2D": _convolution,
    "Conv2DTranspose": _transposed,
    "Dense": _dense,
    "DepthwiseConv2D": _depthwise,
    "Dropout": _same,
    "Flatten": _flat,
    "GaussianNoise": _same,
    "GlobalAveragePooling2D": _over_pixels("ReduceMean"),
    "GlobalMaxPooling2D": _over_pixels("ReduceMax"),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "KResizeImages": _enlarged,
    "LayerNormalization": _layer_norm,
    "LeakyReLU": _leaky_relu,
    "MaxPooling2D": _pooled("MaxPool"),
    "PixelShuffler": _shuffled,
    "RMSNormalization": _rms_norm,
    "ReflectionPadding2D": _reflected,
    "Reshape": _reshaped,
    "SeparableConv2D": _separable,
    "SpatialDropout2D": _same,
    "UpSampling2D": _enlarged,
}
"""How each kind of layer is written."""
