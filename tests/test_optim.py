"""The update: Adam against the oracle, non-finite steps, the loss scale, saving and loading."""

import ast

import numpy as np
import pytest
import torch
from torch import nn

from mien.core.config import OptimizerConfig
from mien.core.train import precision as precisions
from mien.core.train.optim import Update

CPU = torch.device("cpu")


def _update(model, mode="fp32", **settings):
    return Update(model, OptimizerConfig(**settings), precisions.resolve(mode, CPU))


@pytest.mark.oracle
def test_adam_equals_the_oracle(oracle_dir):
    """Every file whose settings are ours: Adam with no decay, clipping, accumulation, warm-up."""
    compared = 0
    for path in sorted(oracle_dir.glob("optim/*.npz")):
        data = np.load(path, allow_pickle=False)
        config = ast.literal_eval(str(data["config"])) if "config" in data.files else {}
        plain = {"gradient_clipping": "none", "gradient_accumulation": 1, "weight_decay": 0.0}
        plain |= {"optimizer": "adam", "ada_amsgrad": False}
        if any(config.get(key) != value for key, value in plain.items()) or data["warmup"] > 0:
            continue
        shared = ("learning_rate", "epsilon_exponent", "ada_beta_1", "ada_beta_2")
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(data["k0"]).t())
            layer.bias.copy_(torch.from_numpy(data["b0"]))
        update = _update(layer, **{key: config[key] for key in shared})
        for step in range(len(data["k"])):
            gradient_k = torch.from_numpy(data["grad_k"][step]).t()
            gradient_b = torch.from_numpy(data["grad_b"][step])
            update((layer.weight * gradient_k).sum() + (layer.bias * gradient_b).sum())
            ours = layer.weight.detach().t().numpy(), layer.bias.detach().numpy()
            for name, got, want in zip("kb", ours, (data["k"][step], data["b"][step]), strict=True):
                message = f"{path.name} step {step} {name}"
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=message)
        compared += 1
    if not compared:
        pytest.skip("the oracle has no plain Adam")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(mode, poison):
    layer = nn.Linear(4, 3)
    update = _update(layer, mode, learning_rate=1e-2)
    update(layer(torch.ones(1, 4)).sum())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in update.tensors().items()}
    bad = torch.ones(1, 4)
    bad[0, 2] = poison
    update(layer(bad).sum())
    assert int(update.skipped) == 1
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in update.tensors().items():
        if name == "scale" and mode == "fp16":
            assert float(tensor) == float(state[name]) / 2
        elif name != "good_steps":
            assert torch.equal(tensor, state[name]), name
    update(layer(torch.ones(1, 4)).sum())
    assert not torch.equal(layer.weight, before["weight"]), "training did not go on"


def test_the_loss_scale_is_undone():
    """fp16's scaled gradients move the weights exactly as far as unscaled ones."""
    layers = [nn.Linear(4, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, mode in zip(layers, ("fp32", "fp16"), strict=True):
        update = _update(layer, mode, learning_rate=1e-2)
        for _ in range(3):
            update(layer(torch.ones(1, 4)).square().sum())
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_the_loss_scale_grows_after_2000_good_steps():
    layer = nn.Linear(1, 1)
    update = _update(layer, "fp16")
    update.good_steps.fill_(1999)
    first = float(update.scale)
    update(layer(torch.ones(1, 1)).sum())
    assert float(update.scale) == 2 * first
    assert float(update.good_steps) == 0


def _trained(steps, saved_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    model.to(memory_format=torch.channels_last)
    update = _update(model, learning_rate=1e-2)
    x = torch.rand(2, 3, 8, 8)
    for step in range(steps):
        if step == saved_at:
            saved = {k: v.clone().contiguous() for k, v in update.tensors().items()}
            update = _update(model, learning_rate=1e-2)
            update.load(saved)
        update(model(x).square().sum())
    return model.state_dict()


def test_a_loaded_update_continues_bit_for_bit():
    straight, resumed = _trained(8), _trained(8, saved_at=4)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_new_settings_take_effect_on_a_loaded_update():
    layer = nn.Linear(2, 2)
    update = _update(layer, learning_rate=1e-2)
    update(layer(torch.ones(1, 2)).sum())
    later = _update(layer, learning_rate=1e-4)
    later.load(update.tensors())
    assert later.adam.param_groups[0]["lr"] == 1e-4


def test_state_of_another_shape_is_refused():
    update = _update(nn.Linear(2, 2))
    other = nn.Linear(3, 2)
    theirs = _update(other)
    theirs(other(torch.ones(1, 3)).sum())
    with pytest.raises(ValueError, match=r"state of weight has shape \(2, 3\), the model \(2, 2\)"):
        update.load(theirs.tensors())


def test_policies():
    auto = precisions.resolve("auto", CPU)
    assert auto.name == "fp32"
    with pytest.raises(ValueError, match="tf32 needs an Nvidia GPU; use fp32 or bf16"):
        precisions.resolve("tf32", CPU)
    layer = nn.Linear(4, 4)
    for mode, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        policy = precisions.resolve(mode, CPU)
        with policy.forward():
            assert layer(torch.ones(1, 4)).dtype == dtype
        assert policy.scales_loss == (mode == "fp16")
