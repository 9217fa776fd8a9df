"""Looking at a run while it goes on: what it keeps, shows and does when asked."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import json_events, saved_tensors, train_words

from mien.cli import main
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.saver import Saver
from mien.core.config import DataConfig
from mien.core.console.requests import Requests
from mien.core.data.decode import decode_one
from mien.core.data.feed import Feed
from mien.core.faces.folder import read_folder
from mien.core.faces.geometry import Crop
from mien.core.faces.png import read_header, write_face
from mien.core.preview.faces import drawn, spread
from mien.core.preview.files import read_jpeg
from mien.core.preview.window import PreviewWindow
from mien.core.system.durable_files import copy_files


def _words(sides, model_dir, *more):
    return train_words(sides, model_dir, "-b", "4", "--set", "train.log_interval=2", *more)


def _train(sides, model_dir, *more):
    return main(_words(sides, model_dir, *more))


def _at(events, kind):
    """The iterations at which something was told."""
    return [event["iteration"] for event in events if event["event"] == kind]


def _during(monkeypatch, iteration, action):
    """Do something while the batch of an iteration is made, once."""
    original = Feed.next
    done = []

    def following(self, faces_seen):
        if faces_seen["a"] == 4 * (iteration - 1) and not done:
            done.append(iteration)
            action()
        return original(self, faces_seen)

    monkeypatch.setattr(Feed, "next", following)


# What is kept


def test_events_are_kept_as_they_are_told(sides, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "-i", "3", "-s", "2", "--json") == 0
    told = capsys.readouterr().out
    kept = (model_dir / "logs/session_1/events.jsonl").read_text()
    assert kept == told
    assert {event["event"] for event in json_events(kept)} == {
        *("start", "step", "save", "preview", "stop")
    }
    assert _train(sides, model_dir, "-i", "1", "--set", "optimizer.placement=host") == 0
    second = json_events((model_dir / "logs/session_2/events.jsonl").read_text())
    kinds = [event["event"] for event in second]
    assert kinds[:2] == ["notice", "start"], "what was told before the session had a number"
    assert kinds[-1] == "stop"


def test_without_logs_no_event_is_kept(sides, tmp_path):
    assert _train(sides, tmp_path / "model", "-i", "1", "--no-logs") == 0
    assert not (tmp_path / "model/logs").exists()


def test_a_log_file_has_what_is_printed_with_its_date(sides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _train(sides, tmp_path / "model", "-i", "2", "-F", "run.log") == 0
    printed = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "run.log").read_text().splitlines()
    texts = [line.partition("INFO    ")[2] for line in lines]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    ", line) for line in lines)
    # The date stands there already, so that the time of day before a step does not.
    timeless = [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in printed]
    assert texts == [line for line in timeless if not line.startswith("Decoding faces")]
    assert main(["train", "-m", "model", "-i", "1", "-L", "error"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "run.log").read_text().splitlines() == lines, "the same level"


def test_debug_tells_more(sides, tmp_path, capsys):
    words = ("-x", str(sides[0]), "-y", str(sides[1]))
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 0
    assert "Time-lapse" not in capsys.readouterr().out
    assert _train(sides, tmp_path / "model", "-i", "1", "--loglevel", "debug", *words) == 0
    assert "Time-lapse: " in capsys.readouterr().out


def test_a_log_file_that_cannot_be_is_refused(sides, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    words = ("-i", "1", "--log-file", str(tmp_path / "file/run.log"))
    assert _train(sides, tmp_path / "model", *words) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "choose another --log-file" in said


def test_a_failure_of_ours_leaves_a_report_without_faces(sides, tmp_path, monkeypatch, capsys):
    model_dir, face = tmp_path / "model", min(sides[0].iterdir())

    def fail():
        raise RuntimeError(f"a tensor went missing near {face}")

    _during(monkeypatch, iteration=2, action=fail)
    with pytest.raises(RuntimeError, match="a tensor went missing"):
        _train(sides, model_dir, "-i", "3")
    (path,) = model_dir.glob("crash_report_*.txt")
    said = capsys.readouterr().err
    assert said == f"mien itself has failed; {path} says what is known of it\n"
    report = path.read_text()
    for part in ("Traceback (most recent call last)", "in fail", "torch ", "[optimizer]"):
        assert part in report
    assert '"event": "start"' in report
    assert f"near {sides[0]}/(a face)" in report
    assert face.name not in report
    kept = json_events((model_dir / "logs/session_1/events.jsonl").read_text())
    assert kept[-1]["event"] == "crash"
    monkeypatch.undo()
    assert _train(sides, model_dir, "-i", "1") == 0, "the model can go on"


def test_a_mistake_of_the_user_leaves_no_report(sides, tmp_path, capsys):
    assert _train(sides, tmp_path / "model", "-i", "1", "-b", "27") == 2
    assert "use --batch-size 26 or less" in capsys.readouterr().err
    assert not list(tmp_path.glob("model/crash_report_*"))


# Signals and keys


@pytest.mark.parametrize(
    ("number", "saves", "previews"),
    [(signal.SIGUSR1, [1, 3, 5], [1, 3, 5]), (signal.SIGUSR2, [1, 5], [1, 3, 5])],
)
def test_signals_save_and_renew_the_preview(
    sides, tmp_path, monkeypatch, number, saves, previews, capsys
):
    _during(monkeypatch, iteration=3, action=lambda: os.kill(os.getpid(), number))
    assert _train(sides, tmp_path / "model", "-i", "5", "--json") == 0
    events = json_events(capsys.readouterr().out)
    assert _at(events, "save") == saves
    assert _at(events, "preview") == previews
    assert signal.getsignal(number) is signal.SIG_DFL, "as it was before"


def test_keys_ask_for_what_they_stand_for():
    requests = Requests()
    requests.press("sxR")
    assert requests.take() == {"save", "preview"}
    assert requests.take() == set()
    requests.press("m")
    assert requests.take() == {"redraw"}
    assert requests.mask_is_toggled
    requests.press("M\n")
    assert not requests.mask_is_toggled
    assert requests.stop.signal_name == "Enter"


def test_the_mask_key_draws_the_same_picture_with_a_tint(sides, tmp_path, monkeypatch):
    model_dir, seen = tmp_path / "model", {}
    noted = []
    monkeypatch.setattr(Requests, "__enter__", lambda self: noted.append(self) or self)
    monkeypatch.setattr(Requests, "__exit__", lambda *_: None)
    original = Feed.next

    def following(self, faces_seen):
        iteration = faces_seen["a"] // 4 + 1
        path = model_dir / "preview.png"
        if path.exists():
            seen[iteration] = cv2.imread(str(path))
        if iteration in (2, 3):
            noted[0].press("m")
        return original(self, faces_seen)

    monkeypatch.setattr(Feed, "next", following)
    words = ("-i", "4", "--set", "preview.mask_opacity=100", "--set", "preview.faces=fresh")
    assert _train(sides, model_dir, *words, "--set", "preview.show_mask=false") == 0
    red = (0, 0, 255)
    # A batch is made one step ahead: the keys are obeyed after steps 1 and 2 at the latest.
    tints = [int((picture == red).all(axis=-1).sum()) for picture in seen.values()]
    assert max(tints) > 1000
    assert min(tints) == 0


SHELL = """
import os, pty, signal, subprocess, sys, termios, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)

def is_plain():
    return bool(termios.tcgetattr(0)[3] & termios.ICANON and termios.tcgetattr(0)[3] & termios.ECHO)

def until(wanted, what):
    for _ in range(200):
        if is_plain() == wanted:
            return print(what, flush=True)
        time.sleep(0.02)
    print("never", what, flush=True)

job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], process_group=0)
os.tcsetpgrp(0, job.pid)
until(False, "keys")
os.killpg(job.pid, signal.SIGTSTP)
os.waitpid(job.pid, os.WUNTRACED)
until(True, "aside")
os.killpg(job.pid, signal.SIGCONT)
until(False, "back")
os.killpg(job.pid, signal.SIGTERM)
until(True, "first signal")
os.killpg(job.pid, signal.SIGTERM)
print("ended", job.wait() == -signal.SIGTERM, flush=True)
"""
JOB = """
import time
from mien.core.console.requests import Requests
with Requests() as requests:
    while True:
        requests.take()
        time.sleep(0.01)
"""


def _on_a_terminal(words, **settings):
    """A started program whose input and output are a terminal of its own, and that terminal."""
    master, slave = os.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", f"{CONTROLLING}{words[0]}", *words[1:]],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        **settings,
    )
    os.close(slave)
    return started, master


CONTROLLING = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


def _read_all(started, master):
    text = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # its last user has left
            break
        if not part:
            break
        text += part
    started.wait(300)
    os.close(master)
    return text.decode()


def test_the_terminal_is_put_back_however_the_run_is_left():
    started, master = _on_a_terminal([SHELL, JOB])
    said = _read_all(started, master).split("\r\n")
    assert said[:5] == ["keys", "aside", "back", "first signal", "ended True"]


def _read_until(master, kind, unread):
    """The next event of a kind after iteration 1, and what was read beyond its line."""
    while True:
        *lines, unread = (unread + os.read(master, 4096).decode()).split("\r\n")
        for event in json_events("\n".join(lines)):
            if event["event"] == kind and event["iteration"] > 1:
                return event, unread


@pytest.mark.slow
def test_keys_on_a_terminal(sides, tmp_path):
    run = "import sys; from mien.cli import main; sys.exit(main())"
    words = _words(sides, tmp_path / "model", "--json", "--set", "train.log_interval=0")
    started, master = _on_a_terminal([run, *words], cwd=tmp_path)
    _, unread = _read_until(master, "step", "")
    for key, kind in ((b"s", "save"), (b"r", "preview"), (b"\n", "stop")):
        os.write(master, key)
        event, unread = _read_until(master, kind, unread)
    assert event["reason"] == "Enter received; the state is saved"
    assert started.wait(300) == 4
    os.close(master)


def test_each_save_is_told_with_its_own_mean_loss(sides, tmp_path, monkeypatch, capsys):
    # Each save is told of only when the next one has been queued, as on a slow disk.
    monkeypatch.setattr(Saver, "finished", _only_what_was_waited_for)
    assert _train(sides, tmp_path / "model", "-i", "3", "-s", "1", "--json") == 0
    events = json_events(capsys.readouterr().out)
    totals = [event["loss_a"] + event["loss_b"] for event in events if event["event"] == "step"]
    saves = [event["mean_loss"] for event in events if event["event"] == "save"]
    assert saves[0] == pytest.approx(totals[0])
    assert None not in saves
    assert len(set(saves)) == len(saves) == 3


def _only_what_was_waited_for(self):
    done, self._finished = self._finished, []
    return done


# Snapshots


@pytest.mark.parametrize("kept", ["never", "exit"])
def test_a_snapshot_is_of_the_iteration_in_its_name_with_optimizer(sides, tmp_path, kept, capsys):
    words = ("-I", "2", "-s", "3", "--set", f"save.save_optimizer={kept}", "--json")
    assert _train(sides, tmp_path / "model", "-i", "5", *words) == 0
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 0, "in total, not of a session"
    for iteration in (2, 4, 6):
        snapshot = tmp_path / f"model_snapshot_{iteration}_iters"
        with ModelFolder(snapshot, read_only=True) as folder:
            found = folder.load()
        assert found.state["iterations"] == iteration
        assert found.optimizer is not None
    events = json_events(capsys.readouterr().out)
    assert _at(events, "snapshot") == [2, 4, 6]
    assert set(_at(events, "save")) == {1, 2, 3, 4, 5, 6}
    assert _train(sides, tmp_path / "model_snapshot_4_iters", "-i", "1", "-I", "0") == 0


def test_a_snapshot_that_cannot_be_made_does_not_end_the_run(sides, tmp_path, monkeypatch, capsys):
    def refused(source, target, names):
        # The snapshot has another name until all of it is there.
        if tmp_path / "model" not in target.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        copy_files(source, target, names)

    monkeypatch.setattr("mien.core.checkpoint.retention.copy_files", refused)
    assert _train(sides, tmp_path / "model", "-i", "3", "-I", "2", "--json") == 0
    events = json_events(capsys.readouterr().out)
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert warning == (
        f"cannot write snapshot {tmp_path}/model_snapshot_2_iters: Permission denied; make the "
        "folder writable, or leave snapshots out (--snapshot-interval 0); training goes on "
        "without it"
    )
    assert (_at(events, "snapshot"), events[-1]["iteration"]) == ([], 3)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_stage_that_ends_at_a_snapshot_is_copied_once(sides, tmp_path, capsys):
    recipe = tmp_path / "two.toml"
    recipe.write_text('[[stage]]\nname = "learn"\niterations = 2\n[[stage]]\niterations = 1\n')
    words = ("--recipe", str(recipe), "-I", "2", "--set", "save.save_optimizer=never", "--json")
    assert _train(sides, tmp_path / "model", *words) == 0
    events = json_events(capsys.readouterr().out)
    assert [event["message"] for event in events if event["event"] == "warning"] == []
    assert set(_at(events, "snapshot")) == {2}


# Pictures


def test_nothing_that_is_looked_at_changes_a_bit(sides, tmp_path, monkeypatch):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert _train(sides, plain, "-i", "6") == 0
    _during(monkeypatch, iteration=4, action=lambda: os.kill(os.getpid(), signal.SIGUSR2))
    words = ("-s", "2", "-I", "3", "--set", "preview.faces=fresh", "-w", f"{tmp_path}/look.png")
    timelapse = ("-x", str(sides[1]), "-y", str(sides[0]))
    assert _train(sides, watched, "-i", "6", *words, *timelapse) == 0
    for name in ("model", "optimizer"):
        one, other = saved_tensors(plain, name), saved_tensors(watched, name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    np.testing.assert_array_equal(
        cv2.imread(f"{tmp_path}/look.png"), cv2.imread(str(watched / "preview.png"))
    )


def test_fresh_faces_are_others_every_time_and_the_same_in_every_run(sides):
    faces = read_folder(sides[0]).faces
    numbers = [(7, 100, 0), (7, 100, 1), (7, 200, 0), (8, 100, 0)]
    chosen = [[face.path for face in drawn(faces, 6, *each)] for each in numbers]
    assert all(len(set(paths)) == 6 and paths == sorted(paths) for paths in chosen)
    assert len({tuple(paths) for paths in chosen}) == 4
    assert [face.path for face in drawn(faces, 6, 7, 100, 0)] == chosen[0]
    assert len(drawn(faces, 99, 1)) == len(spread(faces, 99)) == len(faces)


def test_fresh_faces_that_have_gone_do_not_end_the_run(sides, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    for path in sides[0].iterdir():
        (gone / path.name).write_bytes(path.read_bytes())

    def remove():
        for path in gone.iterdir():
            path.unlink()

    _during(monkeypatch, iteration=3, action=remove)
    words = ("-i", "4", "-s", "2", "--set", "preview.faces=fresh")
    assert _train((gone, sides[1]), tmp_path / "model", *words) == 0


def test_the_mask_can_be_off_in_either_style(sides, tmp_path):
    settings = {"mask_color": "#0000ff", "preview_images": 2, "history": 0}
    shapes = {"sheet": (48 + 2 * 130, 6 * 130 + 16, 3), "faceswap": (2 * 64 + 14, 6 * 64, 3)}
    for style, shape in shapes.items():
        blue = []
        for shown in ("true", "false"):
            changes = settings | {"style": style, "show_mask": shown}
            words = [f"--set=preview.{name}={value}" for name, value in changes.items()]
            assert _train(sides, tmp_path / style / shown, "-i", "1", *words) == 0
            picture = cv2.imread(str(tmp_path / style / shown / "preview.png"))
            assert picture.shape == shape
            blue.append(picture[..., 0].mean() - picture[..., 1].mean())
        assert blue[0] > blue[1] + 0.5


def test_fourteen_faces_make_seven_rows_of_twelve(sides, tmp_path):
    no_mask = ("--set", "loss.penalized_mask_loss=false", "--set", "data.mask_type=none")
    fourteen = ("--set", "preview.preview_images=14")
    words = ("-i", "1", *no_mask, *fourteen, "-x", str(sides[0]), "-y", str(sides[1]))
    assert _train(sides, tmp_path / "model", *words) == 0
    shape = (48 + 7 * 130, 12 * 130 + 2 * 6 + 14 + 2, 3)
    assert cv2.imread(str(tmp_path / "model/preview.png")).shape == shape
    (frame,) = (tmp_path / "model/timelapse").iterdir()
    assert cv2.imread(str(frame)).shape == shape


def test_a_picture_that_cannot_be_written_is_told_once(sides, tmp_path, capsys):
    words = ("-i", "3", "-s", "1", "-w", f"{tmp_path}/none/look.png")
    assert _train(sides, tmp_path / "model", *words) == 0
    said = capsys.readouterr().out
    assert said.count(f"cannot write {tmp_path}/none/look.png: No such file or directory") == 1


# Time-lapse


def test_a_time_lapse_of_few_faces_never_overwrites(sides, tmp_path, monkeypatch):
    few, output = tmp_path / "few", tmp_path / "frames"
    few.mkdir()
    for path in sorted(sides[0].iterdir())[:3]:
        (few / path.name).write_bytes(path.read_bytes())
    (few / "0.png").write_text("no face")
    monkeypatch.setattr("mien.core.preview.previewer.time.time", lambda: 1000.5)
    words = ("--timelapse-input-a", str(few), "--timelapse-input-b", str(sides[1]))
    more = ("--timelapse-output", str(output), "-i", "3", "-s", "1")
    more += ("--set", "preview.preview_images=14")
    assert _train(sides, tmp_path / "model", *words, *more) == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == ["1000-2.jpg", "1000-3.jpg", "1000.jpg"]
    assert cv2.imread(str(output / "1000.jpg")).shape == (48 + 3 * 130, 6 * 130 + 16, 3)


def test_a_time_lapse_shows_the_first_faces_by_name(sides, tmp_path):
    words = ("-x", str(sides[0]), "-y", str(sides[1]), "--set", "preview.preview_images=2")
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 0
    (path,) = (tmp_path / "model/timelapse").iterdir()
    assert abs(int(path.stem) - time.time()) < 100
    assert read_jpeg(path)[1].startswith("synthetic face: preview by mien ")
    picture = cv2.imread(str(path))[48:, 2 : 2 + 128].astype(int)
    data = DataConfig()
    firsts = read_folder(sides[0], minimum=1, most=2).faces
    assert [face.path.name for face in firsts] == sorted(os.listdir(sides[0]))[:2]
    for row, face in enumerate(firsts):
        small = decode_one(face, Crop(data.centering, 1.0, 0.0, 64))
        wanted = cv2.resize(small, (128, 128), interpolation=cv2.INTER_LANCZOS4).astype(int)
        middle = np.s_[48:80, 48:80]  # inside the mask, away from its outline
        assert np.abs(picture[130 * row :][:128][middle] - wanted[middle]).mean() < 8


@pytest.mark.parametrize(("given", "lacks"), [("a", "b"), ("b", "a")])
def test_a_time_lapse_of_one_side_is_refused(sides, tmp_path, given, lacks, capsys):
    words = (f"--timelapse-input-{given}", str(sides[0]))
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 2
    said = capsys.readouterr().err
    assert f"add --timelapse-input-{lacks} FOLDER, or leave --timelapse-input-{given} out" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_time_lapse_of_faces_without_the_trained_mask_is_refused(sides, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(sides[0].iterdir())[:2]:
        _, header = read_header(path)
        header.masks.clear()
        write_face(bare / path.name, cv2.imread(str(path)), header)
    timelapse = ("-x", str(bare), "-y", str(sides[1]))
    stored = ("--set", "data.mask_type=vgg-clear")
    assert _train(sides, tmp_path / "model", "-i", "1", *timelapse, *stored) == 2
    said = capsys.readouterr().err
    assert f"none of 2 faces of {bare} can be shown: they are damaged, or lack the mask" in said
    no_mask = ("--set", "loss.penalized_mask_loss=false")
    assert _train(sides, tmp_path / "other", "-i", "1", *timelapse, *stored, *no_mask) == 0


def test_a_time_lapse_can_be_left_out_again(sides, tmp_path):
    words, off = (
        [
            f"--set=preview.timelapse_input_{side}={path}"
            for side, path in zip("ab", paths, strict=True)
        ]
        for paths in (sides, ("", ""))
    )
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 0
    assert _train(sides, tmp_path / "model", "-i", "1") == 0
    assert len(list((tmp_path / "model/timelapse").iterdir())) == 2
    assert _train(sides, tmp_path / "model", "-i", "1", *off) == 0
    assert len(list((tmp_path / "model/timelapse").iterdir())) == 2


# Window


def test_a_window_without_a_screen_is_refused_at_the_start(sides, tmp_path, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert _train(sides, tmp_path / "model", "-i", "1", "--preview") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "opencv-python" in said
    assert _train(sides, tmp_path / "model", "--preview", "--dry-run") == 0, "shows nothing"


def test_keys_of_the_window_are_obeyed(sides, tmp_path, monkeypatch, capsys):
    shown, keys = [], ["", "", "s", "p", "", "m", "p", "", "\r"]
    monkeypatch.setattr(PreviewWindow, "is_open", True)
    monkeypatch.setattr(PreviewWindow, "open", lambda self, scale: shown.append(scale))
    monkeypatch.setattr(PreviewWindow, "show", lambda self, image: shown.append(image.shape))
    monkeypatch.setattr(PreviewWindow, "keys", lambda self: keys.pop(0) if keys else "")
    monkeypatch.setattr(PreviewWindow, "close", lambda self: shown.append("closed"))
    words = ("-p", "--preview-scale", "50", "-i", "9")
    assert _train(sides, tmp_path / "model", *words) == 4
    said = capsys.readouterr().out
    assert re.findall(r"Saved iteration (\d+)", said) == ["1", "3", "4", "5", "6"]
    by = f"p in the window or `kill -CONT {os.getpid()}`"
    assert f"Paused at iteration 4: saved, its memory is free; {by} resumes\n" in said
    assert said.index("Paused at iteration 4") < said.index("Resumed at iteration 4")
    assert shown.count("closed") == 1, "it is there in the pause and after it"
    assert (shown[0], shown[-1]) == (50, "closed")


def test_a_path_that_is_given_relative_has_not_changed(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(sides[0].parent)
    for _ in range(2):
        assert _train([side.name for side in sides], tmp_path / "model", "-i", "1") == 0
    assert "changed" not in capsys.readouterr().out


def test_previews_of_saves_are_in_the_log(sides, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert _train(sides, tmp_path / "model", "-i", "2", "-s", "1") == 0
    events = EventAccumulator(str(tmp_path / "model/logs/session_1/train"))
    events.Reload()
    pictures = events.Images("preview")
    assert [picture.step for picture in pictures] == [1, 2]
    image = cv2.imdecode(np.frombuffer(pictures[-1].encoded_image_string, np.uint8), 1)
    assert image.shape == (pictures[-1].height, pictures[-1].width, 3)
    assert b"synthetic face" in pictures[-1].encoded_image_string
    assert b"batch_size" in events.Tensors("settings")[0].tensor_proto.string_val[0]
