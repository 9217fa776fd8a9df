"""Going on from a save: its tensors put back, its state made that of the session that begins."""

from collections.abc import Iterator
from contextlib import contextmanager

from ... import models
from ..checkpoint.format import Generation
from ..checkpoint.state import TrainingState
from ..config import Config, model_settings
from ..evaluate.evaluate import measured_at
from ..optim.averaged import load_weight_of_average
from ..optim.lr_schedule import ROLLBACK, SCHEDULE, SCHEDULE_SETTINGS
from ..optim.optimizer import Update, begins_anew, check_weights
from . import divergence
from . import recipe_progress as stages
from .recipe_progress import RecipeProgress


def check_fit(config: Config, saved: Generation) -> None:
    """Refuse, by ValueError, a save whose weights are not those of the model.

    Nothing is allocated for it: the settings of a save may be those of a model far too large.
    """
    with _naming(saved):
        own = models.meta_model(config.model.trainer, **model_settings(config))
        check_weights(saved.model, own.state_dict())


def restore(config: Config, saved: Generation | None, update: Update) -> TrainingState:
    """A new state, or the saved one with weights and optimizer put back.

    Args:
        config: Settings of this session.
        saved: Save to go on from; None: a new model.
        update: Gets the weights and what the optimizer knows.

    Raises:
        ValueError: The save does not fit, or its state is not valid.
    """
    if saved is None:
        return TrainingState(trainer=config.model.trainer)
    with _naming(saved):
        averages, is_anew = saved.ema or {}, begins_anew(update, saved.optimizer or {})
        # Without its base schedule-free goes on from the average, which is better than the weights.
        is_without_base = update.rule.is_schedule_free and is_anew
        update.load_weights(saved.model | averages if is_without_base else saved.model)
        if saved.optimizer is not None:
            update.load(saved.optimizer)
        update.load_averages(averages)
    state = TrainingState.from_dict(saved.state)
    # The optimizer may have begun to count after the average: by its count that would weigh less.
    if saved.optimizer is None or not is_anew:
        load_weight_of_average(state, update)
    measured_at(state)  # what is not valid is refused now, and not at the first save
    return state


def settle_state(
    state: TrainingState,
    before: Config,
    progress: RecipeProgress | None,
    rate_factor: float | None,
    config: Config,
) -> None:
    """Have the state be that of this session: of its stage and losses, and after a rollback.

    Args:
        state: State as it was saved, or new.
        before: Settings of the session before.
        progress: The recipe and the progress in it; None: there is none.
        rate_factor: Factor of the learning rate after a rollback; None: as saved.
        config: Settings of this session.
    """
    if progress is None:
        state.parts.pop(stages.PART, None)  # the recipe was left
    elif progress.is_entered and SCHEDULE_SETTINGS & progress.stage.set.get("optimizer", {}).keys():
        state.parts.pop(SCHEDULE, None)  # the same one again, from its beginning
    if before.loss != config.loss:
        state.lowest_mean_loss = None  # of other losses: no later one compares with it
    # First losses and means of other losses do not compare either.
    divergence.settle(state, before, config)
    if rate_factor is not None:
        state.parts[ROLLBACK] = {"rate_factor": rate_factor}
    elif before.optimizer.learning_rate != config.optimizer.learning_rate:
        state.parts.pop(ROLLBACK, None)  # the user has chosen another rate


@contextmanager
def _naming(saved: Generation) -> Iterator[None]:
    """Name the save, and the way to another, where its tensors are not those of the model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{saved.path} does not fit this model: {error}; `mien model restore` goes back to "
            "another save"
        ) from error
