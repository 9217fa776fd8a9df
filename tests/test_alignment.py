"""Padded channels: the same outputs, gradients and training, and no trace in a checkpoint."""

import pytest
import torch

from mien import models
from mien.core import precision as precisions
from mien.core.config import OptimizerConfig
from mien.core.optim.optimizer import Update
from mien.models.alignment import axes_of, axis, crop, pad

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 3)])
def test_crop_undoes_pad_and_zeros_lie_behind_each_group(shape):
    tensor = torch.rand(shape)
    axes = (axis(0, (3,), 4, 8), axis(1, (5,), 1, 8))
    padded = pad(tensor, axes)
    assert padded.shape == (32, 8, *shape[2:])
    assert torch.equal(crop(padded, axes), tensor)
    by_group = padded.unflatten(0, (4, 8))
    assert by_group[:, 3:].eq(0).all()
    assert by_group[:, :, 5:].eq(0).all()
    assert torch.equal(by_group[1, :3, :5], tensor[3:6])


FAMILIES = {
    "original": {"width": 8},
    "lightweight": {"width": 8},
    # Runs of a concatenation, groups of a shuffle, dense layers on both sides, two thirds of widths
    "dfl-sae": {"input_size": 64, "autoencoder_dims": 32, "encoder_dims": 21, "decoder_dims": 10},
    "dlight": {"features": "lowmem", "details": "good", "output_size": 128, "width": 8},
    "realface": {"output_size": 64, "width": 4},
    "villain": {"lowmem": True, "width": 8},
}


def _model(trainer, learn_mask, aligned):
    model = models.build(trainer, learn_mask=learn_mask, seed=3, **FAMILIES[trainer])
    if aligned:
        model.align(8)
    return model


def _faces(model, faces=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(faces, 3, model.input_px, model.input_px, generator=generator)


def _trained(learn_mask, aligned, steps=3):
    """State of `original` after some steps, the outputs of the first, and the model."""
    model = _model("original", learn_mask, aligned)
    update = Update(model, OptimizerConfig(learning_rate=1e-3), precisions.resolve("fp32", CPU))
    first = None
    for _ in range(steps):
        outputs = [out for side in model(_faces(model)) for out in side]
        first = first or [out.detach() for out in outputs]
        pull = sum((out - 0.2).square().sum() for out in outputs)
        update(torch.autograd.grad(pull, list(model.parameters())))
    return update, first, model


@pytest.mark.parametrize("trainer", FAMILIES)
@pytest.mark.parametrize("learn_mask", [False, True])
def test_an_aligned_family_has_the_same_outputs_and_gradients(trainer, learn_mask):
    results = []
    for aligned in (False, True):
        model = _model(trainer, learn_mask, aligned).double().eval()
        outputs = [out for side in model(_faces(model, 2).double()) for out in side]
        pull = sum((out - 0.2).square().mean() for out in outputs)
        gradients = torch.autograd.grad(pull, list(model.parameters()))
        cropped = [
            crop(gradient, axes_of(parameter))
            for gradient, parameter in zip(gradients, model.parameters(), strict=True)
        ]
        results.append([*outputs, *cropped])
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            axes = axes_of(parameter)
            zeros = pad(torch.ones_like(crop(gradient, axes)), axes) == 0
            assert gradient[zeros].eq(0).all(), "padding would learn something"
    assert any(axes_of(parameter) for parameter in model.parameters()), "nothing was padded"
    for plain, aligned in zip(*results, strict=True):
        torch.testing.assert_close(aligned, plain, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("learn_mask", [False, True])
def test_an_aligned_model_trains_as_the_same_model(learn_mask):
    plain, plain_first, _ = _trained(learn_mask, aligned=False)
    aligned, aligned_first, model = _trained(learn_mask, aligned=True)
    for one, two in zip(plain_first, aligned_first, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    for ours, theirs in (
        (aligned.weights(), plain.weights()),
        (aligned.tensors(), plain.tensors()),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-3, msg=name)
    padded = [p for p in model.parameters() if hasattr(p, "alignment")]
    assert padded, "nothing was padded"
    for parameter in padded:
        zeros = pad(
            torch.ones_like(crop(parameter.detach(), parameter.alignment)), parameter.alignment
        )
        assert parameter.detach()[zeros == 0].eq(0).all(), "padding has learned something"


def test_a_checkpoint_moves_between_aligned_and_plain_models():
    trained, _, _ = _trained(learn_mask=False, aligned=True)
    other, _, _ = _trained(learn_mask=False, aligned=False, steps=0)
    other.load_weights(trained.weights())
    other.load(trained.tensors())
    for name, tensor in other.weights().items():
        assert torch.equal(tensor, trained.weights()[name]), name
    again, _, model = _trained(learn_mask=False, aligned=True, steps=0)
    again.load_weights(other.weights())
    again.load(other.tensors())
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, trained.tensors()[name]), name
    for master, theirs in zip(again.master_weights, trained.master_weights, strict=True):
        assert torch.equal(master, theirs)


@pytest.mark.parametrize("trainer", FAMILIES)
def test_every_channel_count_of_an_aligned_model_is_a_multiple_of_8(trainer):
    model = _model(trainer, learn_mask=True, aligned=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            assert module.weight.shape[0] % 8 == module.weight.shape[1] % 8 == 0
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_over_channels_that_would_be_padded_keeps_the_model_as_it_is():
    model = models.build("unbalanced", input_size=64, nodes=512, complexity_encoder=64)
    model.encoder[0][0].norm.normal_channels = (60,)
    before = model.decoder_a.face[6].conv.conv.weight.shape
    model.align(8)
    assert model.decoder_a.face[6].conv.conv.weight.shape == before
    model.encoder[0][0].norm.normal_channels = (64,)
    model.align(8)
    assert all(
        module.weight.shape[0] % 8 == 0
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d)
    )
