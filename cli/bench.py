"""mien bench: measure the parts and the whole."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.system.printable import plural
from .lines import show, tell, tell_json

ALL = ("kernels", "data", "step", "train", "roofline")
KINDS = ("machine", *ALL, "swap", "scaling", "models", "ceilings", "learning", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "kind",
        nargs="?",
        default="machine",
        choices=("all", *KINDS),
        help="machine, which needs no word: the speed of the main models here, in under three "
        "minutes. The others are for who works on mien: kernels: each against PyTorch; data: "
        "batches from the store, first start-up; step: training steps, Python calls and launches; "
        "train: the whole loop; roofline: what a step could reach; all: these five; models: every "
        "model, what it takes to make it and how fast a GPU trains it; swap: frames of a film in a "
        "second, and what takes the time; scaling: one run on 1, 2, 4, 8 GPUs, beside what is "
        "predicted; ceilings: what this card can do, measured anew; "
        "learning: curves against a reference (needs --reference and faces); report: put the "
        "newest results into README.md and docs of mien's own folder, or print them where there "
        "is none, or those of --results",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--no-save", action="store_true", help="print only; write no file")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="folder of the file with the results (default: the user's folder for state; of "
        "benchmarks for who works on mien: benchmarks/results)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="kernels: every figure, of every variant"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="kernels, models: these alone"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="results of before, of the same device; two files, also of two cards: compare them "
        "and measure nothing",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="with --compare: write the table there too"
    )
    learning = parser.add_argument_group("learning")
    learning.add_argument("--reference", type=Path, help="curve to be met, a JSON file")
    learning.add_argument("-A", "--input-a", type=Path, help="faces of side A")
    learning.add_argument("-B", "--input-b", type=Path, help="faces of side B")
    learning.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    learning.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    learning.add_argument("--keep", type=Path, help="keep the model folders here")
    learning.add_argument("--picture", type=Path, default=Path("docs/learning.png"))


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the results file, compare."""
    if args.kind == "learning":
        return _learning(args)
    if args.kind == "report":
        return _report(args.results)
    # Not before: PyTorch takes more than a second to load, and `--help` needs none of it.
    from .. import kernels
    from ..benchmarks import compare, harness
    from ..core.training.devices import require_fit_gpu

    unknown = sorted(set(args.only) - set(kernels.OPERATIONS))
    if unknown and args.kind != "models":
        raise ValueError(f"no kernel {unknown[0]!r}; there are: {', '.join(kernels.OPERATIONS)}")
    if args.markdown and not args.compare:
        raise ValueError("--markdown writes a comparison: add --compare FILE")
    files = [harness.read_results(path) for path in args.compare or ()]
    if len(files) > 2:
        raise ValueError(f"--compare takes one file or two, got {len(files)}")
    if len(files) == 2:
        return _compared(args, *files)
    require_fit_gpu()
    here = harness.environment()
    if files:
        compare.require_same_device(files[0], here)
    rows = _measured(args, _ceilings(args))
    _print_end(args, rows, here)
    if files:
        _compared(args, files[0], here | {"rows": rows})
    return 1 if any("error" in row for row in rows) else 0


def _measured(args: argparse.Namespace, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all parts that are asked for, each printed and written as soon as it is there."""
    from ..benchmarks import harness

    rows: list[dict[str, Any]] = []
    if args.kind == "ceilings":
        _print(ceilings, args.json)
        if not args.no_save:
            harness.write_results([], ceilings=ceilings, folder=args.results)
        return rows
    for kind in ALL if args.kind == "all" else [args.kind]:
        state = harness.card_state()
        for row in _rows(kind, args.only, ceilings):
            rows.append(row)
            if not args.json:
                _print_measured(row, args.verbose)
            if not args.no_save:  # at once, so that a failure later on costs none of it
                conditions = {kind: {"before": state, "after": harness.card_state()}}
                harness.write_results(
                    [row], ceilings=ceilings, conditions=conditions, folder=_folder(args)
                )
    return rows


def _folder(args: argparse.Namespace) -> Path | None:
    """Folder of the results; None: that of who works on mien."""
    from ..benchmarks import harness

    return args.results or (harness.user_results() if args.kind == "machine" else None)


def _print_end(args: argparse.Namespace, rows: list[dict[str, Any]], here: dict[str, Any]) -> None:
    """Print what can only be said of all rows together."""
    from ..benchmarks import bench_machine, harness

    if args.json:
        if rows:
            _print(rows, True)
        return
    if args.kind == "machine":
        show(bench_machine.table(rows, here))
    if not args.no_save:
        tell(f"written to {harness.results_path(here, _folder(args))}")


def _compared(args: argparse.Namespace, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what became of each figure; an exit code."""
    from ..benchmarks import compare
    from ..core.system.durable_files import write_output

    changes = compare.changes(old["rows"], new["rows"])
    if not changes:
        raise ValueError("nothing was measured in both, so there is nothing to compare")
    if not args.json:
        if old["card"] != new["card"]:
            tell(f"{old['card']} -> {new['card']}")
        tell(*compare.lines(changes))
    if args.markdown:
        text = compare.markdown(changes, old, new)
        write_output(args.markdown, text.encode(), force=True)
    return 0


def _report(folder: Path | None) -> int:
    """Put the newest results into README.md and docs; print them where mien is no source tree, and
    those of a folder that was named."""
    from ..benchmarks import harness, report

    if harness.IS_SOURCE_TREE and folder is None:
        report.update(Path("README.md"), Path("docs"))
    elif report.newest_results(folder):
        tell(*report.render(folder).splitlines())
    else:
        searched = (folder or harness.RESULTS).absolute()
        raise ValueError(f"no results in {searched} yet; `mien bench` measures")
    return 0


def _ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """What this card can do: as measured before, or now."""
    import torch

    from ..benchmarks import ceilings, harness

    known = None if args.kind == "ceilings" else harness.known_ceilings(_folder(args))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return known or ceilings.measure_ceilings(device)


def _rows(kind: str, only: list[str], ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one part."""
    from ..benchmarks import (
        bench_data,
        bench_kernels,
        bench_machine,
        bench_models,
        bench_scaling,
        bench_step,
        bench_swap,
        bench_train,
        roofline,
    )
    from ..benchmarks.ceilings import card_of

    if kind == "machine":
        return bench_machine.rows(ceilings)
    if kind == "kernels":
        return bench_kernels.rows(ceilings, tuple(only))
    if kind == "data":
        return bench_data.rows()
    if kind == "step":
        return bench_step.rows(ceilings)
    if kind == "train":
        return bench_train.rows()
    if kind == "scaling":
        return bench_scaling.rows(ceilings)
    if kind == "swap":
        return bench_swap.rows()
    if kind == "models":
        return bench_models.rows(only, ceilings)
    return roofline.rows(card_of(ceilings))


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        tell_json(value)
        return
    for row in value["convolutions"]:
        _print_row(row)
    _print_row({key: item for key, item in value.items() if key != "convolutions"})


def _print_measured(row: dict[str, Any], is_verbose: bool) -> None:
    """Print a row as it is measured: of the machine to show progress, of a kernel its speed."""
    if row["kind"] == "machine":
        speed = f"{row['eg_per_s']:,.4g} EG/s" if "eg_per_s" in row else row["error"]
        tell(f"{row['model']}, {row['precision']}, batch {row['batch_size']}: {speed}")
    elif row["kind"] != "kernel" or is_verbose or "error" in row:
        _print_row(row)
    elif row["variant"] == "mien":
        tell(_kernel_line(row), *_losses(row))


def _kernel_line(row: dict[str, Any]) -> str:
    """A kernel's time, beside PyTorch's and what the device could do."""
    case = " ".join(f"{key}={value}" for key, value in row["case"].items())
    parts = [f"{row['median_ms']:g} ms"]
    for name, ratio in row.items():
        if name.startswith("speedup_over_"):
            parts.append(f"{ratio:g}x {name.removeprefix('speedup_over_').replace('_', '-')}")
    if row["share_of_ceiling"]:
        parts.append(f"{row['share_of_ceiling']:.0%} of the ceiling")
    return f"{row['kernel']} {case}: {', '.join(parts)}"


def _print_row(row: dict[str, Any]) -> None:
    tell("  ".join(f"{key}={value}" for key, value in row.items()), *_losses(row))


def _losses(row: dict[str, Any]) -> list[str]:
    """A line for each variant that is faster than mien's own."""
    others = row.get("loses_to", [])
    return [f"  loses to {name}: {row['kernel']} {row['case']}" for name in others]


def _learning(args: argparse.Namespace) -> int:
    """Train each precision and seed that has no result yet; compare all; draw the picture."""
    if not (args.reference and args.input_a and args.input_b):
        raise ValueError("bench learning needs --reference FILE, --input-a and --input-b")
    for flag, value in (("no-save", args.no_save), ("only", args.only), ("compare", args.compare)):
        if value:
            raise ValueError(f"bench learning takes no --{flag}: leave it out")
    from ..benchmarks import learning

    reference = learning.read_reference(args.reference, args.input_a, args.input_b)
    results = []
    for precision in args.precisions:
        for seed in args.seeds:
            name = f"{reference.name}-{precision}-seed{seed}"
            keep = args.keep / name if args.keep else None
            results.append(learning.run_once(reference, precision, seed, keep, args.results))
    rows = [row for result in results for row in learning.compare(reference, result)]
    if args.json:
        tell_json(rows)
    else:
        for row in rows:
            verdict = "ok" if row["passes"] else "OUT"
            tell(
                f"{verdict:3} {row['run']} {row['side']} {row['first']}-{row['last']} "
                f"mean {row['mean']:.5f} ratio {row['ratio']:.3f}"
            )
    learning.draw(reference, results, args.picture)
    num_passed, windows = sum(row["passes"] for row in rows), plural(len(rows), "window")
    tell(f"{args.picture}: {num_passed} of {len(rows)} {windows} within 10 %")
    return 0 if all(row["passes"] for row in rows) else 1
