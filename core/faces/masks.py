"""Masks of a crop: drawn from the landmarks, or stored in the PNG and cut to the crop.

`components` is the union of eight filled hulls, `extended` the same with the eyebrows raised. The
eye and mouth areas are hulls too, widened and softened. All are uint8, 0 outside and 255 inside,
with an anti-aliased rim.

Letters: l = landmark (68), 2 = (x, y) in px of the crop, S = edge of the crop in px.
"""

import functools
from typing import Protocol

import cv2
import numpy as np

from .geometry import (
    Alignment,
    Crop,
    crop_landmarks,
    crop_matrix,
    cut,
    resize,
    stored_box,
    warp,
)
from .png import AS_PICTURE, FaceFileError, FaceHeader, StoredMask

LANDMARK_MASKS = ("components", "extended")
AREAS = ("eye", "mouth")
EMPTY_SHARE = 0.01
"""Part of a crop below which a mask leaves nothing to train; a face fills a tenth and more.
Chosen, unmeasured."""

# faceswap's, as the hulls are: masks are compared with it pixel by pixel.
_AREA_DILATION_PERCENT = 2.5
_NUM_NAMED = 8


def _indices(*parts: int | tuple[int, int]) -> np.ndarray:
    """Landmark numbers; a pair is a range, its end excluded."""
    ranges = [part if isinstance(part, tuple) else (part, part + 1) for part in parts]
    return np.concatenate([np.arange(*bounds) for bounds in ranges])


_FACE_HULLS = (
    _indices((0, 9), 17),
    _indices((8, 17), 26),
    _indices((17, 20), 8),
    _indices((24, 27), 8),
    _indices((19, 25), 8),
    _indices((17, 22), 27, (31, 36), 8),
    _indices((22, 27), 27, (31, 36), 8),
    _indices((27, 31), (31, 36)),
)
_AREA_HULLS = {
    "eye": (_indices((36, 42)), _indices((42, 48))),
    "mouth": (_indices((48, 60)),),
}


class _HasFace(Protocol):
    """What of a face the masks are made from."""

    landmarks_l2: np.ndarray
    alignment: Alignment

    def stored_mask(self, name: str) -> StoredMask:
        """The mask of that name in its file."""


def landmark_mask(
    kind: str, landmarks_l2: np.ndarray, size_px: int, dilation: float = 0.0
) -> np.ndarray:
    """Mask of the face drawn from its landmarks, (S, S) uint8.

    landmarks_l2: (68, 2) px of the crop. dilation: percent of S by which the mask grows, or
    shrinks where negative.
    """
    if kind not in LANDMARK_MASKS:
        raise ValueError(f"kind must be one of {LANDMARK_MASKS}, got {kind!r}")
    points_l2 = _raised_eyebrows(landmarks_l2) if kind == "extended" else landmarks_l2
    return _dilated(_filled(points_l2, _FACE_HULLS, size_px), dilation, size_px)


def area_mask(area: str, landmarks_l2: np.ndarray, size_px: int) -> np.ndarray:
    """Area of the eyes or of the mouth, widened by 2.5 % of S and softened, (S, S) uint8.

    landmarks_l2: (68, 2) px of the crop.
    """
    if area not in AREAS:
        raise ValueError(f"area must be one of {AREAS}, got {area!r}")
    area_ss = _filled(landmarks_l2, _AREA_HULLS[area], size_px)
    # faceswap's share of the edge, so that the weights of eyes and mouth fade as they do there.
    blur_kernel = size_px // 16
    # Where neither reaches there is nothing to do, which is nine tenths of a crop.
    reach_px = round(size_px * _AREA_DILATION_PERCENT / 100.0) + blur_kernel
    left, top, width, height = cv2.boundingRect(area_ss)
    if width == 0:
        return area_ss
    part_ss = area_ss[
        max(top - reach_px, 0) : top + height + reach_px,
        max(left - reach_px, 0) : left + width + reach_px,
    ]
    part_ss[:] = _blurred(_dilated(part_ss, _AREA_DILATION_PERCENT, size_px), blur_kernel)
    return area_ss


def stored_mask(
    mask: StoredMask,
    alignment: Alignment,
    crop: Crop,
    *,
    dilation: float,
    blur_kernel: int,
    threshold: float,
) -> np.ndarray:
    """A stored mask cut to the crop, (S, S) uint8. Dilation, threshold and blur act before the cut.

    dilation: percent of the stored size. blur_kernel: px of the stored mask, 0 is off. threshold:
    percent, 0 is off: what is nearer than that to 0 or 255 becomes 0 or 255.
    Raises FaceFileError where the stored data are damaged.
    """
    pixels = _dilated(mask.pixels(), dilation, mask.size_px)
    if threshold:
        pixels = cv2.LUT(pixels, _threshold_table(threshold))
    # After the threshold, which would take the soft rim away again.
    if blur_kernel:
        pixels = _blurred(pixels, blur_kernel)
    if mask.centering == AS_PICTURE:
        to_picture_33 = np.linalg.inv(mask.affine_33)
        return warp(pixels, crop_matrix(alignment, crop) @ to_picture_33, crop.size_px)
    patch = cut(pixels, stored_box(alignment, mask.size_px, mask.centering, crop))
    # The stored size, not that of the cut, decides between cubic and area.
    return resize(patch, crop.size_px, from_px=mask.size_px)


def training_masks(
    face: _HasFace,
    crop: Crop,
    *,
    mask_type: str,
    dilation: float,
    blur_kernel: int,
    threshold: float,
) -> np.ndarray:
    """Face mask, eye area and mouth area of a crop, (S, S, 3) uint8.

    mask_type: `components` or `extended` are drawn from the landmarks (blur and threshold are for
    stored masks), `none` is 255 everywhere, any other name is a mask stored in the file.
    Raises FaceFileError where the file has no such mask, or a damaged one.
    """
    size_px = crop.size_px
    # Always, whatever mask is chosen: the areas of eyes and mouth are drawn from them.
    landmarks_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crop)
    masks = np.empty((size_px, size_px, 3), np.uint8)
    if mask_type == "none":
        masks[..., 0] = 255
    elif mask_type in LANDMARK_MASKS:
        masks[..., 0] = landmark_mask(mask_type, landmarks_l2, size_px, dilation)
    else:
        masks[..., 0] = stored_mask(
            face.stored_mask(mask_type),
            face.alignment,
            crop,
            dilation=dilation,
            blur_kernel=blur_kernel,
            threshold=threshold,
        )
    masks[..., 1] = area_mask("eye", landmarks_l2, size_px)
    masks[..., 2] = area_mask("mouth", landmarks_l2, size_px)
    return masks


def areas_outside(landmarks_l2: np.ndarray, size_px: int) -> list[str]:
    """The areas that lie mostly outside the crop, by the points that they are drawn from."""
    # By the points: half of them are enough to say where an area would be.
    is_inside: np.ndarray = np.all((landmarks_l2 >= 0) & (landmarks_l2 < size_px), axis=1)
    return [
        area for area, hulls in _AREA_HULLS.items() if is_inside[np.concatenate(hulls)].mean() < 0.5
    ]


def is_empty(mask: np.ndarray) -> bool:
    """Whether (almost) nothing lies inside the mask, uint8."""
    return float(mask.mean()) < EMPTY_SHARE * 255


def why_empty(face: _HasFace, mask_type: str) -> str:
    """What left a face's mask empty, and what to do about it.

    Raises FaceFileError where the file no longer has that mask.
    """
    if mask_type not in LANDMARK_MASKS:
        pixels = face.stored_mask(mask_type).pixels()
        # A usual slip of those who make masks: booleans written as bytes.
        if pixels.max() == 1:
            return (
                f"its mask {mask_type!r} holds 0 and 1 in place of 0 and 255: multiply it by 255 "
                "where it was made, and store it again"
            )
        if is_empty(pixels):
            return f"its mask {mask_type!r} is empty: make it again, or remove the face"
    return (
        f"its mask {mask_type!r} has nothing inside the crop: bring data.mask_dilation, "
        "data.coverage and data.vertical_offset nearer to their defaults, or remove the face"
    )


def named_mask(header: FaceHeader, name: str) -> StoredMask:
    """The stored mask of that name. Raises FaceFileError where the file has none to be used."""
    found = header.masks.get(name)
    if found is None:
        known = sorted(set(header.masks) - set(LANDMARK_MASKS))
        some = ", ".join(known[:_NUM_NAMED]) + (", ..." if len(known) > _NUM_NAMED else "")
        stored = f" (stored: {some})" if known else ", nor any other that is stored"
        raise FaceFileError(
            f"has no mask {name!r}{stored}: set data.mask_type to "
            f"{'one of those or to ' if known else ''}{' or '.join(LANDMARK_MASKS)}, which need no "
            "stored mask"
        )
    if isinstance(found, str):
        raise FaceFileError(found)
    return found


def _raised_eyebrows(landmarks_l2: np.ndarray) -> np.ndarray:
    """The landmarks with the eyebrows moved up by half their distance from the eyes."""
    raised = landmarks_l2.copy()
    # `//` on floats rounds down: whole pixels, as in faceswap.
    middle_left = (raised[36] + raised[0]) // 2
    middle_right = (raised[16] + raised[45]) // 2
    outer_left = (raised[36] + middle_left) // 2
    outer_right = (raised[45] + middle_right) // 2
    below_left = np.vstack([outer_left, raised[36:40]])
    below_right = np.vstack([raised[42:46], outer_right])
    raised[17:22] += (raised[17:22] - below_left) // 2
    raised[22:27] += (raised[22:27] - below_right) // 2
    return raised


def _filled(points_l2: np.ndarray, hulls: tuple[np.ndarray, ...], size_px: int) -> np.ndarray:
    """Union of the filled convex hulls of groups of points."""
    mask = np.zeros((size_px, size_px), np.uint8)
    # Whole pixels, as in faceswap: a mask is compared with its own to the bit.
    points = np.rint(points_l2).astype(np.int32)
    for group in hulls:
        cv2.fillConvexPoly(mask, cv2.convexHull(points[group]), 255, lineType=cv2.LINE_AA)
    return mask


def _dilated(mask: np.ndarray, percent: float, edge_px: int) -> np.ndarray:
    """The mask grown, or shrunk, by an ellipse of that percentage of the edge."""
    kernel_px = round(edge_px * abs(percent) / 100.0)
    # OpenCV refuses a kernel of no size; so small a share moves no pixel.
    if kernel_px == 0:
        return mask
    kernel = _ellipse(kernel_px)
    return cv2.dilate(mask, kernel) if percent > 0 else cv2.erode(mask, kernel)


@functools.lru_cache(maxsize=64)
def _ellipse(kernel_px: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel_px, kernel_px))


def _blurred(mask: np.ndarray, kernel_px: int) -> np.ndarray:
    """The mask after one Gaussian blur; an even kernel is made odd."""
    # OpenCV blurs about a middle pixel only.
    kernel_px += 1 - kernel_px % 2
    return cv2.GaussianBlur(mask, (kernel_px, kernel_px), 0)


@functools.lru_cache(maxsize=64)
def _threshold_table(percent: float) -> np.ndarray:
    margin = percent / 100.0 * 255.0
    table = np.arange(256, dtype=np.uint8)
    table[table < margin] = 0
    table[table > 255.0 - margin] = 255
    return table
