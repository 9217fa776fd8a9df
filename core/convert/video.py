"""A film as one file: its frames with their times, and its sound, which is copied as it is.

PyAV, which brings FFmpeg's libraries, reads and writes it. Only this one file is opened: a playlist
that names others, or places in a network, is refused by FFmpeg's whitelist.

The frames of a video are coded by brightness and colour difference. Those without a face go through
as they are decoded; the others are turned into BGR and back by the matrix that the file names.
"""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..system.durable_files import discard, sync_file, sync_folder
from .frames import Frame

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
"""Formats by the ending of their files' names."""

_WHITELIST = {"protocol_whitelist": "file"}
_CODEC = "libx264"
_QUALITY = {"crf": "16", "preset": "medium"}
"""Settings of x264: no loss is seen at 16, where its default is 23."""

_SCALING = 4 | 0x2000 | 0x4000 | 0x40000
"""Flags of FFmpeg's scaler for colours: cubic, at full width, and rounded, not cut off. There and
back they change a level by 0.1 in the mean; the default darkens by 1.1 each time."""


def _av() -> ModuleType:
    """Module of PyAV; ValueError where it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ValueError(
            f"videos need PyAV, which cannot be loaded ({error}): pip install 'mien[film]', or "
            "give and write folders of pictures"
        ) from None


class Video:
    """A video that is read, its frames named as extraction names them.

    Raises:
        ValueError: It cannot be read, or holds no frames.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.first_number = path, 1
        try:
            with self.open() as container:
                if not container.streams.video:
                    raise ValueError(f"{path} holds no video")
                stream = container.streams.video[0]
                context = stream.codec_context
                self.pix_fmt: str = context.pix_fmt or "yuv420p"
                self.is_deep = context.format is not None and context.format.components[0].bits > 8
                self.color = {
                    name: getattr(context, name)
                    for name in ("colorspace", "color_range", "color_primaries", "color_trc")
                }
                self.rate: Fraction = stream.average_rate or Fraction(25)
                self.time_base: Fraction = stream.time_base or 1 / self.rate
                # Not every container says how many there are; packets are counted without decoding.
                self.num_frames: int = stream.frames or sum(
                    1 for packet in container.demux(stream) if packet.size
                )
        except _av().FFmpegError as error:
            raise self._unreadable(error) from None
        if not self.num_frames:
            raise ValueError(f"{path} holds no frames")

    def open(self) -> Any:
        """The container, to be closed by its context."""
        return _av().open(str(self.path), options=_WHITELIST)

    @property
    def stems(self) -> list[str]:
        """Names of the frames, in order."""
        numbers = range(self.first_number, self.first_number + self.num_frames)
        return [self._stem(number) for number in numbers]

    def frames(self) -> Iterator[Frame]:
        """The frames, in order."""
        try:
            with self.open() as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for number, frame in enumerate(container.decode(stream), self.first_number):
                    read = partial(_picture, frame, is_deep=self.is_deep)
                    yield Frame(self._stem(number), read, decoded=frame)
        except _av().FFmpegError as error:
            raise self._unreadable(error) from None

    def _stem(self, number: int) -> str:
        return f"{self.path.stem}_{number:06d}"

    def _unreadable(self, error: Exception) -> ValueError:
        reason = getattr(error, "strerror", None) or error
        return ValueError(f"{self.path} cannot be read as a video: {reason}")


def _picture(frame: Any, *, is_deep: bool) -> np.ndarray:
    """A decoded frame upright, (H, W, 3) BGR uint8, or uint16 where it is deeper."""
    image = frame.to_ndarray(format="bgr48le" if is_deep else "bgr24", interpolation=_SCALING)
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))


class VideoOutput:
    """A video that is written; it has its name only once it is whole.

    Args:
        path: Name of the file, in one of `CONTAINERS`.
        source: Video whose times, colours and sound it takes; None of a folder of pictures.
        rate: Frames a second, for such a folder.
        comment: Text that the file says about itself.
        has_sound: Whether it takes the sound.
    """

    def __init__(
        self, path: Path, source: Video | None, rate: Fraction, comment: str, *, has_sound: bool
    ) -> None:
        self.path, self._source = path, source
        self._rate = source.rate if source else rate
        self._time_base = source.time_base if source else 1 / self._rate
        # Beside it, since only there the last rename is one step.
        self._part = path.with_name(f".{path.name}.part")
        self._comment, self._has_sound = comment, has_sound
        self._container: Any = None
        self._sound: _Sound | None = None
        self._numbers = itertools.count()
        discard(self._part)

    def is_done(self, frame: Frame, has_faces: bool) -> bool:
        """Whether the frame needs no more work: of a video none is kept."""
        return False

    def encode(self, frame: Frame, image_hwc: np.ndarray | None) -> Any:
        """A frame in the video's own colours; may be called from any thread.

        image_hwc: BGR, uint8 or uint16, an alpha channel is dropped; None for a frame as it was.
        """
        # As it was decoded: a way over BGR and back would change its levels.
        if image_hwc is None and frame.decoded is not None and not frame.decoded.rotation:
            coded = frame.decoded
            if coded.format.name == self._format(coded.width, coded.height):
                return self._timed(coded, frame)
        image_hwc = frame.read() if image_hwc is None else image_hwc
        image_hwc = np.ascontiguousarray(image_hwc[..., :3])
        kind = "bgr48le" if image_hwc.dtype == np.uint16 else "bgr24"
        plain = _av().VideoFrame.from_ndarray(image_hwc, kind)
        colors = self._source.color if self._source else {}
        coded = plain.reformat(
            format=self._format(plain.width, plain.height),
            dst_colorspace=colors.get("colorspace"),
            dst_color_range=colors.get("color_range"),
            interpolation=_SCALING,
        )
        return self._timed(coded, frame)

    def _timed(self, coded: Any, frame: Frame) -> Any:
        coded.pict_type = 0  # the encoder chooses, whatever the frame was coded as before
        if frame.decoded is not None:
            # The source's own times, which may be uneven: the sound stays with the picture.
            coded.pts, coded.time_base = frame.decoded.pts, frame.decoded.time_base
        else:
            coded.pts = None
        return coded

    def put(self, coded: Any) -> None:
        """Write the next frame.

        Raises:
            ValueError: It has another size than the first one, or the container cannot hold it.
        """
        number = next(self._numbers)
        if coded.pts is None:
            coded.pts, coded.time_base = number, self._time_base
        try:
            if self._container is None:
                self._open(coded.width, coded.height)
            size = (self._stream.width, self._stream.height)
            if (coded.width, coded.height) != size:
                raise ValueError(
                    f"frame {number + 1} has {coded.width} x {coded.height} px and the first one "
                    f"{size[0]} x {size[1]}, which a video cannot hold: write a folder of pictures"
                )
            if self._sound:
                # Before the frame: a player wants both at about the same place of the file.
                self._sound.copy(until_s=float(coded.pts * coded.time_base))
            self._container.mux(self._stream.encode(coded))
        except _av().FFmpegError as error:
            raise self._unwritable(error) from None

    def finish(self) -> None:
        """Write what is left, and give the video its name; nothing where no frame came."""
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode(None))
            if self._sound:
                self._sound.copy(until_s=float("inf"))
            self._container.close()
        except _av().FFmpegError as error:
            raise self._unwritable(error) from None
        # Before its name: a power cut must not leave a whole name on half a film.
        sync_file(self._part)
        os.replace(self._part, self.path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of everything; a part of a video is removed."""
        if self._sound:
            self._sound.close()
        if self._container is not None:
            with suppress(_av().FFmpegError):  # of a full disk, which has been told
                self._container.close()
        discard(self._part)

    def _open(self, width_px: int, height_px: int) -> None:
        kind = CONTAINERS[self.path.suffix.lower()]
        self._container = _av().open(str(self._part), "w", format=kind)
        self._container.metadata["comment"] = self._comment
        self._stream = self._container.add_stream(_CODEC, rate=self._rate, options=_QUALITY)
        self._stream.width, self._stream.height = width_px, height_px
        self._stream.pix_fmt = self._format(width_px, height_px)
        context = self._stream.codec_context
        context.time_base = self._time_base
        for name, value in (self._source.color if self._source else {}).items():
            setattr(context, name, value)
        if self._source and self._has_sound:
            self._sound = _Sound(self._source, self._container)

    def _format(self, width_px: int, height_px: int) -> str:
        """Layout of the frames: that of the source, if the encoder has it."""
        is_even = width_px % 2 == height_px % 2 == 0
        own = self._source.pix_fmt if self._source else ""
        known = {each.name for each in _av().codec.Codec(_CODEC, "w").video_formats}
        if own in known and (is_even or own.startswith("yuv444")):
            return own
        # Halved colours need even sizes.
        plain = "yuv420p" if is_even else "yuv444p"
        return f"{plain}10le" if self._source and self._source.is_deep else plain

    def _unwritable(self, error: Exception) -> ValueError:
        reason = getattr(error, "strerror", None) or error
        return ValueError(
            f"{self.path} cannot be written: {reason}; another ending "
            f"({', '.join(CONTAINERS)}) may hold the sound, or free space"
        )


class _Sound:
    """The sound of a video, copied beside the frames of another."""

    def __init__(self, source: Video, target: Any) -> None:
        self._container, self._target = source.open(), target
        streams = self._container.streams.audio
        self._streams = {each: target.add_stream_from_template(each) for each in streams}
        packets = self._container.demux(*self._streams) if self._streams else iter(())
        self._packets = (packet for packet in packets if packet.dts is not None)
        self._next = next(self._packets, None)

    def copy(self, until_s: float) -> None:
        """Copy what is heard before this time."""
        while self._next is not None and self._next.dts * self._next.time_base <= until_s:
            packet, self._next = self._next, next(self._packets, None)
            packet.stream = self._streams[packet.stream]
            self._target.mux(packet)

    def close(self) -> None:
        self._container.close()
