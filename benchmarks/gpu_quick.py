"""The most telling figures of a GPU in ten minutes, for a card that is there for a short time.

    make gpu-quick                      # both parts, in the project's environment
    python3 benchmarks/gpu_quick.py first --results out/ --wheels wheels/   # on a bare machine
    python3 benchmarks/gpu_quick.py second --results out/ --wheels wheels/

`first` takes less than 6 minutes and `second` less than 3 on a card of the H100's class, by
expectation, as neither ran on one: each command has a limit, which `--help` names, and one that
fails or runs into its limit never stops the next. It needs no network:
packages that the machine lacks lie as wheels in a folder. It imports nothing but Python's own
modules, so it starts on any machine; all else runs in processes of its own.

The folder of results gets at most seven files: `first.log` and `second.log` (all output),
`step.json` (each step with every lever, and without one of them), `kernels.txt` (kernels of a
replay), `train.jsonl` (events of training and of its resume), `parts.json` (how each part ended)
and `summary.md` (the table that is printed at the end). What is known is in them at any moment, so
that little is lost where the machine is taken away.
"""

# ruff: noqa: T201 - it runs where mien does not: its reader is a person beside the machine

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
TRAINER, BATCH_SIZE = "original", 16
TIMED_OUT = 124
PACKAGES_LIMIT_S, REQUIRED_LIMIT_S, LIBRARY_LIMIT_S = 20, 10, 90
GRACE_S = 5
"""Seconds that a command has, interrupted near the end of its time, to tell what it knows."""

TEST_LIMIT_S = 25
"""A test that hangs is named before the part ends, whose limit is longer."""

PART_LOG_BYTES = 1_000_000
"""Output of a part that its log keeps: tests that fail may print all numbers of a tensor."""

PART_COLUMNS = "name seconds limit_s code"
SESSION_COLUMNS = "session iterations eg_per_s data_wait peak_mib exit_code"
STEP_COLUMNS = (
    "model batch_size precision engine without median_ms eg_per_s peak_mib planned_mib error"
)
STEP = "benchmarks/gpu_quick_step.py"
FACES = """
from pathlib import Path
from mien.core.faces.synthetic import draw_folder
for side in "ab":
    draw_folder(Path(r"{scratch}") / side, identity=side, count=40, size_px=256)
"""
# DALI is not asked for: OpenCV stands in for it. What cffi and the tests need is.
REQUIRED = r"""
import re, sys, tomllib
from importlib.metadata import distributions
lines = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
names = [re.match(r"[\w-]+", line)[0] for line in lines if "dali" not in line]
names += ["pycparser", "pytest", "pytest-timeout", "pytest-xdist"]
versions = {name: next((each.version for each in distributions(name=name)), "") for name in names}
print(", ".join(f"{name} {version}" for name, version in versions.items() if version), flush=True)
if missing := [name for name, version in versions.items() if not version]:
    sys.exit(f"missing: {', '.join(missing)}; put their wheels into a folder, for --wheels")
"""
HAS_CUDA = """
import sys
from mien.kernels import native
if not native.library()[1].mien_has_cuda():
    sys.exit("libmien has no CUDA kernels: what setup.py found is in its output above")
"""
# A machine that has the library builds none.
LIBRARY = '"$0" -c "$1" || { "$0" setup.py build_ext --inplace && "$0" -c "$1"; }'


@dataclass
class Ended:
    """How a part ended."""

    name: str
    limit_s: int
    seconds: float
    code: int
    """124: it ran into its limit."""

    tail: list[str] = field(default_factory=list)
    """The last lines that it printed."""


@dataclass(frozen=True)
class Place:
    """The place where parts run and leave what they find."""

    results: Path
    scratch: Path
    environment: dict[str, str]

    def python(self, *words: str) -> list[str]:
        """A command of this Python."""
        return [sys.executable, *words]

    def pytest(self, *words: str, processes: int = 8) -> list[str]:
        """Tests, in several processes that take them from one another."""
        several = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
        # A test that waits for the GPU listens to no signal: a thread ends its process.
        limit = [f"--timeout={TEST_LIMIT_S}", "--timeout-method=thread"]
        # A file that cannot be imported, for want of a package, must not stop the others.
        options = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=5"]
        # Else each process would take all cores for what PyTorch computes on the CPU.
        one_thread = ["env", "OMP_NUM_THREADS=1"]
        pytest = self.python("-m", "pytest", "-q", *limit, *options)
        return [*one_thread, *pytest, *several, *words]

    def mien(self, *words: str) -> list[str]:
        """A command of mien."""
        return self.python("-m", "mien.cli", *words)


Part = tuple[str, int, list[str], str]
"""Name, limit in s, command, and the file of results that takes its output; "": the log alone."""


def first_parts(place: Place) -> list[Part]:
    """Faces, numerics, training and the step with its levers, the most telling first."""
    scratch = place.scratch
    train = ["train", "-m", str(scratch / "model"), "--engine", "graph", "--json"]
    sides = [f"--input-{side}={scratch / side}" for side in "ab"]
    quick = ["not 31_values", *(f"tests/test_{name}.py" for name in ("bias_act", "optimize"))]
    return [
        ("card", 5, ["nvidia-smi"], ""),
        ("faces", 15, place.python("-c", FACES.format(scratch=scratch)), ""),
        (
            "train",
            60,
            place.mien(*train, *sides, "-t", TRAINER, "-b", str(BATCH_SIZE), "-i", "4000"),
            "train.jsonl",
        ),
        ("resume", 35, place.mien(*train, "-i", "500"), "train.jsonl"),
        ("step", 100, place.python(STEP, "rows", str(place.results)), ""),
        ("kernels", 20, place.python(STEP, "kernels", str(place.results)), ""),
        ("triton numerics", 40, place.pytest("-k", *quick, processes=14), ""),
        (
            "cuda numerics",
            40,
            place.pytest(
                *("-m", "gpu", "-k", "not emulated"),  # which compile for minutes
                *(f"tests/test_{name}.py" for name in ("augment", "face_loss", "filtered_loss")),
            ),
            "",
        ),
    ]


def second_parts(place: Place) -> list[Part]:
    """The rest of the GPU tests; a failed capture may spoil its process, so it comes last."""
    fails = "test_a_capture_that_fails_is_told_and_training_goes_on"
    core = [
        "engine",
        "overlap",
        "feed",
        "draw",
        "batch_norm",
        "checkpoint",
        "picture_losses",
        "store",
    ]
    return [
        (
            "core tests",
            90,
            place.pytest("-m", "gpu", "-k", f"not {fails}", *(f"tests/test_{n}.py" for n in core)),
            "",
        ),
        ("trainer tests", 50, place.pytest("-m", "gpu", "tests/test_trainer.py"), ""),
        (
            "failed capture",
            30,
            place.pytest("-m", "gpu", "tests/test_engine.py", "-k", fails, processes=1),
            "",
        ),
    ]


def programme() -> str:
    """How long each command may take, for the help; what a bare machine lacks comes before."""
    nowhere = Place(Path(), Path(), {})
    lines = []
    for which, parts in (("first", first_parts(nowhere)), ("second", second_parts(nowhere))):
        minutes = sum(limit_s for _, limit_s, _, _ in parts) / 60
        lines += [f"{which}: {minutes:.1f} minutes at most"]
        lines += [f"  {name}: {limit_s} s at most" for name, limit_s, _, _ in parts]
    lines += [
        f"before both: packages where they are missing, {PACKAGES_LIMIT_S} s, and the native "
        f"library where it is, {LIBRARY_LIMIT_S} s at most; 40 s are expected of the two"
    ]
    return "\n".join(lines)


def prepare(place: Place, wheels: Path | None) -> list[Part]:
    """What a bare machine lacks: packages from a folder of wheels, and the native library."""
    parts: list[Part] = []
    if wheels is not None:
        target = Path(place.environment["PYTHONPATH"].split(os.pathsep)[0])
        files = sorted(map(str, wheels.resolve().glob("*.whl")))
        words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target)]
        parts.append(("packages", PACKAGES_LIMIT_S, place.python(*words, *files), ""))
    # Told first: for want of one package much else fails, each in words of its own.
    parts.append(("required packages", REQUIRED_LIMIT_S, place.python("-c", REQUIRED), ""))
    library = ["sh", "-c", LIBRARY, sys.executable, HAS_CUDA]
    parts.append(("native library", LIBRARY_LIMIT_S, library, ""))
    return parts


def run_part(part: Part, place: Place, log: Path) -> Ended:
    """Run one part; whatever becomes of it, the next one follows."""
    name, limit_s, command, kept = part
    began = time.monotonic()
    print(f"== {name}: at most {limit_s} s", flush=True)
    # A file, no pipe: nobody reads while the command runs, and a full pipe would halt it.
    with log.open("ab+") as file:
        file.write(f"== {name} ==\n".encode())
        file.flush()
        start = file.tell()
        code = run_limited(command, place.environment, limit_s, file)
        if kept:
            with (place.results / kept).open("a") as events:
                events.writelines(f"{json.dumps(event)}\n" for event in events_in(file, start))
        _shorten(file, start)
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
        file.write(b"\n")
    ended = Ended(name, limit_s, round(time.monotonic() - began, 1), code, lines[-4:])
    print("\n".join(f"   {line[:160]}" for line in ended.tail))
    print(f"   exit code {code} after {ended.seconds} s", flush=True)
    return ended


def run_limited(
    command: list[str], environment: dict[str, str], limit_s: int, output: BinaryIO
) -> int:
    """The exit code of a command; past its limit it is ended with all that it began."""
    try:
        # A group of its own, to end its children as well; nobody is there to answer it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except OSError as error:
        output.write(f"{error}\n".encode())
        return 127
    grace_s = min(GRACE_S, limit_s / 4)
    try:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(limit_s - grace_s)
        # Tests then tell what failed so far, a training saves, and any other says where it is.
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        return TIMED_OUT
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def events_in(file: BinaryIO, start: int = 0) -> Iterator[dict]:
    """The JSON objects of a file, one a line, from a place on; all other lines are left out."""
    file.seek(start)
    for line in file:
        if line.startswith(b"{"):
            with suppress(ValueError):  # of a process that was ended while it wrote
                yield json.loads(line)


def _shorten(file: BinaryIO, start: int) -> None:
    """Leave the first and the last of what a part printed, which say most."""
    half = PART_LOG_BYTES // 2
    left_out = file.seek(0, os.SEEK_END) - start - 2 * half
    if left_out <= 0:
        return
    file.seek(-half, os.SEEK_END)
    last = file.read()
    file.truncate(start + half)
    file.write(f"\n... {left_out} bytes are left out ...\n".encode() + last)


def training_rows(events: list[dict]) -> list[dict]:
    """EG/s of each session: faces of both sides from its second status line to its last."""
    sessions: list[list[dict]] = []
    for event in events:
        if event.get("event") == "start" or not sessions:
            sessions.append([])
        sessions[-1].append(event)
    return [row for session in sessions if (row := _session(session))]


def _session(events: list[dict]) -> dict:
    """The row of a session, also of one that was ended; empty where it took no time."""
    steps = [event for event in events if event.get("event") == "step"]
    if len(steps) < 3:
        return {}
    first, last = steps[1], steps[-1]
    iterations, seconds = last["iteration"] - first["iteration"], last["time"] - first["time"]
    stop = next((event for event in events if event.get("event") == "stop"), {})
    return {
        "session": first["iteration"],
        "iterations": iterations,
        "eg_per_s": round(2 * BATCH_SIZE * iterations / seconds) if seconds else None,
        "data_wait": last["data_wait"],
        "peak_mib": last["memory_mib"],
        "exit_code": stop.get("exit_code", ""),
    }


def summary(results: Path) -> str:
    """The tables of everything that was found."""
    parts = _read_list(results / "parts.json")
    sessions: list[dict] = []
    if (events := results / "train.jsonl").exists():
        with events.open("rb") as file:
            sessions = training_rows([*events_in(file)])
    tables = {
        "Parts": (parts, PART_COLUMNS),
        f"Training of {TRAINER} at batch size {BATCH_SIZE}": (sessions, SESSION_COLUMNS),
        "Steps": (_read_list(results / "step.json"), STEP_COLUMNS),
    }
    return "\n".join(f"## {title}\n\n{table(*rows)}" for title, rows in tables.items())


def table(rows: list[dict], columns: str) -> str:
    """Rows as a Markdown table of these columns; what a row lacks stays empty."""
    names = columns.split()
    lines = [names, ["---"] * len(names), *([str(row.get(n, "")) for n in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read_list(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def run_parts(which: str, results: Path, wheels: Path | None) -> int:
    """Run a part of the programme, or both; the number of its commands that failed."""
    results.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="mien-quick-"))
    # What pip installs beside Python, as cmake, is found also where only Python is named.
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    modules = [str(scratch / "site"), str(ROOT / ".typing"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "PYTHONUNBUFFERED": "1",
    }
    place = Place(results.resolve(), scratch, environment)
    ended = [Ended(**part) for part in _read_list(results / "parts.json")]
    lists = {"first": first_parts(place), "second": second_parts(place)}
    names = [*lists] if which == "both" else [which]
    lists[names[0]] = prepare(place, wheels) + lists[names[0]]
    failed = 0
    try:
        for name, part in [(each, part) for each in names for part in lists[each]]:
            ended.append(run_part(part, place, results / f"{name}.log"))
            failed += ended[-1].code != 0
            # After every command, so that what is known stays where the machine is taken away.
            records = [asdict(each) for each in ended]
            _replace(results / "parts.json", json.dumps(records, indent=1))
            _replace(results / "summary.md", summary(results))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return failed


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """Run the parts that are asked for and print the table; 1 where one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=programme(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=("first", "second", "both"), default="both")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/quick", help="folder of results"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder with the packages that are missing here"
    )
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose letters may not be those of an output
        sys.stdout.reconfigure(errors="backslashreplace")
    # What this program began ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = run_parts(args.part, args.results, args.wheels)
    print(summary(args.results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
