"""Soft colours over the drawn face: shadows of hair, brows and lips, blush and beard.

Letters: p = points of an outline, 2 = (x, y), 3 = (x, y, z) in units of the head, yxc = row,
column, B G R.
"""

import cv2
import numpy as np

from .head import BROWS, EYES, Color
from .painting import Drawing, lips_outline
from .sheet import SUBPIXEL_BITS, curve, fixed_point

_RING_ANGLES = np.linspace(0.0, 2.0 * np.pi, 16, endpoint=False)
_CHEEK_RING = np.column_stack(
    [0.34 + 0.11 * np.cos(_RING_ANGLES), 0.50 + 0.08 * np.sin(_RING_ANGLES), np.full(16, 0.33)]
)


def tint_face(drawing: Drawing, place_23: np.ndarray, size_px: int) -> np.ndarray:
    """Soft colours that multiply the face: shadows, blush and beard, (S, S, 3) float32.

    place_23: maps px of the frame to px of this map.
    """
    identity, points = drawing.identity, drawing.landmarks_l2
    unit = drawing.camera.unit_px * float(np.hypot(place_23[0, 0], place_23[1, 0]))

    def fill(sheet_yxc: np.ndarray, points_p2: np.ndarray, color: Color) -> None:
        placed = points_p2 @ place_23[:, :2].T + place_23[:, 2]
        cv2.fillPoly(sheet_yxc, [fixed_point(placed)], color, cv2.LINE_AA, SUBPIXEL_BITS)

    soft = np.full((size_px, size_px, 3), 255, np.uint8)
    below_hair = drawing.hairline() + np.array([0.0, 0.05 * drawing.camera.unit_px])
    fill(soft, np.vstack([drawing.hairline(), below_hair[::-1]]), (120, 132, 150))
    for side in (0, 1):
        eye, brow = points[EYES[side]], points[BROWS[side]]
        fill(soft, np.vstack([eye[:4], 0.5 * (brow + eye[[0, 1, 1, 2, 3]])[::-1]]), (206, 208, 222))
        cheek = drawing.on_head(_CHEEK_RING * ((1.0 if side else -1.0), 1.0, 1.0))
        strength = round(58 * identity.blush)
        fill(soft, cheek, (255 - strength, 255 - strength, 255))
    lip = points[[59, 58, 57, 56, 55]]
    to_chin = (points[8] - points[57]) / np.linalg.norm(points[8] - points[57])
    low = lip + 0.055 * drawing.camera.unit_px * to_chin
    fill(soft, np.vstack([lip, low[::-1]]), (200, 204, 218))
    # Once for all soft parts; the beard has an edge of its own.
    tint = cv2.GaussianBlur(soft, (0, 0), 0.035 * unit).astype(np.float32)
    if identity.beard:
        crisp = np.full((size_px, size_px, 3), 255, np.uint8)
        fill(crisp, _beard(drawing), (84, 78, 74))
        fill(crisp, lips_outline(points[48:68]), (255, 255, 255))
        tint *= cv2.GaussianBlur(crisp, (0, 0), 0.014 * unit).astype(np.float32) / 255.0
    return tint / 255.0


def _beard(drawing: Drawing) -> np.ndarray:
    """Outline of a full beard: along the jaw, back over cheeks and upper lip."""
    head_l3 = drawing.head_l3
    half = np.vstack(
        [
            head_l3[1] * (0.90, 1.0, 1.0) + (0.0, -0.05, 0.12),
            head_l3[2] * (0.86, 1.0, 1.0) + (0.0, 0.04, 0.2),
            0.62 * head_l3[48] + 0.38 * head_l3[3] + (0.0, -0.03, 0.08),
            head_l3[48] + (-0.04, -0.075, 0.02),
            0.5 * (head_l3[31] + head_l3[49]) + (-0.02, -0.012, 0.0),
            0.5 * (head_l3[33] + head_l3[51]) + (0.0, -0.01, 0.0),
        ]
    )
    other = half[-2::-1] * (-1.0, 1.0, 1.0)
    inner = drawing.on_head(np.vstack([half, other]))
    jaw = drawing.landmarks_l2[:17]
    outward = jaw + 0.05 * (jaw - drawing.landmarks_l2[33])
    return np.vstack([curve(outward), curve(inner)[::-1]])
