"""The events that the newest session has told, read as they are written.

`logs/session_<n>/events.jsonl` holds one JSON object a line, those of `mien train --json`:
{"event": ..., "time": seconds since 1970, ...}.
"""

import json
import os
import re
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
_SESSION = re.compile(r"session_([1-9]\d{0,8})", re.ASCII)
_MAX_BYTES = 2 << 20  # of what was written before the first look: hours of status lines
_MAX_SECONDS = 1e11
_MOST_STEPS, _MOST_OTHERS = 8, 200


class Journal:
    """The last events of a model's newest session.

    Args:
        model_dir: The model folder; it may lack logs, or be made later.
    """

    def __init__(self, model_dir: Path) -> None:
        self._logs = model_dir / "logs"
        self._begin(None)

    def _begin(self, path: Path | None) -> None:
        self._path, self._inode, self._offset = path, 0, 0
        self.session: int | None = None
        self.latest: dict[str, dict[str, Any]] = {}
        """The last event of each kind since the last start."""

        self.unreadable = 0
        """Lines that are no events, as a crash or a full disk may leave them."""

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
            self._begin(None)
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(path, flags)
        except OSError:  # taken away at this moment: the next look finds what there is
            return
        with os.fdopen(handle, "rb") as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                return
            if (path, found.st_ino) != (self._path, self._inode) or found.st_size < self._offset:
                self._begin(path)
                self.session, self._inode = session, found.st_ino
                self._offset = max(0, found.st_size - _MAX_BYTES)
                stream.seek(self._offset)
                if self._offset:
                    self._offset += len(stream.readline())
            stream.seek(self._offset)
            whole, newline, _ = stream.read().rpartition(b"\n")  # the last line may be half written
            self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(line)

    def _newest(self) -> tuple[int | None, Path | None]:
        """The session that was told of last: a run that went back begins with a lower number."""
        try:
            names = os.listdir(self._logs)
        except OSError:
            return None, None
        found: list[tuple[int, int, Path]] = []
        for name in names:
            if match := _SESSION.fullmatch(name):
                path = self._logs / name / EVENTS
                with suppress(OSError):  # it has none, or is taken away at this moment
                    facts = path.lstat()
                    if stat.S_ISREG(facts.st_mode):
                        found.append((facts.st_mtime_ns, int(match[1]), path))
        if not found:
            return None, None
        _, number, path = max(found)
        return number, path

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            json.dumps(event, allow_nan=False)  # it will be passed on, and JSON has no NaN
        except (ValueError, RecursionError):
            self.unreadable += 1
            return
        if (
            not isinstance(event, dict)
            or not isinstance(event.get("event"), str)
            or type(event.get("time")) not in (int, float)
            or not 0 <= event["time"] <= _MAX_SECONDS
        ):
            self.unreadable += 1
            return
        if event["event"] == "start":  # also of the same number, after a session lost in a crash
            self.latest = {}
        self.latest[event["event"]] = event
        (self._steps if event["event"] == "step" else self._others).append(event)
