"""The picture of a face file, decoded to its pixels as they are stored.

A note in the file that it should be shown turned is ignored: the landmarks know nothing of it.
Pictures that are decoded at the same time take no more than `DECODING_BYTES` together, whatever the
number of threads; one that takes more by itself is decoded alone.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..system.durable_files import open_for_reading
from ..system.output import silent_libraries
from . import dfl_jpeg
from .png import FaceFileError, edge_of, is_complete, max_file_bytes, unreadable
from .png_pixels import decode_rgb

DECODING_BYTES = 512 * 1024**2
"""Limit chosen on the CPU: 16 threads at 2048 px."""

_READ_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_BYTES_PER_PIXEL = 6
"""Bytes measured at 16384 px: OpenCV decodes a PNG into a frame of its own, and copies that."""


class _Budget:
    """Bytes that may be taken at the same time."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = self._free = num_bytes
        self._is_changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Take so many, all of them at the most, as soon as they are free; give them back."""
        # A picture larger than all of it is decoded, too, but alone.
        share = min(num_bytes, self._num_bytes)
        with self._is_changed:
            self._is_changed.wait_for(lambda: share <= self._free)
            self._free -= share
        try:
            yield
        finally:
            with self._is_changed:
                self._free += share
                self._is_changed.notify_all()


_budget = _Budget(DECODING_BYTES)


def decoding_bytes(path: Path, edge_px: int, size: int | None = None) -> int:
    """Bytes that the picture takes while it is decoded, those of its file included.

    size: bytes of the file that are the picture; None for all. Raises OSError where there is no
    such file.
    """
    size = os.stat(path).st_size if size is None else size
    return size + _BYTES_PER_PIXEL * edge_px**2


@contextlib.contextmanager
def open_picture(path: Path, edge_px: int) -> Iterator[np.ndarray]:
    """The picture of a face PNG, (N, N, 3) uint8 BGR with N = edge_px, to be used and let go.

    Raises FaceFileError where it is damaged or not of that edge, as one that was replaced since.
    """
    with _read(path, edge_px) as encoded:
        # Against the header that was read earlier: a file may have been replaced meanwhile.
        if edge_of(encoded) != edge_px:
            raise _damaged()
        # The faster way first; it says None of all that it does not know.
        image_bgr = decode_rgb(encoded)
        if image_bgr is None and is_complete(encoded.data):
            image_bgr = _by_opencv(encoded)
        yield _checked(image_bgr, edge_px)


@contextlib.contextmanager
def open_jpeg(path: Path, begin: int, size: int, edge_px: int) -> Iterator[np.ndarray]:
    """The same of a JPEG that is ``size`` bytes of a file, from ``begin`` on."""
    with _read(path, edge_px, begin, size) as encoded:
        jpeg = encoded.tobytes()
        if dfl_jpeg.edge_of(jpeg) != edge_px or not dfl_jpeg.is_complete(jpeg):
            raise _damaged()
        yield _checked(_by_opencv(encoded), edge_px)


@contextlib.contextmanager
def _read(
    path: Path, edge_px: int, begin: int = 0, size: int | None = None
) -> Iterator[np.ndarray]:
    """Bytes of a file, or of a part of it, uint8, and the room to decode them."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_budget.taken(decoding_bytes(path, edge_px, size)))
            file = stack.enter_context(open_for_reading(path, follows_links=True))
            size = os.fstat(file.fileno()).st_size if size is None else size
            file.seek(begin)
            # Bounded: a stranger's file may be as long as the disk. Not by `fromfile`, which
            # keeps Python's lock while it reads.
            encoded = np.empty(min(size, max_file_bytes(edge_px)), np.uint8)
            encoded = encoded[: file.readinto(encoded.data)]
        except OSError as error:
            raise unreadable(error) from None
        # Held until the picture is let go: bytes and pixels are in memory at the same time.
        yield encoded


def _by_opencv(encoded: np.ndarray) -> np.ndarray | None:
    with contextlib.suppress(cv2.error), silent_libraries():
        return cv2.imdecode(encoded, _READ_FLAGS)
    return None


def _checked(image_bgr: np.ndarray | None, edge_px: int) -> np.ndarray:
    if image_bgr is None or image_bgr.shape != (edge_px, edge_px, 3):
        raise _damaged()
    return image_bgr


def _damaged() -> FaceFileError:
    return FaceFileError(
        "the picture is damaged or cut short: copy it again or extract the face again"
    )
