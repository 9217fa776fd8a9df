"""What `mien train --dry-run` prints: memory, two steps, what the card and several of it allow."""

import sys
from typing import TYPE_CHECKING, Any

from ..benchmarks import ceilings, harness
from ..core import precision as precisions
from ..core.config import recipes
from ..core.console.reporter import Reporter
from ..core.distribute.places import num_planned
from ..core.distribute.predict import Outlook
from ..core.estimate.flops import configured_work
from ..core.estimate.links import LOOPBACK, gpu_link
from ..core.estimate.roofline import Card, Prediction, ceiling
from ..core.training.dry_run import DryRun, dry_run
from ..core.training.memory import describe
from ..core.training.scaling import outlook_of
from ..kernels.toolkit import cards
from .lines import tell, tell_json

if TYPE_CHECKING:
    from ..core.training.recipe_progress import RecipeProgress
    from ..core.training.resolve import Overrides


def print_dry_run(overrides: "Overrides", recipe: recipes.Recipe | None, *, as_json: bool) -> None:
    """Run two steps of what the settings describe, and tell what training so is like."""
    num_gpus = num_planned(overrides.sections["distribute"], len(cards()))
    # With --json, the standard output is for the facts alone.
    reporter = Reporter(sys.stderr if as_json else sys.stdout)
    trial = dry_run(overrides, reporter, recipe, num_gpus=num_gpus)
    card = ceilings.card_of(harness.known_ceilings() or ceilings.measure_ceilings(trial.device))
    bound = ceiling(configured_work(trial.config, trial.measured_batch), card)
    outlook = _outlook(trial, card, num_gpus) if num_gpus > 1 else None
    if as_json:
        facts = _facts(trial, bound, card)
        tell_json(facts | ({"scaling": _scaling(outlook)} if outlook else {}), indent=None)
    else:
        tell(*_lines(trial, bound, card, outlook))


def _outlook(trial: DryRun, card: Card, num_gpus: int) -> Outlook:
    """What several devices like this one would bring, by the step that was measured."""
    precision = precisions.resolve(trial.precision, trial.device)
    link = gpu_link() if trial.device.type == "cuda" else LOOPBACK
    return outlook_of(
        trial.config,
        precision,
        trial.device,
        card,
        num_gpus,
        link,
        measured_s=trial.step_s,
        measured_batch=trial.measured_batch,
    )


def _scaling(outlook: Outlook) -> dict[str, Any]:
    """The outlook as fields."""
    return {
        "gpus": outlook.run.num_gpus,
        "link": outlook.link.name,
        "link_gb_per_s": outlook.link.gb_s,
        "link_source": outlook.link.source,
        "distribution": outlook.run.distribution,
        "speedup": round(outlook.run_speedup, 2),
        "eg_per_s": round(outlook.run.eg_per_s, 1),
        "speedup_at_as_many_faces_a_gpu": round(outlook.grown.speedup, 2),
        "pays_from_faces_a_gpu": outlook.paying and outlook.paying.one.batch_size,
    }


def _facts(trial: DryRun, bound: Prediction, card: Card) -> dict[str, Any]:
    return {
        "trainer": trial.config.model.trainer,
        "iterations": trial.iterations,
        "parameters": trial.num_parameters,
        "batch_size": trial.config.train.batch_size,
        "measured_batch_size": trial.measured_batch,
        "precision": trial.precision,
        "learning_rate": trial.learning_rate,
        "device": trial.device.type,
        "gpu_memory_mib": None if trial.memory is None else round(trial.memory.total_mib),
        "free_mib": round(trial.free_bytes / 2**20),
        "peak_mib": trial.peak_mib,
        "losses": trial.losses,
        "second_step_s": trial.step_s,
        "roofline_eg_per_s": round(bound.eg_per_s, 1),
        "roofline_of": card.name,
        "roofline_precision": "bf16",
        "bound_by": bound.binds,
        "stages": _stages(trial.progress),
    }


_PHASES = {
    "products": "the matrix products",
    "pointwise": "the pointwise passes",
    "update": "the update of the weights",
    "gaps": "the gaps between kernels",
}
"""Phases of a step that can take the longest, in words."""


def _lines(trial: DryRun, bound: Prediction, card: Card, outlook: Outlook | None) -> list[str]:
    begun = f"iteration {trial.iterations}" if trial.iterations else "a new model"
    memory = (
        f"memory       {trial.peak_mib:,.0f} MiB of this process, "
        f"{round(trial.free_bytes / 2**20):,} MiB are free; `--summary` tells what a GPU "
        "needs"
    )
    if trial.memory is not None:
        of_each = "of each GPU: " if outlook else ""
        memory = f"GPU memory   {of_each}{describe(trial.memory, trial.free_bytes)}"
    batch_size, of_steps = trial.config.train.batch_size, ""
    if trial.measured_batch != batch_size:
        of_steps = f"; of one GPU, whose steps follow, {trial.measured_batch}"
    losses = [
        f"step {number}       Loss A: {losses['loss_a']:.5f}, Loss B: {losses['loss_b']:.5f}"
        for number, losses in enumerate(trial.losses, 1)
    ]
    # By the one peak that is known of every card, and 2 bytes a value.
    of_this = "" if trial.precision == "bf16" else f"; this run is in {trial.precision}"
    several = []
    if outlook:
        several = [f"scaling      {outlook}; predicted"]
        several += [f"warning      {outlook.warning}"] if outlook.warning else []
    return [
        f"dry run      {begun}, learning rate {trial.learning_rate:.4g}, {trial.precision}",
        f"parameters   {trial.num_parameters:,}",
        f"batch size   {batch_size}{of_steps}",
        memory,
        *losses,
        f"roofline     {bound.eg_per_s:,.0f} EG/s in bf16 on {card.name}, limited by "
        f"{_PHASES[bound.binds]}; no run in bf16 can be faster, good ones reach half of it"
        f"{of_this}",
        *several,
        *(f"stage        {line}" for line in _stages(trial.progress)),
        "dry run: nothing was kept",
    ]


def _stages(progress: "RecipeProgress | None") -> list[str]:
    """A line for each stage of the run, the present one marked."""
    if progress is None:
        return []
    lines = recipes.describe(progress.recipe)
    lines[progress.stage_state.stage] += f" (now, since iteration {progress.stage_state.begun})"
    return lines
