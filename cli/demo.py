"""mien demo: two drawn face sets, a small model trained on them, and the preview it leaves."""

import argparse
import os
from pathlib import Path
from typing import Any

from .lines import tell

FACES, SIZE_PX = 200, 128


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
    """Draw what is missing, train, and name the picture."""
    if args.iterations < 1:
        raise ValueError(f"--iterations must be at least 1, got {args.iterations}")
    from ..core.console.reporter import Reporter
    from ..core.console.requests import Requests
    from ..core.faces.synthetic import draw_folder
    from ..core.training.resolve import Overrides
    from ..core.training.unattended import train

    for side in ("a", "b"):
        draw_folder(args.folder / f"faces_{side}", identity=side, count=FACES, size_px=SIZE_PX)
    overrides = Overrides(settings(args.folder, args.iterations))
    with Requests() as requests:
        outcome = train(overrides, Reporter(as_json=args.json), requests=requests)
    if outcome == 0 and not args.json:
        picture = os.path.abspath(args.folder / "model" / "preview.png")
        columns = "Columns: A, A by A, A by B (the swap); B likewise."
        tell("", f"Look at the swap: {picture}", columns)
    return outcome
