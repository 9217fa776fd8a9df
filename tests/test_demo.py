"""The demonstration: what it draws, trains, swaps and names, and in which precision."""

from pathlib import Path

import cv2
import pytest
import torch

from mien.cli import demo, main
from mien.core import precision


def test_it_ends_with_a_swapped_film(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "FACES", 25)
    monkeypatch.setattr(demo, "SIZE_PX", 64)
    monkeypatch.setattr(demo, "FRAMES", 2)
    monkeypatch.setattr(demo, "BF16_ITERATIONS", 2)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert main(["demo", "--folder", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Drawing two people and a film into {tmp_path / 'demo'}\n")
    assert "\nprecision  bf16 (as set)\n" in said
    assert "\nStopped at iteration 2: " in said
    named = [Path(line.rsplit("  ", 1)[1]) for line in said.splitlines()[-4:]]
    assert [path.name for path in named][2:] == ["before_after.png", "preview.png"]
    assert all(path.exists() for path in named)
    assert cv2.imread(str(named[2])).shape[1] > 300
    assert main(["demo", "--folder", str(tmp_path / "demo")]) == 0, "trained already, swapped again"
    assert capsys.readouterr().out.splitlines()[-4:] == said.splitlines()[-4:]


@pytest.mark.parametrize("iterations", ["-1", "0", "2000000000"])
def test_iterations_that_cannot_be_are_named_by_their_flag(tmp_path, capsys, iterations):
    folder = tmp_path / "demo"
    assert main(["demo", "--folder", str(folder), "--iterations", iterations]) == 2
    assert capsys.readouterr() == (
        "",
        f"mien demo: --iterations must be a whole number from 1 to 1000000000, got {iterations}\n",
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "has_bf16"), [("fpu avx2 avx512_bf16", True), ("amx_bf16 vme", True), ("avx2", False)]
)
def test_a_cpu_says_whether_it_has_bf16(flags, has_bf16, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"model name : X\nflags : {flags}\n")
    precision.cpu_has_bf16.cache_clear()
    try:
        chosen = precision.resolve("auto", torch.device("cpu"))
        assert precision.cpu_has_bf16() == has_bf16
    finally:
        precision.cpu_has_bf16.cache_clear()
    assert chosen.name == "fp32"
    assert ("faster" in chosen.why) == has_bf16
