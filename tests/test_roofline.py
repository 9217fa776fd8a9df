"""FLOPs, bytes and ceilings from the models' graphs, held to figures worked out independently."""

import pytest
import torch
from conftest import tiny_options
from torch.utils.flop_counter import FlopCounterMode

from mien import models
from mien.benchmarks import roofline
from mien.benchmarks.variants import names, variant
from mien.core.config import from_dict
from mien.core.estimate.flops import configured_work
from mien.core.optim.fused_dense import LEAST
from mien.kernels import conv3x3
from mien.kernels.matrix_products import by_pytorch

# M parameters, forward GFLOP a face, MB of activations a face, MB of weights and optimizer a step
WORK = {
    "lightweight": (51.1, 6.57, 19, 1736),
    "original": (82.1, 3.80, 12, 2790),
    "iae": (117.8, 3.83, 12, 4006),
    "dfaker": (113.3, 17.8, 66, 3853),
    "dfaker-256": (258.0, 86.2, 275, 8774),
    "unbalanced": (207.0, 71.9, 98, 7040),
    "dfl-h128": (107.7, 30.9, 78, 3662),
    "dfl-sae": (130.0, 86.2, 308, 4420),
    "dfl-sae-liae": (121.7, 92.2, 311, 4139),
    "villain": (155.1, 96.5, 465, 5274),
    "realface": (238.2, 21.9, 78, 8100),
    "dlight-128": (115, 10.4, 47, 3920),
    "dlight": (144, 39.2, 172, 4883),
    "dlight-384": (191, 87.2, 381, 6487),
    "phaze-a:dny256": (30, 10.6, 185, 1016),
    "phaze-a:dny512": (39, 42.6, 741, 1337),
    "phaze-a:dny1024": (54, 171, 2964, 1818),
    "phaze-a:dfl-saehd-df": (52.9, 52.4, 186, 1799),
    "phaze-a:dfl-saehd-liae": (87.8, 61.8, 190, 2984),
    "phaze-a:stojo": (217, 299, 1449, 7391),
    "phaze-a:sym384": (215, 63.9, 975, 7324),
}

# EG/s of an H100 (790 TFLOP/s, 3.0 TB/s) at best, at 16, 64 and 256 faces a side
CEILINGS = {
    "lightweight": {16: 23_620, 64: 33_130, 256: 36_840},
    "original": {16: 24_280, 64: 46_160, 256: 59_470},
    "iae": {16: 18_420, 64: 40_060, 256: 56_610},
    "dfaker": {16: 9_530},
    "dfaker-256": {16: 2_400},
    "unbalanced": {16: 2_930, 64: 3_410, 256: 3_550},
    "dfl-h128": {16: 6_380, 64: 7_640, 256: 8_040},
    "dfl-sae": {16: 2_680},
    "dfl-sae-liae": {16: 2_540},
    "villain": {16: 2_370},
    "realface": {16: 6_260},
    "dlight-128": {16: 12_650},
    "dlight": {16: 4_920},
    "dlight-384": {16: 2_440},
    "phaze-a:dny256": {16: 11_630},
    "phaze-a:dny512": {16: 3_110},
    "phaze-a:dny1024": {16: 797},
    "phaze-a:dfl-saehd-df": {16: 4_530},
    "phaze-a:dfl-saehd-liae": {16: 3_730},
    "phaze-a:stojo": {16: 762},
    "phaze-a:sym384": {16: 2_050},
}

# The same in what good libraries reach, of the families without residual blocks
STRETCH = {
    "original": {16: 15_970, 64: 28_090, 256: 34_160},
    "lightweight": {16: 14_500, 64: 19_340, 256: 21_180},
    "iae": {16: 12_830, 64: 25_250, 256: 33_010},
    "dfl-h128": {16: 3_900, 64: 4_490, 256: 4_700},
}


@pytest.mark.parametrize("name", WORK)
def test_work_of_a_step(name):
    parameters, gflop, activation_mb, weight_mb = WORK[name]
    work = roofline.work_of(variant(name).meta_model(), 1)
    assert work.num_parameters / 1e6 == pytest.approx(parameters, rel=0.02)
    assert work.flops("forward") / 2e9 == pytest.approx(gflop, rel=0.02)
    assert work.weight_bytes / 1e6 == pytest.approx(weight_mb, rel=0.02)
    assert work.activation_bytes / 2e6 == pytest.approx(activation_mb, rel=0.02, abs=0.6)  # whole


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("learn_mask", [False, True])
def test_flops_are_those_of_the_flop_counter(name, learn_mask, monkeypatch):
    """Also the gradients': the counter sees a real backward pass, and no gradient of the input."""
    monkeypatch.setattr(conv3x3, "pays", lambda *convolution: False)  # the counter knows PyTorch's
    settings = {"learn_mask": learn_mask, **tiny_options(name)}
    model = models.build(name, **settings)
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    with by_pytorch(), FlopCounterMode(display=False) as counter:
        outputs = [output for side in model(faces) for output in side]
        forward = counter.get_total_flops()
        sum(output.sum() for output in outputs).backward()
    work = roofline.work_of(models.meta_model(name, **settings), 2)
    assert work.flops("forward") == forward
    if not any(getattr(module, "groups", 1) > 1 for module in model.modules()):
        assert (
            work.flops() == counter.get_total_flops()
        )  # which takes such a gradient for a full one
    first = work.products[0].flops
    assert work.flops("data") == forward - first
    assert work.flops("weight") == forward


def test_work_grows_with_the_batch_and_the_width():
    model = models.meta_model("original", width=8)
    small, large = roofline.work_of(model, 2), roofline.work_of(model, 6)
    assert large.flops() == 3 * small.flops()
    assert large.activation_bytes == 3 * small.activation_bytes
    assert large.weight_bytes == small.weight_bytes
    settings = {"model": {"trainer": "original", "options": {"width": 8}}, "train": {"ema": 0.9}}
    averaged = configured_work(from_dict(settings), 2)
    assert averaged.weight_bytes == small.weight_bytes + 8 * small.num_parameters
    lowmem = roofline.work_of(models.meta_model("original", width=8, lowmem=True), 2)
    assert lowmem.num_parameters < small.num_parameters


def test_bytes_of_one_layer_are_counted_as_stated():
    """Forward reads x and w and writes y, the rest likewise; 2 bytes a value."""
    work = roofline.work_of(models.meta_model("lightweight", width=8), 1)
    forward = next(p for p in work.products if p.phase == "forward")
    inputs, weight, outputs = 2 * 3 * 67 * 67, 8 * 3 * 5 * 5, 2 * 8 * 32 * 32  # padded by 3
    assert forward.num_bytes == 2 * (inputs + weight + outputs)
    assert (forward.rows, forward.columns, forward.depth) == (2 * 32 * 32, 8, 3 * 5 * 5)
    gradient = work.products[-1]
    assert gradient.phase == "weight"
    assert gradient.num_bytes == forward.num_bytes
    assert (gradient.rows, gradient.columns, gradient.depth) == (8, 3 * 5 * 5, 2 * 32 * 32)


@pytest.mark.parametrize("name", CEILINGS)
def test_ceilings_of_an_h100(name):
    for batch_size, expected in CEILINGS[name].items():
        work = roofline.work_of(variant(name).meta_model(), batch_size)
        found = roofline.ceiling(work, roofline.CARDS["h100"]).eg_per_s
        # dny reads less than the figures say: no padding is counted in its unpadded convolution.
        assert found == pytest.approx(expected, rel=0.025 if "dny" in name else 0.02), batch_size


@pytest.mark.parametrize("name", STRETCH)
def test_what_good_libraries_reach_on_an_h100(name):
    for batch_size, expected in STRETCH[name].items():
        work = roofline.work_of(models.meta_model(name), batch_size)
        found = roofline.stretch(work, roofline.CARDS["h100"]).eg_per_s
        assert found == pytest.approx(expected, rel=0.05), batch_size


def test_a_step_whose_dense_gradients_stay_factors():
    """`original` moves 4 of 34 bytes less of its 33.6 M dense weights; convolutions stay."""
    card = roofline.CARDS["h100"]
    work = roofline.work_of(models.meta_model("original"), 16)
    fused = work.with_fused_dense(LEAST)
    assert [sorted((p.rows, p.columns, p.depth)) for p in fused.fused] == [[32, 1024, 16384]] * 2
    assert fused.flops() + sum(p.flops for p in fused.fused) == work.flops()
    seconds = [each.num_faces / roofline.ceiling(each, card).eg_per_s for each in (work, fused)]
    saved = 4 * 2 * 2**24 / 3e12
    assert seconds[0] - seconds[1] == pytest.approx(saved, rel=0.05)
    large = roofline.work_of(models.meta_model("original"), 1024)
    slow, fast = (
        roofline.stretch(each, card).eg_per_s for each in (large.with_fused_dense(LEAST), large)
    )
    assert slow < fast, "Gram matrices grow with the square of the batch"
    small = roofline.work_of(models.meta_model("original", width=8), 16)
    assert not small.with_fused_dense(LEAST).fused


def test_what_binds():
    work = roofline.work_of(models.meta_model("original"), 16)
    assert roofline.ceiling(work, roofline.CARDS["h100"]).binds == "update"
    work = roofline.work_of(models.meta_model("original"), 256)
    assert roofline.ceiling(work, roofline.CARDS["h100"]).binds == "products"


def test_rows_for_every_model_and_card():
    mine = roofline.Card("Mine", 1, 10, 4)
    rows = list(roofline.rows(mine))
    assert {row["model"] for row in rows} == set(names())
    cards = {row["of"] for row in rows if row["kind"] == "roofline"}
    assert cards == {"Mine", "H100", "H200", "RTX 4090"}
    for row in rows:
        if row["kind"] == "roofline":
            assert row["stretch_eg_per_s"] < row["ceiling_eg_per_s"]
