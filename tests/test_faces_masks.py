"""Masks against another implementation's pixels, and their rules."""

import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from oracle_numbers import is_picture_of, oracle_crop

from mien.core.faces.folder import Face, read_face
from mien.core.faces.geometry import (
    Alignment,
    Crop,
    align,
    crop_box,
    crop_landmarks,
    cut,
    resize,
)
from mien.core.faces.masks import (
    area_mask,
    is_empty,
    landmark_mask,
    named_mask,
    stored_mask,
    training_masks,
    why_empty,
)
from mien.core.faces.png import FaceFileError, FaceHeader, StoredMask

NEWER_OPENCV = int(cv2.__version__.split(".")[0]) >= 5


def golden_masks(oracle_paths, prefix: str):
    """(face, middle part of the key, crop, expected mask) of every golden mask."""
    for file in oracle_paths("geometry/*.npz"):
        face, _ = read_face(file.parents[1] / "samples" / f"{file.stem}.png")
        with np.load(file, allow_pickle=False) as golden:
            for key in golden:
                if key.startswith(prefix):
                    *middle, combo = key.split(":")[1:]
                    yield face, middle, oracle_crop(combo), golden[key]


def assert_same(found: np.ndarray, expected: np.ndarray, where: str, differing: list[str]) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    if not is_picture_of(expected, found):
        differing.append(where)


def assert_few(differing: list[str], num_checked: int) -> None:
    """OpenCV 4.x solves the pose a little differently: a landmark may round to the next px."""
    assert num_checked
    assert len(differing) <= (0 if NEWER_OPENCV else num_checked // 100 + 1), differing


@pytest.mark.oracle
def test_masks_equal_oracle(oracle_paths):
    differing: list[str] = []
    num_checked = 0
    for face, (name, settings), crop, expected in golden_masks(oracle_paths, "mask:"):
        dilation, blur_kernel, threshold = (float(value) for value in settings.split("_"))
        options = {"dilation": dilation, "blur_kernel": int(blur_kernel), "threshold": threshold}
        where = f"{face.path.stem} {name} {settings} {crop}"
        if name in ("components", "extended"):
            landmarks = crop_landmarks(face.landmarks_l2, face.alignment, crop)
            found = landmark_mask(name, landmarks, crop.size_px, dilation)
            assert_same(found, expected, where, differing)
        else:
            mask = face.stored_mask(name)
            found = stored_mask(mask, face.alignment, crop, **options)
            full = crop.centering == mask.centering and crop.coverage == 1.0
            if full and crop.vertical_offset:
                # The other implementation leaves the offset out here; ours moves mask and picture.
                unmoved = Crop(crop.centering, crop.coverage, 0.0, crop.size_px)
                still = stored_mask(mask, face.alignment, unmoved, **options)
                assert_same(still, expected, where, differing)
                assert np.array_equal(found, moved_whole(face, mask, crop, options)), where
            else:
                assert_same(found, expected, where, differing)
        num_checked += 1
    assert_few(differing, num_checked)


def moved_whole(face: Face, mask: StoredMask, crop: Crop, options: dict) -> np.ndarray:
    """The whole stored mask moved by the crop's offset: the crop formula for full coverage."""
    size_px = mask.size_px
    uncut = Crop(crop.centering, 1.0, 0.0, size_px)
    pixels = stored_mask(mask, face.alignment, uncut, **options)
    inner_px = size_px * (1 - {"legacy": 0.375, "face": 0.5, "head": 0.625}[crop.centering])
    top = round(-crop.vertical_offset * inner_px + size_px / 2) - size_px // 2
    moved = np.zeros_like(pixels)
    for row in range(size_px):
        if 0 <= top + row < size_px:
            moved[row] = pixels[top + row]
    return resize(moved, crop.size_px)


@pytest.mark.oracle
def test_areas_equal_oracle(oracle_paths):
    differing: list[str] = []
    num_checked = 0
    for face, (area,), crop, expected in golden_masks(oracle_paths, "area:"):
        landmarks = crop_landmarks(face.landmarks_l2, face.alignment, crop)
        found = area_mask(area, landmarks, crop.size_px)
        assert_same(found, expected, f"{face.path.stem} {area} {crop}", differing)
        num_checked += 1
    assert_few(differing, num_checked)


@pytest.mark.oracle
def test_training_items_equal_oracle(oracle_paths):
    files = oracle_paths("collate/*.npz")
    pictures = [oracle_paths(f"sets/{side}/*.png") for side in "AB"]
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
            face, _ = read_face(pictures[side][index[position, side]])
            image = cv2.imread(str(face.path), cv2.IMREAD_COLOR)
            box = crop_box(face.alignment, face.edge_px, crop)
            picture = resize(cut(image, box), crop.size_px)
            assert is_picture_of(items[position, side, :, :, :3], picture), face.path.name
            masks = training_masks(face, crop, **options)
            assert_same(
                masks, items[position, side, :, :, 3:], f"{file.name} {face.path.name}", differing
            )
            num_checked += 1
    assert_few(differing, num_checked)


@dataclass
class MadeFace:
    """A face that lies in no file."""

    landmarks_l2: np.ndarray
    alignment: Alignment
    masks: dict[str, StoredMask]

    def stored_mask(self, name: str) -> StoredMask:
        return named_mask(FaceHeader(self.landmarks_l2, self.masks), name)


def make_face(stored_px: int = 64, centering: str = "face") -> MadeFace:
    """A face that fills its crop as the mean face does, with one stored mask: a soft disc."""
    rows, columns = np.mgrid[:stored_px, :stored_px] / stored_px
    disc = np.clip(1.3 - 3.2 * np.hypot(rows - 0.5, columns - 0.5), 0, 1)
    data = zlib.compress(np.rint(disc * 255).astype(np.uint8).tobytes())
    generator = np.random.default_rng(1)
    landmarks = (generator.uniform(0, 1, (68, 2)) * 100 + 50).astype(np.float32)
    mask = StoredMask(data, stored_px, centering, np.eye(3))
    return MadeFace(landmarks, align(landmarks), {"vgg-clear": mask})


PLAIN = {"dilation": 0.0, "blur_kernel": 0, "threshold": 0}


@pytest.mark.parametrize("offset", [-0.25, -0.1, 0.1, 0.25])
def test_offset_moves_a_full_mask_of_the_same_centering(offset):
    face = make_face()
    mask = face.stored_mask("vgg-clear")
    pixels = mask.pixels()
    centre = round(-offset * 64 * 0.5 + 32)
    expected = np.zeros_like(pixels)
    for row in range(64):
        if 0 <= centre - 32 + row < 64:
            expected[row] = pixels[centre - 32 + row]
    found = stored_mask(mask, face.alignment, Crop("face", 1.0, offset, 64), **PLAIN)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, pixels)


def test_threshold_by_hand():
    face = make_face()
    mask = face.stored_mask("vgg-clear")
    pixels = mask.pixels()
    crop = Crop("face", 1.0, 0.0, 64)
    for percent in (0, 4, 25, 50):
        margin = percent / 100 * 255
        expected = pixels.copy()
        expected[pixels < margin] = 0
        expected[pixels > 255 - margin] = 255
        options = PLAIN | {"threshold": percent}
        assert np.array_equal(stored_mask(mask, face.alignment, crop, **options), expected)
    assert set(np.unique(expected)) == {0, 255}


def test_even_blur_kernel_is_made_odd():
    face = make_face()
    mask = face.stored_mask("vgg-clear")
    crop = Crop("face", 1.0, 0.0, 64)
    found = [
        stored_mask(mask, face.alignment, crop, **PLAIN | {"blur_kernel": kernel})
        for kernel in (4, 5, 3)
    ]
    assert np.array_equal(found[0], cv2.GaussianBlur(mask.pixels(), (5, 5), 0))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("stored_px", [64, 65, 128])
@pytest.mark.parametrize("size_px", [32, 64, 100, 256])
def test_odd_and_other_sizes_fit(stored_px, size_px):
    face = make_face(stored_px)
    for centering in ("face", "head", "legacy"):
        for coverage, offset in ((1.0, 0.0), (1.0, 0.2), (0.7, -0.2)):
            crop = Crop(centering, coverage, offset, size_px)
            masks = training_masks(face, crop, mask_type="vgg-clear", **PLAIN)
            assert masks.shape == (size_px, size_px, 3)
            assert masks[..., 0].any()


def test_tiny_dilation_leaves_the_mask_as_it_is():
    """0.7 % of 64 px rounds to a kernel of no px, which OpenCV refuses."""
    landmarks = make_face().alignment.normalized_l2 * 64
    plain = landmark_mask("components", landmarks, 64)
    assert np.array_equal(landmark_mask("components", landmarks, 64, 0.7), plain)
    grown = landmark_mask("components", landmarks, 64, 5.0)
    shrunk = landmark_mask("components", landmarks, 64, -5.0)
    assert shrunk.sum() < plain.sum() < grown.sum()
    assert (grown >= plain).all()
    assert (shrunk <= plain).all()


@pytest.mark.parametrize("size_px", [8, 16, 63, 256])
@pytest.mark.parametrize("area", ["eye", "mouth"])
def test_an_area_is_widened_and_softened_as_in_the_whole_crop(area, size_px):
    rng = np.random.default_rng(size_px)
    kernel_px = size_px // 16 + 1 - size_px // 16 % 2
    grown_px = round(0.025 * size_px)
    hulls = {"eye": (slice(36, 42), slice(42, 48)), "mouth": (slice(48, 60),)}[area]
    for spread in (0.0, 0.02, 0.1, 0.5):
        middle = rng.uniform(-0.2, 1.2, 2)  # at the border and beyond it, too
        points = (size_px * rng.normal(middle, spread, (68, 2))).astype(np.float32)
        expected = np.zeros((size_px, size_px), np.uint8)
        for hull in hulls:
            corners = cv2.convexHull(np.rint(points[hull]).astype(np.int32))
            cv2.fillConvexPoly(expected, corners, 255, lineType=cv2.LINE_AA)
        if grown_px:
            ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (grown_px, grown_px))
            expected = cv2.dilate(expected, ellipse)
        expected = cv2.GaussianBlur(expected, (kernel_px, kernel_px), 0)
        np.testing.assert_array_equal(area_mask(area, points, size_px), expected)


def test_drawing_leaves_the_landmarks_alone():
    landmarks = make_face().alignment.normalized_l2 * 64
    before = landmarks.copy()
    landmark_mask("extended", landmarks, 64)
    area_mask("eye", landmarks, 64)
    assert np.array_equal(landmarks, before)


def test_training_masks_by_type():
    face = make_face()
    crop = Crop("face", 1.0, 0.0, 64)
    landmarks = crop_landmarks(face.landmarks_l2, face.alignment, crop)
    none = training_masks(face, crop, mask_type="none", **PLAIN)
    assert (none[..., 0] == 255).all()
    for plane, area in ((1, "eye"), (2, "mouth")):
        assert np.array_equal(none[..., plane], area_mask(area, landmarks, 64))
    drawn = training_masks(face, crop, mask_type="extended", **PLAIN | {"dilation": 3.0})
    assert np.array_equal(drawn[..., 0], landmark_mask("extended", landmarks, 64, 3.0))


def test_missing_and_damaged_masks_are_named():
    face = make_face()
    crop = Crop("face", 1.0, 0.0, 64)
    with pytest.raises(FaceFileError, match=r"no mask 'unet-dfl' \(stored: vgg-clear\): set data"):
        training_masks(face, crop, mask_type="unet-dfl", **PLAIN)
    bare = make_face()
    bare.masks.pop("vgg-clear")
    with pytest.raises(
        FaceFileError, match="nor any other that is stored: set data.mask_type to components or ex"
    ):
        training_masks(bare, crop, mask_type="unet-dfl", **PLAIN)
    face.masks["vgg-clear"].data = b"nothing"
    with pytest.raises(FaceFileError, match="damaged"):
        training_masks(face, crop, mask_type="vgg-clear", **PLAIN)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        landmark_mask("nose", np.zeros((68, 2), np.float32), 64, 0.0)
    with pytest.raises(ValueError, match="area must be one of"):
        area_mask("nose", np.zeros((68, 2), np.float32), 64)


def full_mask(value: int, stored_px: int = 64) -> StoredMask:
    pixels = np.full((stored_px, stored_px), value, np.uint8)
    return StoredMask(zlib.compress(pixels.tobytes()), stored_px, "face", np.eye(3))


def test_an_empty_mask_is_one_of_which_less_than_a_hundredth_is_inside():
    mask = np.zeros((100, 100), np.uint8)
    assert is_empty(mask)
    mask[0, :99] = 255
    assert is_empty(mask)
    mask[1, :2] = 255
    assert not is_empty(mask)
    assert is_empty(np.ones((100, 100), np.uint8))
    assert not is_empty(np.full((100, 100), 40, np.uint8))


@pytest.mark.parametrize(
    ("value", "mask_type", "reason"),
    [
        (1, "vgg-clear", "holds 0 and 1 in place of 0 and 255: multiply it by 255"),
        (0, "vgg-clear", "mask 'vgg-clear' is empty: make it again"),
        (255, "vgg-clear", "has nothing inside the crop: bring data.mask_dilation"),
        (255, "extended", "mask 'extended' has nothing inside the crop"),
    ],
)
def test_what_left_a_mask_empty_is_told_with_its_remedy(value, mask_type, reason):
    face = make_face()
    face.masks["vgg-clear"] = full_mask(value)
    assert reason in why_empty(face, mask_type)


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_mask_of_0_and_1_is_empty_whatever_the_threshold(threshold):
    face = make_face()
    face.masks["vgg-clear"] = full_mask(1)
    crop = Crop("face", 1.0, 0.0, 64)
    options = PLAIN | {"threshold": threshold}
    masks = training_masks(face, crop, mask_type="vgg-clear", **options)
    assert is_empty(masks[..., 0])
