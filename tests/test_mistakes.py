"""Mistakes of a user and refusals of a disk, in every command: one line, exit code 2."""

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import train_words

from mien.cli import COMMANDS as SUMMARIES
from mien.cli import main
from mien.core.checkpoint.lock import LOCK
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.config import from_dict
from mien.core.console.crash_report import reporting_crashes
from mien.core.console.reporter import Reporter
from mien.core.faces.synthetic import draw_folder

LONG = "n" * 300
NO_HOME = "~nosuchuser/x"
COMMANDS = [
    "faces check PATH",
    "faces check PATH PATH",
    "faces inspect PATH",
    "faces draw PATH --count 1",
    "train -m PATH -A FACES -B FACES",
    "train -m MODEL -A PATH -B FACES",
    "train -m PATH --summary",
    "train -m PATH --dry-run",
    "train -C PATH",
    "train -C PATH.ini",
    "train --recipe PATH",
    "model info PATH",
    "model verify PATH",
    "model restore PATH",
    "model nan-scan PATH",
    "model inference PATH -o MODEL",
    "analyze PATH",
    "swap PATH --faces FACES --frames FACES -o MODEL",
    "swap MODEL --faces PATH --frames FACES -o MODEL.mp4",
    "swap MODEL --faces FACES --frames PATH -o MODEL",
    "swap MODEL --faces FACES --frames FACES -o PATH",
    "timelapse PATH -o MODEL.mp4",
    "timelapse FACES -o PATH.mp4",
    "preset save own --from PATH",
    "recipe show PATH",
    "bench kernels --compare PATH",
    "demo --folder PATH",
]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes") / "faces"
    draw_folder(folder, identity="a", count=2, size_px=64)
    return folder


@pytest.mark.parametrize("path", [LONG, f"{LONG}/x", NO_HOME], ids=["long", "below", "home"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, faces, command, path):
    monkeypatch.chdir(tmp_path)
    known = {"PATH": path, "FACES": str(faces), "MODEL": "model"}
    words = command.split()
    for name, value in known.items():
        words = [word.replace(name, value) for word in words]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mien {words[0]}: ")
    assert captured.err.count("\n") == 1
    assert not list(Path().iterdir()), "nothing was made"


@pytest.fixture
def homeless(monkeypatch):
    """Be a user without a home, as in a container with a number for a name."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_who_has_no_home_has_no_presets_of_his_own(homeless, capsys):
    assert main(["preset", "list"]) == 0
    assert "dfaker" in capsys.readouterr().out
    assert main(["train", "--preset", "dfaker", "--print-config"]) == 0
    capsys.readouterr()
    assert main(["preset", "save", "own", "-t", "dfaker"]) == 2
    told = capsys.readouterr().err
    assert told.endswith("no home folder; set HOME or XDG_CONFIG_HOME\n")


def test_who_has_no_home_can_train(homeless, sides, tmp_path):
    assert main(train_words(sides, tmp_path / "model", "-b", "4", "-i", "1")) == 0


def test_a_lock_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    with ModelFolder(model):
        (model / "generations").mkdir()
    plain_open = os.open

    def refuse(path, *more, **named):
        if os.fspath(path).endswith(LOCK):
            raise PermissionError(13, "Permission denied", str(path))
        return plain_open(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    for command in ("info", "restore"):
        assert main(["model", command, str(model)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.startswith("mien model: ")


@pytest.mark.parametrize("words", ["train --print-config", "faces check /", "model info model"])
def test_a_working_folder_that_is_gone_is_one_line(tmp_path, words):
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$0" -m mien.cli "$@"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, *words.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"mien {words.split()[0]}: the working folder is gone (No such file or directory); change "
        "to another, as with `cd`\n"
    )


NAME = "a\nb\x1b[2J\u202egnp.png"
SHOWN = r"a\nb\u001b[2J\u202egnp.png"


@pytest.mark.parametrize(
    "words",
    [
        ["faces", "check", NAME],
        ["faces", "inspect", NAME],
        ["model", "info", NAME],
        ["analyze", NAME],
        ["swap", NAME, "--faces", ".", "--frames", NAME, "-o", NAME],
        ["timelapse", NAME, "-o", "x.mp4"],
        ["train", "-C", NAME],
        ["train", "--recipe", f"./{NAME}.toml"],
        ["train", "-A", NAME, "-B", NAME, "-m", "model"],
        ["monitor", NAME, "--port", "-1"],
    ],
    ids=lambda words: " ".join(words[:2]).split("\n")[0],
)
def test_a_name_in_a_mistake_does_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told[:-1].isprintable()
    assert SHOWN in told or words[0] == "monitor"


def test_words_that_nobody_knows_do_nothing(capsys):
    with pytest.raises(SystemExit) as left:
        main(["faces", "check", "a", "b", NAME])
    assert left.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"mien faces: unexpected argument {SHOWN}")
    assert told.isprintable()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train -b many", "-b/--batch-size: must be auto or a whole number from 0 to 4096, got 'm"),
        ("train -i 1.5", "-i/--iterations: must be a whole number from 1 to 1000000000, got"),
        ("train --lerning-rate 3", "did you mean `--set optimizer.learning_rate=`?"),
        ("train --itterations=3", "unknown flag --itterations; did you mean `--iterations`?"),
        ("train --qqqq", "unknown flag --qqqq; see `mien train --help`"),
        ("train extra", "unexpected argument extra; see `mien train --help`"),
        ("train –A a", "unexpected argument –A; its first character is a dash of another kind (U+"),
        ("bench nosuch", "invalid choice: 'nosuch'"),
        ("tain", "invalid choice: 'tain'"),
        ("tain", "'completion'); did you mean train?; see"),
        ("model infoo out", "; did you mean info?; see"),
        ("model export out --to kera -o out", "; did you mean keras?; see"),
        ("model info", "required: "),
    ],
)
def test_a_mistaken_word_is_one_line_with_what_was_meant(capsys, words, said):
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told
    assert " --help`" in told


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["train\u3000-A", "a"], "(U+3000) in train\\u3000-A: type an ordinary one"),
        (
            ["train", "-A", "a", "-B", "b\xa0-m", "out"],
            "(U+00A0) in b\\u00a0-m: type an ordinary one",
        ),
    ],
)
def test_a_space_of_another_kind_is_named(capsys, words, where):
    with pytest.raises(SystemExit):
        main(words)
    assert where in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "-A", "a", "-B", "b", "-m\u3000model"],
        ["train", "-A", "a", "-B", "b", "--model-dir=model\xa0"],
        ["train", "-A", "a", "-B", "b\u3000", "-m", "model"],
        ["faces", "draw", "\u3000new/faces", "--count", "1"],
        ["swap", "model", "--faces", "a", "--frames", "a", "-o", "out/swapped\u3000"],
    ],
)
def test_a_new_name_does_not_begin_or_end_with_a_space_of_another_kind(
    tmp_path, monkeypatch, capsys, words
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "begins or ends with a space of another kind (U+" in told
    assert not list(Path().iterdir()), "nothing was made"


def test_a_folder_that_is_called_with_such_a_space_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("\u3000mine").mkdir()
    assert main(["faces", "draw", "\u3000mine/faces", "--count", "1", "--size", "64"]) == 0
    assert main(["faces", "check", "\u3000mine/faces"]) == 2  # too few to train
    assert "1 usable face" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--notify-command", "say 'La fin\xa0'; say \xa0"],
        ["train", "--set", "notify.command=say \xa0"],
        ["train", "--log-file=~/\u3000mine/log"],
        ["preset", "save", "mine", "--description", "Schnell\xa0"],
    ],
)
def test_a_text_may_begin_or_end_with_such_a_space(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    Path("\u3000mine").mkdir()
    more = ["--print-config"] if words[0] == "train" else ["-t", "original"]
    assert main([*words, *more]) == 0, capsys.readouterr().err


def test_every_command_stands_in_one_line_with_what_it_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert all([name, summary] in lines for name, summary in SUMMARIES.items())


def test_a_model_folder_that_is_not_there_is_told_where_faces_lack(tmp_path, capsys):
    assert main(["train", "-m", str(tmp_path / "typo")]) == 2
    assert f"{tmp_path / 'typo'} holds no model yet" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_names_of_faces_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("faces\x1b[31m")
    draw_folder(folder, identity="a", count=3, size_px=64)
    first, second, _ = sorted(folder.iterdir())
    (folder / NAME).write_text("no face")
    second.write_bytes(first.read_bytes())
    second.rename(folder / f"0{NAME}")
    for words in (["check", str(folder)], ["inspect", str(folder / f"0{NAME}")]):
        main(["faces", *words])
        told = capsys.readouterr().out
        assert all(line.isprintable() for line in told.splitlines())
        assert SHOWN in told
        assert r"faces\u001b[31m" in told
        main(["faces", *words, "--json"])
        assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_names_of_faces_do_nothing_on_a_terminal(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(width=400, no_color=True))
    folder = tmp_path / "faces\x1b[31m[/b]"
    draw_folder(folder, identity="a", count=2, size_px=64)
    (folder / NAME).write_text("no face")
    main(["faces", "check", str(folder)])
    told = capsys.readouterr().out
    assert "\x1b[31m" not in told
    assert r"faces\u001b[31m[/b]" in told
    assert SHOWN in told


NO_UTF8 = "f\udce4.png"


def test_names_that_are_no_utf8_end_no_run(sides, tmp_path, capsys):
    """The names are those of a face, of the folders of faces and model, and of the log file."""
    faces, model = tmp_path / "a_\udce4", tmp_path / "model_\udce4"
    faces.mkdir()
    for path in sides[0].iterdir():
        os.link(path, faces / path.name)
    (faces / NO_UTF8).write_text("no face")
    words = ["-A", str(faces), "-B", str(sides[1]), "-m", str(model), "-b", "4"]
    words += ["-t", "lightweight", "--set", "model.options.width=8", "--device", "cpu"]
    log = tmp_path / "run_\udce4.log"
    assert main(["train", *words, "-i", "1", "-F", str(log)]) == 0
    line = rf"Warning: skipped {tmp_path}/a_\xe4/f\xe4.png: is no PNG: only PNGs that extraction"
    told = capsys.readouterr().out
    assert line in told
    assert rf"data.input_a is no UTF-8 name ({tmp_path}/a_\xe4) and is not kept" in told
    assert line in log.read_text()
    events = (model / "logs/session_1/events.jsonl").read_text().splitlines()
    skipped = f"skipped {faces}/{NO_UTF8}"
    assert any(skipped in json.loads(event).get("message", "") for event in events)
    (board,) = (model / "logs/session_1/train").glob("events.out.tfevents.*")
    assert rf"{tmp_path}/a_\\xe4".encode() in board.read_bytes()


def test_a_crash_is_reported_whatever_its_names_hold(tmp_path, capsys):
    config = from_dict({"data": {"input_a": f"/faces/{NO_UTF8}"}})
    reporter = Reporter(as_json=True)
    reporter.warning(f"skipped {NO_UTF8}")
    with pytest.raises(RuntimeError), reporting_crashes(tmp_path, config, reporter):
        raise RuntimeError(f"at {NO_UTF8}")
    (report,) = tmp_path.glob("crash_report_*.txt")
    assert r"RuntimeError: at f\udce4.png" in report.read_text(encoding="utf-8")


def test_a_refusal_of_the_disk_in_training_is_a_failure_of_ours(tmp_path):
    reporter = Reporter(as_json=True)
    with (
        pytest.raises(RuntimeError, match="Stale file handle"),
        reporting_crashes(tmp_path, from_dict({}), reporter),
    ):
        raise OSError(errno.ESTALE, "Stale file handle", "/faces/a/1.png")
    assert len(list(tmp_path.glob("crash_report_*.txt"))) == 1


def test_a_preset_that_cannot_hold_a_name_says_which(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["preset", "save", "own", "--set", f"log.file={NO_UTF8}"]) == 2
    told = capsys.readouterr().err
    assert told == (
        'mien preset: a preset cannot hold file = "f\\xe4.png": the name is no UTF-8; rename it\n'
    )
    assert not list(tmp_path.rglob("*.t*"))
