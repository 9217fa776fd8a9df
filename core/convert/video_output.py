"""A film that is written as one file, part by part: a stop at any moment loses one part at most.

The frames of a video are coded by brightness and colour difference. Those without a face go through
as they are decoded; the others are turned into BGR and back by the matrix that the file names.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..system.durable_files import temporary_name
from .frames import Frame
from .video import SCALING, Video, library
from .video_parts import CONTAINERS, EXACT_TIMES, FORMAT, MOST_FRAMES, VideoParts, join

_CODEC = "libx264"
_QUALITY = {"crf": "16", "preset": "medium"}
"""Settings of x264: no loss is seen at 16, where its default is 23."""


@dataclass(frozen=True)
class _Coded:
    """A frame in the video's own colours: its number in the video, and the form of its pixels."""

    number: int
    frame: Any
    pixel_aspect: Fraction


class VideoOutput:
    """A video that is written, or gone on with; it has its name only once it is whole.

    Args:
        path: Name of the file, in one of `CONTAINERS`.
        stems: Stems of all frames that it is to hold, in order.
        source: Video whose times, colours and sound it takes; None of a folder of pictures.
        rate: Frames a second, for such a folder.
        comment: Text that the file says about itself.
        manifest: What decides how the frames look, from `manifest_of`.
        has_sound: Whether it takes the sound.
        force: Put it in the place of an older one, too.

    Raises:
        ValueError: Parts of it are there that were made with something else, or another swap is
            writing it.
        OSError: The folder of the parts cannot be made.
    """

    def __init__(
        self,
        path: Path,
        stems: Sequence[str],
        source: Video | None,
        rate: Fraction,
        comment: str,
        manifest: dict[str, Any],
        *,
        has_sound: bool,
        force: bool = False,
    ) -> None:
        self.path, self._source, self._comment, self._has_sound = path, source, comment, has_sound
        self._force = force
        self._rate = source.rate if source else rate
        self._time_base = source.time_base if source else 1 / self._rate
        self._numbers = {stem: number for number, stem in enumerate(stems)}
        # Into the manifest: parts of another rate or coding cannot be joined to new ones.
        coding = {"fps": str(self._rate), "codec": _CODEC, **_QUALITY, "num_frames": len(stems)}
        self._parts = VideoParts(path, manifest | coding)
        self._part: _Part | None = None
        self._size: tuple[int, int] | None = None

    @property
    def notice(self) -> str:
        """What the user should know of how its parts are held; empty where nothing is unusual."""
        return self._parts.notice

    def num_there(self, stems: Iterable[str]) -> int:
        """Number of these frames that parts held when their folder was opened."""
        return sum(self._parts.holds(self._numbers[stem]) for stem in stems)

    def is_done(self, frame: Frame, has_faces: bool) -> bool:
        """Whether a part that is there holds the frame."""
        return self._parts.holds(self._numbers[frame.stem])

    def encode(self, frame: Frame, image_hwc: np.ndarray | None) -> _Coded:
        """A frame in the video's own colours; may be called from any thread.

        image_hwc: BGR, uint8 or uint16, an alpha channel is dropped; None for a frame as it was.
        """
        decoded = frame.decoded
        coded = self._recoded(frame, image_hwc)
        coded.pict_type = 0  # the encoder chooses, whatever the frame was coded as before
        number = self._numbers[frame.stem]
        if decoded is not None and decoded.pts is not None:
            # The source's own times, which may be uneven: the sound stays with the picture.
            coded.pts, coded.time_base = decoded.pts, decoded.time_base
        else:
            coded.pts, coded.time_base = number, 1 / self._rate
        aspect = self._source.pixel_aspect if self._source else Fraction(1)
        is_turned = decoded is not None and decoded.rotation % 180
        # A quarter turn makes a pixel's width its height.
        return _Coded(number, coded, 1 / aspect if is_turned else aspect)

    def _recoded(self, frame: Frame, image_hwc: np.ndarray | None) -> Any:
        decoded = frame.decoded
        # As it was decoded: a way over BGR and back would change its levels.
        # One that is to be shown turned is turned: the file that is written tells of no turn.
        if image_hwc is None and decoded is not None and not decoded.rotation:
            if decoded.format.name == self._format(decoded.width, decoded.height):
                return decoded
        image_hwc = frame.read() if image_hwc is None else image_hwc
        # Without alpha, which no layout that x264 takes can hold.
        image_hwc = np.ascontiguousarray(image_hwc[..., :3])
        kind = "bgr48le" if image_hwc.dtype == np.uint16 else "bgr24"
        plain = library().VideoFrame.from_ndarray(image_hwc, kind)
        colors = self._source.color if self._source else {}
        return plain.reformat(
            format=self._format(plain.width, plain.height),
            dst_colorspace=colors.get("colorspace"),
            dst_color_range=colors.get("color_range"),
            interpolation=SCALING,
        )

    def put(self, coded: _Coded) -> None:
        """Write the next frame, unless a part that is there holds it.

        Raises:
            ValueError: It has another size than the first one, or the disk refuses.
        """
        # Asked again: the frame may be done over only for the sheet.
        if self._parts.holds(coded.number):
            return
        size = (coded.frame.width, coded.frame.height)
        self._size = self._size or size
        if size != self._size:
            raise ValueError(
                f"frame {coded.number + 1} has {size[0]} x {size[1]} px and those before it "
                f"{self._size[0]} x {self._size[1]}, which a video cannot hold: write a folder of "
                "pictures"
            )
        try:
            if self._part is not None and not self._part.takes(coded.number):
                self._end_part()
            if self._part is None:
                self._part = self._begin_part(coded)
            self._part.write(coded)
        except library().FFmpegError as error:
            raise self._unwritable(error) from None

    def finish(self) -> None:
        """Make one video of the parts, which are removed; nothing where no frame came."""
        try:
            self._end_part()
            # From the disk's names, parts of earlier calls among them.
            files = self._parts.files()
            if not files:
                return
            join(
                files,
                self.path,
                comment=self._comment,
                rate=self._rate,
                time_base=self._time_base,
                sound=self._source if self._has_sound else None,
                force=self._force,
            )
        except library().FFmpegError as error:
            raise self._unwritable(error) from None
        except FileExistsError:
            # It was not there when the film was begun, which may have been hours ago.
            raise ValueError(
                f"{self.path} has come to be meanwhile: move it away and call it again, or add "
                "--force to replace it; nothing is lost"
            ) from None
        self._parts.remove()

    def close(self) -> None:
        """Let go of everything; the frames that were written stay, as a part."""
        with suppress(library().FFmpegError):  # of a full disk, which has been told
            self._end_part()
        if self._part is not None:
            self._part.discard()
        self._parts.close()

    def _begin_part(self, coded: _Coded) -> "_Part":
        stream_settings = {
            "width": coded.frame.width,
            "height": coded.frame.height,
            "pix_fmt": self._format(coded.frame.width, coded.frame.height),
        }
        context_settings = {
            "time_base": self._time_base,
            "sample_aspect_ratio": coded.pixel_aspect,
            **(self._source.color if self._source else {}),
        }
        # By such a name the next call knows, and sweeps, what a kill has left.
        path = temporary_name(self._parts.folder / "part")
        return _Part(path, self._comment, self._rate, stream_settings, context_settings)

    def _end_part(self) -> None:
        if self._part is not None:
            first, last = self._part.finish()
            self._parts.add(self._part.path, first, last)
            self._part = None

    def _format(self, width_px: int, height_px: int) -> str:
        """Layout of the frames: that of the source, if the encoder has it."""
        is_even = width_px % 2 == height_px % 2 == 0
        own = self._source.pix_fmt if self._source else ""
        # Asked of the encoder: which layouts it has depends on how FFmpeg was built.
        known = {each.name for each in library().codec.Codec(_CODEC, "w").video_formats}
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


class _Part:
    """A part that is being coded, under a temporary name."""

    def __init__(
        self,
        path: Path,
        comment: str,
        rate: Fraction,
        stream_settings: dict[str, Any],
        context_settings: dict[str, Any],
    ) -> None:
        self.path = path
        self._first: int | None = None
        self._last = -1
        self._container = library().open(str(path), "w", format=FORMAT, options=EXACT_TIMES)
        self._container.metadata["comment"] = comment
        self._stream = self._container.add_stream(_CODEC, rate=rate, options=_QUALITY)
        for name, value in stream_settings.items():
            setattr(self._stream, name, value)
        for name, value in context_settings.items():
            setattr(self._stream.codec_context, name, value)

    def takes(self, number: int) -> bool:
        """Whether a frame is the next one of this part."""
        # A gap ends the part too: its name gives a first and a last frame, and means all between.
        is_next = number == self._last + 1
        return self._first is None or (is_next and number - self._first < MOST_FRAMES)

    def write(self, coded: _Coded) -> None:
        self._container.mux(self._stream.encode(coded.frame))
        self._first = coded.number if self._first is None else self._first
        self._last = coded.number

    def finish(self) -> tuple[int, int]:
        """Write what the encoder still holds; numbers of the first and the last frame."""
        assert self._first is not None
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._first, self._last

    def discard(self) -> None:
        """Remove it, unfinished."""
        with suppress(library().FFmpegError):
            self._container.close()
        self.path.unlink(missing_ok=True)
