"""The training loop: step, log, save, until an end of one kind or another."""

import time
from typing import Any

from ..checkpoint.model_folder import SaveError
from ..console.outcome import Outcome
from ..console.reporter import Reporter
from ..console.requests import Request, Requests
from ..distribute.council import Council
from ..preview.look import Look
from . import divergence as divergences
from . import recipe_progress as stages
from .checkpointing import Checkpointer
from .divergence import DivergenceDetector, NotFinite, TrainingDiverged
from .end import End
from .metrics import Interval, Losses, MetricsLogger, peak_memory_mib
from .pacing import Pacing
from .steering import Steering
from .training_setup import TrainingSetup


class Trainer:
    """Drives one session of training to its end.

    Where several ranks train, this is the first one, which decides for all; what it does beside
    the steps it does at their meetings.

    Args:
        setup: What is trained, and what trains it.
        reporter: Reports how it goes.
        requests: Requests of the user meanwhile.
        until: Total iteration at which it ends.
    """

    def __init__(self, setup: TrainingSetup, reporter: Reporter, requests: Requests, until: int):
        self.setup, self.requests, self.until = setup, requests, until
        self.stop = requests.stop
        self.council = setup.council
        self.pacing = Pacing(setup.device, setup.council)
        self.policy = setup.config.train.nan_protection
        accumulation = setup.config.optimizer.gradient_accumulation
        self.detector = DivergenceDetector(
            setup.state,
            NotFinite(setup.precision.scales_loss, accumulation),
            # Weights of another model know something: their first loss bounds nothing.
            rate=None if setup.config.model.load_weights else setup.schedule.rate,
        )
        self.divergence: TrainingDiverged | None = None
        """Reason that this training must not go on; then nothing more is looked for."""

        self.metrics = MetricsLogger(setup, reporter, until, self._take)
        self.checkpointer = Checkpointer(
            setup, reporter, requests, self.metrics, self._check_pictures, self._parts
        )
        self.steering = Steering(setup, reporter, requests)
        self.held: TrainingDiverged | SaveError | None = None
        """Reason to end that the other ranks do not know yet."""

        self.began_at = time.monotonic()
        self.seconds = 0.0
        """Seconds to the end of the last iteration: two saves of one iteration are the same."""

    def run(self) -> End:
        """Train to iteration ``until``, the end of the stage, a signal or a failure."""
        try:
            # Within the other one: on the way back from a divergence the disk may refuse, too.
            try:
                end = self._train()
                # The next stage goes on with the optimizer's state, whether it is to stay or not.
                self.checkpointer.save(is_last=True, with_optimizer=end.goes_on)
            except TrainingDiverged as divergence:
                self.divergence = divergence
                end = self._recover(divergence)
            # The save that is being written may fail, and then decides how the session has ended.
            self.setup.saver.wait()
            self.checkpointer.report()
        except SaveError as error:
            reason = f"{self.divergence}; {error}" if self.divergence else str(error)
            end = End(Outcome.HALTED, reason)
        self.steering.tell_unmade(end)
        return end

    def _remaining(self) -> int:
        return max(self.until - self.setup.state.iterations, 0)

    def _train(self) -> End:
        end = self._end()
        if end is None and self.council is not None:
            self.council.go_on(self.setup.state.iterations)
        while end is None:
            self.setup.iterate()
            self.seconds = time.monotonic() - self.began_at
            self.pacing.wait()
            if self.council is None:
                self.metrics.step()
                end = self._finish_step(self._new_requests())
            else:
                end = self._step_with_others(self.council)
        return end

    def _finish_step(self, requests: set[Request]) -> End | None:
        """Save and show what is due after an iteration; how the loop ends, where it does."""
        if "sheet" in requests:
            self.checkpointer.draw_sheet()
        end = self._end()
        if end is None:  # else the last save, which follows, is the one of this iteration
            self.checkpointer.step(requests - {"sheet"})
            end = self._end()  # the save may have measured what ends the stage
        return end

    def _step_with_others(self, council: Council) -> End | None:
        """Finish a step that other ranks have made too; what is to be done is done where all
        meet."""
        iterations = self.setup.state.iterations
        is_due, requests, is_needed = council.is_due(iterations), set[Request](), False
        try:
            self.metrics.step()
            if is_due:
                requests = self._new_requests()
                self.checkpointer.report()
                is_needed = self._end() is not None or self.checkpointer.is_due(requests)
        except (TrainingDiverged, SaveError) as error:
            self._hold(error)
        if not is_due:
            return None
        is_needed |= self.held is not None
        ahead, peak_mib = self._iterations_to_event(), int(peak_memory_mib(self.setup.device))
        if not council.meet(iterations, wants_others=is_needed, ahead=ahead, peak_mib=peak_mib):
            return None
        if self.held is not None:
            # Only now: the others have met this rank, and will hear of the end.
            raise self.held
        end = self._finish_step(requests)
        if end is None:
            council.go_on(iterations)
        return end

    def _hold(self, error: TrainingDiverged | SaveError) -> None:
        """Keep a reason to end until the ranks meet: nobody waits for a rank that has left."""
        self.held = self.held or error
        if isinstance(error, TrainingDiverged):
            self.divergence = self.divergence or error

    def _iterations_to_event(self) -> int:
        """Iterations after which something is due that their number alone decides."""
        iterations = self.setup.state.iterations
        ahead = min(self._remaining(), self.checkpointer.iterations_to_save())
        progress = self.setup.progress
        if progress is not None:
            ahead = min(ahead, progress.iterations_to_window(iterations))
            ahead = progress.iterations_left(iterations, at_most=ahead)
        return ahead

    def _end(self) -> End | None:
        """How the loop ends, where the present iteration is its last one."""
        if not self._remaining():
            return End(Outcome.DONE, self._why_done())
        if self.stop.signal_name:
            return End(Outcome.STOPPED, f"{self.stop.signal_name} received; the state is saved")
        return self.steering.end or self._end_of_stage()

    def _why_done(self) -> str:
        total = self.setup.config.train.until
        if total and self.setup.state.iterations >= total:
            return f"all {total:,} iterations of train.until are done; raise it to train further"
        return "all iterations are done"

    def _end_of_stage(self) -> End | None:
        """How the loop ends, where the present stage of the recipe is over."""
        progress, iterations = self.setup.progress, self.setup.state.iterations
        if progress is None:
            return None
        # On a GPU losses come late; a plateau must not be judged without its last ones.
        if progress.closes_window(iterations):
            self.metrics.log(wait=True)
        why = progress.end(iterations, self.seconds)
        if why is None:
            return None
        if progress.is_last:
            return End(
                Outcome.DONE,
                f"recipe {progress.recipe.name} is done: {why}; --recipe none trains further",
            )
        return End(Outcome.DONE, f"stage {progress.stage.name} is over: {why}", goes_on=True)

    def _recover(self, divergence: TrainingDiverged) -> End:
        """What follows when training must not go on: a way back, or the end."""
        folder, state = self.setup.folder, self.setup.state
        if divergence.remedy:
            self._save_as_it_is()
            return End(Outcome.HALTED, f"{divergence}. {divergence.remedy}")
        if divergence.good_until is None and self.policy == "halt":
            self._save_as_it_is()  # the weights are those before the step that failed
            reason = f"{divergence}; {self._untouched()}. {self._advice()}"
            return End(Outcome.HALTED, f"{reason}, and start again")
        # A save that is still being written may be the one to go back to.
        self.setup.saver.wait()
        back_at = folder.go_back(
            state.iterations if divergence.good_until is None else divergence.good_until
        )
        if back_at is None:
            reason = f"{divergence}; no save from before is left. {self._advice()}"
            return End(Outcome.HALTED, f"{reason}, and begin a new model")
        # The caller opens everything anew, from the save, with a lower rate.
        if self.policy == "rollback":
            return End(Outcome.HALTED, str(divergence), goes_on=True, back_at=back_at)
        reason = f"{divergence}; the model is back at iteration {back_at}. {self._advice()}"
        return End(Outcome.HALTED, f"{reason}, and start again")

    def _advice(self) -> str:
        """What to do about a rate that was too high."""
        rate = self.setup.schedule.rate(self.setup.state.iterations)
        return (
            f"Lower optimizer.learning_rate, which is {rate:g}, or set optimizer.epsilon_exponent "
            "to -5 or -4 with bf16 or fp16"
        )

    def _untouched(self) -> str:
        if self.setup.step.update.is_whole:
            return "no weight was touched by it"
        return "with optimizer.overlap some other weights may have moved"

    def _new_requests(self) -> set[Request]:
        """Requests of the user since the last step."""
        self.requests.press(self.setup.images.keys())
        return self.steering.take(self.requests.take())

    def _save_as_it_is(self) -> None:
        """Save a training that has diverged, so that it can be looked at."""
        self.checkpointer.save(is_last=True, is_good=False)

    def _take(self, named: Losses, interval: Interval) -> None:
        """Take in the losses of some iterations; raise TrainingDiverged."""
        # Losses that were under way when training diverged would only repeat it.
        if self.divergence:
            return
        self._check(named, interval)
        self.setup.state.add_losses(float(named["batch_total"].sum()), interval.count)
        if self.setup.progress:
            self.setup.progress.take_losses(named)

    def _check(self, named: Losses, interval: Interval) -> None:
        """Raise TrainingDiverged where the losses say that training must not go on."""
        if self.policy != "off":
            self.detector.check_losses(named, interval.first, interval.skipped_steps)

    def _check_pictures(self, look: Look) -> None:
        """Raise TrainingDiverged where the pictures say that training must not go on."""
        state = self.setup.state
        if not self.divergence and self.policy != "off":
            self.detector.check_pictures(
                look.predictions[:, 0],
                look.faces.targets,
                done=state.iterations,
                begun=state.iterations - state.session.iterations,
            )

    def _parts(self) -> dict[str, dict[str, Any]]:
        """What the state keeps of the watch on divergence and of the recipe."""
        parts = {divergences.PART: self.detector.to_dict()}
        if self.setup.progress:
            parts[stages.PART] = self.setup.progress.to_dict(self.seconds)
        return parts
