"""The training loop: step, log, preview, save."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.sides import SIDES
from ..run.checkpoint import SaveError
from ..run.log import LogError, NullLog, Reporter
from ..run.preview import preview_image, save_png
from ..run.stop import StopRequest
from .lr_finder import find_rate, is_due
from .prepare import Run, open_run
from .ring import CAPACITY, to_host

DONE, HALTED, STOPPED = 0, 3, 4

_SECONDS_BETWEEN_LINES = 1.0
_STEPS_AHEAD = 32  # enough to keep a GPU busy while the host writes a log
_SAVE_ITERATIONS, _SAVE_SECONDS = 250, 60.0


class Halted(Exception):
    """Training stopped itself; the message says why and what to do."""


def train(given: dict[str, Any], reporter: Reporter) -> int:
    """Train or resume a model as the user's settings say; the exit code of `mien train`."""
    with open_run(given, reporter) as run, StopRequest() as stop:
        ended = _find_rate(run, reporter, stop) if is_due(run) else None
        if ended is None:
            return Loop(run, reporter, stop).run()
        code, reason = ended
        reporter.stop(iteration=0, reason=reason, exit_code=code)
        return code


def _find_rate(run: Run, reporter: Reporter, stop: StopRequest) -> tuple[int, str] | None:
    """Find a new model's rate; the exit code and the reason, where no training is to follow."""
    find_rate(run, reporter, stop)
    if stop.signal_name:
        return STOPPED, f"{stop.signal_name} received before training began"
    if run.config.optimizer.lr_finder_mode == "graph_and_exit":
        return DONE, "the graph is drawn; no model was made"
    return None


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


class Loop:
    """Drives one run to its end.

    On a GPU the host runs a few steps ahead of the device; losses are told one status line later,
    so that neither waits for the other.
    """

    def __init__(self, run: Run, reporter: Reporter, stop: StopRequest):
        self.r, self.reporter, self.stop = run, reporter, stop
        self.unlogged = 0
        """Iterations whose losses have not been asked for."""

        self.asked: deque[_Asked] = deque()
        self.on_gpu = run.device.type == "cuda"
        self.ahead: deque[torch.cuda.Event] = deque()
        """The ends of the steps that the device has not been seen to reach."""

        self.is_halted = False
        self.skipped = 0
        self.mean_loss: float | None = None
        now = time.monotonic()
        self.asked_at, self.saved_at, self.waited_s = now, now, run.feed.waited_s

    def run(self) -> int:
        """Train to the last iteration, a signal or a failure; the exit code."""
        code, reason = DONE, "all iterations are done"
        try:
            try:
                self._train()
                if self.stop.signal_name and self._remaining():
                    code, reason = STOPPED, f"{self.stop.signal_name} received; the state is saved"
                self._save()
            except Halted as halt:
                code, reason = HALTED, str(halt)
                self.is_halted = True
                self._save()
            self.r.saver.wait()
            self._report_saves()
        except SaveError as error:
            code, reason = HALTED, str(error)
        self.reporter.stop(iteration=self.r.state.iterations, reason=reason, exit_code=code)
        return code

    def _remaining(self) -> int:
        return self.r.config.train.iterations - self.r.state.session.iterations

    def _train(self) -> None:
        state = self.r.state
        while self._remaining() and not self.stop.signal_name:
            self.r.set_rate()
            self.r.engine(state.faces_seen)
            state.advance()
            self.unlogged += 1
            self._wait_for_device()
            if self._log_is_due():
                self._log()
            if self._save_is_due():
                self._save()
            self._report_saves()

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
        return done % _SAVE_ITERATIONS == 0 and since >= _SAVE_SECONDS

    def _log(self, wait: bool = False) -> None:
        """Ask for the losses since the last time; tell those that are there, or wait for all."""
        if self.unlogged:
            now, waited_s = time.monotonic(), self.r.feed.waited_s
            self.asked.append(
                _Asked(
                    rows=self.r.step.ring.fetch(self.unlogged),
                    skipped=to_host(self.r.step.update.skipped),
                    first=self.r.state.iterations - self.unlogged + 1,
                    count=self.unlogged,
                    seconds=max(now - self.asked_at, 1e-9),
                    waited_s=waited_s - self.waited_s,
                )
            )
            self.asked_at, self.waited_s, self.unlogged = now, waited_s, 0
        while len(self.asked) > (1 if self.on_gpu and not wait else 0):
            self._tell(self.asked.popleft())

    def _tell(self, asked: "_Asked") -> None:
        """Status line, events and finite check of some iterations."""
        named, schedule = self.r.step.loss.named(asked.rows()), self.r.schedule
        try:
            for i in range(asked.count):
                scalars = {k: float(v[i]) for k, v in named.items() if k.startswith("batch_")}
                if not schedule.is_constant:
                    scalars["learning_rate"] = schedule.rate(asked.first + i - 1)
                self.r.log.scalars(scalars, asked.first + i)
        except LogError as error:
            self.reporter.warning(f"{error}; no more events are written in this session")
            self.r.log = NullLog()
        self._status(named, asked)
        self._check_finite(named, asked)
        if not self.is_halted:
            self.r.state.add_losses(float(named["batch_total"].sum()), asked.count)

    def _status(self, named: dict[str, np.ndarray], asked: "_Asked") -> None:
        faces = len(SIDES) * self.r.config.train.batch_size * asked.count
        memory = torch.cuda.max_memory_allocated(self.r.device) / 2**20 if self.on_gpu else None
        last = asked.first + asked.count - 1
        behind = self.r.state.iterations - last
        self.reporter.step(
            iteration=last,
            loss_a=float(named["loss_a"].mean()),
            loss_b=float(named["loss_b"].mean()),
            eg_per_s=faces / asked.seconds,
            data_wait=min(asked.waited_s / asked.seconds, 1.0),
            memory_mib=memory,
            learning_rate=self.r.schedule.rate(last - 1),
            seconds_left=(self._remaining() + behind) * asked.seconds / asked.count,
        )

    def _check_finite(self, named: dict[str, np.ndarray], asked: "_Asked") -> None:
        """Halt where steps were not finite; with fp16 single ones only lower the loss scale."""
        skipped = int(asked.skipped()[0])
        is_new, self.skipped = skipped > self.skipped, skipped
        if self.is_halted:
            return  # the cause is known; what was still on its way is only told
        bad = {name: ~np.isfinite(values) for name, values in named.items()}
        bad_rows = np.flatnonzero(np.any([*bad.values()], axis=0))
        if not len(bad_rows) and (self.r.precision.scales_loss or not is_new):
            return
        where, cause = "the gradient", ""
        if len(bad_rows):
            where = f"iteration {asked.first + int(bad_rows[0])}"
            cause = f" ({', '.join(name for name in bad if bad[name][bad_rows[0]])})"
        touched = "no weight was touched by it"
        if not self.r.step.update.is_whole:
            touched = "with optimizer.overlap some other weights may have moved"
        raise Halted(
            f"not a number at {where}{cause}; {touched}. Lower "
            "optimizer.learning_rate, or set optimizer.epsilon_exponent to -5 or -4 with bf16 or "
            "fp16, and start again"
        )

    def _save(self) -> None:
        """Queue a save of the present state and write the preview beside it."""
        self._log(wait=True)
        state = self.r.state
        if state.session.iterations == 0:
            return  # nothing has changed since the model was made or loaded
        self.mean_loss, _ = state.close_interval()
        update = self.r.step.update
        waited = self.r.saver.save(update.weights(), update.tensors(), state.to_dict())
        if waited > 1:
            self.reporter.warning(
                f"training waited {waited:.1f} s for the disk; save less often (--save-interval)"
            )
        self.r.log.flush()
        path = self.r.folder.path / "preview.png"
        save_png(path, self._preview())
        self.reporter.preview(iteration=state.iterations, path=path)
        self.saved_at = time.monotonic()

    def _report_saves(self) -> None:
        """Tell of the saves that have ended, and of what the model folder has to say."""
        while self.r.folder.warnings:
            self.reporter.warning(self.r.folder.warnings.pop(0))
        for saved in self.r.saver.finished():
            self.reporter.save(
                iteration=saved.iterations,
                path=saved.path,
                seconds=saved.seconds,
                mean_loss=self.mean_loss,
            )

    @torch.no_grad()
    def _preview(self) -> np.ndarray:
        """The preview picture of the present weights."""
        run, faces = self.r, self.r.preview_faces
        run.model.eval()
        predictions = []
        for side, inputs in zip(SIDES, faces.inputs, strict=True):
            pixels = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(run.device)
            other = SIDES[1 - SIDES.index(side)]
            codes = run.model.encode(pixels.to(run.precision.compute) / 255)
            decoded = [run.model.decode(run.model.mix(codes, to), to) for to in (side, other)]
            has_mask = run.model.build.learn_mask
            predictions.append([_to_pixels(outputs, has_mask) for outputs in decoded])
        run.model.train()
        settings, config = run.config.preview, run.config
        return preview_image(
            np.array(predictions),
            faces.targets,
            coverage=config.data.coverage / 100,
            mask_opacity=settings.mask_opacity,
            mask_color=settings.mask_color,
            has_mask=config.loss.penalized_mask_loss or config.loss.learn_mask,
        )


def _to_pixels(outputs: tuple[torch.Tensor, ...], learn_mask: bool) -> np.ndarray:
    """(n, S, S, 3 or 4) uint8 of the largest face and, where learned, its mask."""
    picture = torch.cat(outputs[-2:], dim=1) if learn_mask else outputs[-1]
    pixels = (picture.float() * 255).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
