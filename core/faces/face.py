"""One face: where its landmarks are, what its picture shows, and how a crop is cut out of it.

Every picture shows a square round the face. A face PNG shows an upright square, centred on the head
(before alignments version 2.0: the legacy one), so a crop is a part of it. Other pictures are
turned against the face: `core.faces.dfl_face`.

Letters: l = landmark (68), 2 = (x, y), hwc = row, column, channel.
"""

import dataclasses
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .geometry import (
    PADDING_RATIO,
    Alignment,
    Crop,
    CropBox,
    align,
    crop_box,
    crop_matrix,
    cut,
    rescaled,
    resize,
)
from .masks import named_mask
from .picture import decoding_bytes, open_picture
from .png import FIRST_HEAD_VERSION, FaceFileError, FaceHeader, StoredMask, read_header

MAX_OUTSIDE_SHARE = 0.05
"""Part of a crop that may lie outside the picture before that is told. Chosen,
unmeasured."""


@dataclass(frozen=True)
class _Shown:
    """The square that a picture shows.

    side: of the square, normalised. centering, coverage, vertical_offset: of the crop that is
    trained on by default, which the square holds.
    """

    side: float
    centering: str
    coverage: float = 1.0
    vertical_offset: float = 0.0


_BY_DEEPFACELAB = {  # side: 2 sqrt(2) padding + 1, of the padding that each type has
    "half_face": _Shown(1.0, "legacy", 0.625),
    "midfull_face": _Shown(1.191, "legacy", 0.7),
    "full_face": _Shown(1.597, "legacy"),
    "full_face_no_align": _Shown(1.597, "legacy"),
    "whole_face": _Shown(2.131, "face", 1.0, -0.08),
    "head": _Shown(2.98, "face"),
    "head_no_align": _Shown(2.98, "face"),
    "mark_only": _Shown(2.131, "face"),
}
FACE_TYPES = tuple(_BY_DEEPFACELAB)
_SHOWN = {
    "head": _Shown(1.0 / (1.0 - PADDING_RATIO["head"]), "face"),
    "legacy": _Shown(1.0 / (1.0 - PADDING_RATIO["legacy"]), "legacy"),
    **{f"DeepFaceLab {name}": shown for name, shown in _BY_DEEPFACELAB.items()},
}


def side_units(shows: str) -> float:
    """Side of the square that such a picture shows, normalised."""
    return _SHOWN[shows].side


def usual_crop(shows: str, size_px: int) -> Crop:
    """The crop that is trained on by default, or proposed, of pictures that show this."""
    shown = _SHOWN[shows]
    return Crop(shown.centering, shown.coverage, shown.vertical_offset, size_px)


def usual_of(faces: "list[Face]", size_px: int) -> tuple[str, Crop]:
    """What most of these pictures show, and the crop that is proposed of it."""
    shows, _ = Counter(face.centering for face in faces).most_common(1)[0]
    return shows, usual_crop(shows, size_px)


def as_settings(crop: Crop) -> str:
    """A crop as the settings that give it, to be read by a user."""
    return (
        f"data.centering={crop.centering}, data.coverage={100 * crop.coverage:g} and "
        f"data.vertical_offset={100 * crop.vertical_offset:g}"
    )


def usual_share(shows: str) -> float:
    """Part of the picture's width that this crop takes."""
    shown = _SHOWN[shows]
    side = shown.coverage / (1.0 - PADDING_RATIO[shown.centering])
    return side / shown.side


def checked_alignment(landmarks_l2: np.ndarray) -> Alignment:
    """Alignment of a face. Raises FaceFileError where the landmarks fit no head."""
    alignment = align(landmarks_l2)
    # `solvePnP` gives numbers that are none, and no error, where no head has such landmarks.
    if not all(np.isfinite(offset).all() for offset in alignment.offsets.values()):
        raise FaceFileError("has landmarks that fit no head: extract the face again")
    return alignment


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change of a file; zeros where it is gone, which reading it reports."""
    try:
        # Follows a link: what is trained on is the file behind it.
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@dataclass
class Face:
    """A usable face PNG: its file, and what of its header training needs.

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

    is_upright: ClassVar[bool] = True
    """The picture is not turned against the face: every crop is a square of it."""

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.path

    @property
    def centering(self) -> str:
        """What the picture shows: the head crop, or the legacy crop of versions before 2.0."""
        # A file that tells no version is taken for a late one, as faceswap takes all of them.
        is_legacy = self.version is not None and self.version < FIRST_HEAD_VERSION
        return "legacy" if is_legacy else "head"

    @property
    def source_alignment(self) -> Alignment:
        """Alignment of the face in px of what it was extracted from."""
        return self.alignment

    @property
    def source_landmarks_l2(self) -> np.ndarray:
        """Landmarks in px of what it was extracted from, (68, 2) float32."""
        return self.landmarks_l2

    @property
    def is_placed(self) -> bool:
        """Whether its file says in which frame it was found, and where in it."""
        return True

    def frame_matrix(self, crop: Crop) -> np.ndarray:
        """Matrix from px of the frame to px of the crop that training sees, (2, 3) float64.

        The rounding of the crop's corner to whole px of the picture is left out.
        """
        # At the picture's own px first, as `cut_out` goes: both round the padding at one size.
        native = dataclasses.replace(crop, size_px=max(self.crop_box(crop).side, 1))
        return rescaled(crop_matrix(self.alignment, native), crop.size_px / native.size_px)

    @property
    def native_px(self) -> float:
        """Width of the picture in px of the source, before extraction scaled it."""
        # A similarity: one column tells the scale, whatever the turn.
        px_per_unit = 1.0 / float(np.hypot(*self.source_alignment.matrix_23[:, 0]))
        return px_per_unit * _SHOWN[self.centering].side

    @property
    def decoding_bytes(self) -> int:
        """Bytes that the picture takes while it is decoded; OSError where its file is gone."""
        return decoding_bytes(self.path, self.edge_px)

    def crop_box(self, crop: Crop) -> CropBox:
        """The square of its picture that the crop is made of."""
        return crop_box(self.alignment, self.edge_px, crop, self.centering)

    def cut_out(self, image_hwc: np.ndarray, crop: Crop) -> np.ndarray:
        """The crop of its picture, (s, s, c) with s = crop.size_px; zeros outside the picture."""
        return resize(cut(image_hwc, self.crop_box(crop)), crop.size_px)

    def outside_share(self, crop: Crop) -> float:
        """Part of the crop that lies outside the square that extraction has cut out."""
        return 0.0

    def open_picture(self) -> AbstractContextManager[np.ndarray]:
        """The picture, (N, N, 3) uint8 BGR with N = edge_px, to be used and let go.

        Raises FaceFileError where it is damaged, or was replaced since.
        """
        return open_picture(self.path, self.edge_px)

    def read_header(self) -> FaceHeader:
        """All that the file says, read again. Raises FaceFileError where it cannot be used."""
        return read_header(self.path)[1]

    def stored_mask(self, name: str) -> StoredMask:
        """The mask of that name, read from the file again.

        Raises FaceFileError where there is none to be used.
        """
        return named_mask(self.read_header(), name)
