"""Presets: those of mien are what the reference has; one's own are saved, weighed and refused."""

import errno
import json
import os
import re
import tomllib

import pytest
import tomli_w
from oracle_numbers import oracle_models

from mien import models
from mien.benchmarks import preset_costs
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
    found = [preset for preset in presets.available() if preset.trainer == "phaze-a"]
    assert [preset.name for preset in found] == NAMES
    for preset in found:
        assert preset.trainer == "phaze-a"
        assert preset.description.endswith(".")
        assert not preset.is_own
        assert preset.settings.keys() == {"model"}
        assert len(_options(preset.name)) == 48
        assert _options(preset.name).keys() == _options("original").keys()


@pytest.mark.parametrize("family", [name for name in models.available() if name != "phaze-a"])
def test_every_family_has_its_three(family):
    """Quality, speed and low memory, each with the memory and the speed that its name promises."""
    costs = presets.costs()
    quality, speed, lowmem = (f"{family}-{aim}" for aim in ("quality", "speed", "lowmem"))
    for name in (quality, speed, lowmem):
        preset = presets.load(name)
        assert preset.trainer == family
        models.options_of(family, preset.settings["model"].get("options", {}))
    assert costs[lowmem]["memory_mib"] < costs[quality]["memory_mib"]
    assert costs[speed]["roofline_eg_per_s"]["h100"] > costs[quality]["roofline_eg_per_s"]["h100"]
    assert costs[quality]["parameters_m"] > costs[lowmem]["parameters_m"]


@pytest.mark.parametrize("name", ["dfaker-speed", "original-lowmem", "iae"])
def test_costs_are_those_that_are_computed(name):
    assert preset_costs.cost_of(presets.load(name).settings) == presets.costs()[name], "make docs"


def test_every_packaged_preset_has_its_cost():
    assert presets.costs().keys() == {preset.name for preset in presets.available()}


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
    assert lines[:2] == ["own  a-mine              original", "     Small."]
    assert re.fullmatch(
        r"mien clipfaker128        phaze-a +64->128 b16 +[\d.]+ GiB +[\d,]+ +[\d,]+", lines[2]
    )
    assert lines[3].startswith("     A FaRL vision transformer")
    assert max(map(len, lines)) <= 100
    assert main(["preset", "list", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts if fact["trainer"] == "phaze-a"] == NAMES
    assert facts[0]["name"] == "a-mine"
    assert facts[0]["cost"] is None
    assert facts[1]["cost"]["memory_mib"] > 0
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


PRESET = {"__filetype": "faceswap_preset", "__section": "train|model|phaze_a", "output_size": 256}


def test_a_preset_of_faceswap_is_read(own, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(PRESET | {"freeze_layers": "encoder", "fc_dropout": 0.25, "odd": 1}))
    assert main(["preset", "save", "theirs", "--from", str(file)]) == 0
    assert "odd: left out; phaze-a has no such option" in capsys.readouterr().err
    assert presets.load("theirs").settings["model"] == {
        "trainer": "phaze-a",
        "options": {"output_size": 256, "freeze_layers": ["encoder"], "fc_dropout": 0.25},
    }
    assert _given(capsys, "-C", str(file))["model"]["options"]["output_size"] == 256


def test_a_preset_of_faceswap_that_is_for_every_model(own, tmp_path, capsys):
    file = tmp_path / "loss.json"
    file.write_text(json.dumps({"__section": "train|global|loss", "loss_function": "ms_ssim"}))
    printed = _given(capsys, "-t", "dlight", "-C", str(file))
    assert (printed["loss"]["loss_function"], printed["model"]["trainer"]) == ("ms_ssim", "dlight")


def test_a_preset_of_faceswap_is_known_by_its_name(own, tmp_path, capsys):
    file = tmp_path / "model_dfl_sae_wide_preset.json"
    file.write_text(json.dumps({"input_size": 192, "architecture": "liae"}))
    model = _given(capsys, "-C", str(file))["model"]
    assert (model["trainer"], model["options"]["input_size"]) == ("dfl-sae", 192)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must be a preset of faceswap"),
        ('{"a": {"b": 1}}', "must be a preset of faceswap"),
        (" " * (1 << 20) + "{}", "must be a preset of faceswap"),
        ("{}", "does not say what it is a preset for"),
        ('{"__section": "train|model|nobody", "a": 1}', "is for model.nobody, which mien does not"),
        ('{"__section": "convert|color", "a": 1}', "does not say what it is a preset for"),
        (
            '{"__section": "train|model|phaze_a", "output_size": 3}',
            "output_size of phaze-a must be",
        ),
    ],
)
def test_what_is_no_preset_of_faceswap_is_refused(own, tmp_path, capsys, text, complaint):
    file = tmp_path / "mine.json"
    file.write_text(text)
    assert main(["preset", "save", "theirs", "--from", str(file)]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not own.exists()


def test_a_preset_of_a_model_folder_needs_no_flag(own, tmp_path, capsys):
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"model": {"trainer": "iae"}}))
    assert main(["preset", "save", "again", str(tmp_path / "config.toml")]) == 0
    assert presets.load("again").trainer == "iae"
    assert main(["preset", "save", "x", str(tmp_path), "--from", str(tmp_path)]) == 2
    assert "are two sources; give one" in capsys.readouterr().err


def test_a_damaged_own_preset_is_named(own, capsys):
    own.mkdir(parents=True)
    (own / "bad.toml").write_text("[train]\nbatch_sise = 3\n")
    assert main(["train", "--preset", "bad", "--print-config"]) == 2
    said = capsys.readouterr().err
    meant = "unknown setting train.batch_sise; did you mean train.batch_size?"
    assert said == f"mien train: {own / 'bad.toml'}: {meant}\n"


def test_the_folder_of_ones_own(monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(presets.own_folder()) == "/home/somebody/.config/mien/presets"
