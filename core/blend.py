"""What of a decoded face goes into the frame: its mask, softened, and its colours, matched.

Letters: S edge of the decoded face in px, c = B, G, R or L, a, b; 23 = 2 x 3 matrix.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from .faces.folder import Face
from .faces.geometry import Crop, crop_matrix, transform
from .faces.masks import LANDMARK_MASKS, landmark_mask, named_mask
from .faces.png import AS_PICTURE

LEARNED, STORED, NO_MASK = "learned", "stored", "none"
COLORS = ("off", "mean", "full")
FEATHER_SHARE = 1 / 16
"""Part of the face's edge over which it fades out where the user names no width; chosen by eye."""

_COLOUR_PX = 128
"""Edge up to which colours are compared: means need no detail. Chosen,
unmeasured."""

_MOST_CONTRAST = 2.0
"""Factor by which the contrast of a face changes at the most, up or down; else noise would show.
Chosen, unmeasured."""


@dataclass(frozen=True, kw_only=True)
class BlendOptions:
    """How a decoded face is blended into its frame."""

    mask: str
    """Mask of the face: learned, components, extended, none, or the name of a stored one."""

    feather_px: float
    """Width over which the face fades out, inwards from the edge of its mask, in px of the face."""

    erode_px: float
    """Width that is taken off the mask's edge before, in px of the face."""

    color: Literal["off", "mean", "full"]
    """Colours of the frame to take over inside the mask: their mean, or their spread as well."""


def face_mask(
    options: BlendOptions,
    face: Face,
    matrix_23: np.ndarray,
    size_px: int,
    learned: np.ndarray | None,
) -> np.ndarray:
    """Share of each pixel of the decoded face that goes into the frame, (S, S) float32 in 0..1.

    matrix_23: from px of the frame to px of the decoded face. learned: the mask that was decoded
    with it, (S, S) float32.
    Raises FaceFileError where the face has no such mask.
    """
    if options.mask == LEARNED and learned is not None:
        mask_ss = learned
    elif options.mask == NO_MASK:
        mask_ss = np.ones((size_px, size_px), np.float32)
    elif options.mask in LANDMARK_MASKS:
        landmarks_l2 = transform(face.source_landmarks_l2, matrix_23)
        mask_ss = landmark_mask(options.mask, landmarks_l2, size_px) / np.float32(255)
    else:
        mask_ss = _stored(face, options.mask, matrix_23, size_px)
    return softened(mask_ss, options.erode_px, options.feather_px)


def _stored(face: Face, name: str, matrix_23: np.ndarray, size_px: int) -> np.ndarray:
    """A stored mask on the decoded face, (S, S) float32."""
    mask = named_mask(face.read_header(), name)
    if mask.centering == AS_PICTURE:
        from_frame_33 = mask.affine_33
    else:
        # It covers the whole of its centring, whatever coverage the model was trained at.
        crop = Crop(mask.centering, 1.0, 0.0, mask.size_px)
        from_frame_33 = np.vstack([crop_matrix(face.source_alignment, crop), (0, 0, 1)])
    to_stored_33 = from_frame_33 @ np.linalg.inv(np.vstack([matrix_23, (0, 0, 1)]))
    # The inverse map: OpenCV else inverts the matrix itself, in one more rounding.
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pixels_ss = cv2.warpAffine(mask.pixels(), to_stored_33[:2], (size_px, size_px), flags=flags)
    return pixels_ss / np.float32(255)


def softened(mask_ss: np.ndarray, erode_px: float, feather_px: float) -> np.ndarray:
    """The mask without its rim of some px, fading out over some more; what is 0 stays 0.

    The edge of the face counts as an edge of the mask: no picture goes on there.
    """
    if not erode_px and not feather_px:
        return mask_ss
    inside = np.pad((mask_ss >= 0.5).view(np.uint8), 1)
    # A distance fades evenly along any outline; a blur would leave a rim outside of the mask.
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    share = np.clip((depth - np.float32(erode_px)) / np.float32(max(feather_px, 1)), 0, 1)
    return mask_ss * (share * share * (3 - 2 * share))  # without a line where the fading begins


def matched(
    decoded_ssc: np.ndarray, original_ssc: np.ndarray, mask_ss: np.ndarray, color: str
) -> np.ndarray:
    """The decoded face in the colours of the original, (S, S, 3) float32 in 0..1.

    Mean, and with `full` standard deviation too, of L, a and b inside the mask become those of the
    original (Reinhard, Ashikhmin, Gooch and Shirley 2001). original_ssc: the same patch of the
    frame, of any size.
    """
    if color == "off":
        return decoded_ssc
    # Both at one size: a sharper picture has the larger spread for no other reason.
    edge_px = min(len(decoded_ssc), len(original_ssc), _COLOUR_PX)
    # Inside only: hair and background differ between the two without any fault in the colours.
    inside = (_shrunk(mask_ss, edge_px) >= 0.5).view(np.uint8)
    # Nothing of the face goes into the frame, and a mean of no pixels is no number.
    if not inside.any():
        return decoded_ssc
    mean_c, spread_c = _statistics(decoded_ssc, edge_px, inside)
    wanted_mean_c, wanted_spread_c = _statistics(original_ssc, edge_px, inside)
    gain_c = np.ones(3, np.float32)
    if color == "full":
        gain_c = np.clip(
            # A face of one colour has no spread to divide by.
            wanted_spread_c / np.maximum(spread_c, 1e-3),
            1 / _MOST_CONTRAST,
            _MOST_CONTRAST,
        )
    # At full size: only the statistics were taken of the shrunk pictures.
    lab_ssc = (cv2.cvtColor(decoded_ssc, cv2.COLOR_BGR2Lab) - mean_c) * gain_c + wanted_mean_c
    # Lab holds colours that no screen has; they come back beyond 0..1.
    return np.clip(cv2.cvtColor(lab_ssc, cv2.COLOR_Lab2BGR), 0, 1)


def _statistics(
    picture_ssc: np.ndarray, edge_px: int, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of L, a and b inside the mask, (3,) float32 each."""
    lab_ssc = cv2.cvtColor(_shrunk(picture_ssc, edge_px), cv2.COLOR_BGR2Lab)
    mean, spread = cv2.meanStdDev(lab_ssc, mask=inside)
    return mean[:, 0].astype(np.float32), spread[:, 0].astype(np.float32)


def _shrunk(picture: np.ndarray, edge_px: int) -> np.ndarray:
    return cv2.resize(picture, (edge_px, edge_px), interpolation=cv2.INTER_AREA)
