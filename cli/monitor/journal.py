"""The events that the newest session has told, read as they are written.

`logs/session_<n>/events.jsonl` holds one JSON object a line, those of `mien train --json`:
{"event": ..., "time": seconds since 1970, ...}. What was put aside last, `events.jsonl.1`, comes
before it.
"""

import json
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ...core.checkpoint.format import MAX_COUNT
from ...core.checkpoint.state import session_number
from ...core.console.event_files import older_file
from ...core.console.reporter import EVENTS
from ...core.system.durable_files import open_for_reading

KINDS = (
    *("start", "step", "save", "preview", "sheet", "stop", "crash", "restore", "pause", "resume"),
)
"""Events whose latest one is looked at by itself."""

# Bounds of what a stranger's journal costs a look; chosen, unmeasured.
_MAX_BYTES = 2 << 20  # of what was written before the first look: hours of status lines
_MAX_LINE_BYTES = 1 << 15  # of a start with all settings, there are some thousand
_MAX_SECONDS = 1e11
_MOST_STEPS, _MOST_OTHERS = 8, 200
_MOST_OF_MEMORY = 2000  # points; a graph of them shows no more


class Journal:
    """The last events of a model's newest session.

    Args:
        model_dir: The model folder; it may lack logs, or be made later.
    """

    def __init__(self, model_dir: Path) -> None:
        self._logs = model_dir / "logs"
        self._begin(None, None)

    def _begin(self, session: int | None, path: Path | None) -> None:
        self.session, self._path, self._inode, self._offset = session, path, 0, 0
        self.latest: dict[str, dict[str, Any]] = {}
        """The last event of each of `KINDS` since the last start or restore."""

        self.unreadable = 0
        """Lines that are no events, as a crash or a full disk may leave them."""

        self.memory: list[tuple[int, float]] = []
        """Iterations and peak memory in MiB, thinned out where they are many."""

        self._steps: deque[dict[str, Any]] = deque(maxlen=_MOST_STEPS)
        self._others: deque[dict[str, Any]] = deque(maxlen=_MOST_OTHERS)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The last events in their order; of the many status lines only a few."""
        return sorted([*self._others, *self._steps], key=lambda event: event["time"])

    def update(self) -> None:
        """Take in what has been written since the last time, of a new session if there is one."""
        session, path = self._newest()
        if path is None:
            self._begin(None, None)
            return
        with _opened(path) as now, _opened(older_file(path, 1)) as before:
            if now is None:  # put aside or taken away at this moment
                return
            if path != self._path or not self._is_followed(now):
                if path != self._path or before is None or not self._is_followed(before):
                    self._begin(session, path)
                    self._start(before, _MAX_BYTES - _size(now))
                self._take_rest(before)
                self._start(now, _MAX_BYTES)
            self._take_rest(now)

    def _take_start(self, stream: BinaryIO) -> None:
        """Take in the start of the session, with which its file begins, however long that is."""
        stream.seek(0)
        event = _event(stream.readline(_MAX_LINE_BYTES + 1).rstrip(b"\n"))
        if event is not None and event["event"] == "start":
            self.latest["start"] = event

    def _is_followed(self, stream: BinaryIO) -> bool:
        """Whether what was read last is the beginning of this file."""
        # By inode: a file that is put aside keeps it under its new name.
        return os.fstat(stream.fileno()).st_ino == self._inode and _size(stream) >= self._offset

    def _start(self, stream: BinaryIO | None, most_bytes: int) -> None:
        """Begin with the first whole line of a file's last so many bytes."""
        if stream is None:
            return
        self._inode = os.fstat(stream.fileno()).st_ino
        self._offset = max(0, _size(stream) - max(0, most_bytes))
        if self._offset and "start" not in self.latest:
            self._take_start(stream)
        if self._offset:
            stream.seek(self._offset)
            self._offset += len(stream.readline())

    def _take_rest(self, stream: BinaryIO | None) -> None:
        """Take in the lines that follow those that were read; the last may be half written."""
        if stream is None:
            return
        if _size(stream) - self._offset > _MAX_BYTES:
            self._start(stream, _MAX_BYTES)
        stream.seek(self._offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(line)

    def _newest(self) -> tuple[int | None, Path | None]:
        """The session that was told of last: a run that went back begins with a lower number."""
        try:
            names = os.listdir(self._logs)
        except OSError:
            return None, None
        numbered = [(session_number(name), name) for name in names]
        told = [
            (_told_at(os.path.join(self._logs, name, EVENTS)), number, name)
            for number, name in numbered
            if number is not None
        ]
        at, number, name = max(told, default=(0, 0, ""))
        return (number, self._logs / name / EVENTS) if at else (None, None)

    def _take(self, line: bytes) -> None:
        event = _event(line)
        if event is None:
            self.unreadable += 1
            return
        if event["event"] in ("start", "restore"):
            self.latest = {}  # a session that was lost in a crash had the same number
        if event["event"] == "restore":
            self._steps.clear()
            self.memory.clear()
        if event["event"] in KINDS:
            self.latest[event["event"]] = event
        if event["event"] == "step":
            self._take_memory(event.get("iteration"), event.get("memory_mib"))
        (self._steps if event["event"] == "step" else self._others).append(event)

    def _take_memory(self, iteration: Any, memory_mib: Any) -> None:
        # By `type`: to Python, JSON's true is an int as well.
        if type(iteration) is not int or type(memory_mib) not in (int, float):
            return
        if 0 <= iteration <= MAX_COUNT and 0 <= memory_mib <= MAX_COUNT:
            while self.memory and self.memory[-1][0] >= iteration:  # lost in a crash
                self.memory.pop()
            self.memory.append((iteration, memory_mib))
        if len(self.memory) > _MOST_OF_MEMORY:
            del self.memory[1::2]


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None for what is none."""
    if len(line) > _MAX_LINE_BYTES:
        return None
    try:
        event = json.loads(line)
        json.dumps(event, allow_nan=False)  # it will be passed on, and JSON has no NaN
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(event, dict)
        or not isinstance(event.get("event"), str)
        or type(event.get("time")) not in (int, float)
        or not 0 <= event["time"] <= _MAX_SECONDS
    ):
        return None
    return event


def _told_at(events: str) -> int:
    """Time at which something was added last to a session's events, in ns; 0 where it has none."""
    # They may be put aside at this moment.
    return _changed_at(events) or _changed_at(older_file(Path(events), 1))


def _changed_at(path: str | Path) -> int:
    try:
        facts = os.lstat(path)
    except OSError:
        return 0
    return facts.st_mtime_ns if stat.S_ISREG(facts.st_mode) else 0


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """A plain file to read; None where there is none."""
    try:
        stream = open_for_reading(path)
    except OSError:
        yield None
        return
    with stream:
        yield stream


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size
