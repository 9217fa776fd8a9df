"""What a swap needs of a trained model, as one safetensors file: weights, and how to build it.

The file describes itself in its metadata (text by name), so that another program, or

    model = models.build(metadata["trainer"], seed=None, **json.loads(metadata["options"]))
    model.load_state_dict(tensors, strict=False)
    faces_bchw = model.swap(crops_bchw, side)[0]

can use it: `crops_bchw` are BGR, 0..1, cut out by centering, coverage and vertical offset and
resized to `input_px`. A file of one side lacks the sub-networks that only the other goes through;
that side must then not be asked for.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ... import models
from ...models.autoencoder import Autoencoder, Side
from ...models.fields import shown
from ..config import Config, from_dict, model_settings
from ..system.durable_files import Content, DamagedError, write_output, writing
from .format import (
    EMA,
    MODEL,
    metadata_of,
    most_tensor_bytes,
    read_state,
    read_tensors,
    tensor_file,
)
from .generations import BACKUP
from .model_folder import ModelFolder

SCHEMA = "mien.inference/1"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Weights = Literal["auto", "ema", "raw"]
"""Weights of a save: `read_model` says which."""

SIDES: dict[str, tuple[Side, ...]] = {"a": ("a",), "b": ("b",), "both": ("a", "b")}


def write_inference(
    path: Path,
    target: Path,
    *,
    generation: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    side: Literal["a", "b", "both"] = "both",
    weights: Weights = "auto",
    force: bool = False,
) -> dict[str, str]:
    """Write the weights of a generation for use, whole or not at all; the metadata of the file.

    Args:
        path: The model folder; it is only read.
        target: A file *.safetensors outside the saves.
        generation: Name of one, or `backup`; None: the newest.
        precision: Number format of the weights.
        side: Side as whom faces are to be decoded.
        weights: Same as for `read_model`.
        force: Replace the file where there is one.

    Raises:
        ValueError: There is no such save, or it is damaged or holds numbers that are none; the
            target is not allowed; the disk refuses.
    """
    # First of all: gigabytes need not be read for a file that cannot be written.
    refuse_target(path, target, ".safetensors", force=force)
    source, state, config, saved, chosen = read_model(path, generation, weights=weights)
    content, metadata = weights_file(
        source, state, config, saved, chosen, precision=precision, side=side
    )
    write_export(target, content, force=force)
    return metadata


def weights_file(
    source: Path,
    state: dict[str, Any],
    config: Config,
    saved: dict[str, Tensor],
    weights: str,
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    side: Literal["a", "b", "both"] = "both",
) -> tuple[Content, dict[str, str]]:
    """Content of the file of what `read_model` gave, and its metadata.

    In fp32 weights that are contiguous, as a save has them, are not copied for it.
    """
    settings = model_settings(config)
    settings |= dataclasses.asdict(
        models.options_of(config.model.trainer, config.model.options)
    )  # written out, so that later defaults do not matter
    # Without memory: names and shapes are all that is compared.
    model = models.meta_model(config.model.trainer, **settings)
    refuse_misfit(source, model, shapes_of(saved))
    needed = _subnetworks_of(model, SIDES[side])
    used = {name: tensor for name, tensor in saved.items() if name.partition(".")[0] in needed}
    # Only what is exported is looked at: one side may be sound where the other has diverged.
    refuse_not_finite(used)
    tensors = {name: _cast(name, tensor, precision) for name, tensor in used.items()}
    metadata = metadata_of(state) | {"weights": weights}
    metadata |= _metadata(config, settings, model, precision, side)
    # Not by `write_tensors`: the library writes to a file of a random name, which a kill leaves.
    return tensor_file(tensors, metadata), metadata


def read_model(
    path: Path, generation: str | None = None, *, weights: Weights = "auto"
) -> tuple[Path, dict[str, Any], Config, dict[str, Tensor], str]:
    """A save of a model folder, which is only read: its place, state, settings and weights, and
    which weights these are (raw or ema).

    Args:
        path: The model folder.
        generation: Name of one, or `backup`; None: the newest.
        weights: Weights of the training (raw), their average (ema), or that where there is one
            (auto). What has no average, as statistics of norms, is as in the training.

    Raises:
        ValueError: There is no such save, or it is damaged, or its settings are unknown, or it has
            no average and that is asked for.
    """
    with ModelFolder(path, read_only=True) as folder:
        source, manifest = folder.generations.find(generation)
    try:
        state, values = read_state(source, manifest)
        tensors = read_tensors(source, MODEL, manifest, most_tensor_bytes(values))
        is_average = weights != "raw" and EMA in manifest.files
        if is_average:
            tensors |= read_tensors(source, EMA, manifest, most_tensor_bytes(values))
    except DamagedError as damage:
        raise ValueError(
            f"{source} is damaged ({damage}); `mien model verify {path}` tells what is whole"
        ) from damage
    if weights == "ema" and EMA not in manifest.files:
        raise ValueError(
            f"{source} has no average of the weights, which train.ema or the optimizer "
            "schedule-free keeps; ask for raw weights"
        )
    if values is None:
        raise ValueError(f"{source} holds no config.toml, so its settings are unknown")
    return source, state, from_dict(values), tensors, "ema" if is_average else "raw"


def _metadata(
    config: Config, settings: dict[str, Any], model: Autoencoder, precision: str, side: str
) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "options": json.dumps(settings),
        "side": side,
        "precision": precision,
        "input_px": str(model.input_px),
        "output_px": json.dumps(list(model.output_px)),
        "centering": config.data.centering,
        "coverage": str(config.data.coverage),
        "vertical_offset": str(config.data.vertical_offset),
        # Said in the file, for most programs would take RGB for granted.
        "colour_order": "BGR",
    }


def refuse_target(path: Path, target: Path, suffix: str, *, force: bool) -> None:
    """Refuse a file to write that is none, that there is, or that lies among a model's saves.

    Args:
        path: The model folder.
        target: The file.
        suffix: End of its name.
        force: Whether it may take the place of another.

    Raises:
        ValueError: It cannot be written; one line says why.
    """
    if target.suffix != suffix:
        raise ValueError(f"the file to write must end in {suffix}, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder; make it first, or choose another place")
    # Resolved, since a link may lead among the saves, too.
    place = target.parent.resolve()
    for name in ("generations", BACKUP):
        if place.is_relative_to((path / name).resolve()):
            raise ValueError(f"{target} lies among the saves of {path}; choose another place")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; choose another name")
    if os.path.lexists(target) and not force:
        raise ValueError(f"{target} exists; add --force to replace it")


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_misfit(
    source: Path,
    model: Autoencoder,
    shapes: dict[str, tuple[int, ...]],
    sides: tuple[Side, ...] | None = None,
) -> None:
    """Refuse weights that are not, by name and shape, those of the model that is described.

    Args:
        source: Path of the weights, for the error.
        model: Model on the meta device.
        shapes: Shapes of the weights, by name.
        sides: Sides as whom faces are to be decoded by them; None: they are of all there is.

    Raises:
        ValueError: One is missing, unknown or of another shape.
    """
    kept = None if sides is None else _subnetworks_of(model, sides)
    own = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if kept is None or name.partition(".")[0] in kept
    }
    differing = sorted(
        name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name)
    )
    if differing:
        raise ValueError(
            f"{source} does not fit its own settings: {shown(differing[0])} is not the tensor that "
            f"{model.Config.family} has; restore another save"
        )


def network_of(source: Path, config: Config, tensors: dict[str, Tensor]) -> Autoencoder:
    """Network with the weights of a save, in evaluation mode on the CPU.

    Args:
        source: Path of the save, for the error.
        config: Settings of the save.
        tensors: Weights of the save.

    Raises:
        ValueError: The weights are not those of the settings.
    """
    trainer, settings = config.model.trainer, model_settings(config)
    refuse_misfit(source, models.meta_model(trainer, **settings), shapes_of(tensors))
    return built(trainer, settings, tensors)


def built(trainer: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Autoencoder:
    """Network of a family with these weights, in evaluation mode."""
    # No start is drawn or looked up, since the save brings the weights.
    network = models.build(trainer, seed=None, pretrained=False, **settings)
    # A file of one side lacks the sub-networks of the other.
    network.load_state_dict(tensors, strict=False)
    # No gradients: a network for use keeps nothing of its layers' inputs.
    return network.eval().requires_grad_(False)


def _subnetworks_of(model: Autoencoder, sides: tuple[Side, ...]) -> set[str]:
    """Names of the sub-networks that a face goes through to be decoded as any of these sides."""
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, subnetwork in model.named_children()
        for module in subnetwork.modules()
    ]
    # Asked of a pass on the meta device, which costs nothing, so that no family has to declare it.
    model.eval()  # one face has no statistics
    face_1chw = torch.empty(1, 3, model.input_px, model.input_px, device="meta")
    try:
        with torch.no_grad():
            for side in sides:
                model.swap(face_1chw, side)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse weights among which there are numbers that are none.

    Raises:
        ValueError: There are; the first tensor that holds one is named.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name!r} holds numbers that are not finite (`mien model nan-scan` lists them); "
                "restore a save from before"
            )


def _cast(name: str, tensor: Tensor, precision: str) -> Tensor:
    """The tensor in the number format; ValueError where a number is too large for it."""
    # Counters of norms, which no format rounds.
    if not tensor.is_floating_point():
        return tensor
    cast_tensor = tensor.to(PRECISIONS[precision])
    # fp16 ends at 65,504: a weight beyond it would become infinite without a word.
    if not cast_tensor.isfinite().all():
        raise ValueError(f"{name!r} holds numbers too large for {precision}; use bf16 or fp32")
    return cast_tensor


def write_export(target: Path, content: Content, *, force: bool) -> None:
    """Write a file for use, whole or not at all; ValueError where the disk refuses."""
    with writing(target):
        write_output(target, content, force=force)
