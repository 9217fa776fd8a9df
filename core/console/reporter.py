"""What a run tells: TensorBoard events for later, status lines or JSON events for now.

Scalars of the iterations, the sides written `a` and `b`; means over several iterations once there
are more than 20,000:

    batch_total                       loss A + loss B
    batch_face_a[_k]                  weighted sum of the functions (of output k, if several)
    batch_mask_a                      loss of the predicted mask
    batch_weighted_a/<function>       one function with its weight
    batch_unweighted_a/<function>     and without
    learning_rate                     where it is not constant

and of saves, where faces are held out:

    evaluate/<name>                   a figure of `core.evaluate.evaluate`

JSON events are one object a line: {"event": "start" | "found_rates" | "step" | "evaluate" |
"save" | "snapshot" | "preview" | "timelapse" | "stage" | "notice" | "warning" | "crash" | "stop",
"time": seconds since 1970, ...}. They are kept in <model dir>/logs/session_<n>/events.jsonl, of the
steps one a second (see `spacing`), where a session that was lost in a crash and the one that has
its number are told apart by their "start". There is "restore", too: what followed its iteration was
undone by `mien model restore`. TensorBoard is imported only where a TensorBoardLog is made.
"""

import math
import numbers
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, cast

from ..system.output import Output
from ..system.printable import printable, to_json
from .event_files import Report, ReportFile
from .spacing import Means, Spacing

EVENTS = "events.jsonl"

_SECONDS_BETWEEN_FLUSHES = 30.0
_SECONDS_BETWEEN_STEPS = 1.0  # in files
_FINENESS = 20_000
"""An event stands for a 20,000th of the iterations so far at most, which is less than a graph can
show; a hundred million iterations take 200,000 events."""

ITERATION = "batch_total"
"""The scalar that every event of iterations has."""

_LATEST = 100
_AS_WANTED = (0, 4)  # exit codes of what is done, and of what the user has stopped


@dataclass(frozen=True)
class Notice:
    """A sentence for the user."""

    text: str
    is_warning: bool = False
    """Whether it should be looked at; else it is told for the record."""


class LogError(RuntimeError):
    """The TensorBoard events cannot be written; the message says why and what to do."""


class Log(Protocol):
    """Destination of scalars."""

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration; those with `ITERATION` may wait for the next ones.

        Args:
            values: Values by name, as above.
            step: Total iteration.
            wall_time: Time at which it ended, in seconds since 1970; now, where it is not given.
        """

    def flush(self) -> None:
        """Hand everything to the disk."""

    def close(self) -> None:
        """Flush, and release the file."""


class NullLog:
    """Keeps nothing (`--no-logs`)."""

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
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
        ending: What the file's name ends in, to be known by.

    Raises:
        LogError: Here and in every method, where the disk refuses.
    """

    def __init__(
        self, model_dir: Path, session: int, first_step: int = 1, *, ending: str = ""
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self.folder = model_dir / "logs" / f"session_{session}" / "train"
        # Not by its SummaryWriter, whose thread prints a traceback where the disk is full.
        self._file: BinaryIO = self._guarded(lambda: self._create(ending))
        self._records = RecordWriter(self._file)
        self._flushed_at = time.monotonic()
        self._means = Means()
        began = SessionLog(status=SessionLog.START)
        self._guarded(lambda: self._add(file_version="brain.Event:2"))
        self._guarded(lambda: self._add(step=first_step, session_log=began))

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration, as `Log.scalars`."""
        now = time.time() if wall_time is None else wall_time
        if ITERATION not in values:
            self._write_means()
            self._write(values, step, now)
        else:
            self._means.add(values, step, now)
            if self._means.count >= step // _FINENESS:
                self._write_means()
        if time.monotonic() - self._flushed_at >= _SECONDS_BETWEEN_FLUSHES:
            self._flush()

    def flush(self) -> None:
        """Hand everything to the disk."""
        self._write_means()
        self._flush()

    def close(self) -> None:
        """Flush, and release the file."""
        try:
            self._write_means()
        finally:
            self._guarded(self._file.close)

    def _write_means(self) -> None:
        means, self._means = self._means, Means()
        if means.count:
            self._write(means.values(), means.step, means.wall_time)

    def _write(self, values: dict[str, float], step: int, wall_time: float) -> None:
        entries = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = self._summary(value=entries)
        self._guarded(lambda: self._add(wall_time, step=step, summary=summary))

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        self._guarded(self._file.flush)

    def _create(self, ending: str) -> BinaryIO:
        """A new file with a name that TensorBoard knows and reads after earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = (f"{int(time.time()):010d}", socket.gethostname(), os.getpid(), time.monotonic_ns())
        name = ".".join(map(str, ("events.out.tfevents", *parts))) + ending
        return (self.folder / name).open("xb")

    def _add(self, wall_time: float | None = None, **fields: Any) -> None:
        now = time.time() if wall_time is None else wall_time
        self._records.write(self._event(wall_time=now, **fields).SerializeToString())

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise LogError(
                f"cannot write logs to {self.folder}: {error.strerror or error}; free space or "
                "make it writable, or start again with --no-logs"
            ) from error


def open_log(model_dir: Path, session: int, *, enabled: bool, first_step: int = 1) -> Log:
    """Destination of this session's scalars."""
    return TensorBoardLog(model_dir, session, first_step) if enabled else NullLog()


class Reporter:
    """Tells the user, or the program that started the run, how it goes.

    Three ways: JSON lines; on a terminal, one status line that stays below the others; elsewhere a
    plain line for each report. Whatever is shown, and whether anybody is left to see it, `keep_in`
    has it kept in files as well. Not for use by several threads.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        as_json: bool = False,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.time,
        level: str = "info",
        listener: Callable[[str], None] | None = None,
    ) -> None:
        self._listener = listener
        """Function that is given every report, as a line of JSON."""

        self._stream = Output(sys.stdout if stream is None else stream)
        self._as_json = as_json
        self._clock = clock
        self._level = level
        is_terminal = self._stream.isatty() if terminal is None else terminal
        self._live = _StatusLine(self._stream) if is_terminal and not as_json else None
        self.latest: deque[str] = deque(maxlen=_LATEST)
        """The latest events as JSON lines, oldest first."""

        self._early: list[Report] | None = []
        """What was told before it was known where to keep it."""

        self._files: list[ReportFile] = []
        self._spacing = Spacing(_SECONDS_BETWEEN_STEPS)

    def keep_in(self, *, events: Path | None, log_file: Path | None, level: str) -> None:
        """Keep reports in files, those told so far in the first ones of all; print from a level on.

        Args:
            events: File for every report as a JSON line; None: for none.
            log_file: File for what is printed; None: for none.
            level: Lowest level of what is printed.

        Raises:
            ValueError: The log file cannot be written.
        """
        self._keep_steps()
        self._level, self._files, former = level, [], self._files
        for file in former:
            file.close()
        if log_file is not None:
            remedy = "free space, or choose another --log-file"
            try:
                kept = ReportFile(log_file, level=level, as_json=False, remedy=remedy)
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(
                    f"log.file {log_file} cannot be written: {reason}; choose another --log-file"
                ) from error
            self._files.append(kept)
        problem = None
        if events is not None:
            remedy = "free space, or start again with --no-logs"
            try:
                kept = ReportFile(events, level="debug", as_json=True, remedy=remedy)
                self._files.append(kept)
            except OSError as error:
                problem = f"cannot write to {events}: {error.strerror or error}; {remedy}"
        early, self._early = self._early, None
        for report in early or ():
            self._keep(report)
        if problem:
            self.warning(problem)

    def start(self, fields: dict[str, Any], lines: dict[str, str] | None = None) -> None:
        """Tell what is about to run.

        Args:
            fields: Numbers, words and lists for programs.
            lines: Model, folders and chosen paths for people; None: the fields, one a line.
        """
        if lines is None:
            lines = {name.replace("_", " "): str(value) for name, value in fields.items()}
        width = max((len(name) for name in lines), default=0)
        told = [f"{name:<{width}}  {line}" for name, line in lines.items()]
        self._tell("start", told, fields)

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
        session_iterations: int | None = None,
        elapsed_s: float | None = None,
        saving: float | None = None,
        drawing: float | None = None,
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
            learning_rate: Learning rate of that iteration.
            session_iterations: Number of these that are of this session.
            elapsed_s: Seconds since the session's first iteration.
            saving: Share of that time for which saves held training up, 0 to 1.
            drawing: The same of the pictures and figures that are made with them.
            seconds_left: Seconds until the last iteration of the session or of its stage.
        """
        fields = {
            "iteration": iteration,
            "loss_a": loss_a,
            "loss_b": loss_b,
            "eg_per_s": eg_per_s,
            "data_wait": data_wait,
            "memory_mib": memory_mib,
            "learning_rate": learning_rate,
            "session_iterations": session_iterations,
            "elapsed_s": elapsed_s,
            "saving": saving,
            "drawing": drawing,
            "seconds_left": seconds_left,
        }
        now = self._clock()
        self._show(self._step_report(fields, now))
        if self._spacing.add(fields, now):
            self._keep_steps()

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

    def timelapse(self, *, iteration: int, path: Path) -> None:
        """Tell that the time-lapse has one more picture."""
        fields = {"iteration": iteration, "path": path}
        self._tell("timelapse", f"Time-lapse: {path}", fields, level="debug")

    def stage(self, reason: str) -> None:
        """Tell that a stage of the recipe is over, and why; the next one begins."""
        self._tell("stage", f"{reason[0].upper()}{reason[1:]}", {"reason": reason})

    def snapshot(self, *, iteration: int, path: Path) -> None:
        """Tell that a copy of the model was put beside its folder."""
        text = f"Snapshot of iteration {iteration}: {path}"
        self._tell("snapshot", text, {"iteration": iteration, "path": path})

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A function to be told ``(done, total)`` of a longer job before the run starts.

        A bar on a terminal; elsewhere a plain line when the job ends; nothing as JSON.
        """
        if self._live is not None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress

            console = Console(file=cast(TextIO, self._stream))
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task(escape(printable(title)), total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
        started, most = self._clock(), 0

        def tell(done: int, _total: int) -> None:
            nonlocal most
            most = max(most, done)

        yield tell
        text = f"{title}: {most} in {self._clock() - started:.1f} s"
        if not self._as_json and self._level in ("debug", "info"):
            self._print("progress", printable(text))

    def found_rates(self, rates: dict[str, float], *, chosen: str, picture: Path | None) -> None:
        """Tell which learning rates were found, by strength, and which of them is used."""
        words = [f"{rate:.3g} ({strength})" for strength, rate in rates.items()]
        text = f"Learning rate found: {', '.join(words)}; {chosen} is chosen"
        if picture is not None:
            text += f". Graph: {picture}"
        self._tell("found_rates", text, {"rates": rates, "chosen": chosen, "picture": picture})

    def notice(self, message: str) -> None:
        """Tell of something that is as it should be, for the record."""
        self._tell("notice", f"Note: {message}", {"message": message})

    def warning(self, message: str, **facts: Any) -> None:
        """Tell of something the user should look at while the run goes on; facts: for programs."""
        fields = {"message": message} | facts
        self._tell("warning", f"Warning: {message}", fields, level="warning")

    def crash(self, *, error: str, path: Path) -> None:
        """Tell of a failure of mien itself: on stderr, where its traceback follows."""
        self._keep_steps()
        self.close()
        text = f"mien itself has failed; {path} says what is known of it"
        report = self._report("crash", [text], {"error": error, "path": path}, "error")
        self._keep(report)
        if self._as_json:
            self._print("crash", report.line)
        Output(sys.stderr).write(report.text + "\n")

    def stop(self, *, iteration: int, reason: str, exit_code: int) -> None:
        """Tell why the run ended; the last event of all."""
        fields = {"iteration": iteration, "reason": reason, "exit_code": exit_code}
        level = "info" if exit_code in _AS_WANTED else "error"
        self._tell("stop", f"Stopped at iteration {iteration}: {reason}", fields, level)
        self.close()
        for file in self._files:
            file.close()

    def close(self) -> None:
        """Leave the terminal as it was; the last status line stays."""
        if self._live is not None:
            self._live.close()

    def hurry(self) -> None:
        """Wait no more for whoever does not read what is printed; also for handlers of signals."""
        self._stream.hurry()

    def _tell(
        self, event: str, text: str | list[str], fields: dict[str, Any], level: str = "info"
    ) -> None:
        """Show and keep a report, of one line or of some."""
        self._keep_steps()
        lines = [text] if isinstance(text, str) else text
        report = self._report(event, lines, fields, level)
        self._show(report)
        self._keep(report)

    def _report(
        self,
        event: str,
        lines: list[str],
        fields: dict[str, Any],
        level: str,
        now: float | None = None,
    ) -> Report:
        now = self._clock() if now is None else now
        line = to_json({"event": event, "time": now} | _plain(fields))
        return Report(event, now, level, "\n".join(map(printable, lines)), line)

    def _step_report(self, fields: dict[str, Any], now: float) -> Report:
        return self._report("step", [_status(fields, now)], fields, "info", now)

    def _show(self, report: Report) -> None:
        self.latest.append(report.line)
        if self._listener is not None:
            self._listener(report.line)
        if report.is_worth(self._level):
            self._print(report.event, report.line if self._as_json else report.text)

    def _keep_steps(self) -> None:
        """Keep what stands for the status lines since the one that was kept last."""
        held = self._spacing.take()
        if held:
            self._keep(self._step_report(*held))

    def _keep(self, report: Report) -> None:
        if self._early is not None:
            self._early.append(report)
        problems = [file.add(report) for file in self._files]
        for problem in filter(None, problems):
            self.warning(problem)

    def _print(self, event: str, text: str) -> None:
        if self._live is None:
            self._stream.write(text + "\n")
            self._stream.flush()
        elif event == "step":
            self._live.update(text)
        else:
            self._live.write(text)


def _status(fields: dict[str, Any], now: float) -> str:
    """The status line of what `Reporter.step` was told."""
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    text = (
        f"[{clock}] [#{fields['iteration']:05d}] Loss A: {fields['loss_a']:.5f}, "
        f"Loss B: {fields['loss_b']:.5f} | EG/s {fields['eg_per_s']:.1f}"
        f" | wait {100 * fields['data_wait']:.1f} %"
    )
    if fields["memory_mib"] is not None:
        text += f" | {fields['memory_mib']:.0f} MiB"
    if fields["session_iterations"] is not None and fields["elapsed_s"] is not None:
        text += f" | {fields['session_iterations']} in {duration(fields['elapsed_s'])}"
    if fields["seconds_left"] is not None:
        text += f" | left {duration(fields['seconds_left'])}"
    return text


class _StatusLine:
    """A status at the bottom of a terminal (folded where it is narrow), others scroll by above."""

    def __init__(self, stream: Output) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._console = Console(file=cast(TextIO, stream), force_terminal=True, highlight=False)
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
