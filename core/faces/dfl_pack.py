"""faceset.pak: the JPEGs of a folder of DeepFaceLab's faces in one file.

    8       version, 1
    8       size of a pickle, which lists the faces
    ...     that pickle
    8 (n+1) where each JPEG begins, from the end of this table on; the last entry is the file's size
    ...     the JPEGs, byte for byte

Numbers are little endian. Each JPEG holds its own metadata, so the pickle is passed over; only the
names of the persons, where a pack holds several, are in the list alone.
"""

import itertools
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from ..system.durable_files import open_for_reading
from ..system.printable import plural
from .dfl_metadata import plain_name
from .dfl_pickle import read_values
from .png import FaceFileError, unreadable

VERSION = 1
# Bounds of a stranger's file. Chosen, unmeasured.
MAX_FACES = 1_000_000
MAX_LIST_BYTES = 256 * 1024**2

_START = struct.Struct("<QQ")
_TABLE_BYTES = 64 * 1024


class Part(NamedTuple):
    """A JPEG in a file: the name it goes by, the file, and which of its bytes it is."""

    path: Path
    file: Path
    begin: int
    size: int


def read_pack(path: Path) -> list[Part]:
    """The JPEGs of a pack, by number.

    Raises FaceFileError, without the path, where it is none or cut short.
    """
    try:
        with open_for_reading(path, follows_links=True) as file:
            size = os.fstat(file.fileno()).st_size
            _, table = _start_of(file, size)
            offsets = _table_from(file, table, size)
    except OSError as error:
        raise unreadable(error) from None
    begin = table + 8 * len(offsets)
    starts = [begin + offset for offset in offsets[:-1]]
    ends = [*starts, size][1:]  # the last entry is no offset
    if any(start > size for start in starts):
        _refuse("has faces that begin behind its end")
    return [
        Part(path / f"{number:06d}.jpg", path, start, end - start)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def read_persons(path: Path, num_faces: int) -> list[str | None]:
    """The person that each face of a pack is of, None where none is named.

    Raises FaceFileError, without the path, where the list cannot be read, is of other faces, or
    names a person who can have no folder.
    """
    try:
        with open_for_reading(path, follows_links=True) as file:
            list_bytes, _ = _start_of(file, os.fstat(file.fileno()).st_size)
            if list_bytes > MAX_LIST_BYTES:
                _refuse(f"has a list of more than {MAX_LIST_BYTES // 1024**2} MiB")
            data = file.read(list_bytes)
    except OSError as error:
        raise unreadable(error) from None
    entries = read_values(data)
    if not isinstance(entries, list) or len(entries) != num_faces:
        _refuse(f"does not list its {num_faces} {plural(num_faces, 'face')}")
    return [_person_of(entry) for entry in entries]


def _start_of(file: BinaryIO, size: int) -> tuple[int, int]:
    """Bytes of the pickle, before which the file stands, and where the table begins."""
    start = file.read(_START.size)
    if len(start) < _START.size:
        _refuse(f"has {size} {plural(size, 'byte')} and is cut short")
    version, list_bytes = _START.unpack(start)
    if version != VERSION:
        _refuse(f"is of version {version}, not {VERSION}")
    if list_bytes > size - _START.size - 8:
        _refuse(f"ends inside its list of faces ({size} bytes)")
    return list_bytes, _START.size + list_bytes


def _table_from(file: BinaryIO, table: int, size: int) -> list[int]:
    """The offsets, and behind them the size of the file, which ends the table."""
    file.seek(table)
    offsets: list[int] = []
    # The number of faces is written nowhere: the table ends at the file's own size.
    while len(offsets) <= MAX_FACES:
        content = file.read(_TABLE_BYTES)
        # Whole numbers only: a pack that was cut short may end within one.
        part = np.frombuffer(content[: len(content) // 8 * 8], "<u8").tolist()
        is_end = size in part
        offsets.extend(part[: part.index(size) + 1] if is_end else part)
        if is_end or not part:
            break
    if not offsets or offsets[-1] != size:
        _refuse("has no end of its table of faces")
    # So that parts do not overlap, and none is empty or longer than the file.
    is_rising = all(one < later for one, later in itertools.pairwise(offsets))
    if not is_rising or (len(offsets) > 1 and offsets[0] != 0):
        _refuse("has a table of faces that does not rise from 0")
    return offsets


def _person_of(entry: Any) -> str | None:
    person = entry.get("person_name") if isinstance(entry, dict) else None
    if person is None:
        return None
    # It becomes a folder: `..` or a slash would lead out of the user's.
    if not isinstance(person, str) or plain_name(person) != person or person.startswith("."):
        shown = person[:80] if isinstance(person, str) else "no text"
        _refuse(f"names a person {shown!r}, which no folder can be named")
    return person


def _refuse(what: str) -> NoReturn:
    raise FaceFileError(f"{what}: copy it again, or unpack it in DeepFaceLab")
