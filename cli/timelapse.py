"""mien timelapse: a film of the pictures that a training with a time-lapse has left."""

import argparse
import dataclasses
from pathlib import Path

from ..core.system.paths import expanded
from ..core.system.printable import plural
from .lines import complain, tell, tell_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folder", type=Path, metavar="MODEL|FOLDER", help="a model's folder, or one of the pictures"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILM.MP4", help="the film to write"
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="pictures in a second (default: chosen so that the film lasts 5 to 20 s)",
    )
    parser.add_argument(
        "--last-seconds",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how much longer the last picture stays (default: %(default)g)",
    )
    parser.add_argument("--force", action="store_true", help="replace a film that is there")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the film."""
    if args.fps is not None and not 0 < args.fps <= 240:
        raise ValueError(f"--fps must be above 0 and at most 240, got {args.fps:g}")
    if not 0 <= args.last_seconds <= 3600:
        raise ValueError(f"--last-seconds must be from 0 to 3600, got {args.last_seconds:g}")
    folder, output = expanded(args.folder), expanded(args.output)
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"--output must end in .mp4, got {output}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.exists() and not args.force:
        raise ValueError(f"{output} is there already; choose another name, or add --force")
    from ..core.preview.timelapse_video import find_pictures, make_film

    film = make_film(
        find_pictures(folder),
        output,
        fps=args.fps,
        last_seconds=args.last_seconds,
        force=args.force,
    )
    for path in film.unreadable:
        complain("timelapse", f"{path} cannot be read and was left out")
    if film.num_passed_over:
        total = film.num_pictures + len(film.unreadable) + film.num_passed_over
        complain(
            "timelapse", f"{total} pictures are too many for 20 s; some are shown, evenly spread"
        )
    if args.json:
        tell_json(dataclasses.asdict(film), indent=None)
    else:
        tell(
            f"{film.path}: {film.num_pictures} {plural(film.num_pictures, 'picture')} of "
            f"{film.width_px} x {film.height_px} px, {film.fps:g} in a second, {film.seconds:.1f} s"
        )
    return 0
