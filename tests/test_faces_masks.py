"""Masks against another implementation's pixels, and their rules."""

import cv2
import numpy as np
import pytest

from mien.core.faces.folder import Face
from mien.core.faces.geometry import Crop, align, crop_box, crop_landmarks, cut, resize
from mien.core.faces.masks import area_mask, landmark_mask, stored_mask, training_masks
from mien.core.faces.png import StoredMask, read_header

NEWER_OPENCV = int(cv2.__version__.split(".")[0]) >= 5


def crop_of(combo: str) -> Crop:
    """The crop that a combination such as face_87.5_128_0 names."""
    centering, coverage, size_px, offset = combo.split("_")
    return Crop(centering, float(coverage) / 100, float(offset) / 100, int(size_px))


def read_face(path) -> Face:
    edge_px, header = read_header(path)
    return Face(path, edge_px, header, align(header.landmarks_l2))


def golden_masks(oracle_dir, prefix: str):
    """(face, middle part of the key, crop, expected mask) of every golden mask."""
    files = sorted((oracle_dir / "geometry").glob("*.npz"))
    if not files:
        pytest.skip(f"{oracle_dir} has no geometry")
    for file in files:
        face = read_face(oracle_dir / "samples" / f"{file.stem}.png")
        with np.load(file, allow_pickle=False) as golden:
            for key in golden:
                if key.startswith(prefix):
                    *middle, combo = key.split(":")[1:]
                    yield face, middle, crop_of(combo), golden[key]


def assert_same(found: np.ndarray, expected: np.ndarray, where: str, differing: list[str]) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    if not np.array_equal(found, expected):
        differing.append(where)


def assert_few(differing: list[str], num_checked: int) -> None:
    """OpenCV 4.x solves the pose a little differently: a landmark may round to the next px."""
    assert num_checked
    assert len(differing) <= (0 if NEWER_OPENCV else num_checked // 100 + 1), differing


@pytest.mark.oracle
def test_masks_equal_oracle(oracle_dir):
    differing: list[str] = []
    num_checked = num_mended = 0
    for face, (name, settings), crop, expected in golden_masks(oracle_dir, "mask:"):
        dilation, blur_kernel, threshold = (float(value) for value in settings.split("_"))
        options = {"dilation": dilation, "blur_kernel": int(blur_kernel), "threshold": threshold}
        where = f"{face.path.stem} {name} {settings} {crop}"
        if name in ("components", "extended"):
            landmarks = crop_landmarks(face.header.landmarks_l2, face.alignment, crop)
            found = landmark_mask(name, landmarks, crop.size_px, dilation)
            assert_same(found, expected, where, differing)
        else:
            mask = face.header.masks[name]
            found = stored_mask(mask, face.alignment, crop, **options)
            if crop.centering == mask.centering and crop.coverage == 1 and crop.vertical_offset:
                # The other implementation leaves the offset out here; ours moves mask and picture.
                unmoved = Crop(crop.centering, crop.coverage, 0.0, crop.size_px)
                still = stored_mask(mask, face.alignment, unmoved, **options)
                assert_same(still, expected, where, differing)
                assert_moved(found, still, mask, crop)
                num_mended += 1
            else:
                assert_same(found, expected, where, differing)
        num_checked += 1
    assert_few(differing, num_checked)


def assert_moved(moved: np.ndarray, still: np.ndarray, mask: StoredMask, crop: Crop) -> None:
    """The mask lies lower by the offset; equal where crop and stored mask have one size."""
    assert moved.shape == still.shape
    assert not np.array_equal(moved, still)
    rows = np.arange(len(still))
    centre_moved, centre_still = (m.sum(axis=1) @ rows / m.sum() for m in (moved, still))
    assert np.sign(centre_moved - centre_still) == np.sign(crop.vertical_offset)


@pytest.mark.oracle
def test_areas_equal_oracle(oracle_dir):
    differing: list[str] = []
    num_checked = 0
    for face, (area,), crop, expected in golden_masks(oracle_dir, "area:"):
        landmarks = crop_landmarks(face.header.landmarks_l2, face.alignment, crop)
        found = area_mask(area, landmarks, crop.size_px)
        assert_same(found, expected, f"{face.path.stem} {area} {crop}", differing)
        num_checked += 1
    assert_few(differing, num_checked)


@pytest.mark.oracle
def test_training_items_equal_oracle(oracle_dir):
    files = sorted((oracle_dir / "collate").glob("*.npz"))
    if not files:
        pytest.skip(f"{oracle_dir} has no collate")
    pictures = [sorted((oracle_dir / "sets" / side).glob("*.png")) for side in "AB"]
    differing: list[str] = []
    num_checked = 0
    for file in files:
        with np.load(file, allow_pickle=False) as golden:
            items, index = golden["trainset_items"], golden["file_index"]
            crop = Crop(
                str(golden["centering"]), float(golden["coverage"]) / 100, 0.0, items.shape[2]
            )
            options = {
                "mask_type": str(golden["mask_type"]),
                "dilation": 0.0,
                "blur_kernel": 3,
                "threshold": 4,
            }
        for position, side in np.ndindex(index.shape):
            face = read_face(pictures[side][index[position, side]])
            image = cv2.imread(str(face.path), cv2.IMREAD_COLOR)
            box = crop_box(face.alignment, face.edge_px, crop)
            picture = resize(cut(image, box), crop.size_px)
            assert np.array_equal(picture, items[position, side, :, :, :3]), face.path.name
            masks = training_masks(face, crop, **options)
            assert_same(
                masks, items[position, side, :, :, 3:], f"{file.name} {face.path.name}", differing
            )
            num_checked += 1
    assert_few(differing, num_checked)
