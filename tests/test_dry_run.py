"""The dry run, the batch size that fits, and what is said where memory runs out."""

import json
import re
import tomllib

import pytest
import torch
from conftest import json_events

from mien.benchmarks import harness
from mien.cli import main
from mien.core import precision as precisions
from mien.core.config import from_dict
from mien.core.data.store import FaceStore
from mien.core.training import prepare
from mien.core.training.batch_size import choose
from mien.core.training.step import TrainStep


@pytest.fixture(scope="session")
def inputs(sides):
    return ["-A", str(sides[0]), "-B", str(sides[1])]


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch):
    """The ceilings of a card, as from an earlier benchmark."""
    measured = {"device": "a card", "num_sms": 2, "copy_gb_s": 30.0, "gemm_tflops": {"bf16": 0.4}}
    monkeypatch.setattr(harness, "known_ceilings", lambda: measured)


def _train(inputs, *more):
    tiny = ["-t", "lightweight", "--set", "model.options.width=8", "--device", "cpu"]
    return main(["train", *inputs, *tiny, *more])


def test_a_dry_run_tells_and_keeps_nothing(inputs, tmp_path, capsys):
    model_dir = tmp_path / "model"
    assert _train(inputs, "-m", str(model_dir), "-b", "4", "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert not model_dir.exists()
    assert facts["trainer"] == "lightweight"
    assert facts["batch_size"] == 4
    assert facts["precision"] == "fp32"
    assert len(facts["losses"]) == 2
    assert 0 < facts["losses"][0]["loss_a"] < 2
    assert (facts["device"], facts["gpu_memory_mib"]) == ("cpu", None)
    assert 100 < facts["peak_mib"] < facts["free_mib"]
    assert facts["roofline_eg_per_s"] > 0
    assert facts["roofline_precision"] == "bf16"
    assert facts["bound_by"] in ("products", "pointwise", "update", "gaps")
    assert _train(inputs, "-b", "4", "--dry-run") == 0, "it needs no model folder"
    said = capsys.readouterr().out
    assert f"parameters   {facts['parameters']:,}" in said
    assert "GPU memory" not in said, "there is none here to be spoken of"
    assert "dry run      a new model" in said
    assert "limited by the matrix products; no" in said or "the update of the weights; no" in said
    assert "nothing was kept" in said


@pytest.mark.parametrize(("mode", "own"), [("bf16", ""), ("fp32", "; this run is in fp32")])
def test_the_roofline_says_of_which_precision_it_is(inputs, capsys, mode, own):
    assert _train(inputs, "-b", "4", "--precision", mode, "--dry-run") == 0
    line = (
        r"roofline     [\d,]+ EG/s in bf16 on a card, .*; no run in bf16 can be faster, good ones "
    )
    assert re.search(rf"{line}reach half of it{own}\n", capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32", "auto"])
@pytest.mark.parametrize("has_units", [True, False])
def test_16_bits_on_a_cpu_without_units_are_warned_of_once(
    inputs, tmp_path, monkeypatch, capsys, mode, has_units
):
    lacking = frozenset() if has_units else frozenset({torch.bfloat16, torch.float16})
    monkeypatch.setattr(precisions, "types_without_units", lambda: lacking)
    words = ("-b", "4", "--precision", mode)
    is_warned = mode in ("bf16", "fp16") and not has_units
    for more in (("--dry-run",), ("-m", str(tmp_path / "model"), "-i", "1")):
        assert _train(inputs, *words, *more) == 0
        said = capsys.readouterr().out
        warned = said.count(f"Warning: this CPU has no units for {mode}, in which a step takes 1 ")
        assert warned == is_warned
        assert said.count("set precision.mode to fp32") == is_warned
    if mode == "auto":
        assert precisions.resolve(mode, torch.device("cpu")).name == "fp32"


def test_what_several_ranks_would_bring_is_predicted(inputs, capsys):
    words = ("-b", "4", "--gpus", "2", "--dry-run")
    assert _train(inputs, *words, "--json") == 0
    scaling = json.loads(capsys.readouterr().out)["scaling"]
    assert (scaling["gpus"], scaling["link"]) == (2, "gloo on this machine")
    # The one process had the cores of both.
    assert 0 < scaling["speedup"] < 1
    assert 0 < scaling["speedup_at_as_many_faces_a_gpu"] < 1
    assert scaling["distribution"] in ("mirrored", "sharded")
    assert _train(inputs, *words) == 0
    said = capsys.readouterr().out
    line = (
        r"scaling      2 processes over gloo on this machine \(assumed\): \d\.\dx at batch size 4 "
    )
    assert re.search(rf"{line}\(2 faces each\); .*; predicted\n", said)
    assert "warning      2 processes are slower than one here: train on one\n" in said
    assert _train(inputs, *words[:2], *words[4:]) == 0
    assert "scaling" not in capsys.readouterr().out


def test_an_automatic_batch_is_that_of_all_ranks(inputs, capsys):
    words = ("-b", "auto:4", "--gpus", "2", "--dry-run")
    assert _train(inputs, *words, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["batch_size"], facts["measured_batch_size"]) == (8, 4)
    assert _train(inputs, *words) == 0
    said = capsys.readouterr().out
    assert "batch size   8; of one GPU, whose steps follow, 4\n" in said
    assert "at batch size 8 (4 faces each); " in said


@pytest.mark.parametrize(("batch_size", "share"), [("6", 3), ("5", 3)])
def test_of_a_batch_that_is_set_one_gpu_has_its_share(inputs, batch_size, share, capsys):
    """The whole of it may not fit on one, and takes longer than a step of the run will."""
    words = ("-b", batch_size, "--gpus", "2", "--dry-run")
    assert _train(inputs, *words, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["batch_size"], facts["measured_batch_size"]) == (int(batch_size), share)
    assert _train(inputs, *words) == 0
    said = capsys.readouterr().out
    assert f"batch size   {batch_size}; of one GPU, whose steps follow, {share}\n" in said
    assert f"at batch size {batch_size} (" in said


def test_a_batch_of_all_gpus_that_a_side_cannot_fill_is_refused(inputs, capsys):
    """Its share would fit: the run is asked for, not the step."""
    assert _train(inputs, "-b", "48", "--gpus", "2", "--dry-run") == 2
    assert "train.batch_size is 48, but side" in capsys.readouterr().err
    assert _train(inputs, "-b", "1", "--gpus", "2", "--dry-run") == 2
    assert "train.batch_size must be at least 2" in capsys.readouterr().err


BY_A_FLAG = "it was set by a flag, for that session"

RECIPE = """
[[stage]]
name = "learn"
iterations = 2

[[stage]]
name = "slow"
rate_factor = 0.5
set.augment.warp = false
iterations = 9
"""


def _files(folder):
    """Every file with its time, less the lock, which is taken to look at the folder."""
    found = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return {path: time for path, time in found.items() if path.name != ".lock"}


def test_a_dry_run_of_a_model_takes_its_next_steps_and_leaves_it_alone(inputs, tmp_path, capsys):
    model_dir, recipe = tmp_path / "model", tmp_path / "two.toml"
    recipe.write_text(RECIPE)
    lasting = ("--set", "train.batch_size=4", "--set", "loss.loss_function_2=mae")
    lasting += ("--set", "optimizer.learning_rate=1e-3", "--recipe", str(recipe))
    assert _train(inputs, "-m", str(model_dir), *lasting, "-i", "3") == 0
    before = _files(tmp_path)
    capsys.readouterr()
    words = ["train", "-m", str(model_dir), "--device", "cpu", "--json"]
    assert main([*words, "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert _files(tmp_path) == before
    assert (facts["trainer"], facts["batch_size"], facts["iterations"]) == ("lightweight", 4, 3)
    assert facts["learning_rate"] == 5e-4
    assert facts["stages"][1].startswith("2 slow")
    assert facts["stages"][1].endswith("(now, since iteration 2)")
    assert main([*words, "-i", "2", "--set", "train.log_interval=1"]) == 0
    events = json_events(capsys.readouterr().out)
    steps = [event for event in events if event["event"] == "step"]
    trained = [{name: step[name] for name in ("loss_a", "loss_b")} for step in steps]
    assert facts["losses"] == trained, "the same two steps, bit for bit"


def test_print_config_of_a_model_prints_its_settings(inputs, tmp_path, capsys):
    model_dir = tmp_path / "model"
    lasting = ("--set", "train.batch_size=4", "--set", "loss.loss_function_2=mae")
    assert _train(inputs, "-m", str(model_dir), *lasting, "-i", "1", "-W") == 0
    before = _files(tmp_path)
    capsys.readouterr()
    assert main(["train", "-m", str(model_dir), "--no-flip", "--print-config"]) == 0
    said = capsys.readouterr()
    printed = tomllib.loads(said.out)
    assert printed["model"]["trainer"] == "lightweight"
    assert printed["model"]["options"] == {"width": 8}
    assert (printed["train"]["batch_size"], printed["loss"]["loss_function_2"]) == (4, "mae")
    assert printed["data"]["input_a"] == [inputs[1]]
    assert printed["augment"]["warp"] is True, "the flag of the last session is over"
    assert printed["augment"]["flip"] is False, "as this command line would train"
    assert "Note: changed since the last session: augment.warp: false -> true; it was" in said.err
    assert main(["train", "-m", str(model_dir), "-t", "original", "--print-config"]) == 2
    assert "holds a model of lightweight, not of original" in capsys.readouterr().err
    assert _files(tmp_path) == before


def test_a_mistake_in_a_dry_run_is_one_line(inputs, tmp_path, capsys):
    assert _train(inputs, "-b", "27", "--dry-run") == 2
    assert capsys.readouterr().err.endswith("or less, or add faces\n")
    assert _train(inputs, "-b", "2", "--gpus", "3", "--dry-run") == 2
    assert "train.batch_size must be at least 3, " in capsys.readouterr().err


def _start(capsys):
    """The event of the start, and its changes: names, old and new values, notes."""
    events = json_events(capsys.readouterr().out)
    start = next(event for event in events if event["event"] == "start")
    return start, [tuple(change.values()) for change in start["changes"]]


@pytest.mark.parametrize(
    ("limit", "free_mib", "bound", "sizes"),
    [
        ("", 880, "memory", range(4, 26, 4)),
        ("", 1 << 20, "faces", (26,)),
        (":16", 1 << 20, "limit", (16,)),
        (":10", 1 << 20, "limit", (8,)),
        (":256", 1 << 20, "faces", (26,)),
    ],
)
def test_auto_chooses_what_fits_and_tells_why(
    inputs, tmp_path, monkeypatch, capsys, limit, free_mib, bound, sizes
):
    monkeypatch.setattr(prepare, "free_bytes", lambda *_: free_mib * 2**20)
    words = ("-m", str(tmp_path / "model"), "-b", f"auto{limit}", "-i", "1")
    assert _train(inputs, *words, "--json") == 0
    start, _ = _start(capsys)
    assert start["batch_size"] in sizes
    assert start["batch_size_bound"] == bound


def test_auto_goes_no_further_than_64_unless_asked():
    precision = precisions.resolve("fp32", torch.device("cpu"))
    tiny = {"model": {"trainer": "lightweight", "options": {"width": 8}}}
    many = {"a": 10_000, "b": 9_000}

    def chosen(batch_size):
        config = from_dict(tiny | {"train": {"batch_size": batch_size}})
        return choose(config, many, precision, lambda: 1 << 42)

    assert (chosen("auto").size, chosen("auto:256").size) == (64, 256)
    assert chosen("auto").why == "auto: it goes no further than 64; -b auto:256 would allow more"
    assert (chosen(300).size, chosen(300).bound) == (300, None)
    with pytest.raises(ValueError, match="train.auto_batch_limit must be a whole number from 4"):
        chosen("auto:2")
    with pytest.raises(ValueError, match="train.batch_size must be auto or a whole number"):
        chosen("auto:many")


def test_auto_is_saved_as_such_and_told_at_every_start(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "free_bytes", lambda *_: 1 << 40)
    words = ("-m", str(tmp_path / "model"), "-i", "1", "--json")
    assert _train(inputs, *words, "--set", "train.batch_size=auto:12") == 0
    assert _start(capsys)[0]["batch_size"] == 12
    saved = tomllib.loads((tmp_path / "model/config.toml").read_text())["train"]
    assert (saved["batch_size"], saved["auto_batch_limit"]) == ("auto", 12)
    monkeypatch.setattr(prepare, "free_bytes", lambda *_: 880 << 20)
    assert main(["train", *words, "--device", "cpu", "--set", "train.auto_batch_limit=8"]) == 0
    start, changes = _start(capsys)
    assert (start["batch_size"], start["batch_size_bound"]) == (8, "limit")
    assert changes[-1] == ("train.batch_size", 12, 8, "auto has chosen it")
    assert _train(inputs, *words, "-b", "4") == 0
    assert ("train.batch_size", "auto", 4, None) in _start(capsys)[1]
    assert main(["train", *words, "--device", "cpu"]) == 0
    start, changes = _start(capsys)
    assert start["batch_size"] == 8, "a flag holds for its session"
    assert ("train.batch_size", 4, "auto", BY_A_FLAG) in changes


def test_auto_by_a_flag_is_not_the_batch_of_later_sessions(inputs, tmp_path, capsys):
    words = ("-m", str(tmp_path / "model"), "-i", "1", "--json")
    assert _train(inputs, *words, "-b", "auto") == 0
    assert _start(capsys)[0]["batch_size"] == 26
    assert main(["train", *words, "--device", "cpu"]) == 0
    start, changes = _start(capsys)
    assert start["batch_size"] == 16
    assert ("train.batch_size", "auto", 16, BY_A_FLAG) in changes


def test_where_nothing_fits_auto_says_so(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "free_bytes", lambda *_: 2**20)
    assert _train(inputs, "-m", str(tmp_path / "none"), "-b", "auto", "-i", "1") == 2
    assert "out of GPU memory: lightweight" in capsys.readouterr().err


def test_where_memory_runs_out_the_nearest_setting_is_named(inputs, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(TrainStep, "forward", fail)
    monkeypatch.setattr(prepare, "free_bytes", lambda *_: 880 * 2**20)
    assert _train(inputs, "-m", str(tmp_path / "model"), "-b", "26", "-i", "1") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    needs = r"out of GPU memory: lightweight in fp32 needs about ([\d,]+) MiB at batch size 26"
    (need,) = re.findall(needs, said)
    assert "use --batch-size " in said
    # What the faces take of a GPU is counted, though this process has reserved it as well.
    monkeypatch.setattr(FaceStore, "gpu_bytes", property(lambda store: 4096 * 2**20))
    assert _train(inputs, "-m", str(tmp_path / "model"), "-b", "26", "-i", "1") == 2
    said = capsys.readouterr().err
    (more,) = re.findall(needs, said)
    assert int(more.replace(",", "")) == int(need.replace(",", "")) + 2 * 4096
    assert "use --set data.placement=host " in said
