"""The surface that is drawn on: polygons, lines and curves with anti-aliased edges, and windows.

Letters: p = points of a curve, 2 = (x, y) in px of the sheet, yx and yxc = row, column, B G R.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from .head import Color

# Whole pixels would let a face jump between two frames that differ little.
SUBPIXEL_BITS = 4
DARK = (24, 20, 22)
WHITE = (246, 246, 246)


@dataclass
class Sheet:
    """A picture being drawn, and where on it the light of the head falls.

    image_yxc: uint8. lit_yx: uint8, share of the head's light. unit_px: px of one head unit.
    """

    image_yxc: np.ndarray
    lit_yx: np.ndarray
    unit_px: float

    def fill(self, points_p2: np.ndarray, color: Color, lit: int | None = None) -> None:
        """Fill a polygon; ``lit`` also sets the share of light there."""
        points = fixed_point(points_p2)
        cv2.fillPoly(self.image_yxc, [points], color, cv2.LINE_AA, SUBPIXEL_BITS)
        if lit is not None:
            cv2.fillPoly(self.lit_yx, [points], (lit,), cv2.LINE_AA, SUBPIXEL_BITS)

    def stroke(self, points_p2: np.ndarray, color: Color, width: float) -> None:
        """Draw an open line; width in units of the head."""
        width_px = max(1, round(width * self.unit_px))
        points = fixed_point(points_p2)
        cv2.polylines(self.image_yxc, [points], False, color, width_px, cv2.LINE_AA, SUBPIXEL_BITS)

    def disc(self, centre_2: np.ndarray, radius: float, color: Color) -> None:
        """Fill a circle; radius in units of the head."""
        centre_x, centre_y = fixed_point(centre_2).tolist()
        radius_fixed = max(1, round(radius * self.unit_px * 2**SUBPIXEL_BITS))
        cv2.circle(
            self.image_yxc,
            (centre_x, centre_y),
            radius_fixed,
            color,
            -1,
            cv2.LINE_AA,
            SUBPIXEL_BITS,
        )

    def window(self, outline_p2: np.ndarray, margin: float = 0.03) -> "Window":
        """A part of the sheet to draw on that will show through an outline only."""
        return Window(self, outline_p2, margin)


class Window:
    """Draws beneath an outline: on leaving, only what lies inside it is kept."""

    def __init__(self, sheet: Sheet, outline_p2: np.ndarray, margin: float) -> None:
        margin_px = margin * sheet.unit_px + 2
        height, width = sheet.image_yxc.shape[:2]
        low = np.floor(outline_p2.min(axis=0) - margin_px).astype(int).clip(0, (width, height))
        high = np.ceil(outline_p2.max(axis=0) + margin_px).astype(int).clip(0, (width, height))
        self._part = (slice(low[1], high[1]), slice(low[0], high[0]))
        self._sheet = sheet
        self._corner_2 = low
        self._outline_p2 = outline_p2

    def __enter__(self) -> "tuple[Sheet, np.ndarray]":
        self._before_yxc = self._sheet.image_yxc[self._part]
        self._drawn = Sheet(
            self._before_yxc.copy(), self._sheet.lit_yx[self._part].copy(), self._sheet.unit_px
        )
        return self._drawn, self._corner_2

    def __exit__(self, *_: object) -> None:
        inside_yx = np.zeros(self._before_yxc.shape[:2], np.uint8)
        points = fixed_point(self._outline_p2 - self._corner_2)
        cv2.fillPoly(inside_yx, [points], (255,), cv2.LINE_AA, SUBPIXEL_BITS)
        weight = inside_yx * np.float32(1.0 / 255.0)
        self._before_yxc[:] = cv2.blendLinear(
            self._drawn.image_yxc, self._before_yxc.copy(), weight, np.float32(1.0) - weight
        )


def curve(points_p2: np.ndarray, *, closed: bool = False, steps: int = 6) -> np.ndarray:
    """A Catmull-Rom curve through all the points, with ``steps`` points for each part."""
    return _curve_weights(len(points_p2), closed, steps) @ points_p2


# Kept: curves have few numbers of points, and the weights hang on nothing else.
@functools.lru_cache(maxsize=64)
def _curve_weights(num_points: int, closed: bool, steps: int) -> np.ndarray:
    """(points of the curve, given points): the curve is linear in what it goes through."""
    t = np.linspace(0.0, 1.0, steps, endpoint=False)
    basis = np.column_stack(
        [
            -0.5 * t + t**2 - 0.5 * t**3,
            1.0 - 2.5 * t**2 + 1.5 * t**3,
            0.5 * t + 2.0 * t**2 - 1.5 * t**3,
            -0.5 * t**2 + 0.5 * t**3,
        ]
    )
    num_parts = num_points if closed else num_points - 1
    weights = np.zeros((num_parts * steps + (not closed), num_points))
    for part in range(num_parts):
        for column, offset in enumerate((-1, 0, 1, 2)):
            index = part + offset
            index = index % num_points if closed else min(max(index, 0), num_points - 1)
            weights[part * steps : (part + 1) * steps, index] += basis[:, column]
    if not closed:
        weights[-1, -1] = 1.0
    return weights


def fixed_point(points_p2: np.ndarray) -> np.ndarray:
    """The points as OpenCV draws them with ``SUBPIXEL_BITS``, int32."""
    return np.rint(points_p2 * 2**SUBPIXEL_BITS).astype(np.int32)


def mix(color: Color, other: Color, share: float) -> Color:
    """The colour that is ``share`` of the way from one to another."""
    blue, green, red = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return blue, green, red
