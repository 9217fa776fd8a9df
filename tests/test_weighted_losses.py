"""How the losses combine: over functions, outputs, sides and the mask; the functions themselves are
tested in test_face_loss.py."""

import numpy as np
import pytest
import torch
from oracle_numbers import oracle_combination, oracle_files

from mien.core.config import LossConfig
from mien.core.data.feed import Batch
from mien.core.losses.weighted import Loss
from mien.kernels import reference

DEFINED_OTHERWISE = {"gmsd", "l_inf_norm", "pixel_gradient_diff"}
"""Whose axes the oracle's combinations mix up."""


def _batch(targets, weights, mask=None):
    """A batch whose sides are the same."""
    twice = [torch.cat((t, t)) for t in targets]
    weights = [torch.cat((w, w)) for w in weights]
    mask = None if mask is None else torch.cat((mask, mask))
    return Batch(torch.zeros(0), tuple(twice), tuple(weights), mask)


def _pair(size_px):
    pred, target = torch.rand(2, 2, 3, size_px, size_px)
    return (target + 0.2 * (pred - 0.5)).clamp(0, 1), target


def _named(loss, losses):
    return {name: float(v[0]) for name, v in loss.named(losses.row_v[None].numpy()).items()}


def _is_defined_here(path):
    """Whether a combination of the oracle means the same here; duplicates add up here."""
    names = oracle_combination(path).functions
    return len({*names}) == len(names) and DEFINED_OTHERWISE.isdisjoint(names)


COMBINATIONS = [path for path in oracle_files("losses/collator_*.npz") if _is_defined_here(path)]


@pytest.mark.oracle
@pytest.mark.parametrize("path", COMBINATIONS, ids=lambda path: path.stem)
def test_combination_equals_the_oracle(path, weights_dir):
    combination = oracle_combination(path)
    data = combination.data
    settings = {"loss_function_2": "none", "lpips_weights": weights_dir}
    slots = zip(combination.functions, combination.weights, strict=True)
    for number, (name, weight) in enumerate(slots, 1):
        place = f"_{number}" if number > 1 else ""
        settings[f"loss_function{place}"] = name
        if place:
            settings[f"loss_weight{place}"] = round(100 * weight)
    outputs, targets, weights = zip(*combination.outputs, strict=True)
    loss = Loss(LossConfig(**settings), [out.shape[-1] for out in outputs], "cpu")
    result = loss((outputs, outputs), _batch(targets, weights), None)
    named = _named(loss, result)
    total = sum(float(data[key].mean()) for key in data if key.startswith("weighted:"))
    assert named["loss_a"] == named["loss_b"] == pytest.approx(total, rel=2e-5)
    assert named["batch_total"] == pytest.approx(2 * total, rel=2e-5)
    for number, ours in enumerate(result.gradients):
        gradient = data[f"grad:{number % len(outputs)}"]
        bound = 2e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=bound)


def test_the_same_loss_twice_adds_up_and_none_is_dropped():
    twice = LossConfig(loss_function="mse", loss_function_2="mse")
    assert Loss(twice, [16], "cpu").weights == {"mse": 2.0}
    assert Loss(LossConfig(loss_weight_2=0), [16], "cpu").weights == {"ssim": 1.0}


def test_outside_the_mask_counts_nothing():
    pred, target = _pair(16)
    loss = Loss(LossConfig(), [16], "cpu")
    batch = _batch([target], [torch.zeros(2, 1, 16, 16)])
    result = loss(((pred,), (pred,)), batch, None)
    assert all(value == 0 for value in _named(loss, result).values())
    assert all(gradient.eq(0).all() for gradient in result.gradients)


def test_learned_mask_and_several_outputs_add_up():
    (small, small_target), (large, large_target) = _pair(16), _pair(32)
    mask_pred, mask = torch.rand(2, 2, 1, 32, 32)
    ones = [torch.ones(2, 1, 16, 16), torch.ones(2, 1, 32, 32)]
    loss = Loss(LossConfig(loss_function_2="none", learn_mask=True), [16, 32], "cpu")
    outputs = (small, large, mask_pred)
    result = loss((outputs, outputs), _batch([small_target, large_target], ones, mask), None)
    named = _named(loss, result)
    wanted = reference.ssim(small, small_target).mean() + reference.ssim(large, large_target).mean()
    assert named["batch_mask_a"] == pytest.approx(float((mask_pred - mask).square().mean()))
    assert named["loss_b"] == pytest.approx(float(wanted) + named["batch_mask_a"])
    assert named.keys() == {
        *("loss_a", "loss_b", "batch_total"),
        *(f"batch_face_{side}_{n}" for side in "ab" for n in (0, 1)),
        *(f"batch_{what}_{side}/ssim" for side in "ab" for what in ("weighted", "unweighted")),
        *("batch_mask_a", "batch_mask_b"),
    }
    assert loss.num_values == len(result.row_v) == 6
    assert [g.shape for g in result.gradients] == [out.shape for out in outputs] * 2


def test_a_number_that_is_not_finite_is_named_where_it_belongs():
    loss = Loss(LossConfig(), [16], "cpu")
    named = loss.named(np.array([[0.1, np.nan, 0.2, 0.3]]))  # a: ssim, mse; b: ssim, mse
    bad = {name for name, value in named.items() if not np.isfinite(value).all()}
    assert bad == {
        *("loss_a", "batch_total", "batch_face_a"),
        *("batch_weighted_a/mse", "batch_unweighted_a/mse"),
    }
