"""Every family against the oracle: weights, wiring, and what comes out for weights by its rule."""

import functools

import numpy as np
import pytest
import torch
from oracle_numbers import oracle_face, oracle_models, oracle_weight

from mien import models
from mien.core.estimate.flops import work_of
from mien.models.keras_weights import keras_entries

pytestmark = pytest.mark.oracle


def _each(name, list_name):
    cases = oracle_models(name, list_name)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def _made(case, make):
    settings = {**case["global_changed"], **case["changed"]}
    return make(case["model"].replace("_", "-"), **settings)


@_each("oracle.json", "configs")
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


@_each("oracle.json", "configs")
def test_products_equal_the_oracle(case):
    """Of both sides; what the reference computes twice of one tensor is computed once."""
    macs = {subnet["name"]: subnet["macs_per_call"] for subnet in case["subnets"]}
    calls = {(name, *inputs) for name, inputs, _ in case["wiring"] if name in macs}
    expected = sum(macs[name] for name, *_ in calls)
    found = work_of(_made(case, models.meta_model), 1).flops("forward") // 2
    assert found <= sum(case["macs_per_example"].values())
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@_each("forward.json", "cases")
def test_outputs_equal_the_oracle(case, oracle):
    wanted = oracle("models/forward.npz")
    model = _made(case, functools.partial(models.build, seed=None)).eval()
    entries = [*keras_entries(model)]
    assert len(entries) == len(case["weights"])
    for entry, row in zip(entries, case["weights"], strict=True):
        weight = oracle_weight(row)
        assert entry.shape == weight.shape
        entry.load(weight)
    size_px = case["input_shape"][0]
    faces = torch.stack([oracle_face(size_px, phase) for phase in (0.0, 1.0)])
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
