"""Description of a model as a graph of plain layers: what an exporter writes and a reader compares.

A `Network` is a list of calls of layers. At the top its layers are sub-networks, which are networks
themselves, with the same names as the attributes of the model; a sub-network is called once for
each side, A first. Kinds and attributes of layers are those of Keras, with the reference's own
layers under its own names: shapes are (h, w, c) or (n,) without the batch, pictures are NHWC, and
weights have the layouts of `keras_weights`.

A module describes itself by ``describe(network, *inputs)``, which adds its layers to the network
and gives its output; a decoder gives a tuple of outputs, faces small to large, then the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from .keras_weights import Entry, keras_entries

Shape = tuple[int, ...]
"""(h, w, c) of a picture, (n,) of a vector."""


@dataclass(eq=False, slots=True)
class Layer:
    """One operation of a network and its weights."""

    kind: str
    """Class name of Keras, or of the reference."""

    name: str
    """Name that no other layer of the model has."""

    attributes: dict[str, Any]
    """Settings under Keras's names; pairs such as ``kernel_size`` are tuples."""

    weights: tuple[Entry, ...] = ()
    """Arrays in Keras's order: kernel and bias; gain, offset, running mean and variance."""


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """One use of a layer or of a sub-network."""

    layer: Layer | Network
    number: int
    """Count of the calls of this layer before this one."""

    inputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """One output of a call."""

    call: Call
    index: int
    shape: Shape


Parts = Callable[..., Any]
"""Function of a network and its inputs that adds the layers and gives the output, or outputs."""


class Network:
    """Layers in the order in which they are called, and which values go in and out.

    Args:
        name: Name of the sub-network, or of the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: tuple[Value, ...] = ()
        self.outputs: tuple[Value, ...] = ()
        self.calls: list[Call] = []
        self._networks: dict[str, Network] = {}

    def input(self, shape: Shape, name: str = "") -> Value:
        """Declare the next input, by an InputLayer."""
        value = self.add("InputLayer", name=name, batch_shape=(None, *shape))
        self.inputs = (*self.inputs, value)
        return value

    def add(
        self,
        kind: str,
        *inputs: Value,
        weights: nn.Module | tuple[Entry, ...] = (),
        name: str = "",
        **attributes: Any,
    ) -> Value:
        """Append a layer and call it once; its output.

        Args:
            kind: A key of `SHAPES`.
            inputs: Values of this network.
            weights: The module that holds them, or the arrays themselves.
            name: Name of the layer; the network, its kind and a number where it is empty.
            attributes: Settings; a number where Keras takes pairs becomes a pair.

        Raises:
            ValueError: The kind is unknown, or the inputs do not fit it.
        """
        if kind not in SHAPES:
            raise ValueError(f"no layer of kind {kind!r} can be described")
        for pair in {"kernel_size", "strides", "size", "pool_size"} & attributes.keys():
            # The reference's own layer keeps one number.
            if isinstance(attributes[pair], int) and kind != "ReflectionPadding2D":
                attributes[pair] = (attributes[pair],) * 2
        arrays = tuple(keras_entries(weights)) if isinstance(weights, nn.Module) else weights
        shape = SHAPES[kind](attributes, [value.shape for value in inputs])
        # A picture that was pooled or convolved without padding more often than its edge allows.
        if min(shape, default=0) < 1:
            raise ValueError(f"{kind} of {self.name} would put out {shape}")
        label = name or f"{self.name}_{kind.lower()}_{len(self.calls)}"
        call = Call(Layer(kind, label, attributes, arrays), 0, inputs)
        self.calls.append(call)
        return Value(call, 0, shape)

    def leaky_relu(self, x: Value, slope: float) -> Value:
        """LeakyReLU, left out where its slope is 1."""
        return x if slope == 1 else self.add("LeakyReLU", x, negative_slope=slope)

    def call(self, network: Network, *inputs: Value) -> tuple[Value, ...]:
        """Call a sub-network once more; its outputs.

        Raises:
            ValueError: The inputs have other shapes than it takes.
        """
        shapes = [[value.shape for value in values] for values in (inputs, network.inputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{network.name} takes {shapes[1]}, got {shapes[0]}")
        # A's call is the first: faceswap's convert follows a side by its number.
        number = sum(call.layer is network for call in self.calls)
        call = Call(network, number, inputs)
        self.calls.append(call)
        return tuple(Value(call, i, value.shape) for i, value in enumerate(network.outputs))

    def run(self, name: str, parts: nn.Module | Parts, *inputs: Value) -> tuple[Value, ...]:
        """Call a sub-network, which is described from its parts when it is called first; its
        outputs."""
        if name not in self._networks:
            network = Network(name)
            values = [network.input(value.shape) for value in inputs]
            if isinstance(parts, nn.Module):
                described = describe(network, parts, *values)
            else:
                described = parts(network, *values)
            network.outputs = described if isinstance(described, tuple) else (described,)
            self._networks[name] = network
        return self.call(self._networks[name], *inputs)

    def networks(self) -> list[Network]:
        """Sub-networks, in the order of their first calls."""
        found = {id(call.layer): call.layer for call in self.calls}
        return [layer for layer in found.values() if isinstance(layer, Network)]

    def layers(self) -> Iterator[Layer]:
        """Layers of this network and of its sub-networks, each once."""
        for network in self.networks():
            yield from network.layers()
        for call in self.calls:
            if isinstance(call.layer, Layer):
                yield call.layer


def describe(network: Network, module: nn.Module, *inputs: Value) -> Any:
    """Add the layers of a module to a network; its output, or outputs.

    Raises:
        ValueError: A module in it has no description; its class is named.
    """
    if hasattr(module, "describe"):
        return cast(Any, module).describe(network, *inputs)
    (x,) = inputs
    if isinstance(module, nn.Sequential):
        for step in module:
            x = describe(network, step, x)
        return x
    if isinstance(module, nn.Dropout2d):
        return network.add("SpatialDropout2D", x, rate=module.p)
    if isinstance(module, nn.Dropout):
        return network.add("Dropout", x, rate=module.p)
    if isinstance(module, nn.MaxPool2d):
        edge = module.kernel_size
        return network.add("MaxPooling2D", x, pool_size=edge, strides=edge, padding="valid")
    raise ValueError(
        f"{type(module).__name__} of {network.name} cannot be written as a graph of layers, so "
        "this model can only be exported as safetensors"
    )


def finishing_order(outputs: tuple[Value, ...]) -> tuple[list[Call], list[Call]]:
    """Calls that outputs need, each after what it takes; and the same by first arrival.

    The walk is depth first from the outputs in their order, and from each call to its inputs in
    theirs.
    """
    finished: dict[Call, None] = {}
    arrived: dict[Call, None] = {}
    stack = [iter(outputs)]
    path: list[Call] = []
    while stack:
        value = next(stack[-1], None)
        if value is None:
            stack.pop()
            if path:
                finished[path.pop()] = None
        elif value.call not in arrived:
            arrived[value.call] = None
            path.append(value.call)
            stack.append(iter(value.call.inputs))
    return [*finished], [*arrived]


def flattened(module: nn.Module) -> Parts:
    """Description of a module whose picture goes on as a vector."""
    return lambda network, x: network.add("Flatten", describe(network, module, x))


Shapes = list[Shape]
Rule = Callable[[dict[str, Any], Shapes], Shape]
"""Shape of the output, from the attributes and the shapes of the inputs."""


def _same(_: dict[str, Any], shapes: Shapes) -> Shape:
    return shapes[0]


def _input(attributes: dict[str, Any], _: Shapes) -> Shape:
    return tuple(attributes["batch_shape"][1:])


def _convolved(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    picture = _picture(shapes)
    edges = []
    for size, kernel, stride in zip(
        picture[:2], attributes["kernel_size"], attributes["strides"], strict=True
    ):
        rest = 0 if attributes["padding"] == "same" else kernel - 1
        # Rounded up: "same" pads what the last stride lacks.
        edges.append(-(-(size - rest) // stride))
    channels = attributes.get("filters") or picture[2] * attributes.get("depth_multiplier", 1)
    return *edges, channels


def _transposed(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    rows, columns, _ = _picture(shapes)
    down, right = attributes["strides"]
    return rows * down, columns * right, attributes["filters"]


def _dense(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    if len(shapes[0]) != 1:
        raise ValueError(f"Dense takes a vector, got {shapes[0]}")
    return (attributes["units"],)


def _flat(_: dict[str, Any], shapes: Shapes) -> Shape:
    return (math.prod(shapes[0]),)


def _reshaped(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    target = tuple(attributes["target_shape"])
    if math.prod(target) != math.prod(shapes[0]):
        raise ValueError(f"Reshape cannot make {target} of {shapes[0]}")
    return target


def _shuffled(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    (rows, columns, channels), (down, right) = _picture(shapes), attributes["size"]
    if channels % (down * right):
        raise ValueError(f"PixelShuffler cannot divide {channels} channels by {down * right}")
    return rows * down, columns * right, channels // (down * right)


def _enlarged(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    (rows, columns, channels), (down, right) = _picture(shapes), attributes["size"]
    return rows * down, columns * right, channels


def _pooled(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    (rows, columns, channels), (down, right) = _picture(shapes), attributes["pool_size"]
    return rows // down, columns // right, channels


def _global(_: dict[str, Any], shapes: Shapes) -> Shape:
    return _picture(shapes)[2:]


def _joined(_: dict[str, Any], shapes: Shapes) -> Shape:
    if len({shape[:-1] for shape in shapes}) != 1:
        raise ValueError(f"Concatenate cannot join {shapes}")
    return *shapes[0][:-1], sum(shape[-1] for shape in shapes)


def _added(_: dict[str, Any], shapes: Shapes) -> Shape:
    if len(set(shapes)) != 1:
        raise ValueError(f"Add cannot add {shapes}")
    return shapes[0]


def reflected_pixels(size_px: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after one axis that ReflectionPadding2D mirrors."""
    rest = size_px % stride or stride
    total = max(kernel - rest, 0)
    return total // 2, total - total // 2


def _reflected(attributes: dict[str, Any], shapes: Shapes) -> Shape:
    rows, columns, channels = _picture(shapes)
    kernel, stride = attributes["kernel_size"], attributes["stride"]
    rows, columns = (n + sum(reflected_pixels(n, kernel, stride)) for n in (rows, columns))
    return rows, columns, channels


def _picture(shapes: Shapes) -> Shape:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise ValueError(f"a layer that takes one picture got {shapes}")
    return shapes[0]


SHAPES: dict[str, Rule] = {
    "Activation": _same,
    "AdaInstanceNormalization": _same,
    "Add": _added,
    "AveragePooling2D": _pooled,
    "BatchNormalization": _same,
    "Concatenate": _joined,
    "Conv2D": _convolved,
    "Conv2DTranspose": _transposed,
    "Dense": _dense,
    "DepthwiseConv2D": _convolved,
    "Dropout": _same,
    "Flatten": _flat,
    "GaussianNoise": _same,
    "GlobalAveragePooling2D": _global,
    "GlobalMaxPooling2D": _global,
    "GroupNormalization": _same,
    "InputLayer": _input,
    "InstanceNormalization": _same,
    "KResizeImages": _enlarged,
    "LayerNormalization": _same,
    "LeakyReLU": _same,
    "MaxPooling2D": _pooled,
    "PixelShuffler": _shuffled,
    "ReflectionPadding2D": _reflected,
    "RMSNormalization": _same,
    "Reshape": _reshaped,
    "SeparableConv2D": _convolved,
    "SpatialDropout2D": _same,
    "UpSampling2D": _enlarged,
}
"""Every kind of layer that a graph may have, with the shape that it puts out."""
