"""FLOPs, bytes and ceilings from the models' graphs, held to figures worked out independently."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mien import models
from mien.benchmarks import roofline

# M parameters, forward GFLOP a face, MB of activations a face, MB of weights and optimizer a step
WORK = {"original": (82.1, 3.80, 12, 2790), "lightweight": (51.1, 6.57, 19, 1736)}

# EG/s of an H100 (790 TFLOP/s, 3.0 TB/s) at 16, 64 and 256 faces a side: ceiling, stretch
H100 = {
    "original": {16: (24_280, 15_970), 64: (46_160, 28_090), 256: (59_470, 34_160)},
    "lightweight": {16: (23_620, 14_500), 64: (33_130, 19_340), 256: (36_840, 21_180)},
}


@pytest.mark.parametrize("name", WORK)
def test_work_of_a_step(name):
    work = roofline.work_of(models.meta_model(name), 1)
    parameters, gflop, activation_mb, weight_mb = WORK[name]
    assert work.num_parameters / 1e6 == pytest.approx(parameters, rel=0.02)
    assert work.flops("forward") / 2e9 == pytest.approx(gflop, rel=0.02)
    assert work.weight_bytes / 1e6 == pytest.approx(weight_mb, rel=0.02)
    assert round(work.activation_bytes / 2e6) == activation_mb


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("learn_mask", [False, True])
def test_flops_are_those_of_the_flop_counter(name, learn_mask):
    """Also the gradients': the counter sees a real backward pass, and no gradient of the input."""
    model = models.build(name, learn_mask=learn_mask, width=8)
    faces = torch.rand(4, 3, model.input_px, model.input_px)
    with FlopCounterMode(display=False) as counter:
        outputs = [output for side in model(faces) for output in side]
        forward = counter.get_total_flops()
        sum(output.sum() for output in outputs).backward()
    work = roofline.work_of(models.meta_model(name, learn_mask=learn_mask, width=8), 2)
    assert work.flops("forward") == forward
    assert work.flops() == counter.get_total_flops()
    first = work.products[0].flops
    assert work.flops("data") == forward - first
    assert work.flops("weight") == forward


def test_work_grows_with_the_batch_and_the_width():
    model = models.meta_model("original", width=8)
    small, large = roofline.work_of(model, 2), roofline.work_of(model, 6)
    assert large.flops() == 3 * small.flops()
    assert large.activation_bytes == 3 * small.activation_bytes
    assert large.weight_bytes == small.weight_bytes
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


@pytest.mark.parametrize("batch_size", roofline.BATCH_SIZES)
@pytest.mark.parametrize("name", H100)
def test_predictions_for_an_h100(name, batch_size):
    """Ceilings lie 1.5 to 4.3 % below the figures (padded inputs are counted), stretch within 5."""
    work = roofline.work_of(models.meta_model(name), batch_size)
    ceiling, stretch = H100[name][batch_size]
    card = roofline.CARDS["h100"]
    assert roofline.ceiling(work, card).eg_per_s == pytest.approx(ceiling, rel=0.05)
    assert roofline.stretch(work, card).eg_per_s == pytest.approx(stretch, rel=0.05)


def test_what_binds():
    work = roofline.work_of(models.meta_model("original"), 16)
    assert roofline.ceiling(work, roofline.CARDS["h100"]).binds == "update"
    work = roofline.work_of(models.meta_model("original"), 256)
    assert roofline.ceiling(work, roofline.CARDS["h100"]).binds == "products"


def test_rows_for_every_model_and_card():
    mine = roofline.Card("Mine", 1, 10, 4)
    rows = list(roofline.rows(mine))
    assert {row["model"] for row in rows} == set(models.available())
    names = {row["of"] for row in rows if row["kind"] == "roofline"}
    assert names == {"Mine", "H100", "H200", "RTX 4090"}
    for row in rows:
        if row["kind"] == "roofline":
            assert row["stretch_eg_per_s"] < row["ceiling_eg_per_s"]
