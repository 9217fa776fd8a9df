"""A rehearsal: everything that training does up to the second step, and nothing of it kept."""

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config, merge, to_dict
from ..data.sides import SIDES
from ..paths import expanded
from ..recipes import Recipe
from ..run.log import Reporter
from . import memory
from .engine import WARM_UP
from .prepare import Run, free_bytes, open_run, settings_of
from .stages import Plan

STEPS = 2


@dataclass(frozen=True)
class Rehearsal:
    """What a run with these settings is like."""

    config: Config
    """All settings, the batch size among them."""

    plan: Plan | None
    """The stages, where there are any."""

    precision: str
    device: torch.device
    num_parameters: int
    memory: memory.Memory
    """Estimated, of a GPU."""

    free_bytes: int
    """Memory that was there for it."""

    losses: list[dict[str, float]]
    """Of the steps that were run: `loss_a`, `loss_b`."""

    step_s: float
    """Of the last of them; first steps are slow."""

    peak_mib: float | None
    """Measured GPU memory; None on a CPU."""


def rehearse(given: dict[str, Any], reporter: Reporter, recipe: Recipe | None = None) -> Rehearsal:
    """Run two steps of what the settings describe. A model folder is only read.

    Faces that an earlier start decoded are used; those decoded now are not kept.

    Raises:
        ValueError: As training would raise it.
    """
    config, plan = settings_of(given, reporter, recipe)
    with tempfile.TemporaryDirectory(prefix="mien-dry-run-") as scratch:
        own_faces = expanded(config.save.model_dir) / "faces"
        decoded = str(own_faces) if config.save.model_dir and own_faces.is_dir() else ""
        trial = {
            "save": {"model_dir": f"{scratch}/model", "logs": False},
            "log": {"file": ""},
            "preview": {"window": False},
            "data": {"store_dir": config.data.store_dir or decoded or f"{scratch}/faces"},
        }
        with open_run(merge(to_dict(config), trial), reporter) as run:
            return _rehearsed(run, plan)


def _rehearsed(run: Run, plan: Plan | None) -> Rehearsal:
    batch_size, free, losses = run.config.train.batch_size, free_bytes(run.device), []
    steps = WARM_UP + STEPS if run.engine.name == "graph" else STEPS  # the last ones are replays
    for number in range(steps):
        begin = time.perf_counter()
        run.engine(dict.fromkeys(SIDES, number * batch_size))
        named = run.step.loss.named(run.step.ring.fetch(1)())
        step_s = time.perf_counter() - begin
        losses.append({name: float(named[name][0]) for name in ("loss_a", "loss_b")})
    on_gpu = run.device.type == "cuda"
    return Rehearsal(
        config=run.config,
        plan=plan,
        precision=run.precision.name,
        device=run.device,
        num_parameters=run.step.update.num_parameters,
        memory=memory.footprint(run.config, run.precision).at(batch_size),
        free_bytes=free,
        losses=losses,
        step_s=step_s,
        peak_mib=torch.cuda.max_memory_allocated(run.device) / 2**20 if on_gpu else None,
    )
