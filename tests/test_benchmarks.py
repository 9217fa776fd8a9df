"""The benchmark suite: what it counts is exact, what it writes can be read again."""

import contextlib
import gc
import json
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mien.benchmarks import bench_step, ceilings, harness, learning
from mien.cli import main
from mien.kernels import conv3x3, rule_step
from mien.kernels.matrix_products import by_pytorch
from mien.kernels.reference import ssim


def test_the_plain_step_computes_the_same_loss():
    """The baseline must be the same work: its SSIM is ours."""
    pred, target = torch.rand(2, 2, 3, 24, 24)
    torch.testing.assert_close(
        bench_step.plain_ssim(pred, target), ssim(pred, target), atol=1e-4, rtol=0
    )


def test_the_plain_step_runs_no_operation_of_ours():
    """The baseline would else get faster with what it is compared with."""
    step = bench_step.plain_step("lightweight", 1, "fp32", torch.device("cpu"))
    with torch.profiler.profile() as profile:
        step()
    ours = {event.key for event in profile.key_averages() if event.key.startswith("mien::")}
    assert not ours


def test_python_calls_are_counted_exactly():
    def inner():
        return None

    def outer():
        inner()
        len("")

    assert bench_step.count_python_calls(outer) == 4  # outer, inner, len, setprofile


@pytest.mark.budget
def test_a_step_stays_within_its_python_calls(monkeypatch):
    """A bound a little above what was counted when written: 3,635 calls by Python 3.11 and 3,673 by
    3.13, 213 of which came with the checks of sizes and addresses and the device guard of every
    launch. A graph makes none. As on a GPU, products are PyTorch's and all weights move at once."""
    monkeypatch.setattr(conv3x3, "pays", lambda *convolution: False)
    whole = slice(None)
    monkeypatch.setattr(
        rule_step, "_pieces", lambda _, chosen: [[(each, whole) for each in chosen]] * bool(chosen)
    )
    step = bench_step.mien_step("lightweight", 1, "fp32", torch.device("cpu"))
    most = 3650 if sys.version_info < (3, 13) else 3700
    with by_pytorch():
        assert bench_step.count_python_calls(step) <= most


def test_measure_tells_wall_and_cpu_seconds():
    calls = []

    def work():
        calls.append(sum(range(20_000)))

    figures = harness.measure(work, harness.Pace(windows=3, window_s=0.01, warmup=2))
    assert 0 < figures["p10_s"] <= figures["median_s"] <= figures["p90_s"] < 0.01
    assert figures["cpu_s"] > 0
    assert len(calls) > 3 * 0.01 / figures["p90_s"] * 0.5, "windows are filled with calls"


def test_a_slow_call_fills_a_window_alone():
    calls = []
    harness.measure(lambda: calls.append(1), harness.Pace(windows=4, window_s=0.0, warmup=2))
    assert len(calls) == 2 + 1 + 4  # warm-up, a probe, the windows


class _Circular:
    """A step that refers to itself, as one with hooks does."""

    def __init__(self):
        self.itself = self


def test_what_a_graph_times_has_run_on_its_stream_before(monkeypatch):
    """Else the graph holds what is made once a stream, at every call, and it is timed with it."""
    program = SimpleNamespace()
    current, called = [program], []

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    fakes = {
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "current_stream": lambda: current[-1],
        "stream": on,
        "graph": lambda _, stream=None: on(stream),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    harness._captured(lambda: called.append(current[-1]), calls=2)
    assert len(called) == 3
    assert called[0] is called[1] is called[2] is not program


def test_a_row_is_measured_without_the_step_before(monkeypatch):
    """Its memory would count as that of the row's own step."""
    monkeypatch.setattr(bench_step, "_figures", lambda *_: {})
    steps = []

    def make():
        assert all(step() is None for step in steps)
        made = _Circular()
        steps.append(weakref.ref(made))
        return made

    gc.disable()
    try:
        for _ in range(2):
            bench_step.step_row({}, make, torch.device("cpu"), None)
    finally:
        gc.enable()
    assert len(steps) == 2


@pytest.mark.parametrize(("engine", "peak_mib"), [("mien-graph", 100), ("mien-eager", 30)])
def test_the_memory_of_a_row_on_a_gpu(monkeypatch, engine, peak_mib):
    """cuBLAS keeps memory for every stream that it was called on; a replay takes none."""
    kept, held, peak = 65 << 20, 65 << 20, 0

    def reset(_device):
        nonlocal peak
        peak = held

    def make():
        nonlocal held, peak
        held += 20 << 20
        # What a graph took at its capture; of an eager step, what its libraries took to choose.
        peak = kept + (100 << 20)

        def step():
            nonlocal peak
            peak = max(peak, held if engine == "mien-graph" else kept + (30 << 20))

        return step

    patches = {
        "memory_allocated": lambda _: held,
        "max_memory_allocated": lambda _: peak,
        "reset_peak_memory_stats": reset,
        "synchronize": lambda _: None,
    }
    for name, patch in patches.items():
        monkeypatch.setattr(torch.cuda, name, patch)
    monkeypatch.setattr(bench_step, "measure", lambda *_, **__: {"median_s": 1.0, "cpu_s": 1.0})
    monkeypatch.setattr(bench_step, "spread_ms", lambda _: {})
    what = {"batch_size": 1, "engine": engine}
    assert bench_step.step_row(what, make, torch.device("cuda"), None)["peak_mib"] == peak_mib


@pytest.fixture
def quick(monkeypatch):
    """Benchmarks that run a moment only."""
    monkeypatch.setattr(harness, "pace", lambda kind, device_type: harness.Pace(2, 0.0, 0))
    for module in (ceilings, bench_step):
        monkeypatch.setattr(module, "pace", harness.pace)


def test_ceilings_of_this_machine(quick, monkeypatch):
    for name, value in {"_CPU_EDGE": 64, "_CPU_COPY_BYTES": 2**16}.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "_MODELS", ("lightweight",))
    found = ceilings.measure_ceilings(torch.device("cpu"))
    assert found["device"].startswith("CPU ")
    assert found["copy_gb_s"] > 0
    assert found["gemm_tflops"].keys() == {"bf16", "fp32"}
    assert {row["phase"] for row in found["convolutions"]} == {"forward", "data", "weight"}
    assert ceilings.card_of(found).copy_gb_s == found["copy_gb_s"]
    shapes = {row["shape"] for row in found["convolutions"]}
    assert any("-> 128, 5x5/2" in shape for shape in shapes), "the first convolution"
    assert len(found["convolutions"]) == 3 * len(shapes)


def test_a_ceiling_is_the_longer_of_bytes_and_flops():
    known = {"copy_gb_s": 100.0, "gemm_tflops": {"bf16": 10.0}}
    assert ceilings.ceiling_s(known, 1e9, 1e9, "bf16") == pytest.approx(1e-2)
    assert ceilings.ceiling_s(known, 1e6, 1e12, "bf16") == pytest.approx(0.1)
    assert ceilings.ceiling_s(known, 1e6, 1e12, "fp16") == pytest.approx(1e-5)
    assert ceilings.ceiling_s(known, None, None, "bf16") is None


def test_the_state_of_a_card_is_read_or_absent(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1980, 2619, 41, [N/A]'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert harness.card_state() == {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 41}
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert harness.card_state() is None
    smi.unlink()
    assert harness.card_state() is None
    assert harness._driver() == "unknown"


def _reference(tmp_path):
    curve = np.linspace(0.3, 0.1, 650)
    windows = [
        {
            "iterations": [first, first + 49],
            **{f"loss_{side}_mean": float(curve[first - 1 : first + 49].mean()) for side in "ab"},
        }
        for first in range(1, 601, 50)
    ]
    settings = {
        "centering": "face",
        "coverage": 87.5,
        "learning_rate": 5e-5,
        "epsilon_exponent": -7,
        "eye_multiplier": 3,
        "mouth_multiplier": 2,
    }
    content = {
        "model": "lightweight",
        "batch_size": 8,
        "settings": settings,
        "windows": windows,
        "per_iteration": {"loss_a": curve.tolist(), "loss_b": curve.tolist()},
    }
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(content))
    return learning.read_reference(path, tmp_path / "a", tmp_path / "b"), curve


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1.09, True), (1.11, False), (0.8, False)]
)
def test_a_curve_outside_ten_percent_is_seen(tmp_path, factor, passes):
    reference, curve = _reference(tmp_path)
    result = tmp_path / "run.json"
    ours = {f"loss_{side}": (curve * factor).tolist() for side in "ab"}
    result.write_text(json.dumps(ours | {"precision": "fp32", "seed": 0}))
    rows = learning.compare(reference, result)
    assert len(rows) == 20
    assert min(row["first"] for row in rows) == 101
    assert all(row["passes"] == passes for row in rows)
    learning.draw(reference, [result], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_results_of_learning_lie_in_the_folder_that_is_named(tmp_path, monkeypatch, capsys):
    """Nothing is written beside the committed ones, and what lies there is not trained again."""
    _, curve = _reference(tmp_path)

    def train(overrides, _reporter):
        (tmp_path / "trained").touch(exist_ok=False)
        return 0

    monkeypatch.setattr("mien.core.training.unattended.train", train)
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(learning, "read_losses", lambda _: {side: curve.tolist() for side in "ab"})
    words = ["bench", "learning", "--reference", str(tmp_path / "curve.json"), "--seeds", "7"]
    words += ["-A", "a", "-B", "b", "--precisions", "fp32", "--picture", str(tmp_path / "p.png")]
    for _ in range(2):
        assert main([*words, "--results", str(tmp_path / "mine")]) == 0
        assert "20 of 20 windows" in capsys.readouterr().out
    assert (tmp_path / "mine/learning/curve-fp32-seed7.json").exists()
    assert not (tmp_path / "committed").exists()


@pytest.mark.parametrize("words", [["--no-save"], ["--only", "x"], ["--compare", "x.json"]])
def test_learning_refuses_what_it_would_not_heed(words, capsys):
    given = ["bench", "learning", "--reference", "r.json", "-A", "a", "-B", "b"]
    assert main([*given, *words]) == 2
    assert f"bench learning takes no {words[0]}: leave it out" in capsys.readouterr().err


def test_committed_curves_lie_within_ten_percent_of_the_reference(oracle_dir):
    path = oracle_dir / "learning/lightweight_b8.json"
    results = sorted(learning.RESULTS.glob(f"{path.stem}-*.json"))
    if not path.exists() or not results:
        pytest.skip("no reference curve, or no run of ours to compare with it")
    reference = learning.read_reference(path, path.parent, path.parent)
    for result in results:
        outside = [row for row in learning.compare(reference, result) if not row["passes"]]
        assert not outside, outside
