"""mien preview: what a save makes of faces, and how the swap has changed from save to save."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.system.paths import expanded
from .lines import complain, tell, tell_json
from .weights_flag import add_weights

if TYPE_CHECKING:
    from ..core.preview.render import PreviewRequest

_MOST_FACES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Draw what a save of a model makes of some faces, compare two saves, or show many in a "
        "strip. The model may be in training meanwhile; its folder is only read."
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="the model's folder")
    for side in "ab":
        parser.add_argument(
            f"-{side.upper()}",
            f"--input-{side}",
            type=Path,
            metavar="FOLDER",
            help=f"faces to show as side {side.upper()}; without -A and -B: those trained on",
        )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PICTURE.png", help="what to write"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--at",
        metavar="ITERATION",
        help="which save: its iteration (a snapshot's too), backup, or a generation's name "
        "(default: the newest)",
    )
    what.add_argument(
        "--compare",
        type=int,
        nargs=2,
        metavar=("N", "M"),
        help="swaps of two saves side by side, by their iterations",
    )
    what.add_argument(
        "--strip", action="store_true", help="swaps of up to 10 of the previews that were kept"
    )
    _add_drawing(parser)
    add_weights(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--force", action="store_true", help="replace a picture that is there")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drawing", "what is not given is as the model's settings say")
    group.add_argument(
        "-n", "--faces", type=int, metavar="N", help=f"faces of each side, 1 to {_MOST_FACES}"
    )
    group.add_argument(
        "--style", choices=("sheet", "faceswap"), help="sheet to judge by, or faceswap's layout"
    )
    group.add_argument("--enlarge", choices=("lanczos", "nearest"), help="how small faces grow")
    group.add_argument(
        "--mask", choices=("outline", "tint", "off"), help="how the mask is shown in a sheet"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the picture."""
    if args.faces is not None and not 1 <= args.faces <= _MOST_FACES:
        raise ValueError(f"--faces must be from 1 to {_MOST_FACES}, got {args.faces}")
    if args.strip and (args.input_a or args.input_b):
        raise ValueError("--strip shows previews that were kept; leave -A and -B out")
    if (args.strip or args.compare) and (args.style or args.mask):
        raise ValueError("--style and --mask are for the preview of one save; leave them out")
    if args.strip and args.weights != "auto":
        raise ValueError(
            "--strip shows previews that were kept, by the weights that drew them; leave --weights "
            "out"
        )
    # After the flags are checked: to load PyTorch takes more than a second.
    from ..core.checkpoint.inference import refuse_target, write_export
    from ..core.preview import render
    from ..core.preview.files import encoded_png
    from ..core.preview.image import weights_in_words

    output = expanded(args.output)
    request = _request(args)
    refuse_target(request.model_dir, output, ".png", force=args.force)
    if args.strip:
        drawn = render.draw_strip(request)
    elif args.compare:
        drawn = render.draw_comparison(request, args.compare)
    else:
        drawn = render.draw_save(request, args.at)
    write_export(output, encoded_png(drawn.image, drawn.text), force=args.force)
    if args.json:
        height_px, width_px = drawn.image.shape[:2]
        facts = {"output": str(output), "source": drawn.source, "iterations": drawn.iterations}
        facts |= {"sides": drawn.sides, "width_px": width_px, "height_px": height_px}
        facts["weights"] = [weights or None for weights in drawn.weights]
        tell_json(facts, indent=None)
    else:
        words = weights_in_words(drawn.weights)
        iterations = ", ".join(f"{iteration:,}" for iteration in drawn.iterations)
        sides = " and ".join(drawn.sides).upper().replace("AND", "and")
        by = f", by the {words}" if words else ""
        tell(f"{output}: {sides} at iteration {iterations}, of {drawn.source}{by}")
    return 0


def _request(args: argparse.Namespace) -> "PreviewRequest":
    """What is asked for, with its device."""
    from ..core.preview.render import PreviewRequest
    from ..core.training.devices import choose_device

    def warn(line: str) -> None:
        complain("preview", line)

    given = {"a": args.input_a, "b": args.input_b}
    return PreviewRequest(
        model_dir=expanded(args.model),
        folders={side: expanded(path) for side, path in given.items() if path},
        num_faces=args.faces,
        style=args.style,
        enlarge=args.enlarge,
        mask=args.mask,
        weights=args.weights,
        device=choose_device(args.device, warn),
        warn=warn,
    )
