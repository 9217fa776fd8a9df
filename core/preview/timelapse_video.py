"""A film of the pictures that a time-lapse has left."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..checkpoint.known_paths import KnownPaths
from ..checkpoint.model_folder import ModelFolder
from ..checkpoint.state import TrainingState
from ..system.durable_files import checked_output, folder_beside, sync_file
from ..system.output import silent_libraries
from ..system.printable import plural
from .files import read_jpeg

_MPEG4 = cv2.VideoWriter.fourcc(*"mp4v")
_USUAL_FPS, _HIGHEST_FPS = 25.0, 60.0
_LEAST_SECONDS, _MOST_SECONDS = 5.0, 20.0
"""Length of a film whose rate is chosen: long enough to see something, short enough to be seen."""

_NAME = re.compile(r"(\d{1,12})(?:-(\d{1,6}))?\.jpg")


@dataclass(frozen=True)
class Film:
    """A film that was made."""

    path: Path
    num_pictures: int
    num_passed_over: int
    """Pictures that there was no time for."""

    fps: float
    seconds: float
    width_px: int
    height_px: int
    unreadable: list[Path]
    """Pictures that were left out."""


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a time-lapse, in order of time.

    Args:
        folder: A folder of them, or that of a model that was trained with a time-lapse.

    Raises:
        ValueError: There are none, or there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give a model's, or one of time-lapse pictures")
    for place in _places(folder):
        named = [(_NAME.fullmatch(path.name), path) for path in place.iterdir()]
        # The first picture of a second has no number of its own.
        dated = [(int(name[1]), int(name[2] or 1), path) for name, path in named if name]
        if dated:
            # By the numbers: as text, `9.jpg` would follow `10.jpg`.
            return [path for _, _, path in sorted(dated)]
    raise ValueError(
        f"{folder} holds no time-lapse: train with --timelapse-input-a and --timelapse-input-b, or "
        "give the folder of its pictures (<seconds>.jpg)"
    )


def _places(folder: Path) -> Iterator[Path]:
    """The folders where a time-lapse may be."""
    for place in (*_named_places(folder), folder / "timelapse", folder):
        if os.path.isdir(place):  # false, too, of a name that no disk can hold
            yield place


def _named_places(folder: Path) -> Iterator[Path]:
    """Folders where the sessions of a model have put their pictures, the latest first; what its
    folder names counts only where it is known to this user."""
    if not (folder / "generations").is_dir():
        return
    # Read only, without the lock: a film may be wanted while its model trains.
    with ModelFolder(folder, read_only=True) as opened:
        values = opened.newest_state()
    if values is None:
        return
    state = TrainingState.from_dict(values)
    known = KnownPaths(folder, state.run_id)
    for session in reversed(state.sessions):
        # In a folder from elsewhere any value may stand there.
        preview = session.settings.get("preview")
        place = preview.get("timelapse_output") if isinstance(preview, dict) else None
        if isinstance(place, str) and place and known.trust("preview.timelapse_output", place):
            yield Path(place)


def make_film(
    pictures: list[Path],
    output: Path,
    *,
    fps: float | None = None,
    last_seconds: float = 0.0,
    force: bool = False,
) -> Film:
    """Write an MPEG-4 film of the pictures; it has its name only once it is whole.

    All have the size of the first one; others are scaled to fit, on black.

    Args:
        pictures: JPEG files, in order.
        output: The film, a name in .mp4.
        fps: Pictures in a second; None: so many that the film lasts 5 to 20 s, up to 60, and
            evenly chosen pictures where that is not enough.
        last_seconds: How much longer the last picture stays.
        force: Put it in the place of an older one, too.

    Raises:
        ValueError: No picture can be read, or the film cannot be written.
    """
    unreadable: list[Path] = []
    shown = pictures if fps else _chosen(pictures)
    images = _readable(shown, unreadable)
    first = next(images, None)
    if first is None:
        which = plural(len(shown), "picture")
        raise ValueError(f"none of {len(shown)} {which} can be read, {shown[0]} the first")
    least_seconds = 0.0 if fps else _LEAST_SECONDS
    fps = fps or _rate(len(shown))
    height_px, width_px = _even(first).shape[:2]
    fitted = (_fitted(image, width_px, height_px) for image in itertools.chain([first], images))
    frames = _lasting(fitted, round(least_seconds * fps), round(last_seconds * fps))
    try:
        num_frames = _write(output, frames, fps, (width_px, height_px), force=force)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from error
    return Film(
        output,
        len(shown) - len(unreadable),
        len(pictures) - len(shown),
        round(fps, 3),
        num_frames / fps,
        width_px,
        height_px,
        unreadable,
    )


def _lasting(frames: Iterator[np.ndarray], num_least: int, num_more: int) -> Iterator[np.ndarray]:
    """Yield frames, and the last one again: until there are so many, and so many more times."""
    num_frames = 0
    for frame in frames:
        yield frame
        num_frames += 1
    # Those that could not be read may have left it too short.
    yield from itertools.repeat(frame, max(num_least - num_frames, 0) + num_more)


def _write(
    output: Path,
    frames: Iterator[np.ndarray],
    fps: float,
    size_px: tuple[int, int],
    *,
    force: bool,
) -> int:
    """Write a film of frames of one size, width and height; how many there were.

    Raises:
        ValueError: The disk is full.
        OSError: The disk refuses in another way.
    """
    # OpenCV writes to a name in .mp4 only: apart, so that a part never has the film's.
    with (
        checked_output(output, force=force) as temporary,
        folder_beside(output.resolve()) as folder,
    ):
        part = folder / "film.mp4"
        writer = cv2.VideoWriter(str(part), _MPEG4, fps, size_px)
        num_frames = 0
        for frame in frames:
            writer.write(frame)
            num_frames += 1
        # Only now is the index written; before, the file is no film.
        writer.release()
        if _num_frames(part) != num_frames:
            raise ValueError(
                f"{output} cannot be written; check the free space in {output.parent}, where it is "
                "made"
            )
        # Before it has its name, which after a crash would else lead to a part of it.
        sync_file(part)
        os.rename(part, temporary)
    return num_frames


def _num_frames(film: Path) -> int:
    """Frames of a film that OpenCV has written: it does not say when a disk is full."""
    with silent_libraries():
        return int(cv2.VideoCapture(str(film)).get(cv2.CAP_PROP_FRAME_COUNT))


def _rate(num_pictures: int) -> float:
    """Pictures in a second with which a film lasts 5 to 20 s: 25 where that is possible."""
    seconds = min(max(num_pictures / _USUAL_FPS, _LEAST_SECONDS), _MOST_SECONDS)
    return num_pictures / seconds


def _chosen(pictures: list[Path]) -> list[Path]:
    """Choose as many pictures as a film of 20 s can show, evenly spread, both ends among them."""
    most = round(_HIGHEST_FPS * _MOST_SECONDS)
    if len(pictures) <= most:
        return pictures
    places = np.linspace(0, len(pictures) - 1, most).round().astype(int)
    return [pictures[place] for place in places]


def _readable(pictures: list[Path], unreadable: list[Path]) -> Iterator[np.ndarray]:
    """Read each picture, (H, W, 3) BGR uint8; those that cannot be read go into the list."""
    for path in pictures:
        read = read_jpeg(path)
        if read is None:
            # One picture that a crash has cut must not cost the film.
            unreadable.append(path)
        else:
            yield read[0]


def _even(image: np.ndarray) -> np.ndarray:
    """Drop a row or column where their number is odd, which MPEG-4 cannot hold."""
    height_px, width_px = image.shape[:2]
    return image[: height_px - height_px % 2, : width_px - width_px % 2]


def _fitted(image: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """A picture in the size of the film: cut as the first one, or scaled to fit on black."""
    cut = _even(image)
    if cut.shape[:2] == (height_px, width_px):
        return cut
    scale = min(width_px / image.shape[1], height_px / image.shape[0])
    fit_px = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    # Linear would skip pixels where it shrinks, and flicker from picture to picture.
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(image, fit_px, interpolation=how)
    frame = np.zeros((height_px, width_px, 3), np.uint8)
    top, left = (height_px - fit_px[1]) // 2, (width_px - fit_px[0]) // 2
    frame[top : top + fit_px[1], left : left + fit_px[0]] = small
    return frame
