"""A film as one file that is read: its frames as they are shown, with their times.

PyAV, which brings FFmpeg's libraries, reads it. Only this one file is opened: a playlist that names
others, or places in a network, is refused by FFmpeg's whitelist.
"""

import importlib
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..system.requirements import install_command
from .frames import Frame

_WHITELIST = {"protocol_whitelist": "file"}
SCALING = 4 | 0x2000 | 0x4000 | 0x40000
"""Flags of FFmpeg's scaler for colours: cubic, at full width, and rounded, not cut off. There and
back they change a level by 0.1 in the mean; the default darkens by 1.1 each time."""


def library() -> ModuleType:
    """Module of PyAV; ValueError where it is not installed."""
    try:
        # Loaded when a video is met: it is an extra, and folders of pictures need none of it.
        return importlib.import_module("av")
    except ImportError as error:
        raise ValueError(
            f"videos need PyAV, which cannot be loaded ({error}); "
            f"`{install_command('mien[film]')}`, or give and write folders of pictures"
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
                # The form of almost all films, where a damaged header does not tell.
                self.pix_fmt: str = context.pix_fmt or "yuv420p"
                self.is_deep = context.format is not None and context.format.components[0].bits > 8
                self.color = {
                    name: getattr(context, name)
                    for name in ("colorspace", "color_range", "color_primaries", "color_trc")
                }
                # PyAV 19 has a rational of its own, which does less than a fraction.
                self.pixel_aspect = Fraction(context.sample_aspect_ratio or 1)
                # 25 is as good as any where there is none: the times come from the frames.
                self.rate = Fraction(stream.average_rate or 25)
                self.time_base = Fraction(stream.time_base or 1 / self.rate)
                # Not every container says how many there are; packets are counted without decoding.
                self.num_frames: int = stream.frames or sum(
                    1 for packet in container.demux(stream) if packet.size
                )
        except library().FFmpegError as error:
            raise self._unreadable(error) from None
        if not self.num_frames:
            raise ValueError(f"{path} holds no frames")

    def open(self) -> Any:
        """The container, to be closed by its context."""
        return library().open(str(self.path), options=_WHITELIST)

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
                # Whole frames side by side: FFmpeg's default, by slices, finds none in most films.
                stream.thread_type = "AUTO"
                for number, frame in enumerate(container.decode(stream), self.first_number):
                    if frame.rotation % 90:
                        raise ValueError(
                            f"{self.path} is to be shown turned by {frame.rotation} degrees, which "
                            "is no quarter turn: turn its frames upright first"
                        )
                    # Turned into BGR on the thread that needs it: this one has the decoding to do.
                    read = partial(_picture, frame, is_deep=self.is_deep)
                    yield Frame(self._stem(number), read, decoded=frame)
        except library().FFmpegError as error:
            raise self._unreadable(error) from None

    def _stem(self, number: int) -> str:
        return f"{self.path.stem}_{number:06d}"

    def _unreadable(self, error: Exception) -> ValueError:
        reason = getattr(error, "strerror", None) or error
        return ValueError(f"{self.path} cannot be read as a video: {reason}")


def _picture(frame: Any, *, is_deep: bool) -> np.ndarray:
    """A decoded frame upright, (H, W, 3) BGR uint8, or uint16 where it is deeper."""
    image = frame.to_ndarray(format="bgr48le" if is_deep else "bgr24", interpolation=SCALING)
    # OpenCV paints into it and takes no view with strides below nought.
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
