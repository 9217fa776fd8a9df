"""Comparison of learning with the reference implementation: curves of equal settings.

Each (precision, seed) is one real training run through `mien.core.training`; its losses are read
back from the TensorBoard events. The reference is a JSON file with both losses at every iteration
and ``windows`` of their means. A run passes where each of its window means, from the first compared
iteration on, lies within a share of the reference's.
"""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.config import merge
from ..core.console.reporter import Reporter
from . import harness

FIRST_COMPARED, LAST_COMPARED, ALLOWED_SHARE = 101, 650, 0.10
_FOLDER = "learning"
RESULTS = harness.RESULTS / _FOLDER


@dataclass(frozen=True)
class Reference:
    """The curve to be met."""

    name: str
    given: dict[str, Any]
    loss: dict[str, np.ndarray]
    windows: list[dict[str, Any]]


def read_reference(path: Path, input_a: Path, input_b: Path) -> Reference:
    """The reference curve, and the settings under which it was made."""
    data = json.loads(path.read_text())
    settings = data["settings"]
    given = {
        "model": {"trainer": data["model"]},
        "data": {
            "input_a": str(input_a),
            "input_b": str(input_b),
            "centering": settings["centering"],
            "coverage": settings["coverage"],
        },
        "optimizer": {
            "learning_rate": settings["learning_rate"],
            "epsilon_exponent": settings["epsilon_exponent"],
        },
        "loss": {
            "eye_multiplier": settings["eye_multiplier"],
            "mouth_multiplier": settings["mouth_multiplier"],
        },
        "train": {"batch_size": data["batch_size"], "iterations": LAST_COMPARED},
        "save": {"save_interval": LAST_COMPARED},
    }
    loss = {side: np.array(data["per_iteration"][f"loss_{side}"]) for side in "ab"}
    return Reference(path.stem, given, loss, data["windows"])


def run_once(
    reference: Reference,
    precision: str,
    seed: int,
    keep: Path | None = None,
    results: Path | None = None,
) -> Path:
    """Train once, unless the result is there already; the result's file.

    Args:
        reference: Curve to be met.
        precision: Number format of the run.
        seed: Seed of the run.
        keep: Folder that keeps the model; None: it is removed.
        results: Folder of all results; None: `harness.RESULTS`.
    """
    folder = RESULTS if results is None else results / _FOLDER
    result = folder / f"{reference.name}-{precision}-seed{seed}.json"
    if result.exists():
        return result
    from ..core.training.resolve import Overrides
    from ..core.training.unattended import train

    model_dir = keep or Path(tempfile.mkdtemp(prefix="mien-learning-"))
    given = merge(
        reference.given,
        {
            "precision": {"mode": precision},
            "train": {"seed": seed},
            "save": {"model_dir": str(model_dir)},
        },
    )
    started, cpu = time.monotonic(), time.process_time()
    code = train(Overrides(given), Reporter())
    if code:
        raise RuntimeError(f"training ended with exit code {code}")
    losses = read_losses(model_dir)
    facts = {
        "precision": precision,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **{f"loss_{side}": [round(x, 5) for x in losses[side]] for side in "ab"},
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"environment": harness.environment(), **facts}) + "\n")
    if keep is None:
        shutil.rmtree(model_dir)
    return result


def read_losses(model_dir: Path) -> dict[str, list[float]]:
    """Loss of each side at every iteration, from the events of all sessions."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[str, dict[int, float]] = {"a": {}, "b": {}}
    for folder in sorted(model_dir.glob("logs/session_*/train")):
        # 0: all of them; by default the reader keeps a sample.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for side, values in losses.items():
            for event in events.Scalars(f"batch_face_{side}"):
                values[event.step] = event.value
    return {side: [values[step] for step in sorted(values)] for side, values in losses.items()}


def compare(reference: Reference, result: Path) -> list[dict[str, Any]]:
    """One row a window and side: the means, their ratio and whether it is allowed."""
    ours = json.loads(result.read_text())
    rows = []
    for window in reference.windows:
        first, last = window["iterations"]
        if first < FIRST_COMPARED or last > LAST_COMPARED:
            continue
        for side in "ab":
            mean = float(np.mean(ours[f"loss_{side}"][first - 1 : last]))
            ratio = mean / window[f"loss_{side}_mean"]
            passes = abs(ratio - 1) <= ALLOWED_SHARE
            row = {"run": result.stem, "side": side, "first": first, "last": last}
            rows.append(row | {"mean": mean, "ratio": ratio, "passes": passes})
    return rows


def draw(reference: Reference, results: list[Path], picture: Path) -> None:
    """All curves over each other, smoothed over 25 iterations, with the allowed band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    colors = {"fp32": "tab:blue", "bf16": "tab:orange"}
    for axis, side in zip(axes, "ab", strict=True):
        x, y = _smooth(reference.loss[side])
        axis.fill_between(
            x, y * (1 - ALLOWED_SHARE), y * (1 + ALLOWED_SHARE), color="0.88", label="± 10 %"
        )
        axis.plot(x, y, color="black", linewidth=2, label="reference, fp32")
        for path in results:
            ours = json.loads(path.read_text())
            x, y = _smooth(np.array(ours[f"loss_{side}"]))
            label = f"mien, {ours['precision']}, seed {ours['seed']}"
            axis.plot(x, y, color=colors.get(ours["precision"]), linewidth=1, label=label)
        axis.set(title=f"loss {side.upper()}", xlabel="iteration", yscale="log", xlim=(0, 700))
        axis.axvline(FIRST_COMPARED, color="0.6", linestyle=":")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("SSIM + MSE, masked (mean of 25 iterations)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _smooth(values: np.ndarray, width: int = 25) -> tuple[np.ndarray, np.ndarray]:
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means
