"""Threads that each have a face or a frame of their own keep OpenCV from using others."""

import contextlib

import cv2
import pytest

from mien.core.system.threads import working_threads


@pytest.fixture(autouse=True)
def two_opencv_threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    yield
    cv2.setNumThreads(before)


def test_opencv_is_as_it_was_once_the_last_of_two_pools_has_ended():
    """They may end in any order: what the first one found is what the last one restores."""
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(working_threads(2))
    second.enter_context(working_threads(2))
    first.close()
    assert cv2.getNumThreads() == 1
    second.close()
    assert cv2.getNumThreads() == 2


def test_opencv_is_as_it_was_after_an_error():
    with pytest.raises(KeyError), working_threads(1) as pool:
        pool.submit({}.__getitem__, "missing").result()
    assert cv2.getNumThreads() == 2
