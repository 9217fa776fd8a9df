"""The graph of a model as Keras writes it in config.json, both ways.

What is read may come from a stranger: only the layers that a description may have are known, none
of their settings is taken over unchecked, and nothing in it is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...models.fields import plain, shown
from ...models.graph import SHAPES, Call, Layer, Network, Value
from .keras_order import ordered_layers

Json = dict[str, Any]

# Far more than any model of faceswap has: these bound a stranger's.
MAX_LAYERS = 5000
_MAX_NETWORK_DEPTH = 3
_LARGEST = 2**28
"""Largest number that a setting of a layer may be."""

# Layers of the reference's own, which it knows by their bare names.
_OWN = {
    *("AdaInstanceNormalization", "GroupNormalization", "InstanceNormalization", "KResizeImages"),
    *("PixelShuffler", "RMSNormalization", "ReflectionPadding2D"),
}
_TAKES_A_LIST = {"AdaInstanceNormalization", "Add", "Concatenate"}


# Writing


def to_json(network: Network) -> Json:
    """The object of a whole model, or of a sub-network."""
    return _functional(network) | {"config": _config_of(network)}


def _functional(network: Network) -> Json:
    return {
        "module": "keras.src.models.functional",
        "class_name": "Functional",
        "config": {},
        "registered_name": "Functional",
        "name": network.name,
    }


def _config_of(network: Network) -> Json:
    calls: dict[Layer | Network, list[Call]] = {}
    for call in network.calls:
        calls.setdefault(call.layer, []).append(call)
    return {
        "name": network.name,
        "trainable": True,
        # In Keras's own order: it numbers the layers by it, and finds their weights by the number.
        "layers": [_layer(layer, calls[layer]) for layer in ordered_layers(network)],
        "input_layers": [_reference(value) for value in network.inputs],
        "output_layers": [_reference(value) for value in network.outputs],
    }


def _layer(layer: Layer | Network, calls: list[Call]) -> Json:
    if isinstance(layer, Network):
        head = to_json(layer)
    else:
        attributes = {key: plain(value) for key, value in layer.attributes.items()}
        own = layer.kind in _OWN
        head = {
            "module": "lib.model.layers" if own else "keras.layers",
            "class_name": layer.kind,
            "config": {"name": layer.name} | attributes,
            # By this alone faceswap finds its own layers; the module's text is not looked at.
            "registered_name": layer.kind if own else None,
            "name": layer.name,
        }
    nodes = [_node(call) for call in calls if call.inputs]
    return head | {"inbound_nodes": nodes}


def _node(call: Call) -> Json:
    tensors = [_tensor(value) for value in call.inputs]
    # Keras gives such a layer a list even of one, and refuses it otherwise.
    is_list = len(tensors) > 1 or getattr(call.layer, "kind", "") in _TAKES_A_LIST
    return {"args": [tensors] if is_list else tensors, "kwargs": {}}


def _tensor(value: Value) -> Json:
    # Only by this Keras connects layers; shape and type are repeated for its own checks.
    history = [value.call.layer.name, value.call.number, value.index]
    shape = [None, *value.shape]
    config = {"shape": shape, "dtype": "float32", "keras_history": history}
    return {"class_name": "__keras_tensor__", "config": config}


def _reference(value: Value) -> list[Any]:
    # A sub-network has been called once already, when it was built.
    extra = isinstance(value.call.layer, Network)
    return [value.call.layer.name, value.call.number + extra, value.index]


# Reading


def from_json(values: Any, depth: int = 0) -> Network:
    """The network that an object of Keras describes, without weights.

    Raises:
        ValueError: It is no such object, or it has a layer that no model of the reference has; one
            line names it.
    """
    config = _object(values, "config")
    if values.get("class_name") not in ("Functional", "Model") or depth > _MAX_NETWORK_DEPTH:
        raise ValueError(f"it is no functional Keras model, but {shown(values.get('class_name'))}")
    name = _word(config.get("name"), "the name of a model")
    layers = config.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise ValueError(f"{name} must have a list of at most {MAX_LAYERS} layers")
    reader = _Reader(Network(name), layers, depth)
    reader.connect()
    network = reader.network
    network.inputs = tuple(reader.value(ref) for ref in _references(config, "input_layers"))
    network.outputs = tuple(reader.value(ref) for ref in _references(config, "output_layers"))
    if any(getattr(value.call.layer, "kind", "") != "InputLayer" for value in network.inputs):
        raise ValueError(f"an input of {name} is no InputLayer")
    return network


class _Reader:
    """One network that is being read: its layers, and those of their calls that are known."""

    def __init__(self, network: Network, layers: list[Any], depth: int) -> None:
        self.network = network
        self.parts: dict[str, Layer | Network] = {}
        self.nodes: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
        self.calls: dict[tuple[str, int], tuple[Value, ...]] = {}
        for item in layers:
            self._declare(item, depth)

    def _declare(self, item: Any, depth: int) -> None:
        config = _object(item, "config")
        # From either place: versions of Keras differ in where a layer is named.
        name = _word(config.get("name", item.get("name")), "the name of a layer")
        if name in self.parts:
            raise ValueError(f"{self.network.name} has two layers {shown(name)}")
        kind = item.get("class_name")
        if kind in ("Functional", "Model"):
            self.parts[name] = from_json(item, depth + 1)
        else:
            self.parts[name] = Layer(str(kind), name, _attributes(kind, name, config))
        nodes = item.get("inbound_nodes")
        if not isinstance(nodes, list) or len(nodes) > MAX_LAYERS:
            raise ValueError(f"{shown(name)} must have a list of nodes")
        for number, node in enumerate(nodes):
            self.nodes[name, number] = _histories(node, name)
        # A layer that nothing is fed to is an input: one call without arguments.
        if not nodes:
            self.nodes[name, 0] = []

    def connect(self) -> None:
        """Make each call once all that it takes is there.

        Raises:
            ValueError: A call takes what is not there, or itself in the end.
        """
        waiting = {key: {ref[:2] for ref in refs} for key, refs in self.nodes.items()}
        followers: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for key, sources in waiting.items():
            for source in sources:
                followers.setdefault(source, []).append(key)
        # Not by recursion: a stranger's graph may be one long chain.
        ready = [key for key, sources in waiting.items() if not sources]
        for key in ready:  # grows on the way
            self._call(key)
            for follower in followers.get(key, ()):
                waiting[follower].discard(key)
                if not waiting[follower]:
                    ready.append(follower)
        if len(ready) != len(self.nodes):
            stuck = next(name for (name, _), sources in waiting.items() if sources)
            raise ValueError(f"{shown(stuck)} of {self.network.name} takes what is not there")

    def _call(self, key: tuple[str, int]) -> None:
        name, number = key
        layer = self.parts[name]
        inputs = tuple(self.value(ref) for ref in self.nodes[key])
        shapes = [value.shape for value in inputs]
        call = Call(layer, number, inputs)
        self.network.calls.append(call)
        if isinstance(layer, Network):
            if shapes != [value.shape for value in layer.inputs]:
                raise ValueError(f"{layer.name} is given pictures of another size than it takes")
            outputs = tuple(value.shape for value in layer.outputs)
        else:
            if bool(inputs) == (layer.kind == "InputLayer"):
                raise ValueError(f"{shown(name)} of {self.network.name} has no input")
            outputs = (SHAPES[layer.kind](layer.attributes, shapes),)
            # Each setting alone is bounded, and products of many layers' are not.
            if not all(0 < edge < _LARGEST for edge in outputs[0]):
                raise ValueError(f"{shown(name)} of {self.network.name} would put out {outputs[0]}")
        self.calls[key] = tuple(Value(call, i, shape) for i, shape in enumerate(outputs))

    def value(self, reference: tuple[str, int, int]) -> Value:
        """The value that a reference names; ValueError where there is none.

        Those of inputs and outputs count one call more of a sub-network.
        """
        name, number, index = reference
        outputs = self.calls.get((name, number))
        if outputs is None or not 0 <= index < len(outputs):
            raise ValueError(f"{self.network.name} has no call {number} of {shown(name)}")
        return outputs[index]


def _references(config: Json, key: str) -> list[tuple[str, int, int]]:
    """References of a list; a single one may stand alone, and lists may lie in lists."""
    found: list[tuple[str, int, int]] = []

    def collect(item: Any, depth: int) -> None:
        if isinstance(item, list) and item and isinstance(item[0], str):
            found.append(_reference_of(item))
        elif isinstance(item, list) and depth < 3:
            for part in item:
                collect(part, depth + 1)
        else:
            raise ValueError(f"{key} is no list of layers")

    collect(config.get(key), 0)
    if not 0 < len(found) <= 64:
        raise ValueError(f"{key} must name 1 to 64 values, got {len(found)}")
    # Undone here is what `_reference` adds.
    networks = {
        item["config"].get("name", item.get("name"))
        for item in config["layers"]
        if item.get("class_name") in ("Functional", "Model")
    }
    return [(name, number - (name in networks), index) for name, number, index in found]


def _histories(node: Any, name: str) -> list[tuple[str, int, int]]:
    """What one call takes."""
    arguments = node.get("args") if isinstance(node, dict) else None
    if isinstance(arguments, list) and len(arguments) == 1 and isinstance(arguments[0], list):
        arguments = arguments[0]
    if not isinstance(arguments, list) or not 0 < len(arguments) <= 64:
        raise ValueError(f"{shown(name)} takes something that is no layer")
    return [_reference_of(_object(tensor, "config").get("keras_history")) for tensor in arguments]


def _reference_of(item: Any) -> tuple[str, int, int]:
    is_valid = (
        isinstance(item, list)
        and len(item) == 3
        and isinstance(item[0], str)
        and all(type(number) is int and -1 <= number < MAX_LAYERS for number in item[1:])
    )
    if not is_valid:
        raise ValueError(f"{shown(item)} is no reference to a layer")
    return item[0], item[1], item[2]


def _object(values: Any, key: str) -> Json:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{shown(values)} has no {key} that is an object")
    return found


def _word(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise ValueError(f"{what} must be a word, got {shown(value)}")
    return value


# Settings of layers: name -> (check, default); without a default one must be there


def _number(value: Any) -> int:
    # By `type`: True would pass for a size of 1.
    if type(value) is not int or not 0 < value < _LARGEST:
        raise ValueError
    return value


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, list) else (value, value)
    return _number(first), _number(second)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= 4:
        raise ValueError
    return tuple(_number(item) for item in value)


def _batch(value: Any) -> tuple[int | None, ...]:
    if not isinstance(value, list) or not value or value[0] is not None:
        raise ValueError
    return None, *_numbers(value[1:])


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e6:
        raise ValueError
    return float(value)


def _axis(value: Any) -> int | None:
    """The last axis of all, or None."""
    last = value[0] if isinstance(value, list) and len(value) == 1 else value
    if last not in (None, -1, 1, 3) or isinstance(last, bool):
        raise ValueError
    # The channels, counted from either end: 3 of pictures, 1 of vectors.
    return None if last is None else -1


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        for choice in choices:
            # The type too: to Python 1 equals True, and a switch is no number.
            if type(value) is type(choice) and value == choice:
                return choice
        raise ValueError

    return check


def _one(value: Any) -> int:
    if _pair(value) != (1, 1):
        raise ValueError
    return 1


_NEEDED = object()
_Rule = dict[str, tuple[Callable[[Any], Any], Any]]
_LINEAR: _Rule = {  # what all others may only be, where they have it at all
    "activation": (_one_of("linear"), "linear"),
    "dilation_rate": (_one, 1),
    "groups": (_one, 1),
    "data_format": (_one_of("channels_last"), "channels_last"),
}
_KERNEL: _Rule = {
    "kernel_size": (_pair, _NEEDED),
    "strides": (_pair, 1),
    "padding": (_one_of("same", "valid"), "valid"),
    "use_bias": (_one_of(True, False), True),
}
_CONVOLUTION: _Rule = {"filters": (_number, _NEEDED)} | _KERNEL
_NORM: _Rule = {"epsilon": (_real, 1e-3)}
_AFFINE: _Rule = {"center": (_one_of(True), True), "scale": (_one_of(True), True)}
_LAST: _Rule = {"axis": (_axis, -1)}
_ENLARGED: _Rule = {
    "size": (_pair, 2),
    "interpolation": (_one_of("nearest", "bilinear"), "nearest"),
}
_POOL: _Rule = {
    "pool_size": (_pair, 2),
    "strides": (lambda value: _pair(2 if value is None else value), 2),
    "padding": (_one_of("valid"), "valid"),
}
_READ: dict[str, _Rule] = {
    "Activation": {"activation": (_one_of("sigmoid", "relu"), _NEEDED)},
    "AdaInstanceNormalization": _LAST | _NORM | _AFFINE | {"momentum": (_real, 0.99)},
    "Add": {},
    "AveragePooling2D": _POOL,
    "BatchNormalization": _LAST | _NORM | {"momentum": (_real, 0.99)},
    "Concatenate": _LAST,
    "Conv2D": _CONVOLUTION,
    "Conv2DTranspose": _CONVOLUTION,
    "Dense": {"units": (_number, _NEEDED), "use_bias": (_one_of(True, False), True)},
    "DepthwiseConv2D": _KERNEL | {"depth_multiplier": (_number, 1)},
    "Dropout": {"rate": (_real, _NEEDED)},
    "Flatten": {},
    "GaussianNoise": {"stddev": (_real, _NEEDED)},
    "GlobalAveragePooling2D": {},
    "GlobalMaxPooling2D": {},
    "GroupNormalization": _LAST | {"epsilon": (_real, 1e-6), "group": (_number, 32)},
    "InputLayer": {"batch_shape": (_batch, _NEEDED)},
    "InstanceNormalization": {"axis": (_axis, None)} | _NORM | _AFFINE,
    "KResizeImages": _ENLARGED,
    "LayerNormalization": _LAST | _NORM,
    "LeakyReLU": {"negative_slope": (_real, 0.3)},
    "MaxPooling2D": _POOL,
    "PixelShuffler": {"size": (_pair, 2)},
    "RMSNormalization": _LAST | {"epsilon": (_real, 1e-8)},
    "ReflectionPadding2D": {"stride": (_number, 2), "kernel_size": (_number, 5)},
    "Reshape": {"target_shape": (_numbers, _NEEDED)},
    "SeparableConv2D": _CONVOLUTION | {"depth_multiplier": (_number, 1)},
    "SpatialDropout2D": {"rate": (_real, _NEEDED)},
    "UpSampling2D": _ENLARGED,
}


def _attributes(kind: Any, name: str, config: Json) -> Json:
    """Settings of a layer, checked; defaults where the file has none.

    Raises:
        ValueError: The class is unknown, or a setting is none that a model of the reference has.
    """
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(
            f"the layer {shown(name)} is of class {shown(kind)}, which no model of faceswap that "
            "can be read has"
        )
    rules = _READ[kind]
    attributes = {}
    for key, (check, default) in (_LINEAR | rules).items():
        value = config.get(key, default)
        if value is None and key not in rules:
            continue
        try:
            found = check(value)
        except (ValueError, TypeError):
            raise ValueError(
                f"{key} of {shown(name)}, a {kind}, cannot be {shown(config.get(key))}"
            ) from None
        # Those of `_LINEAR` are only held to their default: no layer here computes with them.
        if key in rules:
            attributes[key] = found
    return attributes
