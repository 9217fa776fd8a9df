"""Runs on several ranks: their files, how they are stopped, and how one that fails ends them."""

import json
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import saved_tensors, train_words

from mien import __version__
from mien.cli import main
from mien.core import train
from mien.core.checkpoint.left_request import leave_request
from mien.core.distribute import group
from mien.core.distribute.failure import RankLost
from mien.core.training import engine, prepare, shared_start


def _words(sides, model_dir, iterations, *more):
    start = ["--batch-size", "5", "--iterations", str(iterations), "--save-interval", "1000"]
    start += ["--set", "train.log_interval=1"]
    return train_words(sides, model_dir, *start, *more)


def _state(model_dir):
    generation = json.loads((model_dir / "state.json").read_text())["generation"]
    return json.loads((model_dir / "generations" / generation / "state.json").read_text())


def _run(num_ranks, argv, folder):
    """Train to the end; what the first rank printed."""
    started = ranks.train(num_ranks, argv, folder)
    assert ranks.wait_all(started) == [0] * num_ranks, [each.err.read_text() for each in started]
    assert all(each.err.read_text() == each.out == "" for each in started[1:])
    return started[0].out


def _notes_of_writing(model_dir, file):
    """Have this process note in a file what it opens for writing in a folder."""

    def note(event, args):
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path, flags = os.fsdecode(args[0]), args[2]
            if path.startswith(str(model_dir)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                os.write(file, f"{path}\n".encode())

    sys.addaudithook(note)


def test_a_run_goes_on_with_any_number_of_ranks_and_one_of_them_writes(
    sides, tmp_path, monkeypatch
):
    model_dir, whole = tmp_path / "model", tmp_path / "whole"
    written = tmp_path / "written"

    def run():
        if os.environ["RANK"] != "0":
            _notes_of_writing(model_dir, os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        return main(_words(sides, model_dir, 4))

    assert ranks.wait_all(ranks.start(2, run, tmp_path / "2")) == [0, 0]
    assert written.read_text() == ""
    _run(1, _words(sides, model_dir, 3), tmp_path / "1")
    # Without room for a file of decoded faces, each of the ranks decodes them.
    monkeypatch.setenv("MIEN_DISK_RESERVE_MIB", str(2**40))
    elsewhere = ("--set", f"data.store_dir={tmp_path / 'store'}")
    out = _run(3, _words(sides, model_dir, 3, *elsewhere), tmp_path / "3")
    monkeypatch.undo()
    assert out.count(" are in no file that the 3 ranks of this machine could share (") == 2
    assert not [*(tmp_path / "store").iterdir()]
    assert "gpus 3, exchange " in out
    [events] = (model_dir / "logs/session_3/train").iterdir()
    assert b"exchange" in events.read_bytes()
    _run(1, _words(sides, whole, 10), tmp_path / "whole_out")
    ours, theirs = _state(model_dir), _state(whole)
    assert (ours["iterations"], ours["faces_seen"]) == (10, theirs["faces_seen"])
    weights, wanted = saved_tensors(model_dir), saved_tensors(whole)
    for name, tensor in wanted.items():
        # Ten steps of at most 5e-5 each: no more than some may differ by rounding.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stop_of_any_rank_is_one_save_and_the_end_of_all(stopped, sides, tmp_path):
    model_dir = tmp_path / "model"
    started = ranks.train(2, _words(sides, model_dir, 100_000), tmp_path)

    def ask(request, answer):
        leave_request(model_dir, started[0].pid, request)
        started[0].out = ""
        os.kill(started[0].pid, signal.SIGRTMIN)
        started[0].wait_for(answer)

    started[0].wait_for("[#00002]")
    # All pause before and go on, and take a change of a setting at one iteration.
    ask("pause", "Paused at")
    ask("resume", "saves  ")
    ask("augment.warp=false", "saves  ")
    assert "Changed augment.warp from True to False" in started[0].out
    if stopped:
        ask("pause", "Paused at")
    else:
        started[0].out = ""
        started[0].wait_for("Saved iteration ")
    os.kill(started[stopped].pid, signal.SIGTERM)
    assert ranks.wait_all(started) == [4, 4]
    iterations = _state(tmp_path / "model")["iterations"]
    assert started[0].out.count(f"Saved iteration {iterations} ") == 1
    last = started[0].out.splitlines()[-1]
    assert "SIGTERM received; the state is saved" in last
    assert f"Stopped at iteration {iterations}: " in last


def test_a_stop_reaches_a_rank_while_another_one_waits_for_it(sides, tmp_path):
    """The second rank waits in a collective, where no handler runs, for faces of the first."""

    def run():
        def decode(*_args, **_settings):
            print("decoding", flush=True)
            threading.Event().wait()

        def wait(*args):
            print("waiting", flush=True)
            return in_turn(*args)

        in_turn, prepare.in_turn = prepare.in_turn, wait
        if os.environ["RANK"] == "0":
            prepare.open_faces = decode
        return main(_words(sides, tmp_path / "model", 1))

    first, second = ranks.start(2, run, tmp_path)
    first.wait_for("decoding")
    second.wait_for("waiting")
    os.kill(second.pid, signal.SIGTERM)
    assert ranks.wait_all([first, second], 10) == [4, 4]
    assert first.err.read_text() == "mien train: SIGTERM received before training began\n"
    assert "mien train" not in second.err.read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_that_lose_another_end_with_one_line_and_the_last_save(killed, sides, tmp_path):
    model_dir = tmp_path / "model"
    started = ranks.train(2, _words(sides, model_dir, 100_000), tmp_path)
    started[0].wait_for("Saved iteration 1 ")
    os.kill(started[killed].pid, signal.SIGKILL)
    left = started[1 - killed]
    assert left.wait(10) == 3
    told = (left.out if killed else left.err.read_text()).splitlines()[-1]
    assert f"rank {killed} (pid {started[killed].pid}) ended with signal 9" in told
    if killed:
        assert told.endswith("iteration 1 is saved; start again to go on")
        assert left.err.read_text() == ""
    assert not list(model_dir.glob("crash_report*"))
    assert started[killed].wait() == -signal.SIGKILL
    assert _state(model_dir)["iterations"] == 1
    _run(1, _words(sides, model_dir, 1), tmp_path / "again")


def _fails(error, when):
    """Have one rank fail by an error when a function of a module is called."""
    module, name = when
    own = getattr(module, name)

    def fail(*args, **settings):
        if os.environ["RANK"] == "1":
            raise error
        return own(*args, **settings)

    setattr(module, name, fail)


def _as_another_version(sides, model_dir):
    shared_start.__version__ = "0.0.1"
    return _words(sides, model_dir, 1)


def _with_another_batch(sides, model_dir):
    return _words(sides, model_dir, 1, "--batch-size", "6", "--log-level", "warning")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (_as_another_version, f"this is mien 0.0.1, and rank 0 is mien {__version__}; install one"),
        (_with_another_batch, "train.batch_size is 6 here, and 5 for rank 0; start all ranks by"),
    ],
)
def test_ranks_that_were_not_started_alike_are_refused(other, words, sides, tmp_path):
    model_dir = tmp_path / "model"

    def run():
        is_other = os.environ["RANK"] == "1"
        return main(other(sides, model_dir) if is_other else _words(sides, model_dir, 1))

    first, second = ranks.start(2, run, tmp_path)
    assert ranks.wait_all([first, second], 20) == [2, 2]
    assert first.err.read_text().startswith(f"mien train: rank 1: {words} ")
    assert second.err.read_text() == ""
    assert not (model_dir / "generations").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("no room in /faces; free some"), 2, "rank 1: no room in /faces; free some"),
        (torch.OutOfMemoryError("none left"), 2, "rank 1: "),
        (RuntimeError("a fault"), 1, "rank 1: RuntimeError: a fault; its traceback is above"),
    ],
)
def test_a_rank_that_is_refused_ends_all_with_its_words(error, code, words, sides, tmp_path):
    def run():
        _fails(error, (prepare, "build_step"))
        return main(_words(sides, tmp_path / "model", 9))

    first, second = ranks.start(2, run, tmp_path)
    assert ranks.wait_all([first, second], 30) == [code, code]
    told = first.err.read_text()
    assert told.startswith(f"mien train: {words}")
    assert told.count("\n") == 1
    assert ("Traceback" in second.err.read_text()) == (code == 1)
    assert code == 1 or second.err.read_text() == ""
    assert not (tmp_path / "model/generations").exists()


def test_a_refusal_from_python_lets_the_others_go_and_the_next_try_finds_them(
    tmp_path, monkeypatch
):
    """Processes that go on after a refusal of one of them, or of both, at the same port."""
    waits, goes_on = os.pipe()

    def run():
        is_first = os.environ["RANK"] == "0"
        settings = {
            "model": {"trainer": "lightweight"},
            "train": {"batch_size": 5 if is_first else 6},
            "save": {"model_dir": str(tmp_path / "model")},
        }

        def meet():
            words = "^(rank 1: )?train.batch_size is 6 here, and 5 for rank 0"
            with pytest.raises((ValueError, RankLost), match=words):
                train(settings)

        meet()
        if is_first:
            # Refused before the other one could meet it, which gives up meanwhile.
            with pytest.raises(ValueError, match="^the settings of distribute are for"):
                train({"distribute": {"gpus": "2"}})
            os.read(waits, 1)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(group, "_OPENING", timedelta())
                with pytest.raises(ValueError, match="^rank 1 cannot connect with the 1 other"):
                    train(settings)
            os.write(goes_on, b".")
        meet()
        if is_first:
            # The program may use the port by itself.
            dist.init_process_group("gloo", rank=0, world_size=1)
        return 0

    started = ranks.start(2, run, tmp_path)
    codes = ranks.wait_all(started, 30)
    assert codes == [0, 0], [each.err.read_text() for each in started]


def test_a_rank_that_fails_in_training_ends_all_and_leaves_the_last_save(sides, tmp_path):
    def run():
        plain = engine.Engine.__call__

        def step(self, faces_seen):
            if os.environ["RANK"] == "1" and faces_seen["a"] == 15:
                raise torch.OutOfMemoryError("none left")
            plain(self, faces_seen)

        engine.Engine.__call__ = step
        return main(_words(sides, tmp_path / "model", 9))

    first, second = ranks.start(2, run, tmp_path)
    assert ranks.wait_all([first, second], 30) == [2, 2]
    last = first.out.splitlines()[-1]
    assert "Stopped at iteration" in last
    assert ": rank 1: " in last
    assert last.endswith("; iteration 1 is saved; start again to go on")
    assert first.err.read_text() == second.err.read_text() == ""


def test_stages_rollbacks_and_a_found_rate_are_those_of_the_first_rank(sides, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "two"\n[[stage]]\nname = "one"\niterations = 2\n'
        '[[stage]]\nname = "other"\niterations = 2\nset = {train = {batch_size = 4}}\n'
    )

    def run():
        plain = engine.Engine.__call__

        def step(self, faces_seen):
            plain(self, faces_seen)
            # A fault of the arithmetic, once: in the second stage, after its first save.
            if faces_seen["a"] == 14 and not Path(tmp_path / os.environ["RANK"]).exists():
                Path(tmp_path / os.environ["RANK"]).touch()
                self.step.loss_buffer.rows.fill_(torch.nan)

        engine.Engine.__call__ = step
        finder = ["--use-lr-finder", "--set", "optimizer.lr_finder_iterations=100"]
        rollback = ["--set", "train.nan_protection=rollback"]
        return main(
            _words(sides, tmp_path / "model", 9, "--recipe", str(recipe), *finder, *rollback)
        )

    started = ranks.start(2, run, tmp_path)
    assert ranks.wait_all(started) == [0, 0], [each.err.read_text() for each in started]
    out = started[0].out
    assert out.count("Learning rate found: ") == 1
    assert "Stage one is over: 2 iterations are done" in out
    assert "rollback 1 of " in out
    assert _state(tmp_path / "model")["iterations"] == 4
