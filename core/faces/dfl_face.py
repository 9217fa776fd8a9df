"""Faces as DeepFaceLab keeps them: JPEGs in a folder or in a pack, turned against the face.

The crop is one warp of the JPEG by the landmarks, which are in its px; how the JPEG itself was cut
out of the frame plays no part. What a file says is told as the header of a face PNG: in px of the
frame where the frame's landmarks are known, else the JPEG stands for the frame.
"""

import dataclasses
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..system.durable_files import open_for_reading
from ..system.printable import plural
from .dfl_metadata import Metadata, masks_of, read_metadata
from .dfl_pack import Part, read_pack
from .face import Face, checked_alignment, size_and_time
from .geometry import Alignment, Crop, align, crop_matrix, outside_share, warp
from .listing import JPEG_SUFFIXES, PACK_SUFFIX
from .masks import named_mask
from .picture import decoding_bytes, open_jpeg
from .png import FaceFileError, FaceHeader, StoredMask, unreadable

# The version whose header is written: from 2.0 on a picture is head-centred.
ALIGNMENTS_VERSION = 2.4
_FACE_NUMBER = re.compile(r".*_(\d{1,6})")
"""Name of a JPEG without its ending, where it is the one that DeepFaceLab has given."""

_MAX_DIFFERENCE = 0.005
"""Difference, normalised, up to which landmarks in the frame and in the JPEG are one face's.
Chosen, unmeasured."""


@dataclass
class JpegFace(Face):
    """A usable face of DeepFaceLab. Landmarks and alignment are in px of its JPEG.

    part: the bytes that hold it. face_type: what DeepFaceLab has cut out. in_frame, in_frame_l2:
    its alignment and its landmarks in the frame, None where they are not known. source_filename:
    that of the frame, None where it is not known.
    """

    # Never left out; but fields behind those of the base class, which have defaults, need one.
    part: Part = dataclasses.field(default_factory=lambda: Part(Path(), Path(), 0, 0))
    face_type: str = "full_face"
    in_frame: Alignment | None = None
    in_frame_l2: np.ndarray | None = None
    source_filename: str | None = None

    is_upright: ClassVar[bool] = False

    @property
    def file(self) -> Path:
        return self.part.file

    @property
    def centering(self) -> str:
        return f"DeepFaceLab {self.face_type}"

    @property
    def frame_name(self) -> str:
        """File name of the frame; of the JPEG, which then stands for it, where it is not known."""
        return self.source_filename or self.part.path.name

    @property
    def source_alignment(self) -> Alignment:
        return self.in_frame or self.alignment

    @property
    def source_landmarks_l2(self) -> np.ndarray:
        return self.landmarks_l2 if self.in_frame_l2 is None else self.in_frame_l2

    @property
    def is_placed(self) -> bool:
        return self.source_filename is not None

    def frame_matrix(self, crop: Crop) -> np.ndarray:
        return crop_matrix(self.source_alignment, crop)

    @property
    def decoding_bytes(self) -> int:
        return decoding_bytes(self.file, self.edge_px, self.part.size)

    def cut_out(self, image_hwc: np.ndarray, crop: Crop) -> np.ndarray:
        return warp(image_hwc, crop_matrix(self.alignment, crop), crop.size_px)

    def outside_share(self, crop: Crop) -> float:
        return outside_share(crop_matrix(self.alignment, crop), self.edge_px, crop.size_px)

    def open_picture(self) -> AbstractContextManager[np.ndarray]:
        return open_jpeg(self.file, self.part.begin, self.part.size, self.edge_px)

    def read_header(self) -> FaceHeader:
        return header_of(self, _read(self.part)[1])

    def stored_mask(self, name: str) -> StoredMask:
        masks = masks_of(_read(self.part)[1], self.edge_px)
        return named_mask(FaceHeader(self.landmarks_l2, masks), name)


def part_of(path: Path) -> Part | None:
    """The JPEG of that path, which may be `faceset.pak/000001.jpg`; None where it is no JPEG's.

    Raises FaceFileError where it is a pack itself, or there is none of that name in the pack.
    """
    if path.suffix.lower() == PACK_SUFFIX:
        raise FaceFileError("is a pack of faces: name one of them, as in faceset.pak/000000.jpg")
    if path.suffix.lower() not in JPEG_SUFFIXES:
        return None
    if path.parent.suffix.lower() != PACK_SUFFIX or not path.parent.is_file():
        # A file of its own is a part that is all of it: one way to read both.
        return Part(path, path, 0, size_and_time(path)[0])
    parts = {part.path.name: part for part in read_pack(path.parent)}
    if path.name not in parts:
        faces = plural(len(parts), "face")
        raise FaceFileError(f"is none of the {len(parts)} {faces} of {path.parent.name}")
    return parts[path.name]


def read_jpeg(part: Part) -> tuple[JpegFace, Metadata]:
    """A face, and all that its JPEG says.

    Raises FaceFileError where it is no usable face.
    """
    # Before it is read, as of a face PNG.
    found = size_and_time(part.file)
    edge_px, metadata = _read(part)
    landmarks_l2 = metadata.landmarks_l2
    alignment = checked_alignment(landmarks_l2)
    in_frame = _in_frame(alignment, metadata.source_landmarks_l2)
    face = JpegFace(
        path=part.path,
        edge_px=edge_px,
        landmarks_l2=landmarks_l2,
        alignment=alignment,
        size_and_time=found,
        part=part,
        face_type=metadata.face_type,
        in_frame=in_frame,
        in_frame_l2=metadata.source_landmarks_l2 if in_frame else None,
        # A name without its landmarks would place the face nowhere in that frame.
        source_filename=metadata.source_filename if in_frame else None,
    )
    return face, metadata


def header_of(face: JpegFace, metadata: Metadata) -> FaceHeader:
    """What the face's JPEG says, as a face PNG would, with masks that cover the JPEG."""
    landmarks_l2, masks = face.landmarks_l2, masks_of(metadata, face.edge_px)
    rect = None
    if face.in_frame is not None:
        landmarks_l2, rect = face.source_landmarks_l2, metadata.source_rect
        # By way of normalised coordinates, which are the same for both pictures of the face.
        to_jpeg_33 = np.linalg.inv(_square(face.alignment)) @ _square(face.in_frame)
        masks = {
            key: mask
            if isinstance(mask, str)
            else dataclasses.replace(mask, affine_33=mask.affine_33 @ to_jpeg_33)
            for key, mask in masks.items()
        }
    return FaceHeader(landmarks_l2, masks, _box(rect, landmarks_l2), _source(face))


def _source(face: JpegFace) -> dict[str, Any]:
    """Origin of a face with the keys that extraction writes. The size of the frame is not known,
    unless the JPEG stands for it."""
    # 0, not a guess: whoever places the face would else refuse every frame.
    frame_px = 0 if face.in_frame else face.edge_px
    number = _FACE_NUMBER.fullmatch(face.path.stem)
    return {
        "alignments_version": ALIGNMENTS_VERSION,
        "original_filename": f"{face.path.stem}.png",
        "face_index": int(number[1]) if number else 0,
        "source_filename": face.frame_name,
        "source_is_video": False,
        "source_frame_dims": (frame_px, frame_px),
    }


def _box(rect: tuple[int, int, int, int] | None, landmarks_l2: np.ndarray) -> Any:
    """Left, top, width and height of the detector's box, or of the one round the landmarks."""
    if rect is not None:
        left, top, right, bottom = rect
        return left, top, right - left, bottom - top
    low, high = landmarks_l2.min(axis=0), landmarks_l2.max(axis=0)
    return tuple(np.rint(np.concatenate([low, high - low])).astype(int).tolist())


def _in_frame(alignment: Alignment, source_landmarks_l2: np.ndarray | None) -> Alignment | None:
    """Alignment in the frame, where the frame's landmarks are those of the same face."""
    if source_landmarks_l2 is None:
        return None
    found = align(source_landmarks_l2)
    differences = np.abs(found.normalized_l2 - alignment.normalized_l2)
    return found if differences.max() <= _MAX_DIFFERENCE else None


def _square(alignment: Alignment) -> np.ndarray:
    return np.vstack([alignment.matrix_23, [0.0, 0.0, 1.0]])


def _read(part: Part) -> tuple[int, Metadata]:
    try:
        with open_for_reading(part.file, follows_links=True) as file:
            return read_metadata(file, part.begin, part.size)
    except OSError as error:
        raise unreadable(error) from None
