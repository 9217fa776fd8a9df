"""A face's way out of its frame and back in float64, one pixel after the other as it is documented.

Cubic with a = -0.75 where a picture grows or turns, the mean of the covered area where it shrinks,
the mask linear; the centre of a pixel has whole numbers. What mien gives differs by its last
rounding to a level.

Letters: S, T edges of a patch in px, h, w = row and column of a frame, s, t = those of a patch,
c = channel, 23 = 2 x 3 matrix from px of the frame to px of the patch.
"""

import math

import numpy as np


def cut(frame_hwc, matrix_23, size_px):
    """Levels of the patch, (S, S, c), before they are rounded; the frame's black outside."""
    face_px = size_px / math.hypot(*matrix_23[:, 0])
    native_px = max(math.ceil(face_px), size_px)
    to_frame_23 = _inverted(_enlarged(matrix_23, native_px / size_px))
    native_ssc = _sampled(frame_hwc, to_frame_23, (native_px, native_px), _cubic, is_edged=True)
    # Levels, too, where the patch is made of it in a second step.
    native_ssc = native_ssc.clip(0, np.iinfo(frame_hwc.dtype).max)
    return native_ssc if native_px == size_px else _shrunk(np.rint(native_ssc), size_px)


def pasted(frame_hwc, patch_ssc, mask_ss, matrix_23):
    """Levels of the frame with the patch blended into it, before they are rounded."""
    patch_ssc, mask_ssc = (np.float64(each) for each in (patch_ssc, mask_ss[..., None]))
    size_px = len(patch_ssc)
    face_px = size_px / math.hypot(*matrix_23[:, 0])
    if face_px < size_px:
        native_px = round(face_px)
        patch_ssc, mask_ssc = (_shrunk(each, native_px) for each in (patch_ssc, mask_ssc))
        matrix_23 = _enlarged(matrix_23, native_px / size_px)
    shape = frame_hwc.shape[:2]
    patch_hwc = _sampled(patch_ssc, matrix_23, shape, _cubic, is_edged=False).clip(0, 1)
    mask_hwc = _sampled(mask_ssc, matrix_23, shape, _linear, is_edged=True)
    peak = np.iinfo(frame_hwc.dtype).max
    return frame_hwc + (patch_hwc * peak - frame_hwc) * mask_hwc


def _cubic(distance):
    near, a = np.abs(distance), -0.75
    inner = ((a + 2) * near - (a + 3)) * near**2 + 1
    outer = a * (((near - 5) * near + 8) * near - 4)
    return np.where(near <= 1, inner, np.where(near < 2, outer, 0.0))


def _linear(distance):
    return np.clip(1 - np.abs(distance), 0, None)


def _sampled(image_hwc, matrix_23, shape, weight, *, is_edged):
    """The image at the places that a matrix gives each pixel of another one.

    is_edged: the image ends in black; else its outermost pixels go on for ever.
    """
    rows, columns = np.indices(shape)
    (x_x, x_y, x), (y_x, y_y, y) = matrix_23
    x_hw, y_hw = x_x * columns + x_y * rows + x, y_x * columns + y_y * rows + y
    height, width = image_hwc.shape[:2]
    total_hwc = np.zeros((*shape, image_hwc.shape[2]))
    for below in range(-1, 3):
        row_hw = np.floor(y_hw).astype(int) + below
        for right in range(-1, 3):
            column_hw = np.floor(x_hw).astype(int) + right
            weight_hw = weight(y_hw - row_hw) * weight(x_hw - column_hw)
            if is_edged:
                weight_hw *= (row_hw >= 0) & (row_hw < height)
                weight_hw *= (column_hw >= 0) & (column_hw < width)
            pixels = image_hwc[row_hw.clip(0, height - 1), column_hw.clip(0, width - 1)]
            total_hwc += weight_hw[..., None] * pixels
    return total_hwc


def _shrunk(image_ssc, size_px):
    """The mean of the area that each pixel of a smaller picture covers."""
    edge_px = len(image_ssc)
    ends, pixels = np.arange(size_px + 1) * edge_px / size_px, np.arange(edge_px)
    covered = np.minimum(ends[1:, None], pixels + 1) - np.maximum(ends[:-1, None], pixels)
    share_ts = covered.clip(0, None) * size_px / edge_px
    return np.tensordot(share_ts, share_ts @ image_ssc, (1, 0))


def _inverted(matrix_23):
    return np.linalg.inv(np.vstack([matrix_23, (0, 0, 1)]))[:2]


def _enlarged(matrix_23, factor):
    """The matrix to a picture of the same area, whose corner is half a pixel before a centre."""
    corner_23 = np.array([[0, 0, 0.5], [0, 0, 0.5]])
    return (matrix_23 + corner_23) * factor - corner_23
