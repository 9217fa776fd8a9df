"""Scalars, previews and settings of a run as TensorBoard events.

Of the iterations, the sides written `a` and `b`; means over several iterations once there are more
than 20,000:

    batch_total                       loss A + loss B
    batch_face_a[_k]                  weighted sum of the functions (of output k, if several)
    batch_mask_a                      loss of the predicted mask
    batch_weighted_a/<function>       one function with its weight
    batch_unweighted_a/<function>     and without
    learning_rate                     where it is not constant

and of saves, where faces are held out:

    evaluate/<name>                   a metric of `core.evaluate.evaluate`
    preview                           a picture, now and then
    settings                          the session's settings, as text

TensorBoard itself is imported only where a TensorBoardLog is made.
"""

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c

from .spacing import Means

_SECONDS_BETWEEN_FLUSHES = 30.0  # chosen, unmeasured
_FINENESS = 20_000
"""An event stands for a 20,000th of the iterations so far at most, which is less than a graph can
show; a hundred million iterations take 200,000 events."""

_PICTURE_FACTOR = 1.2
"""A picture is kept once the iterations have grown by a fifth: forty from iteration 500 to a
million, some 20 MiB."""

ITERATION = "batch_total"
"""The scalar that every event of iterations has."""


class LogError(RuntimeError):
    """The TensorBoard events cannot be written; the message says why and what to do."""


Encode = Callable[[], tuple[bytes, tuple[int, int]]]
"""Maker of the content of a JPEG, and of its width and height in px."""


class Log(Protocol):
    """Destination of scalars."""

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration; those with `ITERATION` may wait for the next ones.

        Args:
            values: Values by name, as above.
            step: Total iteration.
            wall_time: Time at which it ended, in seconds since 1970; now, where it is not given.
        """

    def picture(self, name: str, encode: Encode, step: int) -> None:
        """Record a picture of a save; it may be left out where one was not long ago.

        Args:
            name: Name of the series.
            encode: Called where the picture is kept.
            step: Total iteration.
        """

    def flush(self) -> None:
        """Hand everything to the disk."""

    def close(self) -> None:
        """Flush, and release the file."""


class Logs:
    """Several destinations as one. What cannot be written is reported once, and the others go on:
    training is worth more than its graph.

    Args:
        logs: The destinations.
        warn: Called with a sentence about one that refuses.
    """

    def __init__(self, *logs: Log, warn: Callable[[str], None]) -> None:
        self._logs, self._warn = list(logs), warn
        self._writing = list(logs)

    def open(self, opening: Callable[[], Log]) -> None:
        """Add the destination that a call opens; one that refuses is reported and left out."""
        try:
            log = opening()
        except LogError as error:
            self._warn(f"{error}; no events are written there in this session")
        else:
            self._logs.append(log)
            self._writing.append(log)

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration, as `Log.scalars`."""
        self._write(lambda log: log.scalars(values, step, wall_time))

    def picture(self, name: str, encode: Encode, step: int) -> None:
        """Record a picture of a save, as `Log.picture`."""
        self._write(lambda log: log.picture(name, encode, step))

    def flush(self) -> None:
        """Hand everything to the disk."""
        self._write(lambda log: log.flush())

    def close(self) -> None:
        """Flush and release all."""
        # Those that have refused, too: their files are still open.
        for log in self._logs:
            try:
                log.close()
            except LogError as error:
                self._warn(f"{error}; the last events are lost")

    def _write(self, write: Callable[[Log], None]) -> None:
        # A copy: one that refuses leaves the list meanwhile.
        for log in tuple(self._writing):
            try:
                write(log)
            except LogError as error:
                self._writing.remove(log)
                self._warn(f"{error}; no more events are written there in this session")


class NullLog:
    """Keeps nothing (`--no-logs`)."""

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Drop the values."""

    def picture(self, name: str, encode: Encode, step: int) -> None:
        """Drop the picture."""

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
        settings: Settings of the session as TOML; empty: not recorded.

    Raises:
        LogError: Here and in every method, where the disk refuses.
    """

    def __init__(
        self,
        model_dir: Path,
        session: int,
        first_step: int = 1,
        *,
        ending: str = "",
        settings: str = "",
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        self.folder = model_dir / "logs" / f"session_{session}" / "train"
        # Not by its SummaryWriter, whose thread prints a traceback where the disk is full.
        self._file: BinaryIO = self._guarded(lambda: self._create(ending))
        self._flushed_at = time.monotonic()
        self._means = Means()
        began = SessionLog(status=SessionLog.START)
        self._guarded(lambda: self._add(file_version="brain.Event:2"))
        self._guarded(lambda: self._add(step=first_step, session_log=began))
        self._pictured_at: dict[str, int] = {}
        if settings:
            self._write_settings(settings, first_step)

    def scalars(self, values: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Record the values of one iteration, as `Log.scalars`."""
        now = time.time() if wall_time is None else wall_time
        # What belongs to a save is written at once, after the iterations before it.
        if ITERATION not in values:
            self._write_means()
            self._write(values, step, now)
        else:
            self._means.add(values, step, now)
            # Early iterations, where most happens, keep an event each.
            if self._means.count >= step // _FINENESS:
                self._write_means()
        if time.monotonic() - self._flushed_at >= _SECONDS_BETWEEN_FLUSHES:
            self._flush()

    def picture(self, name: str, encode: Encode, step: int) -> None:
        """Record a picture of a save, unless one is there of nearly as many iterations."""
        if step < _PICTURE_FACTOR * self._pictured_at.get(name, 0):
            return
        self._pictured_at[name] = step
        jpeg, (width, height) = encode()
        image = self._summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=jpeg
        )
        entry = self._summary.Value(tag=name, image=image)
        self._guarded(lambda: self._add(step=step, summary=self._summary(value=[entry])))

    def flush(self) -> None:
        """Hand everything to the disk."""
        self._write_means()
        self._flush()

    def close(self) -> None:
        """Flush, and release the file."""
        # The file is let go of even where the disk refuses the last of it.
        try:
            self._write_means()
        finally:
            self._guarded(self._file.close)

    def _write_settings(self, settings: str, step: int) -> None:
        """Record settings as TensorBoard's page of texts shows them, in Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        summary = text_pb("settings", f"```\n{settings}```")
        self._guarded(lambda: self._add(step=step, summary=summary))

    def _write_means(self) -> None:
        means, self._means = self._means, Means()
        if means.count:
            self._write(means.values(), means.step, means.wall_time)

    def _write(self, values: dict[str, float], step: int, wall_time: float) -> None:
        # All values in one event: as events of their own they would take some times the bytes.
        entries = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = self._summary(value=entries)
        self._guarded(lambda: self._add(wall_time, step=step, summary=summary))

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        self._guarded(self._file.flush)

    def _create(self, ending: str) -> BinaryIO:
        """A new file with a name that TensorBoard knows and reads after earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The clock of the machine may stand still or go back; no two files may have one name.
        parts = (f"{int(time.time()):010d}", socket.gethostname(), os.getpid(), time.monotonic_ns())
        name = ".".join(map(str, ("events.out.tfevents", *parts))) + ending
        # New in any case: two processes must not write into one another's records.
        return (self.folder / name).open("xb")

    def _add(self, wall_time: float | None = None, **fields: Any) -> None:
        now = time.time() if wall_time is None else wall_time
        self._file.write(_record(self._event(wall_time=now, **fields).SerializeToString()))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise LogError(
                f"cannot write logs to {self.folder}: {error.strerror or error}; free space or "
                "make it writable, or start again with --no-logs"
            ) from error


def _record(content: bytes) -> bytes:
    """Frame an event as TensorFlow's files of records have it: length, checksum, content, checksum.

    TensorBoard's own writer takes the checksums byte by byte in Python and holds the interpreter
    meanwhile: 0.36 s for a MB (measured), a pause of training wherever a preview is kept.
    """
    length = struct.pack("<Q", len(content))
    return b"".join([length, _masked_crc(length), content, _masked_crc(content)])


def _masked_crc(content: bytes) -> bytes:
    """CRC-32C, rotated and shifted by a constant, as the format wants it."""
    crc = google_crc32c.value(content)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def open_log(
    model_dir: Path, session: int, *, enabled: bool, first_step: int = 1, settings: str = ""
) -> Log:
    """Destination of this session's scalars; settings: as `TensorBoardLog` takes them."""
    if not enabled:
        return NullLog()
    return TensorBoardLog(model_dir, session, first_step, settings=settings)
