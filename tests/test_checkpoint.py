"""A save is whole or absent, whatever happens while it is written; damage is found and told."""

import concurrent.futures
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mien import __version__
from mien.core.checkpoint import format as manifests
from mien.core.checkpoint.generations import Generations
from mien.core.checkpoint.model_folder import ModelFolder, SaveError
from mien.core.checkpoint.saver import Saver
from mien.core.checkpoint.state import TrainingState
from mien.core.config import Config, from_dict, to_dict
from mien.core.system import durable_files as file_access

RUN_ID = "0123456789abcdef" * 2
FILES = {"config.toml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}


def tensors(iterations: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model and an optimizer whose every number tells the iteration."""
    weight = torch.full((8, 4, 3, 3), float(iterations)).to(memory_format=torch.channels_last)
    model = {
        "conv.weight": weight,
        "low": torch.full((5,), iterations / 4, dtype=torch.bfloat16),
        "steps": torch.tensor(iterations),
        "empty": torch.empty(0, 3),
    }
    return model, {"mean": torch.full((33,), -float(iterations))}


def plain_state(iterations: int, **more) -> dict:
    state = TrainingState(trainer="original", run_id=RUN_ID, iterations=iterations)
    return state.to_dict() | more


def save(folder: ModelFolder, iterations: int) -> Path:
    return folder.save(*tensors(iterations), plain_state(iterations))


def new_folder(path: Path, **more) -> ModelFolder:
    folder = ModelFolder(path, **more)
    folder.write_config(Config())
    return folder


def check_loaded(generation: manifests.Generation, iterations: int) -> None:
    model, optimizer = tensors(iterations)
    assert generation.state == plain_state(iterations)
    for held, expected in ((generation.model, model), (generation.optimizer, optimizer)):
        assert held.keys() == expected.keys()
        for name in expected:
            assert held[name].dtype == expected[name].dtype
            assert torch.equal(held[name], expected[name])


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path / "generations"))


# Round trips


def test_round_trip_and_layout(tmp_path):
    path = tmp_path / "deep" / "model"
    with new_folder(path, trainer="original") as folder:
        assert folder.is_new
        assert folder.load() is None
        assert save(folder, 7) == path / "generations" / "7"
        assert not folder.is_new
    assert set(os.listdir(path)) == {".lock", "config.toml", "state.json", "generations"}
    assert set(os.listdir(path / "generations" / "7")) == FILES
    with ModelFolder(path, trainer="original") as folder:
        generation = folder.load()
        assert folder.warnings == []
    check_loaded(generation, 7)
    assert generation.name == "7"
    assert from_dict(generation.config) == Config()
    pointer = json.loads((path / "state.json").read_text())
    assert pointer["generation"] == "7"
    assert pointer["iterations"] == 7
    assert pointer["lowest_mean_loss"] is None
    assert TrainingState.from_dict(generation.state).iterations == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path, dtype, layout):
    tensor = (torch.randn(3, 5, 7, 9) * 100).to(dtype)
    if layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if layout == "slice":
        tensor = tensor[:, 1:4, ::2]
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        folder.save({"x": tensor}, None, plain_state(1))
        direct = folder.load()
        saver.save({"x": tensor}, None, plain_state(2))
        saver.wait()
        threaded = folder.load()
    assert (direct.name, threaded.name) == ("1", "2")
    for generation in (direct, threaded):
        assert generation.optimizer is None
        assert generation.model["x"].dtype == dtype
        assert torch.equal(generation.model["x"], tensor)
        generation.model["x"].add_(1)  # what is loaded is the caller's own


def test_tensors_that_share_memory_are_saved_by_the_saver(tmp_path):
    tied = torch.randn(4, 4)
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        saver.save({"a": tied, "b": tied}, None, plain_state(1))
        saver.wait()
        generation = folder.load()
    assert torch.equal(generation.model["a"], tied)
    assert torch.equal(generation.model["b"], tied)


def test_metadata_says_what_the_file_is(tmp_path):
    from safetensors import safe_open

    with new_folder(tmp_path / "m") as folder:
        path = save(folder, 3)
    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(path / name, "pt") as stream:
            assert stream.metadata() == {
                "format": "pt",
                "mien_version": __version__,
                "run_id": RUN_ID,
                "kind": "synthetic face model",
                "trainer": "original",
                "iterations": "3",
            }


def test_files_are_readable_by_those_who_may_read_the_folder(tmp_path):
    with new_folder(tmp_path / "m") as folder:
        path = save(folder, 3)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.iterdir()}
    assert set(modes.values()) == {path.stat().st_mode & 0o666}


def test_state_must_be_json_and_say_whose_it_is(tmp_path):
    with new_folder(tmp_path / "m") as folder:
        for key in ("run_id", "trainer", "iterations"):
            state = plain_state(1)
            del state[key]
            with pytest.raises(ValueError, match=f"the state to save has no {key}"):
                folder.save({}, None, state)
        with pytest.raises(ValueError, match="not JSON compliant"):
            folder.save({}, None, plain_state(1, lowest_mean_loss=float("nan")))
        assert folder.is_new


# Which generations there are


def test_retention_keeps_the_newest(tmp_path):
    with new_folder(tmp_path / "m", keep_generations=2) as folder:
        for iterations in (1, 2, 3, 10):
            save(folder, iterations)
        assert names(tmp_path / "m") == ["10", "3"]
    with ModelFolder(tmp_path / "m", keep_generations=1) as folder:
        check_loaded(folder.load(), 10)
        save(folder, 11)
    assert names(tmp_path / "m") == ["11"]


def test_old_generations_go_only_after_the_pointer_moved(tmp_path, monkeypatch):
    path = tmp_path / "m"
    seen = []
    prune = Generations.prune

    def spy(generations: Generations, num_kept: int) -> None:
        pointer = json.loads((path / "state.json").read_text())["generation"]
        seen.append((pointer, names(path)))
        prune(generations, num_kept)

    monkeypatch.setattr(Generations, "prune", spy)
    with new_folder(path, keep_generations=1) as folder:
        save(folder, 1)
        save(folder, 2)
    assert seen == [("1", ["1"]), ("2", ["1", "2"])]
    assert names(path) == ["2"]


def test_the_same_save_is_not_written_twice(tmp_path):
    with new_folder(tmp_path / "m") as folder:
        path = save(folder, 5)
        before = path.stat().st_mtime_ns
        assert save(folder, 5) == path
        assert path.stat().st_mtime_ns == before
        assert names(tmp_path / "m") == ["5"]
    with ModelFolder(tmp_path / "m") as folder:
        folder.load()
        assert save(folder, 5) == path


def test_a_different_save_at_the_same_iteration_takes_its_place_only_once_it_is_whole(tmp_path):
    model, optimizer = tensors(5)
    with new_folder(tmp_path / "m", keep_generations=2) as folder:
        save(folder, 4)
        first = folder.save(model, None, plain_state(5))
        with pytest.MonkeyPatch.context() as patch:
            _Disk(patch, OSError(errno.EIO, "bad"), for_ever=True).break_at = 3
            with pytest.raises(SaveError):
                folder.save(model, optimizer, plain_state(5))
        assert {"4", "5"} <= set(names(tmp_path / "m"))
        with_optimizer = folder.save(model, optimizer, plain_state(5))
        assert (first.name, with_optimizer.name) == ("5", "5-2")
        assert names(tmp_path / "m") == ["4", "5-2"], "one iteration must not fill both places"
        other_state = folder.save(model, optimizer, plain_state(5, lowest_mean_loss=0.5))
        assert names(tmp_path / "m") == ["4", other_state.name]
    with new_folder(tmp_path / "new", keep_generations=2) as folder:
        folder.save(model, None, plain_state(5))
        folder.save(model, optimizer, plain_state(5))
        assert names(tmp_path / "new") == ["5", "5-2"], "there is room for both"
    with ModelFolder(tmp_path / "m") as folder:
        generation = folder.load()
        assert generation.name == other_state.name
        assert generation.state["lowest_mean_loss"] == 0.5


def test_a_run_that_went_back_counts_as_newer(tmp_path):
    path = tmp_path / "m"
    with new_folder(path, keep_generations=3) as folder:
        save(folder, 500)
        damage = save(folder, 1000) / "model.safetensors"
    damage.write_bytes(damage.read_bytes()[:-1])
    with ModelFolder(path, keep_generations=3) as folder:
        check_loaded(folder.load(), 500)
        save(folder, 750)
    with ModelFolder(path, keep_generations=3) as folder:
        check_loaded(folder.load(), 750)
        assert folder.warnings == []
        assert save(folder, 1000).name == "1000-2"


def test_leftovers_of_a_crash_are_swept_and_nothing_else(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
    (path / "generations" / ".2.tmp").mkdir()
    (path / "generations" / ".0.trash").mkdir()
    (path / "generations" / "my notes").mkdir()
    leftover = file_access.temporary_name(path / "state.json")
    leftover.write_text("{")
    (path / ".state.json.tmp").write_text("mine")
    with ModelFolder(path, read_only=True) as folder:
        check_loaded(folder.load(), 1)
        assert len(names(path)) == 4
    with ModelFolder(path) as folder:
        assert names(path) == ["1", "my notes"]
        save(folder, 2)
    assert names(path) == ["1", "2", "my notes"]
    assert not leftover.exists()
    assert (path / ".state.json.tmp").read_text() == "mine"


def test_read_only_takes_no_lock_and_saves_nothing(tmp_path):
    with new_folder(tmp_path / "m") as folder:
        save(folder, 1)
        with ModelFolder(tmp_path / "m", read_only=True) as reader:
            check_loaded(reader.load(), 1)
            with pytest.raises(RuntimeError, match="opened read-only"):
                save(reader, 2)
    with pytest.raises(RuntimeError, match="or is closed"):
        save(folder, 2)
    with pytest.raises(ValueError, match=r"^model folder .*none does not exist$"):
        ModelFolder(tmp_path / "none", read_only=True)


# Damage


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / f"moved {path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        flip_bit,
        truncate,
        lengthen,
        Path.unlink,
        replace_by_link,
        replace_by_pipe,
        replace_by_folder,
    ],
)
@pytest.mark.parametrize("file_name", sorted(FILES))
def test_a_damaged_generation_is_passed_over_and_told(tmp_path, harm, file_name):
    path = tmp_path / "m"
    with new_folder(path, keep_generations=2) as folder:
        save(folder, 1)
        newest = save(folder, 2)
    if file_name == "manifest.json" and harm is lengthen:
        pytest.skip("white space after JSON is no damage")
    harm(newest / file_name)
    held = sorted(os.listdir(newest))
    with ModelFolder(path, keep_generations=2) as folder:
        check_loaded(folder.load(), 1)
        assert len(folder.warnings) == 1
        assert folder.warnings[0].startswith(f"generation 2 is damaged ({file_name}")
        assert folder.warnings[0].endswith(
            "; generation 1 of iteration 1 is used, and nothing was deleted"
        )
        save(folder, 2)
        check_loaded(folder.load(), 2)
        save(folder, 3)
        check_loaded(folder.load(), 3)
    assert sorted(os.listdir(newest)) == held  # left for the user, who may rescue something
    assert names(path) == ["2", "2-2", "3"]


@pytest.mark.parametrize("harm", [flip_bit, truncate, Path.unlink])
def test_a_damaged_pointer_costs_nothing(tmp_path, harm):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
        save(folder, 2)
    harm(path / "state.json")
    with ModelFolder(path) as folder:
        check_loaded(folder.load(), 2)
        save(folder, 3)
    assert json.loads((path / "state.json").read_text())["generation"] == "3"


def test_none_whole_is_refused_with_advice_and_nothing_is_touched(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        for iterations in (1, 2):
            flip_bit(save(folder, iterations) / "model.safetensors")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with (
        ModelFolder(path) as folder,
        pytest.raises(ValueError, match="another model folder$") as caught,
    ):
        folder.load()
    assert "holds no whole save: generation 2 is damaged (model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert after.keys() == before.keys()
    assert all(after[file] == before[file] for file in before if file.name != ".lock")


def test_generations_that_vanished_are_no_new_model(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
    shutil.rmtree(path / "generations")
    with ModelFolder(path) as folder, pytest.raises(ValueError, match="generations are missing"):
        folder.load()


def test_the_generation_in_use_that_vanished_is_told(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
        shutil.rmtree(save(folder, 2))
    with ModelFolder(path) as folder:
        check_loaded(folder.load(), 1)
        assert folder.warnings[0].startswith("generation 2 is missing; generation 1 of iteration 1")


def forge(generation: Path, **change) -> None:
    """Change a manifest the way a stranger could: its digest fits."""
    body = json.loads((generation / "manifest.json").read_text()) | change
    del body["digest"]
    body["digest"] = manifests.digest_of(body)
    (generation / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\xff" * 8 + b"{}"),
        ("model.safetensors", b""),
        ("optimizer.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("state.json", b"[" * 100_000),
        ("state.json", b"[]"),
        ("state.json", b'{"iterations": NaN}'),
        ("config.toml", b"= =\xff"),
    ],
)
def test_a_manifest_that_vouches_for_a_bad_file(tmp_path, name, content):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
        newest = save(folder, 2)
    (newest / name).write_bytes(content)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    files[name] = {"size": len(content), "sha256": manifests.sha256_of(newest / name)}
    forge(newest, files=files)
    with ModelFolder(path) as folder:
        check_loaded(folder.load(), 1)
        assert folder.warnings[0].startswith(f"generation 2 is damaged ({name} is not")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": []},
        {"files": {"../../x": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"model.safetensors": {"size": -1, "sha256": "0" * 64}, "state.json": {}}},
        {"sequence": -1},
        {"sequence": "9"},
        {"trainer": None},
        {"schema": 0},
    ],
)
def test_a_manifest_out_of_order_is_damage(tmp_path, change):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
        newest = save(folder, 2)
    forge(newest, **change)
    with ModelFolder(path) as folder:
        check_loaded(folder.load(), 1)
        assert "manifest.json is not one of mien's" in folder.warnings[0]


def test_a_newer_version_is_told_as_such(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        newest = save(folder, 1)
    forge(newest, schema=2, mien_version="9.9")
    with pytest.raises(ValueError, match=r"newer version of mien \(9\.9, .*; update mien$"):
        ModelFolder(path)


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
        newest = save(folder, 2)
        read = file_access.open_plain

        def refuse(name: str, flags: int, **how: bool) -> int:
            if str(name) == str(newest / "model.safetensors"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
            return read(name, flags, **how)

        monkeypatch.setattr(file_access, "open_plain", refuse)
        with pytest.raises(ValueError, match=r"^cannot read .*2/model.*: Permission denied"):
            folder.load()


# Whose folder it is


def test_foreign_folders_are_refused_and_untouched(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not empty and holds no model; choose"):
        ModelFolder(foreign)
    assert os.listdir(foreign) == ["holiday.jpg"]
    with pytest.raises(ValueError, match=r"holiday\.jpg is a file; choose"):
        ModelFolder(foreign / "holiday.jpg")
    # What only reads has no flag for another folder.
    with pytest.raises(ValueError, match="holds no model; give that of a model$"):
        ModelFolder(foreign, read_only=True)
    with pytest.raises(ValueError, match="is a file; choose a folder$"):
        ModelFolder(foreign / "holiday.jpg", read_only=True)
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    new_folder(tmp_path / "disk").close()


def test_a_model_of_another_trainer_is_refused(tmp_path):
    path = tmp_path / "m"
    with new_folder(path) as folder:
        save(folder, 1)
    with pytest.raises(ValueError, match="holds a model of original, not of lightweight") as caught:
        ModelFolder(path, trainer="lightweight")
    assert str(caught.value).endswith("choose another --model-dir, or --trainer original")
    ModelFolder(path, trainer="original").close()  # the refusal left no lock behind


def holder(path: str) -> None:
    """Holds a model folder until its input ends."""
    with ModelFolder(Path(path)):
        sys.stdout.write("locked\n")
        sys.stdout.flush()
        sys.stdin.read()


def run_here(function: str, *arguments: str) -> subprocess.Popen:
    """A process that runs a function of this file."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tested', {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['tested'] = module\n"
        "spec.loader.exec_module(module)\n"
        f"module.{function}(*sys.argv[1:])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_runs_cannot_share_a_folder(tmp_path):
    path = tmp_path / "m"
    child = run_here("holder", str(path))
    assert child.stdout.readline() == "locked\n"
    text = rf"^model folder {path} is in use by process {child.pid}; stop that run"
    with pytest.raises(ValueError, match=text):
        ModelFolder(path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with ModelFolder(path) as folder:  # the lock went with the process
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            ModelFolder(path)
        save(folder, 1)
    ModelFolder(path).close()


# The disk


def test_what_is_renamed_was_flushed_before(tmp_path, monkeypatch):
    """Names appear only after the contents are safe: the order that a power cut would test."""
    path = tmp_path / "m"
    folder = new_folder(path)
    save(folder, 1)
    flushed: list[str] = []
    moves: list[tuple[str, str, list[str]]] = []
    nameless: dict[int, int] = {}
    fsync, rename, replace, link = os.fsync, os.rename, os.replace, os.link

    def spy_fsync(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        if found.st_nlink:
            flushed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), path))
        else:
            nameless[found.st_ino] = found.st_size

    def spy_link(source: str, target: Path, **how: int) -> None:
        link(source, target, **how)
        found = target.stat()
        assert nameless[found.st_ino] == found.st_size, "whole and flushed before it had its name"
        flushed.append(os.path.relpath(target, path))

    def spy_move(move):
        def moved(source, target):
            moves.append(
                (os.path.relpath(source, path), os.path.relpath(target, path), list(flushed))
            )
            move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    monkeypatch.setattr(os, "rename", spy_move(rename))
    monkeypatch.setattr(os, "replace", spy_move(replace))
    save(folder, 2)
    folder.close()
    temporary = "generations/.2.tmp"
    (source, target, before_rename), (pointer, top, before_pointer) = moves
    assert (source, target) == (temporary, "generations/2")
    assert set(before_rename) == {temporary, *(f"{temporary}/{name}" for name in FILES)}
    assert before_rename[-2:] == [f"{temporary}/manifest.json", temporary]
    assert pointer.startswith(".mien-")
    assert top == "state.json"
    assert before_pointer[len(before_rename) :] == ["generations", pointer]
    assert flushed[-1] == "."


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class _Disk:
    """Counts the calls that change the disk, and breaks from the chosen one on."""

    def __init__(self, monkeypatch, failure: BaseException, *, for_ever: bool) -> None:
        self.count, self.break_at = 0, None
        self._failure, self._for_ever = failure, for_ever
        for name in CALLS:
            monkeypatch.setattr(os, name, self._broken(getattr(os, name)))

    def _broken(self, call):
        def counted(*args, **kwargs):
            self.count += 1
            over = self.break_at is not None and self.count >= self.break_at
            if over and (self._for_ever or self.count == self.break_at):
                raise self._failure
            return call(*args, **kwargs)

        return counted


class Crash(BaseException):
    """The process ends here: nothing after this reaches the disk."""


FAILURES = [
    pytest.param(OSError(errno.EIO, os.strerror(errno.EIO)), False, id="one call fails"),
    pytest.param(OSError(errno.EIO, os.strerror(errno.EIO)), True, id="the disk is lost"),
    pytest.param(Crash(), True, id="the process dies"),
]


@pytest.mark.parametrize(("failure", "for_ever"), FAILURES)
def test_a_failure_at_any_call_leaves_a_whole_save(tmp_path, failure, for_ever):
    for break_at in range(1, 100):
        path = tmp_path / str(break_at)
        folder = new_folder(path, keep_generations=1)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            disk = _Disk(patch, failure, for_ever=for_ever)
            disk.break_at = break_at
            outcome = None
            try:
                save(folder, 2)
            except (SaveError, Crash) as error:
                outcome = error
        folder.close()
        with ModelFolder(path) as again:
            generation = again.load()
            iterations = generation.state["iterations"]
            check_loaded(generation, iterations)
            if outcome is None:
                assert iterations == 2
            if isinstance(outcome, SaveError):
                assert str(outcome) == (
                    f"cannot save to {path}: Input/output error; check the disk and start again: "
                    "the last complete save is iteration 1"
                )
            save(again, 3)
            check_loaded(again.load(), 3)
        if disk.count < break_at:
            break
    assert break_at > 15  # every call had its turn


def test_a_failed_save_can_be_repeated(tmp_path, monkeypatch):
    with new_folder(tmp_path / "m") as folder:
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            _Disk(patch, OSError(errno.EIO, "bad"), for_ever=True).break_at = 3
            with pytest.raises(SaveError):
                save(folder, 2)
        save(folder, 2)
        check_loaded(folder.load(), 2)


@pytest.fixture
def mounted(tmp_path):
    """Mount a small disk of its own kind, or skip."""
    mounts = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounts)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a disk here: {done.stderr.strip()}")
        mounts.append(path)
        return path

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield mount
    for path in mounts:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(mounted):
    path = mounted("size=1m") / "m"
    with new_folder(path, keep_generations=9) as folder:
        model = {"x": torch.randn(50_000)}
        for iterations in range(1, 5):
            folder.save(model, None, plain_state(iterations))
        failure = None
        while failure is None:
            iterations += 1
            try:
                folder.save(model, None, plain_state(iterations))
            except SaveError as error:
                failure = str(error)
        last = iterations - 1
        assert failure == (
            f"cannot save to {path}: No space left on device; free space and start again: "
            f"the last complete save is iteration {last}"
        )
        assert torch.equal(folder.load().model["x"], model["x"])
        assert folder.load().name == str(last)
        shutil.rmtree(path / "generations" / "1")  # the user frees space
        folder.save(model, None, plain_state(99))
        assert folder.load().name == "99"


def test_a_disk_so_full_that_no_text_fits(mounted):
    disk = mounted("size=1m")
    path = disk / "m"
    with new_folder(path) as folder:
        with pytest.raises(SaveError, match="No space left on device.*nothing has been saved yet"):
            folder.save({"x": torch.randn(300_000)}, None, plain_state(1))
        assert names(path) == []
        save(folder, 1)
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(b"x" * 2_000_000)
        with pytest.raises(SaveError, match="No space left on device.*iteration 1$"):
            save(folder, 2)
        check_loaded(folder.load(), 1)
    with pytest.raises(ValueError, match=r"cannot (lock|write to) model folder .*No space left"):
        ModelFolder(disk / "other")


def test_a_read_only_disk(mounted):
    disk = mounted("size=1m")
    with new_folder(disk / "m") as folder:
        save(folder, 1)
    folder = ModelFolder(disk / "m")
    folder.load()
    folder.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    text = r"^cannot write to model folder .*: Read-only file system; make it writable, or choose"
    for name in ("m", "new"):
        with pytest.raises(ValueError, match=text):
            ModelFolder(disk / name)
    with ModelFolder(disk / "m", read_only=True) as reader:
        check_loaded(reader.load(), 1)


def test_a_disk_that_turns_read_only(tmp_path, monkeypatch):
    with new_folder(tmp_path / "m") as folder:
        save(folder, 4)

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "mkdir", refuse)
        text = "Read-only file system; make the disk writable and start again.*iteration 4$"
        with pytest.raises(SaveError, match=text):
            save(folder, 5)


def test_old_generations_that_cannot_be_deleted_are_told(tmp_path, monkeypatch):
    with new_folder(tmp_path / "m", keep_generations=1) as folder:
        save(folder, 1)
        rename = os.rename

        def refuse(source: Path, target: Path) -> None:
            if str(target).endswith(".trash"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            rename(source, target)

        monkeypatch.setattr(os, "rename", refuse)
        save(folder, 2)
        assert folder.warnings == [
            f"cannot delete old generations in {tmp_path / 'm'}: Operation not permitted"
        ]
        check_loaded(folder.load(), 2)


def test_a_folder_that_cannot_be_listed_is_released_all_the_same(tmp_path):
    folder = ModelFolder(tmp_path / "m")
    with pytest.MonkeyPatch.context() as patch:

        def refuse(_path: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(os, "listdir", refuse)
        folder.close()
    ModelFolder(tmp_path / "m").close()


# Killed at any moment


def save_for_ever(path: str) -> None:
    """Resumes the model and saves it in a loop, telling of each save that is complete."""
    with ModelFolder(Path(path), keep_generations=2) as folder, Saver(folder) as saver:
        generation = folder.load()
        iterations = generation.state["iterations"] if generation else 0
        folder.write_config(Config())
        while True:
            iterations += 1
            model, optimizer = tensors(iterations)
            model["ballast"] = torch.full((200_000,), float(iterations))
            saver.save(model, optimizer, plain_state(iterations))
            for saved in saver.finished():
                sys.stdout.write(f"{saved.iterations}\n")
                sys.stdout.flush()


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_last_complete_save(tmp_path):
    path = tmp_path / "m"
    choice = random.Random(20)
    last = leftovers = 0
    for _ in range(12):
        child = run_here("save_for_ever", str(path))
        first = child.stdout.readline()  # it saves by now
        time.sleep(choice.uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        told, _ = child.communicate(timeout=300)
        told = [int(line) for line in (first + told).split()]
        leftovers += any(name.startswith(".") for name in names(path))
        with ModelFolder(path, read_only=True) as folder:
            generation = folder.load()
            assert folder.warnings == []
        iterations = generation.state["iterations"]
        assert iterations >= max([last, *told])  # what was told complete is there
        ballast = generation.model.pop("ballast")
        assert torch.equal(ballast, torch.full((200_000,), float(iterations)))
        check_loaded(generation, iterations)
        last = iterations
    assert leftovers > 0  # some kills met a save half way, else this showed nothing


# Saving while training goes on


def test_the_saver_writes_what_the_tensors_held_at_the_call(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = ModelFolder.save

    def slow(folder: ModelFolder, *arguments):
        may_write.wait(300)
        return write(folder, *arguments)

    monkeypatch.setattr(ModelFolder, "save", slow)
    model, optimizer = tensors(1)
    state = plain_state(1)
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        assert saver.save(model, optimizer, state) < 1.0
        model["conv.weight"].zero_()
        optimizer["mean"].zero_()
        state["sessions"].append("later")
        assert saver.finished() == []
        may_write.set()
        saver.wait()
        (saved,) = saver.finished()
        assert saver.finished() == []
        check_loaded(folder.load(), 1)
    assert saved.path == tmp_path / "m" / "generations" / "1"
    assert saved.iterations == 1


def test_two_saves_never_overlap_and_the_wait_is_told(tmp_path, monkeypatch):
    """Seconds of a clock that each save moves by one, once the next one waits for it."""
    under_way, most, seconds = [], [], []
    is_waited_for = threading.Semaphore(0)
    write, wait = ModelFolder.save, Saver.wait

    def slow(folder: ModelFolder, *arguments):
        under_way.append(1)
        most.append(len(under_way))
        is_waited_for.acquire()
        seconds.append(1)
        path = write(folder, *arguments)
        under_way.pop()
        return path

    def waiting(saver: Saver) -> None:
        if saver._pending is not None:
            is_waited_for.release()
        wait(saver)

    monkeypatch.setattr(ModelFolder, "save", slow)
    monkeypatch.setattr(Saver, "wait", waiting)
    clock = SimpleNamespace(monotonic=lambda: len(seconds))
    monkeypatch.setattr("mien.core.checkpoint.saver.time", clock)
    with new_folder(tmp_path / "m", keep_generations=9) as folder, Saver(folder) as saver:
        waits = [saver.save(*tensors(i), plain_state(i)) for i in (1, 2, 3)]
        saver.wait()
        assert [saved.iterations for saved in saver.finished()] == [1, 2, 3]
        check_loaded(folder.load(), 3)
    assert most == [1, 1, 1]
    assert waits == [0, 1, 1]
    assert names(tmp_path / "m") == ["1", "2", "3"]


def test_the_savers_buffers_follow_tensors_that_change_shape(tmp_path):
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        for iterations, tensor in enumerate(
            (torch.randn(3), torch.randn(4), torch.arange(4), torch.randn(2, 2)), start=1
        ):
            saver.save({"x": tensor}, None, plain_state(iterations))
            saver.wait()
            assert torch.equal(folder.load().model["x"], tensor)


@pytest.mark.parametrize("call", ["wait", "finished", "save", "close"])
def test_a_failure_in_the_thread_surfaces_at_the_next_call(tmp_path, monkeypatch, call):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with new_folder(tmp_path / "m") as folder:
        saver = Saver(folder)
        saver.save(*tensors(1), plain_state(1))
        saver.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            saver.save(*tensors(2), plain_state(2))
            concurrent.futures.wait([saver._pending])
        text = "No space left on device; free space and start again: .* iteration 1$"
        with pytest.raises(SaveError, match=text):
            saver.save(*tensors(3), plain_state(3)) if call == "save" else getattr(saver, call)()
        if call != "close":
            saver.save(*tensors(4), plain_state(4))  # told once, and it goes on
            saver.close()
            check_loaded(folder.load(), 4)


def test_the_thread_waits_on_the_gpu_whose_copies_it_awaits(tmp_path, monkeypatch):
    current, awaited = ["cuda:0"], []

    @contextlib.contextmanager
    def device(other):
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    event = SimpleNamespace(device="cuda:1", synchronize=lambda: awaited.append(current[-1]))
    monkeypatch.setattr(Saver, "_stage", lambda *_: [(event, [])])
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        saver._buffers["model/x"] = torch.ones(2)
        saver.save({"x": torch.ones(2)}, None, plain_state(1))
        saver.wait()
    assert awaited == ["cuda:1"]


@pytest.mark.gpu
@pytest.mark.parametrize("has_room", [True, False])
def test_the_saver_copies_from_a_gpu_beside_the_training(tmp_path, monkeypatch, has_room):
    if not has_room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    weight = torch.zeros(64, 64, 128, 128, device="cuda").to(memory_format=torch.channels_last)
    with new_folder(tmp_path / "m") as folder, Saver(folder) as saver:
        for iterations in range(1, 4):
            weight.add_(1.0)
            saver.save({"x": weight, "host": torch.ones(2)}, None, plain_state(iterations))
            for _ in range(50):
                weight.add_(1.0)
            weight.sub_(50.0)
            saver.wait()
            held = folder.load().model["x"]
            assert torch.equal(held, torch.full_like(held, float(iterations)))
    assert all(buffer.is_pinned() for name, buffer in saver._buffers.items() if name[-1] == "x")


def test_config_is_the_one_written_last(tmp_path):
    config = from_dict({"train": {"batch_size": 3}})
    with new_folder(tmp_path / "m") as folder:
        save(folder, 1)
        folder.write_config(config)
        save(folder, 2)
        assert folder.load().config == to_dict(config)
    with ModelFolder(tmp_path / "m") as folder:
        folder.load()
        save(folder, 3)  # without a new one, the loaded one goes on
        assert folder.load().config == to_dict(config)


def test_a_folder_made_for_nothing_does_not_stay(tmp_path):
    with ModelFolder(tmp_path / "model"):
        assert (tmp_path / "model").is_dir()
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    ModelFolder(tmp_path / "model").close()
    assert (tmp_path / "model").is_dir(), "what the user made is the user's"
