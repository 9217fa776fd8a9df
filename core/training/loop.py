"""The training loop: step, log, measure, save, preview; until an end of one kind or another."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.model_folder import SaveError
from ..config import SAVE_ITERATIONS, SAVE_SECONDS
from ..console.outcome import Outcome
from ..console.reporter import LogError, NullLog, Reporter
from ..console.requests import Requests, Wish
from ..data.sides import SIDES
from ..evaluate import evaluate as evaluations
from ..evaluate.evaluate import evaluate, measured_at
from ..preview.previewer import Look
from . import divergence as divergences
from . import recipe_progress as stages
from .divergence import DivergenceDetector, NotFinite, TrainingDiverged
from .loss_buffer import CAPACITY, to_host
from .prepare import Run

_SECONDS_BETWEEN_LINES = 1.0
_STEPS_AHEAD = 32  # enough to keep a GPU busy while the host writes a log


@dataclass(frozen=True)
class End:
    """How a loop ended."""

    outcome: Outcome
    """How the training has ended, if nothing follows."""

    reason: str
    goes_on: bool = False
    """Another loop follows: of the next stage, or after a rollback."""

    back_at: int | None = None
    """The model has gone back to the save of this iteration, to try again."""


@dataclass(frozen=True)
class _Asked:
    """The losses of some iterations, on their way to the host."""

    rows: Callable[[], np.ndarray]
    skipped: Callable[[], list[np.ndarray]]
    first: int
    count: int
    seconds: float
    """That they took."""

    waited_s: float
    """Of these, waiting for data."""

    ended_at: float
    """Seconds since 1970."""

    def wall_time(self, i: int) -> float:
        """When iteration ``first + i`` ended, taking all as equally long; seconds since 1970."""
        return self.ended_at - self.seconds * (1 - (i + 1) / self.count)


class Loop:
    """Drives one run to its end.

    On a GPU the host runs a few steps ahead of the device; losses are told one status line later,
    so that neither waits for the other.
    """

    def __init__(self, run: Run, reporter: Reporter, requests: Requests, until: int):
        self.r, self.reporter, self.requests, self.until = run, reporter, requests, until
        self.stop = requests.stop
        self.look: Look | None = None
        """What the last preview shows."""

        self.unlogged = 0
        """Iterations whose losses have not been asked for."""

        self.asked: deque[_Asked] = deque()
        self.on_gpu = run.device.type == "cuda"
        self.ahead: deque[torch.cuda.Event] = deque()
        """The ends of the steps that the device has not been seen to reach."""

        self.policy = run.config.train.nan_protection
        accumulation = run.config.optimizer.gradient_accumulation
        self.detector = DivergenceDetector(
            run.state,
            NotFinite(run.precision.scales_loss, accumulation),
            rate=None if run.config.model.load_weights else run.schedule.rate,
        )
        self.divergence: TrainingDiverged | None = None
        """Why this training must not go on; then nothing more is looked for."""

        self.mean_losses: deque[float | None] = deque()
        """Of the saves that have not been told of, oldest first."""

        now = time.monotonic()
        self.began_at, self.asked_at, self.saved_at = now, now, now
        self.seconds = 0.0
        """To the end of the last iteration, so that two saves of one iteration are the same."""

        self.waited_s = run.feed.waited_s
        self.saving_s, self.drawing_s = 0.0, 0.0
        """Of the session, for which saves held training up, and what is drawn and measured then."""

    def run(self) -> End:
        """Train to iteration ``until``, the end of the stage, a signal or a failure."""
        try:
            try:
                end = self._train()
                # The next stage goes on with the optimizer's state, whether it is to stay or not.
                with_optimizer = end.goes_on or self._snapshot_is_due()
                self._save(is_last=True, with_optimizer=with_optimizer)
            except TrainingDiverged as divergence:
                self.divergence = divergence
                end = self._recover(divergence)
            self.r.saver.wait()
            self._report_saves()
        except SaveError as error:
            reason = f"{self.divergence}; {error}" if self.divergence else str(error)
            end = End(Outcome.HALTED, reason)
        return end

    def _remaining(self) -> int:
        return max(self.until - self.r.state.iterations, 0)

    def _train(self) -> End:
        state = self.r.state
        while self._remaining() and not self.stop.signal_name:
            end = self._end_of_stage()
            if end:
                return end
            self.r.set_rate()
            self.r.engine(state.faces_seen)
            state.advance()
            self.seconds = time.monotonic() - self.began_at
            self.unlogged += 1
            self._wait_for_device()
            if self._log_is_due():
                self._log()
            wishes, is_snapshot = self._wishes(), self._snapshot_is_due()
            if is_snapshot or "save" in wishes or self._save_is_due():
                self._save(with_optimizer=is_snapshot, with_snapshot=is_snapshot)
            elif wishes:
                self._show(wishes)
            self._report_saves()
        if self._remaining():
            return End(Outcome.STOPPED, f"{self.stop.signal_name} received; the state is saved")
        return End(Outcome.DONE, "all iterations are done")

    def _end_of_stage(self) -> End | None:
        """How the loop ends, where the present stage of the recipe is over."""
        plan, iterations = self.r.plan, self.r.state.iterations
        if plan is None:
            return None
        if plan.closes_window(iterations):
            self._log(wait=True)
        why = plan.end(iterations, self.seconds)
        if why is None:
            return None
        if plan.is_last:
            return End(Outcome.DONE, f"recipe {plan.recipe.name} is done: {why}")
        return End(Outcome.DONE, f"stage {plan.stage.name} is over: {why}", goes_on=True)

    def _recover(self, divergence: TrainingDiverged) -> End:
        """What follows when training must not go on: a way back, or the end."""
        folder, state = self.r.folder, self.r.state
        if divergence.remedy:
            self._save(is_last=True)
            return End(Outcome.HALTED, f"{divergence}. {divergence.remedy}")
        if divergence.good_until is None and self.policy == "halt":
            self._save(is_last=True)  # the weights are those before the step that failed
            reason = f"{divergence}; {self._untouched()}. {self._advice()}"
            return End(Outcome.HALTED, f"{reason}, and start again")
        self.r.saver.wait()
        back_at = folder.go_back(
            state.iterations if divergence.good_until is None else divergence.good_until
        )
        if back_at is None:
            reason = f"{divergence}; no save from before is left. {self._advice()}"
            return End(Outcome.HALTED, f"{reason}, and begin a new model")
        if self.policy == "rollback":
            return End(Outcome.HALTED, str(divergence), goes_on=True, back_at=back_at)
        reason = f"{divergence}; the model is back at iteration {back_at}. {self._advice()}"
        return End(Outcome.HALTED, f"{reason}, and start again")

    def _advice(self) -> str:
        """What to do about a rate that was too high."""
        rate = self.r.schedule.rate(self.r.state.iterations)
        return (
            f"Lower optimizer.learning_rate, which is {rate:g}, or set optimizer.epsilon_exponent "
            "to -5 or -4 with bf16 or fp16"
        )

    def _untouched(self) -> str:
        if self.r.step.update.is_whole:
            return "no weight was touched by it"
        return "with optimizer.overlap some other weights may have moved"

    def _wait_for_device(self) -> None:
        """Stay only some steps ahead, so that a signal is obeyed soon and times are true."""
        if not self.on_gpu:
            return
        end = torch.cuda.Event(blocking=True)
        end.record()
        self.ahead.append(end)
        if len(self.ahead) > _STEPS_AHEAD:
            self.ahead.popleft().synchronize()

    def _log_is_due(self) -> bool:
        """At the first iteration, then at every interval or, without one, once a second."""
        interval = self.r.config.train.log_interval
        if self.r.state.session.iterations == 1 or self.unlogged == (interval or CAPACITY):
            return True
        return not interval and time.monotonic() - self.asked_at >= _SECONDS_BETWEEN_LINES

    def _save_is_due(self) -> bool:
        """At the first iteration, which finds a full disk early, then at every interval."""
        done, settings = self.r.state.session.iterations, self.r.config.save
        since = time.monotonic() - self.saved_at
        if done == 1:
            return True
        if settings.save_minutes:
            return since >= 60 * settings.save_minutes
        if settings.save_interval:
            return done % settings.save_interval == 0
        return done % SAVE_ITERATIONS == 0 and since >= SAVE_SECONDS

    def _is_only_first(self) -> bool:
        """Whether a save is due at the first iteration alone: its loss is no mean to compare."""
        return self.r.state.session.iterations == 1 and self.r.config.save.save_interval != 1

    def _snapshot_is_due(self) -> bool:
        interval = self.r.config.save.snapshot_interval
        return interval > 0 and self.r.state.iterations % interval == 0

    def _wishes(self) -> set[Wish]:
        """What the user has asked for since the last step."""
        self.requests.press(self.r.pictures.keys())
        return self.requests.take()

    def _log(self, wait: bool = False) -> None:
        """Ask for the losses since the last time; tell those that are there, or wait for all."""
        if self.unlogged:
            now, ended_at, waited_s = time.monotonic(), time.time(), self.r.feed.waited_s
            self.asked.append(
                _Asked(
                    rows=self.r.step.ring.fetch(self.unlogged),
                    skipped=to_host(self.r.step.update.skipped),
                    first=self.r.state.iterations - self.unlogged + 1,
                    count=self.unlogged,
                    seconds=max(now - self.asked_at, 1e-9),
                    waited_s=waited_s - self.waited_s,
                    ended_at=ended_at,
                )
            )
            self.asked_at, self.waited_s, self.unlogged = now, waited_s, 0
        while len(self.asked) > (1 if self.on_gpu and not wait else 0):
            self._tell(self.asked.popleft())

    def _tell(self, asked: "_Asked") -> None:
        """Status line, events and finite check of some iterations."""
        named, schedule = self.r.step.loss.named(asked.rows()), self.r.schedule
        for i in range(asked.count):
            scalars = {k: float(v[i]) for k, v in named.items() if k.startswith("batch_")}
            if not schedule.is_constant:
                scalars["learning_rate"] = schedule.rate(asked.first + i - 1)
            self._record(scalars, asked.first + i, asked.wall_time(i))
        self._status(named, asked)
        if not self.divergence:
            self._check(named, asked)
            self.r.state.add_losses(float(named["batch_total"].sum()), asked.count)
            if self.r.plan:
                self.r.plan.take_losses(named)

    def _check(self, named: dict[str, np.ndarray], asked: "_Asked") -> None:
        """Raise TrainingDiverged where training must not go on."""
        if self.policy == "off":
            return
        self.detector.check_losses(named, asked.first, int(asked.skipped()[0]))

    def _record(
        self, scalars: dict[str, float], iteration: int, wall_time: float | None = None
    ) -> None:
        """Write an event."""
        self._write_log(lambda: self.r.log.scalars(scalars, iteration, wall_time))

    def _write_log(self, write: Callable[[], None]) -> None:
        """Do something with the log; what cannot be written is told once."""
        try:
            write()
        except LogError as error:
            self.reporter.warning(f"{error}; no more events are written in this session")
            self.r.log = NullLog()

    def _status(self, named: dict[str, np.ndarray], asked: "_Asked") -> None:
        faces = len(SIDES) * self.r.config.train.batch_size * asked.count
        memory = torch.cuda.max_memory_allocated(self.r.device) / 2**20 if self.on_gpu else None
        last = asked.first + asked.count - 1
        behind, elapsed_s = self.r.state.iterations - last, time.monotonic() - self.began_at
        left = self._remaining()
        if self.r.plan:
            left = self.r.plan.iterations_left(self.r.state.iterations, at_most=left)
        self.reporter.step(
            iteration=last,
            loss_a=float(named["loss_a"].mean()),
            loss_b=float(named["loss_b"].mean()),
            eg_per_s=faces / asked.seconds,
            data_wait=min(asked.waited_s / asked.seconds, 1.0),
            memory_mib=memory,
            learning_rate=self.r.schedule.rate(last - 1),
            session_iterations=self.r.state.session.iterations - behind,
            elapsed_s=elapsed_s,
            saving=self.saving_s / elapsed_s,
            drawing=self.drawing_s / elapsed_s,
            seconds_left=(left + behind) * asked.seconds / asked.count,
        )

    def _save(
        self, *, is_last: bool = False, with_optimizer: bool = False, with_snapshot: bool = False
    ) -> None:
        """Measure the model, queue a save of the present state, write the pictures beside it."""
        self._log(wait=True)
        state, began_at = self.r.state, time.monotonic()
        if state.session.iterations == 0:
            return  # nothing has changed since the model was made or loaded
        look = self.look = self.r.pictures.look(state.iterations)
        if not self.divergence and self.policy != "off":
            self.detector.check_pictures(
                look.predictions[:, 0],
                look.faces.targets,
                done=state.iterations,
                begun=state.iterations - state.session.iterations,
            )
        state.parts[divergences.PART] = self.detector.to_dict()
        mean_loss, is_best = None, False
        if not self.divergence and (is_last or not self._is_only_first()):
            mean_loss, is_best = state.close_interval()
        self._evaluate()
        if self.r.plan:
            state.parts[stages.PART] = self.r.plan.to_dict(self.seconds)
        drawn_at = time.monotonic()
        update, kept = self.r.step.update, self.r.config.save.save_optimizer
        with_optimizer |= kept == "always" or (is_last and kept == "exit")
        waited = self.r.saver.save(
            update.weights(),
            update.tensors() if with_optimizer else None,
            state.to_dict(),
            is_best=is_best,
            with_snapshot=with_snapshot,
        )
        self.mean_losses.append(mean_loss)
        if waited > 1:
            self.reporter.warning(
                f"training waited {waited:.1f} s for the disk; save less often (--save-interval)"
            )
        self._write_log(self.r.log.flush)
        queued_at = time.monotonic()
        self._write_preview(look)
        added = self.r.pictures.add_to_timelapse(state.iterations)
        if added is not None:
            self.reporter.timelapse(iteration=state.iterations, path=added)
        self.saved_at = time.monotonic()
        self.saving_s += queued_at - drawn_at
        self.drawing_s += self.saved_at - began_at - (queued_at - drawn_at)

    def _show(self, wishes: set[Wish]) -> None:
        """Renew the preview, or draw the last one as it is now wanted."""
        self._log(wait=True)  # the device has then made all steps
        if self.look is None or "preview" in wishes:
            self.look = self.r.pictures.look(self.r.state.iterations)
        self._write_preview(self.look)

    def _write_preview(self, look: Look) -> None:
        mask_is_toggled = self.requests.mask_is_toggled
        path = self.r.pictures.write_preview(look, mask_is_toggled=mask_is_toggled)
        self.reporter.preview(iteration=look.iteration, path=path)

    def _evaluate(self) -> None:
        """Measure the present weights, once, on held-out faces; the figures go into the state.

        Not after a signal: who sends one may not wait long, and the save matters more.
        """
        run, iteration = self.r, self.r.state.iterations
        is_measured = measured_at(run.state) == iteration
        if run.evaluation is None or self.stop.signal_name or is_measured:
            return
        figures = evaluate(run.model, run.precision, run.evaluation)
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        run.state.parts[evaluations.PART] = {"iteration": iteration} | finite
        if run.plan:
            run.plan.take_figures(iteration, finite)
        self._record({f"evaluate/{name}": value for name, value in figures.items()}, iteration)
        self.reporter.evaluate(iteration=iteration, figures=figures)

    def _report_saves(self) -> None:
        """Tell of the saves that have ended, and of what the model folder has to say."""
        while self.r.folder.warnings:
            self.reporter.warning(self.r.folder.warnings.pop(0))
        for saved in self.r.saver.finished():
            self.reporter.save(
                iteration=saved.iterations,
                path=saved.path,
                seconds=saved.seconds,
                mean_loss=self.mean_losses.popleft(),
            )
            if saved.snapshot is not None:  # else a warning says why, or none was due
                self.reporter.snapshot(iteration=saved.iterations, path=saved.snapshot)
