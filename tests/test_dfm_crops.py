"""Squares that other programs cut, against their own functions' numbers; the model's in them."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mien.core.exchange.dfm_crops import (
    PROGRAMS,
    Placement,
    Square,
    model_square,
    place,
    program_square,
    square_of,
)
from mien.core.faces.geometry import MEAN_FACE_L2, Crop, align, crop_landmarks, transform

FULL_FACE = dataclasses.replace(
    PROGRAMS["dfl"], side=1 + 2 * math.sqrt(2) * 0.2109375, centre=(0.5, 0.5)
)
PEERS = [
    (PROGRAMS["facefusion"], "facefusion_dfl_whole_face", "facefusion"),
    (PROGRAMS["deepfacelive"], "deepfacelive_68_cov2.2", "deepfacelive"),
    (PROGRAMS["dfl"], "deepfacelab_whole_face", "dfl_wf"),
    (FULL_FACE, "deepfacelab_full_face", "dfl_full"),
]


def numbers(square: Square) -> list[float]:
    return [square.side, square.centre_x, square.centre_y, square.roll]


@pytest.fixture
def crops(oracle_dir):
    """Crops of several faces that the programs' own functions cut."""
    path = oracle_dir / "exchange/dfm/crops.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text())


@pytest.mark.oracle
def test_programs_cut_as_the_oracle_says(crops):
    for case in crops["cases"]:
        landmarks_l2 = np.array(case["landmarks_68"])
        for program, matrix_name, square_name in PEERS:
            matrix_23 = program.matrix(landmarks_l2)
            found = crops["size"] * matrix_23
            assert np.allclose(found, case[matrix_name], rtol=0, atol=5e-4), case["name"]
            expected = case["frames_side_cx_cy_rotdeg"][square_name]
            square = square_of(matrix_23, landmarks_l2)
            assert np.allclose(numbers(square), expected, rtol=0, atol=2e-5), case["name"]


@pytest.mark.oracle
def test_models_are_cut_as_the_oracle_says(crops):
    for case in crops["cases"]:
        landmarks_l2 = np.array(case["landmarks_68"])
        for centering in ("face", "head", "legacy"):
            square = model_square(Crop(centering, 1.0, 0.0, 1600), landmarks_l2)
            expected = case["frames_side_cx_cy_rotdeg"][f"faceswap_{centering}_100"]
            assert np.allclose(numbers(square), expected, rtol=0, atol=2e-6), case["name"]


@pytest.mark.oracle
@pytest.mark.parametrize("program", ["facefusion", "deepfacelive", "dfl"])
@pytest.mark.parametrize("centering", ["face", "legacy"])
def test_square_in_the_square_of_a_program_shows_the_face_where_training_had_it(
    crops, program, centering
):
    crop = Crop(centering, 0.8, -0.05, 128)
    placed = place(model_square(crop), program_square(program), crop.size_px)
    for case in crops["cases"]:
        landmarks_l2 = np.array(case["landmarks_68"])
        alignment = align(landmarks_l2)
        if abs(alignment.yaw) > 15:
            continue  # the crop follows the turning head, the program's square does not
        in_program = transform(
            landmarks_l2, placed.size_px * PROGRAMS[program].matrix(landmarks_l2)
        )
        found = in_program - [placed.left, placed.top]
        wanted = crop_landmarks(landmarks_l2, alignment, crop)
        # faces differ from the mean one, and whole pixels by half of one
        assert abs(found - wanted).max() < 0.05 * crop.size_px, case["name"]


@pytest.mark.parametrize(
    ("program", "side", "centre_x", "centre_y"),
    [
        ("facefusion", 1.976, 0.518, 0.422),
        ("deepfacelive", 2.2, 0.510, 0.420),
        ("visomaster", 1.863, 0.500, 0.387),
        ("dfl", 2.131, 0.510, 0.430),
    ],
)
def test_programs_cut_the_mean_face_as_measured(program, side, centre_x, centre_y):
    assert np.allclose(numbers(program_square(program))[:3], [side, centre_x, centre_y], atol=5e-4)


def test_square_is_that_of_the_mean_face_in_whatever_frame_it_lies():
    turn = math.radians(30)
    cosine, sine = 200 * math.cos(turn), 200 * math.sin(turn)
    crop = Crop("legacy", 0.75, 0.1, 96)
    expected = numbers(model_square(crop))
    moved_l2 = MEAN_FACE_L2 @ np.array([[cosine, sine], [-sine, cosine]]) + [300, 150]
    assert np.allclose(numbers(model_square(crop, moved_l2)), expected, atol=1e-4)


def test_model_of_nearly_the_same_square_is_used_as_it_is():
    square = model_square(Crop("face", 1.0, -0.08, 224))
    assert place(square, program_square("facefusion"), 224) == Placement(224, 0, 0, 224)
    assert place(square, program_square("facefusion"), 224).is_whole


def test_model_of_a_smaller_square_is_placed_in_whole_pixels():
    square = model_square(Crop("legacy", 1.0, 0.08, 128))
    placed = place(square, program_square("facefusion"), 128)
    assert placed == Placement(158, 14, 15, 128)  # 13.6 and 14.8, side 127.9
    assert not placed.is_whole


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("centering", ["face", "head", "legacy"])
@pytest.mark.parametrize("coverage", [0.625, 0.8, 1.0])
@pytest.mark.parametrize("vertical_offset", [-0.25, 0.0, 0.25])
def test_placed_square_shows_what_the_model_was_trained_on(
    program, centering, coverage, vertical_offset
):
    square = model_square(Crop(centering, coverage, vertical_offset, 128))
    whole = program_square(program)
    placed = place(square, whole, 128)
    unit = whole.side / placed.size_px
    assert placed.side_px * unit == pytest.approx(square.side, rel=0.021)
    centre = [
        middle + (first + placed.side_px / 2 - placed.size_px / 2) * unit
        for middle, first in ((whole.centre_x, placed.left), (whole.centre_y, placed.top))
    ]
    within = 0.015 * whole.side if placed.is_whole else 0.51 * unit
    assert np.allclose(centre, [square.centre_x, square.centre_y], rtol=0, atol=within)
