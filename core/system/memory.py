"""Memory of the process that glibc would give back to the system after every use."""

import ctypes
import os
import threading

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
"""Blocks are never mapped by themselves, and the end of the heap is never cut off."""
_LARGEST_LEARNED = 32 * 2**20
_AS_BEFORE = {
    _MMAP_MAX: 65_536,
    _MMAP_THRESHOLD: _LARGEST_LEARNED,
    _TRIM_THRESHOLD: 2 * _LARGEST_LEARNED,
}
"""The first as glibc begins. The others as it sets them once a block of 32 MiB was freed, the
largest that it learns to keep: after a first call of mallopt it learns no more, and would map every
block that is larger than those which were freed until then."""


_OF_THE_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables of the environment by which glibc is told the same; where one is there, it counts."""


class _KeptMemory:
    """Freed memory stays with the process, as long as anybody asks for it.

    glibc maps every block of more than 32 MiB by itself and unmaps it when it is freed. A step on a
    CPU frees hundreds of MiB, and takes as much: each page anew from the system, which clears it.
    Nothing happens with another C library, or with an allocator that was loaded in its place.

    What is cut off a block to align the next one may part it from its neighbours, so that a process
    may keep more than it ever had at a time: in training up to a tenth more was measured.
    """

    def __init__(self) -> None:
        self._num_asking = 0
        # The setting is one of the whole process, and sessions may begin and end in any order.
        self._change = threading.Lock()
        self._libc = ctypes.CDLL(None)

    def __enter__(self) -> None:
        with self._change:
            if self._num_asking == 0:
                self._set(_KEPT)
            self._num_asking += 1

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._num_asking -= 1
            if self._num_asking == 0:
                self._set(_AS_BEFORE)
                self._call("malloc_trim", 0)

    def _set(self, options: dict[int, int]) -> None:
        if any(name in os.environ for name in _OF_THE_USER):
            return
        for option, value in options.items():
            self._call("mallopt", option, value)

    def _call(self, name: str, *values: int) -> None:
        function = getattr(self._libc, name, None)
        if function is not None:
            function(*values)


kept_memory = _KeptMemory()
