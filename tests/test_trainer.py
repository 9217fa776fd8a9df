"""Training as a user sees it: it learns, saves, resumes bit for bit, and stops as it should."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from conftest import assert_same_bits, json_events, saved_tensors, train_words

from mien import models
from mien.cli import main
from mien.core.checkpoint.model_folder import ModelFolder, SaveError
from mien.core.console.tensorboard import LogError, TensorBoardLog
from mien.core.data.feed import Feed
from mien.core.faces.png import read_header, write_face
from mien.core.preview.faces import PreviewLoader
from mien.core.training.trainer import Trainer


def _words(sides, model_dir, *more):
    return train_words(sides, model_dir, "-b", "4", "--set", "train.log_interval=2", *more)


def _train(sides, model_dir, *more):
    return main(_words(sides, model_dir, *more))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_equals_an_uninterrupted_one(sides, tmp_path, mode):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    lasting = ("--set", f"precision.mode={mode}")
    assert _train(sides, straight, "-i", "6", *lasting) == 0
    assert _train(sides, resumed, "-i", "2", *lasting) == 0
    assert _train(sides, resumed, "-i", "4") == 0
    assert_same_bits(straight, resumed)
    state = json.loads((resumed / "state.json").read_text())
    assert state["iterations"] == 6
    assert [session["iterations"] for session in state["sessions"]] == [2, 4]


def test_a_total_of_iterations_ends_a_run_however_often_it_is_started(sides, tmp_path, capsys):
    model_dir = tmp_path / "model"
    words = ("--set", "train.until=3", "-i", "2", "--json")
    for last, left, reason in (
        (2, [1, 0], "all iterations are done"),
        (3, [0], "all 3 iterations of train.until are done; raise it to train further"),
        (3, [], "all 3 iterations of train.until are done; raise it to train further"),
    ):
        assert _train(sides, model_dir, "--set", "train.log_interval=1", *words) == 0
        events = json_events(capsys.readouterr().out)
        assert (events[-1]["iteration"], events[-1]["reason"]) == (last, reason)
        steps = [event for event in events if event["event"] == "step"]
        assert [step["iteration"] for step in steps] == list(range(last - len(left) + 1, last + 1))
        assert [step["seconds_left"] > 0 for step in steps] == [count > 0 for count in left]
    assert _train(sides, model_dir, "--until", "4") == 0, "a flag weighs more"
    assert json.loads((model_dir / "state.json").read_text())["iterations"] == 4


@pytest.mark.slow
def test_a_noisy_model_resumes_with_the_same_noise(sides, tmp_path):
    options = dataclasses.asdict(models.family("unbalanced").tiny)
    words = ["train", "-A", str(sides[0]), "-B", str(sides[1]), "-t", "unbalanced"]
    words += ["--set", "train.batch_size=2", "--set", "preview.preview_images=2"]
    for name, value in options.items():
        words += ["--set", f"model.options.{name}={json.dumps(value)}"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main([*words, "-m", str(straight), "-i", "2"]) == 0
    assert main([*words, "-m", str(resumed), "-i", "1"]) == 0
    torch.rand(7)  # the generator is elsewhere in its sequence
    assert main(["train", "-m", str(resumed), "-i", "1"]) == 0
    assert_same_bits(straight, resumed)


def test_seeds_decide_everything(sides, tmp_path):
    for name, seed in (("one", "7"), ("again", "7"), ("other", "8")):
        assert _train(sides, tmp_path / name, "-i", "3", "--seed", seed) == 0
    assert_same_bits(tmp_path / "one", tmp_path / "again")
    one, other = saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "other")
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_threads_do_not_change_the_batches(sides, tmp_path):
    for threads in ("1", "3"):
        words = ("-i", "2", "--set", f"data.num_threads={threads}")
        assert _train(sides, tmp_path / threads, *words) == 0
    assert_same_bits(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize(
    "more",
    [
        ("--set", "loss.learn_mask=true"),
        ("--set", "loss.penalized_mask_loss=false", "--set", "data.mask_type=none"),
        ("--set", "data.mask_type=vgg-clear", "--set", "data.coverage=75"),
        ("--set", "data.centering=legacy", "--set", "data.vertical_offset=10", "-W", "-P", "-c"),
        ("--set", "model.reflect_padding=true", "--no-logs", "--set", "data.decoder=opencv"),
        ("-t", "original", "--set", "model.options.lowmem=true", "--set", "model.options.width=8"),
    ],
    ids=lambda words: " ".join(word for word in words if word != "--set"),
)
def test_every_way_to_train(sides, tmp_path, more, capsys):
    assert _train(sides, tmp_path / "model", "-i", "2", *more) == 0
    assert "Stopped at iteration 2: all iterations are done" in capsys.readouterr().out
    assert (tmp_path / "model/preview.png").stat().st_size > 1000
    assert (tmp_path / "model/logs").exists() == ("--no-logs" not in more)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_the_loss_falls(sides, tmp_path, mode, capsys):
    words = ("-i", "120", "--json", "--precision", mode, "--set", "optimizer.learning_rate=1e-3")
    assert _train(sides, tmp_path / "model", *words) == 0
    events = json_events(capsys.readouterr().out)
    steps = [event for event in events if event["event"] == "step"]
    for side in "ab":
        losses = [step[f"loss_{side}"] for step in steps]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_json_events_tell_the_whole_run(sides, tmp_path, capsys):
    assert _train(sides, tmp_path / "model", "-i", "3", "--json", "-s", "2") == 0
    events = json_events(capsys.readouterr().out)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "stop"
    assert [e["iteration"] for e in events if e["event"] == "step"] == [1, 2, 3]
    assert [e["iteration"] for e in events if e["event"] == "save"] == [1, 2, 3]
    step = next(event for event in events if event["event"] == "step")
    assert {"iteration", "loss_a", "loss_b", "eg_per_s", "data_wait", "memory_mib"} <= step.keys()
    assert events[-1]["exit_code"] == 0


@pytest.mark.parametrize(
    ("more", "has_optimizer"),
    [
        (("--set", "save.save_optimizer=exit"), True),
        (("--set", "save.save_optimizer=never"), False),
        (("--set", "save.save_optimizer=never", "--snapshot-interval", "4"), True),
    ],
    ids=["exit", "never", "snapshot"],
)
def test_an_iteration_that_is_due_and_the_last_is_saved_once(
    sides, tmp_path, capsys, more, has_optimizer
):
    assert _train(sides, tmp_path / "model", "-i", "4", "--json", "-s", "2", *more) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for kind in ("save", "preview"):
        assert [e["iteration"] for e in events if e["event"] == kind] == [1, 2, 4]
    snapshots = [e["iteration"] for e in events if e["event"] == "snapshot"]
    assert snapshots == [4] * ("--snapshot-interval" in more)
    assert sorted(os.listdir(tmp_path / "model/generations")) == ["2", "4"]
    newest = tmp_path / "model/generations/4"
    assert (newest / "optimizer.safetensors").exists() == has_optimizer


def _poisoned(feed, at):
    """The feed, with a NaN in the batch after ``at`` faces."""
    original = Feed.next

    def following(self, faces_seen):
        made = original(self, faces_seen)
        if faces_seen["a"] == at:
            made.input_nchw[0, 0, 0, 0] = float("nan")
        return made

    return following


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_nan_halts_and_never_reaches_the_weights(sides, tmp_path, monkeypatch, mode, capsys):
    monkeypatch.setattr(Feed, "next", _poisoned(Feed, at=4 * 3))
    assert _train(sides, tmp_path / "model", "-i", "9", "--precision", mode) == 3
    said = capsys.readouterr().out
    assert "not a number at iteration 4 (loss_a" in said
    assert "Lower optimizer.learning_rate" in said
    tensors = saved_tensors(tmp_path / "model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    monkeypatch.undo()
    assert _train(sides, tmp_path / "model", "-i", "2") == 0, "the model can go on"


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """The loop tells losses one line late and counts steps on their way, as with a GPU."""

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

    original = Trainer.__init__

    def init(self, *args):
        original(self, *args)
        self.on_gpu = self.metrics.is_late = True

    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_losses_told_late_are_all_told_with_true_times(sides, tmp_path, capsys):
    words = ("-i", "9", "--json", "-s", "4", "--set", "train.log_interval=2")
    assert _train(sides, tmp_path / "model", *words) == 0
    events = json_events(capsys.readouterr().out)
    steps = [event for event in events if event["event"] == "step"]
    assert [step["iteration"] for step in steps] == [1, 3, 4, 6, 8, 9]
    assert all(0 < step["eg_per_s"] < 1e5 for step in steps), "a time of nothing"
    assert steps[-1]["seconds_left"] == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_nan_in_the_last_iterations_halts_too(
    sides, tmp_path, monkeypatch, late, request, capsys
):
    if late:
        request.getfixturevalue("_as_on_a_gpu")
    monkeypatch.setattr(Feed, "next", _poisoned(Feed, at=4 * 2))
    words = ("-i", "3", "--json", "--set", "train.log_interval=100")
    assert _train(sides, tmp_path / "model", *words) == 3
    stop = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stop["event"] == "stop"
    assert "not a number at iteration 3" in stop["reason"]
    assert json.loads((tmp_path / "model/state.json").read_text())["iterations"] == 3
    assert all(tensor.isfinite().all() for tensor in saved_tensors(tmp_path / "model").values())


def test_a_full_disk_halts_with_the_last_save_named(sides, tmp_path, monkeypatch, capsys):
    original = ModelFolder.save

    def save(self, model, optimizer, state, *others):
        if state["iterations"] > 1:
            raise SaveError("cannot save to X: No space left on device")
        return original(self, model, optimizer, state, *others)

    monkeypatch.setattr(ModelFolder, "save", save)
    assert _train(sides, tmp_path / "model", "-i", "8", "-s", "2") == 3
    assert "No space left on device" in capsys.readouterr().out
    assert json.loads((tmp_path / "model/state.json").read_text())["iterations"] == 1


def test_what_is_not_the_model_may_fail_to_be_written(sides, tmp_path, monkeypatch, capsys):
    """Events and preview on a full disk: told, and the training is the same."""
    straight, model_dir = tmp_path / "straight", tmp_path / "model"
    assert _train(sides, straight, "-i", "3") == 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken_log(self, *_: object) -> None:
        raise LogError("cannot write logs")

    monkeypatch.setattr("mien.core.preview.previewer.save_png", full)
    monkeypatch.setattr(TensorBoardLog, "flush", broken_log)
    monkeypatch.setattr(TensorBoardLog, "close", broken_log)
    capsys.readouterr()
    assert _train(sides, model_dir, "-i", "3") == 0
    said = capsys.readouterr().out
    assert (
        f"cannot write {model_dir}/preview.png: No space left on device; training goes on" in said
    )
    assert said.count("cannot write logs; no more events are written there in this session") == 1
    assert "cannot write logs; the last events are lost" in said
    assert_same_bits(straight, model_dir)


def test_training_begins_without_a_place_for_events(sides, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/.lock").touch()
    (tmp_path / "model/logs").write_text("a file in the way")
    assert _train(sides, tmp_path / "model", "-i", "1") == 0
    assert "start again with --no-logs; no events are written" in capsys.readouterr().out


def test_faces_that_vanish_before_the_preview_are_told_in_a_line(sides, tmp_path, capsys):
    faces = Path(shutil.copytree(sides[0], tmp_path / "faces"))
    load = PreviewLoader.load
    with pytest.MonkeyPatch.context() as patch:

        def vanish(self, shown):
            shutil.rmtree(faces)
            return load(self, shown)

        patch.setattr(PreviewLoader, "load", vanish)
        assert _train((faces, sides[1]), tmp_path / "model", "-i", "1") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"mien train: none of 2 faces of {faces} can be shown")
    assert told.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_4(sides, tmp_path, number):
    words = [sys.executable, "-m", "mien.cli", *_words(sides, tmp_path / "model", "--json")]
    started = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    for line in started.stdout:
        if '"step"' in line and json.loads(line)["iteration"] >= 4:
            break
    started.send_signal(number)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 4, err
    stop = json.loads(out.splitlines()[-1])
    assert stop["event"] == "stop"
    assert signal.Signals(number).name in stop["reason"]
    state = json.loads((tmp_path / "model/state.json").read_text())
    assert state["iterations"] == stop["iteration"] >= 4


def test_a_second_run_on_the_same_folder_is_refused(sides, tmp_path, capsys):
    assert _train(sides, tmp_path / "model", "-i", "1") == 0
    with ModelFolder(tmp_path / "model"):
        capsys.readouterr()
        assert _train(sides, tmp_path / "model", "-i", "1") == 2
    assert "in use" in capsys.readouterr().err


def _refusals(sides, tmp_path):
    few, empty, file = tmp_path / "few", tmp_path / "empty", tmp_path / "file"
    few.mkdir()
    empty.mkdir()
    file.write_text("no folder")
    for path in sorted(sides[0].iterdir())[:3]:
        (few / path.name).write_bytes(path.read_bytes())
    return {
        "no such folder": (["-A", str(tmp_path / "none")], "does not exist"),
        "empty": (["-A", str(empty)], "holds no PNG"),
        "few": (["-B", str(few)], "25"),
        "both sides": (["-B", str(sides[0])], "both use the folder"),
        "batch": (["-b", "27"], "use --batch-size 26 or less"),
        "trainer": (["-t", "orignal"], "did you mean original"),
        "option": (["--set", "model.options.widht=8"], "has no option"),
        "model dir is a file": (["-m", str(file)], str(file)),
        "foreign folder": (["-m", str(sides[0])], str(sides[0])),
        "precision": (["--precision", "tf32"], "tf32 needs an Nvidia GPU"),
        "mask": (["--set", "data.mask_type=unet-dfl"], "unet-dfl"),
    }


REFUSALS = (
    *("no such folder", "empty", "few", "both sides", "batch", "trainer", "option"),
    *("model dir is a file", "foreign folder", "precision", "mask"),
)


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_one_line_and_change_nothing(sides, tmp_path, case, capsys):
    words, message = _refusals(sides, tmp_path)[case]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert _train(sides, tmp_path / "model", "-i", "1", *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("mien train: ")
    assert message in err
    for path, changed in before.items():
        if path.is_file():
            assert path.stat().st_mtime_ns == changed


def test_locked_settings_and_other_trainers_are_refused(sides, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "-i", "1") == 0
    before = saved_tensors(model_dir)
    for words, message in (
        (("-t", "original"), "lightweight"),
        (("--set", "data.coverage=80"), "data.coverage is fixed at 100.0 in this model"),
        (("--seed", "3"), "train.seed is fixed at 0"),
    ):
        capsys.readouterr()
        assert _train(sides, model_dir, "-i", "1", *words) == 2
        assert message in capsys.readouterr().err
    assert saved_tensors(model_dir).keys() == before.keys()


def test_a_resume_needs_only_the_folder_and_tells_of_changes(sides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(sides[0].parent)
    model_dir = tmp_path / "model"
    assert _train((Path("a"), Path("b")), model_dir, "-i", "1") == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "model", "-i", "1", "--set", "optimizer.learning_rate=1e-4"]) == 0
    said = capsys.readouterr().out
    changed = said[said.index("\nchanged    ") :].partition("\n[")[0]
    assert "  optimizer.learning_rate: 5e-05 -> 0.0001" in changed
    assert "Note: " not in said
    assert json.loads((model_dir / "state.json").read_text())["iterations"] == 2


def test_unreadable_faces_are_named_skipped_and_strict_stops(sides, tmp_path, capsys):
    faces = tmp_path / "faces"
    faces.mkdir()
    for path in sides[0].iterdir():
        (faces / path.name).write_bytes(path.read_bytes())
    good = next(faces.iterdir()).read_bytes()
    (faces / "broken.png").write_bytes(good[: len(good) // 2])
    (faces / "text.png").write_text("not a picture")
    both = (faces, sides[1])
    assert _train(both, tmp_path / "model", "-i", "1") == 0
    said = capsys.readouterr().out
    assert "broken.png" in said
    assert "text.png" in said
    assert _train(both, tmp_path / "strict", "-i", "1", "--strict") == 2
    assert ".png" in capsys.readouterr().err


def test_many_unreadable_files_are_one_line_and_one_event(sides, tmp_path, capsys):
    faces = tmp_path / "faces"
    shutil.copytree(sides[0], faces)
    for number in range(2_000):
        (faces / f"bad {number:04}.png").touch()
    assert _train((faces, sides[1]), tmp_path / "model", "-i", "1", "--json") == 0
    events = json_events(capsys.readouterr().out)
    (told,) = (event for event in events if event["event"] == "warning")
    assert told["count"] == 2_000
    assert told["files"] == [f"bad {number:04}.png" for number in range(10)]
    assert told["message"].startswith(f"skipped 2000 files of {faces}: bad 0000.png, bad 0001.png")
    assert told["message"].endswith("; and 1997 more")


def test_a_mask_that_no_loss_uses_makes_no_face_unusable(sides, tmp_path):
    """None of the faces has the mask that is set."""
    words = ["--set", "data.mask_type=unet-dfl"]
    assert _train(sides, tmp_path / "used", "-i", "1", *words) == 2
    words += ["--set", "loss.penalized_mask_loss=false", "--set", "loss.learn_mask=false"]
    assert _train(sides, tmp_path / "unused", "-i", "1", *words) == 0


def test_the_loop_stays_readable():
    """step() <= 40 lines, run() <= 60."""
    import inspect

    from mien.core.training.step import TrainStep

    assert len(inspect.getsource(TrainStep.__call__).splitlines()) <= 40
    assert len(inspect.getsource(Trainer.run).splitlines()) <= 60


@pytest.mark.slow
def test_kill_9_loses_nothing_but_the_work_since_the_last_save(sides, tmp_path):
    """The command killed after a save, then resumed to iteration 12: equal to a straight run.

    The campaign of faults kills forks of itself, which start sooner, again and again.
    """
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert _train(sides, straight, "-i", "12", "-s", "2") == 0
    words = _words(sides, killed, "--json", "-s", "2", "-i", "12")
    started = subprocess.Popen(
        [sys.executable, "-m", "mien.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    for line in started.stdout:
        if '"save"' in line:
            break
    started.kill()
    started.communicate()
    with ModelFolder(killed, read_only=True) as folder:  # the pointer may lag behind the newest
        done = folder.load().state["iterations"]
    assert 1 <= done <= 12
    if done < 12:
        assert _train(sides, killed, "-s", "2", "-i", str(12 - done)) == 0
    assert_same_bits(straight, killed)


def test_a_face_without_the_stored_mask_is_left_out_of_training_and_preview(
    sides, tmp_path, capsys
):
    faces = tmp_path / "faces"
    faces.mkdir()
    for path in sides[0].iterdir():
        (faces / path.name).write_bytes(path.read_bytes())
    odd = min(faces.iterdir())  # the first face is always one of the preview's
    _, header = read_header(odd)
    header.masks.clear()
    write_face(odd, cv2.imread(str(odd)), header)
    words = ("-i", "1", "--set", "data.mask_type=vgg-clear")
    assert _train((faces, sides[1]), tmp_path / "model", *words) == 0
    said = capsys.readouterr().out
    assert f"skipped {odd}" in said
    assert "25 of" in said


def test_training_with_faces_warped_to_landmarks(sides, tmp_path, capsys):
    straight, resumed, plain = (tmp_path / name for name in ("straight", "resumed", "plain"))
    once = ("--set", "augment.single_interpolation=true")
    assert _train(sides, straight, "-i", "3", "-M", *once) == 0
    assert _train(sides, resumed, "-i", "1", "-M", *once) == 0
    assert _train(sides, resumed, "-i", "2", "-M", *once) == 0
    assert_same_bits(straight, resumed)
    assert "does nothing" not in capsys.readouterr().out
    assert _train(sides, plain, "-i", "3") == 0
    one, other = saved_tensors(straight), saved_tensors(plain)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_no_warp_wins_over_warping_to_landmarks(sides, tmp_path, capsys):
    both, off = tmp_path / "both", tmp_path / "off"
    assert _train(sides, both, "-i", "1", "-W", "-M") == 0
    said = capsys.readouterr()
    line = "augment.warp is off, so augment.warp_to_landmarks does nothing"
    assert (said.out + said.err).count(line) == 1
    assert _train(sides, off, "-i", "1", "-W") == 0
    assert_same_bits(both, off)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("placement", ["gpu", "host", "file"])
def test_training_on_a_gpu(sides, tmp_path, mode, placement, capsys):
    words = ("--device", "cuda", "--precision", mode, "--set", f"data.placement={placement}")
    assert _train(sides, tmp_path / "model", "-i", "8", *words) == 0
    assert _train(sides, tmp_path / "model", "-i", "6", *words) == 0
    fell_back = "the graph engine cannot run here" in capsys.readouterr().out
    assert fell_back == (placement == "file"), "a capture failed"
    tensors = saved_tensors(tmp_path / "model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.gpu
def test_the_first_loss_on_a_gpu_is_that_of_the_cpu(sides, tmp_path, capsys):
    losses = {}
    for device in ("cpu", "cuda"):
        words = ("-i", "1", "--json", "--precision", "fp32", "--device", device)
        assert _train(sides, tmp_path / device, *words) == 0
        events = json_events(capsys.readouterr().out)
        losses[device] = [e["loss_a"] for e in events if e["event"] == "step"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
