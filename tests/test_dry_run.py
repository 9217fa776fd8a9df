"""The rehearsal, the batch size that fits, and what is said where memory runs out."""

import json
import tomllib

import pytest
import torch

from mien.benchmarks import harness
from mien.cli import main
from mien.core.train import prepare
from mien.core.train.step import TrainStep


@pytest.fixture(scope="session")
def inputs(sides):
    return ["-A", str(sides[0]), "-B", str(sides[1])]


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch):
    """The ceilings of a card, as from an earlier benchmark."""
    measured = {"device": "a card", "num_sms": 2, "copy_gb_s": 30.0, "gemm_tflops": {"bf16": 0.4}}
    monkeypatch.setattr(harness, "known_ceilings", lambda: measured)


def _batch_size(model_dir):
    return tomllib.loads((model_dir / "config.toml").read_text())["train"]["batch_size"]


def _train(inputs, *more):
    tiny = ["-t", "lightweight", "--set", "model.options.width=8", "--device", "cpu"]
    return main(["train", *inputs, *tiny, *more])


def test_a_dry_run_tells_and_keeps_nothing(inputs, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(inputs, "-m", str(model_dir), "-b", "4", "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert not model_dir.exists()
    assert facts["trainer"] == "lightweight"
    assert facts["batch_size"] == 4
    assert facts["precision"] == "fp32"
    assert len(facts["losses"]) == 2
    assert 0 < facts["losses"][0]["loss_a"] < 2
    assert facts["gpu_memory_mib"] > 500
    assert facts["roofline_eg_per_s"] > 0
    assert facts["bound_by"] in ("products", "pointwise", "update", "gaps")
    assert _train(inputs, "-b", "4", "--dry-run") == 0, "it needs no model folder"
    said = capsys.readouterr().out
    assert f"parameters   {facts['parameters']:,}" in said
    assert "nothing was kept" in said


def test_a_dry_run_of_a_model_takes_its_settings_and_leaves_it_alone(inputs, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(inputs, "-m", str(model_dir), "-b", "4", "-i", "1") == 0
    before = {path: path.stat().st_mtime_ns for path in model_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "-m", str(model_dir), "--device", "cpu", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["trainer"], facts["batch_size"]) == ("lightweight", 4)
    after = {path: path.stat().st_mtime_ns for path in model_dir.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_a_mistake_in_a_dry_run_is_one_line(inputs, tmp_path, capsys):
    assert _train(inputs, "-b", "27", "--dry-run") == 2
    assert capsys.readouterr().err.endswith("or less, or add faces\n")


def test_auto_takes_the_largest_batch_that_fits(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 880 * 2**20)
    assert _train(inputs, "-m", str(tmp_path / "one"), "-b", "auto", "-i", "1", "--json") == 0
    assert _batch_size(tmp_path / "one") in range(4, 26, 4)
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 2**40)
    assert _train(inputs, "-m", str(tmp_path / "all"), "-b", "auto", "-i", "1", "--json") == 0
    assert _batch_size(tmp_path / "all") == 26, "no more than a side has faces"
    capsys.readouterr()
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 2**20)
    assert _train(inputs, "-m", str(tmp_path / "none"), "-b", "auto", "-i", "1") == 2
    assert "out of GPU memory: lightweight" in capsys.readouterr().err


def test_where_memory_runs_out_the_nearest_setting_is_named(inputs, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(TrainStep, "forward", fail)
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 880 * 2**20)
    assert _train(inputs, "-m", str(tmp_path / "model"), "-b", "26", "-i", "1") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out of GPU memory: lightweight in fp32 needs about" in said
    assert "use --batch-size " in said
