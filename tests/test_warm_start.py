"""A new model that begins with sub-networks of another, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mien import models
from mien.cli import main
from mien.core.checkpoint.warm_start import load_weights


@pytest.fixture(scope="session")
def inputs(sides):
    return ["-A", str(sides[0]), "-B", str(sides[1])]


def _train(inputs, model_dir, *more, trainer="original"):
    words = ["-t", trainer, "--set", "model.options.width=8", "-b", "2", "-i", "1"]
    words += ["--device", "cpu", "--set", "preview.preview_images=2"]
    return main(["train", *inputs, "-m", str(model_dir), *words, *more])


@pytest.fixture(scope="module")
def source(inputs, tmp_path_factory):
    """A trained model's folder."""
    path = tmp_path_factory.mktemp("source") / "model"
    assert _train(inputs, path, "--seed", "5") == 0
    return path


def _generation(model_dir):
    state = json.loads((model_dir / "state.json").read_text())
    return model_dir / "generations" / str(state["iterations"])


def _model(**options):
    return models.build("original", seed=1, **{"width": 8} | options)


@pytest.mark.parametrize("kind", ["folder", "generation", "file"])
def test_sub_networks_are_taken_and_the_others_stay(source, kind):
    newest = _generation(source)
    path = {"folder": source, "generation": newest, "file": newest / "model.safetensors"}[kind]
    model, fresh = _model(), _model().state_dict()
    said = load_weights(model, path)
    theirs = load_file(newest / "model.safetensors")
    for name, tensor in model.state_dict().items():
        is_taken = name.startswith("encoder.")
        assert torch.equal(tensor, theirs[name]) == is_taken, name
        assert torch.equal(tensor, fresh[name]) != is_taken, name
    assert said.endswith(f"M parameters of encoder from {path}")


def test_every_named_sub_network_is_taken(source):
    model = _model()
    model.load_layers = ("encoder", "decoder_b")
    load_weights(model, source)
    theirs = load_file(_generation(source) / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]) != name.startswith("decoder_a."), name


def _refused(model, path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=str(path)) as caught:
        load_weights(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "something was taken all the same"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_shape_that_differs_is_named_and_nothing_is_taken(source):
    said = _refused(_model(width=16), source)
    assert "encoder of" in said
    assert "encoder.0.0.conv.conv.bias is (8,) there and (16,) here; give the new model" in said
    said = _refused(_model(lowmem=True), source)
    assert "encoder.0.3.conv.conv.bias is (64,) there and missing here" in said


def test_a_first_sub_network_that_does_not_fit_is_seen_behind_one_that_does(source, tmp_path):
    tensors = load_file(_generation(source) / "model.safetensors")
    name = "encoder.1.linear.weight"
    tensors[name] = tensors[name].T.contiguous()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    model = _model()
    model.load_layers = ("encoder", "decoder_b")
    assert f"encoder of {path} does not fit: {name} is (1024, 64) there" in _refused(model, path)


def test_a_sub_network_that_is_not_there_is_named(source, tmp_path):
    tensors = load_file(_generation(source) / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if k.startswith("decoder_a")}, path)
    assert _refused(_model(), path) == (
        f"{path} holds no weights of encoder; load from another model"
    )
    model = _model()
    model.load_layers = ("inter",)
    with pytest.raises(ValueError, match="original has no sub-network 'inter'; it has: encoder"):
        load_weights(model, source)


@pytest.mark.parametrize("kind", ["folder", "generation", "file"])
def test_a_model_of_another_family_is_refused(source, kind):
    newest = _generation(source)
    path = {"folder": source, "generation": newest, "file": newest / "model.safetensors"}[kind]
    model = models.build("lightweight", width=8)
    assert "holds a model of original, not of lightweight" in _refused(model, path)


def test_what_holds_no_weights_is_refused(source, tmp_path):
    assert "it must be a model folder" in _refused(_model(), tmp_path / "none")
    assert "it must be a model folder" in _refused(_model(), tmp_path)
    (tmp_path / "new/generations").mkdir(parents=True)
    assert "nothing has been saved" in _refused(_model(), tmp_path / "new")
    (tmp_path / "text").write_text("text")
    assert "it is not a valid safetensors file" in _refused(_model(), tmp_path / "text")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in _generation(source).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert "does not match its SHA-256" in _refused(_model(), damaged)


def test_training_begins_with_the_weights_and_a_resume_leaves_them_alone(
    inputs, source, tmp_path, capsys
):
    new = tmp_path / "new"
    assert _train(inputs, new, "-l", str(source), "-f") == 0
    said = capsys.readouterr().out
    assert f"M parameters of encoder from {source}" in said
    theirs = load_file(_generation(source) / "model.safetensors")
    ours = load_file(_generation(new) / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n.startswith("encoder."))
    assert not any(
        torch.equal(ours[n], theirs[n])
        for n in ours
        if n.endswith("conv.weight") and n.startswith("decoder")
    )
    state = load_file(_generation(new) / "optimizer.safetensors")
    assert float(state["step"]) == 1
    assert _train(inputs, new, "-l", str(tmp_path / "gone")) == 0
    said = capsys.readouterr().out
    assert "model.load_weights does nothing here: it is for a new model" in said
    assert "loaded" not in said
    assert _train(inputs, tmp_path / "other", "-l", str(source), trainer="lightweight") == 2
    assert "holds a model of original" in capsys.readouterr().err
