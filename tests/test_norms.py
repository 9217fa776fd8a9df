"""Norms of one face, against their formulas in float64: values and every gradient."""

import pytest
import torch

from mien.models.norms import GroupNorm, InstanceNorm, LayerNorm, RmsNorm


def _instance(x, gain, bias):
    flat = x.flatten(1)
    mean = flat.mean(1).view(-1, 1, 1, 1)
    deviation = (x - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    return gain * (x - mean) / (deviation + 1e-3) + bias


def _group(x, gain, bias):
    runs = x.unflatten(1, (32, -1))
    mean = runs.mean((2, 3, 4), keepdim=True)
    variance = (runs - mean).square().mean((2, 3, 4), keepdim=True)
    normal = ((runs - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normal * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)


def _layer(x, gain, bias):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-3).sqrt() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)


def _rms(x, gain):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt() * gain.view(-1, 1, 1)


CASES = [
    (InstanceNorm, _instance, 5),
    (GroupNorm, _group, 64),
    (LayerNorm, _layer, 7),
    (RmsNorm, _rms, 7),
]


@pytest.mark.parametrize(("norm", "formula", "channels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_its_formula(norm, formula, channels, dtype):
    module = norm(channels)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x = (torch.randn(3, channels, 5, 4) * 2 + 1).contiguous(memory_format=torch.channels_last)
    x = x.to(dtype).requires_grad_()
    module.to(dtype)
    given = [x, *module.parameters()]
    exact = [t.detach().double().requires_grad_() for t in given]
    out, wanted = module(x), formula(*exact)
    assert out.dtype == dtype
    # A rounding of the output type, and of 16-bit gains in the gradient.
    tolerance = (
        {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    )
    torch.testing.assert_close(out.double(), wanted, **tolerance)
    pull = torch.randn(out.shape)
    found = torch.autograd.grad(out, given, pull.to(dtype))
    exact_gradients = torch.autograd.grad(wanted, exact, pull.to(dtype).double())
    for gradient, exactly in zip(found, exact_gradients, strict=True):
        scale = exactly.abs().max()
        torch.testing.assert_close(gradient.double() / scale, exactly / scale, **tolerance)


def test_a_face_of_one_value_has_a_finite_gradient():
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    out = InstanceNorm(3)(x)
    assert out.eq(0).all()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()


def test_groups_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match="a multiple of 32 channels, got 184"):
        GroupNorm(184)
