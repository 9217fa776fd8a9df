"""Folders from a stranger are only data: which paths of theirs count, what a user gave before."""

import json
import os
import stat
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import json_events, train_words

from mien.cli import main
from mien.core.checkpoint import known_paths
from mien.core.checkpoint.known_paths import KnownPaths
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.config import all_settings, from_dict, merge, to_dict
from mien.core.preview.timelapse_video import find_pictures

RUN = "a" * 32


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user's home with a file that a shell reads."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("# mine\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return home


# What is remembered


def test_a_path_counts_inside_the_folder_or_where_it_was_given(tmp_path):
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    known = KnownPaths(model, RUN)
    assert known.trust("log.file", str(model / "run.log"))
    assert known.trust("data.store_dir", str(model))
    assert not known.trust("log.file", f"{model}-2/run.log")
    assert not known.trust("log.file", str(model / "../run.log"))
    assert not known.trust("log.file", "\0")
    assert not known.trust("data.input_a", str(elsewhere))
    assert known.remember([("data.input_a", str(elsewhere))]) is None
    again = KnownPaths(model, RUN)
    assert again.trust("data.input_a", str(elsewhere))
    assert not again.trust("data.input_b", str(elsewhere)), "it was another setting"
    assert not KnownPaths(model, "b" * 32).trust("data.input_a", str(elsewhere))
    assert not KnownPaths(tmp_path / "other", RUN).trust("data.input_a", str(elsewhere))


def test_a_link_out_of_the_folder_does_not_lie_inside(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "out").symlink_to(tmp_path)
    (model / "dangling").symlink_to(tmp_path / "none")
    known = KnownPaths(model, RUN)
    for name in ("out/x.log", "dangling", "out"):
        assert not known.trust("log.file", str(model / name))
    (tmp_path / "link").symlink_to(model)
    assert KnownPaths(tmp_path / "link", RUN).trust("log.file", str(model / "x.log"))


def test_only_the_user_can_read_it_and_it_is_bounded(tmp_path, home, monkeypatch):
    monkeypatch.setattr(known_paths, "MAX_MODELS", 3)
    paths = [f"/faces/{number}\udce4" for number in range(known_paths.MAX_PATHS + 5)]
    for number in range(5):
        known = KnownPaths(tmp_path / str(number), RUN)
        for path in paths:
            assert known.remember([("data.input_a", path)]) is None
    folder = home / ".local/state/mien/models"
    files = list(folder.iterdir())
    assert len(files) == 3
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    known = KnownPaths(tmp_path / "4", RUN)
    kept = [path for path in paths if known.trust("data.input_a", path)]
    assert kept == paths[-known_paths.MAX_PATHS :]
    assert not KnownPaths(tmp_path / "0", RUN).trust("data.input_a", paths[-1])


def test_what_is_no_file_and_no_folder_does_not_count(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    known = KnownPaths(tmp_path, RUN)
    counts = {name: known.trust("log.file", str(tmp_path / name)) for name in ("pipe", "file", "x")}
    assert counts == {"pipe": False, "file": True, "x": True}


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"[]", b'{"paths": 3}', b'{"paths": {"x": "/a"}}']
)
def test_what_cannot_be_read_remembers_nothing_and_is_replaced(tmp_path, content):
    known = KnownPaths(tmp_path, RUN)
    known.remember([("x", "/a")])
    known._file().write_bytes(content)
    assert not known.trust("x", "/a")
    assert known.remember([("x", "/a")]) is None
    assert known.trust("x", "/a")
    known._file().unlink()
    os.mkfifo(known._file())
    assert not known.trust("x", "/a")


def test_without_a_home_nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    known = KnownPaths(tmp_path, RUN)
    assert not known.trust("x", "/a")
    said = known.remember([("x", "/a")])
    assert said == "this user has no home folder; set HOME or XDG_STATE_HOME"
    assert known.remember([("x", str(tmp_path / "inside"))]) is None, "there is nothing to keep"


def test_a_disk_that_refuses_is_told(tmp_path, home):
    (home / ".local").write_text("a file")
    said = KnownPaths(tmp_path, RUN).remember([("x", "/a")])
    assert said is not None
    assert "Not a directory" in said or "File exists" in said


# Folders of strangers


def _words(sides, model):
    return train_words(sides, model, "-i", "1", "--json", "--set", "train.batch_size=4")


def _spoil(model, values):
    """Have the settings that are saved in a model folder be these on top."""
    with ModelFolder(model) as folder:
        saved = folder.load()
        folder.write_config(from_dict(merge(saved.config, values)))
        state = saved.state | {"lowest_mean_loss": 0.5}
        for session in state["sessions"]:
            session["settings"] = merge(session["settings"], values)
        folder.save(saved.model, saved.optimizer, state)


@pytest.fixture
def model(sides, tmp_path, capsys):
    """A model folder as a stranger gives it: nothing of it was ever given here."""
    path = tmp_path / "stranger"
    assert main(_words(sides, path)) == 0
    capsys.readouterr()
    os.rename(path, tmp_path / "model")
    return tmp_path / "model"


EVIL = "a\necho pwned #"


def test_no_path_that_a_model_folder_names_is_used(model, sides, home, tmp_path, capsys):
    strange = tmp_path / "strange"
    values: dict = {}
    for spec in all_settings():
        if spec.is_path:
            name = strange / f"{spec.section}_{spec.name}.png"
            values = merge(values, {spec.section: {spec.name: str(name)}})
    values = merge(values, {"log": {"file": "~/.bashrc"}, "save": {"model_dir": EVIL}})
    _spoil(model, values)
    assert main(["train", "-m", str(model), "--json"]) == 2
    said = capsys.readouterr()
    assert said.err == "mien train: no faces for side A: add --input-a FOLDER\n"
    assert not strange.exists()

    assert main(_words(sides, model)) == 0
    events = json_events(capsys.readouterr().out)
    left_out = [e["message"] for e in events if "left out" in e.get("message", "")]
    named = {line.split(" ")[0] for line in left_out}
    assert named == {spec.full_name for spec in all_settings() if spec.is_path} - {
        *("save.model_dir", "model.load_weights", "data.input_a", "data.input_b")
    }
    assert all(line.isprintable() for line in left_out)
    assert "pwned" not in json.dumps(events)
    assert (home / ".bashrc").read_text() == "# mine\n"
    assert not strange.exists()
    kept = (model / "config.toml").read_text()
    assert str(strange) not in kept
    assert "bashrc" not in kept


@pytest.mark.parametrize(
    "words",
    [
        ("train", "-m", "{model}", "--print-config"),
        ("train", "-m", "{model}", "--summary"),
        ("train", "-m", "{model}", "--dry-run", "-A", "{a}", "-B", "{b}"),
        ("model", "info", "{model}"),
        ("analyze", "{model}"),
        ("preset", "save", "mine", "--from", "{model}"),
    ],
)
def test_no_other_command_uses_them_either(words, model, sides, home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("mien.benchmarks.harness.known_ceilings", lambda: CEILINGS)
    strange = tmp_path / "strange"
    values: dict = {"log": {"file": "~/.bashrc"}, "loss": {"lpips_weights": str(strange)}}
    values |= {"data": {"store_dir": str(strange)}}
    values |= {"preview": {"timelapse_output": str(strange), "write_image": f"{strange}/x.png"}}
    _spoil(model, values)
    places = {"model": model, "a": sides[0], "b": sides[1]}
    assert main([word.format(**places) for word in words]) == 0
    assert (home / ".bashrc").read_text() == "# mine\n"
    assert not strange.exists()
    for preset in tmp_path.glob("config/mien/presets/*"):
        assert "strange" not in preset.read_text()
        assert "bashrc" not in preset.read_text()


CEILINGS = {"device": "a card", "num_sms": 2, "copy_gb_s": 30.0, "gemm_tflops": {"bf16": 0.4}}


def test_a_film_is_made_of_no_pictures_elsewhere_unless_they_are_the_users(model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cv2.imwrite(str(elsewhere / "5.jpg"), np.zeros((8, 8, 3), np.uint8))
    _spoil(model, {"preview": {"timelapse_output": str(elsewhere)}})
    with pytest.raises(ValueError, match="holds no time-lapse"):
        find_pictures(model)
    run_id = json.loads((model / "state.json").read_text())["run_id"]
    KnownPaths(model, run_id).remember([("preview.timelapse_output", str(elsewhere))])
    assert find_pictures(model) == [elsewhere / "5.jpg"]


def test_the_users_own_model_goes_on_without_a_word(sides, tmp_path, home, capsys, monkeypatch):
    model, log = tmp_path / "model", tmp_path / "run.log"
    more = ["--set", f"log.file={log}", "--set", f"preview.write_image={tmp_path / 'x.png'}"]
    assert main([*_words(sides, model), *more]) == 0
    capsys.readouterr()
    (tmp_path / "x.png").unlink()
    size = log.stat().st_size
    assert main(["train", "-m", str(model), "-i", "1", "--device", "cpu", "--json"]) == 0
    told = [event.get("message", "") for event in json_events(capsys.readouterr().out)]
    assert not any("left out" in line for line in told)
    assert (tmp_path / "x.png").exists()
    assert log.stat().st_size > size

    os.rename(home / ".local", home / "gone")  # another machine
    assert main(["train", "-m", str(model), "-i", "1", "--device", "cpu"]) == 2
    assert "no faces for side A: add --input-a FOLDER" in capsys.readouterr().err
    given = ["-A", str(sides[0]), "-B", str(sides[1]), "-i", "1", "--device", "cpu", "--json"]
    assert main(["train", "-m", str(model), *given]) == 0
    told = [
        event["message"]
        for event in json_events(capsys.readouterr().out)
        if event["event"] == "warning"
    ]
    assert [line.split(" ")[0] for line in told] == ["log.file", "preview.write_image"]
    assert main(["train", "-m", str(model), "-i", "1", "--device", "cpu", "--json"]) == 0
    assert "warning" not in {event["event"] for event in json_events(capsys.readouterr().out)}


def test_a_start_without_a_home_trains_and_tells(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    assert main(_words(sides, tmp_path / "model")) == 0
    told = [e["message"] for e in json_events(capsys.readouterr().out) if e["event"] == "notice"]
    assert len(told) == 1
    assert "cannot be remembered (this user has no home folder; set HOME or XDG" in told[0]


def test_the_settings_of_a_model_folder_are_read_as_a_strangers(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ini = tmp_path / "train.ini"
    ini.write_text("[global]\ncoverage = 80\n")
    words = ["train", "-C", str(ini), "-m", str(model), "--print-config"]
    (model / "config.toml").unlink()
    os.mkfifo(model / "config.toml")
    assert main(words) == 2
    assert main(["preset", "save", "mine", "--from", str(model)]) == 2
    (model / "config.toml").unlink()
    (model / "config.toml").symlink_to(ini)
    assert main(["preset", "save", "mine", "--from", str(model)]) == 2
    assert not Path(tmp_path / "config").exists()


def test_saved_settings_survive_what_was_saved(model):
    with ModelFolder(model, read_only=True) as folder:
        saved = folder.load()
    assert to_dict(from_dict(saved.config))["save"]["model_dir"] == ""
