"""What a run tells: TensorBoard events for later, status lines or JSON events for now.

Scalars of every iteration, the sides written `a` and `b`:

    batch_total                       loss A + loss B
    batch_face_a[_k]                  weighted sum of the functions (of output k, if several)
    batch_mask_a                      loss of the predicted mask
    batch_weighted_a/<function>       one function with its weight
    batch_unweighted_a/<function>     and without
    learning_rate                     where it is not constant

and of saves, where faces are held out:

    evaluate/<name>                   a figure of `core.train.evaluate`

JSON events are one object a line: {"event": "start" | "found_rates" | "step" | "evaluate" |
"save" | "preview" | "warning" | "stop", "time": seconds since 1970, ...}. TensorBoard is imported
only where a TensorBoardLog is made.
"""

import json
import math
import numbers
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

_SECONDS_BETWEEN_FLUSHES = 30.0


class LogError(RuntimeError):
    """The TensorBoard events cannot be written; the message says why and what to do."""


class Log(Protocol):
    """Where scalars go."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record the values of one iteration; ``step`` is the total iteration."""

    def flush(self) -> None:
        """Hand everything to the disk."""

    def close(self) -> None:
        """Flush, and release the file."""


class NullLog:
    """Keeps nothing (`--no-logs`)."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Drop the values."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoardLog:
    """Events of one session, under <model dir>/logs/session_<n>/train.

    Args:
        model_dir: The model folder.
        session: Number of the session.
        first_step: Total iteration of the session's first step; TensorBoard hides what a session of
            the same number, lost in a crash, wrote from there on.

    Raises:
        LogError: Here and in every method, where the disk refuses.
    """

    def __init__(self, model_dir: Path, session: int, first_step: int = 1) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self.folder = model_dir / "logs" / f"session_{session}" / "train"
        # Not by its SummaryWriter, whose thread prints a traceback where the disk is full.
        self._file: BinaryIO = self._guarded(self._create)
        self._records = RecordWriter(self._file)
        self._flushed_at = time.monotonic()
        began = SessionLog(status=SessionLog.START)
        self._guarded(lambda: self._add(file_version="brain.Event:2"))
        self._guarded(lambda: self._add(step=first_step, session_log=began))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record the values of one iteration; ``step`` is the total iteration."""
        entries = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._guarded(lambda: self._add(step=step, summary=self._summary(value=entries)))
        if time.monotonic() - self._flushed_at >= _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the disk."""
        self._flushed_at = time.monotonic()
        self._guarded(self._file.flush)

    def close(self) -> None:
        """Flush, and release the file."""
        self._guarded(self._file.close)

    def _create(self) -> BinaryIO:
        """A new file with a name that TensorBoard knows and reads after earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = (f"{int(time.time()):010d}", socket.gethostname(), os.getpid(), time.monotonic_ns())
        return (self.folder / ".".join(map(str, ("events.out.tfevents", *parts)))).open("xb")

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise LogError(
                f"cannot write logs to {self.folder}: {error.strerror or error}; free space or "
                "make it writable, or start again with --no-logs"
            ) from error


def open_log(model_dir: Path, session: int, *, enabled: bool, first_step: int = 1) -> Log:
    """Where this session's scalars go."""
    return TensorBoardLog(model_dir, session, first_step) if enabled else NullLog()


class Reporter:
    """Tells the user, or the program that started the run, how it goes.

    Three ways: JSON lines; on a terminal, one status line that stays below the others; elsewhere a
    plain line for each report. Not for use by several threads.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        as_json: bool = False,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._as_json = as_json
        self._clock = clock
        self._is_gone = False
        is_terminal = self._stream.isatty() if terminal is None else terminal
        self._live = _StatusLine(self._stream) if is_terminal and not as_json else None

    def start(self, facts: dict[str, Any]) -> None:
        """Tell what is about to run: model, folders, chosen paths; one line each."""
        width = max((len(name) for name in facts), default=0)
        lines = [f"{name.replace('_', ' '):<{width}}  {value}" for name, value in facts.items()]
        self._tell("start", "\n".join(lines), facts)

    def step(
        self,
        *,
        iteration: int,
        loss_a: float,
        loss_b: float,
        eg_per_s: float,
        data_wait: float,
        memory_mib: float | None = None,
        learning_rate: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Tell where the run stands.

        Args:
            iteration: Total iteration.
            loss_a: Loss of side A.
            loss_b: Loss of side B.
            eg_per_s: Faces trained per second, both sides.
            data_wait: Share of the time that the step waited for data, 0 to 1.
            memory_mib: Peak memory of the device.
            learning_rate: Of that iteration.
            seconds_left: Until the session's last iteration.
        """
        clock = time.strftime("%H:%M:%S", time.localtime(self._clock()))
        text = (
            f"[{clock}] [#{iteration:05d}] Loss A: {loss_a:.5f}, Loss B: {loss_b:.5f}"
            f" | EG/s {eg_per_s:.1f} | wait {100 * data_wait:.1f} %"
        )
        if memory_mib is not None:
            text += f" | {memory_mib:.0f} MiB"
        if seconds_left is not None:
            text += f" | left {duration(seconds_left)}"
        fields = {
            "iteration": iteration,
            "loss_a": loss_a,
            "loss_b": loss_b,
            "eg_per_s": eg_per_s,
            "data_wait": data_wait,
            "memory_mib": memory_mib,
            "learning_rate": learning_rate,
            "seconds_left": seconds_left,
        }
        self._tell("step", text, fields)

    def save(
        self,
        *,
        iteration: int,
        path: Path,
        seconds: float | None = None,
        mean_loss: float | None = None,
    ) -> None:
        """Tell that a save is complete."""
        text = f"Saved iteration {iteration} to {path}"
        if seconds is not None:
            text += f" in {seconds:.1f} s"
        if mean_loss is not None:
            text += f" - average total loss since last save: {mean_loss:.5f}"
        fields = {"iteration": iteration, "path": path, "seconds": seconds, "mean_loss": mean_loss}
        self._tell("save", text, fields)

    def evaluate(self, *, iteration: int, figures: dict[str, float]) -> None:
        """Tell how the model does on faces that it is not trained on."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        text = f"Measured on held-out faces at iteration {iteration}: {shown}"
        self._tell("evaluate", text, {"iteration": iteration} | figures)

    def preview(self, *, iteration: int, path: Path) -> None:
        """Tell that a new preview picture is there."""
        self._tell("preview", f"Preview: {path}", {"iteration": iteration, "path": path})

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A function to be told ``(done, total)`` of a longer job before the run starts.

        A bar on a terminal; elsewhere a plain line when the job ends; nothing as JSON.
        """
        if self._live is not None:
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(file=self._stream), transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
        started, most = self._clock(), 0

        def tell(done: int, _total: int) -> None:
            nonlocal most
            most = max(most, done)

        yield tell
        if not self._as_json:
            self._tell("progress", f"{title}: {most} in {self._clock() - started:.1f} s", {})

    def found_rates(self, rates: dict[str, float], *, chosen: str, picture: Path | None) -> None:
        """Tell which learning rates were found, by strength, and which of them is used."""
        words = [f"{rate:.3g} ({strength})" for strength, rate in rates.items()]
        text = f"Learning rate found: {', '.join(words)}; {chosen} is chosen"
        if picture is not None:
            text += f". Graph: {picture}"
        self._tell("found_rates", text, {"rates": rates, "chosen": chosen, "picture": picture})

    def warning(self, message: str) -> None:
        """Tell of something the user should look at while the run goes on."""
        self._tell("warning", f"Warning: {message}", {"message": message})

    def stop(self, *, iteration: int, reason: str, exit_code: int) -> None:
        """Tell why the run ended; the last event of all."""
        fields = {"iteration": iteration, "reason": reason, "exit_code": exit_code}
        self._tell("stop", f"Stopped at iteration {iteration}: {reason}", fields)
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; the last status line stays."""
        if self._live is not None:
            self._live.close()

    def _tell(self, event: str, text: str, fields: dict[str, Any]) -> None:
        if self._is_gone:
            return
        try:
            if self._as_json:
                line = {"event": event, "time": self._clock()} | _plain(fields)
                self._stream.write(json.dumps(line, allow_nan=False) + "\n")
                self._stream.flush()
            elif self._live is None:
                self._stream.write(text + "\n")
                self._stream.flush()
            elif event == "step":
                self._live.update(text)
            else:
                self._live.write(text)
        except BrokenPipeError:  # `| head`: weeks of training outweigh a reader that has left
            self._is_gone = True
            self._live = None
            _discard_output(self._stream)


class _StatusLine:
    """A status at the bottom of a terminal (folded where it is narrow), others scroll by above."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def update(self, text: str) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._text(text), refresh=True)

    def write(self, text: str) -> None:
        self._console.print(self._text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:12:33; hours may pass 99."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def _plain(value: Any) -> Any:
    """The same in what JSON has: a number that is not finite becomes null, a path its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _discard_output(stream: TextIO) -> None:
    """Point a broken output at /dev/null, so that the flush at exit does not fail."""
    if stream is sys.stdout:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
