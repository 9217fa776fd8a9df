"""Threads that each have a face or a frame of their own keep OpenCV from using others."""

import contextlib
import os
import select
import signal
import time

import cv2
import numpy as np
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


def test_a_process_forked_from_one_with_threads_of_opencv_does_not_wait_for_them():
    """The fork has none of them, and OpenCV would join them before it changes their number."""
    picture = np.zeros((2000, 2000, 3), np.uint8)
    cv2.GaussianBlur(picture, (21, 21), 3)
    # Until they sleep: those that still spin for the next call leave nothing to wait for.
    time.sleep(0.2)
    pid = os.fork()
    if pid == 0:
        with working_threads(2) as pool:
            pool.submit(cv2.GaussianBlur, picture, (21, 21), 3).result()
        cv2.GaussianBlur(picture, (21, 21), 3)
        os._exit(0)
    handle = os.pidfd_open(pid)
    has_ended, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
