"""The average of the weights: kept by the update, saved, and used for all that is shown."""

import dataclasses
import math
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import CPU, assert_same_bits, saved_tensors, train_words
from safetensors import safe_open
from torch import nn

from mien.cli import main
from mien.core import load_model
from mien.core import precision as precisions
from mien.core.checkpoint.format import Generation
from mien.core.checkpoint.inference import read_model
from mien.core.checkpoint.state import TrainingState
from mien.core.config import OptimizerConfig, from_dict
from mien.core.exchange.tensors_export import export_tensors
from mien.core.faces.synthetic import draw_folder
from mien.core.optim.averaged import averaged, note_weight_of_average
from mien.core.optim.optimizer import Update, average_weight
from mien.core.optim.overlap import OverlappedUpdate
from mien.core.preview.previewer import Pictures
from mien.core.training import checkpointing, memory
from mien.core.training.resume import restore
from mien.kernels.optimizer_scalars import Scalar


def _layer():
    torch.manual_seed(3)
    return nn.Linear(6, 4)


def _update(mode="fp32", ema=0.9, kind=Update, frozen=(), **settings):
    config, layer = OptimizerConfig(learning_rate=1e-2, **settings), _layer()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    ema = 0.0 if config.optimizer == "schedule-free" else ema
    return kind(layer, config, precisions.resolve(mode, CPU), ema)


def _step(update):
    """A step by the same gradient."""
    scale = 1.0 if update.scale is None else float(update.scale)
    update([torch.full_like(each, 2.0**-6 * scale) for each in update.parameters])


def _expected(ema, steps, **settings):
    """The averages in float64 by the weights that come after each step without an average."""
    update = _update(ema=0.0, **settings)
    averages = [each.double() for each in update.master_weights]
    for step in range(1, steps + 1):
        _step(update)
        decay = min(ema, (1 + step) / (10 + step))
        pairs = zip(averages, update.master_weights, strict=True)
        averages = [decay * average + (1 - decay) * weight for average, weight in pairs]
    return averages


@pytest.mark.parametrize("kind", [Update, OverlappedUpdate])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_the_average_is_that_of_the_formula(mode, kind):
    update = _update(mode, ema=0.2, kind=kind)
    for _ in range(5):
        _step(update)
    for average, want in zip(update.averages.values(), _expected(0.2, 5, mode=mode), strict=True):
        # Weights below 1, rounded to fp32 at each of 5 steps: measured 6e-8.
        torch.testing.assert_close(average.double(), want, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", [Update, OverlappedUpdate])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_schedule_free_averages_its_bases(mode, kind):
    update, bases = _update(mode, kind=kind, optimizer="schedule-free"), []
    for _ in range(5):
        _step(update)
        bases.append([each.double() for each in update.moments["base"]])
    for average, *own in zip(update.averages.values(), *bases, strict=True):
        # Weights below 1, rounded to fp32 at each of 5 steps.
        torch.testing.assert_close(average.double(), sum(own) / 5, rtol=0, atol=3e-7)
    assert average_weight(update) == pytest.approx(5 * 1e-4)


RULES_WITH_AVERAGE = [{"optimizer": "adam"}, {"optimizer": "schedule-free"}]
"""The first of them with `train.ema`."""


@pytest.mark.parametrize("rule", RULES_WITH_AVERAGE, ids=lambda rule: rule["optimizer"])
def test_an_average_weighs_the_same_without_the_optimizers_state(rule):
    """A resume goes on with the average and its weight, and schedule-free from the average."""
    update, state = _update(**rule), TrainingState(trainer="original")
    for _ in range(5):
        _step(update)
    note_weight_of_average(state, update)
    saved = Generation(
        name="000000000005",
        path=Path("m"),
        model=update.weights(),
        optimizer=None,
        ema=update.averages,
        state=state.to_dict(),
        config=None,
    )
    resumed = _update(**rule)
    restore(from_dict({}), saved, resumed)
    assert average_weight(resumed) == average_weight(update)
    begun = saved.model if rule["optimizer"] == "adam" else saved.ema
    for name, average in saved.ema.items():
        assert torch.equal(resumed.averages[name], average)
        assert torch.equal(resumed.weights()[name], begun[name])
    _step(resumed)
    share = float(resumed.parts[0].scalars[Scalar.AVERAGE_SHARE])
    assert share == pytest.approx(9 / 16 if rule["optimizer"] == "adam" else 1 / 6)
    # So it does where the next save holds an optimizer that has counted since then alone.
    note_weight_of_average(state, resumed)
    later = dataclasses.replace(
        saved,
        model=resumed.weights(),
        optimizer=resumed.tensors(),
        ema=resumed.averages,
        state=state.to_dict(),
    )
    restore(from_dict({}), later, again := _update(**rule))
    assert average_weight(again) == average_weight(resumed)
    # A state of before has no such part; one that is no number is refused.
    older, damaged = saved.state | {"parts": {}}, {"parts": {"average": {"weight": -1}}}
    restore(from_dict({}), dataclasses.replace(saved, state=older), resumed := _update(**rule))
    assert average_weight(resumed) == 0
    with pytest.raises(ValueError, match=r"parts\.average\.weight must be"):
        restore(from_dict({}), dataclasses.replace(saved, state=saved.state | damaged), resumed)


def test_schedule_free_begins_anew_from_its_average_where_a_layer_is_thawed():
    update = _update(optimizer="schedule-free", frozen=["bias"])
    for _ in range(5):
        _step(update)
    saved = Generation(
        name="000000000005",
        path=Path("m"),
        model=update.weights(),
        optimizer=update.tensors(),
        ema=update.averages,
        state=TrainingState(trainer="original").to_dict(),
        config=None,
    )
    thawed = _update(optimizer="schedule-free")
    restore(from_dict({}), saved, thawed)
    assert average_weight(thawed) == 0
    for name, want in (saved.model | saved.ema).items():
        assert torch.equal(thawed.weights()[name], want)
        assert torch.equal(thawed.tensors()[f"{name}.base"], want)
    # Frozen again it has all of its state.
    restore(from_dict({}), saved, again := _update(optimizer="schedule-free", frozen=["bias"]))
    assert all(torch.equal(each, again.tensors()[name]) for name, each in saved.optimizer.items())


@pytest.mark.parametrize("rule", RULES_WITH_AVERAGE, ids=lambda rule: rule["optimizer"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_the_network_gets_its_weights_back(mode, rule):
    """The same bits, also where what is shown by the average fails; no average, no change."""
    update = _update(mode, **rule)
    for _ in range(3):
        _step(update)
    before = [each.detach().clone() for each in update.parameters]
    averages = update.averages
    with suppress(OSError), averaged(update):
        for parameter, average in zip(update.parameters, averages.values(), strict=True):
            assert torch.equal(parameter, average.to(parameter.dtype))
        assert not torch.equal(update.parameters[0], before[0])
        raise OSError("no space left")
    assert all(map(torch.equal, update.parameters, before))
    plain = _update(mode, ema=0.0)
    assert plain.averages == {}
    with averaged(plain):
        _step(plain)  # nothing is put back over it
    assert not torch.equal(plain.parameters[0], _layer().weight.to(plain.precision.compute))


def test_an_average_begins_at_the_weights_that_are_loaded():
    saved = _update(ema=0.0)
    _step(saved)
    update = _update()
    update.load_weights(saved.weights())
    update.load(saved.tensors())
    assert all(torch.equal(update.averages[name], each) for name, each in saved.weights().items())
    bad = {"weight": torch.full((4, 6), torch.nan)}
    with pytest.raises(ValueError, match="optimizer state of weight.ema must be from"):
        update.load_averages(bad)
    with pytest.raises(ValueError, match=r"must be float32 \(4, 6\), got float32 \(2,\)"):
        update.load_averages({"weight": torch.zeros(2)})


def _train(sides, model_dir, *more):
    words = ("-b", "4", "--set", "train.log_interval=2", "--set", "save.save_interval=2", *more)
    return main(train_words(sides, model_dir, *words))


@pytest.fixture(scope="module")
def model_dir(sides, tmp_path_factory):
    """A model of four iterations, resumed after two, with its average."""
    path = tmp_path_factory.mktemp("ema") / "m"
    assert _train(sides, path, "-i", "2", "--set", "train.ema=0.5") == 0
    assert _train(sides, path, "-i", "2") == 0
    return path


@pytest.fixture(scope="module")
def spied_dir(sides, tmp_path_factory):
    """A model of four iterations at once, and whether the network computed with the average
    whenever pictures and scores were made."""
    path, setups, seen = tmp_path_factory.mktemp("ema") / "m", [], {}
    with pytest.MonkeyPatch.context() as patch:

        def spied(owner, name):
            made = getattr(owner, name)

            def spy(*args, **kwargs):
                update = setups[0].step.update
                is_average = map(torch.equal, update.parameters, update.averages.values())
                seen[name] = all(is_average) and seen.get(name, True)
                return made(*args, **kwargs)

            patch.setattr(owner, name, spy)

        init = checkpointing.Checkpointer.__init__

        def noting(self, setup, *rest):
            setups.append(setup)
            init(self, setup, *rest)

        patch.setattr(checkpointing.Checkpointer, "__init__", noting)
        for name in ("look", "keep", "add_to_timelapse"):
            spied(Pictures, name)
        spied(checkpointing, "evaluate")
        faces = tmp_path_factory.mktemp("held_out")
        for side in "ab":
            draw_folder(faces / side, identity=side, count=2, size_px=96)
        settings = [f"evaluate.held_out_{side}={faces / side}" for side in "ab"]
        words = [word for each in ("train.ema=0.5", *settings) for word in ("--set", each)]
        assert _train(sides, path, "-i", "4", *words) == 0
    return path, seen


def test_a_resumed_average_equals_an_uninterrupted_one(spied_dir, model_dir):
    assert_same_bits(spied_dir[0], model_dir)
    ours, theirs = (saved_tensors(each, "ema") for each in (spied_dir[0], model_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(each, theirs[name]) for name, each in ours.items())
    weights = saved_tensors(model_dir)
    assert not any(torch.equal(each, weights[name]) for name, each in ours.items())


def test_pictures_and_scores_are_of_the_average(spied_dir):
    assert spied_dir[1] == dict.fromkeys(("look", "keep", "add_to_timelapse", "evaluate"), True)


def test_what_is_used_is_the_average_unless_raw_is_asked_for(model_dir, tmp_path, capsys):
    raw, average = saved_tensors(model_dir), saved_tensors(model_dir, "ema")
    for weights, expected in (("raw", raw), ("ema", raw | average), ("auto", raw | average)):
        target = tmp_path / f"{weights}.safetensors"
        words = ("model", "inference", str(model_dir), "-o", str(target), "--weights", weights)
        assert main([*words]) == 0
        word = "raw" if weights == "raw" else "ema"
        with safe_open(target, "pt") as stream:
            assert stream.metadata()["weights"] == word
        assert ("the average of the weights of" in capsys.readouterr().out) is (word == "ema")
        of_file, of_folder = load_model(target), load_model(model_dir, weights=weights)
        assert of_file.weights == of_folder.weights == word
        exported = tmp_path / f"exported_{weights}.safetensors"
        assert export_tensors(model_dir, exported, weights=weights).metadata["weights"] == word
        for name, tensor in of_file.network.state_dict().items():
            assert torch.equal(tensor, expected[name])
            assert torch.equal(tensor, of_folder.network.state_dict()[name])
    with pytest.raises(ValueError, match="has one set of weights, not 'raw'; leave weights out"):
        load_model(target, weights="raw")
    capsys.readouterr()
    assert main(["model", "nan-scan", str(model_dir)]) == 0
    num_tensors = len(raw) + len(average) + len(saved_tensors(model_dir, "optimizer"))
    assert f"0 of {num_tensors} tensors" in capsys.readouterr().out
    assert main(["model", "verify", str(model_dir)]) == 0
    assert main(["model", "info", str(model_dir)]) == 0
    assert "with the average of the weights" in capsys.readouterr().out


def test_a_preview_is_by_the_weights_that_are_asked_for_and_says_so(model_dir, tmp_path, capsys):
    words = {"ema": "average of the weights", "raw": "weights of the training"}
    pictures, n = {}, ("-n", "1")
    for weights in ("auto", "ema", "raw"):
        target = tmp_path / f"{weights}.png"
        assert main(["preview", str(model_dir), *n, "-o", str(target), "--weights", weights]) == 0
        chosen = words["raw" if weights == "raw" else "ema"]
        assert capsys.readouterr().out.endswith(f", by the {chosen}\n")
        assert f"iteration 4, {chosen}\0".encode() in _description(target)
        pictures[weights] = target.read_bytes()
    assert pictures["auto"] == pictures["ema"] != pictures["raw"]
    assert f"iteration 4, {words['ema']}\0".encode() in _description(model_dir / "preview.png")
    # What was kept is by the average: where others are asked for, they are drawn anew.
    pair, compare = tmp_path / "pair.png", ["preview", str(model_dir), "--compare", "3", "4"]
    for weights, source in (("auto", "the previews kept"), ("raw", "the saves of")):
        assert main([*compare, *n, "-o", str(pair), "--force", "--weights", weights]) == 0
        assert source in capsys.readouterr().out
    assert words["raw"].encode() in _description(pair)
    gone = ("--at", "1", "-o", str(tmp_path / "gone.png"), "--weights", "raw")
    assert main(["preview", str(model_dir), *gone]) == 2
    assert "not known to be by raw weights; leave --weights out" in capsys.readouterr().err
    strip = ("--strip", "-o", str(tmp_path / "strip.png"), "--weights", "raw")
    assert main(["preview", str(model_dir), *strip]) == 2
    assert "leave --weights out" in capsys.readouterr().err


def _description(png):
    """What a PNG says about itself, with the first bytes of what follows as its end."""
    content = png.read_bytes()
    start = content.index(b"tEXtDescription\0")
    length = int.from_bytes(content[start - 4 : start])
    return content[start : start + 4 + length] + b"\0"


def test_an_average_that_ends_or_begins_is_told(sides, model_dir, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    for ema, words in (
        (0, "the average of the weights is dropped, and saves from now on lack it"),
        (0.99, "the average begins at the weights as they are now"),
    ):
        assert _train(sides, other, "-i", "1", "--set", f"train.ema={ema}", "--json") == 0
        assert words in capsys.readouterr().out
        if not ema:
            with pytest.raises(ValueError, match="no average of the weights, which train.ema"):
                read_model(other, weights="ema")
    weights = saved_tensors(other)
    assert not any(
        torch.equal(average, weights[name]) for name, average in saved_tensors(other, "ema").items()
    )


def test_a_run_by_schedule_free_saves_its_average_and_goes_on_without_its_state(
    sides, tmp_path, capsys
):
    settings = ("optimizer.optimizer=schedule-free", "save.save_optimizer=never")
    words = [word for each in settings for word in ("--set", each)]
    for number in (1, 2):
        assert _train(sides, tmp_path / "m", "-i", "1", *words) == 0
        assert "but schedule-free averages the weights by itself" in capsys.readouterr().out
        source, state, _, average, weights = read_model(tmp_path / "m")
        assert weights == "ema"
        # Both steps have the same rate, and the second has no state to begin with.
        assert state["parts"]["average"] == {"weight": pytest.approx(number * 5e-5**2)}
        assert not (source / "optimizer.safetensors").exists()
        raw = saved_tensors(tmp_path / "m")
        assert all(torch.equal(raw[name], each) for name, each in average.items()) is (number == 1)


@pytest.mark.parametrize(("placement", "num_ranks"), [("gpu", 1), ("host", 1), ("gpu", 4)])
def test_the_memory_of_the_average_is_counted(placement, num_ranks):
    def parts(ema):
        settings = {
            "model": {"trainer": "lightweight", "options": {"width": 8}},
            "train": {"ema": ema, "distribution": "sharded"},
            "optimizer": {"placement": placement},
        }
        need = memory.footprint(
            from_dict(settings), precisions.resolve("bf16", CPU), num_ranks=num_ranks
        )
        return need.at(4).parts

    with_average, without = parts(0.999), parts(0.0)
    state = without["optimizer state"] / 2  # of adam: two numbers of a parameter
    assert with_average["average of the weights"] == pytest.approx(state, abs=1)
    assert without["average of the weights"] == 0


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"train\.ema must be"):
        from_dict({"train": {"ema": decay}})
