"""The preview picture: equal to the oracle's, its layout, its refusals, and the safe write."""

import os

import cv2
import numpy as np
import pytest

from mien.core.preview import grid as preview
from mien.core.preview.files import save_png


def _arrays(faces: int = 2, out_px: int = 24, full_px: int = 32, channels: int = 4):
    random = np.random.default_rng(5)
    predictions = random.integers(0, 256, (2, 2, faces, out_px, out_px, 3), np.uint8)
    targets = random.integers(0, 256, (2, faces, full_px, full_px, channels), np.uint8)
    return predictions, targets


def _image(predictions, targets, **changes):
    settings = {"coverage": 0.75, "mask_opacity": 30, "mask_color": "#ff0000", "has_mask": True}
    return preview.preview_image(predictions, targets, **(settings | changes))


@pytest.mark.oracle
def test_every_picture_of_the_oracle_is_equal(oracle_paths, oracle):
    for path in oracle_paths("preview/*.npz"):
        case = oracle(f"preview/{path.name}")
        image = preview.preview_image(
            case["predictions"],
            case["targets"],
            coverage=float(case["coverage"]),
            mask_opacity=float(case["mask_opacity"]),
            mask_color=str(case["mask_color"]),
            has_mask=bool(case["has_mask"]),
            mask_toggled_off=bool(case["mask_toggled_off"]),
        )
        np.testing.assert_array_equal(image, case["image"], err_msg=path.name)
        picture = cv2.imread(str(path.with_suffix(".png")))
        if picture is not None:
            np.testing.assert_array_equal(image, picture, err_msg=path.name)


@pytest.mark.parametrize(
    ("faces", "rows", "columns"), [(1, 1, 6), (6, 6, 6), (7, 4, 12), (8, 4, 12), (14, 7, 12)]
)
def test_more_than_six_faces_go_side_by_side(faces, rows, columns):
    image = _image(*_arrays(faces=faces))
    assert image.shape == (int(32 / 4.5) + rows * 32, columns * 32, 3)


def test_an_odd_number_of_faces_leaves_the_last_place_black():
    body = _image(*_arrays(faces=7))[int(32 / 4.5) :]
    assert not body[3 * 32 :, 6 * 32 :].any()
    assert body[2 * 32 : 3 * 32, 6 * 32 :].any()


def test_without_a_mask_targets_of_three_channels_do_and_nothing_is_tinted():
    predictions, targets = _arrays(channels=3)
    image = _image(predictions, targets, has_mask=False)
    opaque = np.concatenate([targets, np.full_like(targets[..., :1], 255)], axis=-1)
    np.testing.assert_array_equal(image, _image(predictions, opaque))
    np.testing.assert_array_equal(image, _image(predictions, opaque, mask_toggled_off=True))
    np.testing.assert_array_equal(image[7 + 4 : 7 + 28, 4:28], targets[0, 0, 4:28, 4:28])


def test_own_decoder_stands_before_the_other_one_on_both_sides():
    predictions, targets = _arrays(faces=1, out_px=32)
    body = _image(predictions, targets, coverage=1.0, has_mask=False)[int(32 / 4.5) :]
    patches = np.split(body, 6, axis=1)
    for side in (0, 1):
        np.testing.assert_array_equal(patches[3 * side], targets[side, 0, ..., :3])
        np.testing.assert_array_equal(patches[3 * side + 1], predictions[side, 0, 0])
        np.testing.assert_array_equal(patches[3 * side + 2], predictions[side, 1, 0])


def test_the_tint_is_the_colour_where_the_mask_is_empty_and_opacity_full():
    predictions, targets = _arrays(faces=1)
    targets[..., 3] = 0
    body = _image(predictions, targets, mask_opacity=100, mask_color="#0080ff")[int(32 / 4.5) :]
    assert (body == (255, 128, 0)).all()


def test_labels_are_an_argument():
    arrays = _arrays()
    other = _image(*arrays, labels=("x", "y", "z", "u", "v", "w"))
    plain = _image(*arrays)
    assert (other[:7] != plain[:7]).any()
    np.testing.assert_array_equal(other[7:], plain[7:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_color": "red"}, "mask_color must be like #ff0000, got 'red'"),
        ({"coverage": 0.0}, "coverage must be above 0 and at most 1, got 0.0"),
        ({"mask_opacity": 101}, "mask_opacity must be from 0 to 100, got 101"),
        ({"labels": ("A",)}, "labels must be 6 texts, got 1"),
    ],
)
def test_refuses_a_wrong_setting(changes, message):
    with pytest.raises(ValueError, match=message):
        _image(*_arrays(), **changes)


def test_refuses_arrays_that_do_not_belong_together():
    predictions, targets = _arrays()
    with pytest.raises(ValueError, match=r"targets must hold the face mask as 4th channel"):
        _image(predictions, targets[..., :3])
    with pytest.raises(ValueError, match=r"targets must be \(2, 2, f, f, 3 or 4\) with f at least"):
        _image(predictions, targets[:, :1])
    with pytest.raises(ValueError, match=r"predictions must be \(2, 2, N, o, o, 3 or 4\), got"):
        _image(predictions[:1], targets)
    with pytest.raises(ValueError, match="must be uint8, got float32"):
        _image(predictions.astype(np.float32), targets)


def test_save_png_reads_back_and_leaves_no_part(tmp_path):
    image = _image(*_arrays())
    save_png(tmp_path / "preview.png", image, "of nobody")
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "preview.png")), image)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    assert b"tEXtDescription\0of nobody" in (tmp_path / "preview.png").read_bytes()


def test_save_png_keeps_the_old_picture_when_the_disk_fails(tmp_path, monkeypatch):
    path = tmp_path / "preview.png"
    save_png(path, _image(*_arrays()), "")
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(path, _image(*_arrays(faces=3)), "")
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["preview.png"]


def test_save_png_refuses_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\), got float64 \(2, 2\)"):
        save_png(tmp_path / "preview.png", np.zeros((2, 2)), "")
