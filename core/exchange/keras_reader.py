"""A model folder of faceswap, read: the graph of the file, its arrays and its state.

Nothing of it is trusted: the model is made from the options of the state, and an array is read only
into a layer that the graphs have in common, by the shape that it has there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ... import models
from ...models.graph import Layer, Network, Value, finishing_order
from ...models.keras_weights import Entry
from . import legacy_h5
from .keras_archive import open_archive
from .keras_config import from_json
from .keras_order import weight_paths
from .keras_state import options_of, read_state
from .keras_weights_file import array, check_array, open_arrays, require_h5py
from .matching import match

if TYPE_CHECKING:
    import h5py
    import numpy as np

    from ...models.autoencoder import Autoencoder

_SPARE_BYTES = 64 << 20
"""Bytes of a file of arrays beside four times those of the model: names, and an old optimizer.
Chosen, unmeasured."""

_MOST_ARRAYS = 4
"""Arrays of one layer, at most: those of a batch norm."""


@dataclass(frozen=True)
class Found:
    """Files of one model of faceswap."""

    model: Path
    """Path of the *.keras or *.h5."""

    state: dict[str, Any]


def find(path: Path) -> Found:
    """The files of the model in a folder, or beside its *.keras or *.h5 file.

    Raises:
        ValueError: There is none, or more than one, or something is missing; one line says which.
    """
    require_h5py()
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    with _naming(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    _refuse_others(folder, names)
    # A file that is named is meant, whatever else lies beside it.
    given = [path.name] if path.is_file() else []
    files = given or [name for name in names if name.endswith(".keras")]
    # As in faceswap: an *.h5 counts only where there is no *.keras.
    files = files or [name for name in names if name.endswith(".h5")]
    if len(files) != 1 or not files[0].endswith((".keras", ".h5")):
        if given:
            raise ValueError(
                f"{path} is no model of faceswap, which is a folder or its *.keras or *.h5 file; "
                "weights of mien's own begin a new model by `mien train --load-weights`"
            )
        kinds = ", ".join(files) if files else "none"
        raise ValueError(f"{path} must hold one model of faceswap (*.keras or *.h5), got {kinds}")
    states = [name for name in names if name.endswith("_state.json")]
    if len(states) != 1:
        raise ValueError(
            f"{folder} must hold one *_state.json, which says what the model is, got "
            f"{', '.join(states) or 'none'}"
        )
    return Found(folder / files[0], read_state(folder / states[0]))


def _refuse_others(folder: Path, names: list[str]) -> None:
    """Refuse folders of other programs, saying what can be done with them."""
    if any(name.endswith("_data.dat") for name in names):
        raise ValueError(
            f"{folder} is a model of DeepFaceLab, whose networks mien does not have; its faces can "
            "be imported (`mien faces import`), and a new model trained on them"
        )
    if {"encoder.h5", "decoder_A.h5"} <= set(names):
        raise ValueError(
            f"{folder} is a model from before 2020, one file a network, which cannot be read; open "
            "it in a faceswap of that time and save it anew"
        )


def is_of_faceswap(path: Path) -> bool:
    """Whether a path is a *.keras or *.h5 file, or a folder with one."""
    if path.is_dir() and os.access(path, os.R_OK):
        return any(entry.suffix in (".keras", ".h5") for entry in path.iterdir())
    return path.suffix in (".keras", ".h5")


def graph_of(path: Path) -> Network:
    """The graph of a *.keras or *.h5 file, without weights.

    Raises:
        ValueError: It is no such file, damaged, or no model that faceswap makes.
    """
    with _naming(path):
        if path.suffix == ".h5":
            return _parsed(legacy_h5.graph_of(path))
        with open_archive(path) as archive:
            return _parsed(archive.graph())


def _parsed(values: Any) -> Network:
    try:
        return from_json(values)
    except (TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError("its graph is damaged") from error


@dataclass(frozen=True)
class Arrays:
    """Weights of the layers of a graph, in an open file."""

    file: h5py.File
    paths: dict[Layer, list[str]]

    def entries(self, layer: Layer, shapes: list[tuple[int, ...]]) -> tuple[Entry, ...]:
        """Arrays of a layer, to be read as long as the file is open.

        Args:
            layer: Layer of the file.
            shapes: What they must be; a read gives them in fp32.

        Raises:
            ValueError: One is missing, of another shape, or lies elsewhere.
        """
        entries = []
        # More paths than weights: a layer of this kind may have fewer.
        for path, shape in zip(self.paths[layer], shapes, strict=False):
            check_array(self.file, path, shape)
            entries.append(Entry(shape, _only_read, partial(array, self.file, path, shape)))
        return tuple(entries)


def _only_read(_: np.ndarray) -> None:
    raise TypeError("the weights of a file are only read")


@contextmanager
def open_weights(path: Path, graph: Network, model_bytes: int) -> Iterator[Arrays]:
    """The arrays of a *.keras or *.h5 file.

    Args:
        path: The file.
        graph: Graph of the file.
        model_bytes: Bytes that the weights of such a model have.

    Raises:
        ValueError: The file is damaged, or far larger than such a model.
    """
    with _naming(path):
        if path.suffix == ".h5":
            with open_arrays(path) as file:
                yield Arrays(file, legacy_h5.paths_of(graph))
            return
        paths = {
            layer: [f"{place}/{number}" for number in range(_MOST_ARRAYS)]
            for layer, place in weight_paths(graph).items()
        }
        with open_archive(path) as archive:
            # Older files hold the optimizer's moments beside the weights.
            limit = 4 * model_bytes + _SPARE_BYTES
            with archive.unpacked_weights(limit) as copy, open_arrays(copy) as file:
                yield Arrays(file, paths)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin every line about a file with its path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def read_model(found: Found) -> Autoencoder:
    """The model of some files, its weights filled.

    Raises:
        ValueError: The files do not fit the options of their state; the first layer or array that
            does not is named.
    """
    family = found.state["name"].replace("_", "-")
    # Before the graph is read, whose refusal would name a layer and not the reason.
    _refuse_known_network(found)
    graph = graph_of(found.model)
    with _naming(found.model):
        settings = settings_of_model(found.state, graph)
        # Without memory: a stranger's state may ask for any size before its file is compared.
        described = models.meta_model(family, **settings)
        layout = described.graph()
        pairs = {our: their for our, their in match(graph, layout).items() if our.weights}
    tensors = described.state_dict().values()
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with open_weights(found.model, graph, model_bytes) as arrays:
        for ours, theirs in pairs.items():
            theirs.weights = arrays.entries(theirs, [entry.shape for entry in ours.weights])
        # Only now: shapes were compared by a model without memory.
        model = models.build(family, seed=None, pretrained=False, **settings)
        own = dict(zip(layout.layers(), model.graph().layers(), strict=True))
        for ours, theirs in pairs.items():
            for entry, read in zip(own[ours].weights, theirs.weights, strict=True):
                entry.load(cast(Any, read).read())
    return model


def _refuse_known_network(found: Found) -> None:
    """Refuse models of phaze-a whose encoder is not of faceswap's own layers."""
    encoder = options_of(found.state).get("enc_architecture", "fs_original")
    if encoder != "fs_original":
        raise ValueError(
            f"{found.model} has the encoder {encoder}, whose layers are not read; only models of "
            "phaze-a with fs_original can be imported"
        )


def settings_of_model(state: dict[str, Any], graph: Network) -> dict[str, Any]:
    """What `models.build` is to be told: options of the state, and what the graph shows itself."""
    family = state["name"].replace("_", "-")
    options = options_of(state)
    # An option of mien's own, which faceswap's state cannot hold: the shapes tell it.
    if "width" in options:
        filters = _first_filters(models.meta_model(family, **options).graph())
        # With a remainder the file is of no width at all, and its first layer is refused by name.
        width, rest = divmod(options["width"] * _first_filters(graph), filters)
        options["width"] = options["width"] if rest else width
    for name, edge_px in (("input_size", graph.inputs[0]), ("output_size", _last_face(graph))):
        if name in options:
            # By the graph: faceswap rounds sizes that its networks cannot make.
            options[name] = edge_px.shape[0]
    if "architecture" in options:
        options["architecture"] = graph.name.rpartition("_")[2]
    mirrors = any(layer.kind == "ReflectionPadding2D" for layer in graph.layers())
    has_mask = _has_mask(graph)
    settings = options | {"learn_mask": has_mask, "reflect_padding": mirrors}
    config = state["config"]
    # A switch counts only as true: what else a state may hold there is none.
    return settings | {
        key: config[key] is True for key in ("icnr_init", "conv_aware_init") if key in config
    }


def _has_mask(graph: Network) -> bool:
    return graph.outputs[-1].shape[-1] == 1


def _last_face(graph: Network) -> Value:
    """The largest face of B."""
    return graph.outputs[-2 if _has_mask(graph) and len(graph.outputs) > 1 else -1]


def _first_filters(graph: Network) -> int:
    """Channels of the first convolution that a face meets."""
    for network in graph.networks():
        for call in finishing_order(network.outputs)[0]:
            if isinstance(call.layer, Layer) and call.layer.kind == "Conv2D":
                return call.layer.attributes["filters"]
    raise ValueError("it has no convolution")
