"""What a run reports: status lines for people, or JSON events for programs.

JSON events are one object a line: {"event": "start" | "found_rates" | "step" | "evaluate" |
"save" | "snapshot" | "preview" | "sheet" | "timelapse" | "stage" | "change" | "pause" | "resume" |
"notice" | "warning" | "crash" | "stop", "time": seconds since 1970, ...}. They are kept in
<model dir>/logs/session_<n>/events.jsonl, of the steps one a second (see `spacing`), where a
session that was lost in a crash and the one that has its number are told apart by their "start".
There is "restore", too: what followed its iteration was undone by `mien model restore`.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, Unpack, cast

from ..system.output import Output
from ..system.printable import printable
from .event_files import SECONDS_BETWEEN_STEPS, ReportFiles
from .notify import Notifier
from .report import Report
from .spacing import Pause
from .start_panel import Rows, plain_lines
from .status_line import StatusLine, StepFields, clock, complete, step_report

EVENTS = "events.jsonl"

_LATEST = 100  # reports that a crash report holds; chosen, unmeasured
_REQUESTED_EXITS = (0, 4)  # exit codes of what is done, and of what the user has stopped


@dataclass(frozen=True)
class Notice:
    """A sentence for the user."""

    text: str
    is_warning: bool = False
    """Whether it should be looked at; else it is for the record."""


class Reporter:
    """Reports to the user, or to the program that started training, how it goes.

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

        # Guarded: a closed terminal or a full disk behind `>` must not end a training.
        self._stream = Output(sys.stdout if stream is None else stream)
        self._as_json = as_json
        self._clock = clock
        self._level = level
        is_terminal = self._stream.isatty() if terminal is None else terminal
        self.has_status_line = is_terminal and not as_json  # and with it answers and prompts
        self._live = StatusLine(self._stream) if self.has_status_line else None
        self.latest: deque[str] = deque(maxlen=_LATEST)
        """The latest events as JSON lines, oldest first."""

        self._files, self._steps = ReportFiles(), Pause(SECONDS_BETWEEN_STEPS)
        self._notifier: Notifier | None = None

    def notify_by(self, notifier: Notifier) -> None:
        """Have the events that matter told to the user elsewhere, too."""
        self._end_notifications()  # those of the session before
        self._notifier = notifier

    def keep_in(
        self, *, events: Path | None, log_file: Path | None, level: str, all_steps: bool = False
    ) -> None:
        """Keep reports in files, those so far in the first ones of all; print from a level on.

        Args:
            events: File for every report as a JSON line; None: for none.
            log_file: File for what is printed; None: for none.
            level: Lowest level of what is printed.
            all_steps: Print every step, also where that is no terminal; else one a minute.

        Raises:
            ValueError: The log file cannot be written.
        """
        self._keep_steps()
        self._level = level
        self._steps = Pause(0.0 if all_steps else SECONDS_BETWEEN_STEPS)
        problems = self._files.open(
            events=events, log_file=log_file, level=level, all_steps=all_steps
        )
        self._warn_all(problems)

    def start(self, fields: dict[str, Any], rows: Rows | None = None) -> None:
        """Report what is about to be trained: on a terminal as a panel.

        Args:
            fields: Numbers, words and lists for programs.
            rows: Model, folders and chosen paths for people; None: the fields, one a row.
        """
        if rows is None:
            rows = [(name.replace("_", " "), str(value)) for name, value in fields.items()]
        self._log("start", plain_lines(rows), fields, panel=rows)

    def step(self, **fields: Unpack[StepFields]) -> None:
        """Report where training stands: as the status line, elsewhere once a minute."""
        everything, now = complete(fields), self._clock()
        report = step_report(everything, now)
        self._hand_out(report)
        # Where lines stay, one a second would bury all others.
        if self._as_json or self._live or self._steps.is_over(now):
            self._show(report)
        if self._files.add_step(everything, now):
            self._keep_steps()

    def save(
        self,
        *,
        iteration: int,
        path: Path,
        seconds: float | None = None,
        mean_loss: float | None = None,
    ) -> None:
        """Report that a save is complete."""
        text = f"Saved iteration {iteration} to {path}"
        if seconds is not None:
            text += f" in {seconds:.1f} s"
        if mean_loss is not None:
            text += f" - average total loss since last save: {mean_loss:.5f}"
        fields = {"iteration": iteration, "path": path, "seconds": seconds, "mean_loss": mean_loss}
        self._log("save", text, fields)

    def evaluate(self, *, iteration: int, metrics: dict[str, float]) -> None:
        """Report how the model does on faces that it is not trained on."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text = f"Measured on held-out faces at iteration {iteration}: {shown}"
        self._log("evaluate", text, {"iteration": iteration} | metrics)

    def preview(self, *, iteration: int, path: Path, is_sheet: bool = False) -> None:
        """Report that a new preview is there, or a sheet that was asked for."""
        event = "sheet" if is_sheet else "preview"
        self._log(event, f"{event.title()}: {path}", {"iteration": iteration, "path": path})

    def timelapse(self, *, iteration: int, path: Path) -> None:
        """Report that the time-lapse has one more image."""
        fields = {"iteration": iteration, "path": path}
        self._log("timelapse", f"Time-lapse: {path}", fields, level="debug")

    def stage(self, reason: str) -> None:
        """Report that a stage of the recipe is over, and why; the next one begins."""
        self._log("stage", f"{reason[0].upper()}{reason[1:]}", {"reason": reason}, is_news=True)

    def change(self, *, iteration: int, name: str, old: Any, new: Any, by: str) -> None:
        """Report that a free setting was changed while training goes on, and from where."""
        fields = {"iteration": iteration, "name": name, "old": old, "new": new, "by": by}
        text = f"Changed {name} from {old} to {new} at iteration {iteration}, by {by}"
        self._log("change", text, fields)

    def snapshot(self, *, iteration: int, path: Path) -> None:
        """Report that a copy of the model was made, next to its folder."""
        fields = {"iteration": iteration, "path": path}
        self._log("snapshot", f"Snapshot of iteration {iteration}: {path}", fields)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A function that takes ``(done, total)`` of a longer job before training starts.

        A bar on a terminal; elsewhere a plain line when the job ends; nothing as JSON.
        """
        if self._live is not None:
            # Here: without a terminal rich is never imported.
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress

            console = Console(file=cast(TextIO, self._stream))
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task(escape(printable(title)), total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
        started, most = self._clock(), 0

        def report(done: int, _total: int) -> None:
            nonlocal most
            most = max(most, done)

        yield report
        text = f"{title}: {most} in {self._clock() - started:.1f} s"
        if not self._as_json and self._level in ("debug", "info"):
            self._print("progress", printable(text))

    def found_rates(self, rates: dict[str, float], *, chosen: str, picture: Path | None) -> None:
        """Report which learning rates were found, by strength, and which of them is used."""
        words = [f"{rate:.3g} ({strength})" for strength, rate in rates.items()]
        text = f"Learning rate found: {', '.join(words)}; {chosen} is chosen"
        if picture is not None:
            text += f". Graph: {picture}"
        self._log("found_rates", text, {"rates": rates, "chosen": chosen, "picture": picture})

    def notice(self, message: str) -> None:
        """Log something that is as it should be, for the record."""
        self._log("notice", f"Note: {message}", {"message": message})

    def warning(self, message: str, **facts: Any) -> None:
        """Warn of something to look at while training goes on; facts: for programs."""
        self._log("warning", f"Warning: {message}", {"message": message} | facts, level="warning")

    def rollback(self, reason: str) -> None:
        """Warn that training has gone back to a save, and why; it goes on at a lower rate."""
        self._log("warning", f"Warning: {reason}", {"message": reason}, "warning", is_news=True)

    def crash(self, *, error: str, path: Path) -> None:
        """Report a failure of mien itself: on stderr, where its traceback follows."""
        self._keep_steps()
        self.close()
        text = f"mien itself has failed; {path} says what is known of it"
        report = Report.of("crash", self._clock(), "error", [text], {"error": error, "path": path})
        self._warn_all(self._files.add(report))
        if self._as_json:
            self._print("crash", report.line)
        # Where the traceback follows, and so that JSON lines on the output stay whole.
        Output(sys.stderr).write(report.text + "\n")
        if self._notifier is not None:
            self._notifier.tell(report)
        self.end()

    def stop(self, *, iteration: int, reason: str, exit_code: int) -> None:
        """Report why training ended; the last event of all."""
        fields = {"iteration": iteration, "reason": reason, "exit_code": exit_code}
        level = "info" if exit_code in _REQUESTED_EXITS else "error"
        text = f"Stopped at iteration {iteration}: {reason}"
        self._log("stop", text, fields, level, is_news=True)
        self.end()

    def end(self) -> None:
        """Leave the terminal, and end notifications and files, however training has ended."""
        self.close()
        self._files.keep_steps()  # these alone: a listener may be what has failed
        self._end_notifications()
        self._files.close()

    def pause(self, *, iteration: int, resumed_by: str | None) -> None:
        """Report that training pauses, until what is named resumes it; None: the pause is over."""
        text = f"Paused at iteration {iteration}: saved, its memory is free; {resumed_by} resumes"
        if resumed_by is None:
            text = f"Resumed at iteration {iteration}"
        self._log("pause" if resumed_by else "resume", text, {"iteration": iteration})
        self.close()

    def say(self, text: str) -> None:
        """Answer a key on the terminal; nothing elsewhere, where no keys are."""
        if self._live is not None:
            self._live.write(printable(text))

    def prompt(self, text: str) -> None:
        """Show what the user types in the place of the status line; an empty text: no more."""
        if self._live is not None:
            self._live.prompt(printable(text))

    def hint(self, text: str) -> None:
        """Have the status line end with a hint where there is room."""
        if self._live is not None:
            self._live.hint = text

    def close(self) -> None:
        """Leave the terminal as it was; the last status line stays."""
        if self._live is not None:
            self._live.close()

    def _end_notifications(self) -> None:
        """Wait for the last notification; what was not sent is told on stderr: stop is the last
        report of all."""
        notifier, self._notifier = self._notifier, None
        for problem in notifier.close() if notifier else []:
            Output(sys.stderr).write(printable(f"Warning: {problem}") + "\n")

    def hurry(self) -> None:
        """Wait no more for whoever does not read what is printed; also for handlers of signals."""
        self._stream.hurry()

    def _log(
        self,
        event: str,
        text: str | list[str],
        fields: dict[str, Any],
        level: str = "info",
        *,
        is_news: bool = False,
        panel: Rows | None = None,
    ) -> None:
        """Show and keep a report, of one line or of some; news are told elsewhere, too."""
        self._keep_steps()
        lines = [text] if isinstance(text, str) else text
        report = Report.of(event, self._clock(), level, lines, fields)
        self._hand_out(report)
        self._show(report, panel)
        if is_news and self._notifier is not None:
            self._notifier.tell(report)
        self._warn_all(self._files.add(report))

    def _hand_out(self, report: Report) -> None:
        self.latest.append(report.line)
        if self._listener is not None:
            self._listener(report.line)

    def _show(self, report: Report, panel: Rows | None = None) -> None:
        if not report.is_worth(self._level):
            return
        if panel and self._live:
            self._live.write_panel(panel)
            return
        # A line that stays says when; that of a terminal is of this moment.
        at = clock(report.time) if report.event == "step" and not self._live else ""
        self._print(report.event, report.line if self._as_json else at + report.text)

    def _keep_steps(self) -> None:
        """Keep what stands for the status lines since the one that was kept last."""
        self._warn_all(self._files.keep_steps())

    def _warn_all(self, problems: list[str]) -> None:
        for problem in problems:
            self.warning(problem)

    def _print(self, event: str, text: str) -> None:
        if self._live is None:
            self._stream.write(text + "\n")
            self._stream.flush()
        elif event == "step":
            self._live.update(text)
        else:
            self._live.write(text)
