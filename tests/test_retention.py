"""Copies of a save: the backup, snapshots, and going back to an earlier one."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch

from mien.core.checkpoint import retention
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.saver import Saver
from mien.core.checkpoint.state import TrainingState
from mien.core.config import Config
from mien.core.history.restore import restore
from mien.core.system.durable_files import temporary_name

RUN_ID = "0123456789abcdef" * 2


def _save(folder, iterations):
    model = {"weight": torch.full((5,), float(iterations))}
    state = TrainingState(trainer="original", run_id=RUN_ID, iterations=iterations)
    return folder.save(model, {"mean": torch.zeros(3)}, state.to_dict())


def _folder(path, keep=9):
    folder = ModelFolder(path, keep_generations=keep)
    folder.write_config(Config())
    return folder


def _iterations(path):
    """Of the save that a run would resume from."""
    with ModelFolder(path, read_only=True) as folder:
        generation = folder.load()
    assert torch.equal(
        generation.model["weight"], torch.full((5,), 1.0 * generation.state["iterations"])
    )
    return generation.state["iterations"]


@pytest.fixture
def _no_links(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture(params=["links", "copies"])
def disk(request):
    """A disk with hard links, and one without."""
    if request.param == "copies":
        request.getfixturevalue("_no_links")


@pytest.mark.usefixtures("disk")
def test_going_back_makes_an_earlier_save_the_newest(tmp_path):
    with _folder(tmp_path / "m") as folder:
        for iterations in (2, 4, 6):
            _save(folder, iterations)
        assert folder.go_back(5) == 4
    assert _iterations(tmp_path / "m") == 4
    pointer = json.loads((tmp_path / "m/state.json").read_text())
    assert (pointer["iterations"], pointer["generation"]) == (4, "4-2")
    with _folder(tmp_path / "m") as folder:
        folder.load()
        _save(folder, 6)
    assert sorted(os.listdir(tmp_path / "m/generations")) == ["2", "4", "4-2", "6", "6-2"]
    assert _iterations(tmp_path / "m") == 6


def test_going_back_to_the_newest_writes_nothing_and_to_none_says_so(tmp_path):
    with _folder(tmp_path / "m") as folder:
        assert folder.go_back(100) is None
        for iterations in (2, 4):
            _save(folder, iterations)
        before = sorted(os.listdir(tmp_path / "m/generations"))
        assert folder.go_back(100) == 4
        assert folder.go_back(1) is None
    assert sorted(os.listdir(tmp_path / "m/generations")) == before


@pytest.mark.usefixtures("disk")
def test_going_back_uses_the_backup_and_passes_over_damage(tmp_path):
    with _folder(tmp_path / "m", keep=1) as folder:
        folder.back_up(_save(folder, 2))
        _save(folder, 4)
        assert folder.go_back(3) == 2
    assert _iterations(tmp_path / "m") == 2
    with _folder(tmp_path / "m") as folder:
        folder.load()
        for iterations in (3, 4, 5):
            newest = _save(folder, iterations)
        (newest.with_name("4") / "model.safetensors").write_bytes(b"spoilt")
        assert folder.go_back(4) == 3


def test_going_back_to_a_backup_of_the_newest_writes_it_where_the_newest_is_damaged(tmp_path):
    with _folder(tmp_path / "m") as folder:
        _save(folder, 2)
        newest = _save(folder, 4)
        folder.back_up(newest)
        (newest / "model.safetensors").write_bytes(b"spoilt")
        assert folder.go_back(4) == 4
    assert _iterations(tmp_path / "m") == 4, "the next start must not begin at iteration 2"


@pytest.mark.usefixtures("disk")
def test_the_backup_is_replaced_and_a_crash_leaves_one(tmp_path):
    path = tmp_path / "m"
    with _folder(path, keep=1) as folder:
        folder.back_up(_save(folder, 2))
        folder.back_up(_save(folder, 4))
        assert json.loads((path / "backup/state.json").read_text())["iterations"] == 4
        _save(folder, 6)
    assert not (path / "generations/4").exists()
    os.rename(path / "backup", path / ".backup.trash")  # killed between the two renames
    shutil.copytree(path / ".backup.trash", path / ".backup.tmp")
    with _folder(path, keep=1):
        pass
    assert json.loads((path / "backup/state.json").read_text())["iterations"] == 4
    assert not [name for name in os.listdir(path) if name.startswith(".backup")]


def test_a_full_disk_leaves_the_old_backup(tmp_path, monkeypatch):
    with _folder(tmp_path / "m") as folder:
        folder.back_up(_save(folder, 2))
        newest = _save(folder, 4)

        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(retention, "copy_files", refuse)
        folder.back_up(newest)
        assert folder.warnings == [
            f"cannot renew {tmp_path}/m/backup: No space left on device; free space; training goes "
            "on with the backup as it was"
        ]
    assert json.loads((tmp_path / "m/backup/state.json").read_text())["iterations"] == 2


@pytest.mark.usefixtures("disk")
def test_a_snapshot_is_a_model_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _folder("m") as folder:
        _save(folder, 2)
        _save(folder, 4)
        assert folder.snapshot() == tmp_path / "m_snapshot_4_iters"
        assert folder.snapshot() == tmp_path / "m_snapshot_4_iters"
        assert folder.warnings == [], "the same again is no news"
    assert _iterations(tmp_path / "m_snapshot_4_iters") == 4
    shutil.rmtree("m")
    with _folder("m_snapshot_4_iters") as folder:
        assert folder.load().state["iterations"] == 4
        _save(folder, 5)


def test_a_snapshot_that_the_disk_refuses_names_the_place(tmp_path, monkeypatch):
    with _folder(tmp_path / "models/m") as folder:
        _save(folder, 2)

        def refuse(*_):
            raise OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(retention, "copy_files", refuse)
        folder.snapshot()
        assert f"{tmp_path}/models" in folder.warnings[0]
        assert "Permission denied" in folder.warnings[0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


def _in_the_way(kind, target):
    """Put something in the place of a snapshot, or make it impossible; what was put there."""
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(target)
    elif kind == "a dangling link":
        target.symlink_to("nowhere")
    elif kind == "a link to a folder":
        target.with_name("elsewhere").mkdir()
        target.symlink_to("elsewhere")
    elif kind == "an unreadable state":
        target.mkdir()
        os.mkfifo(target / "state.json")
    elif kind == "a file for its temporary folder":
        temporary_name(target).write_text("a leftover")
    elif kind == "a pipe for its temporary folder":
        os.mkfifo(temporary_name(target))


@pytest.mark.parametrize(
    "kind",
    ["a file", "a pipe", "a dangling link", "a link to a folder", "an unreadable state"],
)
def test_what_stands_in_the_place_of_a_snapshot_is_left_as_it_is(tmp_path, kind):
    target = tmp_path / "m_snapshot_2_iters"
    with _folder(tmp_path / "m") as folder:
        _save(folder, 2)
        _in_the_way(kind, target)
        before = os.lstat(target)
        assert folder.snapshot() is None
        assert folder.warnings == [
            f"{target} is there already and was left as it is; no snapshot was made"
        ]
        _save(folder, 4)
    assert os.path.samestat(os.lstat(target), before)
    assert _iterations(tmp_path / "m") == 4
    if kind == "a link to a folder":
        assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("kind", ["a file", "a pipe"])
def test_a_leftover_of_any_kind_is_no_obstacle_to_a_snapshot(tmp_path, kind):
    target = tmp_path / "m_snapshot_2_iters"
    with _folder(tmp_path / "m") as folder:
        _save(folder, 2)
        _in_the_way(f"{kind} for its temporary folder", target)
        assert folder.snapshot() == target
    assert _iterations(target) == 2
    assert sorted(os.listdir(tmp_path)) == ["m", target.name]


def test_a_snapshot_whose_name_is_too_long_is_told_and_the_run_goes_on(tmp_path):
    with _folder(tmp_path / ("m" * 245)) as folder:
        _save(folder, 2)
        assert folder.snapshot() is None
        assert "File name too long; give --model-dir a shorter name, or leave" in folder.warnings[0]
        _save(folder, 4)
    assert _iterations(folder.path) == 4


def test_a_snapshot_from_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with _folder("m") as folder:
        _save(folder, 2)
        shutil.rmtree(tmp_path / "here")
        assert folder.snapshot() is None
        assert "cannot write snapshot beside m: No such file or directory" in folder.warnings[0]


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_damage_to_the_newest_save_reaches_no_copy_of_it(tmp_path, file):
    path = tmp_path / "m"
    with _folder(path, keep=1) as folder:
        newest = _save(folder, 2)
        folder.back_up(newest)
        snapshot = folder.snapshot()
    with open(newest / file, "r+b") as stream:  # in place, as a bad disk does it
        stream.seek(30)
        stream.write(b"\xff")
    with pytest.raises(ValueError, match="holds no whole save"):
        _iterations(path)
    assert _iterations(snapshot) == 2
    restored = restore(path)
    assert (restored.iterations, _iterations(path)) == (2, 2)
    with open(path / "generations" / restored.generation / file, "r+b") as stream:
        stream.seek(30)
        stream.write(b"\xff")
    assert restore(path).iterations == 2, "the restored save is no second name of the backup"
    assert _iterations(path) == 2


def test_a_file_named_backup_is_left_as_it_is(tmp_path):
    with _folder(tmp_path / "m") as folder:
        newest = _save(folder, 2)
        (tmp_path / "m/backup").write_text("mine")
        folder.back_up(newest)
        assert "Not a directory" in folder.warnings[0]
        assert folder.go_back(2) == 2
    assert (tmp_path / "m/backup").read_text() == "mine"
    assert not [name for name in os.listdir(tmp_path / "m") if name.startswith(".backup")]


def test_only_what_a_save_consists_of_is_copied(tmp_path):
    """A stranger's generation may hold a file of any size beside."""
    with _folder(tmp_path / "m") as folder:
        newest = _save(folder, 2)
        with open(newest / "more.bin", "wb") as stream:
            stream.truncate(1 << 40)
        snapshot = folder.snapshot()
        _save(folder, 4)
        folder.go_back(2)
    assert "more.bin" not in os.listdir(snapshot / "generations/2")
    assert "more.bin" not in os.listdir(tmp_path / "m/generations/2-2")


def test_a_snapshot_of_a_save_that_was_gone_back_to_is_the_same(tmp_path):
    with _folder(tmp_path / "m") as folder:
        _save(folder, 2)
        folder.snapshot()
        _save(folder, 4)
        folder.go_back(2)
        folder.load()
        folder.snapshot()
        assert folder.warnings == []


def test_training_goes_on_from_a_snapshot_without_touching_the_first(tmp_path):
    with _folder(tmp_path / "m") as folder:
        _save(folder, 2)
        snapshot = folder.snapshot()
    with _folder(snapshot, keep=1) as folder:
        folder.load()
        _save(folder, 3)
    assert _iterations(tmp_path / "m") == 2


def test_a_saver_makes_snapshots_beside_the_training(tmp_path, monkeypatch):
    may_write, write = threading.Event(), ModelFolder.snapshot

    def wait_and_write(folder):
        assert may_write.wait(300)
        return write(folder)

    monkeypatch.setattr(ModelFolder, "snapshot", wait_and_write)
    with _folder(tmp_path / "m") as folder, Saver(folder) as saver:
        state = TrainingState(trainer="original", run_id=RUN_ID, iterations=2)
        weight = torch.full((5,), 2.0)
        saver.save({"weight": weight}, None, state.to_dict(), with_snapshot=True)
        assert saver.finished() == []
        weight.fill_(3.0)  # training goes on
        may_write.set()
        saver.wait()
        (saved,) = saver.finished()
    assert saved.snapshot == tmp_path / "m_snapshot_2_iters"
    assert _iterations(saved.snapshot) == 2


def test_a_saver_backs_up_the_best(tmp_path):
    with _folder(tmp_path / "m") as folder, Saver(folder) as saver:
        for iterations, is_best in ((2, False), (4, True), (6, False)):
            state = TrainingState(trainer="original", run_id=RUN_ID, iterations=iterations)
            weight = torch.full((5,), float(iterations))
            saver.save({"weight": weight}, None, state.to_dict(), is_best=is_best)
    backup = tmp_path / "m/backup"
    assert json.loads((backup / "state.json").read_text())["iterations"] == 4
