"""Landmarks of the store, and whose are nearest: against NumPy one by one."""

import numpy as np
import pytest
import torch

from mien.core.data import landmarks as module
from mien.core.data.landmarks import landmarks_of_sides, nearest_faces, store_landmarks
from mien.core.faces.folder import read_folder
from mien.core.faces.geometry import Crop, crop_landmarks
from mien.core.faces.synthetic import draw_folder


def _drawn(num_faces, seed):
    generator = np.random.default_rng(seed)
    return generator.uniform(0, 256, (num_faces, 68, 2)).astype(np.float32)


@pytest.mark.parametrize("num_faces", [1, 5, 33])
def test_nearest_are_those_of_a_plain_search(num_faces, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_FACES", 16)
    ours, others = _drawn(num_faces, 0), _drawn(41, 1)
    nearest = nearest_faces(ours, others)
    assert nearest.shape == (num_faces, 10)
    assert nearest.dtype == np.int32
    for face, found in zip(ours.astype(np.float64), nearest, strict=True):
        distances = np.square(others - face).sum(axis=(1, 2))
        assert np.array_equal(found, np.argsort(distances)[:10])


def test_all_are_nearest_where_there_are_ten():
    nearest = nearest_faces(_drawn(3, 0), _drawn(10, 1))
    assert np.array_equal(np.sort(nearest, axis=1), np.tile(np.arange(10), (3, 1)))


def test_equals_are_told_apart_by_their_order():
    others = np.repeat(_drawn(4, 1), 4, axis=0)
    found = nearest_faces(others[5:6], others)[0]
    assert list(found[:4]) == [4, 5, 6, 7]


def test_refuses_fewer_than_ten():
    with pytest.raises(ValueError, match="needs 10 faces of each side, got 9"):
        nearest_faces(_drawn(3, 0), _drawn(9, 1))


def test_both_sides_point_at_each_other():
    points = _drawn(12, 0), _drawn(15, 1)
    a, b = landmarks_of_sides(points, torch.device("cpu"))
    assert a.points_fl2.shape == (12, 68, 2)
    assert np.array_equal(a.nearest_fk.numpy(), nearest_faces(*points))
    assert np.array_equal(b.nearest_fk.numpy(), nearest_faces(*points[::-1]))


def test_landmarks_lie_in_the_pixels_of_the_store(tmp_path):
    draw_folder(tmp_path, identity="a", count=4, size_px=128)
    faces = read_folder(tmp_path, minimum=4).faces
    crop = Crop("face", 0.9, 0.05, 128)
    points = store_landmarks(faces, crop)
    assert points.shape == (4, 68, 2)
    assert points.dtype == np.float32
    one = faces[2]
    wanted = crop_landmarks(one.landmarks_l2, one.alignment, crop)
    assert np.array_equal(points[2], wanted)
    centres = points[:, 17:].mean(axis=1)
    assert np.all((centres > 32) & (centres < 96)), "the features are in the middle of the crop"
