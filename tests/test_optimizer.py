"""The update: every optimizer, non-finite steps, the loss scale, saving and loading."""

import ast

import numpy as np
import pytest
import torch
from conftest import train_words
from oracle_numbers import oracle_files
from safetensors.torch import load_file
from torch import nn

from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import OPTIMIZERS, OptimizerConfig
from mien.core.optim.optimizer import Update
from mien.kernels.optimizer_scalars import Scalar

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


def _has_steps(path):
    """Whether a file of the oracle holds the steps of an optimizer: first weights and gradients."""
    with np.load(path, allow_pickle=False) as data:
        return {"config", "k0", "grad_k"} <= {*data.files}


STEPS = [path for path in oracle_files("optim/*.npz") if _has_steps(path)]


@pytest.mark.oracle
@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_every_optimizer_equals_the_oracle(path):
    """Steps of a layer. The oracle's adabelief is wrong from step 11 on; `own` is without that."""
    data = np.load(path, allow_pickle=False)
    layer = nn.Linear(*data["k0"].shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(data["k0"]).t())
        layer.bias.copy_(torch.from_numpy(data["b0"]))
    update = _update(layer, **ast.literal_eval(str(data["config"])))
    own = "own_without_cache_bug:"
    wanted = [data[f"{own}{name}" if f"{own}{name}" in data.files else name] for name in "kb"]
    for step, rate in enumerate(data["lr_used"]):
        update.parts[0].scalars[Scalar.LEARNING_RATE] = float(rate)
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
    before = [tensor.clone() for tensor in (*update.master_weights, *layer.parameters())]
    state = {name: tensor.clone() for name, tensor in update.tensors().items()}
    bad = torch.ones(1, 4)
    bad[0, 2] = poison
    _move(update, layer(_input(update, bad)).sum())
    assert int(update.skipped) == 1
    for now, then in zip((*update.master_weights, *layer.parameters()), before, strict=True):
        assert torch.equal(now, then)
    for name, tensor in update.tensors().items():
        if name == "scale" and mode == "fp16":
            assert float(tensor) == float(state[name]) / 2
        elif name != "good_steps":
            assert torch.equal(tensor, state[name]), name
    _move(update, layer(_input(update, torch.ones(1, 4))).sum())
    assert not torch.equal(update.master_weights[0], before[0]), "training did not go on"


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


STATES = [
    *({"optimizer": rule} for rule in OPTIMIZERS),
    {"optimizer": "adam", "ada_amsgrad": True, "weight_decay": 0.1},
    {"optimizer": "nadam", "gradient_accumulation": 3},
    {"optimizer": "lion", "gradient_clipping": "autoclip", "autoclip_history": 3},
    {
        "optimizer": "rms-prop",
        "gradient_accumulation": 2,
        "gradient_clipping": "autoclip",
        "clipping_value": 5.0,
    },
]


def _copied(tensors):
    """As a checkpoint's file gives them back."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _convolved(mode, settings):
    """An update of a small model, and a function that moves it by the gradients of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    model.to(memory_format=torch.channels_last)
    update = _update(model, mode, **settings)

    def move(step):
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        _move(update, model(_input(update, x)).float().square().sum())

    return update, move


@pytest.mark.parametrize(
    "settings", STATES, ids=lambda settings: "-".join(map(str, settings.values()))
)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_loaded_update_continues_bit_for_bit(mode, settings):
    """8 steps, resumed after 5: in the middle of an accumulation, with a history that is full."""
    settings = {"learning_rate": 1e-2, **settings}
    straight, move = _convolved(mode, settings)
    for step in range(8):
        move(step)
    saved, move = _convolved(mode, settings)
    for step in range(5):
        move(step)
    resumed, move = _convolved(mode, settings)
    resumed.load_weights(_copied(saved.weights()))
    resumed.load(_copied(saved.tensors()))
    for step in range(5, 8):
        move(step)
    assert resumed.tensors().keys() == straight.tensors().keys()
    for name, tensor in (straight.weights() | straight.tensors()).items():
        if name in straight.weights():
            assert tensor.dtype == torch.float32
        assert torch.equal(tensor, (resumed.weights() | resumed.tensors())[name]), name
    if mode != "fp16":  # whose scale may have left those steps out
        assert not torch.equal(resumed.master_weights[0], saved.master_weights[0])


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"optimizer": "adam"}, {"mean", "square"}),
        ({"optimizer": "adamw", "ada_amsgrad": True}, {"mean", "square", "largest"}),
        ({"optimizer": "adabelief", "ada_amsgrad": True}, {"mean", "square"}),
        ({"optimizer": "adamax"}, {"mean", "largest"}),
        ({"optimizer": "lion"}, {"mean"}),
        ({"optimizer": "schedule-free"}, {"base", "square"}),
        ({"optimizer": "rms-prop", "gradient_accumulation": 2}, {"square", "accumulator"}),
    ],
)
def test_only_what_is_needed_is_kept(settings, kinds):
    update = _update(nn.Linear(3, 2), **settings)
    names = {name for name in update.tensors() if "." in name}
    assert names == {f"{own}.{kind}" for own in ("weight", "bias") for kind in kinds}


def test_a_change_of_accumulation_or_clipping_is_taken_up():
    clipped = {"gradient_clipping": "autoclip", "autoclip_history": 4}
    saved, move = _convolved("fp32", {"gradient_accumulation": 3, **clipped})
    for step in range(14):
        move(step)
    state = _copied(saved.tensors())
    assert int(state["accumulated"]) == 2
    assert torch.isfinite(state["history"]).all()

    without, move = _convolved("fp32", {})
    without.load(state)
    assert not {"accumulated", "history"} & without.tensors().keys()
    move(14)
    assert int(without.tensors()["step"]) == 5

    fewer, move = _convolved("fp32", {"gradient_accumulation": 2, **clipped, "autoclip_history": 2})
    fewer.load(state)
    assert torch.equal(fewer.tensors()["history"], state["history"][-2:])
    move(14)
    assert int(fewer.tensors()["step"]) == 5
    assert int(fewer.tensors()["accumulated"]) == 0

    more, move = _convolved("fp32", {"gradient_accumulation": 4, **clipped, "autoclip_history": 9})
    more.load(_copied(without.tensors()))
    assert int(more.tensors()["accumulated"]) == 0
    assert not torch.isfinite(more.tensors()["history"]).any()
    more.load(state)
    assert torch.equal(more.tensors()["history"][-4:], state["history"])
    move(14)
    assert int(more.tensors()["accumulated"]) == 3


def test_what_was_accumulated_is_dropped_with_a_parameter_that_was_frozen():
    saved, move = _convolved("fp32", {"gradient_accumulation": 3})
    for step in range(5):
        move(step)
    state = _copied(saved.tensors())
    del state["0.weight.accumulator"]  # as a session that freezes it would
    resumed, _ = _convolved("fp32", {"gradient_accumulation": 3})
    resumed.load(state)
    now = resumed.tensors()
    assert int(now["accumulated"]) == 0
    assert not now["2.weight.accumulator"].any()
    assert torch.equal(now["0.weight.mean"], state["0.weight.mean"])


def test_autoclip_remembers_100_000_norms_at_most():
    clipped = {"gradient_clipping": "autoclip", "autoclip_history": 0}
    assert len(_update(nn.Linear(1, 1), **clipped).history_c) == 100_000


def test_biases_and_norms_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.register_parameter("odd_bias", nn.Parameter(torch.ones(2, 2)))
    (part,) = _update(model, weight_decay=0.1).parts
    decays = dict(zip(_update(model).names, part.table.decays, strict=True))
    assert {name for name, decay in decays.items() if decay} == {"0.weight"}


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_one_gradient_that_is_not_finite_leaves_its_whole_update_out(mode):
    layer = nn.Linear(4, 3)
    update = _update(layer, mode, learning_rate=1e-2, gradient_accumulation=3)
    before = update.weights()["weight"].clone()
    for poison in (1.0, float("nan"), 1.0):
        _move(update, layer(_input(update, torch.full((1, 4), poison))).sum())
    assert int(update.skipped) == 1
    assert torch.equal(update.weights()["weight"], before)
    for _ in range(3):
        _move(update, layer(_input(update, torch.ones(1, 4))).sum())
    assert int(update.skipped) == 1
    assert not torch.equal(update.weights()["weight"], before)


def _moved_by_rate(update):
    """What the rate moves: the weights, but of schedule-free their base."""
    return update.tensors().get("weight.base", update.weights()["weight"]).clone()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_new_settings_take_effect_on_a_loaded_update(optimizer):
    """The rate; adabelief begins as plain descent, so the gradient is not too small for fp32."""
    moved = []
    for rate in (1e-2, 1e-4):
        torch.manual_seed(0)
        layer = nn.Linear(2, 2)
        first = _update(layer, optimizer=optimizer, learning_rate=1e-2)
        _move(first, layer(torch.full((1, 2), 100.0)).sum())
        later = _update(layer, optimizer=optimizer, learning_rate=rate)
        later.load(first.tensors())
        before = _moved_by_rate(later)
        _move(later, layer(torch.full((1, 2), 100.0)).sum())
        moved.append(float((_moved_by_rate(later) - before).abs().max()))
    assert moved[0] == pytest.approx(100 * moved[1], rel=0.05)


@pytest.mark.parametrize(
    "changed",
    [
        {"epsilon_exponent": -1},
        {"weight_decay": 0.5},
        {"gradient_clipping": "norm", "clipping_value": 1e-6},
    ],
)
def test_other_new_settings_take_effect_too(changed):
    ends = []
    for settings in ({}, changed):
        first, move = _convolved("fp32", {"learning_rate": 1e-2})
        move(0)
        later, move = _convolved("fp32", {"learning_rate": 1e-2, **settings})
        later.load_weights(first.weights())
        later.load(first.tensors())
        move(1)
        ends.append(later.weights()["2.weight"])
    assert float((ends[0] - ends[1]).abs().max()) > 1e-5


def test_a_run_that_stops_within_an_accumulation_resumes_bit_for_bit(sides, tmp_path):
    def train(model_dir, iterations):
        words = train_words(sides, model_dir, "-b", "2", "-i", str(iterations))
        chosen = {"optimizer": "nadam", "gradient_accumulation": 3, "gradient_clipping": "autoclip"}
        for name, value in chosen.items():
            words += ["--set", f"optimizer.{name}={value}"]
        assert main(words) == 0

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, 7)
    for iterations in (2, 5):
        train(resumed, iterations)
    for name in ("model", "optimizer"):
        one, two = (
            load_file(folder / f"generations/7/{name}.safetensors")
            for folder in (straight, resumed)
        )
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, two[key]), key
    assert (int(one["step"]), int(one["accumulated"])) == (2, 1)
    assert int(torch.isfinite(one["history"]).sum()) == 2


def test_weights_of_another_model_are_refused():
    update = _update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight has another shape"):
        update.load_weights(_update(nn.Linear(3, 2)).weights())
    with pytest.raises(ValueError, match="bias is in only one of them"):
        update.load_weights(_update(nn.Linear(2, 2, bias=False)).weights())


def test_state_of_another_shape_is_refused():
    update = _update(nn.Linear(2, 2))
    theirs = _update(nn.Linear(3, 2)).tensors()
    with pytest.raises(ValueError, match=r"weight.mean must be float32 \(2, 2\), got .* \(2, 3\)"):
        update.load(theirs)
    del theirs["step"]
    with pytest.raises(ValueError, match=r"state of step must be float64 \(\), got none"):
        update.load(theirs)


def _number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("weight.mean", torch.zeros(2, 2).half(), r"float32 \(2, 2\), got float16 \(2, 2\)"),
        ("weight.mean", torch.full((2, 2), torch.inf), "from -3.40282e.38 to 3.40282e.38, got inf"),
        ("weight.square", torch.tensor([[1, 2], [3, -4.0]]), "from 0 to .*, got -4 to 3"),
        ("weight.square", torch.full((2, 2), torch.nan), "from 0 to .*, got nan"),
        ("bias.mean", torch.zeros(2, dtype=torch.int64), r"float32 \(2,\), got int64 \(2,\)"),
        ("step", torch.tensor(3.0), r"float64 \(\), got float32 \(\)"),
        ("step", _number(-1.0), "from 0 to 1e.12, got -1"),
        ("beta_1_power", _number(2.0), "from 0 to 1, got 2"),
        ("momentum_product", _number(torch.nan), "from 0 to 1, got nan"),
        ("scale", _number(0.0), "from .*, got 0"),
        ("scale", _number(torch.inf), "from .*, got inf"),
        ("good_steps", _number(1e300), "from 0 to 2000, got 1e.300"),
        ("accumulated", _number(-3.0), "from 0 to 1e.12, got -3"),
        ("history", torch.zeros(2, 2, dtype=torch.float64), r"float64 \(100,\), got .* \(2, 2\)"),
        ("history", _number([1.0, torch.nan]), "from 0 to inf, got nan"),
        ("history", _number([-1.0, torch.inf]), "from 0 to inf, got -1 to inf"),
    ],
    ids=range(16),
)
def test_state_that_no_optimizer_has_is_refused(name, tensor, text):
    settings = {"optimizer": "nadam", "gradient_accumulation": 2, "gradient_clipping": "autoclip"}
    update = _update(nn.Linear(2, 2), **settings, autoclip_history=100)
    saved = update.tensors()
    assert name in saved
    update.load(saved)
    with pytest.raises(ValueError, match=f"optimizer state of {name} must be {text}"):
        update.load(saved | {name: tensor})


def test_the_state_of_frozen_parameters_is_held_to_the_same():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    update = _update(model)
    with pytest.raises(ValueError, match=r"bias.square must be from 0 to .*, got -1"):
        update.load(update.tensors() | {"bias.square": torch.full((2,), -1.0)})
    with pytest.raises(ValueError, match=r"bias.mean must be float32 \(2,\), got float16 \(2,\)"):
        update.load(update.tensors() | {"bias.mean": torch.zeros(2).half()})


def test_weights_in_another_number_format_are_refused():
    update = _update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight has another number format, torch.float16"):
        update.load_weights(update.weights() | {"weight": torch.zeros(2, 2).half()})


def test_policies():
    auto = precisions.resolve("auto", CPU)
    assert auto.name == "fp32"
    with pytest.raises(ValueError, match="tf32 needs an Nvidia GPU; use fp32 or bf16"):
        precisions.resolve("tf32", CPU)
    for mode, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        policy = precisions.resolve(mode, CPU)
        assert policy.compute == dtype
        assert policy.scales_loss == (mode == "fp16")
