"""The fault campaign: training is disturbed in every way that is known, and must lose nothing.

    python tests/faults/campaign.py [--kills 200] [--short] [--only NAME ...] [--json FILE]

prints a table: fault, cases, passed, what was seen. The exit code is 0 only where every case was
passed. What this machine does not allow (mounting a disk needs root) is told as skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import clocks
import damage
import disks
import faces
import kills
import locks
import lost_ranks
import strangers
import terminals
import trial
from course import SKIPPED, Cases, Failed, Workshop

FAULTS: dict[str, Callable[[Workshop, int, int], Cases]] = {
    "kill": kills.kills,
    "kill-in-stage-change": kills.kills_in_a_stage_change,
    "kill-rank": lost_ranks.kills,
    "stop-rank": lost_ranks.stops,
    "disk-full": disks.full,
    "disk-read-only": disks.read_only,
    "fsync-fails": disks.failing_fsync,
    "call-fails": disks.failing_calls,
    "disk-lacks": disks.lacking,
    "no-handles": disks.no_handles,
    "damage": damage.damaged_files,
    "pipes": strangers.pipes,
    "faces-between-runs": faces.between_runs,
    "faces-while-running": faces.while_running,
    "clock": clocks.jumps,
    "loader": locks.loader,
    "two-runs": locks.two_runs,
    "lock": locks.stale_locks,
    "terminal-closed": terminals.closed,
    "output-full": terminals.unwritable,
}
ALL = 10**9
"""More cases than any fault has."""


@dataclass
class Row:
    """The cases of one fault."""

    fault: str
    cases: int = 0
    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def run_fault(name: str, shop: Workshop, count: int, seed: int) -> Row:
    """All cases of one fault."""
    row, began = Row(name), time.monotonic()
    label = "nothing"
    try:
        for label, case in FAULTS[name](shop, count, seed):
            _run_case(row, label, case)
    except Failed as failure:  # of what the cases need
        _note_failure(row, f"after {label}", failure)
    row.seconds = time.monotonic() - began
    return row


def _run_case(row: Row, label: str, case: Callable[[], str]) -> None:
    try:
        seen = case()
    except (Failed, OSError, ValueError, subprocess.SubprocessError) as failure:
        _note_failure(row, label, failure)
        return
    row.seen[seen] += 1
    if seen.startswith(SKIPPED):
        row.skipped += 1
    else:
        row.cases, row.passed = row.cases + 1, row.passed + 1


def _note_failure(row: Row, label: str, failure: Exception) -> None:
    row.cases += 1
    row.failures.append(f"{label}: {failure}")
    print(f"FAILED  {row.fault}: {label}: {failure}", flush=True)


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| fault | cases | passed | what was seen |", "|---|---:|---:|---|"]
    for row in rows:
        seen = ", ".join(f"{what} ({count})" for what, count in row.seen.most_common())
        lines.append(f"| {row.fault} | {row.cases} | {row.passed} | {seen} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb training in every known way.")
    parser.add_argument("--kills", type=int, default=200, help="how often to kill")
    parser.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", default=list(FAULTS))
    parser.add_argument(
        "--short", action="store_true", help="of each fault but kills hardly more than one case"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = dict.fromkeys(FAULTS, 1 if args.short else ALL)
    counts["kill"] = args.kills - args.kills // 3
    counts["kill-in-stage-change"] = args.kills // 3
    counts["stop-rank"] = 3 if args.short else args.kills // 10
    counts["kill-rank"] = 3 if args.short else args.kills // 4
    trial.warm_up()
    rows = []
    with tempfile.TemporaryDirectory(prefix="mien-faults-") as root:
        shop = Workshop(Path(root))
        for name in args.only:
            row = run_fault(name, shop, counts[name], args.seed)
            print(f"{name}: {row.passed} of {row.cases} in {row.seconds:.0f} s", flush=True)
            rows.append(row)
    print(table(rows))
    if args.json:
        faults = [vars(row) | {"seen": dict(row.seen)} for row in rows]
        figures = {"seed": args.seed, "load": os.getloadavg(), "faults": faults}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(row.passed == row.cases for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
