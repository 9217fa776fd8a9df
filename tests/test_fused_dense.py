"""Training with `optimizer.fused_dense`: the weights of training without it, by another way."""

import dataclasses

import pytest
import torch
from conftest import assert_same_bits, saved_tensors, tiny_options
from torch import nn

from mien import models
from mien.benchmarks.bench_step import OneBatch, make_batch
from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import OPTIMIZERS, LossConfig, OptimizerConfig, from_dict
from mien.core.losses.weighted import Loss
from mien.core.optim import fused_dense, overlap
from mien.core.precision import Precision
from mien.core.training import engine as engines
from mien.core.training import memory
from mien.core.training.loss_buffer import LossRing
from mien.core.training.step import TrainStep
from mien.models.blocks import Dense

CPU = torch.device("cpu")
ON = ("--set", "optimizer.fused_dense=true")


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch):
    """Small enough for the dense layers of tiny models."""
    monkeypatch.setattr(fused_dense, "LEAST", 1)


def _step(is_on, mode="fp32", family="original", device=CPU, *, streams=False, model=None, **more):
    """A step of a tiny model, and where its batches come from."""
    precision = precisions.resolve(mode, device)
    precision.apply()
    model = model or models.build(family, seed=1, **tiny_options(family))
    if device.type == "cuda":
        model.align(8)
    model.to(device)
    settings = {"overlap": "off", "learning_rate": 1e-3, "epsilon_exponent": -4} | more
    config = OptimizerConfig(fused_dense=is_on, **settings)
    update = overlap.choose(config, precision)(model, config, precision)
    loss = Loss(LossConfig(), model.output_px, device)
    side_stream = torch.cuda.Stream() if streams else None
    step = TrainStep(model, loss, update, LossRing(loss.num_values, device), side_stream)
    return step, OneBatch(make_batch(model, 2, device, precision.compute))


def _trained(is_on, *, steps=3, **settings):
    step, batches = _step(is_on, **settings)
    for _ in range(steps):
        step(batches.only)
    return step


def _assert_close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], **tolerance)


def _dense_weights(model):
    return {f"{n}.linear.weight" for n, m in model.named_modules() if isinstance(m, Dense)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weights_are_those_of_gradients_in_memory(optimizer):
    plain, fused = (_trained(is_on, optimizer=optimizer) for is_on in (False, True))
    assert not plain.update.low_rank
    assert fused.update.low_rank == _dense_weights(fused.network)
    if optimizer == "lion":  # a sign of what is nearly zero may turn
        far = [
            (a - b).abs().gt(1e-6).double().mean()
            for a, b in zip(plain.update.master_weights, fused.update.master_weights, strict=True)
        ]
        assert max(far) < 0.01
    else:
        # fp32 sums over faces in another order; measured 3e-8 of weights up to 1.
        tolerance = {"rtol": 1e-5, "atol": 3e-5 if optimizer == "adabelief" else 2e-6}
        _assert_close(plain.update.weights(), fused.update.weights(), **tolerance)


@pytest.mark.parametrize("clipping", ["value", "norm", "global_norm", "autoclip"])
def test_clipped_weights_are_too(clipping):
    settings = {"gradient_clipping": clipping, "clipping_value": 1e-3}
    settings |= {"clipping_value": 5.0} if clipping == "autoclip" else {}
    plain, fused = (_trained(is_on, **settings) for is_on in (False, True))
    _assert_close(plain.update.weights(), fused.update.weights(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_in_16_bits_the_gradients_are_not_rounded(mode):
    """Weights differ by what rounding makes of a step: of 3e-3 in three, some hundredths."""
    plain, fused = (_trained(is_on, mode=mode) for is_on in (False, True))
    _assert_close(plain.update.weights(), fused.update.weights(), rtol=0, atol=1e-3)
    for parameter, master in zip(fused.update.parameters, fused.update.master_weights, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype)), "the network sees other weights"
    assert int(fused.update.skipped) == int(plain.update.skipped)


@pytest.mark.parametrize("family", models.available())
def test_every_family_uses_its_dense_weights_once(family):
    """Of one that were used twice autograd would add up the stand-ins, which is refused."""
    plain, fused = (_trained(is_on, steps=1, family=family) for is_on in (False, True))
    fitting = {
        name
        for name, parameter in fused.network.named_parameters()
        if name in _dense_weights(fused.network) and not any(s % 16 for s in parameter.shape)
    }
    assert fused.update.low_rank == fitting
    is_noisy = plain.network.is_noisy
    if not is_noisy:
        _assert_close(plain.update.weights(), fused.update.weights(), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_used_twice_is_refused():
    layer = Dense(16, 16)
    nn.init.ones_(layer.linear.weight)
    nn.init.zeros_(layer.linear.bias)
    config = OptimizerConfig(fused_dense=True)
    update = overlap.choose(config, precisions.resolve("fp32", CPU))(
        layer, config, precisions.resolve("fp32", CPU)
    )
    output = layer(layer(torch.ones(2, 16)))
    gradients = torch.autograd.grad(output.sum(), update.parameters)
    with pytest.raises(ValueError, match="must be a stand-in .* is the weight used twice"):
        update(gradients)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_an_overlapped_update_has_the_same_bits(monkeypatch, mode):
    monkeypatch.setattr(overlap, "PART", 10_000)
    settings = {"mode": mode, "steps": 4}
    alone, beside = (_trained(True, overlap=each, **settings) for each in ("off", "on"))
    assert len(beside.update.parts) >= 4
    for one, two in (
        (alone.update.weights(), beside.update.weights()),
        (alone.update.tensors(), beside.update.tensors()),
    ):
        _assert_close(one, two, rtol=0, atol=0)


def test_frozen_layers_are_left_out():
    model = models.build("original", seed=1, **tiny_options("original"))
    model.freeze()
    before = model.encoder[1].linear.weight.detach().clone()
    step, batches = _step(True, model=model)
    step(batches.only)
    assert not step.update.low_rank
    assert torch.equal(model.encoder[1].linear.weight, before)


def test_the_switch_leaves_nothing_behind_in_a_model():
    """An update of gradients in memory may take over a model that had the other kind."""
    model = models.build("original", seed=1, **tiny_options("original"))
    _step(True, model=model)
    step, batches = _step(False, model=model)
    step(batches.only)
    assert not any(m.is_low_rank for m in model.modules() if isinstance(m, Dense))


def test_a_loss_that_is_not_finite_moves_nothing():
    step, batches = _step(True)
    step(batches.only)
    before = {name: tensor.clone() for name, tensor in step.update.weights().items()}
    poisoned = dataclasses.replace(
        batches.only, targets=tuple(each * float("nan") for each in batches.only.targets)
    )
    step(poisoned)
    assert int(step.update.skipped) == 1
    _assert_close(before, step.update.weights(), rtol=0, atol=0)


def _train(sides, model_dir, *more):
    return main(
        [
            *("train", "-A", str(sides[0]), "-B", str(sides[1]), "-m", str(model_dir)),
            *("-t", "original", "--set", "model.options.width=8", "-b", "2", "--device", "cpu"),
            *more,
        ]
    )


def test_a_run_resumes_bit_for_bit_and_may_change_the_switch(sides, tmp_path, capsys):
    straight, resumed, without = (tmp_path / name for name in ("straight", "resumed", "without"))
    assert _train(sides, straight, *ON, "-i", "4") == 0
    assert "0.1 M weights of 2 are moved without a gradient" in capsys.readouterr().out
    for iterations in ("1", "3"):
        assert _train(sides, resumed, *ON, "-i", iterations) == 0
    assert_same_bits(straight, resumed)
    for switch in ("true", "false", "true"):
        words = ("--set", f"optimizer.fused_dense={switch}")
        assert _train(sides, without, *words, "-i", "2") == 0
    assert saved_tensors(without, "optimizer").keys() == saved_tensors(straight, "optimizer").keys()
    assert float(saved_tensors(without, "optimizer")["step"]) == 6


def test_it_is_told_where_no_layer_is_large_enough(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused_dense, "LEAST", 1_000_000)
    assert _train(sides, tmp_path / "model", *ON, "-i", "1") == 0
    told = "none has 1,000,000 weights or more to train, so optimizer.fused_dense does nothing"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (
            ("--set", "optimizer.gradient_accumulation=3"),
            "optimizer.gradient_accumulation is 3, whose sum needs every gradient in memory; set "
            "it to 1, or",
        ),
        (
            ("--engine", "compile"),
            "the compile engine forms every gradient by itself; use --engine eager or graph, or",
        ),
    ],
)
def test_refusals_are_one_line(sides, tmp_path, capsys, more, cause):
    assert _train(sides, tmp_path / "model", *ON, *more, "-i", "1") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"optimizer.fused_dense is on, but {cause} set optimizer.fused_dense to false" in line


def test_a_later_stage_is_refused_at_the_start(sides, tmp_path, capsys):
    path = tmp_path / "late.toml"
    path.write_text(
        '[[stage]]\niterations = 1\n[[stage]]\nname = "late"\n'
        "set.optimizer = { fused_dense = true, gradient_accumulation = 2 }\n"
    )
    assert _train(sides, tmp_path / "model", "--recipe", str(path), "-i", "2") == 2
    assert "stage late: optimizer.fused_dense is on, but" in capsys.readouterr().err


def test_the_switch_is_off_until_it_is_measured():
    assert not OptimizerConfig().fused_dense


def test_gradients_that_are_never_in_memory_are_not_planned_for(monkeypatch):
    monkeypatch.setattr(fused_dense, "LEAST", 1_000_000)
    bf16 = Precision("bf16", torch.bfloat16, "as set")
    plain, fused = (
        memory.footprint(
            from_dict({"model": {"trainer": "original"}, "optimizer": {"fused_dense": is_on}}), bf16
        ).at(16)
        for is_on in (False, True)
    )
    saved = {name: size - fused.parts[name] for name, size in plain.parts.items()}
    assert {name: size for name, size in saved.items() if size} == {"gradients": 2 * 2 * 2**24}


@pytest.mark.gpu
@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("setting", ["off", "on"])
def test_a_graphed_step_has_the_bits_of_an_eager_one(mode, setting):
    if mode == "fp16" and setting == "on":
        pytest.skip("fp16 does not overlap")
    cuda = torch.device("cuda", torch.cuda.current_device())
    done = []
    for name in ("eager", "graph"):
        step, batches = _step(True, mode, device=cuda, streams=True, overlap=setting)
        engine = engines.make(name, step, batches, pytest.fail)
        for _ in range(12):
            engine({"a": 0, "b": 0})
        torch.cuda.synchronize()
        done.append(step.update)
    assert engine.graphs
    assert done[0].low_rank
    _assert_close(done[0].weights(), done[1].weights(), rtol=0, atol=0)
