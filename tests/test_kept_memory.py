"""Freed memory stays with the process while it computes on a CPU, and no longer."""

import contextlib
import ctypes
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


def test_blocks_that_glibc_would_unmap_are_kept_until_the_last_who_asked_has_ended():
    assert _kept_bytes(256) < SLACK
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(kept_memory)
    second.enter_context(kept_memory)
    before = _resident_bytes()
    assert _kept_bytes(256) > 256 * MIB - SLACK
    # The same memory again.
    assert abs(_kept_bytes(256)) < SLACK
    first.close()
    assert abs(_kept_bytes(256)) < SLACK
    second.close()
    assert _resident_bytes() - before < SLACK
    assert _kept_bytes(256) < SLACK


def test_memory_is_given_back_after_an_error():
    with pytest.raises(KeyError), kept_memory:
        raise KeyError
    assert _kept_bytes(256) < SLACK


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


@pytest.mark.parametrize(("device", "is_kept"), [("cpu", True), ("cuda", False)])
def test_a_session_keeps_memory_where_it_computes_with_it(device, is_kept, monkeypatch):
    # There may be no GPU whose peak could be set to nothing.
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    with library_settings(torch.device(device), ALONE, deterministic=False):
        assert (_kept_bytes(256) > 256 * MIB - SLACK) == is_kept
    assert _kept_bytes(256) < SLACK


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(kept_memory, "_libc", object())
    with kept_memory:
        assert _kept_bytes(256) < SLACK
