"""Faces of DeepFaceLab as a folder of face PNGs, which mien and faceswap read.

Each JPEG is warped once to the head crop at its own scale; its mask is stored as one of the user's
own, head-centred. Landmarks are those in the frame where they are known. A file is written whole or
not at all, and none that is there is written over: the same import again finds what it has done.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..system.durable_files import discard_leftovers, open_for_reading, write_file
from ..system.paths import expanded, refusals_told
from ..system.printable import plural
from ..system.threads import thread_count, working_threads
from .dfl_face import JpegFace
from .dfl_pack import read_persons
from .face import MAX_OUTSIDE_SHARE, as_settings, side_units, usual_crop
from .folder import FaceFolder, named, read_folder
from .geometry import Crop, crop_matrix
from .listing import PACK_SUFFIX, list_pictures
from .masks import named_mask, stored_mask
from .png import FaceFileError, FaceHeader, StoredMask, encode_face

# Edges as extraction has them. The largest are four times DeepFaceLab's usual ones.
EDGE_STEP_PX = 64
MAX_EDGE_PX = 2048
MAX_MASK_PX = 512

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """What an import has done.

    num_written: new files; num_present: those that were there already, from an earlier import.
    num_masks: faces that have a mask. persons: sub-folders. face_types: number of faces of each;
    proposals: the settings of the crop that the pictures of each hold; cut_short: faces of which
    more than 5 % of that crop lies outside all the same. rejected, damaged_masks: reason by name.
    notices: what went otherwise without stopping anything.
    """

    folder: str
    num_written: int
    num_present: int
    num_masks: int
    persons: list[str]
    face_types: dict[str, int]
    proposals: dict[str, str]
    cut_short: dict[str, int]
    rejected: dict[str, str] = field(default_factory=dict)
    damaged_masks: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Place(NamedTuple):
    """The file that a face is written to, and its number among the faces of its frame."""

    path: Path
    face_index: int


class _Written(NamedTuple):
    """What has become of a face: its reason where it cannot be used, and that of its mask."""

    is_new: bool = False
    has_mask: bool = False
    reason: str = ""
    damaged_mask: str = ""


def import_faces(source: str | Path, output: str | Path, *, progress: Progress) -> Imported:
    """Write the faces of a folder of JPEGs, or of a faceset.pak, as face PNGs into a folder.

    progress: called with the number of faces done and of all.
    Raises ValueError, one line, where there are no such faces, or where the folder holds another
    file by a name that is to be written.
    """
    opened, faces = _read_faces(source)
    target = expanded(output)
    # Else the PNGs would stand among the JPEGs, and be what the next start trains on.
    if target.resolve() == opened.path.resolve():
        raise ValueError(f"{target} holds the faces themselves: give another folder for the PNGs")
    # Before any file is written: names of persons decide where.
    persons, notices = _persons_of(opened)
    places = _places(faces, target, persons)
    # All folders first: a refusal comes before an hour of faces.
    with refusals_told():
        for folder in sorted({place.path.parent for place in places}):
            folder.mkdir(parents=True, exist_ok=True)
            discard_leftovers(folder)
    results = _write_all(faces, places, progress)
    pairs = list(zip(faces, results, strict=True))
    written = [face for face, result in pairs if not result.reason]
    kinds = Counter(face.face_type for face in written)
    rejected = {file.path.name: file.reason for file in opened.rejected}
    return Imported(
        folder=str(target),
        num_written=sum(result.is_new for result in results),
        num_present=sum(not (result.is_new or result.reason) for result in results),
        num_masks=sum(result.has_mask for result in results),
        persons=sorted({name for name in persons.values() if name}),
        face_types=dict(sorted(kinds.items())),
        proposals={kind: as_settings(_proposed(kind)) for kind in sorted(kinds)},
        cut_short=dict(sorted(_cut_short(written).items())),
        rejected=rejected | {face.path.name: one.reason for face, one in pairs if one.reason},
        damaged_masks={face.path.name: one.damaged_mask for face, one in pairs if one.damaged_mask},
        notices=[*notices, *filter(None, [opened.passed_over[opened.path].notice()])],
    )


def _read_faces(source: str | Path) -> tuple[FaceFolder, list[JpegFace]]:
    """The faces to import; ValueError where there are none."""
    files = list_pictures(source)
    if files[0].suffix.lower() == ".png":
        raise ValueError(
            f"{source} holds {len(files)} {plural(len(files), 'PNG')}: give the folder of "
            "DeepFaceLab's JPEGs, or its faceset.pak; face PNGs are trained on as they are"
        )
    opened = read_folder(source, minimum=0)
    faces = [face for face in opened.faces if isinstance(face, JpegFace)]
    if not faces:
        why = f" ({named(opened.rejected)})" if opened.rejected else ""
        raise ValueError(
            f"{source} holds no usable face of DeepFaceLab{why}: give the folder of aligned faces, "
            "or its faceset.pak"
        )
    return opened, faces


def _persons_of(opened: FaceFolder) -> tuple[dict[str, str | None], list[str]]:
    """The person of each face of a pack, by its name, and what to tell where it cannot be known."""
    paths = sorted(face.path for face in opened.faces)
    # Those that were rejected too: the list of the pack counts every face.
    paths = sorted([*paths, *(file.path for file in opened.rejected)])
    pack = paths[0].parent
    if pack.suffix.lower() != PACK_SUFFIX or not pack.is_file():
        return {}, []
    try:
        return dict(zip((p.name for p in paths), read_persons(pack, len(paths)), strict=True)), []
    except FaceFileError as error:
        return {}, [f"{pack}: {error}; its faces are not put into folders by person"]


def _places(faces: list[JpegFace], target: Path, persons: dict[str, str | None]) -> list[_Place]:
    """A place for each face; ValueError where two would have the same."""
    of_frame: Counter[str] = Counter()
    taken: dict[Path, str] = {}
    places = []
    for face in faces:
        path = target / (persons.get(face.path.name) or "") / f"{face.path.stem}.png"
        # As of x.jpg and x.jpeg: one PNG would silently stand for both.
        if path in taken:
            raise ValueError(
                f"{taken[path]} and {face.path.name} would both be {path.name}: rename one"
            )
        taken[path] = face.path.name
        places.append(_Place(path, of_frame[face.frame_name]))
        of_frame[face.frame_name] += 1
    return places


def _write_all(faces: list[JpegFace], places: list[_Place], progress: Progress) -> list[_Written]:
    """Write every face, on all cores; the first failure ends it."""
    results = []
    with working_threads(thread_count(0)) as pool:
        try:
            for result in pool.map(_write, faces, places):
                results.append(result)
                progress(len(results), len(faces))
        except BaseException:
            # Else a full disk would be met by every face that is left.
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _write(face: JpegFace, place: _Place) -> _Written:
    """Write one face as a PNG, unless that very file is there already."""
    # At the JPEG's own scale: a smaller head crop would lose detail.
    edge_px = _stepped(face.edge_px * side_units("head") / side_units(face.centering), MAX_EDGE_PX)
    try:
        header = face.read_header()
        with face.open_picture() as image_bgr:
            picture_bgr = face.cut_out(image_bgr, Crop("head", 1.0, 0.0, edge_px))
    except FaceFileError as error:
        return _Written(reason=str(error))
    # Numbered by us: names of DeepFaceLab may have been changed, and two faces of a frame be 0.
    header.source |= {"original_filename": place.path.name, "face_index": place.face_index}
    damaged = ""
    try:
        masks = {name: _head_mask(face, header, name, edge_px) for name in header.masks}
    except FaceFileError as error:
        # The face is good all the same: masks can be drawn from its landmarks.
        masks, damaged = {}, str(error)
    content = encode_face(picture_bgr, dataclasses.replace(header, masks=masks))
    return _Written(_is_written(place.path, content), bool(masks), damaged_mask=damaged)


def _head_mask(face: JpegFace, header: FaceHeader, name: str, edge_px: int) -> StoredMask:
    """The same mask for the head crop. Raises FaceFileError where it cannot be used."""
    mask = named_mask(header, name)
    # As fine as it was against its picture: more would store the same in more bytes.
    size_px = _stepped(edge_px * mask.size_px / face.edge_px, MAX_MASK_PX)
    crop = Crop("head", 1.0, 0.0, size_px)
    alignment = face.source_alignment
    pixels = stored_mask(mask, alignment, crop, dilation=0, blur_kernel=0, threshold=0)
    affine_33 = np.vstack([crop_matrix(alignment, crop), [0.0, 0.0, 1.0]])
    return StoredMask(zlib.compress(pixels.tobytes()), size_px, crop.centering, affine_33)


def _stepped(size_px: float, most_px: int) -> int:
    """The nearest usual size."""
    return min(max(round(size_px / EDGE_STEP_PX), 1) * EDGE_STEP_PX, most_px)


def _is_written(path: Path, content: bytes) -> bool:
    """Write a new file; False where it is there already. ValueError where another one is."""
    try:
        write_file(path, content)
    except FileExistsError:
        if not _holds(path, content):
            raise ValueError(
                f"{path} is there and is not this face: give a new folder for the PNGs"
            ) from None
        return False
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    return True


def _holds(path: Path, content: bytes) -> bool:
    try:
        with open_for_reading(path) as file:
            # A byte more shows a longer file, without reading all of it.
            return file.read(len(content) + 1) == content
    except OSError:  # what is there is no file, or may not be read
        return False


def _proposed(face_type: str) -> Crop:
    return usual_crop(f"DeepFaceLab {face_type}", 256)


def _cut_short(faces: list[JpegFace]) -> Counter[str]:
    """Number of faces of each type that hold less of the proposed crop than they should."""
    return Counter(
        face.face_type
        for face in faces
        if face.outside_share(_proposed(face.face_type)) > MAX_OUTSIDE_SHARE
    )
