"""A dry run: everything that training does up to the second step, and nothing of it kept."""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..config.recipes import Recipe
from ..console.reporter import Reporter
from ..distribute.ranks import Ranks
from . import batch_size as batch_sizes
from . import memory
from .devices import free_bytes
from .engine import FIRST_REPLAY
from .prepare import open_dry_run
from .recipe_progress import RecipeProgress
from .resolve import Overrides
from .training_setup import TrainingSetup

STEPS = 2
"""Steps of a dry run. Chosen, unmeasured."""


@dataclass(frozen=True)
class DryRun:
    """What training with these settings is like."""

    config: Config
    """All settings, the batch size of all planned GPUs among them."""

    measured_batch: int
    """Faces of each side in the steps that were run: what one GPU takes."""

    iterations: int
    """Iterations that the model has been trained for; 0: a new one."""

    learning_rate: float
    """Learning rate of the next iteration."""

    progress: RecipeProgress | None
    """The stages, where there are any."""

    precision: str
    device: torch.device
    num_parameters: int
    memory: memory.Memory | None
    """Estimate for a GPU, for each of them where several are planned; None on a CPU."""

    free_bytes: int
    """Memory that was there for it."""

    losses: list[dict[str, float]]
    """Losses of the steps that were run: `loss_a`, `loss_b`."""

    step_s: float
    """Seconds that the last of them took; first steps are slow."""

    peak_mib: float
    """Peak that was measured: GPU memory taken, or on a CPU the resident memory of the process."""


def dry_run(
    overrides: Overrides, reporter: Reporter, recipe: Recipe | None = None, *, num_gpus: int = 1
) -> DryRun:
    """Run two steps of what the settings describe: of the model in the folder, where there is one,
    as its next two would be. It is only read.

    Faces that an earlier start decoded are used; those decoded now are not kept.

    Args:
        overrides: What the user set.
        reporter: Reports what was chosen, and warns.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        num_gpus: GPUs that the run is planned for; the steps are run on one.

    Raises:
        ValueError: As training would raise it.
    """
    ranks = Ranks(size=num_gpus)
    with (
        # What is decoded on the way goes there: the model's folder stays as it is.
        tempfile.TemporaryDirectory(prefix="mien-dry-run-") as scratch,
        open_dry_run(overrides, reporter, recipe, Path(scratch), ranks) as (setup, batch_size),
    ):
        return _run_steps(setup, ranks, batch_size)


def _run_steps(setup: TrainingSetup, ranks: Ranks, batch_size: int) -> DryRun:
    begun_at, free, losses = setup.state.iterations, free_bytes(setup.device), []
    config = _planned(setup, ranks, batch_size, free)
    on_gpu = setup.device.type == "cuda"
    for _ in range(num_steps(setup.engine.name)):
        begin = time.perf_counter()
        setup.set_rate()
        setup.engine(setup.state.faces_seen)
        setup.state.advance()
        # Fetching waits for the device, so the time is that of the whole step.
        named = setup.step.loss.named(setup.step.loss_buffer.fetch(1)())
        step_s = time.perf_counter() - begin
        losses.append({name: float(named[name][0]) for name in ("loss_a", "loss_b")})
    need = None
    if on_gpu:
        whole = memory.footprint(
            config, setup.precision, store_bytes=_faces_bytes(setup), num_ranks=ranks.size
        )
        # Of the first rank: none has more faces.
        need = whole.at(ranks.share(config.train.batch_size).count)
    return DryRun(
        config=config,
        measured_batch=setup.config.train.batch_size,
        iterations=begun_at,
        learning_rate=setup.schedule.rate(begun_at),
        progress=setup.progress,
        precision=setup.precision.name,
        device=setup.device,
        num_parameters=setup.step.update.num_parameters,
        memory=need,
        free_bytes=free,
        losses=losses,
        step_s=step_s,
        peak_mib=_peak_bytes(setup.device) / 2**20,
    )


def num_steps(engine: str) -> int:
    """Steps that are run by an engine of this name, of which the last one's time counts."""
    # A graph is captured first, which takes many times as long as its replay.
    return FIRST_REPLAY + STEPS if engine == "graph" else STEPS


def _planned(setup: TrainingSetup, ranks: Ranks, batch_size: int, free: int) -> Config:
    """The settings with the batch size of all ranks: as set or, where that is 0, what each takes
    that has so many bytes free."""
    num_faces = {side: opened.store.num_faces for side, opened in setup.faces.items()}
    if batch_size:
        config = batch_sizes.with_batch_size(setup.config, batch_size)
        # The steps need a share of them alone, but the run will need them all.
        batch_sizes.check(config, num_faces)
        return config
    if ranks.size == 1:
        return setup.config
    # Processes on a CPU share its memory.
    num_sharing = 1 if setup.device.type == "cuda" else ranks.size
    chosen = batch_sizes.planned(
        batch_sizes.with_batch_size(setup.config, 0),
        num_faces,
        setup.precision,
        lambda: (free - _faces_bytes(setup)) // num_sharing,
        ranks.size,
    )
    return batch_sizes.with_batch_size(setup.config, chosen.size)


def _faces_bytes(setup: TrainingSetup) -> int:
    """Bytes of the GPU that the decoded faces take."""
    return sum(store.gpu_bytes for store in setup.feed.stores.values())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts it in KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
