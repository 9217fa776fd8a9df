"""The training loop: step, log, preview, save."""

import time
from typing import Any

import numpy as np
import torch

from ..data.sides import SIDES
from ..run.checkpoint import SaveError
from ..run.log import LogError, NullLog, Reporter
from ..run.preview import preview_image, save_png
from ..run.stop import StopRequest
from .prepare import Run, open_run

DONE, HALTED, STOPPED = 0, 3, 4


class Halted(Exception):
    """Training stopped itself; the message says why and what to do."""


def train(given: dict[str, Any], reporter: Reporter) -> int:
    """Train or resume a model as the user's settings say; the exit code of `mien train`."""
    with open_run(given, reporter) as run, StopRequest() as stop:
        return Loop(run, reporter, stop).run()


class Loop:
    """Drives one run to its end."""

    def __init__(self, run: Run, reporter: Reporter, stop: StopRequest):
        self.r, self.reporter, self.stop = run, reporter, stop
        self.pending: list[torch.Tensor] = []
        """Logged values of the iterations since the last status line, on the device."""

        self.skipped = 0
        self.mean_loss: float | None = None
        now = time.monotonic()
        self.logged_at, self.saved_at, self.waited_s = now, now, 0.0

    def run(self) -> int:
        """Train to the last iteration, a signal or a failure; the exit code."""
        code, reason = DONE, "all iterations are done"
        try:
            try:
                self._train()
                if self.stop.signal_name and self._remaining():
                    code, reason = STOPPED, f"{self.stop.signal_name} received; the state is saved"
            except Halted as halt:
                code, reason = HALTED, str(halt)
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
        state, config = self.r.state, self.r.config
        while self._remaining() and not self.stop.signal_name:
            batch = self.r.feed.next(state.faces_seen)
            self.pending.append(self.r.step(batch))
            state.advance()
            if len(self.pending) == config.train.log_interval or state.session.iterations == 1:
                self._log()
            if self._save_is_due():
                self._save()
            self._report_saves()

    def _save_is_due(self) -> bool:
        """At the first iteration, which finds a full disk early, then at every interval."""
        done, settings = self.r.state.session.iterations, self.r.config.save
        if done == 1:
            return True
        if settings.save_minutes:
            return time.monotonic() - self.saved_at >= 60 * settings.save_minutes
        return done % settings.save_interval == 0

    def _log(self) -> None:
        """Bring the losses since the last time to the host: status line, events, finite check."""
        if not self.pending:
            return
        values = torch.stack(self.pending).cpu().numpy()
        count, last = len(values), self.r.state.iterations
        self.pending = []
        try:
            for iteration, row in zip(range(last - count + 1, last + 1), values, strict=True):
                named = dict(zip(self.r.step.names, row.tolist(), strict=True))
                scalars = {k: v for k, v in named.items() if k.startswith("batch_")}
                self.r.log.scalars(scalars, iteration)
        except LogError as error:
            self.reporter.warning(f"{error}; no more events are written in this session")
            self.r.log = NullLog()
        self._status(values.mean(axis=0), count)
        self._check_finite(values, last - count + 1)
        self.r.state.add_losses(float(values[:, :2].sum()), count)

    def _status(self, means: np.ndarray, count: int) -> None:
        now = time.monotonic()
        elapsed = max(now - self.logged_at, 1e-9)
        waited = self.r.feed.waited_s - self.waited_s
        faces = len(SIDES) * self.r.config.train.batch_size * count
        on_gpu = self.r.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.r.device) / 2**20 if on_gpu else None
        self.reporter.step(
            iteration=self.r.state.iterations,
            loss_a=float(means[0]),
            loss_b=float(means[1]),
            eg_per_s=faces / elapsed,
            data_wait=min(waited / elapsed, 1.0),
            memory_mib=memory,
            seconds_left=self._remaining() * elapsed / count,
        )
        self.logged_at, self.waited_s = now, self.r.feed.waited_s

    def _check_finite(self, values: np.ndarray, first: int) -> None:
        """Halt where steps were not finite; with fp16 single ones only lower the loss scale."""
        skipped = int(self.r.step.update.skipped)
        is_new, self.skipped = skipped > self.skipped, skipped
        bad_rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if not len(bad_rows) and (self.r.precision.scales_loss or not is_new):
            return
        where = f"iteration {first + int(bad_rows[0])}" if len(bad_rows) else "the gradient"
        names = (
            [
                name
                for name, value in zip(self.r.step.names, values[bad_rows[0]], strict=True)
                if not np.isfinite(value)
            ]
            if len(bad_rows)
            else []
        )
        cause = f" ({', '.join(names)})" if names else ""
        raise Halted(
            f"not a number at {where}{cause}; no weight was touched by it. Lower "
            "optimizer.learning_rate, or set optimizer.epsilon_exponent to -5 or -4 with bf16 or "
            "fp16, and start again"
        )

    def _save(self) -> None:
        """Queue a save of the present state and write the preview beside it."""
        self._log()
        state = self.r.state
        if state.session.iterations == 0:
            return  # nothing has changed since the model was made or loaded
        self.mean_loss, _ = state.close_interval()
        model = {name: tensor.detach() for name, tensor in self.r.model.state_dict().items()}
        waited = self.r.saver.save(model, self.r.step.update.tensors(), state.to_dict())
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
            with run.precision.forward():
                codes = run.model.encode(pixels.to(run.precision.compute) / 255)
                decoded = [run.model.decode(codes, each) for each in (side, other)]
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
