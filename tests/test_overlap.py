"""Weights moved beside the backward pass: the bits of moving them after it, part by part."""

import contextlib

import pytest
import torch
from conftest import CPU, tiny_step, train_words
from safetensors.torch import load_file
from torch import nn

from mien.benchmarks.variants import variant
from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import OptimizerConfig
from mien.core.data.feed import Feed
from mien.core.estimate.flops import work_of
from mien.core.optim import overlap
from mien.core.training import engine as engines
from mien.kernels.optimizer_scalars import Scalar


def _update(model, setting, mode="fp32", **settings):
    precision = precisions.resolve(mode, CPU)
    config = OptimizerConfig(overlap=setting, **settings)
    return overlap.choose(config, precision)(model, config, precision)


@pytest.fixture
def _small_parts(monkeypatch):
    """Small enough for tiny models to have several."""
    monkeypatch.setattr(overlap, "PART", 10_000)


def _step(setting, mode="fp32", family="original", device=CPU, streams=False, **settings):
    """A step of a tiny model, and where its batches come from."""
    sections = {
        "model": {"trainer": family, "options": {"width": 8}},
        "precision": {"mode": mode},
        "optimizer": {"overlap": setting, **settings},
    }
    return tiny_step(sections, device, streams=streams)


def _assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def _assert_same_state(one, two):
    """Weights, what the network computes with, moments and counts."""
    _assert_same_weights(one.weights(), two.weights())
    _assert_same_weights(one.tensors(), two.tensors())
    for ours, theirs in zip(one.parameters, two.parameters, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("family", ["original", "lightweight"])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_overlapped_steps_have_the_bits_of_others(family, mode):
    done = []
    for setting in ("off", "on"):
        step, batches = _step(setting, mode, family)
        before = step.update.weights()["encoder.0.0.conv.conv.weight"].clone()
        for _ in range(4):
            step(batches.only)
        assert not torch.equal(step.update.weights()["encoder.0.0.conv.conv.weight"], before)
        done.append((step.update, step.loss_buffer.fetch(4)()))
    (plain, plain_rows), (overlapped, rows) = done
    assert len(plain.parts) == 1
    assert len(overlapped.parts) >= 5
    _assert_same_state(plain, overlapped)
    assert (rows == plain_rows).all()


@pytest.mark.usefixtures("_small_parts")
def test_parts_follow_the_backward_pass_and_are_moved_in_it(monkeypatch):
    step, batches = _step("on")
    step(batches.only)
    parts = step.update.parts
    assert sorted(n for part in parts for n in part.numbers) == [*range(len(step.parameters))]
    names = [[step.update.names[n] for n in part.numbers] for part in parts]
    assert all(name.startswith("decoder_b") for name in names[0]), "the last to run forward"
    assert "encoder.0.0.conv.conv.weight" in names[-1]
    for part in parts[:-1]:
        assert sum(tensor.numel() for tensor in part.table.parameters) >= 10_000
    moved_after = []
    move = step.update._move

    def note(part, gradients):
        moved_after.append(len(step.update.arrivals.arrived))
        move(part, gradients)

    monkeypatch.setattr(step.update, "_move", note)
    step(batches.only)
    sizes = [len(part.numbers) for part in parts]
    assert moved_after == [sum(sizes[: i + 1]) for i in range(len(sizes))], "not at once"


def test_a_model_of_one_part_keeps_it():
    step, batches = _step("on")
    step(batches.only)
    (part,) = step.update.parts
    step(batches.only)
    assert step.update.parts[0] is part, "its tables, which a CUDA graph needs, were made anew"


class _Twice(nn.Module):
    """One layer used at both ends, another between."""

    def __init__(self):
        super().__init__()
        self.shared, self.between = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(self.between(self.shared(x)).tanh())


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_layer_that_is_used_twice_is_moved_after_both(mode, monkeypatch):
    monkeypatch.setattr(overlap, "PART", 1)
    done = []
    for setting in ("off", "on"):
        torch.manual_seed(3)
        update = _update(_Twice(), setting, mode, learning_rate=1e-2)
        x = torch.rand(5, 4).to(update.precision.compute)
        for _ in range(5):
            loss = update.model(x).float().square().sum()
            with update.overlap_backward():
                gradients = torch.autograd.grad(loss, update.parameters)
            update(gradients)
        done.append(update)
    plain, overlapped = done
    assert len(overlapped.parts) == 4
    assert {overlapped.names[n] for part in overlapped.parts[:2] for n in part.numbers} == {
        "between.weight",
        "between.bias",
    }
    _assert_same_state(plain, overlapped)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_weight_that_is_moved_too_early_is_not_used(mode):
    """What would overwrite a value that the backward pass still needs stops the run."""
    layer = nn.Linear(3, 3)
    update = _update(layer, "on", mode)
    hidden = layer(layer(torch.rand(2, 3).to(update.precision.compute)))
    hidden.register_hook(lambda gradient: update([torch.zeros_like(p) for p in layer.parameters()]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(layer(hidden).sum(), update.parameters)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("first", ["off", "on"])
def test_a_run_resumes_with_and_without_overlap(mode, first):
    straight, batches = _step("off", mode)
    for _ in range(6):
        straight(batches.only)
    saved, _ = _step(first, mode)
    for _ in range(3):
        saved(batches.only)
    resumed, _ = _step({"off": "on", "on": "off"}[first], mode)
    resumed.update.load_weights(saved.update.weights())
    resumed.update.load(saved.update.tensors())
    for _ in range(3):
        resumed(batches.only)
    _assert_same_state(straight.update, resumed.update)


@pytest.mark.usefixtures("_small_parts")
def test_a_state_is_loaded_into_every_part():
    step, batches = _step("on")
    for _ in range(3):
        step(batches.only)
    weights = {name: tensor.clone() for name, tensor in step.update.weights().items()}
    state = {name: tensor.clone() for name, tensor in step.update.tensors().items()}
    step(batches.only)
    after = {name: tensor.clone() for name, tensor in step.update.weights().items()}
    step.update.load_weights(weights)
    step.update.load(state)
    step(batches.only)
    _assert_same_weights(after, step.update.weights())


def _two_layers(poisoned):
    """An update with a part a parameter, after a step whose last gradients alone are finite."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    update = _update(model, "on", learning_rate=1e-2)

    def move(is_poisoned):
        hidden = model[0](torch.ones(2, 3))
        if is_poisoned:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        with update.overlap_backward():
            gradients = torch.autograd.grad(model[1](hidden).sum(), update.parameters)
        update(gradients)

    move(False)
    before = {name: tensor.clone() for name, tensor in update.weights().items()}
    move(poisoned)
    return update, before


def test_a_part_that_is_not_finite_is_left_and_counted(monkeypatch):
    monkeypatch.setattr(overlap, "PART", 1)
    update, before = _two_layers(poisoned=True)
    assert int(update.skipped) == 1
    for name, tensor in update.weights().items():
        assert torch.equal(tensor, before[name]) == name.startswith("0."), name
    steps = {update.names[part.numbers[0]]: int(part.scalars[Scalar.STEP]) for part in update.parts}
    assert steps == {"0.weight": 1, "0.bias": 1, "1.weight": 2, "1.bias": 2}
    assert int(update.tensors()["step"]) == 2, "a resume goes on with the largest number"
    assert float(update.tensors()["beta_1_power"]) == pytest.approx(0.81)
    whole, _ = _two_layers(poisoned=False)
    assert int(whole.skipped) == 0


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    layer = nn.Linear(3, 3)
    update = _update(layer, "on", learning_rate=1e-2)
    with pytest.raises(KeyboardInterrupt), update.overlap_backward():
        raise KeyboardInterrupt
    before = layer.weight.detach().clone()
    gradients = torch.autograd.grad(layer(torch.ones(1, 3)).sum(), update.parameters)
    assert torch.equal(layer.weight, before), "a hook was left on the parameter"
    update(gradients)
    assert not torch.equal(layer.weight, before)


class _Stream:
    """Notes what a CUDA stream is asked for."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def wait_stream(self, other):
        self.asked.append(f"{self.name} waits for {other.name}")


def test_a_stream_is_forked_before_each_part_and_joined_after_the_last(monkeypatch):
    monkeypatch.setattr(overlap, "PART", 1)
    asked = []
    main, side = _Stream("main", asked), _Stream("side", asked)

    @contextlib.contextmanager
    def on(stream):
        asked.append(f"on {stream.name}")
        yield
        asked.append("done")

    layer = nn.Linear(3, 3)
    update = _update(layer, "on")
    update.arrivals.stream = side
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    for parts in (1, 2):
        asked.clear()
        with update.overlap_backward():
            gradients = torch.autograd.grad(layer(torch.ones(1, 3)).sum(), update.parameters)
        update(gradients)
        assert asked == ["side waits for main", "on side", "done"] * parts + ["main waits for side"]
    asked.clear()
    with update.overlap_backward():
        pass
    update(gradients)
    assert not asked, "a CUDA graph can only join a stream that was forked"


def test_the_setting():
    def chosen(setting, mode):
        return overlap.choose(OptimizerConfig(overlap=setting), precisions.resolve(mode, CPU))

    assert OptimizerConfig().overlap == "auto"
    assert chosen("auto", "bf16") is chosen("off", "fp32") is overlap.Update
    assert chosen("on", "bf16") is overlap.OverlappedUpdate


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("fp16", {}),
        ("fp32", {"gradient_clipping": "autoclip"}),
        ("bf16", {"gradient_accumulation": 3}),
    ],
)
def test_auto_overlaps_where_it_is_worth_it_and_nothing_forbids_it(mode, settings):
    config = OptimizerConfig(**settings)
    plain = OptimizerConfig()
    assert overlap.choose(plain, precisions.resolve("bf16", CPU), is_worth=True) is (
        overlap.OverlappedUpdate
    )
    assert overlap.choose(config, precisions.resolve(mode, CPU), is_worth=True) is overlap.Update


@pytest.mark.parametrize(
    ("name", "batch_size", "is_worth"),
    [("original", 16, True), ("original", 256, False), ("dfaker-256", 64, False)],
)
def test_an_update_is_hidden_where_the_roofline_says_that_it_pays(name, batch_size, is_worth):
    """It is half of a step of original at 16, and 4 % of one of dfaker with 256 px at 64."""
    assert overlap.pays(work_of(variant(name).meta_model(), batch_size)) is is_worth


@pytest.mark.parametrize(
    ("mode", "settings", "cause"),
    [
        (
            "fp16",
            {},
            "precision fp16 scales the loss, which needs every gradient before the first update; "
            "use --precision bf16, or",
        ),
        (
            "fp32",
            {"gradient_clipping": "autoclip"},
            "optimizer.gradient_clipping autoclip bounds the norm of all gradients, which needs "
            "every gradient before the first update; use value or norm, or",
        ),
        (
            "bf16",
            {"gradient_accumulation": 3},
            "optimizer.gradient_accumulation is 3, so most backward passes have no update beside "
            "them; set it to 1, or",
        ),
    ],
)
def test_refusals(mode, settings, cause):
    config = OptimizerConfig(overlap="on", **settings)
    message = f"^optimizer.overlap is on, but {cause} set optimizer.overlap to off$"
    with pytest.raises(ValueError, match=message):
        overlap.choose(config, precisions.resolve(mode, CPU))


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("clipping", ["value", "norm"])
def test_clipping_of_each_tensor_overlaps(clipping):
    done = []
    for setting in ("off", "on"):
        settings = {"gradient_clipping": clipping, "clipping_value": 1e-3}
        step, batches = _step(setting, optimizer="lion", **settings)
        for _ in range(3):
            step(batches.only)
        done.append(step.update)
    assert len(done[1].parts) >= 5
    _assert_same_state(*done)


def _train(sides, model_dir, setting, *more):
    settings = ("--set", f"optimizer.overlap={setting}", "--set", "train.log_interval=1")
    return main(train_words(sides, model_dir, "-b", "2", *settings, *more))


def _saved(model_dir, iterations, name):
    return load_file(model_dir / "generations" / str(iterations) / f"{name}.safetensors")


@pytest.mark.usefixtures("_small_parts")
def test_the_setting_may_change_at_a_resume(sides, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert _train(sides, straight, "off", "-i", "6") == 0
    for setting in ("on", "off", "on"):
        assert _train(sides, resumed, setting, "-i", "2") == 0
    for name in ("model", "optimizer"):
        _assert_same_weights(_saved(straight, 6, name), _saved(resumed, 6, name))


@pytest.mark.parametrize(
    ("setting", "touched"),
    [
        ("off", "no weight was touched by it"),
        ("on", "with optimizer.overlap some other weights may have moved"),
    ],
)
def test_a_halt_says_what_may_have_moved(sides, tmp_path, monkeypatch, capsys, setting, touched):
    following = Feed.next

    def poisoned(feed, faces_seen):
        batch = following(feed, faces_seen)
        batch.targets[0].fill_(float("nan"))
        return batch

    monkeypatch.setattr(Feed, "next", poisoned)
    assert _train(sides, tmp_path / "model", setting, "-i", "3") == 3
    assert f"{touched}. Lower optimizer.learning_rate" in capsys.readouterr().out


def test_fp16_is_refused_in_one_line(sides, tmp_path, capsys):
    assert _train(sides, tmp_path / "model", "on", "-i", "1", "--precision", "fp16") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "optimizer.overlap is on, but precision fp16 scales the loss" in line


@pytest.mark.slow
@pytest.mark.usefixtures("_small_parts")
def test_a_compiled_step_overlaps_too():
    """Its backward pass is one operation, so all gradients come at the end of it."""
    done = []
    for setting in ("off", "on"):
        step, batches = _step(setting)
        engine = engines.make("compile", step, batches, pytest.fail)
        engine({"a": 0, "b": 0})
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(2):
                engine({"a": 0, "b": 0})
        assert engine.name == "compile"
        done.append(step.update)
    _assert_same_state(*done)


@pytest.mark.gpu
@pytest.mark.usefixtures("same_algorithms", "_small_parts")
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_graphed_overlapped_step_has_the_bits_of_an_eager_one(mode, streams):
    """Without overlap, that is; and of an eager one with it."""
    cuda = torch.device("cuda", torch.cuda.current_device())
    done = []
    for setting, name in (("off", "eager"), ("on", "eager"), ("on", "graph")):
        step, batches = _step(setting, mode, device=cuda, streams=streams)
        engine = engines.make(name, step, batches, pytest.fail)
        for _ in range(12):
            engine({"a": 0, "b": 0})
        torch.cuda.synchronize()
        done.append((step.update, step.loss_buffer.fetch(12)()))
    assert engine.graphs
    assert len(done[-1][0].parts) >= 5
    for update, rows in done[1:]:
        _assert_same_state(done[0][0], update)
        assert (rows == done[0][1]).all()
