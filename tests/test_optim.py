"""The update: every optimizer, non-finite steps, the loss scale, saving and loading."""

import ast

import numpy as np
import pytest
import torch
from conftest import oracle_files
from torch import nn

from mien.core.config import OptimizerConfig
from mien.core.train import precision as precisions
from mien.core.train.optim import Update
from mien.kernels.control import LEARNING_RATE

CPU = torch.device("cpu")


def _update(model, mode="fp32", **settings):
    return Update(model, OptimizerConfig(**settings), precisions.resolve(mode, CPU))


def _move(update, loss):
    """Move the weights by the gradient of a loss, made small and scaled as in a step."""
    scale = 1.0 if update.scale is None else update.scale
    update(torch.autograd.grad(1e-3 * loss.float() * scale, update.parameters))


def _input(update, values):
    """In the precision of the network."""
    return values.to(update.precision.compute)


STEPS = [p for p in oracle_files("optim/*.npz") if p.stem not in ("autoclip", "lr_finder")]


@pytest.mark.oracle
@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_every_optimizer_equals_the_oracle(path):
    """20 steps of a layer. The oracle's adabelief is wrong from step 11 on; `own` is without that."""
    data = np.load(path, allow_pickle=False)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(data["k0"]).t())
        layer.bias.copy_(torch.from_numpy(data["b0"]))
    update = _update(layer, **ast.literal_eval(str(data["config"])))
    own = "own_without_cache_bug:"
    wanted = [data[f"{own}{name}" if f"{own}{name}" in data.files else name] for name in "kb"]
    for step, rate in enumerate(data["lr_used"]):
        update.parts[0].control[LEARNING_RATE] = float(rate)
        gradient_k = torch.from_numpy(data["grad_k"][step]).t()
        update([gradient_k, torch.from_numpy(data["grad_b"][step])])
        ours = layer.weight.detach().t().numpy(), layer.bias.detach().numpy()
        for name, got, want in zip("kb", ours, wanted, strict=True):
            message = f"step {step} {name}"
            np.testing.assert_allclose(got, want[step], rtol=0, atol=2e-6, err_msg=message)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(mode, poison):
    layer = nn.Linear(4, 3)
    update = _update(layer, mode, learning_rate=1e-2)
    _move(update, layer(_input(update, torch.ones(1, 4))).sum())
    before = [tensor.clone() for tensor in (*update.masters, *layer.parameters())]
    state = {name: tensor.clone() for name, tensor in update.tensors().items()}
    bad = torch.ones(1, 4)
    bad[0, 2] = poison
    _move(update, layer(_input(update, bad)).sum())
    assert int(update.skipped) == 1
    for now, then in zip((*update.masters, *layer.parameters()), before, strict=True):
        assert torch.equal(now, then)
    for name, tensor in update.tensors().items():
        if name == "scale" and mode == "fp16":
            assert float(tensor) == float(state[name]) / 2
        elif name != "good_steps":
            assert torch.equal(tensor, state[name]), name
    _move(update, layer(_input(update, torch.ones(1, 4))).sum())
    assert not torch.equal(update.masters[0], before[0]), "training did not go on"


def test_the_loss_scale_is_undone():
    """fp16's scaled gradients move the weights as far as unscaled ones, but for their rounding."""
    results = []
    for mode in ("fp32", "fp16"):
        torch.manual_seed(1)
        layer = nn.Linear(4, 3)
        update = _update(layer, mode, learning_rate=1e-2)
        for _ in range(3):
            _move(update, layer(_input(update, torch.ones(1, 4))).square().sum())
        results.append(update.weights())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=1e-3)


def test_the_loss_scale_grows_after_2000_good_steps():
    layer = nn.Linear(1, 1)
    update = _update(layer, "fp16")
    first = float(update.scale)
    for _ in range(2000):
        update([torch.zeros_like(parameter) for parameter in layer.parameters()])
    assert float(update.scale) == 2 * first


def _trained(steps, mode="fp32", saved_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    model.to(memory_format=torch.channels_last)
    update = _update(model, mode, learning_rate=1e-2)
    x = torch.rand(2, 3, 8, 8)
    for step in range(steps):
        if step == saved_at:
            weights = {k: v.clone().contiguous() for k, v in update.weights().items()}
            saved = {k: v.clone().contiguous() for k, v in update.tensors().items()}
            model.float()
            update = _update(model, mode, learning_rate=1e-2)
            update.load_weights(weights)
            update.load(saved)
        _move(update, model(_input(update, x)).float().square().sum())
    return update.weights()


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_loaded_update_continues_bit_for_bit(mode):
    straight, resumed = _trained(8, mode), _trained(8, mode, saved_at=4)
    for name, tensor in straight.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_the_network_sees_rounded_weights_and_the_optimizer_keeps_exact_ones(mode):
    layer = nn.Linear(8, 8)
    exact = layer.weight.detach().clone()
    update = _update(layer, mode, learning_rate=1e-4)
    assert layer.weight.dtype == update.precision.compute
    assert torch.equal(update.weights()["weight"], exact)
    for _ in range(5):
        _move(update, layer(_input(update, torch.ones(1, 8))).float().square().sum())
    assert torch.equal(layer.weight, update.weights()["weight"].to(layer.weight.dtype))
    assert not torch.equal(update.weights()["weight"], exact)


def test_new_settings_take_effect_on_a_loaded_update():
    layer = nn.Linear(2, 2)
    update = _update(layer, learning_rate=1e-2)
    _move(update, layer(torch.ones(1, 2)).sum())
    later = _update(layer, learning_rate=1e-4)
    later.load(update.tensors())
    before = later.weights()["weight"].clone()
    _move(later, layer(torch.ones(1, 2)).sum())
    moved = (later.weights()["weight"] - before).abs().max()
    assert float(moved) == pytest.approx(1e-4, rel=0.05)


def test_weights_of_another_model_are_refused():
    update = _update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight has another shape"):
        update.load_weights(_update(nn.Linear(3, 2)).weights())
    with pytest.raises(ValueError, match="bias is in only one of them"):
        update.load_weights(_update(nn.Linear(2, 2, bias=False)).weights())


def test_state_of_another_shape_is_refused():
    update = _update(nn.Linear(2, 2))
    theirs = _update(nn.Linear(3, 2)).tensors()
    with pytest.raises(ValueError, match=r"weight.mean has shape \(2, 3\), the model \(2, 2\)"):
        update.load(theirs)
    del theirs["step"]
    with pytest.raises(ValueError, match="state of step has shape none"):
        update.load(theirs)


def test_policies():
    auto = precisions.resolve("auto", CPU)
    assert auto.name == "fp32"
    with pytest.raises(ValueError, match="tf32 needs an Nvidia GPU; use fp32 or bf16"):
        precisions.resolve("tf32", CPU)
    for mode, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        policy = precisions.resolve(mode, CPU)
        assert policy.compute == dtype
        assert policy.scales_loss == (mode == "fp16")
