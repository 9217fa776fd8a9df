"""The learning rate of every iteration, and when its schedule begins anew."""

import json
import math

import pytest
import torch
from conftest import assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mien.cli import main
from mien.core import precision as precisions
from mien.core.checkpoint.state import TrainingState
from mien.core.config import OptimizerConfig, from_dict
from mien.core.optim import overlap
from mien.core.optim.lr_schedule import Schedule, begin_schedule
from mien.kernels.optimizer_scalars import Scalar

CPU = torch.device("cpu")


def _schedule(begun=0, factor=1.0, **settings):
    config = OptimizerConfig(**settings)
    return Schedule(config=config, base_rate=1e-3, source="as set", begun=begun, factor=factor)


def _rates(schedule, *iterations):
    return [schedule.rate(each) for each in iterations]


def test_without_a_schedule_the_rate_is_the_base_rate_to_the_bit():
    schedule = _schedule()
    assert _rates(schedule, 0, 1, 10**9) == [1e-3] * 3
    assert schedule.is_constant
    assert str(schedule) == "0.001 (as set), constant"


def test_a_warm_up_is_one_update_ahead_of_the_reference(oracle):
    file = oracle("optim/adam_warmup8.npz")
    reference = file["lr_used"]
    schedule = _schedule(warmup_steps=int(file["warmup"]))
    ours = _rates(schedule, *range(len(reference)))
    assert ours[:-1] == pytest.approx(reference[1:].tolist(), rel=1e-15)
    assert ours[0] == 1e-3 / 8, "the first update moves something"
    assert ours[7] == ours[-1] == 1e-3
    assert not schedule.is_constant
    assert str(schedule) == (
        "0.001 (as set), warm-up over 8 updates, constant; begun at iteration 0"
    )


def test_a_warm_up_counts_updates_and_not_iterations():
    schedule = _schedule(warmup_steps=4, gradient_accumulation=3, begun=100)
    rates = _rates(schedule, *range(100, 113))
    assert rates == pytest.approx([k * 1e-3 / 4 for k in (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4)])


def test_a_cosine_falls_to_its_factor_and_stays():
    schedule = _schedule(schedule="cosine", schedule_iterations=8, schedule_factor=0.25, begun=5)
    expected = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    rates = _rates(schedule, *range(5, 14))
    assert rates == pytest.approx([1e-3 * each for each in expected], rel=1e-14)
    assert rates[0] == 1e-3
    assert rates[4] == pytest.approx(1e-3 * 0.625)
    assert _rates(schedule, 13, 14, 10**6) == [0.25e-3] * 3
    assert "falls along a cosine to 0.25 of it in 8 iterations; begun at iteration 5" in str(
        schedule
    )


def test_steps_multiply_again_and_again():
    schedule = _schedule(schedule="step", schedule_iterations=3, schedule_factor=0.5)
    rates = _rates(schedule, 0, 2, 3, 5, 6, 30)
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 1e-3 * 0.5**10]
    assert "falls to 0.5 of itself every 3 iterations" in str(schedule)


def test_a_warm_up_multiplies_a_cosine_and_a_factor_all():
    both = _schedule(schedule="cosine", schedule_iterations=9, warmup_steps=4, factor=0.5)
    cosine = _schedule(schedule="cosine", schedule_iterations=9)
    warm = _schedule(warmup_steps=4)
    for i in range(12):
        assert both.rate(i) == pytest.approx(cosine.rate(i) * warm.rate(i) * 0.5 / 1e-3, rel=1e-14)


def _config(**optimizer):
    return from_dict({"optimizer": optimizer})


def test_a_schedule_begins_with_the_model_and_again_where_a_setting_of_it_changes():
    state = TrainingState(trainer="original")
    assert begin_schedule(state, _config()).begun == 0
    state.iterations = 70
    state = TrainingState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert begin_schedule(state, _config(learning_rate=1e-4)).begun == 0
    assert begin_schedule(state, _config(warmup_steps=10)).begun == 70
    state.iterations = 90
    assert begin_schedule(state, _config(warmup_steps=10)).begun == 70
    assert begin_schedule(state, _config(warmup_steps=10, schedule="cosine")).begun == 90
    state.iterations = 91
    for changed in ({"schedule_iterations": 7}, {"schedule_factor": 0.2}, {"schedule": "step"}):
        state.iterations += 1
        assert begin_schedule(state, _config(**changed)).begun == state.iterations


def test_a_model_that_is_older_than_schedules_begins_one_now():
    state = TrainingState(trainer="original", iterations=30)
    assert begin_schedule(state, _config(warmup_steps=5)).rate(30) == 5e-5 / 5


@pytest.mark.parametrize("setting", ["off", "on"])
def test_a_set_rate_reaches_every_part_and_is_written_once(setting, monkeypatch):
    precision = precisions.resolve("fp32", CPU)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    config = OptimizerConfig(learning_rate=1e-3, overlap=setting)
    update = overlap.choose(config, precision)(model, config, precision)
    if setting == "on":
        update._split([[0, 1], [2, 3]])
    update.set_rate(3e-4)
    assert [float(part.scalars[Scalar.LEARNING_RATE]) for part in update.parts] == [3e-4] * len(
        update.parts
    )
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *_: pytest.fail("nothing has changed"))
    update.set_rate(3e-4)


def _train(sides, model_dir, *more):
    words = ["train", "-A", str(sides[0]), "-B", str(sides[1]), "-m", str(model_dir), "-b", "2"]
    words += ["-t", "lightweight", "--set", "model.options.width=8", "--device", "cpu"]
    return main([*words, "--set", "train.log_interval=1", *more])


def _steps(text):
    events = [json.loads(line) for line in text.splitlines()]
    return {e["iteration"]: e["learning_rate"] for e in events if e["event"] == "step"}


def test_a_run_resumed_inside_a_cosine_equals_an_uninterrupted_one(sides, tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    cosine = ("--json", "--set", "optimizer.warmup_steps=3", "--set", "optimizer.schedule=cosine")
    cosine += ("--set", "optimizer.schedule_iterations=8")
    assert _train(sides, straight, "-i", "6", *cosine) == 0
    told = _steps(capsys.readouterr().out)
    expected = _schedule(schedule="cosine", schedule_iterations=8, warmup_steps=3)
    assert told == {k: pytest.approx(expected.rate(k - 1) * 5e-5 / 1e-3) for k in range(1, 7)}
    assert _train(sides, resumed, "-i", "2", *cosine) == 0
    assert _train(sides, resumed, "-i", "4", "--json") == 0
    told |= _steps(capsys.readouterr().out)
    assert told[6] == pytest.approx(expected.rate(5) * 5e-5 / 1e-3)
    assert_same_bits(straight, resumed)


def test_a_warm_up_given_at_a_resume_begins_there_and_is_logged(sides, tmp_path, capsys):
    model = tmp_path / "model"
    assert _train(sides, model, "-i", "2", "--json") == 0
    assert _steps(capsys.readouterr().out) == {1: 5e-5, 2: 5e-5}
    assert _train(sides, model, "-i", "3", "-a", "4") == 0
    said = capsys.readouterr().out
    assert "5e-05 (as set), warm-up over 4 updates, constant; begun at iteration 2" in said
    events = EventAccumulator(str(model / "logs/session_2/train")).Reload()
    rates = {e.step: e.value for e in events.Scalars("learning_rate")}
    assert rates == {2 + k: pytest.approx(5e-5 * k / 4) for k in (1, 2, 3)}
    first = EventAccumulator(str(model / "logs/session_1/train")).Reload()
    assert "learning_rate" not in first.Tags()["scalars"], "it was constant"
    assert _train(sides, model, "-i", "1", "--json") == 0
    assert _steps(capsys.readouterr().out) == {6: 5e-5}
