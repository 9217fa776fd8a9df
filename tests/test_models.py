"""What every family must do, for every family there is, at its smallest."""

import re

import pytest
import torch
from conftest import tiny_options

from mien import models
from mien.models.blocks import Dense, SameConv, Upscale

CASES = [(name, mask) for name in models.available() for mask in (False, True)]


def _tiny(name, seed=0, **build):
    return models.build(name, seed=seed, **build, **tiny_options(name))


def _only_of(model, side):
    """Names of the parameters that this side's faces do not meet."""
    faces = torch.rand(2, 3, model.input_px, model.input_px)
    for parameter in model.parameters():
        parameter.grad = None
    sum(out.sum() for out in model.swap(faces, "b" if side == "a" else "a")).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize(("name", "learn_mask"), CASES)
def test_family_shapes_and_gradients(name, learn_mask):
    model = _tiny(name, learn_mask=learn_mask)
    of_a, of_b = _only_of(model, "a"), _only_of(model, "b")
    assert of_b, "nothing is B's own"
    assert not of_a & of_b
    for parameter in model.parameters():
        parameter.grad = None
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    outputs_a, outputs_b = model(faces)
    assert len(outputs_a) == len(model.output_px) + learn_mask
    for outputs in (outputs_a, outputs_b):
        for size_px, out in zip(model.output_px, outputs, strict=False):
            assert out.shape == (2, 3, size_px, size_px)
            assert out.dtype == torch.float32
        if learn_mask:
            assert outputs[-1].shape == (2, 1, model.output_px[-1], model.output_px[-1])
    sum(out.sum() for out in outputs_a).backward(retain_graph=True)
    of_side = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    everything = {n for n, _ in model.named_parameters()}
    assert not of_side & of_b, "A's faces moved what is B's own"
    sum(out.sum() for out in outputs_b).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == everything


@pytest.mark.parametrize("name", models.available())
def test_halves_of_the_batch_meet_their_own_decoder(name):
    model = _tiny(name).eval()
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    for weight in model.parameters():
        if weight.dim() > 1:  # some families begin with weights too small to tell faces apart
            torch.nn.init.kaiming_uniform_(weight)
    with torch.no_grad():
        outputs_a, outputs_b = model(faces)
        for outputs, half, side in ((outputs_a, faces[:2], "a"), (outputs_b, faces[2:], "b")):
            # Of another batch size, other sums: up to 2e-4 apart behind 30 such layers.
            torch.testing.assert_close(outputs[0], model.swap(half, side)[0], atol=1e-3, rtol=0)
        assert not torch.equal(outputs_a[0], model.swap(faces[:2], "b")[0])


@pytest.mark.parametrize("name", models.available())
def test_weights_are_a_function_of_the_seed(name):
    first, again, other = (_tiny(name, seed=seed) for seed in (5, 5, 6))
    for (key, one), two in zip(
        first.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
    kernels = [p for p in first.parameters() if p.dim() > 1]
    others = [p for p in other.parameters() if p.dim() > 1]
    assert not any(torch.equal(one, two) for one, two in zip(kernels, others, strict=True))
    # No two of one shape start alike, as they would if one seeded rule drew each afresh.
    firsts = [tuple(kernel.detach().flatten()[:4].tolist()) for kernel in kernels]
    assert len(set(firsts)) == len(firsts)


def test_refusals_name_the_known():
    with pytest.raises(ValueError, match="did you mean original.*there are: dfaker, .*original"):
        models.build("orignal")
    with pytest.raises(
        ValueError, match="no option 'lowmen' .did you mean lowmem.*: lowmem, width"
    ):
        models.build("original", lowmen=True)
    with pytest.raises(
        ValueError,
        match="width of original must be a whole number from 8 to 512 .* 8, got 21; .* 24",
    ):
        models.build("original", width=21)
    with pytest.raises(ValueError, match="lowmem of original must be true or false, got 1"):
        models.build("original", lowmem=1)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "dfaker",
            {"output_size": 192},
            "model.options.output_size of dfaker must be a whole number from 128 to 256 in steps ",
        ),
        ("dfl-sae", {"input_size": 72}, "in steps of 16, got 72; the nearest is 64"),
        ("dfl-sae", {"architecture": "lea"}, "one of df, liae, got 'lea'"),
        ("dfl-sae", {"encoder_dims": 90}, "a whole number from 21 to 85, got 90"),
        ("unbalanced", {"input_size": 100}, "in steps of 16, got 100; the nearest is 96"),
        ("realface", {"output_size": 144}, "in steps of 32, got 144; the nearest is 128"),
        ("realface", {"input_size": 65}, "in steps of 16, got 65; the nearest is 64"),
        ("dlight", {"features": "bset"}, "did you mean best?"),
        ("dlight", {"output_size": 512}, "got 512; the nearest is 384"),
        (
            "villain",
            {"lowmem": "yes"},
            "model.options.lowmem of villain must be true or false, got 'yes'",
        ),
    ],
)
def test_options_are_checked(name, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        models.meta_model(name, **options)


@pytest.mark.parametrize(("name", "learn_mask"), CASES)
def test_steps_make_the_loss_fall(name, learn_mask):
    model = _tiny(name, learn_mask=learn_mask).train()
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    faces = faces.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pulls = []
    for _ in range(5):
        outputs = [out for side in model(faces) for out in side]
        pull = sum((out - 0.2).square().mean() for out in outputs)
        optimizer.zero_grad()
        pull.backward()
        optimizer.step()
        pulls.append(pull.item())
    assert pulls[-1] < 0.99 * pulls[0], pulls


@pytest.mark.parametrize("name", models.available())
def test_a_network_of_16_bits_gives_finite_faces_and_gradients(name):
    model = _tiny(name, learn_mask=True)
    expected = [out for side in model.eval()(_faces(model)) for out in side]
    model.train().to(torch.bfloat16)
    outputs = [out for side in model(_faces(model).bfloat16()) for out in side]
    assert all(out.dtype == torch.float32 for out in outputs)
    gradients = torch.autograd.grad(sum(out.mean() for out in outputs), [*model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        outputs = [out for side in model.eval()(_faces(model).bfloat16()) for out in side]
    for out, wanted in zip(outputs, expected, strict=True):
        assert (out - wanted).abs().max() < 0.1


def _faces(model):
    generator = torch.Generator().manual_seed(2)
    faces = torch.rand(4, 3, model.input_px, model.input_px, generator=generator)
    return faces.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", models.available())
def test_every_result_is_channels_last(name):
    """No kernel copies its input into another order."""
    model = _tiny(name).eval()
    seen = []

    def look(module, given, out):
        for tensor in (*given, out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[1] > 1:
                seen.append(tensor.is_contiguous(memory_format=torch.channels_last))
                assert seen[-1], f"{module} is given or gives another order: {tensor.stride()}"

    for module in model.modules():
        if isinstance(module, SameConv | Upscale | Dense):
            module.register_forward_hook(look)
    model(_faces(model))
    assert seen
