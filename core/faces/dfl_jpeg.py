"""The JPEG that DeepFaceLab keeps a face in: square, with an APP15 segment that holds a pickle.

It is walked segment by segment up to its picture. A file may hold other APP15 segments: one that
begins and ends as a pickle does is taken.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

from ..system.printable import plural
from .dfl_pickle import is_pickle
from .png import MIN_EDGE_PX, FaceFileError, NotExtractedError

# Bounds of a stranger's file; DeepFaceLab's have up to 1024 px, one scan and a few segments.
MAX_EDGE_PX = 4096
MAX_SCANS = 100
MAX_SEGMENTS = 64

_START, _END = b"\xff\xd8", b"\xff\xd9"
_APP15 = 0xEF
# Less the tables of Huffman and arithmetic codes and a reserved marker among them.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# Metadata takes up to 64 KiB; most files need no second read.
_USUAL_HEAD_BYTES = 128 * 1024
_MAX_HEAD_BYTES = MAX_SEGMENTS * 65_537 + 2
_AGAIN = "copy it again or extract the face again"


def read_segments(file: BinaryIO, begin: int, size: int) -> tuple[int, bytes]:
    """Edge in px of a JPEG, and the pickle that it holds; it lies in the file at ``begin``.

    Raises FaceFileError with the reason and the remedy where it is no square JPEG, or has none.
    """
    file.seek(begin)
    # The head alone: a folder of a hundred thousand faces is opened by their metadata.
    jpeg = file.read(min(size, _USUAL_HEAD_BYTES))
    if size > len(jpeg) and not _reaches_scan(jpeg):
        jpeg += file.read(min(size, _MAX_HEAD_BYTES) - len(jpeg))
    frame, data = None, None
    for marker, start, end in _segments(jpeg):
        if marker in _FRAMES:
            frame = jpeg[start:end]
        # The first that is a pickle: other programs may have segments of this kind, too.
        elif marker == _APP15 and data is None and is_pickle(jpeg[start:end]):
            data = jpeg[start:end]
    if data is None:
        raise NotExtractedError(
            "is a JPEG without DeepFaceLab's metadata (APP15): give the aligned faces, as "
            "DeepFaceLab wrote them"
        )
    if frame is None:
        raise FaceFileError(f"has no size before its picture data: {_AGAIN}")
    return _edge_from(frame), data


def edge_of(jpeg: bytes) -> int | None:
    """Edge in px that the start of a JPEG tells, None where it is no square one."""
    with contextlib.suppress(FaceFileError):
        for marker, begin, end in _segments(jpeg):
            if marker in _FRAMES and end - begin >= 6:
                height, width = struct.unpack_from(">HH", jpeg, begin + 1)
                return width if width == height else None
    return None


def is_complete(jpeg: bytes) -> bool:
    """Whether the end of the picture is there: a decoder makes grey of what is missing.

    One of more scans than any program writes is none: each takes the time of the whole picture.
    """
    with contextlib.suppress(FaceFileError):
        *_, (_, begin, _) = _segments(jpeg)  # the last one is the scan
        # Behind the first scan's header: in its data the two bytes never stand next to each other.
        num_scans = 1 + jpeg.count(bytes([0xFF, _START_OF_SCAN]), begin)
        return jpeg.find(_END, begin) >= 0 and num_scans <= MAX_SCANS
    return False


def _reaches_scan(jpeg: bytes) -> bool:
    """Whether all that comes before the picture is there, or will not do anyway."""
    try:
        return bool(list(_segments(jpeg)))
    except NotExtractedError:
        return True
    except FaceFileError:
        return False


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker of each segment, and where its content begins and ends, up to the scan's header.

    Raises FaceFileError where there is none.
    """
    if not jpeg.startswith(_START):
        problem = "is no JPEG" if jpeg else "is empty (0 bytes)"
        raise NotExtractedError(f"{problem}: {_AGAIN}")
    position = len(_START)
    for _ in range(MAX_SEGMENTS):
        while jpeg[position : position + 2] == b"\xff\xff":  # fill
            position += 1
        head = jpeg[position : position + 2]
        position += 2
        length = int.from_bytes(jpeg[position : position + 2], "big")
        end = position + length
        if len(head) == 2 and head[0] != 0xFF:
            raise FaceFileError(f"has no marker where a segment begins: {_AGAIN}")
        if len(head) == 2 and head[1] in _WITHOUT_LENGTH:
            continue
        if head == _END or length < 2 or end > len(jpeg):
            raise FaceFileError(f"ends before its picture: the file is cut short, {_AGAIN}")
        yield head[1], position + 2, end
        if head[1] == _START_OF_SCAN:
            return
        position = end
    raise FaceFileError(f"has more than {MAX_SEGMENTS} segments before its picture: {_AGAIN}")


def _edge_from(frame: bytes) -> int:
    """Edge in px that a frame's header tells."""
    if len(frame) < 6:
        raise FaceFileError(f"has a frame header that is cut short: {_AGAIN}")
    depth, height, width, num_channels = struct.unpack_from(">BHHB", frame)
    if depth != 8 or num_channels not in (1, 3):
        raise FaceFileError(
            f"has {num_channels} {plural(num_channels, 'channel')} of {depth} bits, not 3 of 8: "
            "save it as a usual JPEG"
        )
    if width != height:
        raise FaceFileError(
            f"is {width} x {height} px, not square: extract the face again, do not crop it"
        )
    if not MIN_EDGE_PX <= width <= MAX_EDGE_PX:
        raise FaceFileError(
            f"is {width} px wide, not {MIN_EDGE_PX} to {MAX_EDGE_PX}: extract the face again "
            "at 256 px or more"
        )
    return width
