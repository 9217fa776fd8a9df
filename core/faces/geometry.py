"""Position of the face in its PNG: alignment, pose, crops.

The inner landmarks are fitted to a mean face by a similarity (least squares with scale, proper
rotation; Umeyama 1991, here in its closed form for two dimensions). A point of the source frame
then has *normalised* coordinates u = M (x, y, 1). The pose, solved from 26 of them and a mean 3-D
head, gives each centering an offset in those units; a crop of `size_px` with padding p shows
(size_px - 2 p) (u - offset) + p.

Letters: l = landmark (68), 2 = (x, y), 23 = 2 x 3 matrix, hwc = row, column, channel.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .shrink import can_shrink, shrink

CENTERINGS = ("face", "head", "legacy")
# faceswap's: every number here must place pixels as its extraction does.
PADDING_RATIO = {"legacy": 0.375, "face": 0.5, "head": 0.625}
# All but the jaw: those that the mean face of faceswap has.
INNER_LANDMARKS = slice(17, 68)

with np.load(Path(__file__).with_name("mean_face.npz"), allow_pickle=False) as _constants:
    _MEAN_51_2 = _constants["mean51"]
    _HEAD_26_3 = _constants["mean3d_26"]
    _HEAD_LANDMARKS = _constants["pnp_landmark_indices"]

_MEAN_JAW_2 = np.array(
    [
        *([-0.122, 0.299], [-0.117, 0.458], [-0.100, 0.618], [-0.069, 0.771], [-0.010, 0.911]),
        *([0.085, 1.029], [0.205, 1.121], [0.342, 1.188], [0.494, 1.205], [0.641, 1.187]),
        *([0.769, 1.122], [0.886, 1.032], [0.979, 0.916], [1.040, 0.773], [1.073, 0.617]),
        *([1.093, 0.459], [1.102, 0.301]),
    ]
)
MEAN_FACE_L2 = np.concatenate([_MEAN_JAW_2, _MEAN_51_2])
"""All 68 landmarks of the mean face, seen from the front, normalised; float64."""

# A camera at a focal length of 4 boxes, no real one: the offsets are defined by it.
_CAMERA_33 = np.array([[4.0, 0.0, 0.5], [0.0, 4.0, 0.5], [0.0, 0.0, 1.0]])
_NO_DISTORTION = np.zeros((4, 1))
_OFFSET_CENTERINGS = ("head", "face")
# Points that turn with the 3-D head; their projections are the centres of these crops.
_OFFSET_POINTS = np.array([[0.0, 0.0, -2.3], [0.0, -1.5, 4.2]])
_PRINCIPAL_POINT = np.float32(0.5)


@dataclass(frozen=True)
class Crop:
    """The part of a face that is trained on.

    coverage: share of the centred patch, up to 1. vertical_offset: -0.25 to 0.25 of the patch's
    inner box; positive moves the face down.
    """

    centering: str
    coverage: float
    vertical_offset: float
    size_px: int

    def __post_init__(self) -> None:
        if self.centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {CENTERINGS}, got {self.centering!r}")
        if not 0.0 < self.coverage <= 1.0:
            raise ValueError(f"coverage must be above 0 and at most 1, got {self.coverage}")
        if not -0.25 <= self.vertical_offset <= 0.25:
            raise ValueError(f"vertical_offset must be -0.25 to 0.25, got {self.vertical_offset}")
        if self.size_px < 1:
            raise ValueError(f"size_px must be at least 1, got {self.size_px}")


@dataclass
class Alignment:
    """A face in normalised coordinates.

    matrix_23: frame px to normalised, float64. normalized_l2: (68, 2) float32. offsets: centre of
    each centering, (2,) float32, normalised. rotation_3: of the head, as a rotation vector.
    """

    matrix_23: np.ndarray
    normalized_l2: np.ndarray
    offsets: dict[str, np.ndarray]
    rotation_3: np.ndarray

    @functools.cached_property
    def angles(self) -> tuple[float, float, float]:
        """Pitch, yaw and roll in degrees; worked out when asked for, training needs none."""
        turn_33, _ = cv2.Rodrigues(self.rotation_3)
        angles = cv2.decomposeProjectionMatrix(np.hstack([turn_33, np.zeros((3, 1))]))[-1]
        pitch, yaw, roll = angles[:, 0].tolist()
        return pitch, yaw, roll

    @property
    def pitch(self) -> float:
        """Degrees."""
        return self.angles[0]

    @property
    def yaw(self) -> float:
        """Degrees."""
        return self.angles[1]

    @property
    def roll(self) -> float:
        """Degrees."""
        return self.angles[2]

    @property
    def average_distance(self) -> float:
        """Mean distance of the inner landmarks from the mean face, normalised."""
        return float(np.abs(self.normalized_l2[INNER_LANDMARKS] - _MEAN_51_2).mean())


@dataclass(frozen=True)
class CropBox:
    """A square in a face PNG, px; it may reach outside the picture."""

    left: int
    top: int
    side: int


def align(landmarks_l2: np.ndarray) -> Alignment:
    """Alignment and pose of one face.

    landmarks_l2: (68, 2), px of the source frame, finite, not all on one line.
    """
    matrix_23 = similarity(landmarks_l2[INNER_LANDMARKS].astype(np.float64), _MEAN_51_2)
    normalized_l2 = transform(landmarks_l2, matrix_23)
    _, rotation, translation = cv2.solvePnP(
        _HEAD_26_3,
        normalized_l2[_HEAD_LANDMARKS],
        _CAMERA_33,
        _NO_DISTORTION,
        flags=cv2.SOLVEPNP_ITERATIVE,
    )
    projected, _ = cv2.projectPoints(
        _OFFSET_POINTS, rotation, translation, _CAMERA_33, _NO_DISTORTION
    )
    # float32 as in faceswap: in float64 a crop could round to the pixel beside.
    centres = projected[:, 0].astype(np.float32) - _PRINCIPAL_POINT
    offsets = dict(zip(_OFFSET_CENTERINGS, centres, strict=True))
    # The mean face itself: before version 2.0 no pose moved a crop.
    offsets["legacy"] = np.zeros(2, np.float32)
    return Alignment(matrix_23, normalized_l2, offsets, rotation)


def transform(points_l2: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    """The points moved by a matrix, float32."""
    return cv2.transform(points_l2[None].astype(np.float32), matrix_23)[0]


def similarity(points_l2: np.ndarray, template_l2: np.ndarray) -> np.ndarray:
    """Least-squares similarity from points to those of a template, (2, 3) float64.

    points_l2, template_l2: (L, 2) float64, not all in one place.
    """
    centre, template_centre = points_l2.mean(axis=0), template_l2.mean(axis=0)
    x, y = (points_l2 - centre).T
    template_x, template_y = np.ascontiguousarray((template_l2 - template_centre).T)
    spread = x @ x + y @ y
    cosine = (x @ template_x + y @ template_y) / spread
    sine = (x @ template_y - y @ template_x) / spread
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return np.column_stack([turn, template_centre - turn @ centre])


def padding_px(crop: Crop) -> int:
    """Px of padding on each side of the crop; negative where coverage cuts into the inner box."""
    ratio = PADDING_RATIO[crop.centering] + crop.coverage - 1.0
    # Python's round, ties to even, as in faceswap.
    return round(crop.size_px * ratio / (2.0 * crop.coverage))


def crop_matrix(alignment: Alignment, crop: Crop) -> np.ndarray:
    """Matrix from px of the source frame to px of the crop, (2, 3) float64."""
    padding = padding_px(crop)
    scale = crop.size_px - 2 * padding
    matrix_23 = alignment.matrix_23.copy()
    matrix_23[:, 2] -= alignment.offsets[crop.centering]
    matrix_23 *= scale
    matrix_23[:, 2] += padding
    matrix_23[1, 2] += crop.vertical_offset * scale
    return matrix_23


def crop_landmarks(landmarks_l2: np.ndarray, alignment: Alignment, crop: Crop) -> np.ndarray:
    """The landmarks in px of the crop, (68, 2) float32."""
    return transform(landmarks_l2, crop_matrix(alignment, crop))


def crop_box(
    alignment: Alignment, edge_px: int, crop: Crop, picture_centering: str = "head"
) -> CropBox:
    """The square of a PNG of ``edge_px`` and full coverage that the crop is made of."""
    inner = 1.0 - PADDING_RATIO[picture_centering]
    # All of the picture: the rounding to even below would take a row off an odd one.
    if crop.centering == picture_centering and crop.coverage == 1.0:
        side = edge_px
    else:
        ratio = inner / (1.0 - PADDING_RATIO[crop.centering])
        # Even, as in faceswap, which halves it round the centre.
        side = 2 * round(edge_px * ratio * crop.coverage / 2.0)
    base = 2 * round(edge_px * inner / 2.0)
    x, y = _centre_shift(alignment, picture_centering, crop)
    corner = (edge_px - side) / 2.0
    return CropBox(round(x * base + corner), round(y * base + corner), side)


def stored_box(alignment: Alignment, size_px: int, stored_centering: str, crop: Crop) -> CropBox:
    """The square of a stored mask, centred and full-coverage, that belongs to the crop."""
    if crop.centering == stored_centering and crop.coverage == 1.0:
        side = size_px
    else:
        stored_inner = 1.0 - PADDING_RATIO[stored_centering]
        ratio = stored_inner / (1.0 - PADDING_RATIO[crop.centering])
        side = 2 * round(size_px * ratio * crop.coverage / 2.0)
    base = size_px - size_px * PADDING_RATIO[stored_centering]
    x, y = _centre_shift(alignment, stored_centering, crop)
    half = size_px / 2.0
    return CropBox(round(x * base + half) - side // 2, round(y * base + half) - side // 2, side)


def _centre_shift(alignment: Alignment, from_centering: str, crop: Crop) -> tuple[float, float]:
    """Vector from the centre of one patch to that of the crop, normalised."""
    here, there = alignment.offsets[from_centering], alignment.offsets[crop.centering]
    x, y = (there - here).tolist()
    return x, y - crop.vertical_offset


def cut(image_hwc: np.ndarray, box: CropBox) -> np.ndarray:
    """The box cut out of an (H, W) or (H, W, C) image, square; zeros outside the image.

    Where the box lies inside the image a view comes back, not a copy.
    """
    height, width = image_hwc.shape[:2]
    right, bottom = box.left + box.side, box.top + box.side
    if box.left >= 0 and box.top >= 0 and right <= width and bottom <= height:
        return image_hwc[box.top : bottom, box.left : right]
    # Black, as extraction leaves what is outside the frame.
    square = np.zeros((box.side, box.side, *image_hwc.shape[2:]), image_hwc.dtype)
    left, top = max(box.left, 0), max(box.top, 0)
    inside = image_hwc[top : max(bottom, 0), left : max(right, 0)]
    row, column = top - box.top, left - box.left
    square[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return square


def warp(image_hwc: np.ndarray, matrix_23: np.ndarray, size_px: int) -> np.ndarray:
    """The square image moved by a similarity, (size_px, size_px); zeros outside the image.

    matrix_23: px of the image to px of the result. Cubic where the image grows; where it shrinks,
    the mean of the area that a pixel covers: of as many points as it has px of the image.
    """
    scale = float(np.hypot(matrix_23[0, 0], matrix_23[1, 0]))
    # A crop may reach far beyond the image; there is no use in more points than that has.
    times = min(math.ceil(1.0 / scale), max(2 * image_hwc.shape[0] // size_px, 1))
    larger_23 = rescaled(matrix_23, times)
    edge_px = size_px * times
    larger = cv2.warpAffine(image_hwc, larger_23, (edge_px, edge_px), flags=cv2.INTER_CUBIC)
    return resize(larger, size_px)


def rescaled(matrix_23: np.ndarray, factor: float) -> np.ndarray:
    """The matrix to a picture that shows the same area with `factor` times as many px an edge.

    A pixel is an area whose centre has the whole number as its coordinate.
    """
    scaled_23 = matrix_23 * factor
    scaled_23[:, 2] += (factor - 1) / 2
    return scaled_23


def outside_share(matrix_23: np.ndarray, edge_px: int, size_px: int) -> float:
    """Part of a crop of ``size_px`` that lies outside the square image of ``edge_px``.

    matrix_23: px of the image to px of the crop.
    """
    image, crop = (
        np.array([[0, 0], [edge, 0], [edge, edge], [0, edge]], np.float32) - np.float32(0.5)
        for edge in (edge_px, size_px)
    )
    # Two convex polygons: the crop may be turned against the picture.
    shared, _ = cv2.intersectConvexConvex(transform(image, matrix_23), crop)
    return 1.0 - min(shared / size_px**2, 1.0)


def resize(image_hwc: np.ndarray, size_px: int, from_px: int | None = None) -> np.ndarray:
    """The square image at ``size_px``: cubic where it grows, area where it shrinks.

    from_px: size that decides which of the two, where that is not the image's own.
    """
    edge_px = image_hwc.shape[0]
    if edge_px == size_px:
        return image_hwc
    # Cubic would leave px out where it shrinks, area show blocks where it grows.
    smaller = (edge_px if from_px is None else from_px) < size_px
    if not smaller and size_px < edge_px and can_shrink(image_hwc, size_px):
        return shrink(image_hwc, size_px)
    method = cv2.INTER_CUBIC if smaller else cv2.INTER_AREA
    return cv2.resize(image_hwc, (size_px, size_px), interpolation=method)
