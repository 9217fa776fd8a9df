"""Alignment, pose and crops against another implementation's numbers, and their rules."""

import cv2
import numpy as np
import pytest

from mien.core.faces.geometry import (
    Crop,
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


def crop_of(combo: str) -> Crop:
    """The crop that a combination such as face_87.5_128_0 names."""
    centering, coverage, size_px, offset = combo.split("_")
    return Crop(centering, float(coverage) / 100, float(offset) / 100, int(size_px))


def goldens(oracle_dir):
    """Each sample with its golden numbers; skips where the folder has none."""
    files = sorted((oracle_dir / "geometry").glob("*.npz"))
    if not files:
        pytest.skip(f"{oracle_dir} has no geometry")
    for file in files:
        with np.load(file, allow_pickle=False) as golden:
            yield oracle_dir / "samples" / f"{file.stem}.png", golden


def combos(golden) -> list[str]:
    return [key.split(":", 1)[1] for key in golden if key.startswith("crop:")]


@pytest.mark.oracle
def test_alignment_equals_oracle(oracle_dir):
    for sample, golden in goldens(oracle_dir):
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
def test_crops_equal_oracle(oracle_dir):
    num_checked = 0
    for sample, golden in goldens(oracle_dir):
        edge_px, header = read_header(sample)
        image = cv2.imread(str(sample), cv2.IMREAD_COLOR)
        alignment = align(header.landmarks_l2)
        for combo in combos(golden):
            crop = crop_of(combo)
            picture = resize(cut(image, crop_box(alignment, edge_px, crop)), crop.size_px)
            assert np.array_equal(picture, golden[f"crop:{combo}"]), (sample.name, combo)
            num_checked += 1
    assert num_checked


@pytest.mark.oracle
def test_landmarks_and_matrices_equal_oracle(oracle_dir):
    for sample, golden in goldens(oracle_dir):
        _, header = read_header(sample)
        alignment = align(header.landmarks_l2)
        for combo in combos(golden):
            crop = crop_of(combo)
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
