"""The preview as faceswap lays it out: faces as they are, re-created and swapped, side by side.

A row is a face, six patches of it: A as it is, A by decoder A, A by decoder B, then the same of B.
A patch is the target of coverage 100 % with the network's picture painted into its middle, so the
surroundings show whether the swap fits. The masked-out area is tinted, and where the coverage is
below 100 % the corners of the trained square are marked.

Letters: s source side, d decoder, n face, p patch of a row, f edge of a target in px, o edge of a
prediction in px, c B,G,R.
"""

import re
from collections.abc import Sequence

import cv2
import numpy as np

LABELS = ("A", "A > A", "A > B", "B", "B > B", "B > A")
_PATCHES = len(LABELS)


def preview_image(
    predictions: np.ndarray,
    targets: np.ndarray,
    *,
    coverage: float,
    mask_opacity: float,
    mask_color: str,
    has_mask: bool,
    mask_toggled_off: bool = False,
    labels: Sequence[str] = LABELS,
) -> np.ndarray:
    """The picture, (height, width, 3) BGR uint8, with a strip of labels on top.

    Args:
        predictions: (2 source sides, 2 decoders, N, o, o, 3 or 4) uint8 BGR, a learnt mask last.
            Of each side first its own decoder (re-created), then the other one (swapped): A by A,
            A by B; B by B, B by A.
        targets: (2 sides, N, f, f, 3 or 4) uint8 BGR at coverage 100 %, the face mask last.
        coverage: Part of the target's edge that was trained, 0..1.
        mask_opacity: Strength of the tint of what is outside the mask, percent.
        mask_color: Colour of the tint and of the coverage corners, ``#rrggbb``.
        has_mask: The model trains with a mask; without, targets need none and nothing is tinted.
        mask_toggled_off: The user asked to see no tint.
        labels: One text for each patch of a row.

    Raises:
        ValueError: An array has another shape or dtype than above, or the colour is no colour.
    """
    _check(predictions, targets, coverage, mask_opacity, has_mask, labels)
    color_c = color_of(mask_color)
    patches_npffc = _patches(predictions, targets, coverage, color_c)
    if has_mask and not mask_toggled_off:
        # Float32 in the order of faceswap's arithmetic, so that the oracle's bytes come out.
        weights_npff = (1.0 - _masks(predictions, targets)) * np.float32(mask_opacity / 100.0)
        weights_npff1 = weights_npff[..., None]
        patches_npffc = patches_npffc * (1.0 - weights_npff1) + color_c * weights_npff1
    # Cut off and not rounded, as in faceswap.
    body = _arrange((patches_npffc * np.float32(255.0)).astype(np.uint8))
    header = _header(labels, patches_npffc.shape[2], body.shape[1])
    return np.concatenate([header, body])


def _check(
    predictions: np.ndarray,
    targets: np.ndarray,
    coverage: float,
    mask_opacity: float,
    has_mask: bool,
    labels: Sequence[str],
) -> None:
    shape = predictions.shape
    if predictions.dtype != np.uint8 or targets.dtype != np.uint8:
        # Float pictures would pass every check of shape and come out black.
        kinds = f"{predictions.dtype} and {targets.dtype}"
        raise ValueError(f"predictions and targets must be uint8, got {kinds}")
    square = len(shape) == 6 and shape[3] == shape[4] > 0
    if not square or shape[:2] != (2, 2) or shape[2] < 1 or shape[5] not in (3, 4):
        raise ValueError(f"predictions must be (2, 2, N, o, o, 3 or 4), got {shape}")
    expected = (2, shape[2])
    square = targets.ndim == 5 and targets.shape[2] == targets.shape[3] >= shape[3]
    if not square or targets.shape[:2] != expected or targets.shape[4] not in (3, 4):
        text = f"(2, {shape[2]}, f, f, 3 or 4) with f at least {shape[3]}"
        raise ValueError(f"targets must be {text}, got {targets.shape}")
    if has_mask and targets.shape[4] != 4:
        raise ValueError(f"targets must hold the face mask as 4th channel, got {targets.shape}")
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must be above 0 and at most 1, got {coverage!r}")
    if not 0.0 <= mask_opacity <= 100.0:
        raise ValueError(f"mask_opacity must be from 0 to 100, got {mask_opacity!r}")
    if len(labels) != _PATCHES:
        raise ValueError(f"labels must be {_PATCHES} texts, got {len(labels)}")


def color_of(text: str) -> np.ndarray:
    """(3,) float32 B,G,R in 0..1."""
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ValueError(f"mask_color must be like #ff0000, got {text!r}")
    # Reversed: written as R, G, B, and drawn as B, G, R.
    return np.frombuffer(bytes.fromhex(text[1:]), np.uint8)[::-1].astype(np.float32) / 255.0


def _rows_of(from_target_snx: np.ndarray, from_decoder_sdnx: np.ndarray) -> np.ndarray:
    """(N, 6, ...): original, re-created and swapped of A, then of B."""
    columns = []
    for side in (0, 1):
        columns += [from_target_snx[side], from_decoder_sdnx[side, 0], from_decoder_sdnx[side, 1]]
    return np.stack(columns, axis=1)


def _patches(
    predictions: np.ndarray, targets: np.ndarray, coverage: float, color_c: np.ndarray
) -> np.ndarray:
    """(N, 6, f, f, 3) float32 in 0..1: targets with the predictions in their middle."""
    out_px, full_px = predictions.shape[3], targets.shape[2]
    pad = (full_px - out_px) // 2
    middle = slice(pad, pad + out_px)
    targets_snffc = targets[..., :3].astype(np.float32) / 255.0
    pictures = predictions[..., :3].astype(np.float32) / 255.0
    filled = _rows_of(targets_snffc[:, :, middle, middle], pictures)
    # The middle as it is in the target is wanted after the corners were painted.
    around_snffc = targets_snffc.copy()
    if coverage < 1.0:
        _paint_corners(around_snffc, pad, color_c)
    patches = _rows_of(around_snffc, np.stack([around_snffc, around_snffc], axis=1))
    patches[:, :, middle, middle] = filled
    return patches


def _paint_corners(images_snffc: np.ndarray, pad: int, color_c: np.ndarray) -> None:
    """Paint a block at each corner of the trained square; its middle is filled afterwards."""
    full_px = images_snffc.shape[2]
    # A pixel wider than the square, which is filled later: so a frame of one pixel is left.
    low, high, edge = max(pad - 1, 0), min(full_px - pad + 1, full_px), full_px // 4
    near, far = slice(low, low + edge), slice(high - edge, high)
    for rows in (near, far):
        for columns in (near, far):
            images_snffc[:, :, rows, columns] = color_c


def _masks(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N, 6, f, f) float32 in 0..1: the target's mask; of predictions the learnt one, if any."""
    masks_snff = targets[..., 3].astype(np.float32) / 255.0
    learnt_sdnff = np.stack([masks_snff, masks_snff], axis=1)
    if predictions.shape[-1] == 4:
        out_px = predictions.shape[3]
        pad = (targets.shape[2] - out_px) // 2
        middle = slice(pad, pad + out_px)
        # Outside its square the model has learned no mask: all of that is tinted.
        learnt_sdnff = np.zeros_like(learnt_sdnff)
        learnt_sdnff[..., middle, middle] = predictions[..., 3].astype(np.float32) / 255.0
    return _rows_of(masks_snff, learnt_sdnff)


def _arrange(patches_npffc: np.ndarray) -> np.ndarray:
    """Patches as one picture; where it were taller than wide, the lower half goes to the right."""
    rows = [np.concatenate(list(row), axis=1) for row in patches_npffc]
    # Six patches are as wide as six rows are high: up to there the picture is not upright.
    if len(rows) <= _PATCHES:
        return np.concatenate(rows)
    upper = (len(rows) + 1) // 2
    lower = rows[upper:] + [np.zeros_like(rows[0])] * (2 * upper - len(rows))
    return np.concatenate([np.concatenate(rows[:upper]), np.concatenate(lower)], axis=1)


def _header(labels: Sequence[str], full_px: int, width: int) -> np.ndarray:
    """White strip with a centred text above each patch."""
    # faceswap's proportions.
    height, scale, thickness = int(full_px / 4.5), full_px / 140.0, max(1, full_px // 64)
    header = np.full((height, width, 3), 255, np.uint8)
    # Over the whole width: a picture of two halves needs its labels twice.
    for column in range(width // full_px):
        text = labels[column % _PATCHES]
        (text_width, text_height), _ = cv2.getTextSize(
            text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness
        )
        left = column * full_px + int((full_px - text_width) / 2)
        base = int((height + text_height) / 2)
        cv2.putText(
            header,
            text,
            (left, base),
            cv2.FONT_HERSHEY_SIMPLEX,
            scale,
            (0, 0, 0),
            thickness,
            cv2.LINE_AA,
        )
    return header
