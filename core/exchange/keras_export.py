"""Export of a model folder as one that faceswap converts with and trains on."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...models.autoencoder import Autoencoder
from ...models.graph_evaluation import evaluate
from ..checkpoint.inference import Weights
from ..checkpoint.state import TrainingState
from ..system.durable_files import (
    discard_leftovers,
    folder_beside,
    sync_file,
    sync_folder,
    temporary_name,
    writing,
)
from .keras_file import write_keras
from .keras_reader import graph_of, open_weights
from .keras_state import state_of
from .keras_weights_file import require_h5py
from .matching import match
from .onnx_check import MAX_DIFFERENCE
from .trained_model import Report, read_trained_model, sample_pictures, silent


@dataclass(frozen=True, kw_only=True)
class KerasExport:
    """Facts about a folder that was written."""

    path: Path
    files: tuple[str, ...]
    size_bytes: int
    difference: float
    """Largest difference of an output between the file, read back, and the model."""

    num_faces: int
    """Faces of the model's own folders among what was compared with."""


def export_keras(
    path: Path,
    target: Path,
    *,
    generation: str | None = None,
    weights: Weights = "auto",
    force: bool = False,
    report: Report = silent,
) -> KerasExport:
    """Write a folder that faceswap loads.

    Args:
        path: The model folder; it is only read.
        target: Folder to write, which is new or empty.
        generation: Name of a save, or `backup`; None: the newest.
        weights: Same as for `read_model`.
        force: Replace the model of faceswap that is in the folder.
        report: Called with each stage.

    Raises:
        ValueError: h5py is missing; the save or the target cannot be used; the family cannot be
            said in Keras, or the file differs from the model.
    """
    require_h5py()
    model = read_trained_model(path, generation, report, weights)
    # faceswap names plugins as Python modules, which take no hyphen.
    name = model.config.model.trainer.replace("-", "_")
    files = (f"{name}.keras", f"{name}_state.json")
    _refuse_target(path, target, files, force=force)
    graph = model.network.graph()
    # Before a file is made: what Keras has no word for is refused here.
    state = state_of(model.config, TrainingState.from_dict(model.state), graph)
    faces = model.faces()
    with writing(target), folder_beside(target) as folder:
        report("writing the graph and the weights")
        write_keras(folder / files[0], graph, model.metadata)
        report("reading it back, to compare it with the model")
        # Of the file as it lies on the disk, read by the way on which imports come.
        difference = _difference(folder / files[0], model.network, faces)
        # Not by `>`: a NaN is to be refused too.
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"the file differs from the model by {difference:.1e} (at most "
                f"{MAX_DIFFERENCE:.0e}), so it was not kept; export as safetensors instead"
            )
        # After the comparison: a folder without a state is no model to faceswap.
        (folder / files[1]).write_text(json.dumps(state), encoding="utf-8")
        size_bytes = sum((folder / file).stat().st_size for file in files)
        _move(folder, target, files)
    return KerasExport(
        path=target,
        files=files,
        size_bytes=size_bytes,
        difference=difference,
        num_faces=len(faces),
    )


def _refuse_target(path: Path, target: Path, files: tuple[str, ...], *, force: bool) -> None:
    """Refuse a folder in which something else is, or that lies among the saves."""
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder; make it first, or choose another place")
    if target.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{target} lies in the model folder {path}; choose another place")
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise ValueError(f"{target} is no folder; choose another name")
    there = sorted(entry.name for entry in target.iterdir())
    # faceswap insists on one state a folder, and refuses a second model in it.
    others = [name for name in there if name.endswith((".keras", "_state.json"))]
    foreign = [name for name in others if name not in files]
    if foreign or (there and not others):
        raise ValueError(f"{target} holds {(foreign or there)[0]}; choose a new or empty folder")
    for name in files:
        if (target / name).is_dir():
            raise ValueError(f"{target / name} is a folder; choose a new or empty one to write to")
    if there and not force:
        raise ValueError(f"{target} holds a model already; add --force to replace it")


def _move(folder: Path, target: Path, files: tuple[str, str]) -> None:
    """Put the files, durable on the disk, into their folder: at once where it is new."""
    for file in files:
        sync_file(folder / file)
    sync_folder(folder)
    if target.is_dir() and any(target.iterdir()):
        # One by one: no folder can be renamed onto one that is not empty.
        _replace(folder, target, files)
    else:
        os.rename(folder, target)
    sync_folder(target.parent)


def _replace(folder: Path, target: Path, files: tuple[str, str]) -> None:
    """Put the graph and the state in the place of older ones, which stay where the disk refuses.

    A graph never lies beside the state of another: what a kill leaves between has no state, which
    a conversion of faceswap and an import refuse by name, and the same export replaces.
    """
    graph, state = files
    aside = temporary_name(target / state)
    has_state = os.path.lexists(target / state)
    if has_state:
        os.rename(target / state, aside)
        # Before the graph changes: a power cut must not bring the name back beside a new one.
        sync_folder(target)
    try:
        os.replace(folder / graph, target / graph)
    except OSError:
        if has_state:
            os.rename(aside, target / state)
        raise
    sync_folder(target)
    os.replace(folder / state, target / state)
    sync_folder(target)
    # Only now, and those of kills too: what was there before may have been all that was left.
    discard_leftovers(target, of=target / state)


def _difference(path: Path, network: Autoencoder, faces: Sequence[np.ndarray]) -> float:
    """Largest difference of an output between a written file and the model, over all faces."""
    graph, edge_px = graph_of(path), network.input_px
    pictures_nssc = np.stack(sample_pictures(edge_px, faces))
    faces_ncss = torch.from_numpy(pictures_nssc).permute(0, 3, 1, 2).contiguous()
    model_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    with open_weights(path, graph, model_bytes) as arrays, torch.no_grad():
        for ours, theirs in match(graph, network.graph()).items():
            theirs.weights = arrays.entries(theirs, [entry.shape for entry in ours.weights])
        names = (value.call.layer.name for value in graph.inputs)
        # One face for both inputs: A's decoder and B's then both have it.
        found = evaluate(graph, graph.outputs, dict.fromkeys(names, faces_ncss))
        wanted = [*network.swap(faces_ncss, "a"), *network.swap(faces_ncss, "b")]
    differences = [(one - other).abs().max() for one, other in zip(found, wanted, strict=True)]
    return float(torch.stack(differences).max())
