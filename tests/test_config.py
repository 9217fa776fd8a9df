"""Settings: ranges, unknown names, order of weight, round trip."""

import argparse
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from mien import models
from mien.cli import COMMANDS, main, settings_page
from mien.core import config as settings

PAGE = Path(__file__).parents[1] / "docs/settings.md"


def test_defaults_stand_and_survive_toml(tmp_path):
    config = settings.Config()
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(settings.to_dict(config)))
    assert settings.from_dict(settings.read_toml(path)) == config


@pytest.mark.parametrize("spec", settings.all_settings(), ids=lambda s: f"{s.section}.{s.name}")
def test_every_setting_is_documented_and_enforced(spec):
    assert spec.doc.endswith(".") or spec.doc[-1].isalnum()
    bad = [object()]
    if spec.choices:
        bad.append("no such choice")
    if spec.low is not None:
        bad.append(spec.type(spec.low) - 1)
    if spec.high is not None:
        bad.append(spec.type(spec.high) + 1)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{spec.section}\.{spec.name} must be "):
            settings.from_dict({spec.section: {spec.name: value}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown setting trian; did you mean train?"),
        (
            {"train": {"batchsize": 1}},
            "unknown setting train.batchsize; did you mean train.batch_s",
        ),
        ({"train": 3}, "train must be a table of settings, got 3"),
        (
            {"train": {"batch_size": True}},
            "batch_size must be auto or a whole number from 0 to 4096",
        ),
        ({"data": {"coverage": float("nan")}}, "data.coverage must be a number from 62.5 to 100"),
        ({"data": {"mask_type": "extend"}}, "got 'extend'; did you mean extended?"),
        ({"data": {"mask_type": "none"}}, "choose a mask, or set both to false"),
        (
            {"optimizer": {"gradient_clipping": "norm", "clipping_value": 0}},
            "optimizer.clipping_value must be above 0 with optimizer.gradient_clipping norm, got "
            "0.0, with which nothing would move; set a bound, or clipping to none",
        ),
        ({"preview": {"mask_color": "red"}}, "preview.mask_color must be #rrggbb, got 'red'"),
        (
            {"train": {"learning_rate": 1e-4}},
            "unknown setting train.learning_rate; did you mean optimizer.learning_rate?",
        ),
        ({"batch_size": 4}, "unknown setting batch_size; did you mean train.batch_size?"),
        ({"train": {5: 1}}, "unknown setting train.5"),
        ({5: {}}, "unknown setting 5"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings.from_dict(values)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("optimizer", {"schedule": "cosine"}, "optimizer.schedule cosine lowers the rate, which"),
        ("optimizer", {"ada_amsgrad": True}, "optimizer.ada_amsgrad is of adam and adamw alone"),
        ("optimizer", {"ada_beta_1": 0.05}, "optimizer.ada_beta_1 is 0.05: the average could not"),
        ("train", {"ema": 0.9}, "train.ema 0.9 asks for an average beside its own; set train.ema"),
    ],
)
def test_refusals_beside_schedule_free(section, values, message):
    chosen = {"optimizer": {"optimizer": "schedule-free", "warmup_steps": 10}}
    settings.from_dict(chosen)
    with pytest.raises(ValueError, match=f"^optimizer.optimizer is schedule-free, but {message}"):
        settings.from_dict(settings.merge(chosen, {section: values}))


def _printed(capsys, *words):
    assert main(["train", *words, "--print-config"]) == 0
    return tomllib.loads(capsys.readouterr().out)


def test_order_of_weight(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nbatch_size = 4\nseed = 4\n[data]\ncoverage = 70\n")
    values = _printed(
        capsys, "-C", str(file), "--set", "train.seed=5", "--set", "data.coverage=80", "--seed", "6"
    )
    assert values["train"]["batch_size"] == 4  # the file beats the default
    assert values["data"]["coverage"] == 80  # --set beats the file
    assert values["train"]["seed"] == 6  # a flag beats --set


def test_flags_turn_augmentation_off(capsys):
    values = _printed(capsys, "-P", "--no-augment-color", "-W")
    assert values["augment"] | {"flip": False, "color": False, "warp": False} == values["augment"]


def test_a_flag_warps_to_landmarks(capsys):
    assert _printed(capsys)["augment"]["warp_to_landmarks"] is False
    for flag in ("-M", "--warp-to-landmarks"):
        assert _printed(capsys, flag)["augment"]["warp_to_landmarks"] is True


def test_options_of_a_family_by_set(capsys):
    values = _printed(capsys, "--set", "model.options.lowmem=true")
    assert values["model"]["options"] == {"lowmem": True, "width": 128}, "with all defaults"


def test_options_of_a_trainer_are_told(capsys):
    assert main(["train", "-t", "dfl-sae", "--options", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["architecture"]["rule"] == "df, liae"
    assert found["input_size"] == {
        "name": "input_size",
        "default": 128,
        "rule": "64 to 256 in steps of 16",
        "free": False,
        "doc": "Edge of the face in px, in and out.",
    }
    assert main(["train", "-t", "phaze-a", "--options"]) == 0
    said = capsys.readouterr().out
    assert "fc_dropout = 0.0  (free: 0 to 0.99)" in said
    assert 'freeze_layers = ["keras_encoder"]  (free: any of ' in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--set", "batch_size=3"],
            "--set takes section.key=value, got 'batch_size=3'; did you mean train.batch_size?",
        ),
        (["--set", "nosuch=3"], "--set takes section.key=value, got 'nosuch=3'"),
        (["-C", "/no/such.toml"], "cannot read /no/such.toml: No such file or directory"),
        (
            ["-b", "5000"],
            "train.batch_size must be auto or a whole number from 0 to 4096, got 5000",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, message, capsys):
    assert main(["train", *words, "--print-config"]) == 2
    assert capsys.readouterr().err == f"mien train: {message}\n"


def test_broken_toml_is_one_line(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train\n")
    assert main(["train", "-C", str(file), "--print-config"]) == 2
    assert re.fullmatch(r"mien train: .*run.toml is not valid TOML: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("value", ["auto", 0])
def test_a_word_stands_for_a_number(value):
    assert settings.from_dict({"train": {"batch_size": value}}).train.batch_size == 0


def test_the_help_of_train_names_every_trainer(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in models.available():
        assert f" {name}," in said or f" {name}." in said


def test_the_page_of_settings_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == settings_page.render(), "run `make docs`"
    for spec in settings.all_settings():
        assert f"\n| {spec.name} |" in page
    assert "| batch_size | 16 | auto or 0 to 4096 | free | `-b` `--batch-size` | Faces of" in page
    assert '| centering | "face" | face, head, legacy | locked |  | What the crop' in page


SETTINGS = "[data]\ncoverage = 80\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + SETTINGS.encode(),
        b"\xef\xbb\xbf" + SETTINGS.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf\n# a comment\n" + SETTINGS.encode(),
    ],
)
def test_a_byte_order_mark_is_passed_over(content, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert settings.read_toml(path) == {"data": {"coverage": 80}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (SETTINGS.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        (SETTINGS.encode("utf-16-le"), "it is UTF-16 text; save it as UTF-8"),
        (SETTINGS.encode("utf-16-be"), "it is UTF-16 text; save it as UTF-8"),
        (SETTINGS.encode("utf-32"), "it is UTF-16 text; save it as UTF-8"),
        (b"# gr\xfc\xdfe\n", "it is not UTF-8 text (invalid start byte); save it as UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_the_remedy(content, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        settings.parse_toml(content)


@pytest.mark.parametrize(
    "path",
    [
        *(r"C:\Users\me\faces", r"C:\faces\a", r"D:\temp", r"e:\new", r"C:\x", r"a\b\c"),
        *(r"\\nas\share", r"\\nas\faces"),
    ],
)
def test_a_windows_path_in_double_quotes_is_refused_with_the_remedy(path, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(f'[train]\nseed = 1\n[data]\ninput_a = "{path}"\n')
    assert main(["train", "-C", str(file), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("; put Windows paths in single quotes, or use / in them\n")
    assert main(["train", "--set", f'data.input_a="{path}"', "--print-config"]) == 2
    assert "put Windows paths in single quotes" in capsys.readouterr().err
    for right in (f"'{path}'", json.dumps(path)):
        assert settings.parse_toml(f"input_a = {right}".encode()) == {"input_a": path}


def test_only_what_holds_a_backslash_is_taken_for_a_windows_path():
    for content in ('a = "x', "a = [1", 'a = "x"\nb = "y" z'):
        with pytest.raises(ValueError, match="line|end of") as caught:
            settings.parse_toml(content.encode())
        assert "Windows" not in str(caught.value)
    text = 'description = """see:\tb\nc\\td"""'
    assert settings.parse_toml(text.encode())["description"] == "see:\tb\nc\td"


# Flags


SWITCHES = [spec for spec in settings.all_settings() if spec.type is bool and spec.flags]


@pytest.mark.parametrize("spec", SWITCHES, ids=lambda spec: spec.full_name)
def test_every_switch_has_its_opposite(spec, capsys):
    assert spec.opposite.removeprefix("--").removeprefix("no-") == (
        spec.flags[-1].removeprefix("--").removeprefix("no-")
    )
    for flag, value in (*((flag, not spec.default) for flag in spec.flags), (spec.opposite, None)):
        expected = spec.default if value is None else value
        values = _printed(capsys, flag)
        assert values[spec.section][spec.name] is expected, flag
    last = _printed(capsys, spec.opposite, spec.flags[-1], spec.opposite)
    assert last[spec.section][spec.name] is spec.default


def test_warp_is_not_taken_for_warping_to_landmarks(capsys):
    values = _printed(capsys, "--set", "augment.warp=false", "--warp")["augment"]
    assert (values["warp"], values["warp_to_landmarks"]) == (True, False)


def test_no_command_takes_abbreviations(monkeypatch, capsys):
    parsers = []
    made = argparse.ArgumentParser.__init__

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        parsers.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remember)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
    assert len({parser.prog for parser in parsers}) > 2 * len(COMMANDS), "those of verbs too"
    assert [parser.prog for parser in parsers if parser.allow_abbrev] == []
    for words in (["train", "--print-conf"], ["model", "info", "x", "--js"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2


def test_the_page_of_settings_names_the_opposites_and_what_stays():
    page = settings_page.render()
    assert "| warp | true | true or false | free | `-W` `--no-warp` `--warp` | Bend" in page
    assert "| free | `-A` `--input-a` stays | Folder" in page
