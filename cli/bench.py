"""mien bench: measure the parts and the whole."""

import argparse
import json
from pathlib import Path

KINDS = ("data", "step", "train", "learning", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "kind",
        nargs="?",
        default="all",
        choices=("all", *KINDS),
        help="data: batches from the store, first start-up; step: training steps and Python calls; "
        "train: the whole loop; all: these three; learning: curves against a reference "
        "(needs --reference and faces); report: put the newest results into README.md",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--no-save", action="store_true", help="print only; write nothing to benchmarks/results"
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
    """Measure, print, and write the results file."""
    if args.kind == "learning":
        return _learning(args)
    if args.kind == "report":
        from ..benchmarks import report

        report.update(Path("README.md"))
        return 0
    from ..benchmarks import bench_data, bench_step, bench_train
    from ..benchmarks.harness import write_results

    parts = {"data": bench_data.rows, "step": bench_step.rows, "train": bench_train.rows}
    chosen = parts if args.kind == "all" else {args.kind: parts[args.kind]}
    rows = []
    for measure in chosen.values():
        for row in measure():
            rows.append(row)
            if not args.json:
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    if not args.no_save:
        path = write_results(rows)
        if not args.json:
            print(f"written to {path}")
    return 0


def _learning(args: argparse.Namespace) -> int:
    """Train each precision and seed that has no result yet; compare all; draw the picture."""
    if not (args.reference and args.input_a and args.input_b):
        raise ValueError("bench learning needs --reference FILE, --input-a and --input-b")
    from ..benchmarks import learning

    reference = learning.read_reference(args.reference, args.input_a, args.input_b)
    results = []
    for precision in args.precisions:
        for seed in args.seeds:
            name = f"{reference.name}-{precision}-seed{seed}"
            keep = args.keep / name if args.keep else None
            results.append(learning.run_once(reference, precision, seed, keep))
    rows = [row for result in results for row in learning.compare(reference, result)]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            verdict = "ok" if row["passes"] else "OUT"
            print(
                f"{verdict:3} {row['run']} {row['side']} {row['first']}-{row['last']} "
                f"mean {row['mean']:.5f} ratio {row['ratio']:.3f}"
            )
    learning.draw(reference, results, args.picture)
    print(f"{args.picture}: {sum(r['passes'] for r in rows)} of {len(rows)} windows within 10 %")
    return 0 if all(row["passes"] for row in rows) else 1
