"""The files that keep what a run reports: all of it as JSON lines, or what is printed as text."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Report:
    """One thing that was told."""

    event: str
    time: float
    """Seconds since 1970."""

    level: str
    text: str
    """For people, of one or more lines."""

    line: str
    """For programs, a JSON object."""

    def is_worth(self, level: str) -> bool:
        """Whether a reader who wants reports from this level on wants this one."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


class ReportFile:
    """A file to which reports are added, each as soon as it is told.

    Args:
        path: The file; missing folders are made.
        level: Lowest level of what is kept.
        as_json: Keep the JSON lines, else the texts with date and level before each line.
        remedy: What the user can do where the disk refuses.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, level: str, as_json: bool, remedy: str) -> None:
        self.path, self.level, self._as_json, self._remedy = path, level, as_json, remedy
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1)
        if as_json and _is_torn(path):
            self._file.write("\n")

    def add(self, report: Report) -> str | None:
        """Keep a report; what to tell the user where the disk refuses, once."""
        if self._file is None or not report.is_worth(self.level):
            return None
        try:
            self._file.write(report.line + "\n" if self._as_json else _dated(report))
        except OSError as error:
            self.close()
            reason = error.strerror or error
            return f"cannot write to {self.path}: {reason}; nothing more goes there; {self._remedy}"
        return None

    def close(self) -> None:
        """Release the file."""
        opened, self._file = self._file, None
        if opened is None:
            return
        try:
            opened.close()
        except OSError:
            pass  # the line that the full disk refused: it has been told


def _is_torn(path: Path) -> bool:
    """Whether its last line has no end, as a full disk leaves it: what follows would be lost."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _dated(report: Report) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.time))
    head = f"{date} {report.level.upper():<7} "
    return "".join(f"{head}{line}\n" for line in report.text.splitlines())
