"""Nothing that a job or its memory can hold crashes libmien, on threads or in emulated kernels.

MIEN_FUZZ is the number of cases of each operation (default: 150).
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from emulator import DECLARATIONS, build_sanitized

from mien.kernels import native

CASES = os.environ.get("MIEN_FUZZ", "150")
FUZZ = Path(__file__).parent / "cuda_on_cpu/fuzz_border.py"


@pytest.mark.slow
def test_any_job_is_worked_on_or_refused(pytestconfig, tmp_path):
    """Every call, under the sanitizers for memory and for undefined behaviour."""
    library = build_sanitized(pytestconfig.cache.mkdir("cuda_on_cpu"))
    declarations = tmp_path / "declarations.txt"
    declarations.write_text(native._declarations() + DECLARATIONS)
    asan = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, str(FUZZ), str(library), str(declarations), CASES],
        env=os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    seen = Counter()
    for line in done.stdout.splitlines():
        name, status, number = line.split()
        seen[name, status] += int(number)
    for operation in ("draw", "augment", "face_loss", "filtered_loss"):
        for processor in ("cpu", "cuda"):  # each has worked, and has refused
            assert seen[f"{operation}_{processor}", "0"] > 10
            assert seen[f"{operation}_{processor}", "1"] > 10
    assert {status for _, status in seen} == {"0", "1"}
