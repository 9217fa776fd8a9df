"""The preview sheet: its order and sizes, the pasted swap, the mask in its three ways."""

import cv2
import numpy as np
import pytest

from mien.core.blend import FEATHER_SHARE, softened
from mien.core.config import from_dict
from mien.core.preview.faces import PreviewFaces
from mien.core.preview.image import shown_mask
from mien.core.preview.look import Look
from mien.core.preview.sheet import SheetStyle, arranged, enlarged, preview_sheet
from mien.core.preview.tiles import MASK, ORIGINAL, RECREATED, SWAPPED, tiles_of

OFF = SheetStyle(mask="off")


def _look(num_faces=1, out_px=24, full_px=32, *, learned=False, sides=("a", "b"), seed=3):
    """Faces of noise with a round mask, and predictions that are others."""
    random = np.random.default_rng(seed)
    shape = (len(sides), num_faces)
    targets = random.integers(60, 190, (*shape, full_px, full_px, 4), np.uint8)
    targets[..., 3] = _disc(full_px)
    predictions = random.integers(60, 190, (len(sides), 2, num_faces, out_px, out_px, 4), np.uint8)
    predictions[..., 3] = _disc(out_px, share=0.5)
    inputs = np.zeros((*shape, 16, 16, 3), np.uint8)
    landmark_masks = np.broadcast_to(_disc(out_px), (*shape, out_px, out_px))
    faces = PreviewFaces(sides, inputs, targets, landmark_masks)
    return Look(7, faces, predictions if learned else predictions[..., :3], "raw")


def _disc(edge_px, share=0.8):
    disc = np.zeros((edge_px, edge_px), np.uint8)
    centre = (edge_px - 1) / 2
    y, x = np.mgrid[:edge_px, :edge_px]
    disc[np.hypot(x - centre, y - centre) < share * edge_px / 2] = 255
    return disc


def test_a_swap_is_pasted_through_the_mask_in_the_colours_of_its_face():
    look = _look(out_px=64, full_px=80)
    tiles = tiles_of(look, has_mask=True)
    swap, target = tiles.images[0, 0, SWAPPED].astype(int), look.faces.targets[0, 0, ..., :3]
    middle = np.s_[8:72, 8:72]
    share = softened(_disc(64) / np.float32(255), 0, 64 * FEATHER_SHARE)
    outside = np.ones((80, 80), bool)
    outside[middle] = share == 0
    np.testing.assert_array_equal(swap[outside], target[outside])
    inside = share == 1
    decoded = look.predictions[0, 1, 0].astype(int)
    assert np.abs(swap[middle][inside] - decoded[inside]).max() < 20, "the same picture"
    lab = [
        cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)[_disc(64) > 0].mean(0)
        for picture in (target[middle], _matched(swap[middle], decoded, share))
    ]
    np.testing.assert_allclose(*lab, atol=1.0)


def _matched(swap, decoded, share):
    """The swap where nothing of the original shines through; near the edge, moved as inside."""
    moved = (swap - decoded)[share == 1].mean(axis=0)
    return np.clip(decoded + moved, 0, 255)


def test_a_swap_by_a_learned_mask_is_pasted_through_that():
    look = _look(learned=True)
    tiles = tiles_of(look, has_mask=True)
    assert tiles.images.shape[2] == MASK + 1
    grey = tiles.images[0, 0, MASK][4:28, 4:28]
    np.testing.assert_array_equal(grey, np.stack([_disc(24, share=0.5)] * 3, axis=-1))
    same = (tiles.images[0, 0, SWAPPED] == tiles.images[0, 0, ORIGINAL]).all(-1)
    assert same[4:28, 4:28][_disc(24, share=0.5) == 0].all()
    assert not same.all()


def test_the_recreated_face_stands_in_its_surroundings_as_it_is():
    look = _look()
    tiles = tiles_of(look, has_mask=False)
    for side in (0, 1):
        recreated = tiles.images[side, 0, RECREATED]
        np.testing.assert_array_equal(recreated[4:28, 4:28], look.predictions[side, 0, 0])
        np.testing.assert_array_equal(recreated[:4], look.faces.targets[side, 0, :4, :, :3])
    assert tiles.masks is None


@pytest.mark.parametrize(
    ("faces", "rows", "columns"), [(1, 1, 6), (8, 8, 6), (9, 5, 12), (14, 7, 12), (16, 8, 12)]
)
def test_faces_of_a_stand_left_and_of_b_right(faces, rows, columns):
    blocks = [np.full((faces, 3, 128, 128, 3), grey, np.uint8) for grey in (100, 200)]
    sheet = arranged(blocks, [["x"] * 3] * 2, "title")[48:]
    assert sheet.shape[0] == rows * 130
    assert sheet.shape[1] // 128 == columns
    tiles = [(sheet == grey).all(-1) for grey in (100, 200)]
    assert [int(tile.sum()) for tile in tiles] == [faces * 3 * 128 * 128] * 2
    lefts = [np.flatnonzero(tile.any(axis=0)) for tile in tiles]
    assert lefts[0].max() < lefts[1].min()


def test_a_learned_mask_adds_a_column_to_each_face():
    plain, learned = (
        preview_sheet(tiles_of(_look(learned=learned), has_mask=True), OFF, "")
        for learned in (False, True)
    )
    assert learned.shape[1] - plain.shape[1] == 2 * (128 + 2)


def test_one_side_alone_makes_half_a_sheet():
    tiles = tiles_of(_look(sides=("b",)), has_mask=True)
    assert tiles.sides == ("b",)
    assert preview_sheet(tiles, OFF, "").shape == (48 + 130, 3 * 130 + 2, 3)


@pytest.mark.parametrize("edge_px", [1, 63, 64, 127, 128, 200])
def test_small_tiles_are_enlarged_by_a_whole_number(edge_px):
    random = np.random.default_rng(1)
    tiles = random.integers(0, 256, (2, edge_px, edge_px, 3), np.uint8)
    factor = {1: 128, 63: 3, 64: 2, 127: 2, 128: 1, 200: 1}[edge_px]
    larger = enlarged(tiles, "nearest")
    np.testing.assert_array_equal(larger, tiles.repeat(factor, axis=1).repeat(factor, axis=2))
    assert enlarged(tiles, "lanczos").shape == larger.shape
    assert enlarged(tiles[..., 0], "nearest").shape == larger.shape[:-1]


def test_the_mask_is_a_line_on_two_pictures_or_a_tint_of_them():
    tiles = tiles_of(_look(out_px=32), has_mask=True)
    plain = preview_sheet(tiles, OFF, "").astype(int)
    red = {}
    for mask in ("outline", "tint"):
        sheet = preview_sheet(tiles, SheetStyle(mask=mask, mask_opacity=100), "")
        changed = (sheet != plain).any(axis=-1)[48:-2]
        kinds = [changed[:, 2 + 130 * kind :][:, :128] for kind in range(3)]
        assert not kinds[SWAPPED].any(), "there it would hide the seam"
        red[mask] = [kind.mean() for kind in kinds[:SWAPPED]]
    assert all(0.005 < share < 0.1 for share in red["outline"])
    assert all(0.4 < share < 0.6 for share in red["tint"]), "1 - 0.64 pi / 4"


@pytest.mark.parametrize(("out_px", "is_marked"), [(24, True), (32, False)])
def test_corners_mark_the_trained_square(out_px, is_marked):
    style = SheetStyle(mask="off", mask_color="#00ff00")
    sheet = preview_sheet(tiles_of(_look(out_px=out_px), has_mask=True), style, "")
    green = (sheet == (0, 255, 0)).all(axis=-1)
    assert green.any() == is_marked
    if is_marked:
        rows, columns = np.nonzero(green[48 : 48 + 128, 2 : 2 + 128])
        low, high = 4 * 4 - 1, 128 - 4 * 4  # just outside of the square
        assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (low, high)


@pytest.mark.parametrize(
    ("style", "show_mask", "usual", "toggled"),
    [
        ("sheet", True, "outline", "tint"),
        ("sheet", False, "off", "tint"),
        ("faceswap", True, "tint", "off"),
        ("faceswap", False, "off", "tint"),
    ],
)
def test_the_mask_key_shows_the_tint_or_takes_it_away(style, show_mask, usual, toggled):
    config = from_dict({"preview": {"style": style, "show_mask": show_mask}})
    assert shown_mask(config) == usual
    assert shown_mask(config, is_toggled=True) == toggled
