"""The benchmark suite: what it counts is exact, what it writes can be read again."""

import json

import numpy as np
import pytest
import torch

from mien.benchmarks import bench_step, harness, learning, report
from mien.core.train.losses import ssim


def test_the_plain_step_computes_the_same_loss():
    """The baseline must be the same work: its SSIM is ours."""
    pred, target = torch.rand(2, 2, 3, 24, 24)
    torch.testing.assert_close(
        bench_step.plain_ssim(pred, target), ssim(pred, target), atol=1e-4, rtol=0
    )


def test_calls_and_launches_are_counted_exactly():
    def step():
        torch.ones(3).add_(1).view(3)

    assert bench_step.count_launches(step) == 2, "ones and add_; the view is free"

    def inner():
        return None

    def outer():
        inner()
        len("")

    assert bench_step.count_python_calls(outer) == 4  # outer, inner, len, setprofile


@pytest.mark.budget
def test_a_step_stays_within_its_calls_and_launches():
    """Bounds a little above what was counted when written: 1,265 calls, 305 operations."""
    step = bench_step.mien_step("lightweight", 1, "fp32", torch.device("cpu"))
    assert bench_step.count_python_calls(step) <= 1400
    assert bench_step.count_launches(step) <= 340


def test_measure_tells_wall_and_cpu_seconds():
    figures = harness.measure(lambda: sum(range(200_000)), repeats=3)
    assert 0 < figures["p10_s"] <= figures["median_s"] <= figures["p90_s"]
    assert figures["cpu_s"] > 0


def test_results_replace_equal_measurements_and_reach_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    row = {"kind": "train", "model": "tiny", "batch_size": 2, "precision": "fp32"}
    row |= {"iterations": 7}
    harness.write_results([row | {"eg_per_s": 1.0, "data_wait": 0.5}])
    path = harness.write_results([row | {"eg_per_s": 2.5, "data_wait": 0.25}])
    content = json.loads(path.read_text())
    assert [r["eg_per_s"] for r in content["rows"]] == [2.5]
    assert {"schema", "card", "driver", "torch", "triton", "commit", "dirty"} <= content.keys()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(readme)
    text = readme.read_text()
    assert "| tiny | 2 | fp32 | 2.5 | 25.0 % | 7 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.update(readme)


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


def test_committed_curves_lie_within_ten_percent_of_the_reference(oracle_dir):
    path = oracle_dir / "learning/lightweight_b8.json"
    results = sorted(learning.RESULTS.glob(f"{path.stem}-*.json"))
    if not path.exists() or not results:
        pytest.skip("no reference curve, or no run of ours to compare with it")
    reference = learning.read_reference(path, path.parent, path.parent)
    for result in results:
        outside = [row for row in learning.compare(reference, result) if not row["passes"]]
        assert not outside, outside
