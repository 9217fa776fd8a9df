"""The summary counts what the oracle counted, and is told without faces."""

import dataclasses
import json

import pytest
import torch
from conftest import train_words
from oracle_numbers import oracle_models

from mien import models
from mien.cli import main
from mien.core.estimate.flops import work_of
from mien.core.estimate.summary import summarize


def _counted_twice(case):
    """Sides, and the sub-networks that their faces go through once and the oracle twice."""
    options = case["changed"]
    if options.get("architecture") == "liae":
        return [("a", "intermediate_both")]
    if options.get("shared_fc") == "half":
        is_split = options.get("split_fc", True)
        return [("a", "fc_a")] if is_split else [("a", "fc_both"), ("b", "fc_both")]
    return []


@pytest.mark.oracle
@pytest.mark.parametrize("case", oracle_models("oracle.json", "configs"), ids=lambda c: c["id"])
def test_products_equal_the_oracle(case):
    """Of every family: MACs of a face of each side.

    Where the sides share a half of the code, the oracle computes a half twice, mien once.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # weights are not looked at
    build = {
        key: value
        for key, value in case["global_changed"].items()
        if key in ("learn_mask", "reflect_padding")
    }
    changed = {
        key: [value] if key in ("freeze_layers", "load_layers") else value
        for key, value in case["changed"].items()
    }
    summary = summarize(models.meta_model(case["model"].replace("_", "-"), **build, **changed))
    expected = dict(case["macs_per_example"])
    macs = {whole.subnetwork: whole.macs for whole in summary.subnetworks}
    for side, part in _counted_twice(case):
        expected[side] -= macs[part]
    assert summary.macs == expected


@pytest.mark.parametrize("name", models.available())
def test_layers_add_up(name):
    options = dataclasses.asdict(models.family(name).tiny)
    model = models.meta_model(name, learn_mask=True, **options)
    found = summarize(model)
    assert sum(layer.parameters for layer in found.layers) == found.num_parameters
    assert [whole.subnetwork for whole in found.subnetworks] == [
        n for n, _ in model.named_children()
    ]
    for whole in found.subnetworks:
        layers = [layer for layer in found.layers if layer.subnetwork == whole.subnetwork]
        part = model.subnetwork(whole.subnetwork)
        assert whole.parameters == sum(p.numel() for p in part.parameters())
        assert whole.macs == sum(layer.macs for layer in layers) > 0
    assert model.training
    assert found.num_frozen == 0
    model.freeze()
    assert summarize(model).num_frozen == sum(
        p.numel() for path in model.freeze_layers for p in model.subnetwork(path).parameters()
    )


def test_what_is_frozen_is_not_counted_in_a_step():
    model = models.meta_model("original")
    whole = work_of(model, 1)
    model.freeze()
    frozen = work_of(model, 1)
    encoder = next(part for part in summarize(model).subnetworks if part.subnetwork == "encoder")
    assert frozen.flops("forward") == whole.flops("forward")
    assert whole.flops("weight") - frozen.flops("weight") == 2 * 2 * encoder.macs
    assert whole.num_parameters - frozen.num_parameters == encoder.parameters


def _summary(capsys, *words):
    assert main(["train", "--summary", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_facts(capsys):
    facts = _summary(capsys, "-t", "original", "-b", "4", "-f", "--device", "cpu")
    assert facts["trainer"] == "original"
    assert (facts["input_px"], facts["output_px"]) == (64, [64])
    assert facts["parameters"] == 82062470
    assert facts["parameters_not_trained"] == 69662976
    assert facts["macs_per_face"] == {"a": 1900150784, "b": 1900150784}
    assert facts["batch_size"] == 4
    # Forward of all; of the decoders, whose inputs need no gradient, weights and half the rest.
    assert facts["step_gflop"] == pytest.approx(55.2, rel=0.01)
    assert facts["precision"] == "bf16"
    assert facts["gpu_memory_mib"] > 500
    assert facts["free_mib"] is None
    assert facts["fits"] is None
    first = facts["layers"][0]
    assert first == {
        "subnetwork": "encoder",
        "name": "0.0.conv",
        "kind": "SameConv",
        "shape": [128, 32, 32],
        "parameters": 9728,
        "macs": 9830400,
    }
    assert [part["subnetwork"] for part in facts["subnetworks"]] == [
        "encoder",
        "decoder_a",
        "decoder_b",
    ]
    assert facts["subnetworks"][0]["shape"] == [512, 8, 8]
    assert _summary(capsys, "-t", "original", "-b", "auto", "--device", "cpu")["batch_size"] == 16


def test_the_table(capsys):
    words = ["-t", "original", "--set", "model.options.width=8", "--device", "cpu"]
    assert main(["train", "-u", *words, "-f"]) == 0
    said = capsys.readouterr().out
    assert any(
        line.split()[:5] == ["0.0.conv", "SameConv", "8", "x", "32"] for line in said.splitlines()
    )
    assert "model        original, 64 px in, 64 px out" in said
    assert "are not trained" in said
    assert "GFLOP at batch size 16" in said


def test_ranks_divide_the_batch_and_with_it_the_memory(capsys):
    words = ["-t", "original", "--set", "model.options.width=8", "-b", "16", "--device", "cpu"]
    alone, on_four, sharded = (
        _summary(capsys, *words, *more)
        for more in ((), ("--gpus", "4"), ("--gpus", "4", "--set", "train.distribution=sharded"))
    )
    assert (alone["ranks"], alone["batch_size_of_a_rank"]) == (1, 16)
    assert (on_four["ranks"], on_four["batch_size"], on_four["batch_size_of_a_rank"]) == (4, 16, 4)
    assert on_four["step_gflop"] == alone["step_gflop"]
    assert sharded["gpu_memory_mib"] < on_four["gpu_memory_mib"]
    assert main(["train", "-u", *words, "--gpus", "3"]) == 0
    said = capsys.readouterr().out
    # Divided unevenly, the rank that has most counts.
    assert "GFLOP at batch size 16, 6 of it on a rank\n" in said
    assert "GPU memory   of each of 3 ranks: " in said
    assert "MiB at batch size 6: " in said
    assert main(["train", "-u", *words, "--gpus", "32"]) == 2
    assert "train.batch_size must be at least 32, " in capsys.readouterr().err


def test_a_saved_model_tells_of_itself(sides, tmp_path, capsys):
    model_dir = tmp_path / "model"
    words = ["-m", str(model_dir), "--device", "cpu"]
    new = ["--set", "model.options.width=16", "-i", "1", "--set", "train.batch_size=2"]
    assert main(train_words(sides, model_dir, *new)) == 0
    before = {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")}
    capsys.readouterr()
    facts = _summary(capsys, *words)
    assert facts["trainer"] == "lightweight"
    assert facts["layers"][0]["shape"] == [16, 32, 32]
    assert facts["batch_size"] == 2
    assert {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")} == before
    assert main(["train", "-u", *words, "-t", "original"]) == 2
    assert "holds a model of lightweight, not of original" in capsys.readouterr().err
