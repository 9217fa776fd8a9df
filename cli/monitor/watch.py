"""What the page shows of a model folder, read without a lock and without writing anything."""

import dataclasses
import math
import os
import re
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.checkpoint.lock_owner import lock_owner
from ...core.checkpoint.model_folder import PREVIEW, SHEET, STATE
from ...core.history.history import History, SessionHistory, event_files, read_history
from ...core.history.statistics import total_statistics
from ...core.system.durable_files import DamagedError, read_regular
from .graphs import loss_points, loss_tags, measured_points, speed_points, table
from .journal import Journal
from .pictures import Pictures

POINTS = 1500
"""Points of a graph at most. Chosen, unmeasured."""

_FRESH_SECONDS = (
    15.0  # after which a session without events is not called running; chosen, unmeasured
)
_SECONDS_BETWEEN_READS, _SHARE_OF_TIME = 4.0, 0.05
"""Seconds between two readings of the logs, longer where reading takes more than that share of the
time. Chosen, unmeasured."""

# Bounds of what a folder costs the page; chosen, unmeasured.
_MAX_PREVIEW_BYTES = 256 << 20
_MOST_SESSIONS = 500  # rows of the table
_MOST_BEGINS = 200  # lines in a graph where sessions begin; more would hide it
_MOST_ROWS = 20_000  # of a table of values
_DRAWN = re.compile(r"batch_(face|mask)_[ab](_\d{1,2})?", re.ASCII)
_SHOWN = re.compile(
    _DRAWN.pattern
    + r"|batch_(un)?weighted_[ab](_\d{1,2})?/[\w.-]{1,40}|learning_rate|evaluate/[\w.-]{1,40}",
    re.ASCII,
)
"""Series that may be drawn; those of `_DRAWN` are where no others are asked for."""


class Watch:
    """Looks at a model folder whenever it is asked; may be used by several threads.

    Args:
        model_dir: The model folder; it may be empty, or be made later.
        may_ask: Whether the page may ask the run for work.
    """

    def __init__(self, model_dir: Path, *, may_ask: bool) -> None:
        self._path, self._may_ask = model_dir, may_ask
        self.pictures = Pictures(model_dir)
        self._journal, self._journal_lock = Journal(model_dir), threading.Lock()
        self._history_lock = threading.Lock()
        self._history: History | None = None
        self._problem: str | None = None
        self._read_again_at = 0.0
        self._seen: dict[str, tuple[int, int]] | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self._path.resolve().name

    def status(self) -> dict[str, Any]:
        """State of the run, and its last events."""
        with self._journal_lock:
            self._journal.update()
            latest, events = dict(self._journal.latest), self._journal.events
            session, unreadable = self._journal.session, self._journal.unreadable
        owner = lock_owner(self._path)
        newest = events[-1] if events else None
        is_fresh = newest is not None and time.time() - newest["time"] < _FRESH_SECONDS
        if owner is not None and owner.is_running:
            state = "paused" if _is_paused(latest) else "running"
        elif "stop" in latest:
            state = "stopped"
        elif "crash" in latest:
            state = "failed"
        elif "restore" in latest:
            state = "restored"
        elif is_fresh:  # on another host, whose lock cannot be seen
            state = "running"
        elif newest is not None:
            state = "lost"
        else:
            state = "idle" if _has_files(self._path) else "new"
        return {
            "name": self.name,
            "state": state,
            "host": None if owner is None or owner.is_here else owner.host,
            "pid": owner.pid if owner is not None and owner.is_running else None,
            "session": session,
            "latest": latest,
            "events": events,
            "unreadable": unreadable,
            "preview": self._tag_of(PREVIEW),
            "sheet": self._tag_of(SHEET),
            "kept": self.pictures.iterations(),
            "may_ask": self._may_ask,
            "version": __version__,
        }

    def graphs(
        self, first: int | None, last: int | None, series: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Losses, metrics and speed from one iteration to another, as points to draw.

        series: losses to be drawn; None: those of faces and masks.
        """
        history, problem = self._read()
        if history is None:
            return {"problem": problem, "loss": None, "speed": None, "sessions": []}
        available = loss_tags(history)
        wanted = [
            tag for tag in available if (_DRAWN.fullmatch(tag) if series is None else tag in series)
        ]
        logged = [one for one in history.sessions if len(one.iterations_n)]
        begins = [(one.number, int(one.iterations_n[0])) for one in logged]
        low, high = 0 if first is None else first, math.inf if last is None else last
        later = [(number, begin) for number, begin in begins[1:] if low <= begin <= high]
        return {
            "problem": problem,
            "loss": loss_points(history, first, last, POINTS, wanted),
            "available": available,
            "measured": measured_points(history, first, last, POINTS),
            "memory": self._memory(low, high),
            "speed": speed_points(history, first, last, POINTS),
            "sessions": [{"number": number, "first": begin} for number, begin in later]
            if len(later) <= _MOST_BEGINS
            else [],
            "first": min((begin for _, begin in begins), default=0),
            "last": max((int(one.iterations_n[-1]) for one in logged), default=0),
        }

    def analysis(self) -> dict[str, Any]:
        """The statistics of each of the newest sessions, and of all together."""
        history, problem = self._read()
        of_history = history.sessions if history else []
        sessions = [one.statistics() for one in of_history]
        rows = [
            dataclasses.asdict(statistics) | _ends(session)
            for session, statistics in zip(of_history, sessions, strict=True)
        ]
        return {
            "problem": problem,
            "warnings": history.warnings if history else [],
            "trainer": history.trainer if history else None,
            "earlier": max(0, len(sessions) - _MOST_SESSIONS),
            "sessions": rows[-_MOST_SESSIONS:],
            "total": dataclasses.asdict(total_statistics(sessions)) if sessions else None,
        }

    def table(self, first: int | None, last: int | None) -> str:
        """All series of some iterations as comma-separated values."""
        history, _ = self._read()
        return table(history, first, last, _MOST_ROWS) if history else "iteration\r\n"

    def _memory(self, low: float, high: float) -> dict[str, list[Any]]:
        """Peak memory of the newest session, as far as its last events tell it."""
        with self._journal_lock:
            self._journal.update()
            points = [point for point in self._journal.memory if low <= point[0] <= high]
        return {"iterations": [at for at, _ in points], "values": [mib for _, mib in points]}

    def picture(self, name: str) -> bytes | None:
        """The run's newest preview or sheet, by the name of its file, as PNG; None where there is
        none."""
        try:
            return read_regular(self._path / name, _MAX_PREVIEW_BYTES)
        except (OSError, DamagedError):
            return None

    def _tag_of(self, name: str) -> str | None:
        """What changes where a picture would; None where there is none."""
        try:
            found = (self._path / name).lstat()
        except OSError:
            return None
        return f"{found.st_mtime_ns:x}-{found.st_size:x}" if stat.S_ISREG(found.st_mode) else None

    def _read(self) -> tuple[History | None, str | None]:
        """The history as of some seconds ago, and why it could not be read anew.

        One thread reads; others take what was read before, if there is any. A long history takes
        long to read: it is read less often, so that little of the time goes into it.
        """
        if not self._history_lock.acquire(blocking=self._history is None):
            return self._history, self._problem
        try:
            began_at = time.monotonic()
            if began_at >= self._read_again_at:
                if self._has_changed():
                    self._read_anew()
                took = time.monotonic() - began_at
                wait = max(_SECONDS_BETWEEN_READS, took / _SHARE_OF_TIME)
                self._read_again_at = time.monotonic() + wait
            return self._history, self._problem
        finally:
            self._history_lock.release()

    def _has_changed(self) -> bool:
        """True where a file that the history is read from is not as it was the last time."""
        found: dict[str, tuple[int, int]] = {}
        paths = [str(self._path / STATE)]
        try:
            paths += event_files(self._path / "logs")
        except OSError:  # the reading, which comes now, tells what is wrong with it
            return True
        for path in paths:
            with suppress(OSError):  # not there yet, or taken away at this moment
                facts = os.stat(path)
                found[path] = (facts.st_size, facts.st_mtime_ns)
        before, self._seen = self._seen, found
        return found != before

    def _read_anew(self) -> None:
        try:
            self._history = read_history(self._path, lambda tag: _SHOWN.fullmatch(tag) is not None)
            self._problem = None
        except ValueError as error:  # the page tells of it, and keeps what it had
            # Nothing counts as seen, so the next look reads anew even where no file has changed.
            self._problem, self._seen = str(error), None


def _is_paused(latest: dict[str, dict[str, Any]]) -> bool:
    """Whether the newest session was paused and has not gone on since."""
    if "pause" not in latest:
        return False
    return "resume" not in latest or latest["resume"]["time"] < latest["pause"]["time"]


def _has_files(folder: Path) -> bool:
    """Whether something is in a folder, as far as it can be looked into."""
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False


def _ends(session: SessionHistory) -> dict[str, int | None]:
    """The first and the last iteration that were logged of a session."""
    logged = session.iterations_n
    if not len(logged):
        return {"first": None, "last": None}
    return {"first": int(logged[0]) - int(session.counts_n[0]) + 1, "last": int(logged[-1])}
