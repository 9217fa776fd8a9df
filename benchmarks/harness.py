"""What every benchmark shares: where it ran, how it is timed, where its numbers go."""

import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def _git(*words: str) -> str:
    root = Path(__file__).parent
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=root)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    import torch
    import triton

    on_gpu = torch.cuda.is_available()
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "card": torch.cuda.get_device_name() if on_gpu else f"CPU {_cpu_name()}",
        "cores": len(_cores()),
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def measure(fn: Callable[[], object], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Wall and CPU seconds of one call of ``fn``: medians, and the spread of the wall time."""
    for _ in range(warmup):
        fn()
    wall, cpu = [], []
    for _ in range(repeats):
        started, cpu_before = time.perf_counter(), _cpu_seconds()
        fn()
        wall.append(time.perf_counter() - started)
        cpu.append(_cpu_seconds() - cpu_before)
    ordered = sorted(wall)
    return {
        "median_s": statistics.median(wall),
        "p10_s": ordered[round(0.1 * (repeats - 1))],
        "p90_s": ordered[round(0.9 * (repeats - 1))],
        "cpu_s": statistics.median(cpu),
        "repeats": repeats,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_results(rows: list[dict[str, Any]]) -> Path:
    """Put the rows into this card's and commit's file, in place of equal measurements there."""
    where = environment()
    slug = "".join(c if c.isalnum() else "-" for c in where["card"].lower()).strip("-")
    path = RESULTS / f"{slug}-{where['torch'].partition('+')[0]}-{where['commit']}.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if _identity(row) not in {_identity(new) for new in rows}]
    content = {"schema": SCHEMA, **where, "rows": kept + rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _identity(row: dict[str, Any]) -> str:
    """What was measured, without the figures."""
    return json.dumps({k: v for k, v in row.items() if isinstance(v, str | bool)}, sort_keys=True)
