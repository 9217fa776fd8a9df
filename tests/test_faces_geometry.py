"""Alignment, pose and crops against another implementation's numbers, and their rules."""

import dataclasses
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from oracle_numbers import is_picture_of, oracle_crop

from mien.core.faces import geometry
from mien.core.faces.geometry import (
    Alignment,
    Crop,
    CropBox,
    align,
    crop_box,
    crop_landmarks,
    crop_matrix,
    cut,
    padding_px,
    resize,
)
from mien.core.faces.png import read_header

NEWER_OPENCV = int(cv2.__version__.split(".")[0]) >= 5
# OpenCV 4.x solves the pose 3e-5 apart, so aligned landmarks differ by up to 0.003 px.
LANDMARK_PX = 1e-3 if NEWER_OPENCV else 4e-3
OFFSET = 2e-6 if NEWER_OPENCV else 5e-5


def goldens(oracle_paths):
    """Each sample with its golden numbers; skips where the folder has none."""
    for file in oracle_paths("geometry/*.npz"):
        with np.load(file, allow_pickle=False) as golden:
            yield file.parents[1] / "samples" / f"{file.stem}.png", golden


def combos(golden) -> list[str]:
    return [key.split(":", 1)[1] for key in golden if key.startswith("crop:")]


@pytest.mark.oracle
def test_alignment_equals_oracle(oracle_paths):
    for sample, golden in goldens(oracle_paths):
        _, header = read_header(sample)
        assert np.array_equal(header.landmarks_l2, golden["landmarks_xy"]), sample.name
        found = align(header.landmarks_l2)
        assert np.allclose(found.matrix_23, golden["matrix_legacy"], rtol=1e-6, atol=1e-7)
        assert np.allclose(found.normalized_l2, golden["normalized_landmarks"], atol=1e-6)
        for centering in ("face", "head"):
            expected = golden[f"offset_{centering}"]
            assert np.allclose(found.offsets[centering], expected, atol=OFFSET), sample.name
        assert not found.offsets["legacy"].any()
        pose = [found.pitch, found.yaw, found.roll]
        assert np.allclose(pose, golden["pitch_yaw_roll"], atol=1e-3 if NEWER_OPENCV else 0.05)
        assert found.average_distance == pytest.approx(float(golden["average_distance"]), rel=1e-4)


@pytest.mark.oracle
def test_crops_equal_oracle(oracle_paths):
    num_checked = 0
    for sample, golden in goldens(oracle_paths):
        edge_px, header = read_header(sample)
        image = cv2.imread(str(sample), cv2.IMREAD_COLOR)
        alignment = align(header.landmarks_l2)
        for combo in combos(golden):
            crop = oracle_crop(combo)
            picture = resize(cut(image, crop_box(alignment, edge_px, crop)), crop.size_px)
            assert is_picture_of(golden[f"crop:{combo}"], picture), (sample.name, combo)
            num_checked += 1
    assert num_checked


@pytest.mark.oracle
def test_landmarks_and_matrices_equal_oracle(oracle_paths):
    for sample, golden in goldens(oracle_paths):
        _, header = read_header(sample)
        alignment = align(header.landmarks_l2)
        for combo in combos(golden):
            crop = oracle_crop(combo)
            assert padding_px(crop) == int(golden[f"padding:{combo}"])
            found = crop_landmarks(header.landmarks_l2, alignment, crop)
            assert found.dtype == np.float32
            assert np.abs(found - golden[f"lms:{combo}"]).max() < LANDMARK_PX, (sample.name, combo)
            # The golden matrix is that of the crop before its vertical offset.
            matrix = crop_matrix(alignment, crop)
            matrix[1, 2] -= crop.vertical_offset * (crop.size_px - 2 * padding_px(crop))
            error = matrix - golden[f"matrix:{combo}"]
            error_px = header.landmarks_l2.astype(np.float64) @ error[:, :2].T + error[:, 2]
            assert np.abs(error_px).max() < LANDMARK_PX, (sample.name, combo)


def make_landmarks(mean_2=(300.0, 200.0), scale: float = 150.0, degrees: float = 12.0):
    """Landmarks of a face that is scaled, turned and moved from a plausible mean."""
    generator = np.random.default_rng(3)
    points = generator.uniform(0, 1, (68, 2))
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points @ turn.T * scale + mean_2).astype(np.float32)


def make_alignment(face=(0.1, -0.2), head=(0.3, 0.05)) -> Alignment:
    offsets = {"face": np.float32(face), "head": np.float32(head), "legacy": np.zeros(2, "f4")}
    matrix = np.array([[0.01, 0.002, -1.0], [-0.002, 0.01, -2.0]])
    return Alignment(matrix, np.zeros((68, 2), "f4"), offsets, np.zeros(3))


@pytest.mark.parametrize("mirrored", [False, True])
def test_similarity_is_umeyama(mirrored):
    """Against Umeyama's own formula by SVD; a mirrored face must not be fitted by a reflection."""
    landmarks = make_landmarks()
    if mirrored:
        landmarks[:, 0] *= -1
    with np.load(Path(geometry.__file__).with_name("mean_face.npz")) as constants:
        target = constants["mean51"]
    source = landmarks[17:].astype(np.float64)
    centred, wanted = source - source.mean(axis=0), target - target.mean(axis=0)
    u, d, vt = np.linalg.svd(wanted.T @ centred / len(source))
    s = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turn = u @ np.diag(s) @ vt
    scale = (d * s).sum() / centred.var(axis=0).sum()
    expected = scale * turn
    found = align(landmarks).matrix_23
    assert np.allclose(found[:, :2], expected, rtol=1e-9, atol=1e-12)
    assert np.allclose(found[:, 2], target.mean(axis=0) - expected @ source.mean(axis=0))
    assert np.linalg.det(found[:, :2]) > 0


def test_crop_boxes_by_hand():
    """The worked sizes of the format: a head-centred picture of 512 px has an inner box of 192."""
    alignment = make_alignment()
    for centering, coverage, side in (
        ("face", 1.0, 384),
        ("legacy", 1.0, 308),
        ("legacy", 0.625, 192),
        ("head", 0.8, 410),
        ("head", 1.0, 512),
    ):
        assert crop_box(alignment, 512, Crop(centering, coverage, 0.0, 64)).side == side
    # x: (0.1 - 0.3) 192 + 64 = 25.6; y: (-0.2 - 0.05 - 0.1) 192 + 64 = -3.2
    assert crop_box(alignment, 512, Crop("face", 1.0, 0.1, 64)) == CropBox(26, -3, 384)
    assert crop_box(alignment, 512, Crop("head", 1.0, 0.0, 64)) == CropBox(0, 0, 512)


def test_positive_offset_moves_the_face_down():
    landmarks, alignment = make_landmarks(), make_alignment()
    still, moved = (
        crop_landmarks(landmarks, alignment, Crop("face", 1.0, y, 64)) for y in (0.0, 0.25)
    )
    assert np.allclose(moved - still, [0.0, 0.25 * 32], atol=1e-4)


@pytest.mark.oracle
def test_picture_and_landmarks_move_together(oracle_paths):
    """The cut-out picture shows each landmark where crop_landmarks says, in every crop."""
    for sample, golden in goldens(oracle_paths):
        edge_px, header = read_header(sample)
        alignment = align(header.landmarks_l2)
        whole = crop_landmarks(header.landmarks_l2, alignment, Crop("head", 1.0, 0.0, edge_px))
        for combo in combos(golden):
            crop = dataclasses.replace(oracle_crop(combo), size_px=edge_px)
            box = crop_box(alignment, edge_px, crop)
            scale = crop.size_px / box.side
            through_box = (whole - (box.left, box.top)) * scale
            found = crop_landmarks(header.landmarks_l2, alignment, crop)
            # The box lies on whole px of the picture: half a px of it, and its even side.
            assert np.abs(through_box - found).max() < 2.5 * scale, (sample.name, combo)


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 3), (4, 7, 1)])
@pytest.mark.parametrize(
    "box", [(0, 0, 4), (-2, 1, 4), (3, -3, 6), (-9, 0, 4), (0, 99, 3), (-3, -3, 12), (2, 2, 1)]
)
def test_cut_pads_with_zeros(shape, box):
    image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    left, top, side = box
    found = cut(image, CropBox(left, top, side))
    assert found.shape == (side, side, *shape[2:])
    for row in range(side):
        for column in range(side):
            y, x = top + row, left + column
            inside = 0 <= y < shape[0] and 0 <= x < shape[1]
            assert np.array_equal(found[row, column], image[y, x] if inside else 0 * image[0, 0])


def test_resize_is_cubic_up_and_area_down():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    up = cv2.resize(image, (100, 100), interpolation=cv2.INTER_CUBIC)
    down = cv2.resize(image, (20, 20), interpolation=cv2.INTER_AREA)
    assert np.array_equal(resize(image, 100), up)
    assert np.array_equal(resize(image, 20), down)
    assert resize(image, 64) is image


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("nose", 1.0, 0.0, 64), "centering must be one of"),
        (("face", 1.1, 0.0, 64), "coverage must be above 0 and at most 1, got 1.1"),
        (("face", 87.5, 0.0, 64), "coverage must be above 0 and at most 1, got 87.5"),
        (("face", 1.0, 10, 64), "vertical_offset must be -0.25 to 0.25, got 10"),
        (("face", 1.0, 0.0, 0), "size_px must be at least 1, got 0"),
    ],
)
def test_impossible_crops_are_refused(values, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Crop(*values)


@pytest.mark.parametrize("coverage", [1.0, 0.875, 0.625])
@pytest.mark.parametrize("offset", [0.0, 0.1, -0.25])
@pytest.mark.parametrize("edge_px", [128, 333, 512])
def test_a_legacy_picture_is_the_legacy_crop(coverage, offset, edge_px):
    """Landmarks placed in a legacy picture by its own rule lie where those of the crop do."""
    landmarks_l2 = make_landmarks()
    found = align(landmarks_l2)
    whole = Crop("legacy", 1.0, 0.0, edge_px)
    in_picture_l2 = crop_landmarks(landmarks_l2, found, whole)
    box = crop_box(found, edge_px, Crop("legacy", coverage, offset, 64), "legacy")
    if coverage == 1.0 and offset == 0.0:
        assert box == CropBox(0, 0, edge_px)
    scale = 64 / box.side
    placed_l2 = (in_picture_l2 - (box.left, box.top)) * scale
    wanted_l2 = crop_landmarks(landmarks_l2, found, Crop("legacy", coverage, offset, 64))
    # The box is cut at whole px of the picture, and its padding is whole px of either.
    assert np.abs(placed_l2 - wanted_l2).max() < 1.5


def test_a_picture_is_head_centred_unless_told():
    found = align(make_landmarks())
    for centering in ("face", "head", "legacy"):
        crop = Crop(centering, 0.9, 0.1, 64)
        assert crop_box(found, 256, crop) == crop_box(found, 256, crop, "head")
