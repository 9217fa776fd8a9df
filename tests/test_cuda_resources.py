"""What every CUDA kernel takes of a GPU: registers, spills, shared memory; wide accesses."""

import re
import subprocess
from pathlib import Path

import pytest
import triton

import mien
from mien.kernels import native

LIBRARY = Path(mien.__file__).parent / "kernels/libmien.so"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# Most registers of a thread, bytes of static shared memory of a block, 1 KiB of which is the
# driver's from sm_90 on; any target.
BOUNDS = {
    "loss_forward_kernelILi1": (128, 37 * 1024),
    "loss_forward_kernelILi3": (96, 37 * 1024),  # five blocks to a multiprocessor
    "loss_gradient_kernel": (96, 25 * 1024),
    "loss_pixels_kernel": (72, 4 * 1024),
    "loss_means_kernel": (32, 17 * 1024),
}
OTHERS = (64, 48 * 1024)

# One address parked by the compiler, bytes; nowhere else anything is.
STACK_ALLOWED = {"sm_80": 8, "sm_100": 8, "sm_120": 8}

# Instructions of 64 or 128 bits that the path of whole words has, on sm_90: runs of 12 numbers of
# pred and target in 4 (or 2) bytes each and of the weight; 3 planes of derivatives; the filter.
WIDE = {
    "loss_forward_kernelILi3": {"LDG": 13, "STG": 9, "LDS": 44},
    "loss_forward_kernelILi1": {"LDG": 15, "STG": 9, "LDS": 20},
    "loss_gradient_kernelILi3": {"LDG": 13, "STG": 6, "LDS": 33},
    "loss_gradient_kernelILi1": {"LDG": 15, "STG": 6, "LDS": 15},
    "loss_pixels_kernelILi3": {"LDG": 13, "STG": 6, "LDS": 0},
}

pytestmark = pytest.mark.aot


def _cuobjdump(*words):
    _, lib = native.library()
    if not lib.mien_has_cuda():
        pytest.skip("libmien was built without nvcc")
    if not CUOBJDUMP.exists():
        pytest.skip("this triton has no cuobjdump")
    command = [CUOBJDUMP, *words, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bounds(kernel):
    return next((bounds for name, bounds in BOUNDS.items() if name in kernel), OTHERS)


def _resources():
    """(target, mangled name, registers, stack bytes, shared bytes) of every kernel."""
    target = kernel = None
    for line in _cuobjdump("-res-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.search(r"Function (\w+):", line):
            kernel = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield target, kernel, *map(int, found.groups())


def test_no_kernel_spills_or_takes_more_than_it_should():
    kernels = list(_resources())
    for target, kernel, registers, stack, shared in kernels:
        most_registers, most_shared = _bounds(kernel)
        assert registers <= most_registers, f"{target} {kernel}: {registers} registers"
        assert shared <= most_shared, f"{target} {kernel}: {shared} bytes of shared memory"
        assert stack <= STACK_ALLOWED.get(target, 0), f"{target} {kernel}: {stack} bytes spilled"
    for name in BOUNDS:
        assert any(name in kernel for _, kernel, *_ in kernels), f"there is no {name}"


def test_runs_are_loaded_and_stored_by_whole_words():
    counts: dict[str, dict[str, int]] = {}
    for line in _cuobjdump("-sass", "-arch", "sm_90").splitlines():
        if found := re.search(r"Function : (\w+)", line):
            current = counts.setdefault(found[1], {"LDG": 0, "STG": 0, "LDS": 0})
        elif found := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(LDG|STG|LDS)\.(\S*)", line):
            current[found[1]] += bool(re.search(r"\b(64|128)\b", found[2]))
    for name, wanted in WIDE.items():
        kernels = {kernel: found for kernel, found in counts.items() if name in kernel}
        assert kernels, f"there is no {name} for sm_90"
        for kernel, found in kernels.items():
            for instruction, least in wanted.items():
                assert found[instruction] >= least, f"{kernel}: {found}"
