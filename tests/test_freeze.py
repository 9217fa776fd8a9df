"""Frozen parts stay as they are to the bit, cost nothing, and can be thawed at every resume."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_step
from safetensors.torch import load_file

from mien import models
from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import from_dict
from mien.core.optim import overlap
from mien.core.training import memory
from mien.models.batch_norm import BatchNorm, norms_of, update_running_stats


def _step(model, mode="fp32", setting="off", **settings):
    """A step of the model, and a batch for it."""
    optimizer = {"overlap": setting, **settings}
    step, batches = tiny_step({"precision": {"mode": mode}, "optimizer": optimizer}, model=model)
    return step, batches.only


def _original(*frozen):
    model = models.build("original", seed=1, width=8)
    if frozen:
        model.freeze_layers = frozen
        model.freeze()
    return model


def _copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _is_of(name, *parts):
    return name.startswith(tuple(f"{part}." for part in parts))


@pytest.mark.parametrize("name", models.available())
def test_every_family_has_the_layers_that_it_freezes_and_loads(name):
    options = dataclasses.asdict(models.family(name).tiny)
    model = models.meta_model(name, **options)
    model.freeze()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if _is_of(n, *model.freeze_layers)}
    assert bool(frozen) == bool(model.freeze_layers)
    for path in model.load_layers:
        assert len(list(model.subnetwork(path).parameters())) > 0


@pytest.mark.parametrize("setting", ["off", "on"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_frozen_weights_stay_and_the_others_move_as_ever(mode, setting, monkeypatch):
    if mode == "fp16" and setting == "on":
        pytest.skip("fp16 does not overlap")
    monkeypatch.setattr(overlap, "PART", 10_000)
    exact = _copied(dict(_original().named_parameters()))
    done = {}
    for frozen in ((), ("encoder",)):
        step, batch = _step(_original(*frozen), mode, setting)
        step(batch)
        done[frozen] = step.update.weights()
    for name, tensor in done[("encoder",)].items():
        assert tensor.dtype == torch.float32
        if _is_of(name, "encoder"):
            assert torch.equal(tensor, exact[name]), "not to the bit"
        else:
            assert torch.equal(tensor, done[()][name]), "the first step's gradients are the same"
            assert not torch.equal(tensor, exact[name])
    assert not any(_is_of(name, "encoder") for name in step.update.tensors())
    assert step.network.encoder[0][0].conv.conv.weight.dtype == step.update.precision.compute


def test_a_frozen_encoder_is_left_out_of_the_backward_pass():
    step, batch = _step(_original("encoder"))
    (code,) = step.network.encode(batch.input_nchw)
    assert not code.requires_grad
    assert len(step.parameters) == len(list(step.network.parameters())) - len(
        list(step.network.encoder.parameters())
    )


def test_a_side_may_be_frozen_from_end_to_end():
    step, batch = _step(_original("encoder", "decoder_a"))
    before = _copied(step.update.weights())
    step(batch)
    for name, tensor in step.update.weights().items():
        assert torch.equal(tensor, before[name]) != _is_of(name, "decoder_b"), name


def test_a_frozen_layer_passes_gradients_on():
    step, batch = _step(_original("decoder_a", "decoder_b"))
    before = _copied(step.update.weights())
    step(batch)
    for name, tensor in step.update.weights().items():
        assert torch.equal(tensor, before[name]) != _is_of(name, "encoder"), name


def test_batch_norms_of_a_frozen_part_keep_their_estimates():
    model = _original()
    model.encoder.append(BatchNorm(64 // 2))
    model.decoder_a.add_module("norm", BatchNorm(3))
    model.freeze()
    for _ in range(2):
        assert not model.encoder.training
        assert not model.encoder[-1].training
        assert model.decoder_a.norm.training
        model.eval()
        model.train()
    model(torch.rand(4, 3, 64, 64))
    update_running_stats(norms_of(model))
    assert torch.equal(model.encoder[-1].running_mean, torch.zeros(32))


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(
        ValueError,
        match=r"^original has no sub-network 'inter'; it has: encoder, decoder_a, decoder_b$",
    ):
        _original("inter")
    with pytest.raises(
        ValueError, match="nothing of original is left to train when encoder, decoder_a, decoder_b"
    ):
        _original("encoder", "decoder_a", "decoder_b")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_weights_of_a_checkpoint_are_taken_up_exactly(mode):
    model = _original("encoder")
    model.align(8)
    step, _ = _step(model, mode)
    other = {
        k: v * 1.0001 for k, v in models.build("original", seed=2, width=8).state_dict().items()
    }
    step.update.load_weights(other)
    for name, tensor in step.update.weights().items():
        assert torch.equal(tensor, other[name]), name
    name = "encoder.0.0.conv.conv.weight"
    seen = dict(model.named_parameters())[name]
    assert torch.equal(seen[:, :3], other[name].to(seen.dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "ada_amsgrad": True},
        {"optimizer": "lion"},
        {"optimizer": "rms-prop"},
        {"optimizer": "schedule-free"},
    ],
)
def test_state_of_a_frozen_parameter_is_carried_along_unchanged(settings):
    step, batch = _step(_original(), **settings)
    step(batch)
    saved = _copied(step.update.tensors())
    frozen, _ = _step(_original("encoder"), **settings)
    frozen.update.load(saved)
    frozen(batch)
    after = frozen.update.tensors()
    assert after.keys() == saved.keys()
    for name, tensor in saved.items():
        carried = _is_of(name, "encoder") or name in ("scale", "good_steps")
        assert torch.equal(after[name], tensor) == carried, name
    thawed, _ = _step(_original(), **settings)
    thawed.update.load(after)
    for name, tensor in thawed.update.tensors().items():
        assert torch.equal(tensor, after[name]), name


def test_a_parameter_without_state_begins_at_zero_but_half_a_state_is_refused():
    step, batch = _step(_original("encoder"))
    step(batch)
    saved = _copied(step.update.tensors())
    thawed, _ = _step(_original())
    thawed(batch)
    thawed.update.load(saved)
    for name, tensor in thawed.update.tensors().items():
        if _is_of(name, "encoder"):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, saved[name]), name
    name = "encoder.0.0.conv.conv.weight"
    half = saved | {f"{name}.mean": torch.zeros(8, 3, 5, 5)}
    with pytest.raises(ValueError, match=rf"state of {name}.square must be .*, got none"):
        thawed.update.load(half)
    with pytest.raises(ValueError, match=rf"of {name}.mean must be .*, got float32 \(8,\)"):
        step.update.load(saved | {f"{name}.mean": torch.zeros(8)})


def test_memory_knows_what_is_frozen():
    config = {"model": {"trainer": "original"}}
    bf16 = precisions.Precision("bf16", torch.bfloat16, "as set")
    plain = memory.footprint(from_dict(config), bf16).at(16).parts
    frozen = memory.footprint(from_dict(config | {"train": {"freeze_weights": True}}), bf16)
    frozen = frozen.at(16).parts
    encoder = plain["weights"] // 4 - frozen["weights"] // 4
    assert encoder > 60e6
    assert frozen["frozen weights"] == 2 * encoder
    assert frozen["gradients"] == plain["gradients"] - 2 * encoder
    assert frozen["kept for backward"] < plain["kept for backward"]
    assert plain["frozen weights"] == 0


@pytest.fixture(scope="session")
def inputs(sides):
    return ["-A", str(sides[0]), "-B", str(sides[1]), "--device", "cpu"]


def _saved(model_dir, name):
    state = json.loads((model_dir / "state.json").read_text())
    return load_file(model_dir / "generations" / str(state["iterations"]) / f"{name}.safetensors")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_freezing_is_switched_at_every_start(inputs, tmp_path, mode, capsys):
    model_dir = tmp_path / "model"
    new = ["-t", "original", "--set", "model.options.width=8"]
    new += ["--set", "train.batch_size=2", "--set", "preview.preview_images=2"]
    new += ["--set", f"precision.mode={mode}"]
    train = ["train", *inputs, "-m", str(model_dir), "-i", "2"]
    found = []
    for words in ([*new, "-f"], [], ["--set", "train.freeze_weights=true"], []):
        assert main([*train, *words]) == 0
        found.append((_saved(model_dir, "model"), _saved(model_dir, "optimizer")))
        said = capsys.readouterr().out
        is_frozen = len(found) != 2  # a flag holds for its session, what is set holds on
        assert ("frozen" in said and "M parameters of encoder\n" in said) == is_frozen
    for number, (weights, state) in enumerate(found[1:], 1):
        thawed = number == 1
        before, state_before = found[number - 1]
        for name, tensor in weights.items():
            is_kept = _is_of(name, "encoder") and not thawed
            assert torch.equal(tensor, before[name]) == is_kept, (number, name)
        for name, tensor in state.items():
            if _is_of(name, "encoder") and not thawed:
                assert torch.equal(tensor, state_before[name]), (number, name)
    assert not any(_is_of(name, "encoder") for name in found[0][1])
    assert found[1][1].keys() == found[3][1].keys()
