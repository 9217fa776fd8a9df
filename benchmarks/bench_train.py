"""The whole loop as a user runs it: data, step, logging, previews and saves, on drawn faces.

EG/s is faces of both sides over all seconds from the first iteration's end to the last save's.

Run: ``mien bench train``.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.faces.synthetic import draw_folder
from ..core.run.log import Reporter
from ..core.train.loop import train
from .bench_step import CASES

NUM_FACES, PNG_PX = 100, 256


def rows(modes: tuple[str, ...] = ("fp32", "bf16")) -> Iterator[dict[str, Any]]:
    """One row a model and precision."""
    iterations = 4000 if torch.cuda.is_available() else 8
    with tempfile.TemporaryDirectory(prefix="mien-bench-") as scratch:
        folders = {side: Path(scratch) / side for side in "ab"}
        for side, folder in folders.items():
            draw_folder(folder, identity=side, count=NUM_FACES, size_px=PNG_PX)
        for name, batch_size in CASES:
            for mode in modes:
                given = {
                    "model": {"trainer": name},
                    "data": {f"input_{side}": str(folder) for side, folder in folders.items()},
                    "precision": {"mode": mode},
                    "train": {"batch_size": batch_size, "iterations": iterations},
                    "save": {"model_dir": str(Path(scratch) / f"{name}-{mode}")},
                }
                yield _row(given)


def _row(given: dict[str, Any]) -> dict[str, Any]:
    printed = io.StringIO()
    code = train(given, Reporter(printed, as_json=True))
    if code:
        raise RuntimeError(f"training ended with exit code {code}")
    events = [json.loads(line) for line in printed.getvalue().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    batch_size = given["train"]["batch_size"]
    trained = steps[-1]["iteration"] - steps[0]["iteration"]
    seconds = events[-1]["time"] - steps[0]["time"]
    return {
        "kind": "train",
        "model": given["model"]["trainer"],
        "batch_size": batch_size,
        "precision": given["precision"]["mode"],
        "engine": "eager",
        "iterations": trained,
        "eg_per_s": round(2 * batch_size * trained / seconds, 2),
        "data_wait": round(max(step["data_wait"] for step in steps[1:]), 4),
        "peak_mib": steps[-1]["memory_mib"],
    }
