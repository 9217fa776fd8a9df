"""`mien model export --to safetensors`: read back it is the model, or it is not kept."""

import json

import numpy as np
import pytest
from conftest import train_words

from mien.cli import main
from mien.core import load_model, swap
from mien.core.exchange import tensors_export


@pytest.fixture(scope="module")
def model(sides, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "m"
    assert main(train_words(sides, path, "-b", "2", "-i", "1")) == 0
    return path


def test_what_is_written_swaps_as_the_model(model, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    arguments = ["model", "export", str(model), "--to", "safetensors", "-o", str(target)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["difference"], facts["num_faces"]) == (0.0, 4)
    assert facts["size_bytes"] == target.stat().st_size
    crops = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for side in "ab":
        found, _ = swap(load_model(target), crops, side)
        np.testing.assert_array_equal(found, swap(load_model(model), crops, side)[0])
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err


def test_what_differs_is_not_kept(model, tmp_path, capsys, monkeypatch):
    def damaged(path):
        loaded = load_model(path)
        next(loaded.network.parameters()).add_(1)
        return loaded

    monkeypatch.setattr(tensors_export, "load_model", damaged)
    target = tmp_path / "m.safetensors"
    words = ["model", "export", str(model), "--to", "safetensors", "-o", str(target)]
    assert main(words) == 2
    assert "was not kept" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"an older export")
    assert main([*words, "--force"]) == 2
    assert target.read_bytes() == b"an older export"
    assert list(tmp_path.iterdir()) == [target]
