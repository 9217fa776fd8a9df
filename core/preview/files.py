"""Files of previews: written whole or not at all, and read as what a stranger may have made."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..faces.png_pixels import encode_rgb
from ..system.durable_files import DamagedError, read_regular, replace_file, write_output
from ..system.image_text import COMMENT, commented, labelled
from ..system.output import silent_libraries

LONGEST_PX = 8190
"""Edge of a frame: the even number below what MPEG-4 counts in 13 bits."""

_MOST_PIXELS = 1 << 28
"""Pixels of a picture: 16 faces of the largest model, with what is around them, take fewer."""

_MOST_PROGRESSIVE = 1 << 25
"""Pixels of a picture whose decoder holds all of it at once, in 6 bytes each."""

# Bounds for a file that may be a stranger's.
_MOST_BYTES = 64 << 20
_MOST_SEGMENTS = 1000
_BASELINE, _EXTENDED, _PROGRESSIVE = b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"
_READ_AS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""How a JPEG is decoded, by what its edges are divided by on the way."""

_SHARP = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
"""Colours as sharp as brightness, since a tile may have only 64 px."""


def save_picture(path: Path, image: np.ndarray, flag: str) -> None:
    """Write a picture where a user has named it, as a PNG or JPEG by its ending.

    Args:
        path: The file; an older one is replaced.
        image: (H, W, 3) uint8 BGR.
        flag: The flag that has named it.

    Raises:
        ValueError: The ending is of neither, or the disk refuses; one line.
    """
    kind = path.suffix.lower()
    if kind not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{flag} must end in .png or .jpg, got {path}")
    try:
        write_output(path, cv2.imencode(kind, image)[1].tobytes(), force=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from None


def save_png(path: str | Path, image: np.ndarray, text: str) -> None:
    """Write ``image`` as a PNG; a reader sees the old file or the whole new one, never a part.

    Args:
        path: The file.
        image: (H, W, 3) uint8 BGR.
        text: What the picture says about itself.

    Raises:
        ValueError: The image is none that a PNG can hold.
        OSError: The folder cannot be written to.
    """
    replace_file(Path(path), encoded_png(image, text))


def save_jpeg(path: str | Path, image: np.ndarray, text: str) -> None:
    """Write the same as a JPEG: a tenth of the size."""
    replace_file(Path(path), encoded_jpeg(image, text))


def encoded_jpeg(image: np.ndarray, text: str) -> bytes:
    """The content of a JPEG; ValueError where it can hold no such image."""
    _check(image)
    return commented(cv2.imencode(".jpg", image, _SHARP)[1].tobytes(), text)


def encoded_png(image: np.ndarray, text: str) -> bytes:
    """The content of a PNG; ValueError where it can hold no such image."""
    _check(image)
    # Not by OpenCV, which takes three times as long for a file that is larger by a fourth.
    return labelled(encode_rgb(image), text)


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")


def read_jpeg(path: Path) -> tuple[np.ndarray, str] | None:
    """The picture in a plain JPEG file, (H, W, 3) BGR uint8, and its comment; None: there is none.

    One that is wider or higher than a film can be is halved as it is decoded. A header that asks
    for more memory than any preview takes is not followed.
    """
    try:
        content = read_regular(path, _MOST_BYTES)
    except (DamagedError, OSError):
        return None
    segments = list(_segments(content))
    # Read before the pixels are: a header costs nothing, and decides whether any are decoded.
    comments = [body for marker, body in segments if marker == COMMENT]
    read_as = next((_read_as(*segment) for segment in segments if _is_frame(segment[0])), None)
    if read_as is None:
        return None
    try:
        # What a library prints of a damaged file is not for the terminal.
        with silent_libraries():
            image = cv2.imdecode(np.frombuffer(content, np.uint8), read_as)
    except cv2.error:
        return None
    comment = comments[0].decode(errors="replace") if comments else ""
    return None if image is None else (image, comment)


def _segments(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Marker and body of each segment of a JPEG up to its frame: of the first ones, if many."""
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    for _ in range(_MOST_SEGMENTS):
        marker, length = content[at : at + 2], int.from_bytes(content[at + 2 : at + 4])
        # A length counts its own two bytes; less would make no headway.
        if marker[:1] != b"\xff" or length < 2:
            return
        yield marker, content[at + 4 : at + 2 + length]
        if _is_frame(marker):
            return
        at += 2 + length


def _is_frame(marker: bytes) -> bool:
    return marker in (_BASELINE, _EXTENDED, _PROGRESSIVE)


def _read_as(marker: bytes, body: bytes) -> int | None:
    """How OpenCV is to decode a frame by its header, of which it takes the size; None: not at
    all."""
    height_px, width_px = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    most = _MOST_PROGRESSIVE if marker == _PROGRESSIVE else _MOST_PIXELS
    if not 0 < height_px * width_px <= most:
        return None
    longest_px = max(height_px, width_px)
    return next((how for by, how in _READ_AS.items() if longest_px <= by * LONGEST_PX), None)
