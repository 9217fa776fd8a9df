"""Every Triton kernel compiled for GPUs that are not here: registers, spills, load widths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = (80, 89, 90, 100)
CASES = sorted((Path(__file__).parent / "aot").glob("*.json"))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernels_compile_without_spills_and_with_wide_loads(path):
    command = [sys.executable, Path(__file__).parent / "compile_kernels.py", path]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *map(str, TARGETS)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    cases = {case["name"]: case for case in json.loads(path.read_text())}
    assert len(found) == len(cases) * len(TARGETS)
    for kernel in found:
        case = cases[kernel["case"]]
        assert kernel["stack_bytes"] == kernel["local_accesses"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= case["max_registers"], kernel
        assert kernel["wide_loads"] >= case["min_wide_loads"], kernel
        assert kernel["wide_stores"] >= case["min_wide_stores"], kernel
