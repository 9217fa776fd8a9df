"""The files that keep what a run reports: all of it as JSON lines, or what is printed as text.

A file that has grown to 16 MiB is put aside as `<name>.1`, the one before as `<name>.2`, and so on;
four of them are kept. So a run takes no more than 80 MiB for each, however long it lasts.
"""

import os
import stat
import time
from pathlib import Path
from typing import Any

from ..system.durable_files import open_plain
from .report import Report
from .spacing import Pause, Spacing
from .status_line import step_report

# Bounds of what reports take of a disk; chosen, unmeasured.
_MOST_BYTES = 16 << 20
_OLDER_FILES = 4
_SECONDS_BETWEEN_EVENTS = 1.0
SECONDS_BETWEEN_STEPS = 60.0
"""Seconds between two lines of steps that people read later. Chosen."""


class ReportFile:
    """A file to which reports are added, each at once.

    Args:
        path: The file; missing folders are made.
        level: Lowest level of what is kept.
        as_json: Keep the JSON lines, in a plain file that no link leads to; else the texts with
            date and level before each line, in whatever the user names: a link's target, a device.
        remedy: What the user can do where the disk refuses.
        steps_s: Seconds between two reports of steps.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(
        self, path: Path, *, level: str, as_json: bool, remedy: str, steps_s: float = 0.0
    ) -> None:
        self.path, self.level, self._as_json, self._remedy = path, level, as_json, remedy
        self._steps = Pause(steps_s)
        # The folder of a session is made by whoever writes there first.
        path.parent.mkdir(parents=True, exist_ok=True)
        # The user may have named a link, which a rotation must not replace by a file.
        self._path = path if as_json else Path(os.path.realpath(path))
        self._handle: int | None = self._open()

    def add(self, report: Report) -> str | None:
        """Keep a report; what to warn of where the disk refuses, once."""
        if self._handle is None or not report.is_worth(self.level):
            return None
        if report.event == "step" and not self._steps.is_over(report.time):
            return None
        text = report.line + "\n" if self._as_json else _dated(report)
        try:
            self._write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.close()
            reason = error.strerror or error
            return f"cannot write to {self.path}: {reason}; nothing more goes there; {self._remedy}"
        return None

    def close(self) -> None:
        """Release the file."""
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                os.close(handle)
            except OSError:
                pass  # the line that the full disk refused: it has been reported

    def _open(self) -> int:
        """A handle that adds to the file and never waits, as for a pipe that nobody reads."""
        # O_APPEND: lines stay whole where several processes write to one log file.
        flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        if not self._as_json:
            return os.open(self._path, os.O_WRONLY | flags, 0o666)
        # For reading, too: its last byte is looked at.
        handle = open_plain(self._path, os.O_RDWR | flags)
        try:
            _mend_end(handle)
        except OSError:
            os.close(handle)
            raise
        return handle

    def _write(self, line: bytes) -> None:
        assert self._handle is not None
        status = os.fstat(self._handle)
        # A pipe or a device has no size, and must not be put aside.
        if stat.S_ISREG(status.st_mode) and status.st_size + len(line) > _MOST_BYTES:
            self._rotate(status)
        # A write may take a part only, as to a pipe or near the end of a disk.
        while line:
            line = line[os.write(self._handle, line) :]

    def _rotate(self, status: os.stat_result) -> None:
        """Go on in a new file, unless another program has put this one aside already."""
        if self._path.exists() and os.path.samestat(status, os.stat(self._path)):
            # From the oldest on, so that none is written over before it has moved.
            for number in range(_OLDER_FILES, 0, -1):
                newer = older_file(self._path, number - 1)
                if newer.exists():
                    os.replace(newer, older_file(self._path, number))
        # In any case: the handle leads to the file that was moved.
        self.close()
        self._handle = self._open()


class ReportFiles:
    """The files in which a run's reports are kept: of the steps one a second.

    What is reported before any file is named waits for the first ones.
    """

    def __init__(self) -> None:
        self._early: list[Report] | None = []
        """What was reported before it was known where to keep it; None from then on."""

        self._files: list[ReportFile] = []
        self._spacing = Spacing(_SECONDS_BETWEEN_EVENTS)

    def open(
        self, *, events: Path | None, log_file: Path | None, level: str, all_steps: bool
    ) -> list[str]:
        """Keep reports in other files from now on; what cannot be kept, in words.

        Args:
            events: File for every report as a JSON line; None: for none.
            log_file: File for the texts; None: for none.
            level: Lowest level of these.
            all_steps: Whether they get every step that the events get; else one a minute.

        Raises:
            ValueError: The log file, which the user has named, cannot be written.
        """
        self.close()
        problems = []
        if log_file is not None:
            remedy = "free space, or choose another --log-file"
            try:
                steps_s = 0.0 if all_steps else SECONDS_BETWEEN_STEPS
                self._files.append(
                    ReportFile(log_file, level=level, as_json=False, remedy=remedy, steps_s=steps_s)
                )
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(
                    f"log.file {log_file} cannot be written: {reason}; choose another --log-file"
                ) from error
        if events is not None:
            remedy = "free space, or start again with --no-logs"
            try:
                self._files.append(ReportFile(events, level="debug", as_json=True, remedy=remedy))
            except OSError as error:
                problems.append(f"cannot write to {events}: {error.strerror or error}; {remedy}")
        early, self._early = self._early, None
        # In their order, before anything newer: a log is read from the top.
        for report in early or ():
            problems += self.add(report)
        return problems

    def add(self, report: Report) -> list[str]:
        """Keep a report; warnings of files that take no more."""
        if self._early is not None:
            self._early.append(report)
        problems = [file.add(report) for file in self._files]
        return [problem for problem in problems if problem]

    def add_step(self, fields: dict[str, Any], at: float) -> bool:
        """Take in the fields of a step; whether it is time to keep what was taken in."""
        return self._spacing.add(fields, at)

    def keep_steps(self) -> list[str]:
        """Keep one report for the steps since the last one that was kept; problems as `add`."""
        held = self._spacing.take()
        return self.add(step_report(*held)) if held else []

    def close(self) -> None:
        """Release the files."""
        files, self._files = self._files, []
        for file in files:
            file.close()


def older_file(path: Path, number: int) -> Path:
    """Path to which a file that has grown is moved; 0: the file itself, 1: the one before."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _mend_end(handle: int) -> None:
    """End the last line of a file, which a full disk may have cut: what follows is whole."""
    size = os.fstat(handle).st_size
    # Else the first line of this run would be the end of a broken one, and be lost with it.
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def _dated(report: Report) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.time))
    head = f"{date} {report.level.upper():<7} "
    return "".join(f"{head}{line}\n" for line in report.text.split("\n"))
