"""Saves, and the images and measurements with them: when they are due, and making them."""

import math
import time
from collections import deque
from collections.abc import Callable

from ..config import SAVE_ITERATIONS, SAVE_SECONDS
from ..console.reporter import Reporter
from ..console.requests import Request, Requests
from ..distribute.council import Call
from ..evaluate import evaluate as evaluations
from ..evaluate.evaluate import evaluate, measured_at
from ..optim.averaged import averaged, note_weight_of_average
from ..preview.look import Look
from .gathering import gather
from .metrics import MetricsLogger
from .outputs import report_warnings
from .training_setup import TrainingSetup


class Checkpointer:
    """Saves a training, draws its preview and measures it on held-out faces.

    Args:
        setup: What is saved.
        reporter: Reports saves and images.
        requests: How the user wants to see the preview.
        metrics: Counts how long saving and drawing held training up.
        check: Called with the pictures of every save before it is made; raises TrainingDiverged.
        parts: The parts of the state that others keep, at every save.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        reporter: Reporter,
        requests: Requests,
        metrics: MetricsLogger,
        check: Callable[[Look], None],
        parts: Callable[[], dict[str, dict]],
    ):
        self.setup, self.reporter, self.requests, self.metrics = setup, reporter, requests, metrics
        self.check, self.parts = check, parts
        metrics.to_save = self.seconds_to_save
        self.look: Look | None = None
        """The faces and pictures that the last preview shows."""

        self.mean_losses: deque[float | None] = deque()
        """Mean losses of the saves that have not been reported, oldest first."""

        self.saved_at = time.monotonic()
        self.saved: tuple[int, bool] | None = None
        """Total iteration of the last save, and whether the optimizer's state is in it."""

    def step(self, requests: set[Request]) -> None:
        """Save, or renew the preview, where that is due after an iteration or requested."""
        if self._saves(requests):
            self.save()
        elif requests:
            self._show(requests)
        self.report()

    def draw_sheet(self) -> None:
        """Draw a sheet of the present model to judge it by."""
        self.metrics.log(wait=True)  # the device has then made all steps
        self._gather()
        look = self._look()
        path = self.setup.images.write_sheet(look)
        if path is not None:
            self.reporter.preview(iteration=look.iteration, path=path, is_sheet=True)

    def is_due(self, requests: set[Request]) -> bool:
        """Whether `step` has more to do than to report."""
        return bool(requests) or self._saves(requests)

    def iterations_to_save(self) -> int:
        """Iterations until a save may be due by their number alone."""
        settings, state = self.setup.config.save, self.setup.state
        every = settings.save_interval or SAVE_ITERATIONS
        left = every - state.session.iterations % every
        if settings.snapshot_interval:
            interval = settings.snapshot_interval
            left = min(left, interval - state.iterations % interval)
        return left

    def seconds_to_save(self, iteration_s: float) -> float:
        """Seconds until the next save, where an iteration takes so many."""
        settings, since = self.setup.config.save, time.monotonic() - self.saved_at
        if settings.save_minutes:
            return max(60 * settings.save_minutes - since, 0.0)
        by_count = self.iterations_to_save() * iteration_s
        if settings.save_interval:
            return by_count
        # Both must be over: the first multiple of the iterations after the last second.
        every_s = SAVE_ITERATIONS * iteration_s
        late_by = SAVE_SECONDS - since - by_count
        return by_count + max(math.ceil(late_by / every_s), 0) * every_s

    def _saves(self, requests: set[Request]) -> bool:
        """Whether a save is due after an iteration, or requested."""
        return self._snapshot_is_due() or "save" in requests or self._is_due()

    def _snapshot_is_due(self) -> bool:
        """Whether the present iteration is one of which a snapshot is kept."""
        interval = self.setup.config.save.snapshot_interval
        return interval > 0 and self.setup.state.iterations % interval == 0

    def _is_due(self) -> bool:
        """Whether to save: at the first iteration, which finds a full disk early, then as set."""
        done, settings = self.setup.state.session.iterations, self.setup.config.save
        since = time.monotonic() - self.saved_at
        if done == 1:
            return True
        if settings.save_minutes:
            return since >= 60 * settings.save_minutes
        # Counted in the session: a resumed one does not save at once because of where it stands.
        if settings.save_interval:
            return done % settings.save_interval == 0
        return done % SAVE_ITERATIONS == 0 and since >= SAVE_SECONDS

    def _is_only_first(self) -> bool:
        """Whether a save is due at the first iteration alone: its loss is no mean to compare."""
        is_first = self.setup.state.session.iterations == 1
        return is_first and self.setup.config.save.save_interval != 1

    def save(
        self,
        *,
        is_last: bool = False,
        is_good: bool = True,
        with_optimizer: bool = False,
    ) -> None:
        """Measure the model, queue a save of the present state, write the images of it.

        The last save of a session is left out where the present iteration has been saved, with all
        that is to be in it.

        Args:
            is_last: Whether nothing follows in this session.
            is_good: The losses so far are those of a training that has not diverged.
            with_optimizer: Save its state even where the settings leave it out.
        """
        # Before all else: losses that are still under way may say that training has diverged.
        self.metrics.log(wait=True)
        state, began_at = self.setup.state, time.monotonic()
        if state.session.iterations == 0:
            return  # nothing has changed since the model was made or loaded
        with_snapshot = is_good and self._snapshot_is_due()
        with_optimizer |= with_snapshot or self._keeps_optimizer(is_last)
        if is_last and is_good and self._has_saved(with_optimizer):
            return
        # Before the pictures, for which batch norms use estimates that each rank has of its own.
        self._gather()
        # Before anything is written: images that show a divergence must not become the newest save.
        look = self.look = self._look()
        self.check(look)
        mean_loss, is_best = None, False
        if is_good and (is_last or not self._is_only_first()):
            mean_loss, is_best = state.close_interval()
        self._evaluate()
        # Last of all, so that the save knows of the measurement just made.
        state.parts |= self.parts()
        # Into the state: a save without the optimizer's tensors has no other place for it.
        note_weight_of_average(state, self.setup.step.update)
        saving_at = time.monotonic()
        self._queue(is_best, with_optimizer, with_snapshot)
        # The save is reported when it is on the disk, by then the mean is of other iterations.
        self.mean_losses.append(mean_loss)
        # A save and the events up to it reach the disk together, or a resume would leave a gap.
        self.metrics.flush()
        queued_at = time.monotonic()
        # Meanwhile the save is on its way to the disk.
        self._write_preview(look)
        self.metrics.picture("preview", self.setup.images.shown_jpeg, look.iteration)
        # Once more: the save between needed the weights themselves in their places.
        with averaged(self.setup.step.update) as weights:
            self.setup.images.keep(look)
            added = self.setup.images.add_to_timelapse(state.iterations, weights)
        if added is not None:
            self.reporter.timelapse(iteration=state.iterations, path=added)
        # Counted from the end: where saves and pictures take long, training still gets its time.
        self.saved_at = time.monotonic()
        self.metrics.saving_s += queued_at - saving_at
        self.metrics.drawing_s += self.saved_at - began_at - (queued_at - saving_at)

    def _gather(self) -> None:
        """Have the ranks bring together what images and saves are made of."""
        if self.setup.council is not None:
            self.setup.council.call(Call.GATHER)
            gather(self.setup, self.setup.council.group)

    def _keeps_optimizer(self, is_last: bool) -> bool:
        """Whether the settings want the optimizer's state in a save."""
        kept = self.setup.config.save.save_optimizer
        return kept == "always" or (is_last and kept == "exit")

    def _has_saved(self, with_optimizer: bool) -> bool:
        """Whether the present iteration has been saved, with the optimizer's state if wanted."""
        if self.saved is None or self.saved[0] != self.setup.state.iterations:
            return False
        return self.saved[1] or not with_optimizer

    def _queue(self, is_best: bool, with_optimizer: bool, with_snapshot: bool) -> None:
        update = self.setup.step.update
        waited = self.setup.saver.save(
            update.weights(),
            update.tensors() if with_optimizer else None,
            self.setup.state.to_dict(),
            update.averages or None,
            is_best=is_best,
            with_snapshot=with_snapshot,
        )
        self.saved = self.setup.state.iterations, with_optimizer
        # A second is what a user would notice. Chosen, unmeasured.
        if waited > 1:
            self.reporter.warning(
                f"training waited {waited:.1f} s for the disk; save less often (--save-interval)"
            )

    def _show(self, requests: set[Request]) -> None:
        """Renew the preview, or draw the last one as it is now wanted."""
        self.metrics.log(wait=True)  # the device has then made all steps
        if self.look is None or "preview" in requests:
            self._gather()
            self.look = self._look()
        self._write_preview(self.look)

    def _look(self) -> Look:
        """What the model makes of the preview's faces as of now, by the average of its weights
        where one is kept."""
        with averaged(self.setup.step.update) as weights:
            return self.setup.images.look(self.setup.state.iterations, weights)

    def _write_preview(self, look: Look) -> None:
        mask_is_toggled = self.requests.mask_is_toggled
        path = self.setup.images.write_preview(look, mask_is_toggled=mask_is_toggled)
        self.reporter.preview(iteration=look.iteration, path=path)

    def _evaluate(self) -> None:
        """Measure the present weights, once, on held-out faces; the metrics go into the state.

        Not after a signal: who sends one may not wait long, and the save matters more.
        """
        setup, iteration = self.setup, self.setup.state.iterations
        is_measured = measured_at(setup.state) == iteration
        # Measured already, where a save of this very iteration came before.
        if setup.evaluation is None or self.requests.stop.signal_name or is_measured:
            return
        with averaged(setup.step.update):
            metrics = evaluate(setup.model, setup.precision, setup.evaluation)
        # JSON holds no NaN, and a plateau could not compare one; the report still shows it.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        setup.state.parts[evaluations.PART] = {"iteration": iteration} | finite
        if setup.progress:
            setup.progress.take_metrics(iteration, finite)
        scalars = {f"evaluate/{name}": value for name, value in metrics.items()}
        self.metrics.record(scalars, iteration)
        self.reporter.evaluate(iteration=iteration, metrics=metrics)

    def report(self) -> None:
        """Report the saves that have ended, and the warnings of the model folder."""
        report_warnings(self.setup.folder, self.reporter)
        for saved in self.setup.saver.finished():
            self.reporter.save(
                iteration=saved.iterations,
                path=saved.path,
                seconds=saved.seconds,
                # In their order: a save begins when the one before it has ended.
                mean_loss=self.mean_losses.popleft(),
            )
            if saved.snapshot is not None:  # else a warning says why, or none was due
                self.reporter.snapshot(iteration=saved.iterations, path=saved.snapshot)
