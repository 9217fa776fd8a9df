"""What every family must do, for every family there is; and the oracle's numbers."""

import json

import numpy as np
import pytest
import torch

from mien import models
from mien.models.keras_weights import keras_shape, load_keras_weights, ordered_parameters

CASES = [(name, mask) for name in models.available() for mask in (False, True)]


def _tiny(name, learn_mask=False, seed=0, **build):
    import dataclasses

    options = dataclasses.asdict(models.family(name).tiny)
    return models.build(name, learn_mask=learn_mask, seed=seed, **build, **options)


@pytest.mark.parametrize(("name", "learn_mask"), CASES)
def test_family_shapes_and_gradients(name, learn_mask):
    model = _tiny(name, learn_mask)
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    outputs_a, outputs_b = model(faces)
    assert len(outputs_a) == len(model.output_px) + learn_mask
    for outputs in (outputs_a, outputs_b):
        for size_px, out in zip(model.output_px, outputs, strict=False):
            assert out.shape == (2, 3, size_px, size_px)
            assert out.dtype == torch.float32
        if learn_mask:
            assert outputs[-1].shape == (2, 1, model.output_px[-1], model.output_px[-1])
    sum(out.sum() for out in outputs_a).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    everything = {n for n, _ in model.named_parameters()}
    assert everything - with_gradient == {n for n in everything if n.startswith("decoder_b")}


@pytest.mark.parametrize("name", models.available())
def test_halves_of_the_batch_meet_their_own_decoder(name):
    model = _tiny(name).eval()
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    with torch.no_grad():
        outputs_a, outputs_b = model(faces)
        torch.testing.assert_close(outputs_a[0], model.swap(faces[:2], "a")[0])
        torch.testing.assert_close(outputs_b[0], model.swap(faces[2:], "b")[0])
        assert not torch.allclose(outputs_a[0], model.swap(faces[:2], "b")[0], atol=1e-4)


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
    decoders = [
        getattr(first, side).face[0].conv.conv.weight for side in ("decoder_a", "decoder_b")
    ]
    assert not torch.equal(*decoders), "both decoders start alike"


def test_refusals_name_the_known():
    with pytest.raises(ValueError, match="did you mean original.*there are: lightweight, original"):
        models.build("orignal")
    with pytest.raises(ValueError, match="original has no option 'lowmen'; it has: lowmem, width"):
        models.build("original", lowmen=True)
    with pytest.raises(ValueError, match="width must be 8 to 512 in steps of 8, got 21; .* 24"):
        models.build("original", width=21)
    with pytest.raises(ValueError, match="lowmem must be of type bool, got 1"):
        models.build("original", lowmem=1)


def _build_case(case):
    return models.build(
        case["model"],
        learn_mask=case["global_changed"].get("learn_mask", False),
        reflect_padding=case["global_changed"].get("reflect_padding", False),
        **case["changed"],
    )


def _cases(folder, file, list_name):
    path = folder / "models" / file
    if not path.exists():
        pytest.skip(f"the oracle {folder} has no models/{file}")
    cases = json.loads(path.read_text())[list_name]
    return [case for case in cases if case["model"].replace("-", "_") in models.available()]


@pytest.mark.oracle
def test_parameters_equal_the_oracle(oracle_dir):
    """Counts in total and per sub-network, shapes and order of every weight."""
    cases = _cases(oracle_dir, "oracle.json", "configs")
    assert cases
    for case in cases:
        model = _build_case(case)
        assert sum(p.numel() for p in model.parameters()) == case["params_total"], case["id"]
        wanted = []
        for subnet in case["subnets"]:
            part = getattr(model, subnet["name"])
            assert sum(p.numel() for p in part.parameters()) == subnet["params"], case["id"]
            wanted += [tuple(shape) for *_, shape in subnet["weights"]]
        shapes = [keras_shape(module, p) for _, module, p in ordered_parameters(model)]
        assert shapes == wanted, case["id"]
        faces = [[size, size, 3] for size in model.output_px]
        mask = [[model.output_px[-1]] * 2 + [1]] * model.build.learn_mask
        assert case["outputs"]["a"] == faces + mask, case["id"]
        assert case["input_shape"][0] == model.input_px, case["id"]


def _rule(k, count):
    """The oracle's pseudo-random numbers in [-1, 1): number k of a case's tensors."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
    x += np.uint32((k + 1) * 2246822519 & 0xFFFFFFFF)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x / 2147483648.0 - 1.0


def _oracle_input(size_px, phase):
    h, w, c = np.meshgrid(*(np.arange(n) for n in (size_px, size_px, 3)), indexing="ij")
    f = 64 / size_px
    wave = np.sin(0.21 * f * h + 0.37 * f * w + 1.7 * c + 0.003 * f * f * h * w + phase)
    return torch.from_numpy((0.5 + 0.45 * wave).astype(np.float32)).permute(2, 0, 1)


@pytest.mark.oracle
def test_outputs_equal_the_oracle(oracle_dir, oracle):
    cases = _cases(oracle_dir, "forward.json", "cases")
    assert cases
    outputs = oracle("models/forward.npz")
    for case in cases:
        model = _build_case(case).eval()
        arrays = []
        for k, _, _, _, shape, base, scale in case["weights"]:
            values = base + scale * _rule(k, int(np.prod(shape)))
            arrays.append(values.astype(np.float32).reshape(shape))
        load_keras_weights(model, arrays)
        size_px = case["input_shape"][0]
        faces = torch.stack([_oracle_input(size_px, phase) for phase in (0.0, 1.0)])
        with torch.no_grad():
            both = model(faces.contiguous(memory_format=torch.channels_last))
        got = {
            f"{side}{n}": out
            for side, outs in zip("ab", both, strict=True)
            for n, out in enumerate(outs)
        }
        for row in case["outputs"]:
            stride = row["stored_stride"]
            ours = got[row["key"].rsplit(".", 1)[1]][0].permute(1, 2, 0)[::stride, ::stride]
            np.testing.assert_allclose(
                ours.numpy(), outputs[row["key"]], rtol=0, atol=1e-4, err_msg=row["key"]
            )
