"""Every family through the command line: it trains, saves, resumes bit for bit, shows a preview."""

import json

import cv2
import pytest
import torch
from conftest import json_events, tiny_options
from safetensors.torch import load_file

from mien import models
from mien.cli import main

# What a family's smallest model leaves out
MORE = {
    "dfl-sae": [{"architecture": "liae", "multiscale_decoder": True}],
    "dlight": [{"details": "good"}],
    "phaze-a": [{"split_decoders": True, "split_gblock": True, "dec_norm": "batch"}],
}
CASES = [(name, {}) for name in models.available()]
CASES += [(name, options) for name, forms in MORE.items() for options in forms]


def _config(path, name, options, mode, sides, model_dir):
    """A file of settings for a small model; JSON's scalars and lists are TOML's."""
    lines = [
        "[model]",
        f'trainer = "{name}"',
        "[model.options]",
        *(f"{key} = {json.dumps(value)}" for key, value in (tiny_options(name) | options).items()),
        "[data]",
        f'input_a = "{sides[0]}"',
        f'input_b = "{sides[1]}"',
        "[loss]",
        "learn_mask = true",
        "[precision]",
        f'mode = "{mode}"',
        "[train]",
        "batch_size = 2",
        'device = "cpu"',
        "[preview]",
        "preview_images = 2",
        "[save]",
        f'model_dir = "{model_dir}"',
        "logs = false",
    ]
    path.write_text("\n".join(lines))
    return str(path)


def _saved(model_dir, iteration):
    folder = model_dir / "generations" / str(iteration)
    return {
        f"{name} {key}": tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([name, *options]) for name, options in CASES]
)
def test_a_family_trains_resumes_and_shows(sides, tmp_path, name, options, mode, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    config = _config(tmp_path / "one.toml", name, options, mode, sides, straight)
    assert main(["train", "-C", config, "-i", "2", "--json"]) == 0
    events = json_events(capsys.readouterr().out)
    losses = [event["loss_a"] for event in events if event["event"] == "step"]
    assert losses, "no step was told"
    config = _config(tmp_path / "two.toml", name, options, mode, sides, resumed)
    assert main(["train", "-C", config, "-i", "1"]) == 0
    assert main(["train", "-m", str(resumed), "-i", "1"]) == 0
    ours, theirs = _saved(straight, 2), _saved(resumed, 2)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.isfinite().all(), key
        assert torch.equal(tensor, theirs[key]), key
    picture = cv2.imread(str(straight / "preview.png"))
    output_px = models.family(name).sizes(models.options_of(name, tiny_options(name) | options))[1][
        -1
    ]
    assert picture.shape[1] >= 6 * output_px
    assert picture.std() > 10


@pytest.mark.gpu
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([name, *options]) for name, options in CASES]
)
def test_a_family_trains_as_one_graph(sides, tmp_path, name, options, freeze, capsys):
    """Warm-up, capture and replays; a fallback would be told as a warning."""
    config = _config(tmp_path / "one.toml", name, options, "bf16", sides, tmp_path / "model")
    words = ["-f"] if freeze and name != "phaze-a" else []
    more = ["--device", "cuda", "--engine", "graph", "-i", "8", "--json", *words]
    assert main(["train", "-C", config, *more]) == 0
    events = json_events(capsys.readouterr().out)
    assert not [event for event in events if event["event"] == "warning"]
    assert all(tensor.isfinite().all() for tensor in _saved(tmp_path / "model", 8).values())
