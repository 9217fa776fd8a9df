"""Threads that work side by side, each on a face or a frame of its own."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2


def thread_count(setting: int) -> int:
    """Threads to use: the setting, or for 0 as many as the process may use cores."""
    # Not `os.cpu_count`: a container or `taskset` may leave fewer.
    return setting or len(os.sched_getaffinity(0))


class _CallingThread:
    """OpenCV in the calling thread alone, as long as anybody asks for it; then as it was before."""

    def __init__(self) -> None:
        self._num_asking = 0
        self._before = 1
        # The setting is one of the whole process, and pools may begin and end in any order.
        self._change = threading.Lock()

    def __enter__(self) -> None:
        with self._change:
            if self._num_asking == 0:
                self._before = cv2.getNumThreads()
                self._set(0)
            self._num_asking += 1

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._num_asking -= 1
            if self._num_asking == 0:
                self._set(self._before)

    def _set(self, num_threads: int) -> None:
        # 0 leaves OpenCV's own threads asleep, while 1 ends them: in a forked process, which has
        # none of the threads of its parent, that waits for them forever.
        if self._before > 1:
            cv2.setNumThreads(num_threads)


_calling_thread = _CallingThread()


@contextmanager
def working_threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, beside which OpenCV uses none of its own.

    OpenCV divides many calls among its threads, which wait for the next one by spinning: beside
    threads that have a face each they bring nothing, and take the cores from them.
    """
    with _calling_thread, ThreadPoolExecutor(num_threads) as pool:
        yield pool
