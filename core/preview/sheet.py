"""Sheets made to judge by: tiles enlarged, labelled and arranged; history and comparisons too.

Letters: s sides, n faces, k tiles of a face, e edge of a tile in px, c B,G,R.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..config import PreviewConfig
from ..system.printable import printable
from .grid import color_of
from .tiles import MASK, ORIGINAL, RECREATED, Tiles

LEAST_TILE_PX = 128
"""Edge that a tile has at least: smaller ones are enlarged by a whole number."""

MASKS = ("outline", "tint", "off")
"""Ways to show the mask."""

_ENLARGE = {"lanczos": cv2.INTER_LANCZOS4, "nearest": cv2.INTER_NEAREST}
_MOST_ROWS = 8
_GAP_PX, _FACE_GAP_PX, _SIDE_GAP_PX = 2, 6, 14
"""Room between the tiles of a face, between faces, and between sides."""

_LINE_PX = 24
BACKGROUND, _TEXT = (32, 32, 32), (235, 235, 235)
_LETTER_SCALE = 0.45
_LETTERS_OF = {"a": "A", "b": "B"}


@dataclass(frozen=True)
class SheetStyle:
    """How tiles are shown."""

    enlarge: str = "lanczos"
    mask: str = "outline"
    mask_color: str = "#ff0000"
    mask_opacity: int = 30

    @classmethod
    def of(cls, settings: PreviewConfig, mask: str) -> "SheetStyle":
        """The style of these settings, with the mask shown as one of `MASKS`."""
        return cls(settings.enlarge, mask, settings.mask_color, settings.mask_opacity)


def preview_sheet(tiles: Tiles, style: SheetStyle, title: str) -> np.ndarray:
    """The sheet, (H, W, 3) BGR uint8: the faces of A on the left, those of B on the right.

    A face has its original, its re-created, its swapped picture and, where there is one, the mask
    of the swap. The mask is shown on the first two, and on the swap not: there a line would hide
    the seam. Corners mark the square that is trained on, where it is not all of a tile.
    """
    blocks, labels = [], []
    for number, side in enumerate(tiles.sides):
        block = enlarged(tiles.images[number], style.enlarge)
        if tiles.masks is not None and style.mask != "off":
            # Enlarged before the outline is drawn, which stays a pixel wide at any factor.
            masks = enlarged(tiles.masks[number], style.enlarge)
            for kind in (ORIGINAL, RECREATED):
                for tile, mask in zip(block[:, kind], masks[:, kind], strict=True):
                    _show_mask(tile, mask, style)
        # Not on the mask itself: it is black outside the square, which says the same.
        _mark_corners(block[:, :MASK], tiles, color_of(style.mask_color))
        blocks.append(block)
        labels.append(labels_of(side)[: block.shape[1]])
    return arranged(blocks, labels, title)


def labels_of(side: str) -> list[str]:
    """Labels of the kinds of tiles, in their order."""
    own = _LETTERS_OF[side]
    other = next(letter for letter in _LETTERS_OF.values() if letter != own)
    return [own, f"{own} re-created", f"{own} as {other}", "mask of the swap"]


def enlarged(tiles: np.ndarray, how: str) -> np.ndarray:
    """Tiles of at least 128 px, (..., e, e, 3) or, of masks, (..., e, e); a copy."""
    is_mask = tiles.shape[-1] != 3
    shape = tiles.shape if is_mask else tiles.shape[:-1]
    edge_px = shape[-1]
    # Whole, so that every pixel is enlarged alike.
    factor = -(-LEAST_TILE_PX // edge_px)
    # Copied all the same: masks and corners are drawn into what comes back.
    if factor == 1:
        return tiles.copy()
    size = (edge_px * factor, edge_px * factor)
    channels = () if is_mask else (3,)
    flat = tiles.reshape(-1, edge_px, edge_px, *channels)
    larger = [cv2.resize(tile, size, interpolation=_ENLARGE[how]) for tile in flat]
    return np.stack(larger).reshape(*shape[:-2], *size, *channels)


def arranged(
    blocks: Sequence[np.ndarray], labels: Sequence[Sequence[str]], title: str
) -> np.ndarray:
    """Tiles in one picture, (H, W, 3) BGR uint8: a title, a line of labels, rows of faces.

    Args:
        blocks: (n, k, e, e, 3) uint8 each, of as many faces and of one size; they stand side by
            side, each with its faces in columns of up to 8.
        labels: Texts of each block, k each.
        title: Line at the top.
    """
    num_faces, _, tile_px = blocks[0].shape[:3]
    num_columns = -(-num_faces // _MOST_ROWS)
    # Of like length: 9 faces stand as 5 and 4, not as 8 and 1.
    num_rows = -(-num_faces // num_columns)
    lefts, right = _lefts([block.shape[1] for block in blocks], num_columns, tile_px)
    top, step = 2 * _LINE_PX, tile_px + _GAP_PX
    sheet = np.full((top + num_rows * step, right, 3), BACKGROUND, np.uint8)
    _write(sheet, title, _GAP_PX + 2, _LINE_PX - 8, right)
    for block, texts, columns in zip(blocks, labels, lefts, strict=True):
        for column, of_column in enumerate(columns):
            faces = block[column * num_rows :][:num_rows]
            for kind, left in enumerate(of_column):
                # Once a column, not a tile: the rows below are read by it.
                _write(sheet, texts[kind], left + 2, top - 8, tile_px - 4)
                for row, face in enumerate(faces):
                    at = top + row * step
                    sheet[at : at + tile_px, left : left + tile_px] = face[kind]
    return sheet


def _lefts(
    num_kinds: Sequence[int], num_columns: int, tile_px: int
) -> tuple[list[list[list[int]]], int]:
    """Left edges of the tiles by block, column of faces and kind; and the sheet's width."""
    lefts, left = [], _GAP_PX
    for kinds in num_kinds:
        columns = []
        for _ in range(num_columns):
            columns.append([left + kind * (tile_px + _GAP_PX) for kind in range(kinds)])
            left += kinds * (tile_px + _GAP_PX) + _FACE_GAP_PX
        lefts.append(columns)
        left += _SIDE_GAP_PX - _FACE_GAP_PX
    return lefts, left - _SIDE_GAP_PX


def _write(sheet: np.ndarray, text: str, left: int, base: int, width: int) -> None:
    """Write a text that has to fit a width; a longer one is made smaller."""
    # The bytes of a name that are no UTF-8 would end the process inside OpenCV.
    text = printable(text)
    (text_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _LETTER_SCALE, 1)
    # Smaller, not cut: the end of a label is what tells kinds apart.
    scale = _LETTER_SCALE * min(1.0, width / max(text_width, 1))
    cv2.putText(sheet, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, scale, _TEXT, 1, cv2.LINE_AA)


def _show_mask(tile: np.ndarray, mask: np.ndarray, style: SheetStyle) -> None:
    """Show the mask on a tile, (e, e, 3) and (e, e) uint8, in place."""
    color_c = color_of(style.mask_color) * 255
    if style.mask == "tint":
        # In fp32: by a plain 255 NumPy would divide bytes in fp64.
        share_ee1 = (1 - mask[..., None] / np.float32(255)) * style.mask_opacity / 100
        tile[:] = np.rint(tile + (color_c - tile) * share_ee1)
        return
    # OpenCV takes no bool.
    inside = (mask >= 128).view(np.uint8)
    outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(tile, outlines, -1, color_c.tolist(), 1, cv2.LINE_AA)


def _mark_corners(block: np.ndarray, tiles: Tiles, color_c: np.ndarray) -> None:
    """Draw a right angle at each corner of the trained square, in place, just outside of it."""
    full_px, shown_px = tiles.images.shape[-2], block.shape[-2]
    if tiles.trained_px >= full_px:
        return
    # Exact, since `enlarged` multiplies by a whole number.
    factor = shown_px // full_px
    low = (full_px - tiles.trained_px) // 2 * factor - 1
    high = shown_px - 1 - low
    arm = shown_px // 8
    near, far = slice(low, low + arm), slice(high + 1 - arm, high + 1)
    color = np.rint(color_c * 255).astype(np.uint8)
    for edge in (low, high):
        for part in (near, far):
            block[..., edge, part, :] = color
            block[..., part, edge, :] = color
