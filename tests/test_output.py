"""Outputs whose reader leaves: closed terminals, full disks, closed handles, readers that sleep."""

import errno
import fcntl
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import warnings

import pytest
from conftest import train_words

from mien.cli import main
from mien.core.console.reporter import Reporter
from mien.core.system.output import Output, OutputLost, guarded_streams


@pytest.fixture(autouse=True)
def _buffered(monkeypatch):
    """Have programs that are started here write as they do for a user."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


STEP = {"loss_a": 0.25, "loss_b": 0.25, "eg_per_s": 100.0, "data_wait": 0.0}


class Refusing(io.StringIO):
    """A stream that refuses whatever is written, from some write on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


REFUSALS = [
    *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ENOSPC, errno.EPIPE)),
    *(OSError(number, os.strerror(number)) for number in (errno.EBADF, errno.EAGAIN, errno.EDQUOT)),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_any_refusal_of_an_output_means_that_its_reader_is_gone(tmp_path, error, terminal, after):
    reporter = Reporter(Refusing(error, after), terminal=terminal)
    reporter.keep_in(events=tmp_path / "events.jsonl", log_file=None, level="info")
    reporter.start({"model": "original"})
    with reporter.progress("Decoding faces") as tell:
        tell(1, 2)
    reporter.step(iteration=1, **STEP)
    reporter.warning("told to nobody")
    reporter.step(iteration=2, **STEP)
    reporter.stop(iteration=2, reason="done", exit_code=0)
    kept = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()]
    assert kept == ["start", "step", "warning", "step", "stop"]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_what_a_command_was_called_for_is_missed(error):
    output = Output(Refusing(error, after=1))
    output.write("the figures")
    output.require()
    assert output.write("and more") == 8
    with pytest.raises(OutputLost) as told:
        output.require()
    assert str(told.value) == (getattr(error, "strerror", None) or str(error))
    assert told.value.reader_has_left == isinstance(error, BrokenPipeError)


def test_a_program_without_an_output_writes_to_nobody():
    reporter = Reporter(None if sys.stdout is None else Output(None))
    reporter.step(iteration=1, **STEP)
    reporter.stop(iteration=1, reason="done", exit_code=0)


def test_what_a_library_prints_to_nobody_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Refusing(OSError(errno.EIO, "Input/output error")))
    monkeypatch.setattr(sys, "stderr", Refusing(OSError(errno.EIO, "Input/output error")))
    with guarded_streams():
        print("of a library")
        print("of another", file=sys.stderr, flush=True)
        warnings.warn("and a warning", UserWarning, stacklevel=1)


def test_letters_that_an_output_has_not_are_escaped():
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    Output(latin).write("gesichter_\udce4 ä é \u4e2d\n")
    assert latin.buffer.getvalue() == b"gesichter_\\udce4 \xe4 \xe9 \\u4e2d\n"


def test_what_was_written_before_reaches_nobody_when_the_program_ends():
    code = (
        "import sys\n"
        "from mien.core.console.reporter import Reporter\n"
        "reporter = Reporter(as_json=True)\n"
        "sys.stdout.write('in a buffer')\n"
        "reporter.warning('x')\n"
        "print('done', file=sys.stderr)\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"done\n")


# Commands

LOST = (
    "mien{}: cannot write the output: No space left on device; free space, or have it go "
    "elsewhere\n"
)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "--print-config"], " train"),
        (["preset", "list"], " preset"),
        (["recipe", "show", "standard", "--json"], " recipe"),
        (["--help"], ""),
    ],
)
def test_a_command_whose_output_is_lost_says_so(words, name):
    command = [sys.executable, "-m", "mien.cli", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, LOST.format(name))


def test_a_reader_that_has_seen_enough_is_no_mistake():
    command = [sys.executable, "-m", "mien.cli", "train", "--print-config"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mistake_is_told_by_the_exit_code_where_nobody_reads_the_line():
    command = [sys.executable, "-m", "mien.cli", "preset", "show", "no such"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stderr=full, check=False)
    assert done.returncode == 2


HANDLES = """
import os, sys
from mien.core.system.output import guarded_streams
with guarded_streams():
    opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.write(1, b"of a library")
    os.write(2, b"of a library")
    print("of ours", flush=True)
    print("of ours", file=sys.stderr, flush=True)
    os.write(opened, b"%d" % opened)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_output(tmp_path, closed):
    path = tmp_path / "weights"
    subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, HANDLES, str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    assert int(path.read_text()) > 2


# Trainings


def _train(sides, model_dir, *more):
    settings = ("-b", "4", "--set", "train.log_interval=1")
    return [sys.executable, "-m", "mien.cli", *train_words(sides, model_dir, *settings, *more)]


def _saved(model_dir):
    return json.loads((model_dir / "state.json").read_text())["iterations"]


def _told(model_dir):
    lines = (model_dir / "logs/session_1/events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


ON_ITS_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv"


@pytest.mark.slow
def test_a_terminal_that_is_closed_loses_nothing(sides, tmp_path):
    master, slave = os.openpty()
    words = _train(sides, tmp_path / "model", "-s", "100000")
    started = subprocess.Popen(
        [sys.executable, "-c", f"{ON_ITS_TERMINAL}(sys.argv[1], sys.argv[1:])", *words],
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    while (shown := max(map(int, re.findall(rb"\[#(\d+)\]", seen)), default=0)) < 8:
        seen += os.read(master, 4096)
    os.close(master)  # the kernel sends SIGHUP, and every write fails with EIO
    assert started.wait(300) == 4
    stop = _told(tmp_path / "model")[-1]
    assert stop["reason"] == "SIGHUP received; the state is saved"
    assert _saved(tmp_path / "model") == stop["iteration"] >= shown


@pytest.mark.slow
def test_sigterm_ends_a_run_whose_reader_sleeps(sides, tmp_path):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 16384)
    words = _train(sides, tmp_path / "model", "--json", "-s", "100000")
    started = subprocess.Popen(words, stdout=writing)
    waiting = select.poll()
    waiting.register(writing, select.POLLOUT)
    while waiting.poll(0):  # until the pipe is full, and the run waits for its reader
        select.select([], [], [], 0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(300) == 4
    os.close(reading)
    os.close(writing)
    stop = _told(tmp_path / "model")[-1]
    assert _saved(tmp_path / "model") == stop["iteration"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("end", [">/dev/full 2>&1", ">&- 2>&- <&-"])
def test_a_training_is_done_though_nobody_can_read_of_it(sides, tmp_path, end):
    words = _train(sides, tmp_path / "model", "-i", "3", "--warp-to-landmarks", "--no-warp")
    done = subprocess.run(["sh", "-c", f'"$@" {end}', "sh", *words], check=False)
    assert done.returncode == 0
    assert _saved(tmp_path / "model") == 3
    assert [event["event"] for event in _told(tmp_path / "model")][-1] == "stop"


def test_a_command_in_this_process_leaves_the_streams_as_they_were(capsys):
    before = sys.stdout, sys.stderr
    assert main(["preset", "show", "no such"]) == 2
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().err.startswith("mien preset: no preset 'no such'")
