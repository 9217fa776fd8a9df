"""`mien model`: what it tells, finds, restores and writes; a kill leaves the old or the new."""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_options
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mien import models
from mien.cli import main
from mien.cli.monitor.watch import Watch
from mien.core.checkpoint.format import digest_of
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.state import TrainingState
from mien.core.checkpoint.verify import facts_of, verify
from mien.core.config import Config, from_dict, model_settings
from mien.core.console.reporter import Reporter
from mien.core.console.tensorboard import TensorBoardLog
from mien.core.history import restore as restoring
from mien.core.history.history import read_history
from mien.core.history.restore import restore

RUN_ID, OTHER_RUN_ID = "0123456789abcdef" * 2, "f" * 32
CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "link")


def _state(iterations, run_id=RUN_ID, config=None):
    state = TrainingState(trainer="original", run_id=run_id)
    for _ in range(iterations // 2):  # a session of two iterations for each save
        state.begin_session(config or Config(), started=0.0)
        state.advance(2)
    return state.to_dict()


def _save(folder, iterations, run_id=RUN_ID, value=None):
    model = {"weight": torch.full((5,), float(iterations if value is None else value))}
    return folder.save(model, {"mean": torch.zeros(3)}, _state(iterations, run_id))


def _folder(path, keep=9):
    folder = ModelFolder(path, keep_generations=keep)
    folder.write_config(Config())
    return folder


@pytest.fixture
def model(tmp_path):
    """A model with saves at 2, 4 and 6 iterations, the backup at 4, logs of three sessions."""
    path = tmp_path / "m"
    with _folder(path) as folder:
        for iterations in (2, 4, 6):
            generation = _save(folder, iterations)
            if iterations == 4:
                folder.back_up(generation)
                folder.snapshot()
    for number in (1, 2, 3):
        (path / f"logs/session_{number}").mkdir(parents=True)
    return path


def _in_use(path):
    with ModelFolder(path, read_only=True) as folder:
        generation = folder.load()
        assert folder.warnings == []
    assert torch.equal(
        generation.model["weight"], torch.full((5,), 1.0 * generation.state["iterations"])
    )
    return generation.state["iterations"]


def _spoil(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # a copy may be the same file
    file.write_bytes(content)


def _run(capsys, *words):
    code = main(["model", *map(str, words)])
    return code, capsys.readouterr()


def _files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# info


def test_info_tells_what_there_is(model, capsys):
    before = _files(model)
    code, told = _run(capsys, "info", model, "--json")
    assert code == 0
    facts = json.loads(told.out)
    assert facts["trainer"] == "original"
    assert (facts["input_px"], facts["output_px"]) == (64, [64])
    built = models.meta_model("original", **model_settings(Config()))
    assert facts["parameters"] == sum(p.numel() for p in built.parameters())
    assert facts["iterations"] == 6
    assert [session["number"] for session in facts["sessions"]] == [1, 2, 3]
    assert [save["name"] for save in facts["generations"]] == ["6", "4", "2"]
    assert facts["generations"][0]["size_bytes"] > 100
    assert facts["backup"]["iterations"] == 4
    assert facts["snapshots"] == [str(model) + "_snapshot_4_iters"]
    assert (facts["run_id"], facts["in_use_by"]) == (RUN_ID, None)
    assert _files(model) == before
    code, told = _run(capsys, "info", model)
    assert code == 0
    assert f"model        original in {model}\n" in told.out
    assert "in use       by no run\n" in told.out


def test_info_counts_one_iteration_in_the_singular(tmp_path, capsys):
    with _folder(tmp_path / "m") as folder:
        state = _state(2)
        state["iterations"] = state["sessions"][0]["iterations"] = 1
        folder.save({"weight": torch.ones(5)}, {"mean": torch.zeros(3)}, state)
    _, told = _run(capsys, "info", tmp_path / "m")
    assert "1 iteration\n" in told.out


def test_info_tells_who_holds_the_folder_and_a_run_can_begin_meanwhile(model):
    with ModelFolder(model):
        assert facts_of(model)["in_use_by"] == f"process {os.getpid()}"
    assert facts_of(model)["in_use_by"] is None
    ModelFolder(model).close()


def test_info_tells_what_is_a_copy_and_what_a_link(model, capsys):
    _, told = _run(capsys, "info", model)
    snapshot = f"{model}_snapshot_4_iters"
    assert f"snapshots    {snapshot}, a copy\n" in told.out
    assert re.search(r"\nbackup       backup, iteration 4, .* MiB, a copy\n", told.out)
    assert facts_of(model)["linked"] == []
    for copy in (model / "backup", Path(snapshot) / "generations/4"):  # as earlier versions made it
        (copy / "model.safetensors").unlink()
        os.link(model / "generations/4/model.safetensors", copy / "model.safetensors")
    _, told = _run(capsys, "info", model)
    assert told.out.count(", hard links to a save, not a copy\n") == 2
    assert facts_of(model)["linked"] == [str(model / "backup"), snapshot]


def test_info_of_a_damaged_save_says_what_to_do(model, capsys):
    _spoil(model / "generations/6/state.json")
    code, told = _run(capsys, "info", model)
    assert code == 2
    assert told.err.endswith(f"`mien model verify {model}` tells what is whole\n")


# verify


def test_verify_a_whole_model_and_a_snapshot(model, capsys):
    before = _files(model)
    with ModelFolder(model):  # as while training runs
        code, told = _run(capsys, "verify", model)
    assert code == 0
    assert [line.split()[:2] for line in told.out.splitlines()] == [
        ["generations/2", "whole,"],
        ["generations/4", "whole,"],
        ["generations/6", "whole,"],
        ["backup", "whole,"],
    ]
    assert {file: c for file, c in _files(model).items() if file.name != ".lock"} == {
        file: c for file, c in before.items() if file.name != ".lock"
    }
    code, told = _run(capsys, "verify", f"{model}_snapshot_4_iters")
    assert (code, told.out.count("whole")) == (0, 1)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "config.toml", "state.json"]
)
def test_verify_names_what_is_damaged(model, capsys, file):
    _spoil(model / "generations/6" / file)
    code, told = _run(capsys, "verify", model)
    assert code == 2
    assert f"generations/6        DAMAGED: {file} does not match its SHA-256" in told.out
    assert told.out.endswith(
        "training goes on from the newest whole save; the damaged one is left as it is\n"
    )
    code, told = _run(capsys, "verify", model, "--json")
    assert code == 2
    damage = {verdict["name"]: verdict["damage"] for verdict in json.loads(told.out)}
    assert [name for name, said in damage.items() if said] == ["generations/6"]


@pytest.mark.parametrize("name", ["state.json", "config.toml", "model.safetensors"])
def test_a_file_of_holes_is_refused_before_it_is_read(model, capsys, name):
    """It takes no room on the disk, and a stranger's manifest may name any size."""
    folder = model / "generations" / str(_in_use(model))
    os.truncate(folder / name, 1 << 40)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["files"][name]["size"] = 1 << 40
    manifest["digest"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, told = _run(capsys, "verify", model)
    assert code == 2
    assert f"DAMAGED: {name} has {1 << 40} bytes, more than the" in told.out
    with ModelFolder(model, read_only=True) as opened:
        assert opened.load().state["iterations"] == 4, "the save before it"


def test_verify_says_that_the_backup_helps(model, capsys):
    for name in (2, 4, 6):
        _spoil(model / f"generations/{name}/model.safetensors")
    code, told = _run(capsys, "verify", model)
    assert code == 2
    assert told.out.endswith(f"but the backup is: `mien model restore {model}`\n")
    assert _run(capsys, "restore", model)[0] == 0
    assert _in_use(model) == 4
    _spoil(model / "backup/model.safetensors")
    _spoil(model / "generations/4-2/model.safetensors")
    assert _run(capsys, "verify", model)[1].out.endswith("--snapshot FOLDER`, or a copy\n")


def test_verify_sees_a_pointer_to_nothing(model):
    shutil.rmtree(model / "generations/6")
    assert [v.name for v in verify(model) if v.damage] == ["state.json"]
    (model / "state.json").write_text("{")
    assert [v.damage for v in verify(model) if v.damage] == ["state.json is not valid JSON"]


def test_verify_passes_over_what_a_run_puts_away_meanwhile(model, monkeypatch):
    from mien.core.checkpoint import verify as inspection

    check = inspection.check_generation

    def retired(folder, manifest):
        if folder.name == "2":
            shutil.rmtree(folder)
        check(folder, manifest)

    monkeypatch.setattr(inspection, "check_generation", retired)
    assert [v.name for v in verify(model)] == ["generations/4", "generations/6", "backup"]


def test_nothing_saved_and_no_folder_are_one_line(tmp_path, capsys):
    _folder(tmp_path / "m").close()
    for verb in ("info", "verify", "restore", "nan-scan"):
        code, told = _run(capsys, verb, tmp_path / "m")
        assert (code, told.err.count("\n")) == (2, 1), verb
        code, told = _run(capsys, verb, tmp_path / "none")
        assert (code, told.err.count("\n")) == (2, 1), verb
        assert not (tmp_path / "none").exists()


# restore


def test_restore_the_backup(model, capsys):
    (model / "config.toml").write_text("# newer\n")
    code, told = _run(capsys, "restore", model, "--json")
    assert code == 0
    done = json.loads(told.out)
    assert (done["iterations"], done["generation"]) == (4, "4-2")
    assert done["archived"] == ["6", "logs/session_3"]
    assert _in_use(model) == 4
    archive = model / os.path.basename(done["archive"])
    assert sorted(os.listdir(archive)) == ["config.toml", "generations", "logs", "state.json"]
    assert json.loads((archive / "state.json").read_text())["iterations"] == 6
    assert (archive / "config.toml").read_text() == "# newer\n"
    assert "[model]" in (model / "config.toml").read_text()
    assert os.listdir(archive / "logs") == ["session_3"]
    assert sorted(os.listdir(model / "logs")) == ["session_1", "session_2"]
    assert sorted(os.listdir(model / "generations")) == ["2", "4", "4-2"]
    assert json.loads((model / "state.json").read_text())["generation"] == "4-2"
    assert not any(verdict.damage for verdict in verify(model))
    with _folder(model, keep=1) as folder:  # and training goes on
        folder.load()
        _save(folder, 6)
    assert _in_use(model) == 6
    code, told = _run(capsys, "restore", model, "--generation", "6")
    assert told.out == "iteration 6 is in use already; nothing was changed\n"


def _log(path, session, iterations):
    """Log iterations of a session, as a run does."""
    log = TensorBoardLog(path, session, iterations[0])
    for iteration in iterations:
        log.scalars({"batch_total": 1.0, "batch_face_a": iteration}, iteration, 1e9 + iteration)
    log.close()
    with (path / f"logs/session_{session}/events.jsonl").open("a") as stream:
        reporter = Reporter(stream, as_json=True)
        reporter.start({"trainer": "original"})
        reporter.step(
            iteration=iterations[-1], loss_a=0.1, loss_b=0.2, eg_per_s=50.0, data_wait=0.0
        )
        reporter.stop(iteration=iterations[-1], reason="as it was asked", exit_code=0)


def _shown(path):
    """The iterations that `mien analyze` shows of each session, and TensorBoard."""
    sessions = {one.number: one.iterations_n.tolist() for one in read_history(path).sessions}
    for number in sessions:
        board = EventAccumulator(str(path / f"logs/session_{number}/train"))
        board.Reload()
        steps = [event.step for event in board.Scalars("batch_face_a")]
        assert steps == sessions[number]
    return sessions


def test_what_restoring_undid_is_shown_no_more(model):
    """Neither by `mien analyze`, nor by TensorBoard, nor on the page of `mien monitor`."""
    _log(model, 1, [1, 2])
    _log(model, 2, [3, 4, 5, 6, 7])  # saved up to 4
    _log(model, 3, [5, 6])
    (model / "preview.png").write_bytes(b"a picture of iteration 6")
    (model / "sheet.png").write_bytes(b"a sheet of iteration 6")
    done = restore(model)
    assert done.archived == ["6", "logs/session_3", "preview.png", "sheet.png"]
    assert (done.archive / "preview.png").read_bytes() == b"a picture of iteration 6"
    assert _shown(model) == {1: [1, 2], 2: [3, 4]}
    status = Watch(model, may_ask=False).status()
    assert (status["state"], status["preview"], status["sheet"]) == ("restored", None, None)
    assert set(status["latest"]) == {"restore"}
    assert status["latest"]["restore"]["iteration"] == 4
    assert "step" not in {event["event"] for event in status["events"]}
    _log(model, 3, [5, 6])  # and training goes on
    assert _shown(model) == {1: [1, 2], 2: [3, 4], 3: [5, 6]}
    assert Watch(model, may_ask=False).status()["latest"]["step"]["iteration"] == 6


def test_what_is_restored_again_is_shown_again(model):
    _log(model, 1, [1, 2, 3, 4])
    _log(model, 2, [3, 4])
    _log(model, 3, [5, 6])
    first = restore(model, generation="2")
    assert _shown(model) == {1: [1, 2]}
    restore(model, snapshot=first.archive)
    shutil.copytree(first.archive / "logs", model / "logs", dirs_exist_ok=True)
    restored = restore(model)
    assert _shown(model) == {1: [1, 2], 2: [3, 4]}
    restore(model, snapshot=restored.archive)
    shutil.copytree(restored.archive / "logs", model / "logs", dirs_exist_ok=True)
    assert _shown(model) == {1: [1, 2], 2: [3, 4], 3: [5, 6]}


def test_what_was_archived_can_be_restored(model):
    done = restore(model)
    assert restore(model, snapshot=done.archive).iterations == 6
    assert _in_use(model) == 6


def test_restore_a_generation_and_a_snapshot(model):
    assert restore(model, generation="2").archived == ["4", "6", "logs/session_2", "logs/session_3"]
    assert _in_use(model) == 2
    snapshot = model.with_name("m_snapshot_4_iters")
    assert restore(model, snapshot=snapshot).archived == ["2-2"], "what was in use stays kept"
    assert _in_use(model) == 4
    assert _in_use(snapshot) == 4


def test_a_damaged_manifest_is_archived_as_it_is(model):
    _spoil(model / "generations/6/manifest.json")
    done = restore(model)
    assert done.archived == ["6", "logs/session_3"]
    assert (done.archive / "generations/6/model.safetensors").exists()
    assert _in_use(model) == 4


def test_restore_refusals(model, tmp_path, capsys):
    def refusal(*words):
        code, told = _run(capsys, "restore", *words)
        assert code == 2
        assert told.err.count("\n") == 1
        return told.err

    before = _files(model)
    assert "has no generation '../x'; it has: 2, 4, 6, backup" in refusal(
        model, "--generation", "../x"
    )
    with ModelFolder(model):
        assert f"is in use by process {os.getpid()}; stop that run" in refusal(model)
    with _folder(tmp_path / "other") as folder:
        _save(folder, 2, OTHER_RUN_ID)
    assert "is of another run" in refusal(model, "--snapshot", tmp_path / "other")
    with _folder(tmp_path / "light") as folder:
        state = _state(2) | {"trainer": "lightweight"}
        folder.save({"weight": torch.zeros(5)}, None, state)
    said = refusal(model, "--snapshot", tmp_path / "light", "--force")
    assert "is a model of lightweight, and" in said
    assert "has no backup yet" in refusal(tmp_path / "other")
    _spoil(model / "backup/model.safetensors")
    assert "backup is damaged (model.safetensors does not match" in refusal(model)
    after = _files(model)
    after[model / "backup/model.safetensors"] = before[model / "backup/model.safetensors"]
    after[model / ".lock"] = before[model / ".lock"]
    assert after == before
    assert restore(model, snapshot=tmp_path / "other", force=True).iterations == 2
    assert _in_use(model) == 2


class Crash(BaseException):
    """The process ends here: nothing after this reaches the disk."""


def _breaking(patch, break_at, failure):
    """Break from the chosen call that changes the disk on; how many there were, in a list."""
    count = [0]

    def broken(call):
        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] >= break_at:
                raise failure
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        patch.setattr(os, name, broken(getattr(os, name)))
    return count


@pytest.mark.parametrize("failure", [Crash(), OSError(5, os.strerror(5))], ids=["killed", "disk"])
def test_a_kill_at_any_call_leaves_one_of_both_in_use_and_loses_nothing(tmp_path, failure):
    seen = set()
    for break_at in range(1, 200):
        path = tmp_path / str(break_at)
        with _folder(path) as folder:
            for iterations in (2, 4, 6):
                generation = _save(folder, iterations)
                if iterations == 4:
                    folder.back_up(generation)
        (path / "logs/session_3").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            count = _breaking(patch, break_at, failure)
            with contextlib.suppress(Crash, ValueError):
                restore(path)
        if count[0] < break_at:
            break
        in_use = _in_use_after_a_crash(path)
        seen.add(in_use)
        with _folder(path, keep=1) as folder:  # training keeps no more than it has to
            folder.load()
            _save(folder, in_use + 4)
        kept = {file.read_bytes() for file in path.rglob("model.safetensors")}
        assert len(kept) >= (2 if in_use == 6 else 3), f"call {break_at}"
        shutil.rmtree(path)
    assert seen == {4, 6}
    assert break_at > 30


def test_a_full_disk_is_one_line(model):
    with pytest.MonkeyPatch.context() as patch:
        _breaking(patch, 6, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(ValueError, match="No space left on device; mend that and give the"):
            restore(model)
    assert _in_use(model) == 6


def _in_use_after_a_crash(path):
    with ModelFolder(path) as folder:
        generation = folder.load()
    return generation.state["iterations"]


def test_the_same_command_finishes_what_a_kill_interrupted(model):
    def die(*_):
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "_move_out", die)
        with pytest.raises(Crash):
            restore(model)
    assert _in_use(model) == 4
    done = restore(model)
    assert (done.generation, done.archived) == ("4-2", ["6", "logs/session_3"])
    assert sorted(os.listdir(model / "generations")) == ["2", "4", "4-2"]
    assert restore(model).archive is None


# nan-scan


def test_nan_scan_counts(tmp_path, capsys):
    path = tmp_path / "m"
    bad = torch.zeros(4, 5)
    bad[1, 2], bad[0, 0], bad[3, 4] = float("nan"), float("inf"), float("-inf")
    with _folder(path) as folder:
        _save(folder, 2)
        eight_bits = torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)
        state = _state(4)
        folder.save(
            {"w": bad, "steps": torch.tensor(3)},
            {"m": torch.full((2,), float("inf")).half()},
            state,
        )
    code, told = _run(capsys, "nan-scan", path)
    assert code == 2
    assert told.out.splitlines()[:2] == [
        "model: w: 1 NaN and 2 infinite of 20",
        "optimizer: m: 0 NaN and 2 infinite of 2",
    ]
    code, told = _run(capsys, "nan-scan", path, "--generation", "2")
    assert (code, told.out) == (
        0,
        "0 of 2 tensors of generation 2 hold numbers that are not finite: it is clean\n",
    )
    with _folder(path) as folder:
        folder.load()
        folder.save({"e": eight_bits}, None, _state(6))
    code, told = _run(capsys, "nan-scan", path, "--json")
    assert code == 2
    assert json.loads(told.out) == {
        "generation": "6",
        "num_tensors": 1,
        "not_finite": [
            {"file": "model", "tensor": "e", "nan": 1, "infinite": 0, "total": 2},
        ],
    }


# inference


def _trained(path, name="original", **more):
    """A folder with a save of a small model, and the model."""
    values = {"model": {"trainer": name, "options": tiny_options(name)}, **more}
    config = from_dict(values)
    built = models.build(name, seed=3, **model_settings(config))
    with ModelFolder(path) as folder:
        folder.write_config(config)
        state = TrainingState(trainer=name, run_id=RUN_ID, iterations=2).to_dict()
        folder.save(dict(built.state_dict()), None, state)
    return built


def _read(path):
    with safe_open(path, "pt") as stream:
        names = stream.keys()
        return {name: stream.get_tensor(name) for name in names}, stream.metadata()


def _rebuilt(path):
    tensors, metadata = _read(path)
    options = json.loads(metadata["options"])
    built = models.build(metadata["trainer"], seed=None, **options)
    for tensor in built.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    assert not built.load_state_dict(tensors, strict=False).unexpected_keys
    return built.eval(), metadata


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_inference_of_every_family(tmp_path, name, side):
    trained = _trained(tmp_path / "m", name).eval()
    target = tmp_path / "swap.safetensors"
    assert main(["model", "inference", str(tmp_path / "m"), "-o", str(target), "--side", side]) == 0
    built, metadata = _rebuilt(target)
    faces_bchw = torch.rand(1, 3, built.input_px, built.input_px)
    with torch.no_grad():
        for decoded in side if side != "both" else "ab":
            for ours, theirs in zip(
                built.swap(faces_bchw, decoded), trained.swap(faces_bchw, decoded), strict=True
            ):
                assert torch.equal(ours, theirs)
    assert metadata["side"] == side
    tensors, _ = _read(target)
    if side == "b" and not trained.has_one_decoder:
        assert not any(key.startswith("decoder_a.") for key in tensors)


def test_inference_metadata_and_precisions(tmp_path, capsys):
    more = {"loss": {"learn_mask": True}, "data": {"coverage": 75.0, "vertical_offset": -5}}
    trained = _trained(tmp_path / "m", **more).eval()
    target = tmp_path / "swap.safetensors"
    words = ["inference", tmp_path / "m", "-o", target]
    for number, (precision, bits) in enumerate((("fp32", 0), ("bf16", 8), ("fp16", 11))):
        code, told = _run(capsys, *words, "--precision", precision, *["--force"] * (number > 0))
        assert code == 0, told.err
        built, metadata = _rebuilt(target)
        tensors, _ = _read(target)
        assert {str(t.dtype) for t in tensors.values() if t.is_floating_point()} == {
            {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
        }
        for key, tensor in trained.state_dict().items():
            error = (tensors[key].float() - tensor).abs() / tensor.abs().clamp(min=1e-4)
            assert error.max() <= (2.0**-bits if bits else 0.0)
    faces_bchw = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert len(built.swap(faces_bchw, "b")) == 2, "the face and its mask"
    options = json.loads(metadata.pop("options"))
    assert options["learn_mask"] is True
    assert metadata == {
        "format": "pt",
        "weights": "raw",
        "schema": "mien.inference/1",
        "mien_version": metadata["mien_version"],
        "run_id": RUN_ID,
        "kind": "synthetic face model",
        "trainer": "original",
        "iterations": "2",
        "side": "both",
        "precision": "fp16",
        "input_px": "64",
        "output_px": "[64]",
        "centering": "face",
        "coverage": "75.0",
        "vertical_offset": "-5",
        "colour_order": "BGR",
    }


def test_inference_refusals(tmp_path, capsys):
    built = _trained(tmp_path / "m")
    target = tmp_path / "swap.safetensors"
    target.write_text("mine")

    def refusal(*words):
        code, told = _run(capsys, "inference", tmp_path / "m", *words)
        assert (code, told.err.count("\n")) == (2, 1)
        return told.err

    assert "exists; add --force to replace it" in refusal("-o", target)
    assert target.read_text() == "mine"
    assert "must end in .safetensors" in refusal("-o", tmp_path / "swap.pt")
    assert "is no folder; make it first" in refusal("-o", tmp_path / "no/swap.safetensors")
    inside = tmp_path / "m/generations/2/model.safetensors"
    assert "lies among the saves" in refusal("-o", inside, "--force")
    tensors = dict(built.state_dict())
    name = next(iter(tensors))
    for value, words, said in (
        (float("nan"), [], "not finite"),
        (1e6, ["--precision", "fp16"], "too large for fp16; use bf16 or fp32"),
    ):
        with ModelFolder(tmp_path / "m") as folder:
            folder.load()
            spoilt = tensors | {name: torch.full_like(tensors[name], value)}
            state = TrainingState(trainer="original", run_id=RUN_ID, iterations=4).to_dict()
            folder.save(spoilt, None, state | {"lowest_mean_loss": abs(hash(value)) / 1e20})
        assert said in refusal("-o", target, "--force", *words)
    with ModelFolder(tmp_path / "m") as folder:
        folder.load()
        del tensors[name]
        state = TrainingState(trainer="original", run_id=RUN_ID, iterations=6).to_dict()
        folder.save(tensors, None, state)
    assert "does not fit its own settings" in refusal("-o", target, "--force")
    assert target.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["m", "swap.safetensors"]


def test_inference_that_is_killed_leaves_nothing_and_a_failure_the_file_as_it_was(
    tmp_path, capsys, monkeypatch
):
    _trained(tmp_path / "m")
    target = tmp_path / "swap.safetensors"
    target.write_text("mine")

    class Killed(BaseException):
        pass

    for failure in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Killed()):

        def fail(_handle, failure=failure):
            raise failure

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            patch.setattr(os, "unlink", pytest.fail)  # a process that was killed removes nothing
            words = ["model", "inference", str(tmp_path / "m"), "-o", str(target), "--force"]
            if isinstance(failure, Killed):
                with pytest.raises(Killed):
                    main(words)
            else:
                assert main(words) == 2
                assert "No space left on device" in capsys.readouterr().err
        assert target.read_text() == "mine"
        assert sorted(os.listdir(tmp_path)) == ["m", "swap.safetensors"]


# Links


def test_a_link_where_a_run_would_write_is_refused(model, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in ("logs/session_9/events.jsonl", "logs/session_9", "timelapse/1.jpg"):
        link = model / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(mine)
        with pytest.raises(ValueError, match=f"m/{name} is a link, which a model folder may not"):
            ModelFolder(model)
        ModelFolder(model, read_only=True)
        link.unlink()
        if link.parent != model / "logs":
            link.parent.rmdir()
    ModelFolder(model).close()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["generations", "backup", "logs", "state.json", "faces"])
def test_a_link_in_a_model_folder_is_refused(model, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if (model / name).exists():
        os.rename(model / name, elsewhere / name)
    (model / name).symlink_to(elsewhere / name)
    for read_only in (True, False):
        with pytest.raises(ValueError, match=f"m/{name} is a link, which a model folder may not"):
            ModelFolder(model, read_only=read_only)
