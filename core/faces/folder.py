"""One side's faces: every face PNG of a folder with its landmarks and alignment, sorted by name.

A folder may come from a stranger, and hold links: a set of faces is often put together of links to
files elsewhere. So links to files are followed. They are only read, as pictures, and what is no
face is refused by its first bytes. Links to folders are not followed.

Of a header only what every training needs is held; a stored mask is read again when it is asked
for. So faces take the same memory whatever their files hold.

Letters: l = landmark (68), 2 = (x, y).
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..system.paths import expanded
from .geometry import PADDING_RATIO, Alignment, Crop, CropBox, align, crop_box
from .listing import PassedOver, list_pictures, name_of, passed_over
from .masks import named_mask
from .png import (
    FIRST_HEAD_VERSION,
    FaceFileError,
    FaceHeader,
    NotExtractedError,
    StoredMask,
    read_header,
)

MINIMUM_FACES = 25
_UNEVEN = 5
_NUM_NAMED = 3


@dataclass
class Face:
    """A usable face: its file, and what of its header training needs.

    landmarks_l2: (68, 2) float32, px of the source frame. version: alignments version of its
    extraction, None where the file tells none. size_and_time: bytes of the file, and when it was
    changed in ns, just before it was read.
    """

    path: Path
    edge_px: int
    landmarks_l2: np.ndarray
    alignment: Alignment
    version: float | None = None
    size_and_time: tuple[int, int] = (0, 0)

    @property
    def centering(self) -> str:
        """What the picture shows: the head crop, or the legacy crop of versions before 2.0."""
        is_legacy = self.version is not None and self.version < FIRST_HEAD_VERSION
        return "legacy" if is_legacy else "head"

    def crop_box(self, crop: Crop) -> CropBox:
        """The square of its picture that the crop is made of."""
        return crop_box(self.alignment, self.edge_px, crop, self.centering)

    def stored_mask(self, name: str) -> StoredMask:
        """The mask of that name, read from the file again.

        Raises FaceFileError where there is none to be used.
        """
        return named_mask(read_header(self.path)[1], name)


@dataclass(frozen=True)
class Rejected:
    """A file that cannot be used, and why (one line without the path)."""

    path: Path
    reason: str
    is_extracted: bool = True
    """Extraction wrote it, as far as can be seen."""


@dataclass
class FaceFolder:
    """The faces of a folder, sorted by file name, the files that are none, and what else it has."""

    path: Path
    faces: list[Face]
    rejected: list[Rejected] = field(default_factory=list)
    passed_over: PassedOver = field(default_factory=PassedOver)


def read_folder(
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    minimum: int = MINIMUM_FACES,
    side: str | None = None,
    most: int | None = None,
    centering: str | None = None,
    found: Callable[[Face], None] | None = None,
) -> FaceFolder:
    """The faces of a folder; sub-folders and files that are not named .png are passed over.

    strict: refuse the folder at the first file that is no usable face. minimum: faces that a side
    needs; with 0 a folder without any comes back too. side: "a" or "b", for the texts. most: faces
    after which the rest of the folder is not read. centering: of the crop that they are for; None
    for none, then pictures of any kind come back. found: called with each face when it is read.
    Raises ValueError, one line, where the folder is missing, holds no faces or too few, or faces
    that show another crop.
    """
    folder = expanded(path)
    files = list_pictures(folder, side=side)
    faces: list[Face] = []
    rejected: list[Rejected] = []
    for file in files:  # threads would only wait for each other: this is Python's own work
        result = _read(file)
        if isinstance(result, Face):
            faces.append(result)
            if found:
                found(result)
            if len(faces) == most:
                break
            continue
        if strict:
            raise ValueError(f"{result.path}: {result.reason}")
        rejected.append(result)
    if len(faces) < minimum:
        raise ValueError(_too_few(folder, faces, rejected, minimum, side))
    if centering is not None:
        _check_versions(name_of(folder, side), faces, centering)
    return FaceFolder(folder, faces, rejected, passed_over(folder))


def read_face(path: Path) -> tuple[Face, FaceHeader]:
    """A face, and all that its header says.

    Raises FaceFileError where the file is no usable face.
    """
    size_and_time = _size_and_time(path)
    edge_px, header = read_header(path)
    alignment = align(header.landmarks_l2)
    if not all(np.isfinite(offset).all() for offset in alignment.offsets.values()):
        raise FaceFileError("has landmarks that fit no head: extract the face again")
    face = Face(path, edge_px, header.landmarks_l2, alignment, header.version, size_and_time)
    return face, header


def native_px(face: Face) -> float:
    """Width of the picture in px of the source."""
    px_per_unit = 1.0 / float(np.hypot(*face.alignment.matrix_23[:, 0]))
    return px_per_unit / (1.0 - PADDING_RATIO[face.centering])


def named(rejected: Sequence[Rejected]) -> str:
    """The first of the files with their reasons, and how many more there are, in one line."""
    some = rejected[:_NUM_NAMED]
    parts = [
        f"{', '.join(file.path.name for file in alike)}: {reason}"
        for reason, alike in itertools.groupby(some, key=lambda file: file.reason)
    ]
    more = len(rejected) - len(some)
    return "; ".join([*parts, f"and {more} more"] if more else parts)


def skipped(rejected: Sequence[Rejected], kind: str = "") -> str:
    """What to say of files of one folder that cannot be used, in one line; kind: what they are."""
    which = f", {kind}" if kind else ""
    if len(rejected) == 1:
        return f"skipped {rejected[0].path}{which}: {rejected[0].reason}"
    folder = rejected[0].path.parent
    return f"skipped {len(rejected)} files of {folder}{which}: {named(rejected)}"


def uneven(name_a: str, count_a: int, name_b: str, count_b: int) -> str | None:
    """What to say of sides of very different numbers of faces; None where they are near enough."""
    (small, smaller), (large, larger) = sorted(((count_a, name_a), (count_b, name_b)))
    if not small or large <= _UNEVEN * small:
        return None
    return (
        f"{larger} has {large} faces and {smaller} {small}: the smaller side is repeated more "
        "often; bring them nearer to each other"
    )


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change of a file; zeros where it is gone, which reading it tells of."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _read(path: Path) -> Face | Rejected:
    try:
        return read_face(path)[0]
    except FaceFileError as error:
        return Rejected(path, str(error), is_extracted=not isinstance(error, NotExtractedError))


def _check_versions(name: str, faces: list[Face], centering: str) -> None:
    """Refuse legacy crops for another crop than that, and such among others, by ValueError."""
    legacy = [face for face in faces if face.centering == "legacy"]
    later = [face for face in faces if face.centering != "legacy"]
    if not legacy:
        return
    first = f"{legacy[0].path.name}: version {legacy[0].version}"
    if later:
        raise ValueError(
            f"{name} mixes {len(legacy)} faces extracted before alignments version "
            f"{FIRST_HEAD_VERSION} ({first}) with {len(later)} of later ones "
            f"({later[0].path.name}: version {later[0].version or 'unknown'}), which show another "
            "crop: put them into folders of their own, or extract all of them again"
        )
    if centering != "legacy":
        raise ValueError(
            f"{name} holds faces extracted before alignments version {FIRST_HEAD_VERSION} "
            f"({first}), which show the legacy crop only, and data.centering is {centering}: "
            "extract the faces again, or begin a model with data.centering=legacy"
        )


def _too_few(
    folder: Path, faces: list[Face], rejected: list[Rejected], minimum: int, side: str | None
) -> str:
    """The one line that says why a folder is refused, and what to do."""
    name, tail = name_of(folder, side), named(rejected)
    if not faces and any(file.is_extracted for file in rejected):
        return f"{name}: none of its {len(rejected)} PNGs can be used ({tail})"
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
