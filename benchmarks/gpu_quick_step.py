"""The step of a model as a graph with every lever and without each of them, and a replay's kernels.

Run: ``python benchmarks/gpu_quick_step.py rows FOLDER`` writes `step.json`, after every row;
``python benchmarks/gpu_quick_step.py kernels FOLDER`` writes `kernels.txt`, in a process without
them: a profiler may slow what follows it.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mien.benchmarks import bench_step
from mien.benchmarks.harness import Pace
from mien.benchmarks.variants import variant
from mien.core import precision as precisions
from mien.core.config import from_dict
from mien.core.system.durable_files import replace_file
from mien.core.training import memory

ROWS = [
    ("original", 16, "bf16", "graph", ""),
    *(("original", 16, "bf16", "graph", lever) for lever in bench_step.LEVERS),
    ("original", 64, "bf16", "graph", ""),
    ("original", 16, "bf16", "eager", ""),
    ("original", 16, "fp16", "graph", ""),
    ("lightweight", 16, "bf16", "graph", ""),
    ("dfaker-256", 16, "bf16", "graph", ""),
    ("dfl-h128", 16, "bf16", "graph", ""),
]
PACE = Pace(windows=3, window_s=0.3, warmup=20)
"""Half the time that `mien bench step` takes: all rows must fit into theirs."""

ROW_LIMIT = 60
"""Kernels that the table of a replay names: more than a step of `original` has kinds of."""

NAME_LIMIT = 160
"""Letters of a kernel's name: those of cuDNN tell their tile late."""


def measure_all(folder: Path) -> None:
    """Measure every row, in a new process after one that fails.

    A wrong access, or a capture that fails, spoils its process for all that follows.
    """
    file = folder / "step.json"
    _write(file, [])
    while (number := len(_read(file))) < len(ROWS):
        command = [sys.executable, __file__, "from", str(folder), str(number)]
        code = subprocess.run(command, check=False).returncode
        rows = _read(file)
        if len(rows) == number:  # it ended before it could say why
            _write(file, [*rows, _identity(number) | {"error": f"ended by exit code {code}"}])


def measure_from(number: int, folder: Path, device: torch.device) -> None:
    """Measure the rows from this one on, to the first that fails; the file holds what is known."""
    file = folder / "step.json"
    for name, batch_size, mode, engine, lever in ROWS[number:]:
        make = partial(bench_step.mien_step, name, batch_size, mode, device, engine, without=lever)
        rows = _read(file)
        row = bench_step.step_row(_identity(len(rows)), make, device, None, PACE)
        row["planned_mib"] = planned_mib(name, batch_size, mode, device)
        print(row, flush=True)
        _write(file, [*rows, row])
        if "error" in row:
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _identity(number: int) -> dict[str, Any]:
    name, batch_size, mode, engine, lever = ROWS[number]
    what = {"model": name, "batch_size": batch_size, "precision": mode}
    return what | {"engine": f"mien-{engine}", "without": lever}


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    # In one step: the limit of time may end this process here.
    replace_file(file, json.dumps(rows, indent=1).encode())


def planned_mib(name: str, batch_size: int, mode: str, device: torch.device) -> int:
    """What `core.training.memory` foresees for such a run, faces not counted."""
    model = {"trainer": variant(name).trainer, "options": variant(name).options}
    config = from_dict({"model": model, "train": {"batch_size": batch_size}})
    precision = precisions.resolve(mode, device)
    return round(memory.footprint(config, precision).at(batch_size).total_mib)


def profile_replay(folder: Path, device: torch.device) -> None:
    """Name the kernels of five replays, the longest first."""
    run = bench_step.mien_step("original", 16, "bf16", device, "graph")
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        # Kernels run behind the calls that queue them: inside, or the profile would miss the last.
        torch.cuda.synchronize()
    averages = profile.key_averages()
    if not averages:
        sys.exit("the profiler saw no kernel: this machine's CUPTI does not work")
    limits = {"row_limit": ROW_LIMIT, "max_name_column_width": NAME_LIMIT}
    table = averages.table(sort_by="cuda_time_total", **limits)
    (folder / "kernels.txt").write_text(table)


def main(what: str, folder: Path, number: str = "0") -> None:
    """Measure into a folder: all ``rows``, those ``from`` a number on, or the ``kernels``."""
    if what == "rows":
        measure_all(folder)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if what == "from":
        measure_from(int(number), folder, device)
    else:
        profile_replay(folder, device)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
