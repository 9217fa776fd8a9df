"""Both sides' faces as training opens them: what is refused, and what a user is told."""

import os
import shutil
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mien.core.config import DataConfig, EvaluateConfig, LossConfig
from mien.core.data.sides import open_sides, warnings_of
from mien.core.faces.masks import area_mask
from mien.core.faces.png import read_header, write_face

MASK_PX = 128


def opened(a: Path, b: Path, store_dir: Path | None = None, held_out=("", ""), **data):
    config = DataConfig(input_a=str(a), input_b=str(b), num_threads=2, **data)
    evaluate = EvaluateConfig(held_out_a=str(held_out[0]), held_out_b=str(held_out[1]))
    return open_sides(config, evaluate, 32, store_dir=store_dir, device=torch.device("cpu"))


def rewritten(source: Path, target: Path, count: int | None, change) -> Path:
    """A copy of a folder of faces, the first of them with a changed header."""
    shutil.copytree(source, target)
    for path in sorted(target.glob("*.png"))[:count]:
        _, header = read_header(path)
        change(header)
        write_face(path, cv2.imread(str(path)), header)
    return target


def fill(value: int):
    """Fill the stored mask with one value."""

    def change(header) -> None:
        pixels = np.full((MASK_PX, MASK_PX), value, np.uint8)
        header.masks["vgg-clear"].data = zlib.compress(pixels.tobytes())

    return change


def make_legacy(header) -> None:
    header.source["alignments_version"] = 1.0


def test_a_side_whose_masks_are_mostly_empty_is_refused(sides, tmp_path):
    """By the file of decoded faces, too, which a second start reads."""
    bad = rewritten(sides[1], tmp_path / "bad", 14, fill(0))
    for _ in range(2):
        with pytest.raises(ValueError, match="side B: 14 of 26 faces have an .almost. empty") as no:
            opened(sides[0], bad, tmp_path / "store", mask_type="vgg-clear")
        assert "is empty: make it again, or remove the face; and 11 more" in str(no.value)
        assert "\n" not in str(no.value)
    assert opened(sides[0], bad)  # extended needs no stored mask


def test_masks_of_0_and_1_have_a_remedy_of_their_own(sides, tmp_path):
    bad = rewritten(sides[0], tmp_path / "bad", None, fill(1))
    with pytest.raises(ValueError, match="holds 0 and 1 in place of 0 and 255: multiply it by 255"):
        opened(bad, sides[1], mask_type="vgg-clear")


def test_some_empty_masks_are_told_in_one_line_at_every_start(sides, tmp_path):
    some = rewritten(sides[0], tmp_path / "some", 9, fill(0))
    for is_read in (False, True):
        faces = opened(some, sides[1], tmp_path / "store", mask_type="vgg-clear")
        assert faces["a"].store.reused == is_read
        (warning,) = warnings_of(faces, LossConfig())
        assert warning.startswith("side A: 9 of 26 faces have an (almost) empty mask, and nothing")
        assert warning.endswith("; and 6 more")
        assert faces["a"].store.num_faces == 26
        assert warnings_of(opened(some, sides[1]), LossConfig()) == []


def test_an_eye_area_outside_the_crop_is_told(sides):
    """The tightest crop, with the face moved up: the eyes leave it."""
    faces = opened(*sides, centering="legacy", coverage=62.5, vertical_offset=-25)
    assert faces["a"].store.areas_outside == {"eye": 26, "mouth": 0}
    told = warnings_of(faces, LossConfig())
    assert told[0] == (
        "side A: the eye area of 26 of 26 faces lies outside the crop, so loss.eye_multiplier does "
        "nothing for them"
    )
    assert warnings_of(faces, LossConfig(eye_multiplier=1)) == []
    assert warnings_of(faces, LossConfig(penalized_mask_loss=False)) == []
    assert opened(*sides)["a"].store.areas_outside == {"eye": 0, "mouth": 0}


def test_uneven_sides_are_told(sides, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(131):
        path = sorted(sides[1].iterdir())[number % 26]
        os.link(path, many / f"{number:03}.png")
    (warning,) = warnings_of(opened(sides[0], many), LossConfig())
    assert warning.startswith("side B has 131 faces and side A 26: the smaller side is repeated")


def test_what_lies_in_sub_folders_is_told(sides, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(sides[0], folder)
    shutil.copytree(sides[0], folder / "left")
    (warning,) = warnings_of(opened(folder, sides[1]), LossConfig())
    assert warning == (
        f"side A: {folder}: 26 PNGs in its sub-folder left are not used: add --sub-folders, or put "
        "the faces into one folder"
    )


@pytest.mark.parametrize("decoder", ["dali", "opencv"])
def test_legacy_pictures_are_the_legacy_crop(sides, tmp_path, decoder):
    """The whole picture is what is trained on, and the areas lie where its landmarks do."""
    legacy = rewritten(sides[0], tmp_path / "legacy", None, make_legacy)
    faces = opened(legacy, sides[1], centering="legacy", decoder=decoder)["a"]
    for face, pixels_ssc in zip(faces.trained_on, faces.store.faces_fssc.numpy(), strict=True):
        picture = cv2.imread(str(face.path))
        whole = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(pixels_ssc[..., :3], whole)
    landmarks_l2 = faces.landmarks_fl2[0]
    np.testing.assert_array_equal(
        faces.store.faces_fssc[0, ..., 4], area_mask("eye", landmarks_l2, 32)
    )


@pytest.mark.parametrize("side", ["a", "b"])
def test_legacy_pictures_are_refused_for_another_crop(sides, tmp_path, side):
    legacy = rewritten(sides[side == "b"], tmp_path / "legacy", None, make_legacy)
    folders = (legacy, sides[1]) if side == "a" else (sides[0], legacy)
    with pytest.raises(ValueError, match=rf"side {side.upper()}: .* version 1\.0"):
        opened(*folders)
    mixed = rewritten(sides[side == "b"], tmp_path / "mixed", 3, make_legacy)
    folders = (mixed, sides[1]) if side == "a" else (sides[0], mixed)
    with pytest.raises(ValueError, match="mixes 3 faces extracted before"):
        opened(*folders, centering="legacy")


def test_legacy_pictures_are_refused_among_those_held_out(sides, tmp_path):
    legacy = rewritten(sides[0], tmp_path / "legacy", None, make_legacy)
    shutil.copytree(sides[1], tmp_path / "b")
    with pytest.raises(ValueError, match="evaluate.held_out_a: .* version 1.0"):
        opened(*sides, held_out=(legacy, tmp_path / "b"))


def test_a_folder_whose_name_is_no_utf_8_is_read_like_any(sides, tmp_path):
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gesichter_\xe4"))
    shutil.copytree(sides[0], named)
    for decoder in ("dali", "opencv"):
        for is_read in (False, True):
            store = opened(named, sides[1], tmp_path / decoder, decoder=decoder)["a"].store
            assert (store.num_faces, store.reused) == (26, is_read)
