"""mien model export, mien model import: models as files of other programs."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.system.paths import expanded
from ..core.system.printable import plural
from .lines import tell, tell_json, tell_stage
from .weights_flag import add_weights

_MIB = 2**20

Facts = dict[str, Any]
Report = Callable[[str], None]
Exporter = Callable[[argparse.Namespace, Path, Report], tuple[Facts, list[str]]]
"""Function of the arguments, the output, and what takes the name of each stage; facts as plain
values, and lines for people."""


def add_verbs(verbs: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Declare both verbs and their options, among those of `mien model`."""
    text = "Write the model for another program; compared with the model before it is kept."
    export = verbs.add_parser("export", help=text, description=text)
    export.add_argument("model", metavar="MODEL", type=Path, help="model folder")
    export.add_argument("--to", choices=EXPORTERS, required=True, help="what to write")
    export.add_argument(
        "-o", "--output", metavar="PATH", type=Path, required=True, help="file or folder to write"
    )
    export.add_argument(
        "--generation", metavar="NAME", help="a save, or backup (default: the newest)"
    )
    add_weights(export)
    export.add_argument(
        "--target",
        choices=("facefusion", "deepfacelive", "visomaster", "dfl"),
        help="program that a .dfm is for (default: facefusion)",
    )
    export.add_argument(
        "--mask",
        choices=("learned", "mean", "ones"),
        help="mask of a .dfm (default: learned where the model has one, else mean)",
    )
    export.add_argument("--force", action="store_true", help="replace what is there")
    text = "Make a model folder of a model of faceswap, to train on."
    importing = verbs.add_parser("import", help=text, description=text)
    importing.add_argument(
        "source", metavar="PATH", type=Path, help="folder of faceswap, or its .keras or .h5 file"
    )
    importing.add_argument(
        "-m", "--model-dir", dest="model", metavar="FOLDER", type=Path, required=True,
        help="model folder to make",
    )  # fmt: skip
    return export, importing


def run_export(args: argparse.Namespace) -> int:
    """Write a model for another program."""
    for flag in ("target", "mask"):
        if getattr(args, flag) is not None and args.to != "dfm":
            raise ValueError(f"--{flag} is of a .dfm, not of --to {args.to}; leave it out")
    with _stages(as_json=args.json) as report:
        facts, lines = EXPORTERS[args.to](args, expanded(args.output), report)
    if args.json:
        tell_json(facts)
    else:
        tell(*lines)
    return 0


@contextmanager
def _stages(*, as_json: bool) -> Iterator[Report]:
    """What takes the stages: a line that changes on a terminal, elsewhere a line for each.

    as_json: the output is for the facts alone.
    """
    if not sys.stderr.isatty():
        yield (lambda stage: None) if as_json else tell_stage
        return
    from rich.console import Console

    # On the standard error: the output may be read by a program.
    with Console(stderr=True).status("") as status:
        yield status.update


def run_import(args: argparse.Namespace) -> int:
    """Make a model folder of another program's model."""
    from ..core.exchange.keras_import import import_keras

    done = import_keras(expanded(args.source), args.model)
    if args.json:
        plain = {"source": str(done.source), "path": str(done.path)}
        tell_json(asdict(done) | plain)
        return 0
    tell(
        f"made {done.path} of {done.source}: {done.trainer}, {done.iterations:,} "
        f"{plural(done.iterations, 'iteration')} in {done.num_sessions} "
        f"{plural(done.num_sessions, 'session')}, learning rate {done.learning_rate:g}",
        *done.left_out,
        f"train on: `mien train -A FACES_A -B FACES_B -m {done.path}`",
    )
    return 0


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """What every export is told of the save and of an older target."""
    return {"generation": args.generation, "weights": args.weights, "force": args.force}


def _keras(args: argparse.Namespace, target: Path, report: Report) -> tuple[Facts, list[str]]:
    from ..core.exchange.keras_export import export_keras

    done = export_keras(args.model, target, **_chosen(args), report=report)
    faces = f"{done.num_faces} of its own faces" if done.num_faces else "no faces of its own"
    lines = [
        f"wrote {done.path}: {', '.join(done.files)}, {done.size_bytes / _MIB:,.1f} MiB",
        f"read back, it differs by {done.difference:.1e} at most from the model, on random "
        f"pictures and {faces}",
    ]
    return asdict(done) | {"path": str(done.path), "files": list(done.files)}, lines


def _safetensors(args: argparse.Namespace, target: Path, report: Report) -> tuple[Facts, list[str]]:
    from ..core.exchange.tensors_export import export_tensors

    done = export_tensors(args.model, target, **_chosen(args), report=report)
    size = f"{done.size_bytes / _MIB:,.1f} MiB"
    lines = [
        f"wrote {done.path}: {done.metadata['trainer']}, both sides, {size}",
        f"read back, it differs by {done.difference:.1e} from the model, on 2 random pictures and "
        f"{done.num_faces} of its own faces",
    ]
    return asdict(done) | {"path": str(done.path)}, lines


def _onnx(args: argparse.Namespace, target: Path, report: Report) -> tuple[Facts, list[str]]:
    from ..core.exchange.onnx_export import export_onnx

    done = export_onnx(args.model, target, **_chosen(args), report=report)
    return _of_onnx(done)


def _dfm(args: argparse.Namespace, target: Path, report: Report) -> tuple[Facts, list[str]]:
    from ..core.exchange.onnx_export import export_dfm

    done = export_dfm(
        args.model,
        target,
        program=args.target or "facefusion",
        mask=args.mask,
        **_chosen(args),
        report=report,
    )
    return _of_onnx(done)


def _of_onnx(done: Any) -> tuple[Facts, list[str]]:
    size = f"{done.size_bytes / _MIB:,.1f} MiB"
    lines = [
        f"wrote {done.path}: pictures of {done.input_px} px, {size}",
        f"run by {done.runtime}, it differs by {done.difference:.1e} at most from the model, on "
        f"{done.num_pictures - done.num_faces} random pictures and {done.num_faces} of its own "
        "faces",
    ]
    if done.target:
        lines.insert(1, f"for {done.target}, masks: {done.mask}")
    if done.square:
        left, top, edge = done.square
        lines.append(f"the model's own square is {edge} px from ({left}, {top}) in the program's")
    return asdict(done) | {"path": str(done.path)}, [*lines, *done.warnings]


EXPORTERS: dict[str, Exporter] = {
    "keras": _keras,
    "dfm": _dfm,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
"""What `--to` may be."""
