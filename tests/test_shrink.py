"""Pictures made smaller by libmien: OpenCV's bytes, or left to OpenCV."""

import math
import mmap
import os

import cv2
import numpy as np
import pytest

from mien.core.faces.geometry import resize
from mien.core.faces.shrink import can_shrink, shrink
from mien.kernels import native


@pytest.fixture(params=["baseline", "avx2"], autouse=True)
def build(request, monkeypatch):
    """The build of the library for one instruction set."""
    monkeypatch.setenv("MIEN_CPU", request.param)


def _by_opencv(image, size_px):
    return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("is_black_and_white", [False, True])
def test_bytes_are_those_of_opencv(is_black_and_white):
    rng = np.random.default_rng(is_black_and_white)
    sizes = [(3, 2), (5, 3), (5, 2), (97, 96), (336, 64), (336, 256), (640, 63), (1000, 7)]
    sizes += [(edge, int(rng.integers(1, edge))) for edge in rng.integers(2, 300, 60).tolist()]
    for edge_px, size_px in sizes:
        # A part of a larger picture, whose rows lie apart.
        whole = rng.integers(0, 256, (edge_px + 2, edge_px + 3, 3), np.uint8)
        image = whole[1 : 1 + edge_px, 2 : 2 + edge_px]
        if is_black_and_white:
            image = 255 * (image > 127).astype(np.uint8)
        assert can_shrink(image, size_px) is (edge_px % size_px != 0)
        if can_shrink(image, size_px):
            np.testing.assert_array_equal(shrink(image, size_px), _by_opencv(image, size_px))
        np.testing.assert_array_equal(resize(image, size_px), _by_opencv(image, size_px))


def test_no_byte_behind_the_picture_is_read(tmp_path):
    path = tmp_path / "pages"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))
    pages = np.memmap(path, np.uint8, "r+")
    # A file that is shorter than its mapping: a byte more, and a bus error ends the process.
    os.truncate(path, mmap.PAGESIZE)
    edge_px = math.isqrt(mmap.PAGESIZE // 3)
    begin = mmap.PAGESIZE - 3 * edge_px**2
    image = pages[begin : mmap.PAGESIZE].reshape(edge_px, edge_px, 3)
    assert not shrink(image, edge_px - 5).any()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        np.zeros((9, 8, 3), np.uint8),
        np.zeros((9, 9, 3), np.uint8)[:, ::-1],
        np.zeros((9, 9, 3), np.uint8)[::-1],
    ],
    ids=["grey", "alpha", "float", "wide", "mirrored", "upside-down"],
)
def test_other_pictures_are_left_to_opencv(image):
    assert not can_shrink(image, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size 1..edge - 1"),
        ({"size": 4}, "size 1..edge - 1"),
        ({"edge": 2**16 + 1}, "edge must be at most 65536"),
        ({"row_bytes": 11}, "row_bytes must hold 4 pixels, got 11"),
        ({"picture": None}, "null pointer"),
        ({"smaller": None}, "null pointer"),
    ],
)
def test_the_library_refuses_jobs_that_cannot_be(change, message):
    ffi, _ = native.library()
    rooms = {"picture": ffi.new("uint8_t[]", 48), "smaller": ffi.new("uint8_t[]", 27)}
    job = {"row_bytes": 12, "edge": 4, "size": 3} | rooms | change
    job = {name: ffi.NULL if value is None else value for name, value in job.items()}
    with pytest.raises(native.NativeError, match=message):
        native.call("shrink_cpu", ffi.new("mien_shrink_job *", job))
