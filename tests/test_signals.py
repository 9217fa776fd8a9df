"""Signals: those that end a run, those that ask something of it, and those that are ignored."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import train_words

from mien.cli import main
from mien.core.console.keyboard import Keyboard
from mien.core.console.requests import Requests
from mien.core.console.stop import Interrupted, StopRequest
from mien.core.data.feed import Feed
from mien.core.data.sides import open_sides

SIX = [
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP),
]


@pytest.fixture
def ignored(request):
    """A signal that whoever started the program has it ignore."""
    before = signal.signal(request.param, signal.SIG_IGN)
    yield request.param
    signal.signal(request.param, before)


@pytest.fixture
def terminal():
    """The program's end of a terminal."""
    master, slave = os.openpty()
    yield slave
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("ignored", SIX, indirect=True)
def test_a_signal_that_was_ignored_stays_ignored(ignored, terminal):
    other = signal.SIGINT if ignored == signal.SIGTERM else signal.SIGTERM
    with Requests() as requests, Keyboard(terminal):
        os.kill(os.getpid(), ignored)
        os.kill(os.getpid(), signal.SIGCONT)
        assert (requests.stop.signal_name, requests.take()) == (None, set())
        os.kill(os.getpid(), other)
        assert requests.stop.signal_name == other.name
        os.kill(os.getpid(), ignored)
        assert signal.getsignal(ignored) is signal.SIG_IGN
    assert signal.getsignal(ignored) is signal.SIG_IGN


def _train(sides, model_dir, *more):
    settings = ("-b", "4", "--set", "train.log_interval=2")
    return main(train_words(sides, model_dir, *settings, *more))


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT], indirect=True)
def test_a_run_outlives_what_it_is_to_ignore(sides, tmp_path, monkeypatch, capsys, ignored):
    following = Feed.next

    def send(self, faces_seen):
        os.kill(os.getpid(), ignored)
        return following(self, faces_seen)

    monkeypatch.setattr(Feed, "next", send)
    assert _train(sides, tmp_path / "model", "-i", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["iteration"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_training_a_signal_ends_at_once_and_the_same_line_begins_anew(
    sides, tmp_path, monkeypatch, capsys, number
):
    def decode(*_, **__):
        os.kill(os.getpid(), number)
        pytest.fail("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr("mien.core.training.training_data.open_sides", decode)
        assert _train(sides, tmp_path / "model", "-i", "1") == 4
    assert capsys.readouterr().err == f"mien train: {number.name} received before training began\n"
    assert not list(tmp_path.glob("model/crash_report_*"))
    assert _train(sides, tmp_path / "model", "-i", "1") == 0


def test_in_a_change_of_stages_a_signal_ends_at_once_with_the_stage_saved(
    sides, tmp_path, monkeypatch, capsys
):
    recipe = tmp_path / "two.toml"
    recipe.write_text('[[stage]]\nname = "learn"\niterations = 2\n[[stage]]\niterations = 2\n')
    words = ("--recipe", str(recipe), "-i", "4", "--json")
    openings = []

    def opening(*given, **named):
        openings.append(given)
        if len(openings) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it goes on")
        return open_sides(*given, **named)

    monkeypatch.setattr("mien.core.training.training_data.open_sides", opening)
    assert _train(sides, tmp_path / "model", *words) == 4
    captured = capsys.readouterr()
    stop = json.loads(captured.out.splitlines()[-1])
    assert captured.err == ""
    assert (stop["iteration"], stop["exit_code"]) == (2, 4)
    assert stop["reason"] == "SIGTERM received; the state is saved"
    assert _train(sides, tmp_path / "model", *words[2:], "-i", "2") == 0


ASKED = """
import sys
from mien.core.console.stop import Interrupted, StopRequest
with StopRequest() as stop:
    stop.when_noted.append(lambda: print(stop.signal_name, flush=True))
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("signals", "ends"),
    [
        ("HUP HUP HUP", False),
        ("TERM HUP", False),
        ("INT HUP HUP", False),
        ("HUP TERM", False),
        ("TERM TERM", True),
        ("INT TERM", True),
        ("HUP TERM INT", True),
    ],
)
def test_the_second_one_ends_it_unless_the_terminal_was_closed(signals, ends):
    numbers = [signal.Signals[f"SIG{name}"] for name in signals.split()]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", ASKED], text=True, **pipes)
    assert child.stdout.readline() == "ready\n"
    noted = numbers[:-1] if ends else numbers
    for number in noted:
        child.send_signal(number)
        assert child.stdout.readline() == f"{numbers[0].name}\n"
    if ends:
        child.send_signal(numbers[-1])
    else:
        child.stdin.close()
    assert child.wait(300) == (-numbers[-1] if ends else 0)
    child.stdin.close()
    child.stdout.close()


def test_one_of_several_processes_notes_a_signal_once_and_is_ended_by_none():
    noted = []
    with StopRequest(can_insist=False) as stop:
        stop.when_noted.append(lambda: noted.append(stop.signal_name))
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert noted == ["SIGTERM"]


def test_where_nothing_is_to_be_saved_a_signal_ends_even_a_call_that_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with StopRequest() as stop:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted, match="SIGTERM received"), stop.at_once():
            open(tmp_path / "pipe")
        with pytest.raises(Interrupted, match="SIGTERM received"), stop.at_once():
            pytest.fail("it was told to stop")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
