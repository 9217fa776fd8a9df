"""How a model was trained: its sessions from the newest save, its losses from the events.

Nothing is locked or written, so a model may be read while it trains. Sessions that no save knows of
yet are taken from the events alone.

A long table of sessions begins with an entry for many together (`session`): so does the history.

What a crash or a way back undid is left out: every run begins its file of events with the iteration
at which it began, and from there on it takes the place of all that was written before. So does the
mark of a `mien model restore`, of what was written of its session.

An event of a long training stands for several iterations: for all since the event before.

The events may come from a stranger, and be many: a record, a time, an iteration and the number of
tags are bounded, and no more than the files hold is ever read or kept.
"""

import math
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.format import MAX_COUNT, read_settings
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.state import Session, TrainingState, session_number
from ..console.tensorboard import ITERATION
from ..system.durable_files import DamagedError, open_regular
from ..system.printable import plural
from .statistics import SessionStatistics, session_statistics
from .undone import MARK

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

EVALUATE = "evaluate/"
"""Begin of the tags of metrics of held-out faces."""

BATCH_SIZE_TAG = "batch_size"
"""A session's events begin with one that has it."""

_HEADER = struct.Struct("<Q4x")  # of a record: size of its event; CRC
_FOOTER_BYTES = 4  # CRC of the event
_MAX_RECORD_BYTES = 1 << 20  # of an iteration, there are some hundred
_MAX_FILE_BYTES = (1 << 63) - 1  # it is read record by record
# Bounds of what a stranger's logs cost, and of what is shown of them; chosen, unmeasured.
_MAX_SECONDS = 1e11
_MOST_WARNINGS = 10
_MOST_TAGS = 64  # that are kept: faces and masks of both sides, and of four outputs, are 16


@dataclass(kw_only=True)
class SessionHistory:
    """One session. Letter: n, its logged events."""

    number: int
    saved: Session | None
    """Session as the newest save has it; None where that knows it not."""

    batch_size: int | None
    iterations_n: np.ndarray
    """Total iterations at its end, rising."""

    counts_n: np.ndarray
    """How many iterations each event stands for."""

    times_n: np.ndarray
    """Time at which each event ended, in seconds since 1970."""

    losses: dict[str, np.ndarray]
    """(n,) means of each tag that was requested; NaN where it was not logged."""

    measured: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Iterations and values of each metric of held-out faces that was requested."""

    pauses_s: float = 0.0
    """Seconds between the sessions, where it stands for several."""

    @property
    def num_logged(self) -> int:
        """Iterations that the events stand for."""
        return int(self.counts_n.sum())

    def statistics(self) -> SessionStatistics:
        """Statistics by the events; by the save where there are none."""
        if len(self.times_n) or self.saved is None:
            return session_statistics(
                self.number,
                self.times_n,
                self.batch_size,
                iterations=self.num_logged,
                pauses_s=self.pauses_s,
            )
        return SessionStatistics(
            session=self.number,
            start=self.saved.started,
            end=None,
            elapsed_s=None,
            batch_sizes=(self.saved.batch_size,),
            iterations=self.saved.iterations,
            eg_per_s=None,
        )


@dataclass(frozen=True, kw_only=True)
class History:
    """Training of a model, as far as it is known."""

    trainer: str | None
    """Family of the model; None before the first save."""

    sessions: list[SessionHistory]
    """Sessions in the order of training."""

    tags: list[str]
    """Tags that were logged, sorted."""

    warnings: list[str]
    """Sentences for the user."""


def read_history(model_dir: Path, wants: Callable[[str], bool] = lambda tag: False) -> History:
    """The history of the model in a folder, with the losses of the tags that are wanted.

    Raises:
        ValueError: The folder holds no model, or cannot be read.
    """
    with ModelFolder(model_dir, read_only=True) as folder:
        values = folder.newest_state()
    state = None if values is None else TrainingState.from_dict(values)
    saved = [] if state is None else state.sessions
    try:
        files = _read_files(model_dir / "logs", wants)
        unsaved_batch_size = _batch_size(model_dir)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}; mend that") from error
    _leave_out_undone(files, saved)
    sessions = _sessions(files, saved, unsaved_batch_size)
    return History(
        trainer=None if state is None else state.trainer,
        sessions=sessions,
        tags=sorted({tag for file in files for tag in file.tags}),
        warnings=_missing(sessions) + _unusable(files),
    )


@dataclass(kw_only=True)
class _EventFile:
    """What one run logged, in arrays: a million events take 8 MB a column."""

    session: int
    is_mark: bool
    """Whether a restore wrote it: then it holds no iterations."""

    began_at: float = 0.0
    first_iteration: int | None = None
    iterations: array = field(default_factory=lambda: array("q"))
    counts: array = field(default_factory=lambda: array("q"))
    times: array = field(default_factory=lambda: array("d"))
    losses: dict[str, array] = field(default_factory=dict)
    measured: dict[str, tuple[array, array]] = field(default_factory=dict)
    """Iterations and values of metrics, which have events of their own."""

    batch_size: int | None = None
    tags: set[str] = field(default_factory=set)
    """Tags of all values, also of those that are not kept."""

    num_values: int = -1
    """Number of values in the last event; a change of it has the tags looked for again."""

    places: dict[str, int] = field(default_factory=dict)
    """Position of each kept tag in an event."""

    num_unusable: int = 0
    """Events of no time or no iteration that there can be."""

    def add(self, event: "Event", wants: Callable[[str], bool]) -> None:
        """Take in one event."""
        if not (0 <= event.wall_time <= _MAX_SECONDS and 0 <= event.step <= MAX_COUNT):
            self.num_unusable += 1
            return
        if event.HasField("session_log"):
            self.began_at, self.first_iteration = event.wall_time, event.step
        values = event.summary.value
        if len(values) == 1 and values[0].tag == BATCH_SIZE_TAG:
            size = values[0].simple_value
            self.batch_size = int(size) if 1 <= size <= MAX_COUNT else None
            return
        # All iterations of a run are alike, so that most tags need not be read.
        is_alike = len(values) == self.num_values and all(
            values[place].tag == tag for tag, place in self.places.items()
        )
        # Behind something else, which may have as many values, there are no places.
        if not (self.places and is_alike):
            self._find_places(values, wants)
        # An event of something else, as the settings, an image or the metrics of a save.
        if ITERATION not in self.places:
            self._add_measured(event.step, values, wants)
            return
        # A run that went back logs the same iterations again: the later ones hold.
        if self.iterations and event.step <= self.iterations[-1]:
            self.cut(event.step - 1)
        self.counts.append(max(event.step - self._last_iteration(event.step), 1))
        self.iterations.append(event.step)
        self.times.append(event.wall_time)
        for tag, column in self.losses.items():
            place = self.places.get(tag)
            column.append(np.nan if place is None else values[place].simple_value)

    def _find_places(self, values: "Sequence[Summary.Value]", wants: Callable[[str], bool]) -> None:
        self.num_values = len(values)
        places = {value.tag: place for place, value in enumerate(values)}
        self.tags |= places.keys()
        self.places = {tag: place for tag, place in places.items() if tag == ITERATION}
        if not self.places:
            return
        for tag, place in places.items():
            if wants(tag) and (tag in self.losses or len(self.losses) < _MOST_TAGS):
                self.losses.setdefault(tag, array("d", [np.nan]) * len(self.times))
                self.places[tag] = place

    def _add_measured(
        self, step: int, values: "Sequence[Summary.Value]", wants: Callable[[str], bool]
    ) -> None:
        """Take in metrics of held-out faces."""
        for value in values:
            tag = value.tag
            if not tag.startswith(EVALUATE) or not wants(tag):
                continue
            if tag in self.measured or len(self.measured) < _MOST_TAGS:
                iterations, column = self.measured.setdefault(tag, (array("q"), array("d")))
                _cut_columns(step - 1, iterations, column)
                iterations.append(step)
                column.append(value.simple_value)

    def _last_iteration(self, step: int) -> int:
        """The iteration after which the event of a step begins."""
        if self.iterations:
            return self.iterations[-1]
        return (step if self.first_iteration is None else self.first_iteration) - 1

    def cut(self, last: float) -> None:
        """Forget the iterations after one."""
        _cut_columns(last, self.iterations, self.counts, self.times, *self.losses.values())
        for columns in self.measured.values():
            _cut_columns(last, *columns)


def _cut_columns(last: float, iterations: array, *columns: array) -> None:
    """Forget what columns hold of the iterations after one."""
    count = bisect_right(iterations, last)
    for column in (iterations, *columns):
        del column[count:]


def _read_files(logs: Path, wants: Callable[[str], bool]) -> list[_EventFile]:
    """All files of events, in the order in which they were begun."""
    files = []
    for path in event_files(logs):
        _, folder, _, name = path.rsplit(os.sep, 3)
        is_mark = MARK.fullmatch(name) is not None
        file = _EventFile(session=session_number(folder) or 0, is_mark=is_mark)
        try:
            with open_regular(Path(path), _MAX_FILE_BYTES) as stream:
                for event in _events(stream):
                    file.add(event, wants)
        except DamagedError:  # it is no file, or has been taken away
            continue
        files.append(file)
    # By their own word and not by the disk's: times of files change when a folder is copied.
    return sorted(files, key=lambda file: file.began_at)


def event_files(logs: Path) -> Iterator[str]:
    """The path of every file of events of every session in a folder of logs."""
    for folder in _names_in(str(logs)):
        if session_number(folder) is not None:
            train = os.path.join(logs, folder, "train")
            for name in _names_in(train):
                if name.startswith("events.out.tfevents."):
                    yield os.path.join(train, name)


def _names_in(folder: str) -> list[str]:
    """The names in a folder; none where it is no folder, or is taken away at this moment."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _events(stream: BufferedReader) -> Iterator["Event"]:
    """The events of a file, less large pictures, up to the first that is not whole or is none of a
    run's.

    The checksums are not computed: in Python that takes minutes for a million iterations. What a
    crash leaves shows without them: the end is missing, or is zeros, which are empty events.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    remaining = os.fstat(stream.fileno()).st_size  # what comes while it is read is left out
    while remaining >= _HEADER.size:
        (size,) = _HEADER.unpack(stream.read(_HEADER.size))
        remaining -= _HEADER.size + size + _FOOTER_BYTES
        # A size beyond the file is a record that a running training has not written out yet.
        if remaining < 0 or not size:
            return
        # A picture of a preview, which is nothing of the history, may be larger than all bounds.
        if size > _MAX_RECORD_BYTES:
            stream.seek(size + _FOOTER_BYTES, os.SEEK_CUR)
            continue
        try:
            event = Event.FromString(stream.read(size))
        except DecodeError:
            return
        stream.read(_FOOTER_BYTES)
        yield event


def _leave_out_undone(files: list[_EventFile], saved: list[Session]) -> None:
    """Cut off what was logged of iterations that a later run began anew, or a restore undid."""
    first: float = math.inf  # of what was begun later
    first_of_session: dict[int, float] = {}
    for file in reversed(files):
        own_first = first_of_session.get(file.session, math.inf)
        # Files are walked from the newest: what began later overrules.
        file.cut(min(first, own_first) - 1)
        if file.first_iteration is not None and file.is_mark:
            first_of_session[file.session] = min(own_first, file.first_iteration)
        elif file.first_iteration is not None:
            first = min(first, file.first_iteration)
    # What the newest save does not know of a session was lost with the process.
    numbers = [session.number for session in saved]
    lasts = list(accumulate(session.iterations for session in saved))
    for file in files:
        place = bisect_left(numbers, file.session)  # the first one stands for all before it
        if place < len(saved) - 1:  # the last one may go on
            file.cut(lasts[place])


def _sessions(
    files: list[_EventFile], saved: list[Session], unsaved_batch_size: int | None
) -> list[SessionHistory]:
    """Every session that is saved or logged, by its number.

    The first saved one stands for all up to it: they are kept apart where all of it is logged.
    """
    known = {session.number: session for session in saved}
    trained = {file.session for file in files if file.iterations}
    earliest = saved[0] if saved and saved[0].number > 1 else None
    first = 0  # the session to which the logs of all before it belong
    if earliest is not None:
        early = (file for file in files if file.session <= earliest.number)
        if sum(sum(file.counts) for file in early) == earliest.iterations:
            del known[earliest.number]
        else:
            # Not all of the early ones is logged, so their sum is all that there is to show.
            first = earliest.number
    logged: dict[int, list[_EventFile]] = {}
    for file in files:
        logged.setdefault(max(file.session, first), []).append(file)
    trained = {max(number, first) for number in trained}
    sessions = []
    for number in sorted(known.keys() | trained):
        own = logged.get(number, [])
        # The latest file counts: a session lost in a crash may have had another size.
        batch_sizes = (file.batch_size for file in reversed(own) if file.batch_size)
        batch_size = next(batch_sizes, unsaved_batch_size)
        if number in known:
            batch_size = known[number].batch_size
        elif earliest is not None and number <= earliest.number:
            batch_size = earliest.batch_size
        sessions.append(_joined(number, known.get(number), batch_size, own))
    return sessions


def _joined(
    number: int, saved: Session | None, batch_size: int | None, files: list[_EventFile]
) -> SessionHistory:
    """One session, of all its files."""
    losses = {
        tag: np.concatenate(
            [np.array(file.losses.get(tag, [np.nan] * len(file.times))) for file in files]
        )
        for tag in sorted({tag for file in files for tag in file.losses})
    }
    measured = {}
    for tag in sorted({tag for file in files for tag in file.measured}):
        columns = [file.measured[tag] for file in files if tag in file.measured]
        steps, values = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        measured[tag] = (steps.astype(int), values.astype(float))
    return SessionHistory(
        number=number,
        saved=saved,
        batch_size=batch_size,
        iterations_n=np.concatenate([[], *(np.array(file.iterations) for file in files)]).astype(
            int
        ),
        counts_n=np.concatenate([[], *(np.array(file.counts) for file in files)]).astype(int),
        times_n=np.concatenate([[], *(np.array(file.times) for file in files)]),
        losses=losses,
        measured=measured,
        pauses_s=_pauses(files),
    )


def _pauses(files: list[_EventFile]) -> float:
    """Seconds between the sessions of some files."""
    spans: dict[int, tuple[float, float]] = {}
    for file in files:
        if file.times:
            begin, end = spans.get(file.session, (np.inf, -np.inf))
            spans[file.session] = min(begin, *file.times), max(end, *file.times)
    ends, begins = [end for _, end in spans.values()], [begin for begin, _ in spans.values()]
    return sum(max(begin - end, 0.0) for end, begin in zip(ends, begins[1:], strict=False))


def _batch_size(model_dir: Path) -> int | None:
    """What the settings in a model folder say, where no event does; None where they do not."""
    train = (read_settings(model_dir) or {}).get("train")
    batch_size = train.get("batch_size") if isinstance(train, dict) else None
    return batch_size if type(batch_size) is int and batch_size > 0 else None


def _missing(sessions: list[SessionHistory]) -> list[str]:
    """A sentence for each session of which less was logged than saved, and one for many of them."""
    warnings = [
        f"the logs hold {one.num_logged} of the {one.saved.iterations} iterations of session "
        f"{one.number}; its statistics are those of the logs"
        for one in sessions
        if one.saved and 0 < one.num_logged < one.saved.iterations
    ]
    rest = len(warnings) - _MOST_WARNINGS
    if rest <= 0:
        return warnings
    # The newest ones: what a user asks about has mostly happened last.
    return [*warnings[-_MOST_WARNINGS:], f"so it is of {rest} earlier {plural(rest, 'one')}"]


def _unusable(files: list[_EventFile]) -> list[str]:
    """A sentence where events had to be left out."""
    count = sum(file.num_unusable for file in files)
    if not count:
        return []
    these = plural(count, "event of the logs has", "events of the logs have")
    return [
        f"{count} {these} no time or no iteration that there can be, and "
        f"{plural(count, 'is', 'are')} left out: those files are damaged, or not written by mien"
    ]
