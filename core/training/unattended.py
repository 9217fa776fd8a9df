"""A run from its start to its end: stage after stage of its recipe, and back after a divergence.

A stage and a rollback end a session: everything is closed, and opened again from the last save as
if the user had started it again, so that nothing of what follows depends on what was in memory.
"""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..checkpoint.model_folder import SaveError
from ..config.recipes import Recipe
from ..console.outcome import Outcome
from ..console.reporter import Reporter
from ..console.requests import Requests
from ..console.stop import Interrupted, StopRequest
from ..data.sides import SideFaces
from ..distribute.council import Call, Council, Crew
from ..distribute.failure import RankLost
from ..distribute.group import Group
from ..optim.lr_schedule import rate_factor
from ..preview.window import PreviewWindow
from ..system.printable import plural
from .end import End, Orders, settings_of
from .follower import Follower
from .losing import end_of_lost, leaving_reasons
from .lr_finder import find_rate, is_due
from .pause import pause
from .prepare import open_follower, open_setup
from .resolve import Overrides
from .shared_start import check_alike
from .steering import assignments_of, warn_unmade
from .trainer import Trainer
from .training_setup import TrainingSetup


def train(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None = None,
    requests: Requests | None = None,
    group: Group | None = None,
) -> Outcome:
    """Train or resume a model as the user's settings say.

    Args:
        overrides: What the user set.
        reporter: Reports how it goes.
        recipe: Stages to train in; None: those that the model was saved with, if any.
        requests: Requests of the user meanwhile: entered, by signals and keys; None: none.
        group: Ranks that train together, each with a call of this; None: this process alone.

    Raises:
        ValueError: A setting or a folder cannot be used, and nothing has been trained.
        SaveError: The model cannot be saved, and nothing has been trained.
        RankLost: Another rank has ended, and nothing has been trained.
    """
    requests = requests or Requests()
    # A reader that has stopped must not hold up the save that follows a signal.
    requests.stop.when_noted.append(reporter.hurry)
    with ExitStack() as stack:
        # Of an error, too: a program that trains may go on for days.
        stack.callback(reporter.end)
        if group is None:
            window = stack.enter_context(closing(PreviewWindow()))
            return _lead(overrides, reporter, recipe, requests, None, window)
        crew = Crew(group, requests.stop)
        stack.enter_context(leaving_reasons(group))
        check_alike(group, overrides, recipe)
        if group.ranks.is_first:
            window = stack.enter_context(closing(PreviewWindow()))
            return _lead(overrides, reporter, recipe, requests, crew, window)
        return _follow(overrides, reporter, recipe, crew)


def _lead(
    overrides: Overrides,
    reporter: Reporter,
    recipe: Recipe | None,
    requests: Requests,
    crew: Crew | None,
    window: PreviewWindow,
) -> Outcome:
    """Train, and decide how it goes."""
    until: int | None = None
    end: End | None = None
    iteration, rollbacks, stop = 0, _Rollbacks(), requests.stop
    faces: dict[str, SideFaces] | None = None
    opened = partial(open_setup, reporter=reporter, recipe=recipe, crew=crew, window=window)
    while True:
        with _reporting_end(reporter, iteration, is_later=until is not None), ExitStack() as stack:
            opening = opened(overrides, rate_factor=rollbacks.rate_factor, faces=faces)
            try:
                # There is nothing to save yet, and decoding may take minutes.
                with stop.at_once():
                    setup = stack.enter_context(opening)
            except Interrupted:
                if until is None or crew is not None:
                    raise  # there is nothing to save, or others wait, who must hear of it
                _warn_of_changes(end, requests, reporter)
                break
            if until is None:
                # Once: later sessions of this start share the iterations that the user has set.
                until = setup.config.train.last_iteration(setup.state.iterations)
            try:
                end = _find_rate(setup, reporter, stop) if is_due(setup) else None
                if end is None:
                    end = rollbacks.meet(Trainer(setup, reporter, requests, until).run(), setup)
                goes_on = end.goes_on and not stop.signal_name
                if setup.council is not None:
                    pauses = goes_on and end.pauses
                    orders = Orders(end.outcome, goes_on, rollbacks.rate_factor, pauses)
                    _dismiss(setup.council, orders)
            except RankLost as lost:
                end, goes_on = end_of_lost(lost, setup), False
        assert end is not None  # whatever is raised above leaves this function
        iteration, use_lr_finder = setup.state.iterations, setup.config.optimizer.use_lr_finder
        # Ranks take turns to read them.
        faces = _faces_to_keep(end, setup) if crew is None else None
        # All tensors go, or two models would be on the GPU while the next session opens.
        del setup, opening
        _free_memory()
        if not goes_on:
            break
        with _reporting_end(reporter, iteration, is_later=True):
            if not _meanwhile(end, iteration, overrides, reporter, requests, window, crew):
                break
        overrides = overrides.with_lasting(settings_of(end.changes))
        overrides = overrides.with_session(_session_settings(use_lr_finder))
    assert end is not None
    # A stop has come where another session was to follow.
    if end.goes_on:
        end = End(Outcome.STOPPED, f"{stop.signal_name} received; the state is saved")
    reporter.stop(iteration=iteration, reason=end.reason, exit_code=end.outcome)
    return end.outcome


def _faces_to_keep(end: End, setup: TrainingSetup) -> dict[str, SideFaces] | None:
    """Faces that the next session need not decode anew: no live setting touches them."""
    # A pause frees the GPU, of faces too.
    is_freed = end.pauses and any(side.store.gpu_bytes for side in setup.faces.values())
    return setup.faces if end.changes and not is_freed else None


def _follow(overrides: Overrides, reporter: Reporter, recipe: Recipe | None, crew: Crew) -> Outcome:
    """Train on a rank that another one leads, until that one has it end."""
    rate_factor: float | None = None
    while True:
        with ExitStack() as stack:
            opening = open_follower(overrides, reporter, recipe, rate_factor=rate_factor, crew=crew)
            # As on the first rank: there is nothing to save yet, and faces may take minutes.
            with crew.stop.at_once():
                setup = stack.enter_context(opening)
            assert setup.council is not None
            orders = Follower(setup, setup.council).run()
        use_lr_finder = setup.config.optimizer.use_lr_finder
        # Its graphs as well: while one holds sums of the ranks, their connection cannot be closed.
        del setup
        _free_memory()
        if orders.pauses:
            orders = Orders.from_json(crew.group.await_announcement())
        if not orders.goes_on:
            return orders.outcome
        rate_factor = orders.rate_factor
        overrides = overrides.with_session(_session_settings(use_lr_finder))


def _meanwhile(
    end: End,
    iteration: int,
    overrides: Overrides,
    reporter: Reporter,
    requests: Requests,
    window: PreviewWindow,
    crew: Crew | None,
) -> bool:
    """Report why another session follows, and wait where that is for the end of a pause; whether
    it follows all the same."""
    if end.pauses:
        assert overrides.model_dir is not None  # a session has been trained there
        pause(overrides.model_dir, iteration, reporter, requests, window)
        goes_on = not requests.stop.signal_name
        if crew is not None:
            crew.group.announce(Orders(Outcome.STOPPED, goes_on, rate_factor=None).to_json())
        if not goes_on:
            _warn_of_changes(end, requests, reporter)
            return False
    # After a stop no session follows that would make them, which is told at its end.
    for change in () if requests.stop.signal_name else end.changes:
        reporter.change(
            iteration=iteration,
            name=change.full_name,
            old=change.old,
            new=change.new,
            by=change.by,
        )
    if not end.changes and not end.pauses:
        report = reporter.stage if end.back_at is None else reporter.rollback
        report(end.reason)
    return True


def _warn_of_changes(end: End | None, requests: Requests, reporter: Reporter) -> None:
    """Name the changes of the session before, and of a pause, that no session came to make."""
    made_by_next = end.changes if end is not None else ()
    in_pause = requests.take_changes() + requests.take_left_in_pause()
    warn_unmade(assignments_of(made_by_next) + in_pause, reporter)


def _dismiss(council: Council, orders: Orders) -> None:
    """Have the other ranks end the session."""
    council.call(Call.END)
    council.group.text(orders.to_json())


@contextmanager
def _reporting_end(reporter: Reporter, iteration: int, *, is_later: bool) -> Iterator[None]:
    """Report a mistake or a full disk, in a later session or before it, as the end of training
    too."""
    try:
        yield
    except (ValueError, SaveError) as error:
        if is_later:
            # Of a later session only: the first one's refusal is told by the command itself.
            outcome = Outcome.HALTED if isinstance(error, SaveError) else Outcome.MISTAKE
            reporter.stop(iteration=iteration, reason=str(error), exit_code=outcome)
        raise


def _session_settings(use_lr_finder: bool) -> dict[str, Any]:
    """Settings of later sessions, where the user's own must not begin something anew."""
    return {"model": {"load_weights": ""}, "optimizer": {"use_lr_finder": use_lr_finder}}


def _free_memory() -> None:
    """Give back what a closed session held of a GPU: there may be no room for two."""
    # Tensors in circles, as a model with hooks, are freed by the collector alone.
    gc.collect()
    # Else the allocator keeps it, and no other program could have the GPU in a pause.
    torch.cuda.empty_cache()


def _find_rate(setup: TrainingSetup, reporter: Reporter, stop: StopRequest) -> End | None:
    """Find a new model's learning rate; how it ends, where no training is to follow."""
    find_rate(setup, reporter, stop)
    if stop.signal_name:
        return End(Outcome.STOPPED, f"{stop.signal_name} received before training began")
    if setup.config.optimizer.lr_finder_mode == "graph_and_exit":
        return End(Outcome.DONE, "the graph is drawn; no model was made")
    return None


class _Rollbacks:
    """The times that this start of the program had to go back."""

    def __init__(self) -> None:
        self.count = 0
        self.rate_factor: float | None = None
        """What the learning rate is to be multiplied with in the next session; None: as saved."""

        self.lowest: float | None = None
        """The lowest mean loss at the last of them."""

    def meet(self, end: End, setup: TrainingSetup) -> End:
        """The end of a loop: the same, or where the model has gone back, whether it tries again."""
        if end.back_at is None:
            self.rate_factor = None
            return end
        settings, lowest = setup.config.train, setup.state.lowest_mean_loss
        # By the state's own record, which only a save with a lower mean has changed.
        if self.lowest is not None and lowest is not None and lowest < self.lowest:
            self.count = 0  # training got further than ever in between
        self.count, self.lowest = self.count + 1, lowest
        # On top of what earlier rollbacks, also those of other starts, have made of the rate.
        self.rate_factor = rate_factor(setup.state) * settings.rollback_factor
        if self.count > settings.rollback_limit:
            return End(
                Outcome.HALTED,
                f"{end.reason}; {settings.rollback_limit} "
                f"{plural(settings.rollback_limit, 'rollback')} did not help, and the model is "
                f"back at iteration {end.back_at}. Look at the faces and at the settings of the "
                "loss, or lower optimizer.learning_rate much more, and start again",
            )
        return replace(
            end,
            reason=f"{end.reason}; rollback {self.count} of {settings.rollback_limit}: back to "
            f"iteration {end.back_at}, with {self.rate_factor:g} times the learning rate",
        )
