"""Every family against the oracle: weights, wiring, and what comes out for weights by its rule."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import ORACLE

from mien import models
from mien.core.train.work import work_of
from mien.models.keras_weights import keras_entries

pytestmark = pytest.mark.oracle

# The reference lets one family's option reach into another: not copied.
_NOT_COPIED = {"dfaker/original-lowmem-leak"}


def _cases(file, list_name):
    path = ORACLE / "models" / file if ORACLE else None
    if path is None or not path.exists():
        return []
    return [
        pytest.param(case, id=case["id"])
        for case in json.loads(path.read_text())[list_name]
        if case["id"] not in _NOT_COPIED
    ]


def _made(case, make):
    settings = {**case["global_changed"], **case["changed"]}
    return make(case["model"].replace("_", "-"), **settings)


@pytest.mark.parametrize("case", _cases("oracle.json", "configs"))
def test_weights_equal_the_oracle(case):
    """Counts in total and per sub-network, shapes and order of every weight; sizes in and out."""
    model, total = _made(case, models.meta_model), 0
    for subnet in case["subnets"]:
        entries = [*keras_entries(getattr(model, subnet["name"]))]
        shapes = [tuple(row[3]) for row in subnet["weights"]]
        assert [entry.shape for entry in entries] == shapes
        count = sum(int(np.prod(shape)) for shape in shapes)
        assert count == subnet["params"]
        total += count
    assert total == case["params_total"]
    names = [name for name, _ in model.named_children()]
    assert names == [subnet["name"] for subnet in case["subnets"]]
    faces = [[size, size, 3] for size in model.output_px]
    mask = [[model.output_px[-1]] * 2 + [1]] * model.build.learn_mask
    assert case["outputs"]["a"] == faces + mask
    assert case["input_shape"][0] == model.input_px


@pytest.mark.parametrize("case", _cases("oracle.json", "configs"))
def test_products_equal_the_oracle(case):
    """Of both sides; what the reference computes twice of one tensor is computed once."""
    macs = {subnet["name"]: subnet["macs_per_call"] for subnet in case["subnets"]}
    calls = {(name, *inputs) for name, inputs, _ in case["wiring"] if name in macs}
    expected = sum(macs[name] for name, *_ in calls)
    found = work_of(_made(case, models.meta_model), 1).flops("forward") // 2
    assert found <= sum(case["macs_per_example"].values())
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", _cases("forward.json", "cases"))
def test_outputs_equal_the_oracle(case, oracle):
    wanted = oracle("models/forward.npz")
    model = _made(case, functools.partial(models.build, seed=None)).eval()
    entries = [*keras_entries(model)]
    assert len(entries) == len(case["weights"])
    for entry, (k, _, _, _, shape, base, scale) in zip(entries, case["weights"], strict=True):
        assert entry.shape == tuple(shape)
        values = base + scale * _rule(k, int(np.prod(shape)))
        entry.load(values.astype(np.float32).reshape(shape))
    size_px = case["input_shape"][0]
    faces = torch.stack([_oracle_input(size_px, phase) for phase in (0.0, 1.0)])
    faces = faces.contiguous(memory_format=torch.channels_last)
    _compare(model, faces, case, wanted, atol=1e-4)
    model.align(8)
    _compare(model, faces, case, wanted, atol=1e-4)


def _compare(model, faces, case, wanted, atol):
    with torch.no_grad():
        both = model(faces)
    found = {
        f"{side}{number}": out
        for side, outs in zip("ab", both, strict=True)
        for number, out in enumerate(outs)
    }
    for row in case["outputs"]:
        stride = row["stored_stride"]
        ours = found[row["key"].rsplit(".", 1)[1]][0].permute(1, 2, 0)[::stride, ::stride]
        np.testing.assert_allclose(
            ours.numpy(), wanted[row["key"]], rtol=0, atol=atol, err_msg=row["key"]
        )


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
