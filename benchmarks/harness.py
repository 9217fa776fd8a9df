"""What every benchmark shares: where it ran, how it is timed, where its numbers go."""

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.system.durable_files import replace_file
from ..core.system.user_folders import state_folder

_PACKAGE = Path(__file__).parents[1]
IS_SOURCE_TREE = (_PACKAGE / "pyproject.toml").is_file()


def user_results() -> Path:
    """Folder of what users measure: in their folder for state, or below the working folder where
    they have none; MIEN_RESULTS names another."""
    named = os.environ.get("MIEN_RESULTS")
    if named:
        return Path(named)
    try:
        return state_folder() / "benchmarks"
    except ValueError:  # no home, as of a service
        return Path("benchmarks/results")


_IN_TREE = _PACKAGE / "benchmarks/results"
RESULTS = _IN_TREE if IS_SOURCE_TREE and "MIEN_RESULTS" not in os.environ else user_results()
"""Folder of what developers measure: beside this code; the user's own where mien was installed as a
wheel, or MIEN_RESULTS, as on a machine that is lent."""

SCHEMA = 2

IDENTITY = frozenset(
    "kind name model batch_size precision engine threads without kernel variant case of placement "
    "input_px output_px png_px size_px num_faces faces phase saves ranks distribution "
    "exchange".split()
)
"""Fields of a row that say what was measured; all others are figures."""


def _commit() -> tuple[str, bool]:
    """The commit of this code, and whether files differ from it; from MIEN_COMMIT without git."""
    unknown = os.environ.get("MIEN_COMMIT", "unknown"), False
    # Git would answer for a repository around it, such as the one that an environment lies in.
    if not (_PACKAGE / ".git").exists():
        return unknown
    words = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=_PACKAGE)
    except (OSError, subprocess.CalledProcessError):
        return unknown
    head, *rest = done.stdout.splitlines()
    return head.split()[-1][:7], any(not line.startswith("#") for line in rest)


def _cpu_name() -> str:
    """Name of this CPU, with its family and model: a host may give several kinds one name, and the
    peaks of one are not those of another."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    name = facts.get("model name", platform.machine())
    kinds = [
        f"{kind.split()[-1]} {facts[kind]}" for kind in ("cpu family", "model") if kind in facts
    ]
    return ", ".join([name, *kinds])


def device_name(device_type: str) -> str:
    """What results are filed under; a CPU is called one."""
    import torch

    return torch.cuda.get_device_name() if device_type == "cuda" else f"CPU {_cpu_name()}"


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    import torch
    import triton

    on_gpu = torch.cuda.is_available()
    commit, is_dirty = _commit()
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": is_dirty,
        "card": device_name("cuda" if on_gpu else "cpu"),
        "cores": len(_cores()),
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _cores() -> set[int]:
    # Those that this process may use: a container or taskset may leave it fewer than there are.
    return os.sched_getaffinity(0)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


@dataclass(frozen=True)
class Pace:
    """How often something is run before its time is believed."""

    windows: int
    window_s: float
    """A window lasts at least this long, and at least one call."""

    warmup: int
    """Calls before the first window."""


def pace(kind: str, device_type: str) -> Pace:
    """The pace for a ``kind`` ("step" or "kernel") of benchmark; a CPU's is for patience."""
    if device_type == "cuda":
        return Pace(5, 0.5, 20) if kind == "step" else Pace(7, 0.1, 20)
    return Pace(5, 0.0, 2) if kind == "step" else Pace(5, 0.05, 1)


def measure(
    fn: Callable[[], object], how: Pace, *, device_type: str = "cpu", capture: int = 0
) -> dict[str, float]:
    """Seconds of one call of ``fn``: the median over the windows and their spread.

    A GPU is timed by its own events, so ``fn`` need not wait for it; the CPU by the wall's clock.
    cpu_s are the CPU seconds of all threads of this process.

    Args:
        fn: What to time.
        how: How often.
        device_type: "cuda" or "cpu".
        capture: Put so many calls into a CUDA graph and time that, which leaves out the time that
            Python needs to launch them. ``fn`` must allow it; inputs that it takes in turn are
            taken in turn in the graph as well. 0: call it.
    """
    for _ in range(how.warmup):
        fn()
    if device_type == "cuda":
        run = _captured(fn, capture) if capture else fn
        return _windows(_cuda_timer(run), how, max(1, capture))
    return _windows(_wall_timer(fn), how, 1)


def _windows(time_calls: Callable[[int], tuple[float, float]], how: Pace, inside: int) -> dict:
    """Figures of one call; a timed one makes ``inside`` of them."""
    calls = 1
    for _ in range(2):  # one call alone seems slow; from several it is seen how many fill a window
        seconds, _ = time_calls(calls)
        calls = max(1, math.ceil(calls * how.window_s / max(seconds, 1e-9)))
        if calls == 1:
            break
    timed = [time_calls(calls) for _ in range(how.windows)]
    wall = sorted(seconds / (calls * inside) for seconds, _ in timed)
    return {
        "median_s": statistics.median(wall),
        "p10_s": wall[round(0.1 * (how.windows - 1))],
        "p90_s": wall[round(0.9 * (how.windows - 1))],
        "cpu_s": statistics.median(cpu / (calls * inside) for _, cpu in timed),
        "windows": how.windows,
    }


def _wall_timer(fn: Callable[[], object]) -> Callable[[int], tuple[float, float]]:
    def time_calls(count: int) -> tuple[float, float]:
        started, cpu_before = time.perf_counter(), _cpu_seconds()
        for _ in range(count):
            fn()
        return time.perf_counter() - started, _cpu_seconds() - cpu_before

    return time_calls


def _cuda_timer(fn: Callable[[], object]) -> Callable[[int], tuple[float, float]]:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_calls(count: int) -> tuple[float, float]:
        # What was queued before is not to be timed.
        torch.cuda.synchronize()
        cpu_before = _cpu_seconds()
        begin.record()
        for _ in range(count):
            fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, _cpu_seconds() - cpu_before

    return time_calls


def _captured(fn: Callable[[], object], calls: int) -> Callable[[], None]:
    """A replay of so many calls."""
    import torch

    from ..kernels.tensor_table import drop_capture, finish_capture

    graph, before, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        # What kernels and libraries keep by stream each call would else make anew in the graph.
        fn()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                fn()
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own in place
        torch.cuda.synchronize()
        drop_capture()
        raise
    finish_capture()
    return graph.replay


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def spread_ms(figures: dict[str, float]) -> dict[str, float]:
    """The figures of `measure` as the fields of a row."""
    return {f"{name}_ms": rounded(1e3 * figures[f"{name}_s"]) for name in ("median", "p10", "p90")}


def rounded(value: float, digits: int = 4) -> float:
    """Round to so many significant digits."""
    return float(f"{value:.{digits}g}")


def card_state() -> dict[str, float] | None:
    """Clocks, temperature and power of the GPU at this moment; None where nothing tells them."""
    fields = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "temperature_c": "temperature.gpu",
        "power_w": "power.draw",
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    if done.returncode or not done.stdout.strip():
        return None
    values = done.stdout.splitlines()[0].split(",")
    known = zip(fields, values, strict=True)
    return {name: float(value) for name, value in known if value.strip()[:1].isdigit()}


def results_path(where: dict[str, Any], folder: Path | None = None) -> Path:
    """The file of a card and commit, as `environment` tells them; folder: None: `RESULTS`."""
    slug = "".join(c if c.isalnum() else "-" for c in where["card"].lower()).strip("-")
    return (folder or RESULTS) / f"{slug}-{where['torch'].partition('+')[0]}-{where['commit']}.json"


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: It cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    keys = {"card", "commit", "rows", "time_utc"}
    if not isinstance(content, dict) or not keys <= content.keys():
        raise ValueError(f"{path} is not a results file of `mien bench`: it lacks card or rows")
    return content


def all_results(*folders: Path | None, skips_others: bool = False) -> list[dict[str, Any]]:
    """Every results file, in the order of the times at which they were begun.

    folders: where to look; None: in `RESULTS`, as without any. skips_others: leave out what is no
    results file, where the folder is anybody's.

    Raises ValueError, unless skips_others, where a file is none.
    """
    # A set: two of them may be one folder.
    paths = {path for folder in folders or (None,) for path in (folder or RESULTS).glob("*.json")}
    found = []
    for path in paths:
        try:
            found.append(read_results(path))
        except ValueError:
            if not skips_others:
                raise
    return sorted(found, key=lambda content: str(content["time_utc"]))


def known_ceilings(folder: Path | None = None) -> dict[str, Any] | None:
    """The newest ceilings of this card and version of PyTorch; None where there are none.

    They are looked for wherever results are written: in the folder that was named, in the user's
    own and in `RESULTS`.
    """
    where = environment()
    for content in reversed(all_results(folder, user_results(), RESULTS, skips_others=True)):
        same = all(content.get(key) == where[key] for key in ("card", "cores", "torch"))
        if same and content.get("ceilings"):
            return content["ceilings"]
    return None


def write_results(
    rows: list[dict[str, Any]],
    *,
    ceilings: dict[str, Any] | None = None,
    conditions: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> Path:
    """Put the rows into this card's and commit's file, in place of equal measurements there.

    ceilings: what the card can do; conditions: `card_state` before and after, by benchmark. Those
    of the file stay where none are given. folder: where the file is; None: in `RESULTS`.

    Raises:
        ValueError: The disk refuses.
    """
    where = environment()
    path = results_path(where, folder)
    old = read_results(path) if path.exists() else {"rows": []}
    new = {identity(row) for row in rows}
    content = {
        "schema": SCHEMA,
        **where,
        "ceilings": ceilings or old.get("ceilings"),
        "conditions": {**old.get("conditions", {}), **(conditions or {})},
        "rows": [row for row in old["rows"] if identity(row) not in new] + rows,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; make its folder writable, or add --no-save"
        ) from error
    return path


def identity(row: dict[str, Any]) -> str:
    """What was measured, without the figures."""
    return json.dumps({k: row[k] for k in sorted(IDENTITY & row.keys())}, sort_keys=True)
