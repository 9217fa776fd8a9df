"""Presets: those of mien are what the reference has; one's own are saved, weighed and refused."""

import errno
import json
import os
import tomllib

import pytest
import tomli_w
from oracle_numbers import oracle_models

from mien import models
from mien.cli import main
from mien.core.config import from_dict, presets, read_toml, to_dict

NAMES = """clipfaker128 clipfaker256 clipfaker448 dfaker dfl-h128 dfl-sae-df dfl-sae-liae
dfl-saehd-df dfl-saehd-liae dny1024 dny256 dny512 iae lightweight original stojo sym384""".split()
WITH_PRETRAINED = {"clipfaker128", "clipfaker256", "clipfaker448", "stojo", "sym384"}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The folder of a user's own presets, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings/mien/presets"


def _options(name):
    return presets.load(name).settings["model"]["options"]


def test_there_are_the_seventeen():
    found = presets.available()
    assert [preset.name for preset in found] == NAMES
    for preset in found:
        assert preset.trainer == "phaze-a"
        assert preset.description.endswith(".")
        assert not preset.is_own
        assert preset.settings.keys() == {"model"}
        assert len(_options(preset.name)) == 48
        assert _options(preset.name).keys() == _options("original").keys()


PREFIX = "phaze_a/preset-"
each_preset_of_the_oracle = pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(case["id"].removeprefix(PREFIX), case, id=case["id"])
        for case in oracle_models("oracle.json", "configs")
        if case["id"].startswith(PREFIX)
    ],
)


@pytest.mark.oracle
@each_preset_of_the_oracle
def test_options_equal_the_oracle(name, case):
    """But for the pretrained encoders, which the oracle was built without."""
    assert _options(name) == case["options"] | {"enc_load_weights": name in WITH_PRETRAINED}


@pytest.mark.oracle
@each_preset_of_the_oracle
def test_every_preset_builds_with_the_parameters_of_the_oracle(name, case):
    model = models.meta_model("phaze-a", **_options(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == case["params_trainable"]  # running estimates are no parameters


def _given(capsys, *words):
    """The settings of `mien train` with these words."""
    assert main(["train", *words, "--print-config"]) == 0
    return tomllib.loads(capsys.readouterr().out)


def test_a_preset_weighs_more_than_defaults_and_less_than_all_else(own, tmp_path, capsys):
    words = ["--set", "train.batch_size=5", "--set", "data.coverage=75"]
    assert main(["preset", "save", "mine", *words, "--set", "augment.zoom_amount=1"]) == 0
    capsys.readouterr()
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({"train": {"batch_size": 6}, "data": {"coverage": 80.0}}))
    words = ["--preset", "mine", "-C", str(path), "--set", "data.coverage=85", "-b", "7"]
    given = _given(capsys, *words)
    assert given["augment"]["zoom_amount"] == 1
    assert given["data"]["coverage"] == 85
    assert given["train"]["batch_size"] == 7
    assert _given(capsys, "--preset", "mine", "-C", str(path))["train"]["batch_size"] == 6
    assert _given(capsys, "--preset", "mine")["train"]["batch_size"] == 5


def test_what_is_saved_of_a_model_is_what_makes_it(own, tmp_path, capsys):
    model = {"trainer": "original", "options": {"lowmem": True, "width": 64}}
    given = {
        "model": model | {"load_weights": "/some/model"},
        "data": {"input_a": "/a", "input_b": "/b", "coverage": 75.0, "store_dir": "/s"},
        "save": {"model_dir": "/m", "keep_generations": 3},
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(from_dict(given))))
    words = ["--from", str(folder), "--description", "Small and wide."]
    assert main(["preset", "save", "mine", *words]) == 0
    assert f"saved {own / 'mine.toml'}; use it with" in capsys.readouterr().out
    assert read_toml(own / "mine.toml") == {
        "description": "Small and wide.",
        "model": model,
        "data": {"coverage": 75.0},
        "save": {"keep_generations": 3},
    }
    assert os.listdir(own) == ["mine.toml"]
    more = ["--from", str(own / "mine.toml"), "--set", "model.options.width=32"]
    assert main(["preset", "save", "other", *more]) == 0
    assert _options("other") == {"lowmem": True, "width": 32}


def test_list_and_show(own, capsys):
    words = ["-t", "original", "--set", "model.options.lowmem=true", "--description", "Small."]
    assert main(["preset", "save", "a-mine", *words]) == 0
    capsys.readouterr()
    assert main(["preset", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "own   a-mine          original  Small."
    assert lines[1].startswith("mien  clipfaker128    phaze-a   A FaRL vision transformer")
    assert len(lines) == 18
    assert main(["preset", "list", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts] == ["a-mine", *NAMES]
    assert main(["preset", "show", "stojo"]) == 0
    assert 'enc_architecture = "efficientnet_b4"' in capsys.readouterr().out
    assert main(["preset", "show", "a-mine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"] == {"model": {"trainer": "original", "options": {"lowmem": True}}}
    assert shown["is_own"] is True


def test_a_preset_of_another_trainer_is_refused(own, capsys):
    assert main(["train", "--preset", "stojo", "-t", "original", "--print-config"]) == 2
    assert "preset stojo is for phaze-a, not for original" in capsys.readouterr().err


def test_a_file_of_settings_may_be_a_preset(own, capsys):
    assert main(["preset", "save", "mine", "--set", "train.batch_size=5"]) == 0
    capsys.readouterr()
    assert _given(capsys, "-C", str(own / "mine.toml"))["train"]["batch_size"] == 5


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["save", "mine", "--set", "train.batch_size=6"], "preset mine exists ("),
        (["save", "stojo", "-t", "original"], "stojo is one of mien's own presets; choose"),
        (["save", "../x", "-t", "original"], "name must be up to 64 letters, digits"),
        (["save", ".x", "-t", "original"], "name must be up to 64 letters, digits"),
        (["save", "new"], "there is nothing to save; give --from, --trainer or --set"),
        (["save", "new", "-t", "orignal"], "no trainer 'orignal' (did you mean original?)"),
        (
            ["save", "new", "-t", "original", "--set", "model.options.widht=8"],
            "original has no option 'widht' (did you mean width?)",
        ),
        (["save", "new", "--set", "train.batch_sise=8"], "unknown setting train.batch_sise"),
        (["save", "new", "--from", "nowhere.toml"], "cannot read nowhere.toml: No such file"),
        (["show", "stoje"], "no preset 'stoje' (did you mean stojo?); there are: clipfaker128,"),
    ],
)
def test_mistakes_are_one_line(own, capsys, words, text):
    assert main(["preset", "save", "mine", "--set", "train.batch_size=5"]) == 0
    assert main(["preset", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mien preset: {text}") or text in said
    assert said.count("\n") == 1
    assert os.listdir(own) == ["mine.toml"]
    assert read_toml(own / "mine.toml")["train"] == {"batch_size": 5}


def test_force_replaces(own, capsys):
    assert main(["preset", "save", "mine", "--set", "train.batch_size=5"]) == 0
    assert main(["preset", "save", "mine", "--set", "train.batch_size=6", "--force"]) == 0
    assert read_toml(own / "mine.toml")["train"] == {"batch_size": 6}


def test_a_failure_leaves_the_preset_as_it_was(own, capsys, monkeypatch):
    assert main(["preset", "save", "mine", "--set", "train.batch_size=5"]) == 0

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for name in ("mine", "other"):
        words = ["preset", "save", name, "--set", "train.batch_size=6", "--force"]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.endswith(f"cannot write preset {own / name}.toml: No space left on device\n")
    assert os.listdir(own) == ["mine.toml"]
    assert read_toml(own / "mine.toml")["train"] == {"batch_size": 5}


def test_a_pipe_in_the_place_of_settings_is_waited_for_by_nobody(own, tmp_path, capsys):
    own.mkdir(parents=True)
    os.mkfifo(own / "mine.toml")
    os.mkfifo(tmp_path / "pipe.ini")
    recipe = ["train", "--recipe", str(own / "mine.toml")]
    for words, name in (
        (["train", "--preset", "mine", "--print-config"], "mine.toml"),
        (["train", "-C", str(own / "mine.toml"), "--print-config"], "mine.toml"),
        (["train", "-C", str(tmp_path / "pipe.ini"), "--print-config"], "pipe.ini"),
        (recipe, "mine.toml"),
    ):
        assert main(words) == 2
        assert f"{name} is a pipe, not a plain file" in capsys.readouterr().err
    assert main(["preset", "list"]) == 0
    assert "mine.toml is a pipe" in capsys.readouterr().out


def test_a_damaged_own_preset_is_named(own, capsys):
    own.mkdir(parents=True)
    (own / "bad.toml").write_text("[train]\nbatch_sise = 3\n")
    assert main(["train", "--preset", "bad", "--print-config"]) == 2
    said = capsys.readouterr().err
    assert "unknown setting train.batch_sise; did you mean train.batch_size?, in" in said
    assert str(own / "bad.toml") in said


def test_the_folder_of_ones_own(monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(presets.own_folder()) == "/home/somebody/.config/mien/presets"
