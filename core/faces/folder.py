"""One side's faces: every face PNG of a folder with its header and alignment, sorted by name.

A folder may come from a stranger, and hold links: a set of faces is often put together of links to
files elsewhere. So links to files are followed. They are only read, as pictures, and what is no
face is refused by its first bytes. Links to folders are not followed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..paths import expanded
from .geometry import Alignment, align
from .png import FaceFileError, FaceHeader, read_header

MINIMUM_FACES = 25
_NUM_NAMED = 3


@dataclass
class Face:
    """A usable face: its file, the edge of its picture, its header and its alignment."""

    path: Path
    edge_px: int
    header: FaceHeader
    alignment: Alignment


@dataclass(frozen=True)
class Rejected:
    """A file that cannot be used, and why (one line without the path)."""

    path: Path
    reason: str


@dataclass
class FaceFolder:
    """The faces of a folder, sorted by file name, and the files that are none."""

    path: Path
    faces: list[Face]
    rejected: list[Rejected] = field(default_factory=list)


def read_folder(
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    minimum: int = MINIMUM_FACES,
    side: str | None = None,
    most: int | None = None,
) -> FaceFolder:
    """The faces of a folder; sub-folders and files that are not named .png are passed over.

    strict: refuse the folder at the first file that is no usable face. minimum: faces that a side
    needs; with 0 a folder without any comes back too. side: "a" or "b", for the texts. most: faces
    after which the rest of the folder is not read.
    Raises ValueError, one line, where the folder is missing, holds no faces or too few.
    """
    folder = expanded(path)
    files = list_pictures(folder, side=side)
    faces: list[Face] = []
    rejected: list[Rejected] = []
    for file in files:  # threads would only wait for each other: this is Python's own work
        result = _read(file)
        if isinstance(result, Face):
            faces.append(result)
            if len(faces) == most:
                break
            continue
        if strict:
            raise ValueError(f"{result.path}: {result.reason}")
        rejected.append(result)
    if len(faces) < minimum:
        raise ValueError(_too_few(folder, faces, rejected, minimum, side))
    return FaceFolder(folder, faces, rejected)


def list_pictures(path: str | os.PathLike[str], *, side: str | None = None) -> list[Path]:
    """The .png files of a folder, sorted by name; links to files count, sub-folders do not.

    Raises ValueError, one line, where there is no such folder or no such file in it.
    """
    folder = expanded(path)
    name = _name(folder, side)
    if not folder.exists():
        raise ValueError(f"{name} does not exist: give the folder that holds the face PNGs")
    if not folder.is_dir():
        raise ValueError(f"{name} is a file: give the folder that holds the face PNGs")
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_picture(entry)]
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    if not names:
        raise ValueError(f"{name} holds no PNG: give the folder that holds the face PNGs")
    return [folder / file for file in sorted(names)]


def overlap(folder_a: str | os.PathLike[str], folder_b: str | os.PathLike[str]) -> str | None:
    """How two folders share faces, in words; None where they do not.

    They share them where they are one folder, where one lies inside the other, or where files of
    both are one file by another name (links).
    """
    path_a, path_b = (expanded(path).resolve() for path in (folder_a, folder_b))
    if path_a == path_b:
        return f"both use the folder {path_a}"
    for inner, outer in ((path_a, path_b), (path_b, path_a)):
        if outer in inner.parents:
            return f"{inner} lies inside {outer}"
    shared = set(_file_numbers(path_a)) & set(_file_numbers(path_b))
    if shared:
        return f"{path_a} and {path_b} share {len(shared)} files"
    return None


def _file_numbers(folder: Path) -> Iterator[tuple[int, int]]:
    """Device and number of each picture: the same for every name of one file."""
    for path in list_pictures(folder):
        found = path.stat()
        yield found.st_dev, found.st_ino


def _is_picture(entry: os.DirEntry[str]) -> bool:
    if not entry.name.lower().endswith(".png") or entry.name.startswith("."):
        return False
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _read(path: Path) -> Face | Rejected:
    try:
        edge_px, header = read_header(path)
    except FaceFileError as error:
        return Rejected(path, str(error))
    alignment = align(header.landmarks_l2)
    if not all(np.isfinite(offset).all() for offset in alignment.offsets.values()):
        return Rejected(path, "has landmarks that fit no head: extract the face again")
    return Face(path, edge_px, header, alignment)


def _name(folder: Path, side: str | None) -> str:
    return f"side {side.upper()}: {folder}" if side else str(folder)


def _too_few(
    folder: Path, faces: list[Face], rejected: list[Rejected], minimum: int, side: str | None
) -> str:
    """The one line that says why a folder is refused, and what to do."""
    name = _name(folder, side)
    reasons = [f"{file.path.name}: {file.reason}" for file in rejected[:_NUM_NAMED]]
    more = len(rejected) - len(reasons)
    tail = "; ".join(reasons) + (f"; and {more} more" if more > 0 else "")
    if not faces:
        return (
            f"{name}: its {len(rejected)} PNGs are not extracted faces: extract faces from the "
            f"pictures first and give the folder they were written to ({tail})"
        )
    unusable = f", {len(rejected)} files are unusable ({tail})" if rejected else ""
    return (
        f"{name} contains fewer than {minimum} usable faces ({len(faces)}){unusable}: extract more "
        "faces, at least 500 varied ones for a good result"
    )
