"""mien demo: a drawn film, a small model trained on drawn faces, and the film with B's face."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from . import swap
from .lines import tell

PEOPLE = {"a": "b", "b": "a"}
"""Drawn person of each side: a beard shows in the film whose face it is, and a face narrower than
B's takes no more of B's picture than was trained."""
FACES, SIZE_PX = 200, 128
FRAMES = 100
"""Frames of the film: four seconds."""
BF16_ITERATIONS, ITERATIONS = 2400, 1500
"""Length of the training where the CPU computes in bf16, and where it does not: some four minutes
of two cores, chosen on the CPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="where it works (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        help=f"length of the training (default: {BF16_ITERATIONS} where the CPU has bf16, else "
        f"{ITERATIONS})",
    )
    parser.add_argument("--json", action="store_true", help="print events, one JSON object a line")


def settings(folder: Path, iterations: int, precision: str) -> dict[str, Any]:
    """A model small enough to learn a drawn face on two CPU cores within minutes.

    Chosen on the CPU, by eye. What crop and augmentation leave out would tell A from B, and a swap
    needs an encoder that does not.
    """
    return {
        "model": {"trainer": "original", "options": {"width": 32}},
        "data": {
            "input_a": str(folder / "faces_a"),
            "input_b": str(folder / "faces_b"),
            # The face from brows to chin, without hair and background.
            "coverage": 75.0,
            "vertical_offset": -16,
        },
        # All faces are aligned alike, and the film has one light.
        "augment": {"color": False, "zoom_amount": 3, "rotation_range": 4, "shift_range": 2},
        "optimizer": {
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "schedule_iterations": iterations,
        },
        "precision": {"mode": precision},
        "train": {"batch_size": 8, "until": iterations, "ema": 0.99},
        "save": {"model_dir": str(folder / "model"), "save_interval": 400},
        "preview": {"preview_images": 6},
    }


def run(args: argparse.Namespace) -> int:
    """Draw what is missing, train, swap the film, and name the pictures."""
    import torch

    from ..core.config.settings import setting_at
    from ..core.console.reporter import Reporter
    from ..core.console.requests import Requests
    from ..core.faces.synthetic import draw_folder
    from ..core.faces.synthetic.film import draw_film
    from ..core.precision import cpu_has_bf16
    from ..core.training.resolve import Overrides
    from ..core.training.unattended import train

    if args.iterations is not None:
        # By its name here, and before anything is drawn: of the two settings the stricter rule.
        setting_at(("optimizer", "schedule_iterations")).take(args.iterations, "--iterations")
    folder = args.folder
    iterations = args.iterations or (BF16_ITERATIONS if cpu_has_bf16() else ITERATIONS)
    # A GPU chooses for itself; a CPU computes in fp32 where it is not told.
    precision = "bf16" if cpu_has_bf16() and not torch.cuda.is_available() else "auto"
    if not args.json and not (folder / "film").exists():
        tell(f"Drawing two people and a film into {folder}")
    for side, person in PEOPLE.items():
        draw_folder(folder / f"faces_{side}", identity=person, count=FACES, size_px=SIZE_PX)
    draw_film(folder / "film", folder / "film_faces", identity=PEOPLE["a"], count=FRAMES)
    overrides = Overrides(settings(folder, iterations, precision))
    with Requests() as requests:
        outcome: int = train(overrides, Reporter(as_json=args.json), requests=requests)
    if outcome == 0:
        outcome = _swap(folder, as_json=args.json)
    if outcome == 0 and not args.json:
        shown = {
            "the film, as it was": folder / "film",
            "and swapped": folder / _output(),
            "some of its faces, before and after": folder / "before_after.png",
            "what the model makes of A and B": folder / "model" / "preview.png",
        }
        width = max(map(len, shown))
        tell("", *(f"{what:<{width}}  {os.path.abspath(path)}" for what, path in shown.items()))
    return outcome


def _output() -> str:
    """Name of the swapped film: a video where the library for that is installed, else a folder."""
    return "swapped.mp4" if importlib.util.find_spec("av") else "swapped"


def _swap(folder: Path, *, as_json: bool) -> int:
    """Put B's face into the film, as `mien swap` does, in its own colours; the exit code."""
    parser = argparse.ArgumentParser()
    swap.add_arguments(parser)
    words = [str(folder / "model"), "--faces", str(folder / "film_faces")]
    words += ["--frames", str(folder / "film"), "-o", str(folder / _output())]
    words += ["--color", "off", "--sheet", str(folder / "before_after.png")]
    # A second demo in the same folder replaces the film of the first.
    words += ["--force", *["--json"] * as_json]
    return swap.run(parser.parse_args(words))
