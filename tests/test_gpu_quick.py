"""The short programme for a GPU: what fails or hangs stops nothing; all that was found is told."""

import json
import os
import subprocess
import sys

import pytest

from mien.benchmarks import gpu_quick
from mien.benchmarks.gpu_quick import Place, run_limited, run_part, summary, training_rows


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, tmp_path / "scratch", dict(os.environ))


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


def test_a_part_past_its_limit_is_ended_with_its_children(place):
    """A child that holds the output open would else be waited for."""
    sleeper = "import time; time.sleep(600)"
    parent = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {sleeper!r}]); "
        f"print(child.pid, flush=True); {sleeper}"
    )
    code, output = run_limited(place.python("-c", parent), place.environment, 3)
    assert code == gpu_quick.TIMED_OUT
    state = subprocess.run(["ps", "-o", "stat=", output.strip()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z"), "the child still runs"


def test_packages_that_are_missing_are_named(place):
    def ended(*options):
        command = place.python(*options, "-c", gpu_quick.REQUIRED)
        return run_limited(command, place.environment, gpu_quick.REQUIRED_LIMIT_S)

    assert ended() == (0, "")
    code, output = ended("-S", "-I")  # Python's own modules alone
    assert code == 1
    assert output.startswith("missing: torch, triton, numpy, opencv-python-headless, cffi, ")


def test_a_file_of_tests_that_cannot_be_imported_stops_no_other(place, tmp_path):
    (tmp_path / "test_broken.py").write_text("import there_is_no_such_package\n")
    (tmp_path / "test_sound.py").write_text("def test_it():\n    pass\n")
    command = place.pytest(str(tmp_path), processes=1)
    code, output = run_limited(command, place.environment, 60)
    assert code == 1
    assert "1 passed, 1 error" in output


def test_every_part_names_tests_and_files_that_exist(place):
    root = gpu_quick.ROOT
    for _, _, command, _ in gpu_quick.first_parts(place) + gpu_quick.second_parts(place):
        files = [word for word in command if word.endswith(".py")]
        assert all((root / word).is_file() for word in files), command
    fails = gpu_quick.second_parts(place)[-1][2][-1]
    assert f"def {fails}" in (root / "tests/test_engine.py").read_text()


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
