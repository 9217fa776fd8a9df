"""Several processes by `mien train --gpus`: a lost rank, a restart, the end of a launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import train_words

from mien.cli import launch, main
from mien.core.checkpoint.generations import Generations


def _children(pid):
    """Processes that a process has started and that run, by their ranks."""
    children = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [each.partition(b"=")[2] for each in variables if each.startswith(b"RANK=")]
        children[int(ranks[0])] = int(child)
    return children


def _until(event, lines):
    """Read events up to one of a kind; that one."""
    for line in lines:
        told = json.loads(line)
        if told["event"] == event:
            return told
    return pytest.fail(f"the output has ended without {event}")


@pytest.fixture
def launched(sides, tmp_path):
    """A launcher of two ranks of the CPU, which ends with the test; its streams are pipes."""
    words = train_words(sides, tmp_path / "model", "-b", "4", "-s", "20", "--json", "--gpus", "2")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-m", "mien.cli", *words, "--restarts", "1"],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **pipes,
    ) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_a_run_goes_on_without_a_lost_rank_and_ends_with_its_launcher(launched, tmp_path):
    """One command: two ranks, of which one is killed; then one rank, whose launcher is killed."""
    lines = launched.stdout
    saved = _until("save", lines)
    ranks = _children(launched.pid)
    os.kill(ranks[1], signal.SIGKILL)
    stop = _until("stop", lines)
    assert stop["exit_code"] == 3
    assert stop["reason"].startswith(f"rank 1 (pid {ranks[1]}) ended with signal 9; iteration ")
    start = _until("start", lines)
    assert start["iteration"] >= saved["iteration"]
    _until("step", lines)
    launched.kill()
    stop = _until("stop", lines)
    assert stop["exit_code"] == 4
    assert lines.read() == "", "the end of the last process that holds it"
    assert stop["iteration"] > start["iteration"]
    assert "mien train: restart 1 of 1 goes on with CPU process 0\n" in launched.stderr.readlines()
    model_dir = tmp_path / "model"
    assert Generations(model_dir).manifests()[0].iterations == stop["iteration"]
    assert not list(model_dir.glob("crash_report*"))


def test_a_restart_trains_what_is_left_of_the_iterations(sides, tmp_path, monkeypatch):
    """The command of each start: of the first one, and of a restart after a save."""
    model_dir = tmp_path / "model"
    words = train_words(sides, model_dir, "-b", "4")
    assert main([*words, "-i", "2"]) == 0
    launched = {}

    def run(command, places, **more):
        assert len(places) == 2
        assert main([*words, "-i", "1"]) == 0  # what the ranks have saved before one was lost
        launched.update({restart: command(restart) for restart in (0, 1)}, saved=more["saved"]())
        return 3

    monkeypatch.setattr(launch, "launch", run)
    more = ("--gpus", "2", "-i", "5", "--restarts", "1")
    assert main([*words, *more]) == 3
    alone = ("--gpus=", "--exclude-gpus=", "--restarts=0")
    first = [sys.executable, "-P", "-m", "mien.cli", *words, *more, *alone]
    assert launched == {0: first, 1: [*first, "--until=7"], "saved": "iteration 3 is saved"}
    assert main([*first[4:], "--until=7"]) == 0
    assert Generations(model_dir).manifests()[0].iterations == 7
