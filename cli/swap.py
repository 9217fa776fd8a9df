"""mien swap: a trained model's faces in the frames of a film."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.system.paths import expanded
from ..core.system.printable import plural
from .lines import complain, tell, tell_json
from .weights_flag import add_weights

if TYPE_CHECKING:
    from ..core.convert.film import Emit, Report

_DONE, _STOPPED = 0, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="model folder, or a file of `model inference`"
    )
    parser.add_argument(
        "--faces",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="faces extracted from the film: face PNGs, or DeepFaceLab's JPEGs or faceset.pak",
    )
    parser.add_argument(
        "--frames", type=Path, required=True, metavar="FOLDER|VIDEO", help="the film"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER|VIDEO",
        help="folder of PNGs to write, or a video (.mp4, .mkv, .mov)",
    )
    parser.add_argument(
        "--side", choices=("a", "b"), default="b", help="as whom faces are decoded (default: b)"
    )
    parser.add_argument(
        "--generation", metavar="NAME", help="a save, or backup (default: the newest)"
    )
    add_weights(parser)
    _add_blending(parser)
    _add_computing(parser)
    parser.add_argument(
        "--fps", type=float, default=25.0, help="of a video made of pictures (default: %(default)g)"
    )
    parser.add_argument(
        "--preview", type=int, metavar="N", help="swap N frames with faces only, evenly spaced"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write some faces before and after"
    )
    parser.add_argument(
        "--partial", action="store_true", help="leave out faces whose frame is missing"
    )
    parser.add_argument("--force", action="store_true", help="replace a video or a sheet")
    parser.add_argument("--json", action="store_true", help="print events, one JSON object a line")


def _add_blending(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("blending")
    group.add_argument(
        "--mask",
        metavar="NAME",
        help="learned, components, extended, none, stored, or a stored mask's name where there are "
        "several (default: learned where the model has one, else extended)",
    )
    group.add_argument(
        "--feather",
        type=float,
        metavar="PX",
        help="width of the fading edge, in px of the model's face (default: 1/16 of it)",
    )
    group.add_argument(
        "--erode",
        type=float,
        default=0.0,
        metavar="PX",
        help="take off the mask's edge before, in px of the model's face (default: 0)",
    )
    group.add_argument(
        "--color",
        choices=("off", "mean", "full"),
        default="mean",
        help="take over the frame's colours: their mean, or their spread too (default: mean)",
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
        default="auto",
        help="in which the model computes (default: auto)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="faces at a time (default: 16)",
    )
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: one for each core"
    )


def run(args: argparse.Namespace) -> int:
    """Swap the film; 0, or 4 where a signal has stopped it."""
    _check_numbers(args)
    # After the numbers are checked: to load PyTorch takes more than a second.
    from ..core.console.stop import StopRequest
    from ..core.convert.film import SwapSettings, swap_film

    settings = SwapSettings(
        model=expanded(args.model),
        faces=expanded(args.faces),
        frames=expanded(args.frames),
        output=expanded(args.output),
        generation=args.generation,
        weights=args.weights,
        side=args.side,
        mask=args.mask,
        feather_px=args.feather,
        erode_px=args.erode,
        color=args.color,
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        num_threads=args.threads,
        fps=args.fps,
        preview=args.preview,
        sheet=expanded(args.sheet) if args.sheet else None,
        partial=args.partial,
        force=args.force,
    )
    with StopRequest() as stop, _events(as_json=args.json) as emit:
        report = swap_film(settings, emit=emit, should_stop=lambda: bool(stop.signal_name))
        code = _STOPPED if report.is_stopped else _DONE
        reason = f"{stop.signal_name} received" if report.is_stopped else "all frames are done"
        emit("stop", reason=reason, exit_code=code, **_facts(report))
    return code


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse, by a ValueError, a number that is out of its range."""
    for name, low, high in (
        ("feather", 0, 1024),
        ("erode", 0, 1024),
        ("batch_size", 1, 4096),
        ("threads", 0, 1024),
        ("preview", 1, 1_000_000),
        ("fps", 1, 240),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be from {low} to {high}, got {value:g}")


def _facts(report: "Report") -> dict[str, Any]:
    return {
        "output": str(report.output),
        "sheet": str(report.sheet) if report.sheet else None,
        "frames": report.frames,
        "faces": report.faces,
        "kept": report.kept,
        "seconds": round(report.seconds, 1),
    }


@contextmanager
def _events(*, as_json: bool) -> "Iterator[Emit]":
    """What takes the events: JSON lines, or lines for people and a bar on a terminal."""
    if as_json:
        yield lambda event, **fields: tell_json(
            {"event": event, "time": round(time.time(), 3), **fields}, indent=None
        )
        return
    with _bar() as update:

        def emit(event: str, **fields: Any) -> None:
            if event == "warning":
                complain("swap", fields["message"])
            elif event == "step":
                update(fields)
            else:
                tell(_line(event, fields))

        yield emit


def _line(event: str, fields: dict[str, Any]) -> str:
    """A start or an end as a line for people."""
    frames = f"{fields['frames']} {plural(fields['frames'], 'frame')}"
    faces = f"{fields['faces']} {plural(fields['faces'], 'face')}"
    were = plural(fields["kept"], "was", "were")
    kept = f" ({fields['kept']} {were} there)" if fields["kept"] else ""
    if event == "start":
        return (
            f"{faces} in {frames}{kept}, decoded as "
            f"{fields['side']} on {fields['device']} in {fields['precision']}; mask "
            f"{fields['mask']}, feather {fields['feather_px']:g} px, erode "
            f"{fields['erode_px']:g} px, color {fields['color']}"
        )
    sheet = f"; sheet: {fields['sheet']}" if fields["sheet"] else ""
    done = f"{fields['output']}: {frames}{kept}, {faces} swapped"
    if fields["exit_code"] == _STOPPED:
        return f"{done}; {fields['reason']}: call it again to go on"
    return f"{done} in {fields['seconds']:g} s{sheet}"


@contextmanager
def _bar() -> "Iterator[Any]":
    """A progress bar with the time that is left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda fields: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, rate=0.0)
        yield lambda fields: bar.update(
            task,
            completed=fields["frame"],
            total=fields["frames"],
            rate=fields["frames_per_s"],
        )
