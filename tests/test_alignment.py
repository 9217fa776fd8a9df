"""Padded channels: the same outputs, gradients and training, and no trace in a checkpoint."""

import pytest
import torch

from mien import models
from mien.core.config import OptimizerConfig
from mien.core.train import precision as precisions
from mien.core.train.optim import Update
from mien.models.alignment import axis, crop, pad

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


def _trained(learn_mask, aligned, trainer="original", steps=3):
    """State after some steps, the outputs of the first, and the model; widths 8 and 4."""
    model = models.build(trainer, learn_mask=learn_mask, seed=3, width=8)
    if aligned:
        model.align(8)
    update = Update(model, OptimizerConfig(learning_rate=1e-3), precisions.resolve("fp32", CPU))
    generator = torch.Generator().manual_seed(0)
    faces = torch.rand(4, 3, 64, 64, generator=generator)
    first = None
    for _ in range(steps):
        outputs = [out for side in model(faces) for out in side]
        first = first or [out.detach() for out in outputs]
        pull = sum((out - 0.2).square().sum() for out in outputs)
        update(torch.autograd.grad(pull, list(model.parameters())))
    return update, first, model


@pytest.mark.parametrize("trainer", ["original", "lightweight"])
@pytest.mark.parametrize("learn_mask", [False, True])
def test_an_aligned_model_is_the_same_model(trainer, learn_mask):
    plain, plain_first, _ = _trained(learn_mask, aligned=False, trainer=trainer)
    aligned, aligned_first, model = _trained(learn_mask, aligned=True, trainer=trainer)
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
    for master, theirs in zip(again.masters, trained.masters, strict=True):
        assert torch.equal(master, theirs)


def test_every_channel_count_of_an_aligned_model_is_a_multiple_of_8():
    _, _, model = _trained(learn_mask=True, aligned=True, steps=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[0] % 8 == module.weight.shape[1] % 8 == 0
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
