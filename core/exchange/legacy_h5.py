"""A model of faceswap 2: one HDF5 file of Keras 2, with the graph in an attribute.

The graph is put into the form of config.json, and the arrays are found by the names of the layers,
which are of one file.
"""

import json
from pathlib import Path
from typing import Any

from ...models.fields import shown
from ...models.graph import Layer, Network
from .legacy_attributes import read_attributes

Json = dict[str, Any]

_ATTRIBUTES = "keras_version", "model_config"
_NAMES = {  # of the arrays of a layer, in their order
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "DepthwiseConv2D": ("depthwise_kernel", "bias"),
    **dict.fromkeys(
        ("GroupNormalization", "InstanceNormalization", "LayerNormalization"), ("gamma", "beta")
    ),
    "RMSNormalization": ("scale",),
}


def graph_of(path: Path) -> Json:
    """The graph in the form of config.json.

    Raises:
        ValueError: It is no file of Keras 2, or its graph is damaged.
    """
    # In the order in which they were asked for, which a dictionary keeps.
    version, text = read_attributes(path, *_ATTRIBUTES).values()
    if not version.startswith("2."):
        raise ValueError("it is no model of faceswap 2: it names no version 2 of Keras")
    if not text:
        raise ValueError("it has no graph of a readable size")
    try:
        return _modern(json.loads(text))
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError("its graph is damaged") from error


def paths_of(network: Network) -> dict[Layer, list[str]]:
    """Paths of the arrays of each layer."""
    paths = {}
    for part in network.networks():
        for layer in part.layers():
            names = _NAMES.get(layer.kind, ("kernel", "bias"))
            paths[layer] = [f"model_weights/{part.name}/{layer.name}/{name}:0" for name in names]
    return paths


def _modern(model: Json) -> Json:
    """An object of Keras 2 as one of Keras 3."""
    config = model["config"]
    layers = [_modern_layer(layer) for layer in config["layers"]]
    networks = {layer["name"] for layer in layers if layer["class_name"] == "Functional"}
    for layer in layers:
        layer["inbound_nodes"] = [_node(node, networks) for node in layer["inbound_nodes"]]
    return {"class_name": "Functional", "config": config | {"layers": layers}}


def _modern_layer(layer: Json) -> Json:
    config, kind = dict(layer["config"]), layer["class_name"]
    name = config.get("name", layer.get("name"))
    head = {"class_name": kind, "name": name, "inbound_nodes": layer["inbound_nodes"]}
    if kind in ("Functional", "Model"):
        return head | _modern(layer) | {"class_name": "Functional"}
    # Names that Keras 3 has changed; the values mean the same.
    for old, new in (("batch_input_shape", "batch_shape"), ("alpha", "negative_slope")):
        if old in config:
            # Moved, so that the old name is not met as a setting that nobody knows.
            config[new] = config.pop(old)
    return head | {"config": config}


def _node(node: list[Any], networks: set[str]) -> Json:
    """One call; those of a sub-network are counted from 1 in these files."""
    references = [node] if isinstance(node[0], str) else node
    tensors = [
        # Counted from 0 here, as in config.json.
        {"config": {"keras_history": [name, number - (name in networks), index]}}
        for name, number, index, *_ in references
    ]
    if not tensors:
        raise ValueError(f"{shown(node)} takes nothing")
    return {"args": [tensors]}
