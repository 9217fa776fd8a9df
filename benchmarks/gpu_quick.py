"""The most telling figures of a GPU in ten minutes, for a card that is there for a short time.

    make gpu-quick                      # both parts, in the project's environment
    python3 benchmarks/gpu_quick.py first --results out/ --wheels wheels/   # on a bare machine
    python3 benchmarks/gpu_quick.py second --results out/

`first` takes less than 6 minutes and `second` less than 3 on a card of the H100's class, by
expectation, as neither ran on one: each command has a limit, which `--help` names, and one that
fails or runs into its limit never stops the next. It needs no network:
packages that the machine lacks lie as wheels in a folder. It imports nothing but Python's own
modules, so it starts on any machine; all else runs in processes of its own.

The folder of results gets at most seven files: `first.log` and `second.log` (all output),
`step.json` (each step with every lever, and without one of them), `kernels.txt` (kernels of a
replay), `train.jsonl` (events of training and of its resume), `parts.json` (how each part ended)
and `summary.md` (the table that is printed at the end).
"""

# ruff: noqa: T201 - it runs where mien does not: its reader is a person beside the machine

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER, BATCH_SIZE = "original", 16
TIMED_OUT = 124
PACKAGES_LIMIT_S, REQUIRED_LIMIT_S, BUILD_LIMIT_S = 20, 10, 90
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
    draw_folder(Path(r"{scratch}") / side, identity=side, count=100, size_px=256)
"""
# DALI is not asked for: OpenCV stands in for it.
REQUIRED = r"""
import re, sys, tomllib
from importlib.metadata import distributions
lines = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
names = [re.match(r"[\w-]+", line)[0] for line in lines if "dali" not in line]
missing = [name for name in names if not any(distributions(name=name))]
if missing:
    sys.exit(f"missing: {', '.join(missing)}; put their wheels into a folder, for --wheels")
"""
HAS_CUDA = "from mien.kernels import native; assert native.library()[1].mien_has_cuda()"


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
        """Tests, in several processes where pytest-xdist is there."""
        several = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
        # A file that cannot be imported, for want of a package, must not stop the others.
        options = ["-p", "no:cacheprovider", "--timeout=120", "--continue-on-collection-errors"]
        return self.python("-m", "pytest", "-q", *options, *several, *words)

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
        ("card", 10, ["nvidia-smi"], ""),
        ("faces", 15, place.python("-c", FACES.format(scratch=scratch)), ""),
        (
            "train",
            60,
            place.mien(*train, *sides, "-t", TRAINER, "-b", str(BATCH_SIZE), "-i", "4000"),
            "train.jsonl",
        ),
        ("resume", 25, place.mien(*train, "-i", "500"), "train.jsonl"),
        ("step", 100, place.python(STEP, str(place.results)), ""),
        ("triton numerics", 60, place.pytest("-k", *quick, processes=14), ""),
        (
            "cuda numerics",
            40,
            place.pytest(
                *("-m", "gpu"),
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
        f"before both, where they are missing: packages, {PACKAGES_LIMIT_S} s, and the native "
        f"library, {BUILD_LIMIT_S} s at most; 40 s are expected of the two"
    ]
    return "\n".join(lines)


def prepare(place: Place, wheels: Path | None) -> list[Part]:
    """What a bare machine lacks: packages from a folder of wheels, and the native library."""
    parts: list[Part] = []
    if wheels is not None:
        target = Path(place.environment["PYTHONPATH"].split(os.pathsep)[0])
        files = sorted(map(str, wheels.glob("*.whl")))
        words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target)]
        parts.append(("packages", PACKAGES_LIMIT_S, place.python(*words, *files), ""))
    # Told first: for want of one package much else fails, each in words of its own.
    parts.append(("required packages", REQUIRED_LIMIT_S, place.python("-c", REQUIRED), ""))
    probe = subprocess.run(
        place.python("-c", HAS_CUDA),
        env=place.environment,
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        build = place.python("setup.py", "build_ext", "--inplace")
        parts.append(("build", BUILD_LIMIT_S, build, ""))
    return parts


def run_part(part: Part, place: Place, log: Path) -> Ended:
    """Run one part; whatever becomes of it, the next one follows."""
    name, limit_s, command, kept = part
    began = time.monotonic()
    print(f"== {name}: at most {limit_s} s", flush=True)
    code, output = run_limited(command, place.environment, limit_s)
    with log.open("a") as file:
        file.write(f"== {name} ==\n{output}\n")
    lines = output.splitlines()
    if kept:
        with (place.results / kept).open("a") as file:
            file.writelines(f"{line}\n" for line in lines if line.startswith("{"))
    ended = Ended(name, limit_s, round(time.monotonic() - began, 1), code, lines[-4:])
    print("\n".join(f"   {line[:160]}" for line in ended.tail))
    print(f"   exit code {code} after {ended.seconds} s", flush=True)
    return ended


def run_limited(command: list[str], environment: dict[str, str], limit_s: int) -> tuple[int, str]:
    """The exit code and output of a command; past its limit it is killed with all that it began."""
    # A file, no pipe: nobody reads while the command runs, and a full pipe would halt it.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = TIMED_OUT
        output.seek(0)
        return code, output.read()


def training_rows(events: list[dict]) -> list[dict]:
    """EG/s of each session: faces of both sides from its second status line to its last."""
    rows: list[dict] = []
    steps: list[dict] = []
    for event in events:
        if event.get("event") == "step":
            steps.append(event)
        elif event.get("event") == "stop" and len(steps) > 2:
            rows.append(_session(steps) | {"exit_code": event["exit_code"]})
            steps = []
    return rows


def _session(steps: list[dict]) -> dict:
    first, last = steps[1], steps[-1]
    iterations, seconds = last["iteration"] - first["iteration"], last["time"] - first["time"]
    return {
        "session": first["iteration"],
        "iterations": iterations,
        "eg_per_s": round(2 * BATCH_SIZE * iterations / seconds) if seconds else None,
        "data_wait": last["data_wait"],
        "peak_mib": last["memory_mib"],
    }


def summary(results: Path) -> str:
    """The tables of everything that was found."""
    parts = _read_list(results / "parts.json")
    events = results / "train.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    sessions = training_rows([json.loads(line) for line in lines])
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
    """Run a part of the programme; the number of its commands that failed."""
    results.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="mien-quick-"))
    paths = [str(scratch / "site"), str(ROOT / ".typing"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    place = Place(results.resolve(), scratch, environment)
    ended = [Ended(**part) for part in _read_list(results / "parts.json")]
    failed = 0
    try:
        parts_of = first_parts if which == "first" else second_parts
        for make in (partial(prepare, wheels=wheels), parts_of):
            for part in make(place):
                ended.append(run_part(part, place, results / f"{which}.log"))
                failed += ended[-1].code != 0
                # After every command, so that what is known stays where the machine is taken away.
                records = [asdict(each) for each in ended]
                (results / "parts.json").write_text(json.dumps(records, indent=1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return failed


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
    parts = ("first", "second") if args.part == "both" else (args.part,)
    failed = sum(run_parts(part, args.results, args.wheels) for part in parts)
    table = summary(args.results)
    (args.results / "summary.md").write_text(table)
    print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
