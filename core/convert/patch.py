"""The patch of a frame that a model sees, and the way back into the frame.

A patch of S px shows what training cuts out of the face's picture. Sizes differ along the way:
the patch is cut at the input size, and comes back at the output size. A pixel is an area whose
centre has the whole number as its coordinate, so that patches of two sizes show the same area
where (x + 1/2) / S is the same in both: `rescaled` holds to that, as OpenCV's `resize` does. A
matrix that only multiplied would shift each swap by up to half a pixel.

Letters: S edge of a patch in px, h, w = row and column of a frame, c = channel, 23 = 2 x 3 matrix
from px of the frame to px of the patch.
"""

import math

import cv2
import numpy as np

from ..faces.geometry import rescaled, resize

MAX_NATIVE_PX = 4096
"""Edge up to which a patch is cut at the size that it has in the frame. No face of a film is
larger; landmarks of a stranger may say so."""


def scale_of(matrix_23: np.ndarray) -> float:
    """Px of the patch in a px of the frame."""
    return math.hypot(matrix_23[0, 0], matrix_23[1, 0])


def cut_patch(image_hwc: np.ndarray, matrix_23: np.ndarray, size_px: int) -> np.ndarray:
    """The patch cut out of a frame, (S, S, 3) float32 in 0..1; black outside the frame.

    image_hwc: (H, W, 3 or 4) uint8 or uint16, BGR. Where the patch is smaller than in the frame,
    each of its pixels is the mean of the area that it covers.
    """
    scale = scale_of(matrix_23)
    # First at the frame's own size: a warp that shrinks would skip pixels.
    cut_px = size_px if scale >= 1 else min(math.ceil(size_px / scale), MAX_NATIVE_PX)
    native_23 = rescaled(matrix_23, cut_px / size_px)
    # Black outside, as extraction leaves it, so that the model sees what it was trained on.
    patch_ssc = cv2.warpAffine(image_hwc, native_23, (cut_px, cut_px), flags=cv2.INTER_CUBIC)
    return resize(patch_ssc, size_px)[..., :3] / np.float32(np.iinfo(image_hwc.dtype).max)


def paste(
    image_hwc: np.ndarray, patch_ssc: np.ndarray, mask_ss: np.ndarray, matrix_23: np.ndarray
) -> None:
    """Blend a patch into the frame, in place; where the mask is 0 no level changes.

    image_hwc: (H, W, 3 or 4) uint8 or uint16; an alpha channel stays as it is. patch_ssc: float32
    in 0..1. mask_ss: share of the patch, float32 in 0..1.
    """
    size_px = len(patch_ssc)
    scale = scale_of(matrix_23)
    if scale > 1:  # first the mean of what a pixel of the frame covers
        native_px = max(round(size_px / scale), 1)
        patch_ssc, mask_ss = resize(patch_ssc, native_px), resize(mask_ss, native_px)
        matrix_23 = rescaled(matrix_23, native_px / size_px)
    # Only the part that the mask reaches: a face is mostly a small part of its frame.
    left, top, right, bottom = _region(mask_ss, matrix_23, image_hwc.shape)
    if left >= right or top >= bottom:
        return
    from_region_23 = matrix_23.copy()
    from_region_23[:, 2] += matrix_23[:, :2] @ (left, top)
    size = (right - left, bottom - top)
    patch_hwc = cv2.warpAffine(
        patch_ssc,
        from_region_23,
        size,
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        # The cubic reaches beyond the patch: black there would darken its edge.
        borderMode=cv2.BORDER_REPLICATE,
    )
    # Linear, since a cubic would ring below 0 and above 1; black beyond, where it has ended.
    mask_hw = cv2.warpAffine(
        mask_ss, from_region_23, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    region_hwc = image_hwc[top:bottom, left:right, :3]
    peak = np.float32(np.iinfo(image_hwc.dtype).max)
    np.clip(patch_hwc, 0, 1, out=patch_hwc)  # a cubic goes beyond
    # As a change of the frame: where the mask is 0 the level stays the same to the bit.
    change_hwc = patch_hwc * peak
    change_hwc -= region_hwc
    change_hwc *= mask_hw[..., None]
    change_hwc += region_hwc
    region_hwc[...] = np.rint(change_hwc, out=change_hwc)


def _region(
    mask_ss: np.ndarray, matrix_23: np.ndarray, shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of the frame that the mask may reach."""
    x, y, width, height = cv2.boundingRect((mask_ss > 0).view(np.uint8))
    if not width:
        return 0, 0, 0, 0
    # A pixel more on each side: there the edge of the mask fades out.
    corners_xy = np.array(
        [(x - 1, y - 1), (x + width, y - 1), (x - 1, y + height), (x + width, y + height)]
    )
    # All four corners: a turned face has its extremes at any of them.
    to_frame_23 = cv2.invertAffineTransform(matrix_23)
    corners_xy = corners_xy @ to_frame_23[:, :2].T + to_frame_23[:, 2]
    limits = np.array([shape[1], shape[0]])
    low = np.clip(np.floor(corners_xy.min(axis=0)), 0, limits).astype(int)
    high = np.clip(np.ceil(corners_xy.max(axis=0)) + 1, 0, limits).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
