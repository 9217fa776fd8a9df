"""Runs that look after themselves: stages of a recipe, rollbacks, and what is kept on the way."""

import json
import re
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, json_events, train_words
from safetensors.torch import load_file

from mien.cli import main
from mien.core.checkpoint.model_folder import ModelFolder, SaveError
from mien.core.checkpoint.state import TrainingState
from mien.core.config import Config, from_dict
from mien.core.data.feed import Feed
from mien.core.optim.lr_schedule import Schedule
from mien.core.training import unattended
from mien.core.training.divergence import (
    JUMP,
    PART,
    STAYED,
    WINDOW,
    DivergenceDetector,
    Jump,
    NotFinite,
    TrainingDiverged,
    settle,
)
from mien.core.training.lr_finder import Search
from mien.core.training.trainer import Trainer

RECIPE = """
description = "Three short stages."

[[stage]]
name = "learn"
iterations = 4

[[stage]]
name = "other loss"
rate_factor = 0.5
set.augment.warp = false
set.loss.loss_function_2 = "mae"
plateau = { window = 2, patience = 2, improvement = 100 }

[[stage]]
name = "finish"
set.augment.flip = false
iterations = 3
"""


def _words(sides, model_dir, *more):
    settings = ("--set", "train.batch_size=4", "--set", "train.log_interval=2")
    return train_words(sides, model_dir, *settings, *more)


def _train(sides, model_dir, *more):
    return main(_words(sides, model_dir, *more))


def _state(model_dir):
    pointer = json.loads((model_dir / "state.json").read_text())
    newest = model_dir / "generations" / pointer["generation"]
    return json.loads((newest / "state.json").read_text()), newest


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "short.toml"
    path.write_text(RECIPE)
    return str(path)


def test_a_recipe_runs_unattended_with_its_settings_and_snapshots(sides, tmp_path, recipe, capsys):
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "--recipe", recipe, "--json") == 0
    events = json_events(capsys.readouterr().out)
    stages = [event["stage"] for event in events if event["event"] == "start"]
    assert stages == [
        {"recipe": "short", "name": name, "number": number, "count": 3}
        for number, name in enumerate(("learn", "other loss", "finish"), 1)
    ]
    # The first mean is the best so far; two more without 100 % of improvement end the stage.
    assert events[-1]["iteration"] == 4 + 6 + 3
    assert events[-1]["reason"] == (
        "recipe short is done: 3 iterations are done; --recipe none trains further"
    )
    assert [event["event"] for event in events].count("stop") == 1

    told = [event["iteration"] for event in events if event["event"] == "snapshot"]
    assert told == [4, 10]

    state, _ = _state(model_dir)
    sessions = state["sessions"]
    assert [session["iterations"] for session in sessions] == [4, 6, 3]
    settings = [session["settings"] for session in sessions]
    assert [each["augment"]["warp"] for each in settings] == [True, False, False]
    assert [each["augment"]["flip"] for each in settings] == [True, True, False]
    assert [each["loss"]["loss_function_2"] for each in settings] == ["mse", "mae", "mae"]
    for iteration in (4, 10):
        snapshot = tmp_path / f"model_snapshot_{iteration}_iters"
        with ModelFolder(snapshot, read_only=True) as folder:
            kept = folder.load()
        assert kept.state["iterations"] == iteration
        assert kept.optimizer is not None


def test_interrupted_inside_every_stage_it_equals_the_uninterrupted_run(sides, tmp_path, recipe):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert _train(sides, straight, "--recipe", recipe) == 0
    for iterations in (2, 3, 2, 4):  # in the first, the second, the same again, the third
        assert _train(sides, resumed, "--recipe", recipe, "-i", str(iterations)) == 0
    assert main(["train", "-m", str(resumed)]) == 0, "the recipe is in the model"
    assert_same_bits(straight, resumed)
    state, _ = _state(resumed)
    assert state["iterations"] == 13
    assert len(state["sessions"]) > 4


def test_a_done_recipe_says_so_and_can_be_left(sides, tmp_path, capsys):
    path = tmp_path / "once.toml"
    path.write_text('[[stage]]\nname = "all"\niterations = 2\nset.augment.warp = false\n')
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "-C", str(path)) == 0
    capsys.readouterr()
    assert main(["train", "-m", str(model_dir)]) == 0
    assert "recipe once is done: 2 iterations are done" in capsys.readouterr().out
    assert _state(model_dir)[0]["iterations"] == 2
    assert main(["train", "-m", str(model_dir), "--recipe", "none", "-i", "3"]) == 0
    assert _state(model_dir)[0]["iterations"] == 5
    assert main(["train", "-m", str(model_dir), "-i", "1"]) == 0, "left for good"
    assert _state(model_dir)[0]["iterations"] == 6


def test_a_recipe_and_a_file_with_stages_are_one_too_many(sides, tmp_path, recipe, capsys):
    assert _train(sides, tmp_path / "model", "-C", recipe, "--recipe", "standard") == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_a_recipe_that_watches_what_is_not_measured_is_refused(sides, tmp_path, capsys):
    path = tmp_path / "watch.toml"
    path.write_text('[[stage]]\nplateau = { metric = "ssim_b" }\n')
    assert _train(sides, tmp_path / "model", "--recipe", str(path)) == 2
    err = capsys.readouterr().err
    assert "watches ssim_b, but nothing is measured" in err
    assert not (tmp_path / "model").exists()


def test_a_dry_run_shows_the_stages(sides, tmp_path, recipe, capsys):
    assert _train(sides, tmp_path / "model", "--recipe", recipe, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "stage        1 learn: ends after 4 iterations (now, since iteration 0)" in said
    assert "3 finish: augment.flip = false; ends after 3 iterations" in said


def test_an_existing_snapshot_is_never_overwritten(sides, tmp_path, recipe, capsys):
    other = tmp_path / "model_snapshot_4_iters"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    assert _train(sides, tmp_path / "model", "--recipe", recipe, "-i", "5") == 0
    assert "is there already and was left as it is" in capsys.readouterr().out
    assert [path.name for path in other.iterdir()] == ["diary.txt"]


def test_a_stage_begins_with_nothing_of_the_one_before_in_memory(
    sides, tmp_path, recipe, monkeypatch
):
    original, before, left = unattended.open_setup, [], []

    @contextmanager
    def opened(*args, **more):
        left.extend(reference() for reference in before)
        with original(*args, **more) as run:
            before.append(weakref.ref(run.model))
            yield run

    monkeypatch.setattr(unattended, "open_setup", opened)
    assert _train(sides, tmp_path / "model", "--recipe", recipe) == 0
    assert left == [None, None, None], "the second stage looks at one, the third at two"


def test_a_stage_that_ends_where_a_save_is_due_is_saved_once(sides, tmp_path, recipe):
    model_dir = tmp_path / "model"
    words = ("-s", "2", "--set", "save.keep_generations=99", "--recipe", recipe)
    assert _train(sides, model_dir, *words) == 0
    names = [path.name for path in (model_dir / "generations").iterdir()]
    assert sorted(names, key=int) == ["1", "2", "4", "5", "6", "8", "10", "11", "12", "13"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("set.train.batch_size = 40", "stage late: train.batch_size is 40, but side A has 26"),
        ('set.loss.loss_function_2 = "lpips_alex"', "stage late: lpips_alex needs"),
        ('set.train.engine = "graph"', "stage late: --engine graph needs an Nvidia GPU"),
        (
            'set.optimizer = { overlap = "on", gradient_accumulation = 2 }',
            "stage late: optimizer.overlap is on, but optimizer.gradient_accumulation is 2",
        ),
        (
            'set.optimizer = { gradient_clipping = "norm", clipping_value = 0.0 }',
            "optimizer.clipping_value must be above 0",
        ),
    ],
)
def test_what_a_later_stage_cannot_begin_with_is_refused_at_the_start(
    sides, tmp_path, capsys, settings, message
):
    path = tmp_path / "late.toml"
    path.write_text(f'[[stage]]\niterations = 1\n[[stage]]\nname = "late"\n{settings}\n')
    assert _train(sides, tmp_path / "model", "--recipe", str(path), "-i", "2") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "generations").exists()


def test_the_lowest_mean_begins_anew_with_other_losses(sides, tmp_path):
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "-i", "2") == 0
    before = _state(model_dir)[0]["lowest_mean_loss"]
    heavier = ("--set", "loss.loss_weight_2=400")
    assert _train(sides, model_dir, "-i", "2", *heavier) == 0
    after = _state(model_dir)[0]["lowest_mean_loss"]
    assert after > before
    assert _train(sides, model_dir, "-i", "1", "--set", "optimizer.learning_rate=1e-6") == 0
    assert _state(model_dir)[0]["lowest_mean_loss"] <= after


@pytest.fixture
def _found(monkeypatch):
    """The finder makes one update and finds 1e-3."""
    monkeypatch.setattr(Search, "add", lambda self, loss: False)
    monkeypatch.setattr(Search, "found", lambda self: {"default": 1e-3})


def _base_rates(monkeypatch):
    """The base rate of every iteration from now on."""
    rates = []
    original = Schedule.rate

    def rate(self, iterations):
        rates.append((iterations, self.base_rate * self.factor))
        return original(self, iterations)

    monkeypatch.setattr(Schedule, "rate", rate)
    return rates


@pytest.mark.usefixtures("_found")
def test_a_rate_that_a_stage_sets_replaces_a_found_one_for_good(sides, tmp_path, monkeypatch):
    path = tmp_path / "rates.toml"
    path.write_text(
        "[[stage]]\niterations = 2\n"
        "[[stage]]\niterations = 3\nset.optimizer.learning_rate = 1e-5\n"
        "[[stage]]\niterations = 3\nset.augment.warp = false\n"
    )
    rates = _base_rates(monkeypatch)
    words = ("-r", "--recipe", str(path))
    assert _train(sides, tmp_path / "model", *words, "-i", "3") == 0
    assert _train(sides, tmp_path / "model", *words, "-i", "5") == 0, "inside a stage"
    assert dict(rates) == dict(enumerate([1e-3] * 2 + [1e-5] * 6))


# Rollbacks


def _poisoned(monkeypatch, iteration, times):
    """Put a NaN into the batch of an iteration, the first so many times that it is made."""
    original = Feed.next
    made = []

    def following(self, faces_seen):
        batch = original(self, faces_seen)
        if faces_seen["a"] == 4 * (iteration - 1) and len(made) < times:
            made.append(iteration)
            batch.input_nchw[0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(Feed, "next", following)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_rollback_goes_back_lowers_the_rate_and_goes_on(
    sides, tmp_path, monkeypatch, mode, capsys
):
    model_dir, plain = tmp_path / "model", tmp_path / "plain"
    _poisoned(monkeypatch, iteration=6, times=1)
    words = ("-i", "8", "-s", "4", "--precision", mode, "--set", "train.nan_protection=rollback")
    assert _train(sides, model_dir, *words) == 0
    said = capsys.readouterr().out
    assert "not a number at iteration 6 (loss_a" in said
    assert "rollback 1 of 3: back to iteration 4, with 0.5 times the learning rate" in said
    assert "Stopped at iteration 8: all iterations are done" in said
    assert _state(model_dir)[0]["parts"]["rollback"] == {"rate_factor": 0.5}

    # What a user would do by hand: stop at the save, resume with half the rate.
    assert _train(sides, plain, "-i", "4", "--precision", mode) == 0
    rate = ("--set", "optimizer.learning_rate=2.5e-5")
    assert _train(sides, plain, "-i", "4", "--precision", mode, *rate) == 0
    assert_same_bits(model_dir, plain)


def test_the_lowered_rate_holds_until_a_rate_is_given(sides, tmp_path, monkeypatch, capsys):
    model_dir = tmp_path / "model"
    _poisoned(monkeypatch, iteration=3, times=1)
    words = ("-i", "4", "-s", "2", "--set", "train.nan_protection=rollback")
    assert _train(sides, model_dir, *words) == 0
    assert _train(sides, model_dir, "-i", "1") == 0
    assert _state(model_dir)[0]["parts"]["rollback"] == {"rate_factor": 0.5}
    assert _train(sides, model_dir, "-i", "1", "--set", "optimizer.learning_rate=1e-5") == 0
    assert "rollback" not in _state(model_dir)[0]["parts"]


def test_the_lowered_rate_and_the_first_loss_outlive_the_same_flags(sides, tmp_path, monkeypatch):
    """A run that is started again with the line that began it goes on, whatever flags it has."""
    model_dir = tmp_path / "model"
    _poisoned(monkeypatch, iteration=3, times=1)
    words = ("-s", "2", "--set", "train.nan_protection=rollback")
    flags = ("--set", "optimizer.learning_rate=1e-2", "--warmup", "2", "--no-warp")
    assert _train(sides, model_dir, "-i", "4", *words, *flags) == 0
    before = _state(model_dir)[0]["parts"]
    assert before["rollback"] == {"rate_factor": 0.5}
    assert _train(sides, model_dir, "-i", "1", *words, *flags) == 0
    after = _state(model_dir)[0]["parts"]
    assert after["rollback"] == before["rollback"]
    for side in "ab":
        first_loss = before["divergence"][side]["first_loss"]
        assert after["divergence"][side]["first_loss"] == first_loss is not None


def test_a_stage_with_a_rate_of_its_own_leaves_the_lowered_one(sides, tmp_path, monkeypatch):
    path = tmp_path / "rates.toml"
    path.write_text(
        "[[stage]]\niterations = 4\n"
        "[[stage]]\niterations = 2\n"
        "[[stage]]\niterations = 2\nset.optimizer.learning_rate = 1e-5\n"
    )
    _poisoned(monkeypatch, iteration=3, times=1)
    rates = _base_rates(monkeypatch)
    words = ("--recipe", str(path), "-s", "2", "--set", "train.nan_protection=rollback")
    assert _train(sides, tmp_path / "model", *words) == 0
    assert dict(rates) == dict(enumerate([5e-5] * 2 + [2.5e-5] * 4 + [1e-5] * 2))


@pytest.mark.usefixtures("_found")
def test_a_given_rate_stays_in_the_place_of_a_found_one_after_a_rollback(
    sides, tmp_path, monkeypatch
):
    model_dir = tmp_path / "model"
    words = ("-r", "-s", "2", "--set", "train.nan_protection=rollback")
    assert _train(sides, model_dir, "-i", "2", *words) == 0
    _poisoned(monkeypatch, iteration=4, times=1)
    rates = _base_rates(monkeypatch)
    rate = ("--set", "optimizer.learning_rate=1e-5")
    assert _train(sides, model_dir, "-i", "3", *words, *rate) == 0
    assert dict(rates) == {2: 1e-5, 3: 0.5e-5, 4: 0.5e-5}


def test_rollbacks_give_up_after_the_stated_number(sides, tmp_path, monkeypatch, capsys):
    model_dir = tmp_path / "model"
    _poisoned(monkeypatch, iteration=4, times=99)
    words = ("-i", "9", "-s", "2", "--set", "train.nan_protection=rollback")
    limit = ("--set", "train.rollback_limit=2")
    assert _train(sides, model_dir, *words, *limit) == 3
    said = capsys.readouterr().out
    assert said.count("rollback 1 of 2") == said.count("rollback 2 of 2") == 1
    assert "with 0.25 times the learning rate" in said
    # Each session saves its first iteration, here the third.
    assert "2 rollbacks did not help, and the model is back at iteration 3" in said
    state, newest = _state(model_dir)
    assert state["iterations"] == 3
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_a_disk_that_refuses_to_go_back_hides_no_cause(sides, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise SaveError("cannot save to there: No space left on device")

    monkeypatch.setattr(ModelFolder, "go_back", refuse)
    _poisoned(monkeypatch, iteration=3, times=1)
    words = ("-i", "4", "--set", "train.nan_protection=rollback")
    assert _train(sides, tmp_path / "model", *words) == 3
    said = capsys.readouterr().out
    assert re.search(r"not a number at iteration 3 .*; cannot save to there: No space", said), said


def test_off_leaves_the_step_out_and_goes_on(sides, tmp_path, monkeypatch, capsys):
    _poisoned(monkeypatch, iteration=3, times=1)
    words = ("-i", "5", "--set", "train.nan_protection=off")
    assert _train(sides, tmp_path / "model", *words) == 0
    _, newest = _state(tmp_path / "model")
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_off_a_plateau_takes_no_loss_that_is_no_number(sides, tmp_path, monkeypatch):
    path = tmp_path / "plateau.toml"
    path.write_text("[[stage]]\nplateau = { window = 2, patience = 2 }\niterations = 5\n")
    _poisoned(monkeypatch, iteration=3, times=1)
    words = ("--recipe", str(path), "-s", "3", "--set", "train.nan_protection=off")
    assert _train(sides, tmp_path / "model", *words) == 0
    place = _state(tmp_path / "model")[0]["parts"]["recipe"]["place"]
    assert place["best"] is not None, "the mean of the first two"
    assert place["loss_count"] == 0, "4 of 5 were numbers: two windows"


def _collapsed_after(monkeypatch, iteration, windows_px=4):
    """Losses that jump after an iteration and stay, seen in short windows."""
    monkeypatch.setattr("mien.core.training.divergence.WINDOW", windows_px)
    original = Trainer._check

    def check(self, named, asked):
        numbers = asked.first + np.arange(asked.count)
        jumped = np.where(numbers > iteration, 10 * JUMP, 1.0)
        original(self, named | {"batch_total": named["batch_total"] * jumped}, asked)

    monkeypatch.setattr(Trainer, "_check", check)


def test_a_collapse_halts_with_the_model_back_before_it(sides, tmp_path, monkeypatch, capsys):
    model_dir = tmp_path / "model"
    _collapsed_after(monkeypatch, iteration=8)
    assert _train(sides, model_dir, "-i", "40", "-s", "3", "--set", "save.keep_generations=9") == 3
    said = capsys.readouterr().out
    found = re.search(r"the loss jumped from [\d.]+ to [\d.]+ after iteration 8 and stayed", said)
    assert found, said
    assert "the model is back at iteration 6" in said
    assert _state(model_dir)[0]["iterations"] == 6
    monkeypatch.undo()
    assert main(["train", "-m", str(model_dir), "-i", "1"]) == 0
    assert _state(model_dir)[0]["iterations"] == 7


def test_a_collapse_rolls_back_to_the_backup_where_newer_saves_are_bad(
    sides, tmp_path, monkeypatch, capsys
):
    model_dir = tmp_path / "model"
    _collapsed_after(monkeypatch, iteration=8)
    original = TrainingState.close_interval

    def lowest_at_six(self):
        return original(self)[0], self.iterations == 6

    monkeypatch.setattr(TrainingState, "close_interval", lowest_at_six)
    words = ("--set", "save.keep_generations=1", "--set", "train.nan_protection=rollback")
    assert _train(sides, model_dir, "-i", "24", "-s", "3", *words) == 0
    said = capsys.readouterr().out
    assert "after iteration 8 and stayed; rollback 1 of 3: back to iteration 6" in said
    assert "no save from before is left" not in said


@pytest.mark.slow
def test_a_rate_that_is_far_too_high_is_noticed_and_named(sides, tmp_path, monkeypatch, capsys):
    """Within 660 iterations at the real bounds, where each of these is a second."""
    monkeypatch.setattr("mien.core.training.divergence.ABOVE", 40)
    monkeypatch.setattr("mien.core.training.divergence.EXCESS", 8.0)
    model_dir = tmp_path / "model"
    rate = ("--set", "optimizer.optimizer=lion", "--set", "optimizer.learning_rate=0.01")
    words = ("-i", "400", "-s", "400", *rate, "--set", "save.keep_generations=9")
    assert _train(sides, model_dir, *words) == 3
    said = capsys.readouterr().out
    assert re.search(r"the loss of [AB] has been above that of the first iteration", said), said
    assert "Lower optimizer.learning_rate, which is 0.01" in said
    assert "the model is back at iteration 1." in said, "the only save"
    # Of weights that a rate like that has left, a resumed run is told what it began with.
    part = _state(model_dir)[0]["parts"]["divergence"]
    assert part["a"]["first_loss"] > 0
    assert _train(sides, model_dir, *words) == 3


def test_a_side_whose_masks_are_empty_halts_with_a_word_about_them(
    sides, tmp_path, monkeypatch, capsys
):
    original = Feed.next

    def without_masks_of_b(self, faces_seen):
        batch = original(self, faces_seen)
        for weight_n1hw in batch.weights:
            weight_n1hw[len(weight_n1hw) // 2 :] = 0
        return batch

    monkeypatch.setattr(Feed, "next", without_masks_of_b)
    model_dir = tmp_path / "model"
    for policy in ("halt", "rollback"):
        words = ("-i", "60", "--set", f"train.nan_protection={policy}")
        assert _train(sides, model_dir, *words) == 3
        said = capsys.readouterr().out
        assert "the loss of B has been exactly 0 for" in said
        assert "look at them with `mien faces check FOLDER`" in said
        assert "learning_rate" not in said.splitlines()[-1]
    assert _state(model_dir)[0]["lowest_mean_loss"] is None, "no mean of nothing is the best"


# What is looked for


def _losses(*totals):
    values = np.array(totals, dtype=np.float64)
    return {"batch_total": values, "loss_a": values, "loss_b": np.ones_like(values)}


def test_a_loss_that_is_no_number_names_iteration_and_loss():
    with pytest.raises(TrainingDiverged, match=r"at iteration 12 \(batch_total, loss_a\)"):
        NotFinite(scales_loss=True).check(_losses(1, 1, np.inf), first=10, skipped=0)


def test_single_overflows_of_fp16_are_none_but_many_in_a_row_are():
    check = NotFinite(scales_loss=True)
    for i in range(200):
        check.check(_losses(1, 1), first=1 + 2 * i, skipped=i)  # every second step
    check = NotFinite(scales_loss=True)
    for i in range(24):
        check.check(_losses(1, 1), first=1 + 2 * i, skipped=2 * i + 2)
    with pytest.raises(TrainingDiverged, match=r"last 50 iterations were too large for fp16"):
        check.check(_losses(1, 1), first=49, skipped=50)
    with pytest.raises(TrainingDiverged, match="not a number at the gradient"):
        NotFinite(scales_loss=False).check(_losses(1, 1), first=1, skipped=1)


def test_a_loss_that_jumps_and_stays_is_a_collapse_and_a_spike_is_none():
    watch = Jump()
    falling = np.linspace(1.0, 0.2, 20 * WINDOW)
    watch.check(falling, first=1)
    spike = np.full((STAYED - 1) * WINDOW, 0.9)
    watch.check(spike, first=len(falling) + 1)
    watch.check(np.full(WINDOW, 0.2), first=len(falling) + len(spike) + 1)
    at = len(falling) + len(spike) + WINDOW
    with pytest.raises(TrainingDiverged) as caught:
        watch.check(np.full(10 * WINDOW, 0.9), first=at + 1)
    assert caught.value.good_until == at


def _detector(**settings):
    state = TrainingState(trainer="original", **settings)
    settle(state, Config(), Config())
    return _detector_of(state)


def _detector_of(state, rate=0.01):
    return DivergenceDetector(state, NotFinite(scales_loss=False), rate and (lambda _: rate))


def _pictures(detector, predictions, faces, done, begun=0):
    detector.check_pictures(predictions, faces, done, begun)


def test_faces_of_one_colour_are_a_divergence_once_there_was_more():
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 255, (2, 3, 8, 8, 3), dtype=np.uint8)
    flat = np.full_like(faces, 120)
    one_flat = faces.copy()
    one_flat[1] = 120
    noise = 120 + faces // 64  # what an untrained network shows
    detector = _detector()
    _pictures(detector, noise, faces, 1)
    _pictures(detector, flat, faces, 9)  # not learnt yet
    _pictures(detector, faces, faces, 500)
    with pytest.raises(TrainingDiverged, match="every face of B has become one colour") as caught:
        _pictures(detector, one_flat, faces, 900)
    assert caught.value.good_until == 500
    _pictures(_detector(), flat, flat, 9000)
    _pictures(_detector(iterations=8000), flat, faces, 9000, begun=8000)
    with pytest.raises(TrainingDiverged, match="every face of A") as caught:
        _pictures(_detector(iterations=4000), flat, faces, 9000, begun=4000)
    assert caught.value.good_until == 4000


def test_one_picture_for_all_faces_is_a_divergence_where_the_faces_differ():
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 255, (2, 4, 8, 8, 3), dtype=np.uint8)
    neon = np.broadcast_to(faces[:, :1] // 128 * 200 + 20, faces.shape)
    mean = np.broadcast_to(faces[:, :1], faces.shape) // 2 + faces // 16  # blurred, but it differs
    grey = 120 + neon // 64
    detector = _detector()
    _pictures(detector, neon, faces, WINDOW - 1)  # as the first weights happened to be
    _pictures(detector, grey, faces, 2 * WINDOW)
    _pictures(detector, mean, faces, 3 * WINDOW)
    with pytest.raises(TrainingDiverged, match="every face of A has become the same picture") as c:
        _pictures(detector, neon, faces, 4 * WINDOW)
    assert c.value.good_until == 3 * WINDOW
    a_still = faces[:, :1] // 2 + rng.integers(0, 3, faces.shape, dtype=np.uint8)
    _pictures(_detector(), neon, a_still, 4 * WINDOW)
    _pictures(_detector(), neon[:, :1], faces[:, :1], 4 * WINDOW)


@pytest.mark.parametrize("shown", [0, 255, "neon"])
def test_pure_colours_are_a_divergence_even_where_there_was_nothing_before(shown):
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 255, (2, 4, 8, 8, 3), dtype=np.uint8)
    pure = faces // 128 * 255 if shown == "neon" else np.full_like(faces, shown)
    _pictures(_detector(), pure, faces, WINDOW - 1)
    with pytest.raises(TrainingDiverged, match="every face of A has become pure colours"):
        _pictures(_detector(), pure, faces, WINDOW)
    _pictures(_detector(), pure, pure, WINDOW)  # drawn so


def test_a_model_that_never_showed_faces_has_no_good_save():
    faces = np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8, 3), dtype=np.uint8)
    neon = np.broadcast_to(faces[:, :1], faces.shape)
    with pytest.raises(TrainingDiverged) as caught:
        _pictures(_detector(), neon, faces, WINDOW)
    assert caught.value.good_until == 0
    state = TrainingState(trainer="original", iterations=WINDOW)
    state.parts[PART] = _detector().to_dict()
    again = _detector_of(state)
    with pytest.raises(TrainingDiverged) as caught:
        _pictures(again, neon, faces, 2 * WINDOW, begun=WINDOW)
    assert caught.value.good_until == 0, "not what this session began with"


def _side_losses(a, b=None):
    """Losses by name, those of B falling."""
    a = np.asarray(a, dtype=np.float64)
    b = np.linspace(1.0, 0.5, len(a)) if b is None else np.asarray(b, dtype=np.float64)
    named = {"batch_total": a + b, "loss_a": a, "loss_b": b}
    return named | {"batch_face_a": a, "batch_face_b": b}


def _check(detector, named, sizes, first=1):
    """Hand the losses on in pieces."""
    at = 0
    for size in sizes:
        piece = {name: values[at : at + size] for name, values in named.items()}
        detector.check_losses(piece, first + at, skipped=0)
        at += size


@pytest.mark.parametrize("sizes", [[1] * 600, [600], [250, 350]])
def test_a_loss_that_stays_above_its_first_is_a_divergence(sizes):
    losses = np.full(600, 1.25)
    losses[:50] = 1.0
    with pytest.raises(TrainingDiverged) as caught:
        _check(_detector(), _side_losses(losses), sizes)
    assert str(caught.value) == (
        "the loss of A has been above that of the first iteration, 1.0000, for 400 iterations, "
        "1.2500 on average"
    )
    assert caught.value.good_until == 49


def test_a_loss_a_little_above_its_first_takes_longer_to_be_a_divergence():
    _check(_detector(), _side_losses([1.0] + [1.05] * 1590), [1591])
    with pytest.raises(TrainingDiverged, match=r"for 160[01] iterations, 1\.0500 on average"):
        _check(_detector(), _side_losses([1.0] + [1.05] * 1601), [1602])


def test_a_first_batch_that_was_easy_is_no_divergence():
    """A model that learns nothing yet, with one face in a batch, one in 100 of them nearly black,
    at a usual rate: at that one the first weights are seen for eleven iterations."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = np.where(rng.random(3000) < 0.01, 0.02, rng.normal(0.4, 0.1, 3000).clip(0.05))
        losses[0] = 0.02
        state = TrainingState(trainer="original")
        settle(state, Config(), Config())
        _check(_detector_of(state, rate=5e-5), _side_losses(losses, losses), [1, 2999])


def test_a_loss_above_its_first_is_remembered_over_sessions_until_the_rate_changes():
    state = TrainingState(trainer="original")
    before = from_dict({"data": {"num_threads": 2}})
    lower = from_dict({"optimizer": {"learning_rate": 1e-5}, "data": {"placement": "host"}})
    other = from_dict({"loss": {"loss_weight_2": 50}})

    def session(config, iterations):
        settle(state, before, config)
        detector = _detector_of(state)
        losses = np.full(iterations, 1.5)
        losses[: state.iterations == 0] = 1.0
        _check(detector, _side_losses(losses), [iterations], first=state.iterations + 1)
        state.iterations += iterations
        state.parts[PART] = json.loads(json.dumps(detector.to_dict()))

    session(before, 399)
    session(lower, 399)
    assert state.parts[PART]["a"]["above"] == 399
    with pytest.raises(TrainingDiverged, match="for 400 iterations"):
        session(before, 10)
    session(other, 1000)
    assert state.parts[PART]["a"]["first_loss"] is None, "another loss does not compare"


@pytest.mark.parametrize("at", [1, 3, 11, 30])
def test_the_first_loss_of_a_resumed_run_is_that_of_an_undisturbed_one(at):
    """A run that is killed while its weights are the first ones goes on to the same bits.

    What they have moved by is what earlier sessions have moved them, whatever their rates were.
    """
    losses = np.random.default_rng(0).random(40)

    def trained(*ends, rates=(5e-5, 5e-5)):
        state = TrainingState(trainer="original")
        for end, rate in zip(ends, rates, strict=False):
            settle(state, Config(), Config())
            detector = _detector_of(state, rate=rate)
            first, count = state.iterations + 1, end - state.iterations
            seen = losses[first - 1 : end]
            _check(detector, _side_losses(seen, seen), [count], first=first)
            state.iterations = end
            state.parts[PART] = json.loads(json.dumps(detector.to_dict()))
        return state.parts[PART]

    assert trained(at, 40) == trained(40)
    moved = trained(at, at + 1, rates=(1e-5, 4e-5))["moved"]
    assert moved == pytest.approx(1e-5 * at + 4e-5)


def test_weights_that_were_loaded_have_no_first_loss():
    state = TrainingState(trainer="original")
    settle(state, Config(), Config())
    _check(_detector_of(state, rate=None), _side_losses([1.0] + [1.5] * 900), [901])


def test_a_side_without_any_loss_is_a_divergence_with_another_remedy():
    losses = np.full(60, 0.4)
    losses[10:20] = losses[21:45] = 0.0
    _check(_detector(), _side_losses(losses), [60])
    losses[45] = 0.0
    with pytest.raises(TrainingDiverged, match="loss of A has been exactly 0 for 25 it") as caught:
        _check(_detector(), _side_losses(losses), [1] * 60)
    assert "mien faces check" in caught.value.remedy
    masks_are_learnt = _side_losses(losses) | {"loss_a": losses + 0.1}
    with pytest.raises(TrainingDiverged, match="loss of A has been exactly 0"):
        _check(_detector(), masks_are_learnt, [60])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "it lacks parts.divergence.a"),
        ({"first_loss": 0.0}, "divergence.b.first_loss must be above 0, got 0.0"),
        ({"first_loss": "x"}, "divergence.b.first_loss must be a finite number, got 'x'"),
        ({"above": 11}, "b.above must be a whole number from 0 to 10, got 11"),
        ({"excess": 10**400}, "divergence.b.excess must be a finite number, got 1000"),
        ({"zeros": -1}, "divergence.b.zeros must be a whole number"),
        ({"good_until": None}, "divergence.b.good_until must be a whole number"),
        ({"has_varied": 1}, "divergence.b.has_varied must be true or false, got 1"),
        ({"x": 1}, "it has the unknown key parts.divergence.b.x"),
        ({"moved": -1.0}, "divergence.moved must be a number, at least 0"),
    ],
)
def test_what_no_run_has_saved_of_it_is_refused(value, text):
    state = TrainingState(trainer="original", iterations=10)
    part = _detector().to_dict()
    (part if "moved" in value else part["b"]).update(value)
    state.parts[PART] = part if value else {}
    with pytest.raises(ValueError, match="the saved state is not valid") as caught:
        settle(state, Config(), Config())
    assert text in str(caught.value)


# When the optimizer's state is kept


@pytest.mark.parametrize(
    ("when", "kept"), [("always", (1, 1)), ("exit", (0, 1)), ("never", (0, 0))]
)
def test_the_optimizer_is_saved_when_asked(sides, tmp_path, when, kept):
    model_dir = tmp_path / "model"
    words = ("-s", "2", "--set", f"save.save_optimizer={when}", "--set", "save.keep_generations=9")
    assert _train(sides, model_dir, "-i", "3", *words) == 0
    generations = model_dir / "generations"
    assert (generations / "2/optimizer.safetensors").exists() == bool(kept[0])
    assert (generations / "3/optimizer.safetensors").exists() == bool(kept[1])
    assert _train(sides, model_dir, "-i", "1") == 0


def test_the_first_iteration_of_a_session_is_no_mean_to_beat(sides, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(sides, model_dir, "-i", "5", "-s", "4", "--json") == 0
    events = json_events(capsys.readouterr().out)
    steps = {e["iteration"]: e["loss_a"] + e["loss_b"] for e in events if e["event"] == "step"}
    saves = {e["iteration"]: e["mean_loss"] for e in events if e["event"] == "save"}
    assert saves[1] is None
    lines = [steps[1], 2 * steps[3], steps[4]]  # the status lines are means of 1, 2 and 1
    assert saves[4] == pytest.approx(sum(lines) / 4)
    assert _state(model_dir)[0]["lowest_mean_loss"] == pytest.approx(min(saves[4], saves[5]))


def test_a_later_stage_that_cannot_begin_is_told_as_the_end(
    sides, tmp_path, recipe, monkeypatch, capsys
):
    opened, open_run = [], unattended.open_setup

    def second_fails(*args, **kwargs):
        opened.append(args)
        if len(opened) == 2:
            raise ValueError("the faces are gone; put them back")
        return open_run(*args, **kwargs)

    monkeypatch.setattr(unattended, "open_setup", second_fails)
    assert _train(sides, tmp_path / "model", "--recipe", recipe, "--json") == 2
    said = capsys.readouterr()
    stop = json.loads(said.out.splitlines()[-1])
    assert (stop["event"], stop["iteration"], stop["exit_code"]) == ("stop", 4, 2)
    assert stop["reason"] in said.err


def test_stages_hand_the_optimizer_on_even_where_it_is_never_kept(sides, tmp_path, recipe):
    always, never = tmp_path / "always", tmp_path / "never"
    assert _train(sides, always, "--recipe", recipe) == 0
    assert _train(sides, never, "--recipe", recipe, "--set", "save.save_optimizer=never") == 0
    ours, theirs = (load_file(_state(each)[1] / "model.safetensors") for each in (always, never))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert not (_state(never)[1] / "optimizer.safetensors").exists()
    assert (tmp_path / "never_snapshot_4_iters/generations").is_dir()
