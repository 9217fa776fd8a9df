"""The optimizer's state in host memory: the same bits, what it saves and costs, what is told."""

import re

import pytest
import torch
from conftest import CPU, json_events, tiny_config, train_words
from ranks import call
from safetensors.torch import load_file
from torch import nn

from mien.benchmarks.bench_step import make_batch
from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import OptimizerConfig, from_dict
from mien.core.distribute import update
from mien.core.estimate.links import C2C, PCIE_4, PCIE_5, host_link
from mien.core.optim import placement
from mien.core.optim.optimizer import Update
from mien.core.precision import Precision
from mien.core.training import memory
from mien.core.training.build import build_model, build_step
from mien.kernels.optimizer_rules import Rule
from mien.kernels.tensor_table import TensorTable

MIB = 2**20
NOTHING_CHANGES = "optimizer.placement is host, which changes nothing without a GPU"
BF16 = Precision("bf16", torch.bfloat16, "as set")
FP32 = Precision("fp32", torch.float32, "as set")
STATES = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "ada_amsgrad": True, "gradient_accumulation": 3},
    {"optimizer": "lion", "gradient_clipping": "autoclip", "autoclip_history": 3},
    {"optimizer": "schedule-free"},
]


def _trained(device, mode, settings, steps=7):
    """An update of a small model, part of it frozen, after some steps, resumed in the middle."""
    saved = None
    for first, last in ((0, 4), (4, steps)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten())
        model.append(nn.Linear(8 * 36, 4)).to(device, memory_format=torch.channels_last)
        model[1].requires_grad_(False)
        config = OptimizerConfig(learning_rate=1e-2, **settings)
        update = Update(model, config, precisions.resolve(mode, torch.device(device)))
        if saved:
            update.load_weights(saved[0])
            update.load(saved[1])
        for step in range(first, last):
            x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
            loss = 1e-3 * model(x.to(update.precision.compute)).float().square().sum()
            scale = 1.0 if update.scale is None else update.scale
            update(torch.autograd.grad(loss * scale, update.parameters))
        saved = [
            {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
            for tensors in (update.weights(), update.tensors())
        ]
    return update


def _assert_same_state(one, other):
    states = [each.weights() | each.tensors() for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.cpu(), states[1][name].cpu()), name


@pytest.mark.parametrize("settings", STATES, ids=lambda settings: settings["optimizer"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_on_a_cpu_nothing_differs(mode, settings):
    on_host = _trained("cpu", mode, settings | {"placement": "host"})
    _assert_same_state(_trained("cpu", mode, settings), on_host)
    assert not on_host.is_on_host


@pytest.mark.gpu
@pytest.mark.parametrize("settings", STATES, ids=lambda settings: settings["optimizer"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_gpu_moves_the_state_in_host_memory_to_the_same_bits(mode, settings):
    on_host = _trained("cuda", mode, settings | {"placement": "host"})
    _assert_same_state(_trained("cuda", mode, settings), on_host)
    kept = [each for moments in on_host.moments.values() for each in moments]
    kept += on_host.master_weights if mode != "fp32" else []
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in kept)
    assert all(tensor.is_cuda for tensor in on_host.accumulators)


@pytest.mark.gpu
def test_a_gpu_takes_page_locked_memory_alone():
    weights = [torch.ones(4, 4, device="cuda", dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"^parameters\[0\] must be on cuda:0, got cpu$"):
        TensorTable([torch.ones(4, 4)], {}, weights)


@pytest.fixture
def gpu_waits(monkeypatch):
    """The path of a GPU, in plain memory; a list of the waits for it."""
    waits = []
    monkeypatch.setattr(placement, "is_on_host", lambda config, device: config.placement == "host")
    like = {"dtype": torch.float32, "device": "cpu"}
    monkeypatch.setattr(
        placement, "_empty", lambda tensors: [torch.empty_like(each, **like) for each in tensors]
    )
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    return waits


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_the_host_waits_before_it_reads_or_writes_what_a_gpu_moves(mode, gpu_waits):
    plain = _trained("cpu", mode, STATES[1])
    assert not gpu_waits
    on_host = _trained("cpu", mode, STATES[1] | {"placement": "host"})
    _assert_same_state(plain, on_host)
    for access in (
        on_host.weights,
        on_host.tensors,
        lambda: on_host.load_weights(plain.weights()),
        lambda: on_host.load(plain.tensors()),
    ):
        gpu_waits.clear()
        access()
        assert gpu_waits


def _on_ranks(group, settings):
    """State of a tiny model after steps of two ranks, as the first one saves it."""
    config = tiny_config(
        {
            "model": {"trainer": "lightweight", "options": {"width": 8}},
            "train": {"batch_size": 2, "distribution": "sharded"},
            "precision": {"mode": "bf16"},
            "optimizer": {"overlap": "off", **settings},
        }
    )
    model, _ = build_model(config, CPU)
    step = build_step(config, model, CPU, group=group)
    torch.manual_seed(group.ranks.rank)
    for _ in range(2):
        step(make_batch(model, 1, CPU, torch.bfloat16))
        step.update.end_iteration()
    step.update.gather()
    return step.update.weights() | step.update.tensors() if group.ranks.is_first else {}


def _refusal_on_ranks(group):
    with pytest.raises(ValueError, match="do not fit") as refusal:
        _on_ranks(group, {"placement": "host"})
    return str(refusal.value)


def test_a_rank_keeps_its_share_in_host_memory(gpu_waits, monkeypatch, tmp_path):
    # Makes master weights whole, for which a rank has no room.
    monkeypatch.setattr(placement, "page_locked", None)
    plain = call(2, _on_ranks, tmp_path / "gpu", {})[0]
    on_host = call(2, _on_ranks, tmp_path / "host", {"placement": "host"})[0]
    assert plain.keys() == on_host.keys()
    assert all(torch.equal(tensor, on_host[name]) for name, tensor in plain.items())


def test_the_ranks_of_a_machine_divide_its_memory(gpu_waits, monkeypatch, tmp_path):
    # Some 200,000 parameters of 12 bytes: the half of a rank is more than half of the room.
    monkeypatch.setattr(update, "available_host_bytes", lambda: 2 * MIB)
    refused = call(2, _refusal_on_ranks, tmp_path)
    assert set(refused) == {
        "optimizer.placement is host, but 2 MiB do not fit in host memory (1 MiB free for this "
        "process); set it to gpu"
    }


def test_a_host_with_too_little_memory_is_told(monkeypatch):
    """Page-locked memory comes in powers of two: 4 MiB and a number take 8."""
    monkeypatch.setattr(placement, "available_host_bytes", lambda: 7 * MIB)
    line = (
        r"optimizer.placement is host, but 8 MiB do not fit in host memory \(7 MiB free for this "
        r"process\); set it to gpu"
    )
    with pytest.raises(ValueError, match=f"^{line}$"):
        placement.page_locked([torch.empty(MIB + 1, device="meta")])


@pytest.mark.parametrize(
    ("parameters_m", "mib", "costs_ms"),
    [
        (51.1, 585, (33, 16, 1.8)),
        (82.1, 940, (53, 26, 2.9)),
        (107.7, 1233, (69, 34, 3.8)),
        (258.0, 2953, (165, 83, 9.2)),
        (39.0, 446, (25, 12, 1.4)),
    ],
)
def test_what_it_saves_and_costs(parameters_m, mib, costs_ms):
    """12 bytes a parameter with Adam in 16 bits, each way, at three quarters of the link."""
    num_bytes = round(parameters_m * 1e6) * placement.host_bytes(Rule(name="adam"), torch.bfloat16)
    assert num_bytes / MIB == pytest.approx(mib, rel=2e-3)
    costs_s = [placement.update_s(num_bytes, link) for link in (PCIE_4, PCIE_5, C2C)]
    assert [1e3 * cost for cost in costs_s] == pytest.approx(costs_ms, rel=0.06)
    assert placement.update_s(num_bytes, PCIE_4, 4) == costs_s[0] / 4
    said = placement.described(num_bytes, PCIE_4, 4)
    assert said.startswith(f"{num_bytes / MIB:,.0f} MiB less on the GPU, and some ")
    assert said.endswith(" ms an iteration for the way over PCIe 4 (assumed); predicted")


@pytest.mark.parametrize(
    ("precision", "kept"), [(BF16, {"weights", "optimizer state"}), (FP32, {"optimizer state"})]
)
def test_the_plan_of_memory_counts_what_lies_on_the_host(precision, kept):
    settings = {"model": {"trainer": "original"}, "optimizer": {"gradient_accumulation": 2}}
    on_gpu = memory.footprint(from_dict(settings), precision).at(16)
    settings["optimizer"]["placement"] = "host"
    on_host = memory.footprint(from_dict(settings), precision).at(16)
    assert {name for name, size in on_gpu.parts.items() if on_host.parts[name] != size} == kept
    assert not any(on_host.parts[name] for name in kept)


def test_the_advice_names_it_before_another_model():
    tight = from_dict({"model": {"trainer": "original"}, "train": {"batch_size": 4}})
    need = memory.footprint(tight, BF16).at(4).total_bytes
    said = memory.advice(tight, BF16, round((need - 500 * MIB) / 0.9))
    assert "; use --set optimizer.placement=host --batch-size 4 (9" in said
    assert said.endswith(" ms an iteration for the way over PCIe 4 (assumed); predicted)")
    assert "\n" not in said


def test_the_advice_counts_what_a_rank_keeps_of_it():
    config = from_dict({"model": {"trainer": "original"}, "train": {"batch_size": 16}})
    sharded = from_dict({"model": {"trainer": "original"}, "train": {"distribution": "sharded"}})
    link, counted = host_link(), []
    for num_holders in (1, 4):
        whole = memory.host_state(config, BF16, 80_000_000, link, num_holders=num_holders)
        counted.append(float(whole.partition(" MiB")[0]))
    assert counted[1] == pytest.approx(counted[0] / 4, abs=1)
    need = memory.footprint(sharded, BF16, num_ranks=4)
    # A rank's four faces do not fit where its share of the state, some 235 MiB, does not.
    free = round((need.at(4).total_bytes - 100 * MIB) / 0.9)
    said = memory.advice(config, BF16, free, num_ranks=4)
    words = "; use --set train.distribution=sharded --set optimizer.placement=host --batch-size 16"
    assert re.search(rf"{words} \(23\d MiB less on the GPU", said), said


def test_a_run_without_a_gpu_says_that_nothing_changes(sides, tmp_path, capsys):
    weights = []
    for name, given in {"gpu": (), "host": ("--set", "optimizer.placement=host")}.items():
        words = train_words(sides, tmp_path / name, "-i", "2", "-b", "4", "--json", *given)
        assert main(words) == 0
        weights.append(load_file(next((tmp_path / name).glob("generations/2/model.safetensors"))))
    events = json_events(capsys.readouterr().out)
    notes = [event["message"] for event in events if event["event"] == "notice"]
    told = [note for note in notes if note.startswith("optimizer.placement is host, which changes")]
    assert told == [f"{NOTHING_CHANGES}: all memory is the host's"]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
