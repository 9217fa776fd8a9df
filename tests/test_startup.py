"""What is reported at the start: the settings that decide the result, as lines and as fields."""

import os
import re

import pytest
import torch
from conftest import json_events, train_words

from mien.cli import main

FIRST_LINES = (
    *("trainer", "batch", "losses", "mask", "crop"),
    *("augment", "optimizer", "precision", "EMA", "saves"),
)


def _train(sides, model_dir, *more):
    settings = ("-i", "1", "--set", "train.batch_size=4")
    assert main(train_words(sides, model_dir, *settings, *more)) == 0


def _lines(text):
    """The table of the start by its names, in order."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("trainer "))
    end = next(number for number, line in enumerate(lines) if line.startswith("["))
    return {line.split("  ")[0].strip(): line[11:].strip() for line in lines[first:end]}


def test_the_first_lines_tell_what_decides_the_result(sides, tmp_path, capsys):
    _train(sides, tmp_path / "model")
    lines = _lines(capsys.readouterr().out)
    assert tuple(lines)[: len(FIRST_LINES)] == FIRST_LINES
    assert lines["trainer"] == "lightweight, 64 px in, 64 px out"
    assert lines["batch"] == "4 a side (as set)"
    assert lines["losses"] == "ssim 100 %, mse 100 %, eyes x 3, mouth x 2"
    assert lines["mask"] == "extended (errors count only inside)"
    assert lines["crop"] == "face, coverage 100 %, vertical offset 0 %"
    assert lines["augment"] == "warp on, warp to landmarks off, flip on, color on"
    assert lines["optimizer"] == "adam, learning rate 5e-05 (as set), constant"
    assert lines["precision"].startswith("fp32 (")
    assert lines["EMA"] == "off"
    assert lines["saves"] == "every 250 iterations, but at least 60 s apart"
    assert "changed" not in lines


def test_doctor_counts_the_threads_as_training_does(sides, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    _train(sides, tmp_path / "model")
    device = _lines(capsys.readouterr().out)["device"]
    assert device == f"CPU, {len(os.sched_getaffinity(0))} CPU threads, 7 of PyTorch"
    main(["doctor"])
    assert re.search(rf"ok  threads +{device.removeprefix('CPU, ')}\n", capsys.readouterr().out)


def test_they_tell_what_is_set_otherwise(sides, tmp_path, capsys):
    given = (
        *("loss.loss_function_2=mae", "loss.loss_weight_2=50", "loss.learn_mask=true"),
        *("data.centering=legacy", "data.coverage=87.5", "data.vertical_offset=-5"),
        *("optimizer.optimizer=lion", "optimizer.warmup_steps=4"),
        *("optimizer.gradient_clipping=autoclip", "optimizer.weight_decay=0.01"),
        "optimizer.gradient_accumulation=2",
    )
    words = [word for setting in given for word in ("--set", setting)]
    _train(sides, tmp_path / "model", *words, "-W", "--no-flip", "-s", "7")
    lines = _lines(capsys.readouterr().out)
    assert lines["losses"] == "ssim 100 %, mae 50 %, eyes x 3, mouth x 2, mse of the mask"
    assert lines["mask"] == "extended (errors count only inside, learned)"
    assert lines["crop"] == "legacy, coverage 87.5 %, vertical offset -5 %"
    assert lines["augment"] == "warp off, warp to landmarks off, flip off, color on"
    assert lines["optimizer"].startswith("lion, learning rate 5e-05 (as set), warm-up over 4")
    clipped = "gradients clipped by autoclip at 1, weight decay 0.01, 2 iterations an update"
    assert lines["optimizer"].endswith(clipped)
    assert lines["saves"] == "every 7 iterations"
    _train(sides, tmp_path / "model", "--set", "train.ema=0.99", "-P", "-s", "7")
    lines = _lines(capsys.readouterr().out)
    assert lines["EMA"] == "of the weights, decay 0.99"
    assert list(lines)[-2:] == ["changed", ""]
    assert lines["changed"] == "augment.warp: false -> true; it was set by a flag, for that session"
    begins = "the average begins at the weights as they are now"
    assert lines[""] == f"train.ema: 0.0 -> 0.99; {begins}"
    unused = ("--set", "loss.penalized_mask_loss=false", "--save-minutes", "1")
    _train(sides, tmp_path / "other", *unused)
    lines = _lines(capsys.readouterr().out)
    assert lines["mask"] == "extended (not used)"
    assert lines["losses"] == "ssim 100 %, mse 100 %"
    assert lines["saves"] == "every minute"


@pytest.fixture
def start(sides, tmp_path, capsys):
    """The event of a start."""
    _train(sides, tmp_path / "model", "--json", "--no-flip")
    events = json_events(capsys.readouterr().out)
    return next(event for event in events if event["event"] == "start")


def test_the_event_has_fields_and_no_sentences(start, sides, tmp_path):
    expected = {
        "trainer": "lightweight",
        "options": {"width": 8},
        "iteration": 0,
        "session": 1,
        "input_px": 64,
        "output_px": [64],
        "batch_size": 4,
        "batch_size_bound": None,
        "losses": [{"name": "ssim", "weight": 1.0}, {"name": "mse", "weight": 1.0}],
        "mask_loss": None,
        "mask_type": "extended",
        "penalized_mask_loss": True,
        "learn_mask": False,
        "centering": "face",
        "coverage": 100.0,
        "vertical_offset": 0,
        "warp": True,
        "flip": False,
        "color": True,
        "warp_to_landmarks": False,
        "optimizer": "adam",
        "gradient_clipping": "none",
        "clipping_value": 1.0,
        "weight_decay": 0.0,
        "gradient_accumulation": 1,
        "learning_rate": 5e-5,
        "learning_rate_is_found": False,
        "precision": "fp32",
        "engine": "eager",
        "device": "cpu",
        "save_interval": 0,
        "save_minutes": 0.0,
        "input_a": str(sides[0]),
        "model_dir": str(tmp_path / "model"),
        "stage": None,
        "frozen": [],
        "load_weights": None,
        "ema": 0.0,
        "changes": [],
    }
    assert {name: start[name] for name in expected} == expected
    assert (start["faces_a"], start["held_out"]) == (26, None)
    texts = {name: value for name, value in start.items() if isinstance(value, str)}
    for name in ("input_a", "input_b", "model_dir"):
        del texts[name]
    assert not [name for name, text in texts.items() if " " in text]
