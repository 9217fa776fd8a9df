"""The files that keep what a run reports: all of it as JSON lines, or what is printed as text.

A file that has grown to 16 MiB is put aside as `<name>.1`, the one before as `<name>.2`, and so on;
four of them are kept. So a run takes no more than 80 MiB for each, however long it lasts.
"""

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from ..system.durable_files import open_plain

LEVELS = ("debug", "info", "warning", "error")

_MOST_BYTES = 16 << 20
_OLDER_FILES = 4


@dataclass(frozen=True)
class Report:
    """One thing that was told."""

    event: str
    time: float
    """Seconds since 1970."""

    level: str
    text: str
    """Text for people, of one or more lines."""

    line: str
    """JSON object for programs, in one line."""

    def is_worth(self, level: str) -> bool:
        """Whether a reader who wants reports from this level on wants this one."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


class ReportFile:
    """A file to which reports are added, each as soon as it is told.

    Args:
        path: The file; missing folders are made.
        level: Lowest level of what is kept.
        as_json: Keep the JSON lines, in a plain file that no link leads to; else the texts with
            date and level before each line, in whatever the user names: a link's target, a device.
        remedy: What the user can do where the disk refuses.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, level: str, as_json: bool, remedy: str) -> None:
        self.path, self.level, self._as_json, self._remedy = path, level, as_json, remedy
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path if as_json else Path(os.path.realpath(path))
        self._handle: int | None = self._open()

    def add(self, report: Report) -> str | None:
        """Keep a report; what to tell the user where the disk refuses, once."""
        if self._handle is None or not report.is_worth(self.level):
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
                pass  # the line that the full disk refused: it has been told

    def _open(self) -> int:
        """A handle that adds to the file and never waits, as for a pipe that nobody reads."""
        flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        if not self._as_json:
            return os.open(self._path, os.O_WRONLY | flags, 0o666)
        handle = open_plain(self._path, os.O_RDWR | flags)
        try:
            _mend_end(handle)
        except OSError:
            os.close(handle)
            raise
        return handle

    def _write(self, line: bytes) -> None:
        assert self._handle is not None
        found = os.fstat(self._handle)
        if stat.S_ISREG(found.st_mode) and found.st_size + len(line) > _MOST_BYTES:
            self._put_aside(found)
        while line:
            line = line[os.write(self._handle, line) :]

    def _put_aside(self, found: os.stat_result) -> None:
        """Go on in a new file, unless another program has put this one aside already."""
        if self._path.exists() and os.path.samestat(found, os.stat(self._path)):
            for number in range(_OLDER_FILES, 0, -1):
                newer = older_file(self._path, number - 1)
                if newer.exists():
                    os.replace(newer, older_file(self._path, number))
        self.close()
        self._handle = self._open()


def older_file(path: Path, number: int) -> Path:
    """Path to which a file that has grown is moved; 0: the file itself, 1: the one before."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _mend_end(handle: int) -> None:
    """End the last line of a file, which a full disk may have cut: what follows is whole."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def _dated(report: Report) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.time))
    head = f"{date} {report.level.upper():<7} "
    return "".join(f"{head}{line}\n" for line in report.text.split("\n"))
