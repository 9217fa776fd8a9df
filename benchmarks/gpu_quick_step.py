"""The step of a model as a graph with every lever and without each of them, and a replay's kernels.

Run: ``python benchmarks/gpu_quick_step.py FOLDER``; it writes `step.json`, after every row, and
`kernels.txt`.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mien.benchmarks import bench_step
from mien.benchmarks.variants import variant
from mien.core import precision as precisions
from mien.core.config import from_dict
from mien.core.training import memory

PLAIN = [("original", 16, "bf16", "graph", "")]
LEVERS = [("original", 16, "bf16", "graph", lever) for lever in bench_step.LEVERS]
OTHERS = [
    ("original", 64, "bf16", "graph", ""),
    ("original", 16, "bf16", "eager", ""),
    ("lightweight", 16, "bf16", "graph", ""),
    ("dfaker-256", 16, "bf16", "graph", ""),
    ("dfl-h128", 16, "bf16", "graph", ""),
    ("original", 16, "fp16", "graph", ""),
]
ROW_LIMIT = 60
"""Kernels that the table of a replay names: more than a step of `original` has kinds of."""


def measure_steps(folder: Path, device: torch.device) -> None:
    """Measure every row; what is known is in the file even where a later row fails."""
    rows: list[dict[str, Any]] = []
    for name, batch_size, mode, engine, lever in PLAIN + LEVERS + OTHERS:
        what = {"model": name, "batch_size": batch_size, "precision": mode}
        what |= {"engine": f"mien-{engine}", "without": lever}
        make = partial(bench_step.mien_step, name, batch_size, mode, device, engine, without=lever)
        row = bench_step.step_row(what, make, device, None)
        rows.append(row | {"planned_mib": planned_mib(name, batch_size, mode, device)})
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
        (folder / "step.json").write_text(json.dumps(rows, indent=1))
        if device.type == "cuda":
            torch.cuda.empty_cache()


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
    table = averages.table(sort_by="cuda_time_total", row_limit=ROW_LIMIT, max_name_column_width=90)
    (folder / "kernels.txt").write_text(table)


def main() -> None:
    """Measure into the folder that the command line names."""
    folder = Path(sys.argv[1])
    device = torch.device("cuda", torch.cuda.current_device())
    measure_steps(folder, device)
    profile_replay(folder, device)


if __name__ == "__main__":
    main()
