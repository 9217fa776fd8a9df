"""What this machine does: EG/s of the main models at three batch sizes, in one table.

A cell that would take too long is left out; what the others cost says which. The best batch size is
the smallest that reaches nearly all of the model's best speed: a larger one trains no faster, and
needs more memory.

Run: ``mien bench``.
"""

import gc
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..core.estimate.flops import work_of
from ..core.estimate.roofline import ceiling
from .bench_step import mien_step
from .ceilings import card_of
from .harness import Pace, measure, rounded, spread_ms
from .variants import variant

if TYPE_CHECKING:
    from rich.table import Table

BATCH_SIZES = (8, 16, 32)
CPU_MODELS = ("lightweight", "original", "dfaker")
GPU_MODELS = ("lightweight", "original", "dfaker", "dfl-h128", "villain", "dfaker-256")

_PACE = {"cpu": Pace(3, 0.0, 1), "cuda": Pace(3, 0.5, 20)}
_CALLS = 4  # on the CPU: a warm-up and three windows of one call each
_BUDGET_S = 110.0
_LONGEST_S = {"cpu": 14.0, "cuda": 60.0}
"""Seconds that all cells may take, and one of them. Chosen on the CPU, to stay below three minutes
on two loaded cores; unmeasured on a GPU."""

_NEARLY_ALL = 0.95

_LIMITS = {
    "products": "arithmetic",
    "pointwise": "memory bandwidth",
    "update": "optimizer",
    "gaps": "launches",
}


def rows(ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a model, precision and batch size for which there is time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, begun = device.type == "cuda", time.monotonic()
    for name in GPU_MODELS if on_gpu else CPU_MODELS:
        for mode in ("bf16",) if on_gpu else ("fp32", "bf16"):
            if time.monotonic() - begun < _BUDGET_S:
                yield from _of_model(name, mode, device, ceilings)


def _of_model(
    name: str, mode: str, device: torch.device, ceilings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    expected_s = 0.0
    for batch_size in BATCH_SIZES:
        row: dict[str, Any] = {
            "kind": "machine",
            "model": name,
            "batch_size": batch_size,
            "precision": mode,
            "engine": "mien-graph" if device.type == "cuda" else "mien-eager",
        }
        if expected_s > _LONGEST_S[device.type]:
            return
        try:
            step_s = _figures(row, mode, device, ceilings)
        except torch.OutOfMemoryError:
            yield row | {"error": "out of memory"}
            return
        yield row
        expected_s = 2 * _CALLS * step_s  # the next batch is twice as large


def _figures(
    row: dict[str, Any], mode: str, device: torch.device, ceilings: dict[str, Any]
) -> float:
    """Fill in the figures of a row; the seconds of a step."""
    on_gpu = device.type == "cuda"
    name, batch_size = row["model"], row["batch_size"]
    gc.collect()  # a step refers to itself: the one before would leave less room
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    # By libraries, of the steps before.
    kept_bytes = torch.cuda.memory_allocated(device) if on_gpu else 0
    step = mien_step(name, batch_size, mode, device, "graph" if on_gpu else "eager")
    timed = measure(step, _PACE[device.type], device_type=device.type)
    eg_per_s = 2 * batch_size / timed["median_s"]
    # The roofline is drawn for bf16; what binds is the same in fp32.
    bound = ceiling(work_of(variant(name).meta_model(), batch_size), card_of(ceilings))
    row |= {
        "threads": torch.get_num_threads(),
        "eg_per_s": rounded(eg_per_s),
        **spread_ms(timed),
        "binds": bound.binds,
        "share_of_ceiling": rounded(eg_per_s / bound.eg_per_s) if mode == "bf16" else None,
        "peak_mib": (torch.cuda.max_memory_allocated(device) - kept_bytes) / 2**20
        if on_gpu
        else None,
    }
    return timed["median_s"]


def table(measured: list[dict[str, Any]], where: dict[str, Any]) -> "Table":
    """The rows as a table of 80 columns at most."""
    from rich.table import Table

    drawn = Table(
        title=f"Faces trained a second (EG/s, A + B) on {where['card']}",
        caption="best: the smallest batch that reaches 95 % of the highest speed; "
        "-: not measured, it would take too long",
    )
    drawn.add_column("model", no_wrap=True)
    drawn.add_column("in")
    for batch_size in BATCH_SIZES:
        drawn.add_column(f"batch {batch_size}", justify="right")
    drawn.add_column("best", justify="right")
    drawn.add_column("limited by")
    for name, mode in dict.fromkeys((row["model"], row["precision"]) for row in measured):
        own = [row for row in measured if (row["model"], row["precision"]) == (name, mode)]
        by_size = {row["batch_size"]: _cell(row) for row in own}
        cells = [by_size.get(batch_size, "-") for batch_size in BATCH_SIZES]
        drawn.add_row(name, mode, *cells, *_verdict(own))
    return drawn


def _cell(row: dict[str, Any]) -> str:
    return f"{row['eg_per_s']:,.4g}" if "eg_per_s" in row else row["error"]


def _verdict(own: list[dict[str, Any]]) -> tuple[str, str]:
    """The best batch size of a model, and what limits it there."""
    speeds = {row["batch_size"]: row for row in own if "eg_per_s" in row}
    if not speeds:
        return "-", "memory"
    most = max(row["eg_per_s"] for row in speeds.values())
    best = min(size for size, row in speeds.items() if row["eg_per_s"] >= _NEARLY_ALL * most)
    return str(best), _LIMITS[speeds[best]["binds"]]
