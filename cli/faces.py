"""mien faces: check, inspect, draw and import folders of faces."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.system.printable import plural, printable
from .lines import show, tell, tell_json

if TYPE_CHECKING:
    from ..core.faces.check import Comparison, Progress, Report, Spread
    from ..core.faces.dfl_import import Imported

_NUM_NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_check(verbs)
    text = "Show what one face file says and how training sees it."
    inspect = verbs.add_parser("inspect", help=text, description=text)
    inspect.add_argument(
        "file", type=Path, metavar="FILE|FOLDER", help="a face PNG, or a folder: a line a face"
    )
    inspect.add_argument("--json", action="store_true", help="print the facts as JSON")
    inspect.add_argument(
        "--output", type=Path, metavar="PICTURE.png", help="write the crops and masks here"
    )
    text = "Draw a folder of faces of somebody who does not exist."
    draw = verbs.add_parser("draw", help=text, description=text)
    draw.add_argument("folder", type=Path, metavar="FOLDER", help="where to put them")
    draw.add_argument("--identity", choices=("a", "b"), default="a", help="who (default: a)")
    draw.add_argument("--count", type=int, default=500, metavar="N", help="faces (default: 500)")
    draw.add_argument("--size", type=int, default=256, metavar="PX", help="edge (default: 256)")
    draw.add_argument("--seed", type=int, default=0, metavar="N", help="variation (default: 0)")
    text = "Write faces of DeepFaceLab as face PNGs."
    importing = verbs.add_parser(
        "import",
        help=text,
        description=f"{text} Nothing that is there is written over; they can be trained on as they "
        "are, too.",
    )
    importing.add_argument(
        "source", type=Path, metavar="DIR", help="aligned JPEGs, or a faceset.pak"
    )
    importing.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="where to put the PNGs"
    )
    importing.add_argument("--json", action="store_true", help="print what was done as JSON")


def _add_check(verbs: Any) -> None:
    """Declare the verb that measures."""
    text = "Measure one face folder, or both sides against each other."
    check = verbs.add_parser(
        "check",
        help=text,
        description=f"{text} Exit code 2 where a folder holds too few usable faces to train.",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="face PNGs (of side A)")
    check.add_argument(
        "folder_b", type=Path, nargs="?", metavar="FOLDER_B", help="face PNGs of side B"
    )
    check.add_argument(
        "--sub-folders", action="store_true", help="measure the faces of sub-folders, too"
    )
    check.add_argument("--json", action="store_true", help="print the measurements as JSON")
    check.add_argument(
        "--lists",
        type=Path,
        metavar="FOLDER",
        help="write the paths of repeated, blurred, odd, blank and unusable files into a list for "
        "each kind, for `xargs -0`",
    )
    check.add_argument(
        "--sheet", type=Path, metavar="PICTURE", help="draw some files of each of these kinds"
    )
    check.add_argument(
        "--poses", type=Path, metavar="PICTURE", help="draw where the faces of each side look"
    )
    check.add_argument(
        "--move-to",
        type=Path,
        metavar="FOLDER",
        help="move these files there, into a folder for each kind; nothing is deleted",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out one verb; 0, or 2 where a checked folder cannot be trained on."""
    return _VERBS[args.verb](args)


def _check(args: argparse.Namespace) -> int:
    from ..core.faces.check import compare, report
    from ..core.faces.review import verdict

    folders = [folder for folder in (args.folder, args.folder_b) if folder is not None]
    reports = []
    for folder in folders:
        with _progress(str(folder)) as progress:
            reports.append(report(folder, sub_folders=args.sub_folders, progress=progress))
    comparison = compare(*reports) if len(reports) == 2 else None
    fitness = verdict(reports, comparison)
    if args.json:
        facts: dict[str, Any] = {"folders": [one.as_dict() for one in reports]}
        if comparison:
            facts["comparison"] = comparison.as_dict()
        facts |= {"ready": fitness.is_ready, "reasons": fitness.reasons}
        tell_json(facts | _review(args, reports))
    else:
        _print_check(reports, comparison)
        tell(*(f"{what}: {where}" for what, where in _review(args, reports).items()))
        tell(fitness.text)
    return 0 if all(one.trainable for one in reports) else 2


def _review(args: argparse.Namespace, reports: "list[Report]") -> dict[str, Any]:
    """Write and move what was asked for; what is where now, by what it is."""
    from ..core.faces.review import move_named, write_lists
    from ..core.preview.files import save_picture
    from ..core.preview.review import pose_picture, review_sheet

    done: dict[str, Any] = {}
    if args.lists:
        done["lists"] = ", ".join(map(str, write_lists(reports, args.lists))) or "nothing to list"
    if args.sheet:
        sheet = review_sheet(reports)
        if sheet is not None:
            save_picture(args.sheet, sheet, "--sheet")
        done["sheet"] = str(args.sheet) if sheet is not None else "nothing to show"
    if args.poses:
        pose_picture(reports, args.poses)
        done["poses"] = str(args.poses)
    # Last of all: the others read the files where they are.
    for report in reports if args.move_to else ():
        moved = move_named(report, args.move_to)
        counts = ", ".join(f"{count} {kind}" for kind, count in moved.items()) or "nothing"
        done[f"moved from {report.path}"] = f"{counts} to {args.move_to}"
    return done


def _inspect(args: argparse.Namespace) -> int:
    from ..core.faces.inspect import contact_sheet, inspect
    from ..core.faces.png import FaceFileError
    from ..core.preview.files import save_picture

    if args.file.is_dir():
        return _inspect_folder(args)
    try:
        facts = inspect(args.file)
        sheet = contact_sheet(args.file) if args.output else None
    except FaceFileError as error:
        raise ValueError(f"{args.file}: {error}") from None
    if sheet is not None:
        save_picture(args.output, sheet, "--output")
        facts["picture"] = str(args.output)
    if args.json:
        tell_json(facts)
    else:
        _print_rows(str(args.file), _flat(facts))
    return 0


def _inspect_folder(args: argparse.Namespace) -> int:
    """A line for each face of a folder, or its facts as JSON."""
    from ..core.faces.folder import read_folder
    from ..core.faces.inspect import summary

    if args.output:
        raise ValueError("--output shows one face: give its file, or use `faces check --sheet`")
    opened = read_folder(args.file, minimum=0)
    facts = [summary(face) for face in opened.faces]
    unusable = {rejected.path.name: rejected.reason for rejected in opened.rejected}
    if args.json:
        tell_json({"faces": facts, "unusable": unusable})
        return 0
    rows = [["file", "px", "in the source", "yaw", "pitch", "roll", "from the mean"]]
    rows += [[str(value) for value in face.values()] for face in facts]
    _print_table(f"{args.file}: {len(facts)} {plural(len(facts), 'face')}", rows)
    tell(*(f"  unusable: {name}: {reason}" for name, reason in unusable.items()))
    return 0


def _draw(args: argparse.Namespace) -> int:
    from ..core.faces.synthetic import draw_folder

    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    draw_folder(
        args.folder, identity=args.identity, count=args.count, size_px=args.size, seed=args.seed
    )
    faces = plural(args.count, "face")
    tell(f"{args.count} {faces} of {args.identity}, {args.size} px, in {args.folder}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from ..core.faces.dfl_import import import_faces

    with _progress(str(args.source)) as progress:
        done = import_faces(args.source, args.output, progress=progress or (lambda *_: None))
    if args.json:
        tell_json(done.as_dict())
    else:
        _print_import(done)
    return 0


_VERBS = {"check": _check, "inspect": _inspect, "draw": _draw, "import": _import}


@contextmanager
def _progress(name: str) -> "Iterator[Progress | None]":
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        # Escaped, or rich would read brackets in a name as its markup.
        task = bar.add_task(escape(printable(name)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_import(done: "Imported") -> None:
    were = plural(done.num_present, "was", "were")
    present = f", {done.num_present} {were} there already" if done.num_present else ""
    persons = f", by person in {', '.join(done.persons)}" if done.persons else ""
    faces = plural(done.num_written, "face")
    tell(f"{done.num_written} {faces} written to {done.folder}{persons}{present}")
    if done.num_masks:
        have = plural(done.num_masks, "has", "have")
        tell(f"{done.num_masks} {have} a mask: train with data.mask_type=custom_head to use it")
    for kind, settings in done.proposals.items():
        them = plural(done.face_types[kind], "it", "them")
        tell(f"{done.face_types[kind]} of {kind}: train {them} with {settings}")
        if kind in done.cut_short:
            tell(
                f"warning: more than 5 % of that crop lies outside the picture of "
                f"{done.cut_short[kind]} of them, and is black"
            )
    for notice in done.notices:
        tell(f"warning: {notice}")
    for kind, reasons in (("unusable", done.rejected), ("mask unusable", done.damaged_masks)):
        for name, reason in list(reasons.items())[:_NUM_NAMED]:
            tell(f"{kind}: {name}: {reason}")
        if len(reasons) > _NUM_NAMED:
            tell(f"{kind}: and {len(reasons) - _NUM_NAMED} more (--json names all)")


def _print_check(reports: "list[Report]", comparison: "Comparison | None") -> None:
    for report in reports:
        _print_rows(report.path, _check_rows(report))
        if report.poses:
            _print_table(f"{report.path}: faces by angle in degrees", _pose_table(report.poses))
        for name, reason in list(report.unreadable.items())[:_NUM_NAMED]:
            tell(f"  unusable: {name}: {reason}")
        if len(report.unreadable) > _NUM_NAMED:
            tell(f"  unusable: and {len(report.unreadable) - _NUM_NAMED} more (--json names all)")
        for group in report.repeats[:_NUM_NAMED]:
            tell(f"  repeated: {', '.join(group[:6])}{', ...' if len(group) > 6 else ''}")
        if len(report.repeats) > _NUM_NAMED:
            more = len(report.repeats) - _NUM_NAMED
            tell(f"  repeated: and {more} more {plural(more, 'group')}")
        _print_advice(f"Advice for {report.path}", report.advice)
    if comparison:
        _print_advice("The two sides against each other", comparison.advice)


def _check_rows(report: "Report") -> dict[str, str]:
    """What the table of a checked folder says, by the name of the row."""
    files = plural(report.num_files, "file")
    return {
        "faces": "; ".join(
            [f"{report.num_faces} of {report.num_files} {files}", *report.passed_over.counts]
        ),
        "alignments version": ", ".join(f"{v} ({n})" for v, n in report.versions.items()) or "-",
        "size, px": ", ".join(f"{size} ({n})" for size, n in report.sizes_px.items()) or "-",
        "picture in the source, px": _spread_text(report.native_px),
        "masks": _masks_text(report),
        "yaw, degrees": _spread_text(report.yaw),
        "pitch, degrees": _spread_text(report.pitch),
        "roll, degrees": _spread_text(report.roll),
        "lightness, of 100": _spread_text(report.lightness),
        "light, right minus left": _spread_text(report.light_balance),
        "sharpness": _spread_text(report.sharpness, digits=2),
        "repeated pictures": str(report.num_repeats),
    }


def _masks_text(report: "Report") -> str:
    """Faces that have each mask, and of how many of them it is empty."""
    cells = []
    for name in sorted({*report.masks, *report.empty_masks}):
        empty = len(report.empty_masks.get(name, {}))
        stored = report.masks.get(name, "drawn")
        cells.append(f"{name} ({stored}{f', {empty} empty' if empty else ''})")
    return ", ".join(cells) or "none"


def _spread_text(spread: "Spread | None", digits: int = 0) -> str:
    if spread is None:
        return "-"
    # `z`: a small negative number rounds to 0, not to -0.
    low, middle, high = (f"{v:z.{digits}f}" for v in (spread.p5, spread.median, spread.p95))
    least, most = (f"{v:z.{digits}f}" for v in (spread.minimum, spread.maximum))
    return f"90 % in {low} to {high}, median {middle}, all in {least} to {most}"


def _pose_table(poses: dict[str, int]) -> list[list[str]]:
    """Faces by field of yaw (columns) and pitch (rows), with headings."""
    counts: dict[tuple[int, int], int] = {}
    spans: dict[str, dict[int, str]] = {"yaw": {}, "pitch": {}}
    for pose, count in poses.items():
        _, yaw, _, pitch = pose.split()
        corner = []
        for name, span in (("yaw", yaw), ("pitch", pitch)):
            low = int(span.split("..")[0])
            spans[name][low] = span
            corner.append(low)
        counts[corner[0], corner[1]] = count
    columns, rows = sorted(spans["yaw"]), sorted(spans["pitch"])
    table = [["pitch \\ yaw", *(spans["yaw"][low] for low in columns)]]
    for row in rows:
        cells = [str(counts.get((column, row), "")) for column in columns]
        table.append([spans["pitch"][row], *cells])
    return table


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as rows of one table."""
    rows: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            rows |= _flat(value, f"{prefix}{name} ")
        elif isinstance(value, dict):
            rows[f"{prefix}{name}"] = ", ".join(f"{key} {item}" for key, item in value.items())
        else:
            rows[f"{prefix}{name}"] = str(value)
    return rows


def _print_rows(title: str, rows: dict[str, str]) -> None:
    _print_table(title, [[name, value] for name, value in rows.items()], has_heading=False)


def _print_table(title: str, rows: list[list[str]], *, has_heading: bool = True) -> None:
    """Cells in columns: a rich table on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        from rich.table import Table
        from rich.text import Text

        # As Text, in which rich looks for no markup: a name may hold brackets.
        shown = Text(printable(title))
        table = Table(title=shown, title_justify="left", show_header=has_heading)
        for heading in rows[0]:
            table.add_column(Text(printable(heading)) if has_heading else "")
        for row in rows[has_heading:]:
            table.add_row(*(Text(printable(cell)) for cell in row))
        show(table)
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    tell(title)
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        tell("  " + "  ".join(cells).rstrip())


def _print_advice(title: str, advice: list[str]) -> None:
    tell(f"{title}:")
    for sentence in advice or ["Nothing to mend."]:
        tell(f"  - {sentence}")
