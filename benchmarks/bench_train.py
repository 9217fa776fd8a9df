"""The whole loop as a user runs it: data, step, logging, previews and saves, on drawn faces.

EG/s is faces of both sides over all seconds from the first status line to the end of the last save;
its spread is that of equal parts of the run. Saves come as by default, at most once a minute, and
on a GPU once more every 250 iterations, which is several times a second.

Run: ``mien bench train``.
"""

import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.console.reporter import Reporter
from ..core.faces.synthetic import draw_folder
from ..core.training.resolve import Overrides
from ..core.training.unattended import train
from .bench_step import CASES, GPU_CASES
from .harness import rounded
from .variants import variant

NUM_FACES, PNG_PX = 100, 256
WINDOWS = 5
"""Parts of a run whose speeds give the spread. Chosen, unmeasured."""


def rows(modes: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[dict[str, Any]]:
    """One row a model, precision and way to save."""
    on_gpu = torch.cuda.is_available()
    saves: dict[str, dict[str, Any]] = {"by default": {}}
    if on_gpu:
        saves["every 250 iterations"] = {"save_interval": 250}
    with tempfile.TemporaryDirectory(prefix="mien-bench-") as scratch:
        folders = {side: Path(scratch) / side for side in "ab"}
        for side, folder in folders.items():
            draw_folder(folder, identity=side, count=NUM_FACES, size_px=PNG_PX)
        cases = itertools.product(GPU_CASES if on_gpu else CASES, modes, saves.items())
        for number, ((name, batch_size), mode, (words, how)) in enumerate(cases):
            given = {
                "model": {"trainer": variant(name).trainer, "options": variant(name).options},
                "data": {f"input_{side}": str(folder) for side, folder in folders.items()},
                "precision": {"mode": mode},
                "train": {"batch_size": batch_size, "iterations": _iterations(mode, batch_size)},
                "save": {"model_dir": str(Path(scratch) / str(number)), **how},
            }
            yield _row(given, words)


def _iterations(mode: str, batch_size: int) -> int:
    """Iterations with which a run takes some 15 seconds on a fast GPU; a few on the CPU."""
    if not torch.cuda.is_available():
        return 8
    return (1_000 if mode == "fp32" else 5_000) * 16 // batch_size


def _row(given: dict[str, Any], saves: str) -> dict[str, Any]:
    printed = io.StringIO()
    code = train(Overrides(given), Reporter(printed, as_json=True))
    if code:
        raise RuntimeError(f"training ended with exit code {code}")
    events = [json.loads(line) for line in printed.getvalue().splitlines()]
    start = next(event for event in events if event["event"] == "start")
    steps = [event for event in events if event["event"] == "step"]
    faces = 2 * given["train"]["batch_size"]
    trained = steps[-1]["iteration"] - steps[0]["iteration"]
    seconds = events[-1]["time"] - steps[0]["time"]
    return {
        "kind": "train",
        "model": given["model"]["trainer"],
        "batch_size": given["train"]["batch_size"],
        "precision": given["precision"]["mode"],
        "engine": start["engine"],
        "warnings": sum(event["event"] == "warning" for event in events),
        "saves": saves,
        "iterations": trained,
        "eg_per_s": rounded(faces * trained / seconds),
        **_spread(steps, faces),
        "data_wait": round(max(step["data_wait"] for step in steps[1:]), 4),
        "peak_mib": steps[-1]["memory_mib"],
    }


def _spread(steps: list[dict[str, Any]], faces: int) -> dict[str, float]:
    """EG/s of the slowest and the fastest part of a run; nothing where it is too short."""
    if len(steps) <= WINDOWS:
        return {}
    marks = [steps[round(part * (len(steps) - 1) / WINDOWS)] for part in range(WINDOWS + 1)]
    rates = [
        faces * (after["iteration"] - before["iteration"]) / (after["time"] - before["time"])
        for before, after in itertools.pairwise(marks)
    ]
    return {"eg_per_s_low": rounded(min(rates)), "eg_per_s_high": rounded(max(rates))}
