"""The short programme for a GPU: what fails or hangs stops nothing; all that was found is told."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mien.benchmarks import bench_step, gpu_quick, gpu_quick_step
from mien.benchmarks.gpu_quick import Place, events_in, run_part, summary, training_rows


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, tmp_path / "scratch", dict(os.environ))


@pytest.fixture
def run_limited(tmp_path, place):
    """The exit code and output of a command within a limit."""

    def run(command, limit_s):
        with (tmp_path / "output").open("wb+") as output:
            code = gpu_quick.run_limited(command, place.environment, limit_s, output)
            output.seek(0)
            return code, output.read().decode()

    return run


def test_a_failing_part_is_told_and_the_next_one_runs(place, monkeypatch, capsys):
    parts = [
        ("fails", 20, place.python("-c", "import sys; print('why'); sys.exit(3)"), ""),
        ("is not there", 20, ["/no/such/program"], ""),
        ("works", 20, place.python("-c", 'print(\'{"event": "stop"}\')'), "train.jsonl"),
    ]
    monkeypatch.setattr(gpu_quick, "prepare", lambda place, wheels: [])
    monkeypatch.setattr(gpu_quick, "first_parts", lambda place: parts)
    assert gpu_quick.run_parts("first", place.results, None) == 2
    ended = json.loads((place.results / "parts.json").read_text())
    assert [part["code"] for part in ended] == [3, 127, 0]
    assert ended[0]["tail"] == ["why"]
    assert (place.results / "train.jsonl").read_text() == '{"event": "stop"}\n'
    assert len(list(place.results.iterdir())) <= 8


def test_a_part_past_its_limit_is_ended_with_its_children(place, run_limited):
    """A child that holds the output open would else be waited for."""
    sleeper = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    parent = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {sleeper!r}]); "
        f"print(child.pid, flush=True); {sleeper}"
    )
    code, output = run_limited(place.python("-c", parent), 3)
    assert code == gpu_quick.TIMED_OUT
    state = subprocess.run(["ps", "-o", "stat=", output.strip()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z"), "the child still runs"


def test_a_part_past_its_limit_tells_what_failed_so_far(place, run_limited, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\n"
        "def test_wrong():\n    assert 6 * 7 == 41\n"
        "def test_hangs():\n    time.sleep(600)\n"
    )
    code, output = run_limited(place.pytest(str(tmp_path), processes=1), 20)
    assert code == gpu_quick.TIMED_OUT
    assert "FAILURES" in output
    assert "assert (6 * 7) == 41" in output


def test_a_test_that_hangs_is_named_and_the_others_run(place, run_limited, tmp_path, monkeypatch):
    """It waits without the interpreter, as for a GPU, so that no signal reaches it."""
    monkeypatch.setattr(gpu_quick, "TEST_LIMIT_S", 5)
    (tmp_path / "test_hanging.py").write_text(
        "import ctypes\n"
        "def test_hangs():\n"
        "    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    library.pthread_mutex_lock(mutex)\n"
        "    library.pthread_mutex_lock(mutex)\n"
        "def test_sound():\n    pass\n"
    )
    code, output = run_limited(place.pytest(str(tmp_path), processes=2), 240)
    assert code == 1
    assert "crashed while running" in output
    assert "test_hangs" in output
    assert "1 failed, 1 passed" in output


def test_what_a_part_printed_is_in_the_log_before_it_ends(place):
    """The machine may be taken away in the midst of a part."""
    log = place.results / "first.log"
    code = f"print('so far', flush=True); print(open({str(log)!r}).read())"
    run_part(("reads", 20, place.python("-c", code), ""), place, log)
    assert log.read_text().count("so far") == 2


def test_a_part_that_prints_all_numbers_leaves_its_first_and_last(place, monkeypatch):
    monkeypatch.setattr(gpu_quick, "PART_LOG_BYTES", 100)
    log = place.results / "first.log"
    code = "print('first'); print('7' * 1000); print('last')"
    ended = run_part(("prints", 20, place.python("-c", code), ""), place, log)
    assert ended.tail[-1] == "last"
    text = log.read_text()
    assert text.startswith("== prints ==\nfirst\n777")
    assert "\n... 912 bytes are left out ...\n777" in text
    assert text.endswith("777\nlast\n\n")
    assert len(text) < 200


def test_packages_that_are_missing_are_named(place, run_limited):
    def ended(*options):
        return run_limited(
            place.python(*options, "-c", gpu_quick.REQUIRED), gpu_quick.REQUIRED_LIMIT_S
        )

    code, output = ended()
    assert code == 0
    assert f"torch {version('torch')}, " in output  # its own says its build, too
    code, output = ended("-S", "-I")  # Python's own modules alone
    assert code == 1
    missing = output.splitlines()[-1]
    assert missing.startswith("missing: torch, triton, numpy, opencv-python-headless, cffi, ")
    assert "pycparser, pytest, pytest-timeout, pytest-xdist; put their wheels" in missing


def test_wheels_are_there_before_the_library_is_tried(tmp_path, monkeypatch):
    """Without them it cannot be loaded, and would be built for nothing."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/a.whl").touch()
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, tmp_path, {"PYTHONPATH": "site:else"})
    packages, required, library = gpu_quick.prepare(place, Path("wheels"))
    assert [packages[0], required[0], library[0]] == [
        *("packages", "required packages", "native library")
    ]
    assert packages[2][-3:] == ["--target", "site", str(tmp_path / "wheels/a.whl")]


@pytest.mark.parametrize(
    ("probes", "expected"), [("1", ""), ("01", "built\n"), ("00", "built\nno kernels\n")]
)
def test_the_library_is_built_where_it_is_missing(run_limited, tmp_path, probes, expected):
    """And looked at again: one that was built without nvcc has no kernels."""
    python = tmp_path / "python"
    (tmp_path / "probes").write_text(probes)
    python.write_text(
        f"#!/bin/sh\ncd {tmp_path}\n"
        "if [ $1 = setup.py ]; then echo built; exit; fi\n"
        "probe=$(cut -c1 probes); cut -c2- probes > rest; mv rest probes\n"
        "[ $probe = 1 ] || { [ -s probes ] && grep -q . probes || echo no kernels; exit 1; }\n"
    )
    python.chmod(0o755)
    code, output = run_limited(["sh", "-c", gpu_quick.LIBRARY, str(python), "probe"], 20)
    assert (code == 0, output) == (expected != "built\nno kernels\n", expected)


def test_a_file_of_tests_that_cannot_be_imported_stops_no_other(place, run_limited, tmp_path):
    (tmp_path / "test_broken.py").write_text("import there_is_no_such_package\n")
    (tmp_path / "test_sound.py").write_text("def test_it():\n    pass\n")
    code, output = run_limited(place.pytest(str(tmp_path), processes=1), 60)
    assert code == 1
    assert "1 passed, 1 error" in output


def test_every_part_names_tests_and_files_that_exist(place):
    root = gpu_quick.ROOT
    for _, _, command, _ in gpu_quick.first_parts(place) + gpu_quick.second_parts(place):
        files = [word for word in command if word.endswith(".py")]
        assert all((root / word).is_file() for word in files), command
    fails = gpu_quick.second_parts(place)[-1][2][-1]
    assert f"def {fails}" in (root / "tests/test_engine.py").read_text()


@pytest.mark.slow
def test_no_part_asks_for_emulated_kernels(place, run_limited):
    """They take minutes to be compiled, into a cache that the parts do without."""
    root, num_parts = gpu_quick.ROOT, 0
    for name, _, command, _ in gpu_quick.first_parts(place) + gpu_quick.second_parts(place):
        files = [root / word for word in command if word.startswith("tests/")]
        if any(re.search("emulated|processor", file.read_text()) for file in files):
            code, output = run_limited([*command, "--collect-only", "-n", "0"], 240)
            assert code == 0, name
            assert "emulated" not in output
            num_parts += 1
    assert num_parts > 0


def test_the_limits_keep_the_time_that_is_promised(place):
    """Under 6 and under 3 minutes; a bare machine's packages and build take some 40 s besides."""
    assert sum(part[1] for part in gpu_quick.first_parts(place)) + 40 < 360
    assert sum(part[1] for part in gpu_quick.second_parts(place)) < 180


def _step(iteration, seconds):
    fields = {"data_wait": 0.0, "memory_mib": 1200.0}
    return {"event": "step", "iteration": iteration, "time": seconds} | fields


def test_sessions_and_steps_stand_in_the_table(tmp_path):
    events = [_step(1, 0.0), _step(100, 2.0), _step(1100, 4.0), {"event": "stop", "exit_code": 0}]
    (row,) = training_rows(events)
    assert (row["iterations"], row["eg_per_s"], row["exit_code"]) == (1000, 16000, 0)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [{"model": "original", "eg_per_s": 12000.0}, {"model": "dfaker", "error": "no room"}]
    (tmp_path / "step.json").write_text(json.dumps(rows))
    text = summary(tmp_path)
    assert "| 100 | 1000 | 16000 | 0.0 | 1200.0 | 0 |" in text
    assert "12000.0" in text
    assert "no room" in text


def test_a_session_that_was_ended_has_a_row_of_its_own(tmp_path):
    """Its time must not reach into the next one's."""
    events = [{"event": "start"}, *(_step(number, number / 100) for number in (1, 100, 1100))]
    events += [
        {"event": "start"},
        *(_step(2000 + number, 60.0 + number / 10) for number in range(3)),
    ]
    events += [{"event": "stop", "exit_code": 0}]
    ended, resumed = training_rows(events)
    assert (ended["iterations"], ended["eg_per_s"], ended["exit_code"]) == (1000, 3200, "")
    assert (resumed["iterations"], resumed["eg_per_s"], resumed["exit_code"]) == (1, 320, 0)


def test_half_an_event_costs_no_table(tmp_path):
    """A training that is ended may stop in the midst of a line."""
    path = tmp_path / "train.jsonl"
    path.write_text('words\n{"event": "start"}\n{"event": "st')
    with path.open("rb") as file:
        assert [*events_in(file)] == [{"event": "start"}]
    assert "## Steps" in summary(tmp_path)


def test_a_row_that_fails_costs_no_other(tmp_path, monkeypatch):
    """Not its own process either: a new one measures the rest."""
    starts = []

    def step_row(what, make, device, ceilings, how):
        if len(starts) == 1 and what["without"] == "adam":
            return what | {"error": "illegal access"}
        if len(starts) == 2 and what["without"] == "align":
            raise SystemExit(-11)
        return what | {"eg_per_s": 1.0}

    def run(command, check):
        starts.append(int(command[-1]))
        try:
            gpu_quick_step.measure_from(starts[-1], tmp_path, torch.device("cpu"))
        except SystemExit as error:
            return subprocess.CompletedProcess(command, error.code)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_step, "step_row", step_row)
    monkeypatch.setattr(gpu_quick_step, "planned_mib", lambda *_: 1)
    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "step.json").write_text("[{}]")  # of an earlier run
    gpu_quick_step.measure_all(tmp_path)
    rows = json.loads((tmp_path / "step.json").read_text())
    assert starts == [0, 4, 5]
    assert len(rows) == len(gpu_quick_step.ROWS)
    assert [row.get("error") for row in rows[3:6]] == [
        "illegal access",
        "ended by exit code -11",
        None,
    ]
    assert [row["without"] for row in rows[:8]] == ["", *bench_step.LEVERS]


def test_it_starts_with_nothing_but_python(tmp_path):
    """On a bare machine its packages come first."""
    command = [
        sys.executable,
        "-S",
        "-I",
        str(gpu_quick.ROOT / "benchmarks/gpu_quick.py"),
        "--help",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "first: 5.2 minutes at most" in shown
    assert "train: 60 s at most" in shown


def test_a_part_that_works_leaves_its_output_in_the_log(place):
    part = ("greets", 20, place.python("-c", "print('hello')"), "")
    assert run_part(part, place, place.results / "first.log").code == 0
    assert (place.results / "first.log").read_text() == "== greets ==\nhello\n\n"
