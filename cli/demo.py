"""mien demo: a drawn film, a small model trained on drawn faces, and the film with B's face."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from . import swap
from .lines import tell

FACES, SIZE_PX = 200, 128
FRAMES = 100
"""Frames of the film: four seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="where it works (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=400, help="length of the training (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print events, one JSON object a line")


def settings(folder: Path, iterations: int) -> dict[str, Any]:
    """A model small enough to learn a drawn face on two CPU cores within minutes."""
    return {
        "model": {"trainer": "lightweight", "options": {"width": 32}},
        "data": {"input_a": str(folder / "faces_a"), "input_b": str(folder / "faces_b")},
        "optimizer": {"learning_rate": 3e-4},
        "train": {"batch_size": 16, "iterations": iterations},
        "save": {"model_dir": str(folder / "model"), "save_interval": 100},
        "preview": {"preview_images": 6},
    }


def run(args: argparse.Namespace) -> int:
    """Draw what is missing, train, swap the film, and name the pictures."""
    if args.iterations < 1:
        raise ValueError(f"--iterations must be at least 1, got {args.iterations}")
    from ..core.console.reporter import Reporter
    from ..core.console.requests import Requests
    from ..core.faces.synthetic import draw_folder
    from ..core.faces.synthetic.film import draw_film
    from ..core.training.resolve import Overrides
    from ..core.training.unattended import train

    folder = args.folder
    for side in ("a", "b"):
        draw_folder(folder / f"faces_{side}", identity=side, count=FACES, size_px=SIZE_PX)
    draw_film(folder / "film", folder / "film_faces", identity="a", count=FRAMES)
    overrides = Overrides(settings(folder, args.iterations))
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
    """Put B's face into the film, as `mien swap` does; its exit code."""
    parser = argparse.ArgumentParser()
    swap.add_arguments(parser)
    words = [str(folder / "model"), "--faces", str(folder / "film_faces")]
    words += ["--frames", str(folder / "film"), "-o", str(folder / _output())]
    words += ["--sheet", str(folder / "before_after.png"), "--force", *["--json"] * as_json]
    return swap.run(parser.parse_args(words))
