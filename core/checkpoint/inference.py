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

import safetensors.torch
import torch
from torch import Tensor

from ... import models
from ...models.autoencoder import Autoencoder, Side
from ...models.fields import shown
from ..config import Config, from_dict, model_settings
from ..system.durable_files import DamagedError, write_output
from .format import MODEL, metadata_of, most_tensor_bytes, read_state, read_tensors
from .generations import BACKUP
from .model_folder import ModelFolder

SCHEMA = "mien.inference/1"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES: dict[str, tuple[Side, ...]] = {"a": ("a",), "b": ("b",), "both": ("a", "b")}


def write_inference(
    path: Path,
    target: Path,
    *,
    generation: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    side: Literal["a", "b", "both"] = "both",
    force: bool = False,
) -> dict[str, str]:
    """Write the weights of a generation for use, whole or not at all; the metadata of the file.

    Args:
        path: The model folder; it is only read.
        target: A file *.safetensors outside the saves.
        generation: Name of one, or `backup`; None: the newest.
        precision: Number format of the weights.
        side: Side as whom faces are to be decoded.
        force: Replace the file where there is one.

    Raises:
        ValueError: There is no such save, or it is damaged or holds numbers that are none; the
            target is not allowed; the disk refuses.
    """
    _refuse_target(path, target, force=force)
    source, state, config, saved = read_model(path, generation)
    settings = model_settings(config)
    settings |= dataclasses.asdict(
        models.options_of(config.model.trainer, config.model.options)
    )  # written out, so that later defaults do not matter
    model = models.meta_model(config.model.trainer, **settings)
    refuse_misfit(source, model, shapes_of(saved))
    needed = _subnetworks_of(model, SIDES[side])
    tensors = {
        name: _cast(name, tensor, precision)
        for name, tensor in saved.items()
        if name.partition(".")[0] in needed
    }
    metadata = metadata_of(state) | _metadata(config, settings, model, precision, side)
    _write(target, tensors, metadata, force=force)
    return metadata


def read_model(
    path: Path, generation: str | None = None
) -> tuple[Path, dict[str, Any], Config, dict[str, Tensor]]:
    """A save of a model folder, which is only read: its place, state, settings and weights.

    Args:
        path: The model folder.
        generation: Name of one, or `backup`; None: the newest.

    Raises:
        ValueError: There is no such save, or it is damaged, or its settings are unknown.
    """
    with ModelFolder(path, read_only=True) as folder:
        source, manifest = folder.generations.find(generation)
    try:
        state, values = read_state(source, manifest)
        tensors = read_tensors(source, MODEL, manifest, most_tensor_bytes(values))
    except DamagedError as damage:
        raise ValueError(
            f"{source} is damaged ({damage}); `mien model verify {path}` tells what is whole"
        ) from damage
    if values is None:
        raise ValueError(f"{source} holds no config.toml, so its settings are unknown")
    return source, state, from_dict(values), tensors


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
        "colour_order": "BGR",
    }


def _refuse_target(path: Path, target: Path, *, force: bool) -> None:
    if target.suffix != ".safetensors":
        raise ValueError(f"the file to write must end in .safetensors, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder; make it first, or choose another place")
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


def _subnetworks_of(model: Autoencoder, sides: tuple[Side, ...]) -> set[str]:
    """Names of the sub-networks that a face goes through to be decoded as any of these sides."""
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, subnetwork in model.named_children()
        for module in subnetwork.modules()
    ]
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


def _cast(name: str, tensor: Tensor, precision: str) -> Tensor:
    """The tensor in the number format; ValueError where a number is none, or too large for it."""
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name!r} holds numbers that are not finite (`mien model nan-scan` lists them); "
            "restore a save from before"
        )
    cast_tensor = tensor.to(PRECISIONS[precision])
    if not cast_tensor.isfinite().all():
        raise ValueError(f"{name!r} holds numbers too large for {precision}; use bf16 or fp32")
    return cast_tensor


def _write(
    target: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, force: bool
) -> None:
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Not by `write_tensors`: the library writes to a file of a random name, which a kill leaves.
    content = safetensors.torch.save(plain, metadata)
    try:
        write_output(target, content, force=force)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
