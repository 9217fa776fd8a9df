"""Predicted speed of several GPUs: the rows of a simulation part by part, and what must hold."""

import functools
import subprocess
import sys

import pytest
import torch

from mien.benchmarks.variants import variant
from mien.core.config import from_dict
from mien.core.distribute import predict
from mien.core.distribute.ranks import Ranks
from mien.core.estimate.flops import work_of
from mien.core.estimate.links import NVLINK, PCIE_4, PCIE_5, Link
from mien.core.estimate.roofline import CARDS, stretch
from mien.core.precision import Precision
from mien.core.training import scaling
from mien.core.training.scaling import outlook_of

# EG/s of H100s by model, faces of a side and GPU, link, and number of GPUs: mirrored, then sharded
ROWS = {
    ("original", 16, "NVLink"): ({2: 30_600, 4: 59_600, 8: 113_000}, {2: 33_100, 8: 143_000}),
    ("original", 16, "PCIe 5"): ({2: 11_400, 4: 16_700, 8: 29_400}, {2: 12_200, 8: 32_000}),
    ("original", 16, "PCIe 4"): ({2: 6_600, 4: 9_200, 8: 16_100}, {2: 6_800, 8: 16_900}),
    ("original", 64, "NVLink"): ({2: 54_200, 4: 108_000, 8: 215_000}, {2: 56_100, 8: 232_000}),
    ("original", 64, "PCIe 5"): ({2: 38_100, 4: 58_300, 8: 104_000}, {2: 38_700, 8: 113_000}),
    ("original", 64, "PCIe 4"): ({2: 23_600, 4: 34_300, 8: 60_000}, {2: 24_500, 8: 63_000}),
    ("dfaker-256", 16, "NVLink"): ({2: 2_660, 4: 5_305, 8: 10_600}, {2: 2_723, 8: 11_100}),
    ("dfaker-256", 16, "PCIe 5"): ({2: 2_537, 4: 4_070, 8: 7_383}, {2: 2_137, 8: 7_484}),
    ("dfaker-256", 16, "PCIe 4"): ({2: 1_689, 4: 2_520, 8: 4_472}, {2: 1_728, 8: 4_658}),
    ("dfaker-256", 64, "NVLink"): ({2: 2_995, 4: 5_985, 8: 12_000}, {2: 3_015, 8: 12_100}),
    ("dfaker-256", 64, "PCIe 5"): ({2: 2_955, 4: 5_866, 8: 11_700}, {2: 2_802, 8: 10_700}),
    ("dfaker-256", 64, "PCIe 4"): ({2: 2_911, 4: 5_739, 8: 11_400}, {2: 2_600, 8: 9_478}),
}
# EG/s of one H100 in that simulation
ONE = {
    ("original", 16): 15_970,
    ("original", 64): 28_100,
    ("dfaker-256", 16): 1_375,
    ("dfaker-256", 64): 1_544,
}
LINKS = {link.name: link for link in (NVLINK, PCIE_4, PCIE_5)}


@functools.cache
def _one(name, batch_size):
    """The step on one H100: its parts by what good libraries reach, as long as simulated."""
    work = work_of(variant(name).meta_model(), batch_size)
    best = stretch(work, CARDS["h100"])
    step_s = 2 * batch_size / ONE[name, batch_size]
    num_bytes = 2 * work.num_parameters
    return predict.StepTime(batch_size, step_s, best.backward_s, best.update_s, num_bytes)


@pytest.mark.parametrize(("name", "batch_size", "link"), ROWS)
def test_the_rows_of_a_simulation(name, batch_size, link):
    """The simulation sends each part of the gradients at once; the largest difference is 4 %."""
    one = _one(name, batch_size)
    for way, expected in zip(
        (predict.mirrored, predict.sharded), ROWS[name, batch_size, link], strict=True
    ):
        for num_gpus, eg_per_s in expected.items():
            predicted = way(one, num_gpus, LINKS[link])
            assert predicted.eg_per_s == pytest.approx(eg_per_s, rel=0.045)
            assert predicted.speedup == pytest.approx(eg_per_s / one.eg_per_s, rel=0.045)


@pytest.mark.parametrize("name", ["original", "dfaker-256"])
def test_one_gpu_is_one_gpu_and_a_better_link_is_no_slower(name):
    one = _one(name, 16)
    for way in (predict.mirrored, predict.sharded, predict.choose):
        assert way(one, 1, PCIE_4).step_s == one.step_s
        for num_gpus in (2, 3, 8):
            links = [Link("a link", float(gb_s)) for gb_s in range(1, 500, 7)]
            steps_s = [way(one, num_gpus, link).step_s for link in links]
            assert steps_s == sorted(steps_s, reverse=True)
            assert steps_s[0] > steps_s[-1]


def test_every_gpu_sends_less_than_twice_the_gradients():
    sent = [predict.wire_bytes(164_200_000, num_gpus) / 1e6 for num_gpus in (1, 2, 4, 8)]
    assert sent == pytest.approx([0, 164.2, 246.3, 287.35])


def test_the_faster_way_is_chosen():
    """Over NVLink the update is what counts; over PCIe it is what the backward pass hides."""
    assert predict.choose(_one("original", 16), 8, NVLINK).distribution == "sharded"
    assert predict.choose(_one("dfaker-256", 64), 8, PCIE_4).distribution == "mirrored"
    assert predict.choose(_one("original", 16), 1, NVLINK).distribution == "mirrored"


def _outlook(batch_size, num_gpus, link, overlap="off", **settings):
    config = from_dict(
        {
            "model": {"trainer": "original"},
            "train": {"batch_size": batch_size},
            "optimizer": {"overlap": overlap},
        }
    )
    bf16 = Precision("bf16", torch.bfloat16, "as set")
    gpu = torch.device("cuda", 0)
    return outlook_of(config, bf16, gpu, CARDS["h100"], num_gpus, link, **settings)


def test_it_is_told_where_more_gpus_are_slower_and_from_which_batch_they_pay():
    slower = _outlook(16, 2, PCIE_4)
    assert slower.run_speedup < slower.grown.speedup < 0.5
    least = slower.paying.one.batch_size
    assert 150 < least < 200
    assert slower.paying.speedup >= 1.5
    assert str(slower) == (
        "2 GPUs over PCIe 4 (assumed): 0.2x at batch size 16 (8 faces each); 0.4x at 32 (16 each, "
        f"sharded); from {least} faces each 1.5x"
    )
    assert slower.warning == (
        f"2 GPUs are slower than one here: train on one, or raise the batch size to {2 * least}"
    )
    faster = _outlook(64, 8, NVLINK)
    assert faster.run_speedup == pytest.approx(3.4, rel=0.05)
    assert not faster.warning
    assert str(faster).endswith("(64 each, sharded)")
    hopeless = _outlook(16, 2, Link("a wire", 0.01))
    assert str(hopeless).endswith("; no batch size makes that many pay")
    assert hopeless.warning.endswith(": train on one")


def test_a_measured_step_takes_the_place_of_the_roofline():
    """A step twice as long leaves twice the time to hide the same exchange."""
    predicted = _outlook(64, 2, PCIE_5)
    slow = _outlook(64, 2, PCIE_5, measured_s=2 * predicted.grown.one.step_s)
    assert slow.grown.one.step_s == pytest.approx(2 * predicted.grown.one.step_s, rel=0.01)
    assert slow.grown.speedup > predicted.grown.speedup


def test_ranks_on_gpus_choose_by_prediction(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(scaling, "gpu_link", lambda: NVLINK)
    config = from_dict({"model": {"trainer": "original"}, "train": {"batch_size": 64}})
    bf16, gpu = Precision("bf16", torch.bfloat16, "as set"), torch.device("cuda", 0)
    ranks = Ranks(0, 4, 0, 4)
    assert scaling.is_sharding_faster(config, bf16, gpu, ranks)
    assert str(scaling.outlook_at_start(config, bf16, gpu, ranks)).startswith("4 GPUs over NVLink")
    apart = scaling.outlook_at_start(config, bf16, gpu, Ranks(0, 4, 0, 2))
    assert str(apart).startswith("4 GPUs over the network (assumed): 0.")
    cpu = torch.device("cpu")
    assert not scaling.is_sharding_faster(config, bf16, cpu, ranks)
    assert scaling.outlook_at_start(config, bf16, cpu, ranks) is None


def test_an_update_that_one_gpu_hides_is_not_won():
    """The speed-up with `optimizer.overlap` is about the number of GPUs, not above."""
    plain, hidden = _outlook(16, 8, NVLINK), _outlook(16, 8, NVLINK, overlap="auto")
    assert plain.grown.speedup > 8 > hidden.grown.speedup > 4
    assert hidden.grown.step_s == pytest.approx(plain.grown.step_s)


def test_a_prediction_needs_no_torch():
    code = "import sys, mien.core.distribute.predict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
