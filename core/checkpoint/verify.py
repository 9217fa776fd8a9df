"""What a model folder holds and whether it is whole, found out without touching it.

A run may train on it meanwhile: what it replaces while it is read is read again, or passed over.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import models
from ..config import from_dict, model_settings
from ..system.durable_files import DamagedError, reading
from .format import (
    EMA,
    MODEL,
    STATE,
    Manifest,
    check_generation,
    read_generation,
    read_json,
    read_manifest,
    read_state,
)
from .generations import BACKUP, FOLDER
from .lock import owner_in_words
from .model_folder import ModelFolder
from .state import TrainingState

# A run replaces a folder once a save at most, so that even the second look is rarely needed.
_TRIES = 5


@dataclass(frozen=True)
class Verdict:
    """Whether one part of a model folder is as it was written."""

    name: str
    """`generations/<n>`, `backup` or `state.json`."""

    iterations: int | None
    size_bytes: int
    damage: str
    """What is wrong; empty where it is whole."""


@dataclass(frozen=True)
class NotFinite:
    """Numbers of a tensor that are none."""

    file: str
    tensor: str
    nan: int
    infinite: int
    total: int


def verify(path: Path) -> list[Verdict]:
    """Every generation and the backup compared with its manifest, and the pointer to them.

    Raises:
        ValueError: There is no model in the folder, or a newer version made it.
    """
    with ModelFolder(path, read_only=True) as folder:
        if folder.is_new:
            raise ValueError(f"nothing has been saved in model folder {path} yet")
        # By names and not by manifests: a generation without a readable one is to be told, too.
        names = [f"{FOLDER}/{name}" for name in folder.generations.names()]
    names += [BACKUP] if (path / BACKUP).exists() else []
    with reading(path):
        verdicts = [verdict for name in names if (verdict := _verdict(path, name))]
        pointer = _pointer_damage(path)
    return verdicts + [Verdict(STATE, None, 0, pointer)] * bool(pointer)


def nan_scan(path: Path, name: str | None = None) -> tuple[str, int, list[NotFinite]]:
    """Name of the generation, how many tensors it has, and those that hold NaN or infinity.

    Args:
        path: A model folder.
        name: Name of the generation, or `backup`; None: the newest.

    Raises:
        ValueError: There is no such generation, or it is damaged.
    """
    with ModelFolder(path, read_only=True) as folder:
        source, manifest = folder.generations.find(name)
    with reading(path):
        try:
            generation = read_generation(source, manifest)
        except DamagedError as damage:
            raise ValueError(
                f"{source} is damaged ({damage}); `mien model verify {path}` tells what is whole"
            ) from damage
    not_finite = []
    # Of the optimizer too: a moment that is infinite spoils the weights at the next step.
    parts = {
        "model": generation.model,
        "optimizer": generation.optimizer or {},
        "ema": generation.ema or {},
    }
    for file, tensors in parts.items():
        not_finite += [bad for key, tensor in tensors.items() if (bad := _scan(file, key, tensor))]
    return source.name, sum(map(len, parts.values())), not_finite


def facts_of(path: Path) -> dict[str, Any]:
    """What there is to know of a model without reading its weights, as plain values.

    Raises:
        ValueError: There is no model, its state or settings are damaged, or a newer version made
            it.
    """
    with ModelFolder(path, read_only=True) as folder, reading(path):
        source, manifest = folder.generations.find()
        try:
            state_values, config_values = read_state(source, manifest)
        except DamagedError as damage:
            raise ValueError(
                f"{source} is damaged ({damage}); `mien model verify {path}` tells what is whole"
            ) from damage
        manifests = folder.generations.manifests()
        backup = _manifest_or_none(path / BACKUP)
        snapshots = _snapshots(path)
        linked = [str(copy) for copy in (path / BACKUP, *snapshots) if _is_linked(copy)]
    state = TrainingState.from_dict(state_values)
    imported = state.imported
    return {
        "path": str(path),
        "trainer": state.trainer,
        **_facts_of_network(config_values),
        "iterations": state.iterations,
        "lowest_mean_loss": state.lowest_mean_loss,
        "imported_lowest_loss": imported.lowest_loss,
        "sessions": [
            {
                "number": session.number,
                "started": session.started,
                "batch_size": session.batch_size,
                "iterations": session.iterations,
                "is_imported": session.number <= imported.last_session,
            }
            for session in state.sessions
        ],
        "generations": [_facts_of_save(each) for each in manifests],
        "backup": None if backup is None else _facts_of_save(backup),
        "snapshots": [str(snapshot) for snapshot in snapshots],
        "linked": linked,
        "run_id": state.run_id,
        "mien_version": manifest.mien_version,
        "in_use_by": owner_in_words(path),
    }


def _facts_of_network(config_values: dict[str, Any] | None) -> dict[str, Any]:
    """Options, sizes and parameters; None each where the settings were not saved."""
    if config_values is None:
        return dict.fromkeys(("options", "input_px", "output_px", "parameters"))
    config = from_dict(config_values)
    options = models.options_of(config.model.trainer, config.model.options)
    input_px, output_px = models.family(config.model.trainer).sizes(options)
    # Only its shapes are asked for, which take no memory.
    model = models.meta_model(config.model.trainer, **model_settings(config))
    return {
        "options": dataclasses.asdict(options),
        "input_px": input_px,
        "output_px": list(output_px),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _facts_of_save(manifest: Manifest) -> dict[str, Any]:
    size_bytes = sum(size for size, _ in manifest.files.values())
    return {
        "name": manifest.name,
        "iterations": manifest.iterations,
        "size_bytes": size_bytes,
        "has_average": EMA in manifest.files,
    }


def _snapshots(path: Path) -> list[Path]:
    """The snapshots beside a model folder, by iteration."""
    folder = path.resolve()
    pattern = re.compile(re.escape(folder.name) + r"_snapshot_(\d{1,12})_iters")
    names = ((pattern.fullmatch(other.name), other) for other in folder.parent.iterdir())
    return [other for _, other in sorted((int(name[1]), other) for name, other in names if name)]


def _is_linked(copy: Path) -> bool:
    """Whether a backup or snapshot has a file under a second name, as earlier versions made them:
    damage to a save then reaches its copy."""
    files = [copy / MODEL, *copy.glob(f"{FOLDER}/*/{MODEL}")]
    return any(os.lstat(file).st_nlink > 1 for file in files if os.path.lexists(file))


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except DamagedError:
        return None


def _verdict(path: Path, name: str) -> Verdict | None:
    """Verdict on a generation or the backup; None where a run has put it away meanwhile."""
    folder = path / name
    for _ in range(_TRIES):
        # Damage counts only where the folder stayed the same one while it was read.
        # The name alone does not tell: the backup gets a new folder under its old name.
        before = _inode_of(folder)
        manifest = None
        try:
            manifest = read_manifest(folder)
            check_generation(folder, manifest)
            damage = ""
        except DamagedError as error:
            damage = str(error)
        if not damage or _inode_of(folder) == before:
            break
    if damage and _inode_of(folder) is None:
        return None
    if manifest is None:
        return Verdict(name, None, 0, damage)
    return Verdict(name, manifest.iterations, _facts_of_save(manifest)["size_bytes"], damage)


def _inode_of(folder: Path) -> int | None:
    """The inode, which tells a folder from another of the same name; None where there is none."""
    try:
        return os.lstat(folder).st_ino
    except FileNotFoundError:
        return None


def _pointer_damage(path: Path) -> str:
    """What is wrong with the top state.json; empty where it names a generation that is there."""
    damage = ""
    for _ in range(_TRIES):  # a run may replace it, and the generation that it named, at any moment
        try:
            name = read_json(path / STATE).get("generation")
        except DamagedError as error:
            return str(error)
        if isinstance(name, str) and (path / FOLDER / name).is_dir():
            return ""
        damage = f"generation {name!r}, which it names, is missing"
    return damage


def _scan(file: str, name: str, tensor: Tensor) -> NotFinite | None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # 8-bit formats know no such question
    # Counted apart: infinite numbers tell of a rate that is too high, NaN of anything.
    nan = int(torch.isnan(tensor).sum())
    infinite = int(torch.isinf(tensor).sum())
    if not nan and not infinite:
        return None
    return NotFinite(file, name, nan, infinite, tensor.numel())
