"""A video on its way: its parts, each a file of whole groups of pictures, and how they are joined.

A part has its name only once it is whole, and the name says which frames it holds, so that the same
call goes on behind what another has left. In the end the packets of all parts are copied, not coded
anew, into one file, with the sound of the source between them.
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..system.durable_files import checked_output, discard_leftovers, sync_file, sync_folder
from .output import MANIFEST, open_folder
from .video import Video, library

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
"""Formats by the ending of their files' names."""

MOST_FRAMES = 250
"""Frames of a part: as many as x264 puts between two that stand for themselves, so that parts cost
no bytes; a kill loses so many at the most."""

FORMAT = "nut"
"""Container of a part: FFmpeg's own, which holds times at any base."""

EXACT_TIMES = {"avoid_negative_ts": "disabled"}
"""Option of a part: else all times are moved where its packets begin before nought."""

_PART = re.compile(r"(\d{9})-(\d{9})\.nut")


class VideoParts:
    """The folder of a video's parts, beside it, in which `mien_swap.json` says what made them.

    Args:
        video: The video that they become.
        manifest: What decides how its frames look, ready for JSON.

    Raises:
        ValueError: The folder holds something else, or parts that were made with something else;
            or another swap is writing to it.
        OSError: It cannot be made.
    """

    def __init__(self, video: Path, manifest: dict[str, Any]) -> None:
        self.folder = video.with_name(f"{video.name}.parts")
        remedy = "remove it, or give the video another name"
        names, self._lock = open_folder(self.folder, manifest, remedy)
        self.notice = self._lock.notice
        """What the user should know of how the folder is held; empty where nothing is unusual."""

        matches = (_PART.fullmatch(name) for name in sorted(names))
        self._spans = [(int(match[1]), int(match[2])) for match in matches if match]
        # Once, as a set: each frame of a film asks.
        self._there = {number for first, last in self._spans for number in range(first, last + 1)}

    def holds(self, number: int) -> bool:
        """Whether a frame was there when the folder was opened."""
        return number in self._there

    def add(self, part: Path, first: int, last: int) -> None:
        """Give a whole part, which is in the folder, the name of its frames."""
        # First its bytes, then its name: a name that survives a power cut stands for a whole part.
        sync_file(part)
        os.replace(part, self._path(first, last))
        sync_folder(self.folder)
        self._spans.append((first, last))

    def files(self) -> list[Path]:
        """The parts in order; ValueError where one is missing between them, or two overlap."""
        self._spans.sort()
        nexts = [0, *(last + 1 for _, last in self._spans)]
        # Not strict: the last `next` is the end of the film, which no part begins at.
        for (first, _), expected in zip(self._spans, nexts, strict=False):
            if first != expected:
                raise ValueError(
                    f"{self.folder} holds no part that begins at frame {expected} of the video: "
                    "remove it, and begin anew"
                )
        return list(itertools.starmap(self._path, self._spans))

    def remove(self) -> None:
        """Remove the parts and their folder, unless it holds something of the user's."""
        for path in (*itertools.starmap(self._path, self._spans), self.folder / MANIFEST):
            path.unlink(missing_ok=True)
        discard_leftovers(self.folder)
        # Not by `rmtree`: what a user has put there is not ours to remove.
        if not os.listdir(self.folder):
            self.folder.rmdir()

    def close(self) -> None:
        """Let another swap have the folder, which is removed where it holds no part."""
        try:
            if not self._spans:
                self.remove()
        finally:
            self._lock.release()

    def _path(self, first: int, last: int) -> Path:
        return self.folder / f"{first:09d}-{last:09d}.nut"


def join(
    files: list[Path],
    video: Path,
    *,
    comment: str,
    rate: Fraction,
    time_base: Fraction,
    sound: Video | None,
    force: bool,
) -> None:
    """Make one video of parts, whole or not at all.

    Args:
        files: The parts, in order.
        video: The video, whose ending names its format.
        comment: What it says about itself.
        rate: Frames a second, in the mean.
        time_base: Unit of its times, s.
        sound: Video whose sound it takes, copied as it is.
        force: Put it in the place of an older one, too.

    Raises:
        ValueError: The parts are not coded alike.
        FileExistsError: Something has got its name meanwhile.
    """
    with checked_output(video, force=force) as temporary:
        kind = CONTAINERS[video.suffix.lower()]
        with library().open(str(temporary), "w", format=kind) as target:
            target.metadata["comment"] = comment
            _copy_packets(files, target, rate, time_base, sound)
        # Before its name: a power cut must not leave a whole name on half a film.
        sync_file(temporary)


def _copy_packets(
    files: list[Path], target: Any, rate: Fraction, time_base: Fraction, source: Video | None
) -> None:
    """Copy the packets of all parts, and the sound between them."""
    stream = heard = coding = decoding_time = None
    for file in files:
        with _opened(file) as container:
            part = container.streams.video[0]
            if stream is None:
                coding, stream = _coding(part), target.add_stream_from_template(part)
                stream.time_base, stream.codec_context.framerate = time_base, rate
                heard = _Sound(source, target) if source else None
            elif _coding(part) != coding:
                raise ValueError(
                    f"{file} is not coded as the part before it: remove {file.parent}, and begin "
                    "anew"
                )
            for packet in _with_times(container.demux(part), rate):
                # At no constant rate a part's first packets may fall into the part before it.
                packet.dts = max(packet.dts, packet.dts if decoding_time is None else decoding_time)
                decoding_time = packet.dts + round(time_base / packet.time_base)
                if heard:
                    # Before the frame: a player wants both at about the same place of the file.
                    heard.copy(until_s=float(packet.dts * packet.time_base))
                packet.stream = stream
                target.mux(packet)
    if heard:
        heard.copy(until_s=float("inf"))
        heard.close()


def _with_times(packets: Iterator[Any], rate: Fraction) -> Iterator[Any]:
    """The packets with the times at which they are decoded, which are not told of the first ones.

    As many stand before the first frame that is shown as frames are coded ahead of their turn.
    """
    ahead: list[Any] = []
    for packet in packets:
        if packet.size and packet.dts is None:
            ahead.append(packet)
            continue
        for number, early in enumerate(ahead):
            frames = len(ahead) - number
            early.dts = ahead[0].pts - round(frames / (rate * early.time_base))
            yield early
        ahead = []
        if packet.size:  # none has the one that ends the part
            yield packet


def _opened(file: Path) -> Any:
    """A part, to be closed by its context; ValueError where it is damaged."""
    with suppress(library().FFmpegError):
        container = library().open(str(file))
        if container.streams.video:
            return container
    raise ValueError(f"{file} is damaged: remove it, and call it again")


def _coding(stream: Any) -> tuple[int, int, bytes | None]:
    """What all parts of a video have in common: sizes, and the settings of the encoder."""
    context = stream.codec_context
    # The extradata of H.264 holds its parameter sets, of which the joined file has one for all.
    return context.width, context.height, context.extradata


class _Sound:
    """The sound of a video, copied beside the frames of another."""

    def __init__(self, source: Video, target: Any) -> None:
        self._container, self._target = source.open(), target
        streams = self._container.streams.audio
        self._streams = {each: target.add_stream_from_template(each) for each in streams}
        packets = self._container.demux(*self._streams) if self._streams else iter(())
        # Without the empty ones, by which the end of a stream is told.
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
