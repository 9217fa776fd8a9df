"""Freed memory stays with the process while it computes on a CPU, and no longer."""

import contextlib
import ctypes
import os
import resource
import subprocess
import sys

import pytest
import torch

from mien.core.distribute.ranks import ALONE
from mien.core.system.memory import kept_memory
from mien.core.training.libraries import library_settings

MIB = 2**20
SLACK = 16 * MIB
"""What a first call of PyTorch may bring into memory beside the block."""
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _kept_bytes(num_mib):
    """Bytes that the process still has of a block that was written to and freed."""
    before = _resident_bytes()
    block = torch.ones(num_mib * MIB, dtype=torch.uint8)
    # A fresh block, or one that the process had already.
    assert _resident_bytes() - before in range(-SLACK, num_mib * MIB + SLACK)
    del block
    return _resident_bytes() - before


def _runs_in_a_process(check, *arguments):
    """Carry out a check in a process of its own, whose heap has met no large block before."""
    name, folder = f"{check.__module__}.{check.__name__}", os.path.dirname(__file__)
    program = f"""if True:
        import sys
        sys.path.insert(0, {folder!r})
        import {check.__module__}
        {name}(*{arguments!r})
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _keep_until_the_last_has_ended():
    assert _kept_bytes(256) < SLACK
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(kept_memory)
    second.enter_context(kept_memory)
    before = _resident_bytes()
    assert _kept_bytes(256) > 256 * MIB - SLACK
    # What is cut off a block to align the next one may part it from its neighbours, some times: a
    # thread of glibc's keeps at most seven such pieces of each size.
    for _ in range(60):
        _kept_bytes(48)
    grown = _resident_bytes()
    for _ in range(20):
        _kept_bytes(48)
    assert _resident_bytes() - grown < SLACK
    first.close()
    assert abs(_kept_bytes(48)) < SLACK
    second.close()
    assert _resident_bytes() - before < SLACK


def test_blocks_that_glibc_would_unmap_are_kept_until_the_last_who_asked_has_ended():
    _runs_in_a_process(_keep_until_the_last_has_ended)


def _leave_what_the_user_set():
    with kept_memory:
        assert _kept_bytes(256) < SLACK


def test_what_the_user_told_glibc_counts(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    _runs_in_a_process(_leave_what_the_user_set)


def _fail_inside():
    with contextlib.suppress(KeyError), kept_memory:
        raise KeyError
    assert _kept_bytes(256) < SLACK


def test_memory_is_given_back_after_an_error():
    _runs_in_a_process(_fail_inside)


@pytest.mark.parametrize("num_mib", [1, 31])
def test_a_program_then_keeps_blocks_that_glibc_would_have_learned_to_keep(num_mib):
    # In a process of its own, whose glibc has met no large block before.
    program = f"""if True:
        import ctypes, resource
        from mien.core.system.memory import kept_memory

        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p

        def num_new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t({num_mib * MIB})))
            ctypes.memset(block, 1, {num_mib * MIB})
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with kept_memory:
            pass
        print([num_new_pages() for _ in range(3)][-1])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) < num_mib * MIB / resource.getpagesize() / 10


def _keep_in_a_session(device, is_kept):
    # There may be no GPU whose peak could be set to nothing.
    torch.cuda.reset_peak_memory_stats = lambda _: None
    before = _resident_bytes()
    with library_settings(torch.device(device), ALONE, deterministic=False):
        assert (_kept_bytes(256) > 256 * MIB - SLACK) == is_kept
    assert _resident_bytes() - before < SLACK


@pytest.mark.parametrize(("device", "is_kept"), [("cpu", True), ("cuda", False)])
def test_a_session_keeps_memory_where_it_computes_with_it(device, is_kept):
    _runs_in_a_process(_keep_in_a_session, device, is_kept)


def _keep_without_glibc():
    kept_memory._libc = object()
    with kept_memory:
        assert _kept_bytes(256) < SLACK


def test_another_c_library_is_left_alone():
    _runs_in_a_process(_keep_without_glibc)
