"""What a run tells, as lines, as JSON and as TensorBoard events."""

import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from mien.core.config import from_dict
from mien.core.console import tensorboard, wandb_log
from mien.core.console.event_files import older_file
from mien.core.console.reporter import Reporter
from mien.core.console.status_line import duration, fitted, status_text
from mien.core.console.tensorboard import LogError, Logs, NullLog, TensorBoardLog, open_log
from mien.core.console.wandb_log import WandbLog
from mien.core.training.outputs import open_logs

STEP = {
    "iteration": 12,
    "loss_a": 0.343159,
    "loss_b": 0.334581,
    "eg_per_s": 123.44,
    "data_wait": 0.003,
    "memory_mib": 812.4,
    "learning_rate": 5e-5,
    "session_iterations": 7,
    "elapsed_s": 61.0,
    "saving": None,
    "drawing": None,
    "seconds_left": 753.0,
    "seconds_to_save": 42.0,
}


def tell_everything(reporter: Reporter) -> None:
    reporter.start({"model": "original", "face_set": Path("faces/a"), "threads": 2})
    reporter.step(**STEP)
    reporter.save(iteration=12, path=Path("out/12"), seconds=1.25, mean_loss=0.6)
    reporter.preview(iteration=12, path=Path("out/preview.png"))
    reporter.warning("side A has 40 faces")
    reporter.stop(iteration=13, reason="signal", exit_code=4)


def test_json_events():
    stream = io.StringIO()
    tell_everything(Reporter(stream, as_json=True, clock=lambda: 1234.5))
    lines = stream.getvalue().splitlines()
    events = [json.loads(line) for line in lines]
    kinds = [event["event"] for event in events]
    assert kinds == ["start", "step", "save", "preview", "warning", "stop"]
    assert {event["time"] for event in events} == {1234.5}
    assert events[0]["face_set"] == "faces/a"
    assert events[0]["threads"] == 2
    assert events[1] == {"event": "step", "time": 1234.5} | STEP
    assert events[2]["path"] == "out/12"
    assert events[2]["mean_loss"] == 0.6
    assert events[4]["message"] == "side A has 40 faces"
    assert events[5]["exit_code"] == 4


def test_json_stays_json_when_a_loss_is_not_finite():
    stream = io.StringIO()
    reporter = Reporter(stream, as_json=True)
    reporter.step(**STEP | {"loss_a": float("nan"), "loss_b": np.float32(0.5), "eg_per_s": np.inf})
    event = json.loads(stream.getvalue(), parse_constant=lambda word: pytest.fail(word))
    assert (event["loss_a"], event["loss_b"], event["eg_per_s"]) == (None, 0.5, None)


def test_found_rates_are_told_by_strength():
    rates, texts = {"default": 4.85e-4, "extreme": 1.94e-3}, []
    for as_json, picture in ((False, None), (False, Path("out/graph.png")), (True, None)):
        stream = io.StringIO()
        reporter = Reporter(stream, as_json=as_json, clock=lambda: 1234.5)
        reporter.found_rates(rates, chosen="default", picture=picture)
        texts.append(stream.getvalue())
    plain, with_picture, event = texts
    line = "Learning rate found: 0.000485 (default), 0.00194 (extreme); default is chosen"
    assert plain == f"{line}\n"
    assert with_picture == f"{line}. Graph: out/graph.png\n"
    told = {"event": "found_rates", "rates": rates, "chosen": "default", "picture": None}
    assert json.loads(event) == told | {"time": 1234.5}


def test_plain_lines():
    stream = io.StringIO()
    tell_everything(Reporter(stream))
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[:3] == ["model     original", "face set  faces/a", "threads   2"]
    pattern = (
        r"\[\d\d:\d\d:\d\d\] \[#00012\] Loss A: 0\.34316, Loss B: 0\.33458 \| EG/s 123\.4 "
        r"\| left 0:12:33 \| save in 0:00:42 \| wait 0\.3 % \| 812 MiB \| 7 in 0:01:01"
    )
    assert re.fullmatch(pattern, lines[3])
    assert lines[4:] == [
        "Saved iteration 12 to out/12 in 1.2 s - average total loss since last save: 0.60000",
        "Preview: out/preview.png",
        "Warning: side A has 40 faces",
        "Stopped at iteration 13: signal",
    ]


def test_unknown_memory_and_end_are_left_out():
    stream = io.StringIO()
    unknown = ("memory_mib", "session_iterations", "elapsed_s", "seconds_left", "seconds_to_save")
    Reporter(stream).step(**STEP | dict.fromkeys(unknown))
    assert stream.getvalue().endswith("| EG/s 123.4 | wait 0.3 %\n")


@pytest.mark.parametrize(
    ("width", "last"),
    [(200, "7 in 0:01:01"), (80, "left 3 d 4 h"), (92, "save in 0:00:42"), (20, "Loss B: 0.33458")],
)
def test_a_status_line_is_as_long_as_the_terminal_is_wide(width, last):
    text = fitted(status_text(STEP | {"seconds_left": 3600 * 76.2}), width)
    assert text.endswith(last)
    assert len(text) <= max(width, 41)


def test_where_lines_stay_there_is_one_a_minute(tmp_path):
    now = iter(range(1000, 5000, 7))
    streams = {}
    for all_steps in (False, True):
        stream = streams[all_steps] = io.StringIO()
        reporter = Reporter(stream, clock=lambda: float(next(now)))
        log_file = tmp_path / f"{all_steps}.log"
        reporter.keep_in(
            events=tmp_path / f"{all_steps}.jsonl",
            log_file=log_file,
            level="info",
            all_steps=all_steps,
        )
        for iteration in range(1, 21):
            reporter.step(**STEP | {"iteration": iteration})
        reporter.stop(iteration=20, reason="done", exit_code=0)
        printed = [line for line in stream.getvalue().splitlines() if "Loss A" in line]
        kept = [line for line in log_file.read_text().splitlines() if "Loss A" in line]
        events = (tmp_path / f"{all_steps}.jsonl").read_text().splitlines()
        assert len(printed) == (20 if all_steps else 3)
        assert len(kept) == (20 if all_steps else 3)
        assert len(events) == 21
        assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] \[#00001\] Loss.*", printed[0])
        assert re.fullmatch(r"[\d-]+ [\d:]+ INFO +\[#00001\] Loss.*", kept[0]), "one time stamp"


def test_a_terminal_keeps_one_status_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    reporter = Reporter(stream, terminal=True)
    reporter.step(**STEP)
    reporter.step(**STEP | {"iteration": 13})
    reporter.warning("[bold]not markup[/bold]")
    reporter.step(**STEP | {"iteration": 14})
    reporter.stop(iteration=14, reason="done", exit_code=0)
    text = stream.getvalue()
    assert "\x1b[2K" in text  # a line is rewritten in place
    assert text.count("[#00013]") == 2  # once drawn, once more below the warning
    assert "Warning: [bold]not markup[/bold]" in text
    assert text.index("[#00014]") < text.index("Stopped at iteration 14: done")


def test_a_reader_that_leaves_does_not_stop_the_run():
    code = (
        "import sys, time\n"
        "from mien.core.console.reporter import Reporter\n"
        "reporter = Reporter(as_json=True)\n"
        "for step in range(200):\n"
        "    reporter.warning('x' * 2000)\n"
        "print('trained to the end', file=sys.stderr)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == "trained to the end\n"
    child.stderr.close()
    assert child.wait(300) == 0


def test_neither_torch_nor_rich_is_imported_for_reports():
    code = (
        "import sys; from mien.core.console.reporter import Reporter;"
        "Reporter(as_json=True).warning('');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'rich', 'tensorboard')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (753, "0:12:33"), (360000, "100:00:00"), (-3, "0:00:00")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_events_hold_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, 3, enabled=True, first_step=101)
    for step in (101, 102):
        log.scalars(
            {"batch_total": step / 4, "batch_face_a": 0.5, "batch_weighted_b/ssim": 0.25}, step
        )
    log.close()
    events = EventAccumulator(str(tmp_path / "logs/session_3/train"))
    events.Reload()
    assert events.Tags()["scalars"] == ["batch_total", "batch_face_a", "batch_weighted_b/ssim"]
    totals = events.Scalars("batch_total")
    assert [(event.step, event.value) for event in totals] == [(101, 25.25), (102, 25.5)]
    assert totals[0].wall_time == events.Scalars("batch_face_a")[0].wall_time


@pytest.mark.parametrize("size", [0, 1, 300])
def test_a_record_is_framed_as_tensorboard_frames_it(size):
    theirs = io.BytesIO()
    RecordWriter(theirs).write(content := os.urandom(size))
    assert tensorboard._record(content) == theirs.getvalue()


def test_the_events_of_a_long_training_are_means(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("mien.core.console.tensorboard._FINENESS", 10)
    log = TensorBoardLog(tmp_path, 1)
    for step in range(1, 45):
        log.scalars({"batch_total": float(step), "learning_rate": 1e-4}, step, 1000.0 + step)
        if step == 34:
            log.scalars({"evaluate/ssim": 0.5}, step, 1000.0 + step)
    log.close()
    events = EventAccumulator(str(tmp_path / "logs/session_1/train"))
    events.Reload()
    told = [(event.step, event.value, event.wall_time) for event in events.Scalars("batch_total")]
    assert [step for step, _, _ in told] == [*range(1, 20), *range(21, 30, 2), 32, 34, 37, 41, 44]
    assert told[-6:] == [
        *((29, 28.5, 1029.0), (32, 31.0, 1032.0), (34, 33.5, 1034.0), (37, 36.0, 1037.0)),
        *((41, 39.5, 1041.0), (44, 43.0, 1044.0)),
    ]
    assert [event.step for event in events.Scalars("evaluate/ssim")] == [34]


def test_a_flush_leaves_no_iteration_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.tensorboard._FINENESS", 10)
    log = TensorBoardLog(tmp_path, 1, 101)
    (path,) = log.folder.iterdir()
    sizes = []
    for step in (101, 102):
        log.scalars({"batch_total": 1.0}, step)
        sizes.append(path.stat().st_size)
        log.flush()  # as every save does
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3]
    log.close()


def test_no_logs_writes_nothing(tmp_path):
    log = open_log(tmp_path, 1, enabled=False)
    assert isinstance(log, NullLog)
    log.scalars({"batch_total": 1.0}, 1)
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    with pytest.raises(LogError, match=r"^cannot write logs to .*session_1/train: .*--no-logs$"):
        TensorBoardLog(tmp_path, 1)


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, capfd):
    create = TensorBoardLog._create

    def on_a_full_disk(log, ending):
        create(log, ending).close()
        return open("/dev/full", "wb")

    monkeypatch.setattr(TensorBoardLog, "_create", on_a_full_disk)
    log = TensorBoardLog(tmp_path, 1)
    log.scalars({"batch_total": 1.0}, 1)  # into a buffer
    for _ in range(2):
        with pytest.raises(LogError, match="No space left on device; free space"):
            log.flush()
    with pytest.raises(LogError, match="No space left on device; free space"):
        log.close()
    assert capfd.readouterr().err == ""


def test_one_log_that_refuses_costs_the_others_nothing():
    class Log(NullLog):
        """Remembers what reaches it; a full one refuses all of it."""

        def __init__(self, is_full):
            self.steps, self.is_full, self.is_closed = [], is_full, False

        def scalars(self, values, step, wall_time=None):
            self.steps.append(step)
            self.flush()

        def flush(self):
            if self.is_full:
                raise LogError("the disk is full")

        def close(self):
            self.is_closed = True
            self.flush()

    said = []
    full, other = Log(is_full=True), Log(is_full=False)
    log = Logs(full, warn=said.append)
    log.open(functools.partial(TensorBoardLog, Path("/dev/null"), 1))
    log.open(lambda: other)
    for step in (1, 2):
        log.scalars({"batch_total": 1.0}, step)
        log.flush()
    log.close()
    assert (full.steps, other.steps) == ([1], [1, 2])
    assert full.is_closed
    assert other.is_closed
    assert said.pop(0).endswith("--no-logs; no events are written there in this session")
    assert said == [
        "the disk is full; no more events are written there in this session",
        "the disk is full; the last events are lost",
    ]


def test_events_reach_the_disk_without_being_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.tensorboard._SECONDS_BETWEEN_FLUSHES", 0.0)
    log = TensorBoardLog(tmp_path, 1)
    log.scalars({"batch_total": 1.0}, 1)
    (path,) = log.folder.iterdir()
    assert path.stat().st_size > 60
    log.close()


def test_reports_are_kept_whatever_is_shown(tmp_path):
    stream = io.StringIO()
    reporter = Reporter(stream, clock=lambda: 1234.5)
    reporter.warning("told before it was known where to keep it")
    events, log_file = tmp_path / "logs/events.jsonl", tmp_path / "run.log"
    reporter.keep_in(events=events, log_file=log_file, level="warning")
    tell_everything(reporter)
    kept = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = [event["event"] for event in kept]
    assert kinds == ["warning", "start", "step", "save", "preview", "warning", "stop"]
    assert kept[2] == {"event": "step", "time": 1234.5} | STEP
    assert list(reporter.latest) == events.read_text().splitlines()
    told = stream.getvalue().splitlines()
    assert told[1:] == ["Warning: side A has 40 faces"], "a stop that was wished for is no error"
    assert [line[20:] for line in log_file.read_text().splitlines()] == [
        f"WARNING {line}" for line in told
    ]


def test_each_session_has_events_of_its_own(tmp_path):
    reporter = Reporter(io.StringIO())
    for number in (1, 2):
        path = tmp_path / f"{number}.jsonl"
        reporter.keep_in(events=path, log_file=None, level="info")
        reporter.warning(f"of session {number}")
    for number in (1, 2):
        (line,) = (tmp_path / f"{number}.jsonl").read_text().splitlines()
        assert json.loads(line)["message"] == f"of session {number}"


def test_a_line_that_a_full_disk_cut_takes_no_other_with_it(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "save", "ti')
    reporter = Reporter(io.StringIO())
    reporter.keep_in(events=path, log_file=None, level="info")
    reporter.start({"model": "original"})
    torn, start = path.read_text().splitlines()
    assert torn == '{"event": "save", "ti'
    assert json.loads(start)["event"] == "start"


def test_a_full_disk_ends_the_keeping_and_not_the_run():
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.keep_in(events=None, log_file=Path("/dev/full"), level="info")
    tell_everything(reporter)
    told = stream.getvalue()
    line = (
        "Warning: cannot write to /dev/full: No space left on device; nothing more goes there; "
        "free space, or choose another --log-file\n"
    )
    assert told.count("cannot write") == 1
    assert line in told
    assert told.endswith("Stopped at iteration 13: signal\n")


def _numbered(path):
    """The numbers told in a file and in those put aside, oldest first, and the files' sizes."""
    aside = [older_file(path, number) for number in range(9, -1, -1)]
    files = [file for file in aside if file.exists()]
    text = "".join(file.read_text() for file in files)
    numbers = [int(number) for number in re.findall(r"number (\d+)", text)]
    return numbers, [file.stat().st_size for file in files]


@pytest.mark.parametrize("name", ["events.jsonl", "run.log"])
def test_files_of_reports_stay_small_and_keep_the_newest(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mien.core.console.event_files._MOST_BYTES", 2000)
    reporter = Reporter(io.StringIO())
    reporter.keep_in(events=tmp_path / "events.jsonl", log_file=tmp_path / "run.log", level="info")
    for number in range(500):
        reporter.warning(f"number {number}")
    numbers, sizes = _numbered(tmp_path / name)
    assert len(sizes) == 5
    assert 1900 < min(sizes[:-1]) <= max(sizes) <= 2000
    assert numbers == list(range(numbers[0], 500))
    reporter.stop(iteration=1, reason="number 500", exit_code=0)
    assert _numbered(tmp_path / name)[0][-1] == 500


def test_a_log_file_that_another_program_put_aside_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.event_files._MOST_BYTES", 130)
    path = tmp_path / "run.log"
    reporter = Reporter(io.StringIO())
    reporter.keep_in(events=None, log_file=path, level="info")
    reporter.warning("one")
    path.rename(tmp_path / "run.log-2026")
    path.write_text("of another run\n")
    reporter.warning("two, in the same file as one")
    reporter.warning("three")
    assert path.read_text().splitlines()[0] == "of another run"
    assert path.read_text().endswith("three\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.log", "run.log-2026"]


def test_a_log_file_may_be_a_device_or_a_link_and_is_not_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.event_files._MOST_BYTES", 100)
    (tmp_path / "logs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "logs/run.log")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("link", "null"):
        reporter = Reporter(io.StringIO())
        reporter.keep_in(events=None, log_file=tmp_path / name, level="info")
        for _ in range(4):
            reporter.warning("told in more than half of a hundred characters")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "logs", "null"]
    assert len(list((tmp_path / "logs").iterdir())) == 4


def test_a_pipe_without_a_reader_is_refused_and_one_that_is_full_is_left(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    stream = io.StringIO()
    reporter = Reporter(stream)
    with pytest.raises(ValueError, match=r"^log.file .* cannot be written: .*--log-file$"):
        reporter.keep_in(events=None, log_file=path, level="info")
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    reporter.keep_in(events=None, log_file=path, level="info")
    for _ in range(1100):
        reporter.warning("x" * 60)
    os.close(reading)
    assert stream.getvalue().count("nothing more goes there") == 1


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_events_go_into_plain_files_alone(tmp_path, kind):
    path, stream = tmp_path / "events.jsonl", io.StringIO()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    Reporter(stream).keep_in(events=path, log_file=None, level="info")
    assert stream.getvalue().startswith(f"Warning: cannot write to {path}: ")
    assert not (tmp_path / "elsewhere").exists()


def test_status_lines_are_kept_once_a_second(tmp_path):
    now, stream = [1000.0], io.StringIO()
    reporter = Reporter(stream, as_json=True, clock=lambda: now[0])
    reporter.keep_in(events=tmp_path / "events.jsonl", log_file=None, level="info")
    for iteration in range(1, 8):
        fields = {"iteration": iteration, "loss_a": float(iteration), "eg_per_s": 2.0 * iteration}
        reporter.step(**STEP | fields)
        now[0] += 0.5
    reporter.save(iteration=7, path=Path("out/7"))
    kept = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(stream.getvalue().splitlines()) == 8, "all are shown"
    assert [event["event"] for event in kept] == ["step", "step", "step", "step", "save"]
    told = [(event["iteration"], event["loss_a"], event["time"]) for event in kept[:4]]
    assert told == [(1, 1.0, 1000.0), (3, 2.5, 1001.0), (5, 4.5, 1002.0), (7, 6.5, 1003.0)]
    means = {"loss_a": 2.5, "eg_per_s": 5.0}
    means |= {name: pytest.approx(STEP[name]) for name in ("loss_b", "data_wait")}
    assert kept[1] == {"event": "step", "time": 1001.0} | STEP | {"iteration": 3} | means


def test_a_clock_that_was_set_back_silences_nothing(tmp_path):
    now = [1000.0]
    reporter = Reporter(io.StringIO(), clock=lambda: now[0])
    reporter.keep_in(events=tmp_path / "events.jsonl", log_file=None, level="info")
    for iteration in (1, 2, 3):
        reporter.step(**STEP | {"iteration": iteration})
        now[0] -= 500
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 3


NAME = "a\nb\x1b[2J\x9b\u202egnp\u2028\x7f\udce4.png"
ESCAPED = r"a\nb\u001b[2J\u009b\u202egnp\u2028\u007f\xe4.png"


def test_no_name_does_anything_to_a_terminal_or_a_log(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for terminal in (False, True):
        stream = io.StringIO()
        reporter = Reporter(stream, terminal=terminal)
        path = tmp_path / f"{terminal}.log"
        reporter.keep_in(events=None, log_file=path, level="info")
        reporter.start({"faces": NAME, "threads": 2})
        reporter.warning(f"skipped {NAME}: no face")
        reporter.stop(iteration=1, reason=f"{NAME} is gone", exit_code=3)
        texts = [f"faces    {ESCAPED}", "threads  2", f"Warning: skipped {ESCAPED}: no face"]
        texts.append(f"Stopped at iteration 1: {ESCAPED} is gone")
        shown = [line.strip("│ ") for line in _without_styles(stream).splitlines()]
        assert [line for line in shown if line[0] not in "╭╰"] == texts
        assert [line[28:] for line in path.read_text().splitlines()] == texts


def test_json_keeps_a_name_as_it_is_and_is_plain_text(tmp_path):
    stream = io.StringIO()
    reporter = Reporter(stream, as_json=True)
    reporter.keep_in(events=tmp_path / "events.jsonl", log_file=None, level="info")
    reporter.warning(NAME)
    kept = (tmp_path / "events.jsonl").read_text()
    assert kept == stream.getvalue()
    assert kept[:-1].isprintable()
    assert json.loads(kept)["message"] == NAME


def test_events_that_cannot_be_kept_at_all_are_told(tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.keep_in(events=tmp_path / "logs/events.jsonl", log_file=None, level="info")
    assert re.fullmatch(r"Warning: cannot write to .*--no-logs\n", stream.getvalue())
    with pytest.raises(ValueError, match=r"^log.file .* cannot be written: .*--log-file$"):
        reporter.keep_in(events=None, log_file=tmp_path / "logs/run.log", level="info")


def test_a_level_holds_for_json_too():
    stream = io.StringIO()
    tell_everything(Reporter(stream, as_json=True, level="warning"))
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["warning"]


def test_a_start_has_lines_for_people_and_fields_for_programs():
    fields = {"batch_size": 16, "losses": [{"name": "ssim"}]}
    rows = [("batch", "16 a side"), ("changed", "augment.flip: true -> false"), ("", "last")]
    text, events = io.StringIO(), io.StringIO()
    Reporter(text).start(fields, rows)
    assert text.getvalue() == (
        "batch    16 a side\nchanged  augment.flip: true -> false\n         last\n"
    )
    Reporter(events, as_json=True, clock=lambda: 1.0).start(fields, rows)
    assert json.loads(events.getvalue()) == {"event": "start", "time": 1.0} | fields


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_shows_the_start_in_a_frame_as_wide_as_itself(monkeypatch, tmp_path, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    folder = f"/faces/[bold]\x1b[2J{'x' * 150}"
    stream = io.StringIO()
    reporter = Reporter(stream, terminal=True)
    reporter.keep_in(events=None, log_file=tmp_path / "log", level="info")
    reporter.start({}, [("batch", "16 a side"), ("faces a", f"{'many ' * 20}of {folder}")])
    lines = _without_styles(stream).splitlines()
    assert {len(line) for line in lines} == {width}
    assert lines[0].startswith("╭─ mien train ─")
    text = "".join(line.strip("│ ") for line in lines[1:-1])
    assert f"/faces/[bold]\\u001b[2J{'x' * 20}" in text
    assert text.count("x") == 150
    assert "16 a side\n" in (tmp_path / "log").read_text(), "no frame where lines stay"


def test_a_notice_is_no_warning(tmp_path):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.notice("the rate is 0.1, as set")
    assert stream.getvalue() == "Note: the rate is 0.1, as set\n"
    stream = io.StringIO()
    Reporter(stream, level="warning").notice("updated")
    assert stream.getvalue() == ""


def test_tensorboard_gets_the_settings_and_now_and_then_a_preview(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path, 1, settings="[train]\nbatch_size = 3\n")
    for step in (100, 110, 120, 1000):
        log.picture("preview", lambda: (b"\xff\xd8 a picture", (12, 8)), step)
    log.close()
    events = EventAccumulator(str(tmp_path / "logs/session_1/train"))
    events.Reload()
    (text,) = events.Tensors("settings")
    assert b"batch_size = 3" in text.tensor_proto.string_val[0]
    assert events.SummaryMetadata("settings").plugin_data.plugin_name == "text"
    pictures = events.Images("preview")
    assert [picture.step for picture in pictures] == [100, 120, 1000]
    assert {(picture.width, picture.height) for picture in pictures} == {(12, 8)}
    assert pictures[0].encoded_image_string == b"\xff\xd8 a picture"


def test_weights_and_biases_gets_means_pictures_and_settings(tmp_path, monkeypatch):
    """Offline, as W&B keeps it for `wandb sync`: nothing leaves the machine."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    # However slow the machine is, no second row is due.
    monkeypatch.setattr(wandb_log, "_SECONDS_BETWEEN_ROWS", math.inf)
    log = WandbLog("faces", tmp_path / "hero", "0" * 32, {"train": {"batch_size": 3}})
    sent, send = [], log._run.log
    monkeypatch.setattr(
        log._run, "log", lambda row, step: (sent.append((step, row)), send(row, step))
    )
    for step in (1, 2, 3):
        log.scalars({"batch_total": float(step)}, step)
    log.scalars({"evaluate/ssim_a": 0.5}, 3)
    log.picture("preview", lambda: (_jpeg(), (12, 8)), 3)
    # The run went back to a checkpoint: W&B drops what comes with a step that goes back.
    log.scalars({"batch_total": 0.015625}, 2)
    log.close()
    wandb.teardown()  # until then W&B's own process may hold what it has not written
    again = sent.pop()
    assert [(step, *row.items()) for step, row in sent[:3]] == [
        (1, ("iteration", 1), ("batch_total", 1.0)),
        (3, ("iteration", 3), ("batch_total", 2.5)),
        (4, ("iteration", 3), ("evaluate/ssim_a", 0.5)),
    ]
    assert [(step, [*row]) for step, row in sent[3:]] == [(5, ["iteration", "preview"])]
    assert again == (6, {"iteration": 2, "batch_total": 0.015625})
    (kept,) = (tmp_path / "hero/logs/wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for word in (b"batch_total", b"evaluate/ssim_a", b"image-file", b"batch_size", b"0.015625"):
        assert word in content


def test_weights_and_biases_leaves_alone_a_folder_whose_name_is_no_utf8(tmp_path):
    with pytest.raises(LogError, match=r"W&B keeps no files in .*hero_\\xe4/logs, .*; rename it"):
        WandbLog("faces", tmp_path / "hero_\udce4", "0" * 32, {})


def test_weights_and_biases_without_a_login_is_a_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        LogError, match=r"^W&B cannot be used \(No API key configured.\); run `wand"
    ):
        WandbLog("faces", tmp_path, "0" * 32, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    session = types.SimpleNamespace(number=1, batch_size=4)
    state = types.SimpleNamespace(session=session, iterations=0, run_id="0" * 32)
    closed = []
    monkeypatch.setattr(TensorBoardLog, "close", lambda log: closed.append(log))
    config, reporter = from_dict({"log": {"wandb": "faces"}}), Reporter(io.StringIO())
    with ExitStack() as stack:
        with pytest.raises(ValueError, match="log.wandb needs wandb, which is not installed"):
            open_logs(config, tmp_path, state, reporter, stack)
    assert len(closed) == 1, "what was opened before it"


def _without_styles(stream):
    return re.sub(r"\x1b\[\d*m", "", stream.getvalue())


def _jpeg() -> bytes:
    import cv2

    return cv2.imencode(".jpg", np.zeros((8, 12, 3), np.uint8))[1].tobytes()
