"""The frames of a film as a folder of pictures: PNG, JPEG, TIFF, of 8 or 16 bits.

They are read in the depth that they have, an alpha channel included. A JPEG that says that it is to
be shown turned is turned, as extraction has done before it found the faces.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..faces.png import SIGNATURE, is_complete
from ..faces.png_pixels import decode_rgb
from ..system.durable_files import open_for_reading
from ..system.output import silent_libraries

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Frame:
    """A frame that is read when it is needed.

    stem: its name without an ending. read: gives its picture, (H, W, 3 or 4) uint8 or uint16 BGR,
    the caller's own. path: its file, None in a video. decoded: the frame of PyAV, None of a file.
    """

    stem: str
    read: Callable[[], np.ndarray]
    path: Path | None = None
    decoded: Any = None


class PictureFolder:
    """A folder of frames, sorted by name; links to files count, sub-folders and other files do not.

    Raises:
        ValueError: There is no such folder or no picture in it, or two are called alike.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # `os.scandir` gives the order of the disk, and a film goes by the names of its frames.
            names = sorted(entry.name for entry in os.scandir(folder) if _is_picture(entry))
        except OSError as error:
            raise ValueError(f"{folder} cannot be read: {error.strerror or error}") from None
        if not names:
            raise ValueError(
                f"{folder} holds no frames: give the folder of a film's pictures "
                f"({', '.join(SUFFIXES)}), or a video"
            )
        self.path = folder
        self._files: dict[str, Path] = {}
        for name in names:
            path = folder / name
            # Faces name their frame, and its ending may have changed since.
            twin = self._files.setdefault(path.stem, path)
            if twin is not path:
                raise ValueError(
                    f"{folder} holds {twin.name} and {name}, which faces cannot tell apart: move "
                    "one of them away"
                )

    @property
    def stems(self) -> list[str]:
        """Names of the frames without their endings, in order."""
        return list(self._files)

    def frames(self) -> Iterator[Frame]:
        """The frames, in order."""
        for stem, path in self._files.items():
            yield self.frame(stem, path)

    def frame(self, stem: str, path: Path | None = None) -> Frame:
        """The frame of that name."""
        path = path or self._files[stem]
        # Read on the thread that needs it, and not ahead of it: only a few pictures are in memory.
        return Frame(stem, lambda: read_picture(path), path)


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file, (H, W, 3 or 4) uint8 or uint16 BGR.

    Raises:
        ValueError: It cannot be read, is damaged, or holds numbers that are no levels.
    """
    content = read_bytes(path)
    image = None
    # Only a JPEG says that it is to be turned, which IMREAD_UNCHANGED would not do.
    flags = cv2.IMREAD_COLOR if content.startswith(_JPEG) else cv2.IMREAD_UNCHANGED
    encoded = np.frombuffer(content, np.uint8)
    # The plain 8-bit PNG first: most frames are, and our decoder is the faster one.
    image = decode_rgb(encoded)
    # OpenCV makes a picture of half a PNG, and only prints that it is cut short.
    if image is None and (not content.startswith(SIGNATURE) or is_complete(content)):
        with contextlib.suppress(cv2.error), silent_libraries():
            image = cv2.imdecode(encoded, flags)
    if image is None or not image.size:
        raise ValueError(f"{path} is no picture, or damaged or cut short: make the frame again")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{path} holds {image.dtype}, not levels of 8 or 16 bits: convert it first"
        )
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return image


def read_bytes(path: Path) -> bytes:
    """All of a frame's file; ValueError where it cannot be read."""
    try:
        # Frames of a user's film may be links to a larger disk; a pipe or device is still refused.
        with open_for_reading(path, follows_links=True) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_picture(entry: os.DirEntry[str]) -> bool:
    is_named_so = os.path.splitext(entry.name.lower())[1] in SUFFIXES
    # Not `._frame.png` and the like, which other systems leave beside a file.
    return is_named_so and not entry.name.startswith(".") and entry.is_file()
