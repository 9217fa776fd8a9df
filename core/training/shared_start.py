"""The start of a session on several ranks: the first one reads the model, the others follow it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...models.autoencoder import Autoencoder
from ...models.batch_norm import norms_of
from ..checkpoint.format import Generation
from ..config import Config, from_dict, merge, to_dict
from ..config.recipes import Recipe
from ..distribute.group import Group
from ..distribute.ranks import Ranks
from ..system.printable import plural
from ..system.threads import thread_count
from .resolve import Overrides

_FEW_FACES = 4
"""Faces of a side and rank below which a notice is given; chosen, unmeasured."""

_OF_THE_FIRST = ("log", "preview")
"""Sections of settings that only the first rank reads, so that others may differ in them."""


def check_alike(group: Group, overrides: Overrides, recipe: Recipe | None) -> None:
    """Refuse ranks that were not started alike; every rank calls it.

    Raises:
        ValueError: This rank has other settings, or is another mien, than the first one.
    """
    given = merge(overrides.lasting, overrides.session)
    settings = {
        f"{section}.{name}": value
        for section, values in given.items()
        if section not in _OF_THE_FIRST
        for name, value in values.items()
    }
    settings["recipe"] = recipe and recipe.to_dict()
    own = json.dumps([__version__, settings], default=str)
    first_version, first = json.loads(group.text(own))
    if first_version != __version__:
        raise ValueError(
            f"this is mien {__version__}, and rank 0 is mien {first_version}; install one version "
            "on all machines"
        )
    # Read back like the first one's: a tuple is a list then, and compares equal to it.
    _, settings = json.loads(own)
    for name in sorted(settings.keys() | first.keys()):
        if settings.get(name) != first.get(name):
            raise ValueError(
                f"{name} is {settings.get(name)} here, and {first.get(name)} for rank 0; start all "
                "ranks by the same command line"
            )


def share_start(group: Group, saved: Generation | None, config: Config) -> None:
    """Give the save that a session goes on from, and its settings, to the other ranks.

    Args:
        group: Ranks of the run, of which this is the first.
        saved: The save, whose tensors are on the CPU; None: a new model.
        config: Settings of the session.
    """
    # As JSON and tensors: nothing that another process sends is to be unpickled.
    group.text(json.dumps({"config": to_dict(config), "saved": saved and _described(saved)}))
    if saved is not None:
        group.broadcast([tensor for each in _tensors_of(saved) for tensor in each.values()])


def follow_start(group: Group) -> tuple[Generation | None, Config]:
    """The save and the settings that the first rank gives."""
    values = json.loads(group.text())
    config, described = from_dict(values["config"]), values["saved"]
    if described is None:
        return None, config
    # In the order in which the first rank has described them, which is that of its broadcasts.
    model, optimizer, ema = (
        None if described[part] is None else _new(described[part])
        for part in ("model", "optimizer", "ema")
    )
    assert model is not None
    saved = Generation(
        name=described["name"],
        path=Path(described["path"]),
        model=model,
        optimizer=optimizer,
        ema=ema,
        state=described["state"],
        config=described["config"],
    )
    group.broadcast([tensor for each in _tensors_of(saved) for tensor in each.values()])
    return saved, config


def _tensors_of(saved: Generation) -> tuple[dict[str, Tensor], ...]:
    """Tensors of a save, file by file, in the order in which they are sent."""
    return saved.model, saved.optimizer or {}, saved.ema or {}


def _described(saved: Generation) -> dict[str, Any]:
    """A save in words and numbers: all but what its tensors hold."""

    def sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}

    return {
        "name": saved.name,
        "path": str(saved.path),
        "model": sizes(saved.model),
        "optimizer": None if saved.optimizer is None else sizes(saved.optimizer),
        "ema": None if saved.ema is None else sizes(saved.ema),
        "state": saved.state,
        "config": saved.config,
    }


def _new(sizes: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of these sizes, to be filled."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (dtype, shape) in sizes.items()
    }


def with_own_threads(config: Config, ranks: Ranks) -> Config:
    """The settings with the threads of this process, where several share the cores of a machine."""
    if ranks.local_size == 1 or config.data.num_threads:
        return config
    # Else every rank would decode with as many threads as there are cores.
    num_threads = max(1, thread_count(0) // ranks.local_size)
    return replace(config, data=replace(config.data, num_threads=num_threads))


def notices_of_parts(config: Config, model: Autoencoder, ranks: Ranks) -> list[str]:
    """What a user should know of a batch that is trained on in parts, by ranks or one after the
    other."""
    notices, size = [], config.train.micro_batch
    if size and norms_of(model):
        # Each rank draws its own random numbers, also for micro-batches.
        same = (
            "" if model.is_noisy else "the weights have the same bits on any number of ranks, but "
        )
        notices.append(
            f"{config.model.trainer} has batch norm, which with train.micro_batch sees {size} "
            f"{plural(size, 'face')} of a side at a time, and not all {config.train.batch_size}; "
            f"{same}its running estimates, by which previews and swaps normalise, depend on the "
            "number of ranks"
        )
    return notices if ranks.size == 1 else notices + _notices_of_ranks(config, model, ranks)


def _notices_of_ranks(config: Config, model: Autoencoder, ranks: Ranks) -> list[str]:
    notices = []
    smallest = config.train.batch_size // ranks.size
    if smallest < _FEW_FACES:
        notices.append(
            f"train.batch_size is {config.train.batch_size}, so each of {ranks.size} ranks trains "
            f"on {smallest} {plural(smallest, 'face')} of a side, which leaves most of a "
            "GPU idle; it is the batch of all ranks together"
        )
    parts = ["batch norm"] if norms_of(model) and not config.train.micro_batch else []
    parts += ["dropout or noise"] if model.is_noisy else []
    if parts:
        notices.append(
            f"{config.model.trainer} has {' and '.join(parts)}, seeing the faces of one rank: "
            "another number of ranks trains it a little differently"
        )
    return notices
