"""mien analyze: the sessions of a model as a table, its losses and its speed as graphs."""

import argparse
import csv
import dataclasses
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lines import complain, tell, tell_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.history.history import History
    from ..core.history.statistics import SessionStatistics

_HEADINGS = ("session", "start", "end", "elapsed", "batch", "iterations", "EG/s")
_MOST_NAMED = 20  # sessions, in an error
_FOR_GRAPHS = ("smoothing", "rolling", "trend", "flatten_outliers", "range", "loss", "rate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Show how a model was trained: its sessions, graphs of its losses. The model may be in "
        "training meanwhile; its folder is only read."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model's folder")
    parser.add_argument(
        "--session",
        type=int,
        action="append",
        metavar="N",
        help="only this session, in the table and in graphs (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="print the statistics as JSON")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the table as CSV; -: print it so, and nothing else"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    graph = parser.add_argument_group("graphs")
    graph.add_argument("--graph", type=Path, metavar="FILE.png", help="draw the losses")
    graph.add_argument(
        "--rate", action="store_true", help="draw EG/s by the time trained, not the losses"
    )
    graph.add_argument(
        "--loss",
        action="append",
        metavar="KEY",
        help="draw this one: a, b, face_a, mask_b, total, weighted_a/ssim ... (repeatable; "
        "default: faces and masks of both sides)",
    )
    graph.add_argument(
        "--range", metavar="FIRST:LAST", help="draw only these iterations; each end may be left out"
    )
    graph.add_argument(
        "--smoothing", type=float, metavar="AMOUNT", help="0 to 0.99 (default: 0.90)"
    )
    graph.add_argument(
        "--rolling", type=int, metavar="N", help="draw the average over N iterations too"
    )
    graph.add_argument("--trend", action="store_true", help="draw a polynomial of degree 3 too")
    graph.add_argument(
        "--flatten-outliers",
        action="store_true",
        help="draw the mean in place of what is over one standard deviation away from it",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and write what is asked for."""
    _check(args)
    from ..core.history import history as histories
    from ..core.history.statistics import total_statistics

    history = histories.read_history(args.model, _is_wanted(args))
    for sentence in history.warnings:
        complain("analyze", f"warning: {sentence}")
    history = _only_sessions(history, args)
    sessions = [session.statistics() for session in history.sessions]
    total = total_statistics(sessions)
    rows = [_row(each) for each in (*sessions, total)]
    if args.graph is not None:
        _write(args.graph, _graph(history, args), "--graph", force=args.force)
    if args.csv == "-":
        tell(*_csv(rows).splitlines())
        return 0
    if args.csv is not None:
        table = _csv(rows).encode(errors="backslashreplace")
        _write(Path(args.csv), table, "--csv", force=args.force)
    if args.json:
        facts: dict[str, Any] = {
            "model": str(args.model),
            "trainer": history.trainer,
            "sessions": [dataclasses.asdict(each) for each in sessions],
            "total": dataclasses.asdict(total),
        }
        tell_json(facts)
        return 0
    tell(f"{args.model}: {history.trainer or 'not saved yet'}")
    _print_table(rows)
    if any(each.elapsed_s is None for each in sessions):
        tell(
            "-: not known, since the folder has no logs of the session; the total's time and EG/s "
            "leave it out"
        )
    for path in (args.csv, args.graph):
        if path is not None:
            tell(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together before anything is read.

    Raises:
        ValueError: With what to do instead.
    """
    if args.graph is None:
        for name in _FOR_GRAPHS:
            value = getattr(args, name)
            if value is not None and value is not False:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is about graphs; add --graph FILE.png, or leave it out")
    elif args.graph.suffix.lower() != ".png":
        raise ValueError(f"--graph must end in .png, got {args.graph}")
    if args.rate and args.loss:
        raise ValueError("--rate draws EG/s and --loss draws losses; leave one out")
    if args.json and args.csv == "-":
        raise ValueError("--json and --csv - both print; leave one out, or name a file for --csv")
    if args.smoothing is not None and not 0 <= args.smoothing <= 0.99:
        raise ValueError(f"--smoothing must be from 0 to 0.99, got {args.smoothing:g}")
    if args.rolling is not None and args.rolling < 2:
        raise ValueError(f"--rolling must be at least 2, got {args.rolling}")
    _range(args)
    for path in (args.graph, None if args.csv in (None, "-") else Path(args.csv)):
        if path is not None and path.exists() and not args.force:
            raise ValueError(f"{path} is there already; name another file, or add --force")


def _range(args: argparse.Namespace) -> tuple[int, int | None]:
    """The first and the last iteration to draw; None: up to the last."""
    text = args.range or ":"
    first, colon, last = text.partition(":")
    if not colon or not all(end == "" or end.isdecimal() for end in (first, last)):
        raise ValueError(f"--range must be FIRST:LAST, such as 1000:5000 or 1000:, got {text}")
    ends = int(first or 1), int(last) if last else None
    if ends[1] is not None and ends[1] < ends[0]:
        raise ValueError(f"--range must not end before it begins, got {text}")
    return ends


def _is_wanted(args: argparse.Namespace) -> "Callable[[str], bool]":
    """Whether a logged value of this name is to be drawn."""
    from ..core.history.plots import Tag

    def is_wanted(name: str) -> bool:
        tag = Tag.parse(name)
        if tag is None or args.graph is None or args.rate:
            return False
        return tag.is_usual if args.loss is None else not tag.keys.isdisjoint(args.loss)

    return is_wanted


def _only_sessions(history: "History", args: argparse.Namespace) -> "History":
    """The history of the sessions that are asked for."""
    known = [session.number for session in history.sessions]
    if not known:
        raise ValueError(f"nothing was trained in {args.model} yet; `mien train` does")
    for number in args.session or ():
        if number not in known:
            newest = ", ".join(str(one) for one in known[-_MOST_NAMED:])
            there = newest if len(known) <= _MOST_NAMED else f"{known[0]} to {known[-1]}"
            raise ValueError(f"--session {number}: {args.model} has no such session, only {there}")
    chosen = set(args.session or known)
    sessions = [session for session in history.sessions if session.number in chosen]
    return dataclasses.replace(history, sessions=sessions)


def _graph(history: "History", args: argparse.Namespace) -> bytes:
    from ..core.history.plots import Drawing, Tag, draw_losses, draw_rate

    if not any(len(session.times_n) for session in history.sessions):
        raise ValueError(
            f"nothing was logged of {args.model}, so there is nothing to draw: it was trained "
            "with --no-logs, or its logs are elsewhere; leave --graph out"
        )
    keys = sorted({key for tag in map(Tag.parse, history.tags) if tag for key in tag.keys})
    for key in args.loss or ():
        if key not in keys:
            raise ValueError(f"--loss {key} was not logged; there are {', '.join(keys)}")
    drawing = Drawing(
        smoothing=0.9 if args.smoothing is None else args.smoothing,
        rolling=args.rolling,
        trend=args.trend,
        flatten_outliers=args.flatten_outliers,
    )
    span = _range(args)
    name = args.model.resolve().name
    title = f"{name}, {history.trainer}" if history.trainer else name
    if args.rate:
        return draw_rate(history, drawing, span, title=title)
    return draw_losses(history, filter(_is_wanted(args), history.tags), drawing, span, title=title)


def _row(statistics: "SessionStatistics") -> list[str]:
    """What the table says of one session, or of all."""
    from ..core.history.statistics import elapsed_text

    def moment(seconds: float | None) -> str:
        if seconds is None:
            return "-"
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

    return [
        "total" if statistics.session is None else str(statistics.session),
        moment(statistics.start),
        moment(statistics.end),
        "-" if statistics.elapsed_s is None else elapsed_text(statistics.elapsed_s),
        ",".join(str(size) for size in statistics.batch_sizes) or "-",
        str(statistics.iterations),
        "-" if statistics.eg_per_s is None else f"{statistics.eg_per_s:.1f}",
    ]


def _csv(rows: list[list[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_HEADINGS, *rows])
    return stream.getvalue()


def _print_table(rows: list[list[str]]) -> None:
    table = [list(_HEADINGS), *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        tell("  " + "  ".join(cells))


def _write(path: Path, content: bytes, flag: str, *, force: bool) -> None:
    from ..core.system.durable_files import write_output

    try:
        write_output(path, content, force=force)
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from None
