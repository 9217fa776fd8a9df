"""The faces of a film, each by the frame that it was found in.

A face's file says which frame it was cut out of, and where in it. A frame's name is matched without
its ending: a film may have been turned into pictures, or back, since. Frames of a video have none;
extraction calls them `<video>_<number of six digits>`.

Letters: l = landmark (68), 2 = (x, y) in px of the frame.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blend import LEARNED, NO_MASK
from ..faces.dfl_pack import Part
from ..faces.folder import Face, Rejected, face_sources, read_source, skipped
from ..faces.listing import list_pictures, passed_over
from ..faces.masks import LANDMARK_MASKS
from ..faces.png import FaceFileError, FaceHeader
from ..system.printable import plural

Faces = dict[str, list["PlacedFace"]]
"""Faces by the stem of their frame, in the order in which they were found."""

_NUMBER = re.compile(r".*_(\d{1,9})")
_NUM_NAMED = 3
_MOST_LETTERS = 255
"""Letters of a file's name, on any disk."""


@dataclass(frozen=True)
class PlacedFace:
    """A face and the frame that it was found in.

    stem: name of the frame without its ending. index: number of the face in its frame. frame_px:
    height and width of the frame, None where the file does not tell.
    """

    face: Face
    stem: str
    index: int
    frame_px: tuple[int, int] | None

    def check_size(self, frame_px: tuple[int, int]) -> None:
        """Refuse, by a ValueError, a frame of another size, and a face that is nowhere in it."""
        height_px, width_px = frame_px
        # The exact size: a frame that was scaled since would put each face elsewhere.
        if self.frame_px not in (None, frame_px):
            assert self.frame_px is not None
            raise ValueError(
                f"the frame {self.stem} has {width_px} x {height_px} px, and {self.face.path.name} "
                f"was found in one of {self.frame_px[1]} x {self.frame_px[0]}: give the frames "
                "that the faces were extracted from, in their size"
            )
        landmarks_l2 = self.face.source_landmarks_l2
        inside_l2 = (landmarks_l2 >= 0) & (landmarks_l2 < (width_px, height_px))
        # One landmark inside is enough: faces at the edge of a frame are faces.
        if not inside_l2.all(axis=1).any():
            raise ValueError(
                f"{self.face.path}: all of its landmarks lie outside of its frame {self.stem} of "
                f"{width_px} x {height_px} px: extract the face again, or remove it"
            )


def read_faces(folder: Path, mask: str, warn: Callable[[str], None]) -> Faces:
    """The faces of a folder by the stem of their frame; none of their pictures is decoded.

    Args:
        folder: Faces that extraction wrote, faces of DeepFaceLab, or its pack of them.
        mask: Mask that is needed of each: learned, components, extended, none or a stored one's
            name.
        warn: Called with a line where files are left out.

    Raises:
        ValueError: There is no usable face, or one lies outside of its frame or lacks the mask.
    """
    faces: Faces = {}
    rejected: list[Rejected] = []
    for source in face_sources(list_pictures(folder)):
        try:
            face, header = read_source(source)
            placed = _placed(face, header)
        except FaceFileError as error:
            path = source.path if isinstance(source, Part) else source
            rejected.append(Rejected(path, str(error)))
            continue
        if mask not in (LEARNED, NO_MASK, *LANDMARK_MASKS):
            # Of every face, before the output is opened: a film must not break off after hours.
            _require_mask(face.path, header, mask)
        if placed.frame_px is not None:
            placed.check_size(placed.frame_px)
        faces.setdefault(placed.stem, []).append(placed)
    if not faces:
        why = f": {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        raise ValueError(f"{folder} holds no usable face{why}")
    if rejected:
        warn(skipped(rejected))
    if notice := passed_over(folder).notice():
        warn(f"{folder}: {notice}")
    for found in faces.values():
        # As they were found: where two overlap, the later one lies on top at every call.
        found.sort(key=lambda placed: placed.index)
    return faces


def stored_mask_name(folder: Path) -> str:
    """Name of the one mask that the faces of a folder have stored, by the first one that is usable.

    Raises:
        ValueError: There is no usable face, or it has no stored mask, or more than one.
    """
    for source in face_sources(list_pictures(folder)):
        try:
            face, header = read_source(source)
        except FaceFileError:
            continue
        names = sorted(set(header.masks) - set(LANDMARK_MASKS))
        if len(names) != 1:
            raise ValueError(
                f"{face.path} has {len(names)} stored masks ({', '.join(names) or 'none'}): give "
                f"--mask with one of these names, or {', '.join(LANDMARK_MASKS)} or {NO_MASK}"
            )
        return names[0]
    raise ValueError(f"{folder} holds no usable face")


def require_frames(
    faces: Faces, stems: Collection[str], place: Path, *, partial: bool, warn: Callable[[str], None]
) -> Faces:
    """The faces whose frame is there.

    Args:
        faces: Faces by the stem of their frame.
        stems: Stems of the frames that there are.
        place: Folder or video that holds them, for texts.
        partial: Leave out faces whose frame is missing.
        warn: Called with a line where faces are left out.

    Raises:
        ValueError: Frames are missing, or the faces are of another film.
    """
    missing = sorted(faces.keys() - stems)
    if not missing:
        return faces
    some = ", ".join(missing[:_NUM_NAMED]) + (", ..." if len(missing) > _NUM_NAMED else "")
    if len(missing) == len(faces):
        # One of its names beside one of theirs: that shows at a glance how they differ.
        own = min(stems, default="none")
        lacks = plural(
            len(missing), "does not hold this frame", f"holds none of these {len(missing)} frames"
        )
        raise ValueError(
            f"the faces are of another film: they were found in {some}, and {place} {lacks} "
            f"(its first is {own})"
        )
    text = (
        f"{place} lacks {len(missing)} of the {len(faces)} frames that faces were found in: {some}"
    )
    if not partial:
        raise ValueError(f"{text}; give all frames, or add --partial to leave those faces out")
    warn(f"{text}; those faces are left out")
    return {stem: found for stem, found in faces.items() if stem in stems}


def landmarks_digest(faces: Faces) -> str:
    """SHA-256 of the frames' names and the landmarks in them: two films never have the same."""
    sha256 = hashlib.sha256()
    # Sorted: the order of a folder's entries is none of the film's.
    for stem, found in sorted(faces.items()):
        for placed in found:
            # The zero ends the name, so that no name's end can pass for landmarks.
            sha256.update(os.fsencode(stem) + b"\0" + placed.face.source_landmarks_l2.tobytes())
    return sha256.hexdigest()


def first_number(stems: Iterable[str]) -> int:
    """Number that the first frame of a video has in these names: 1, or 0 where one is called so."""
    numbers = (_NUMBER.fullmatch(stem) for stem in stems)
    return 0 if any(number and not int(number[1]) for number in numbers) else 1


def _placed(face: Face, header: FaceHeader) -> PlacedFace:
    """The face in its frame; FaceFileError where its file names none."""
    name, index = header.source.get("source_filename"), header.source.get("face_index")
    if not isinstance(name, str) or not 0 < len(Path(name).stem) <= _MOST_LETTERS:
        raise FaceFileError("does not name the frame that it was found in: extract the face again")
    if not face.is_placed:
        raise FaceFileError(
            "does not say in which frame it was found, and where: extract the face again"
        )
    return PlacedFace(
        face,
        Path(name).stem,
        # By `type`: to Python, JSON's true is an int as well.
        index if type(index) is int else 0,
        _frame_px(header.source.get("source_frame_dims")),
    )


def _frame_px(value: Any) -> tuple[int, int] | None:
    """Height and width as the file says them; None where it does not."""
    if not isinstance(value, list) or len(value) < 2:
        return None
    height_px, width_px = value[:2]
    is_size = type(height_px) is int and type(width_px) is int and height_px > 0 and width_px > 0
    return (height_px, width_px) if is_size else None


def _require_mask(path: Path, header: FaceHeader, name: str) -> None:
    """Refuse, by a ValueError, a face without the stored mask, or with one that is damaged."""
    mask = header.masks.get(name)
    if mask is None:
        known = ", ".join(sorted(set(header.masks) - set(LANDMARK_MASKS))) or "none"
        raise ValueError(
            f"{path} has no mask {name!r} (stored: {known}): give --mask one of those, or "
            f"{', '.join(LANDMARK_MASKS)} or {NO_MASK}"
        )
    if isinstance(mask, str):
        raise ValueError(f"{path}: {mask}")
    try:
        # Now, and not in the middle of the film.
        mask.pixels()
    except FaceFileError as error:
        raise ValueError(f"{path}: {error}") from None
