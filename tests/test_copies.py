"""Copies of a save: the backup, snapshots, and going back to an earlier one."""

import errno
import json
import os
import shutil

import pytest
import torch

from mien.core.config import Config
from mien.core.run import checkpoint
from mien.core.run.checkpoint import ModelFolder, Saver
from mien.core.run.session import TrainingState

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

        monkeypatch.setattr(checkpoint, "copy_files", refuse)
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

        monkeypatch.setattr(checkpoint, "copy_files", refuse)
        folder.snapshot()
        assert f"{tmp_path}/models" in folder.warnings[0]
        assert "Permission denied" in folder.warnings[0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


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


def test_a_saver_backs_up_the_best(tmp_path):
    with _folder(tmp_path / "m") as folder, Saver(folder) as saver:
        for iterations, is_best in ((2, False), (4, True), (6, False)):
            state = TrainingState(trainer="original", run_id=RUN_ID, iterations=iterations)
            weight = torch.full((5,), float(iterations))
            saver.save({"weight": weight}, None, state.to_dict(), is_best=is_best)
    backup = tmp_path / "m/backup"
    assert json.loads((backup / "state.json").read_text())["iterations"] == 4
