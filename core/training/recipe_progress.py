"""Progress of a run in its recipe: which stage, since when, and whether that one is over.

The recipe and the progress in it are saved with every generation, so an interrupted run goes on
inside its stage. Each stage is a session of its own: the run is closed with a save and opened again
with the settings of the next one, as though a user had stopped and resumed it.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...models.fields import setting
from ..checkpoint.state import TrainingState
from ..config import Config, merge
from ..config.recipes import NONE, Recipe, Stage
from ..system.printable import plural
from ..system.saved_values import MAX_SECONDS, require

PART = "recipe"
"""Name under which the state keeps the progress."""


@dataclass
class StageState:
    """What is known of the present stage."""

    stage: int = setting(0, low=0)
    begun: int = setting(0, low=0)
    """Total iteration before its first one."""

    seconds: float = setting(0.0, low=0, high=MAX_SECONDS)
    """Seconds of training in it."""

    best: float | None = None
    """The best value of what its plateau watches."""

    stale: int = setting(0, low=0)
    """Values since that were no better."""

    loss_sum: float = 0.0
    loss_count: int = setting(0, low=0)
    """Number of losses in the window that is not full yet."""

    measured: int = setting(0, low=0)
    """Total iteration of the last measurement that was taken in."""


@dataclass(kw_only=True)
class _Part:
    """Saved recipe, and the progress in it."""

    recipe: dict[str, Any]
    place: StageState


@dataclass
class RecipeProgress:
    """A recipe and the progress of a run in it."""

    recipe: Recipe
    stage_state: StageState = field(default_factory=StageState)
    is_entered: bool = True
    """Whether the present stage begins with this session."""

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_state.stage]

    @property
    def is_last(self) -> bool:
        return self.stage_state.stage == len(self.recipe.stages) - 1

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied with."""
        return self.recipe.rate_factor_of(self.stage_state.stage)

    def settings(self) -> dict[str, dict[str, Any]]:
        """What holds now, of all that stages have set; a rate of theirs replaces a found one."""
        settings = self.recipe.settings_of(self.stage_state.stage)
        if "learning_rate" not in settings.get("optimizer", {}):
            return settings
        # Else the found rate would go on, since it weighs more than a rate that is set.
        return merge(settings, {"optimizer": {"use_lr_finder": False}})

    def closes_window(self, iterations: int) -> bool:
        """Whether the plateau needs every loss up to this total iteration now."""
        plateau = self.stage.plateau
        done = iterations - self.stage_state.begun
        # Counted from the stage's begin, so that no window reaches over two stages.
        return plateau is not None and plateau.is_loss and done % plateau.window == 0

    def iterations_to_window(self, iterations: int) -> int:
        """Iterations until the plateau next needs every loss; 2**63 - 1: it never does."""
        plateau = self.stage.plateau
        if plateau is None or not plateau.is_loss:
            return sys.maxsize
        return plateau.window - (iterations - self.stage_state.begun) % plateau.window

    def take_losses(self, named: dict[str, np.ndarray]) -> None:
        """Take in the losses of some iterations, `loss_a`, `loss_b` and `batch_total` (N,)."""
        plateau = self.stage.plateau
        if plateau is None or not plateau.is_loss:
            return
        values = named["batch_total" if plateau.metric == "loss" else plateau.metric]
        values = values[np.isfinite(values)]  # others would make a sum that no file can hold
        while len(values):
            # A window that an edited recipe has made shorter may be full already.
            room = max(plateau.window - self.stage_state.loss_count, 0)
            self.stage_state.loss_sum += math.fsum(values[:room])
            self.stage_state.loss_count += len(values[:room])
            values = values[room:]
            if self.stage_state.loss_count >= plateau.window:
                self._take(self.stage_state.loss_sum / self.stage_state.loss_count)
                self.stage_state.loss_sum, self.stage_state.loss_count = 0.0, 0

    def take_metrics(self, iteration: int, metrics: dict[str, float]) -> None:
        """Take in what was measured at a save; the same iteration only once."""
        plateau = self.stage.plateau
        # The same weights measured twice would count as no progress.
        if (
            plateau is None
            or plateau.metric not in metrics
            or iteration <= self.stage_state.measured
        ):
            return
        self.stage_state.measured = iteration
        self._take(metrics[plateau.metric])

    def end(self, iterations: int, seconds: float = 0.0) -> str | None:
        """Reason that the stage is over, given the total iteration and the seconds of this
        session."""
        stage, state = self.stage, self.stage_state
        done = iterations - state.begun
        if stage.iterations is not None and done >= stage.iterations:
            these = plural(stage.iterations, "iteration is", "iterations are")
            return f"{stage.iterations:,} {these} done"
        if stage.until_iteration is not None and iterations >= stage.until_iteration:
            return f"iteration {stage.until_iteration:,} is reached"
        if stage.minutes is not None and state.seconds + seconds >= 60 * stage.minutes:
            these = plural(stage.minutes, "minute has", "minutes have")
            return f"{stage.minutes:g} {these} passed"
        if stage.plateau is not None and state.stale >= stage.plateau.patience:
            return str(stage.plateau)
        return None

    def iterations_left(self, iterations: int, *, at_most: int) -> int:
        """Iterations to the end of the stage as far as one is known, else ``at_most``."""
        stage, state = self.stage, self.stage_state
        # Minutes and a plateau cannot be foreseen, so only counts are looked at.
        ends = [at_most + iterations]
        if stage.iterations is not None:
            ends.append(state.begun + stage.iterations)
        if stage.until_iteration is not None:
            ends.append(stage.until_iteration)
        return max(min(ends) - iterations, 0)

    def advance(self, iterations: int) -> None:
        """Enter the stage that this total iteration belongs to; the last one is never left."""
        while self.end(iterations) and not self.is_last:
            # A new place: seconds, best value and window are the stage's own.
            self.stage_state = StageState(stage=self.stage_state.stage + 1, begun=iterations)
            self.is_entered = True

    def to_dict(self, seconds: float = 0.0) -> dict[str, Any]:
        """Plain values, with the seconds of this session added."""
        # Added here and not in the place: every save of the session would add them again.
        stage_state = asdict(self.stage_state) | {"seconds": self.stage_state.seconds + seconds}
        return {"recipe": self.recipe.to_dict(), "place": stage_state}

    def __str__(self) -> str:
        number, count = self.stage_state.stage + 1, len(self.recipe.stages)
        ends = " or ".join(self.stage.ends) or "with the run"
        return f"{number} of {count} of {self.recipe.name}: {self.stage.name}, which ends {ends}"

    def _take(self, value: float) -> None:
        plateau, state = self.stage.plateau, self.stage_state
        assert plateau is not None
        # Against the best and not the last: a slow fall in small steps is no improvement either.
        if state.best is None or plateau.is_better(value, state.best):
            state.best, state.stale = value, 0
        else:
            state.stale += 1


def find_progress(saved: dict[str, Any] | None, recipe: Recipe | None) -> RecipeProgress | None:
    """The progress of a run that begins or resumes; None where it has no stages.

    Args:
        saved: The state of the model, as saved; None for a new one.
        recipe: What the user gave; None: nothing, so a saved recipe goes on. `NONE` leaves it. One
            that was edited goes on in the stage of the same name.

    Raises:
        ValueError: The saved state, or the progress in it, is not valid.
    """
    if recipe == NONE:
        return None
    state = TrainingState.from_dict(saved) if saved else None
    iterations = state.iterations if state else 0
    progress = _saved_progress(state) if state else None
    if recipe is not None:
        names = [stage.name for stage in recipe.stages]
        # A recipe of another name, or without this stage, begins anew; an edited one goes on.
        if (
            progress is None
            or progress.recipe.name != recipe.name
            or progress.stage.name not in names
        ):
            progress = RecipeProgress(recipe, StageState(begun=iterations))
        else:
            progress.stage_state.stage = names.index(progress.stage.name)
            progress.recipe = recipe
    if progress is not None:
        # A stage that was over when the run ended is not entered for one more iteration.
        progress.advance(iterations)
    return progress


def _saved_progress(state: TrainingState) -> RecipeProgress | None:
    """The progress in a saved state; None where it holds none."""
    done = state.iterations
    try:
        # Bounded by the iterations that there were: what was saved may be a stranger's.
        part = state.part(PART, _Part, begun=done, loss_count=done, measured=done)
        if part is None:
            return None
        recipe, stage = Recipe.from_dict(part.recipe), part.place.stage
        last = len(recipe.stages) - 1
        rule = f"a whole number from 0 to {last}"
        require(stage <= last, f"parts.{PART}.place.stage", rule, stage)
    except ValueError as error:
        raise ValueError(f"{error}; go on without the recipe: --recipe none") from error
    return RecipeProgress(recipe, part.place, is_entered=False)


def check_metrics(progress: RecipeProgress | None, config: Config) -> None:
    """Refuse a recipe that watches what is not measured."""
    for stage in progress.recipe.stages if progress else ():
        plateau, measured = stage.plateau, config.evaluate
        if plateau is None or plateau.is_loss:
            continue
        metric = plateau.metric
        if not (measured.held_out or measured.held_out_a or measured.held_out_b):
            raise ValueError(
                f"stage {stage.name} watches {metric}, but nothing is measured; keep faces for "
                "that: --set evaluate.held_out=20"
            )
        for start, file in (("pose", "landmark_model"), ("identity", "embedding_model")):
            if metric.startswith(start) and not getattr(measured, file):
                raise ValueError(
                    f"stage {stage.name} watches {metric}, which needs evaluate.{file}"
                )
