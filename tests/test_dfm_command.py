"""`mien model export --to dfm|onnx`: files, facts, refusals; nothing is half written."""

import hashlib
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from mien import __version__, models
from mien.cli import main
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.state import TrainingState
from mien.core.config import from_dict, to_dict
from mien.core.exchange import onnx_check
from mien.core.faces.synthetic import draw_folder
from mien.core.swapping import load_model, swap

RUN_ID = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    for side in "ab":
        draw_folder(folder / side, identity=side, count=3, size_px=96)
    return folder


def trained(path, faces, *, learn_mask=False, broken=False, **data):
    """A model folder with one save of a tiny model."""
    network = models.build("lightweight", seed=3, width=8, learn_mask=learn_mask)
    if broken:
        next(network.parameters()).data[0, 0, 0, 0] = float("nan")
    config = from_dict(
        {
            "model": {"trainer": "lightweight", "options": {"width": 8}},
            "data": {**{f"input_{side}": str(faces / side) for side in "ab"}, **data},
            "loss": {"learn_mask": learn_mask},
        }
    )
    state = TrainingState(trainer="lightweight", run_id=RUN_ID)
    state.begin_session(config, started=0.0)
    state.advance(9)
    with ModelFolder(path) as folder:
        folder.write_config(config)
        folder.save(dict(network.state_dict()), None, state.to_dict())
    return config


@pytest.fixture
def model(tmp_path, faces):
    path = tmp_path / "m"
    trained(path, faces)
    return path


def export(*arguments):
    return main(["model", "export", *map(str, arguments)])


def told(capsys, *arguments):
    """Facts that the command prints as JSON."""
    assert export(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, folder, *arguments):
    """Line of a refusal, which leaves the folder as it was."""
    before = sorted(folder.iterdir())
    assert export(*arguments) == 2
    printed = capsys.readouterr()
    assert "wrote" not in printed.out
    assert sorted(folder.iterdir()) == before
    (line,) = printed.err.splitlines()
    return line


def test_plain_file_swaps_as_the_model(model, tmp_path, capsys):
    target = tmp_path / "m.onnx"
    facts = told(capsys, model, "--to", "onnx", "-o", target)
    assert facts["path"] == str(target)
    assert facts["size_bytes"] == target.stat().st_size
    assert (facts["num_pictures"], facts["num_faces"]) == (6, 4)
    assert facts["difference"] <= 1e-4
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    faces = np.random.default_rng(2).random((2, 64, 64, 3), np.float32)
    for side, found in zip("ab", session.run(None, {"face": faces}), strict=True):
        swapped, _ = swap(load_model(model), faces, side)
        assert abs(found - swapped).max() <= 1e-5


def test_file_says_where_it_comes_from(tmp_path, faces):
    model, target = tmp_path / "m", tmp_path / "m.dfm"
    config = trained(model, faces)
    assert export(model, "--to", "dfm", "-o", target) == 0
    found = {each.key: each.value for each in onnx.load_model(target).metadata_props}
    settings = json.dumps(to_dict(config), sort_keys=True).encode()
    assert found == {
        "kind": "synthetic face model",
        "mien_version": __version__,
        "run_id": RUN_ID,
        "trainer": "lightweight",
        "iterations": "9",
        "weights": "raw",
        "config_sha256": hashlib.sha256(settings).hexdigest(),
        "target": "facefusion",
        "mask": "mean",
    }


@pytest.mark.parametrize(
    ("arguments", "target", "mask"),
    [
        ((), "facefusion", "learned"),
        (("--target", "visomaster", "--mask", "mean"), "visomaster", "mean"),
        (("--target", "deepfacelive", "--mask", "ones"), "deepfacelive", "ones"),
    ],
)
def test_dfm_is_for_a_program_with_masks(tmp_path, faces, capsys, arguments, target, mask):
    model = tmp_path / "m"
    trained(model, faces, learn_mask=True, centering="legacy", coverage=80.0)
    path = tmp_path / "m.dfm"
    assert export(model, "--to", "dfm", "-o", path, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()[3:]  # behind its stages
    assert lines[1] == f"for {target}, masks: {mask}"
    assert "on 2 random pictures and 4 of its own faces" in lines[2]
    assert "the model's own square is 64 px from (" in lines[3]
    facts = told(capsys, model, "--to", "dfm", "-o", path, "--force", *arguments)
    assert (facts["target"], facts["mask"]) == (target, mask)
    left, top, edge_px = facts["square"]
    assert edge_px == 64
    assert 0 < left < top < facts["input_px"] - 64


def test_model_of_the_square_of_the_program_is_not_cut(tmp_path, faces, capsys):
    model = tmp_path / "m"
    trained(model, faces, centering="face", coverage=100.0, vertical_offset=-8)
    facts = told(capsys, model, "--to", "dfm", "-o", tmp_path / "m.dfm")
    assert (facts["square"], facts["input_px"], facts["warnings"]) == (None, 64, [])


def test_head_centred_model_is_warned_of(tmp_path, faces, capsys):
    model = tmp_path / "m"
    trained(model, faces, centering="head")
    assert export(model, "--to", "dfm", "-o", tmp_path / "m.dfm") == 0
    assert "follows the turning head" in capsys.readouterr().out.splitlines()[-1]


def test_model_whose_faces_are_gone_is_compared_on_made_pictures(tmp_path, capsys):
    trained(tmp_path / "m", tmp_path / "gone")
    facts = told(capsys, tmp_path / "m", "--to", "onnx", "-o", tmp_path / "m.onnx")
    assert (facts["num_pictures"], facts["num_faces"]) == (2, 0)


@pytest.mark.parametrize("to", ["dfm", "onnx"])
def test_targets_that_cannot_be_are_refused(model, tmp_path, capsys, to):
    target = tmp_path / f"m.{to}"
    line = refused(capsys, tmp_path, model, "--to", to, "-o", tmp_path / "m.bin")
    assert f"the file to write must end in .{to}, got " in line
    line = refused(capsys, tmp_path, model, "--to", to, "-o", tmp_path / "none" / target.name)
    assert "is no folder; make it first" in line
    target.write_bytes(b"mine")
    line = refused(capsys, tmp_path, model, "--to", to, "-o", target)
    assert line.endswith("exists; add --force to replace it")
    assert target.read_bytes() == b"mine"


def test_saves_that_cannot_be_are_refused(tmp_path, faces, capsys):
    model, target = tmp_path / "m", tmp_path / "m.dfm"
    trained(model, faces, broken=True)
    line = refused(capsys, tmp_path, model, "--to", "dfm", "-o", target)
    assert "holds numbers that are not finite" in line
    line = refused(capsys, tmp_path, model, "--to", "dfm", "-o", target, "--generation", "7")
    assert "has no generation '7'" in line
    line = refused(capsys, tmp_path, tmp_path / "none", "--to", "dfm", "-o", target)
    assert "does not exist" in line


def test_mask_that_was_not_learned_is_refused(model, tmp_path, capsys):
    arguments = ("--to", "dfm", "-o", tmp_path / "m.dfm", "--mask", "learned")
    assert "mask must be mean or ones" in refused(capsys, tmp_path, model, *arguments)


def test_missing_onnx_is_named_before_the_model_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    arguments = (tmp_path / "none", "--to", "dfm", "-o", tmp_path / "m.dfm")
    assert "pip install 'mien[exchange]'" in refused(capsys, tmp_path, *arguments)


def test_file_that_differs_is_not_written(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_check, "MAX_DIFFERENCE", -1.0)
    line = refused(capsys, tmp_path, model, "--to", "onnx", "-o", tmp_path / "m.onnx")
    assert "nothing was written" in line
