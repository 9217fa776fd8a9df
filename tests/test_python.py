"""The door for Python: `mien.core` trains, stops and swaps; the page about it is true."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from operator import attrgetter
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors
import torch

from mien import core
from mien.cli import main
from mien.core import Config, Outcome, load_model, read_crops, swap, train
from mien.core.checkpoint.weights import read_weights
from mien.core.config import from_dict, to_toml
from mien.core.config.advice import without_flags
from mien.core.data.decode import decode_one
from mien.core.distribute.ranks import ALONE, Ranks
from mien.core.faces.folder import read_face
from mien.core.faces.geometry import Crop
from mien.core.precision import round_products
from mien.core.training import fit, libraries
from mien.kernels.dense_norm import precision_of_products

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faces(sides):
    """The folder with the folders a and b."""
    return sides[0].parent


def _settings(faces, model_dir, iterations=3):
    return {
        "model": {"trainer": "lightweight", "options": {"width": 8}},
        "data": {f"input_{side}": str(faces / side) for side in "ab"},
        "train": {"batch_size": 4, "iterations": iterations},
        "save": {"model_dir": str(model_dir), "save_interval": 2},
    }


@pytest.fixture(scope="module")
def model_dir(faces, tmp_path_factory):
    """A trained model, and the events of its training."""
    path = tmp_path_factory.mktemp("model") / "m"
    events = []
    assert train(_settings(faces, path), on_event=events.append) is Outcome.DONE
    return path, events


def _crops(count=3, edge_px=64):
    return np.random.default_rng(0).integers(0, 256, (count, edge_px, edge_px, 3), np.uint8)


def test_the_import_loads_no_torch():
    code = "import sys, mien.core; dir(mien.core); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(core, "nothing_of_this_name")


def test_the_page_is_true(faces, tmp_path):
    """All its examples, one after another, in a folder with faces."""
    examples = _examples(ROOT / "docs" / "python.md")
    assert len(examples) == 4
    paths = [str(path) for path in sorted((faces / "a").iterdir())[:3]]
    _run([f"paths = {paths}", *examples, "assert losses[-1][0] == 6, losses"], faces, tmp_path)


def test_the_readme_is_true(faces, tmp_path):
    """Its example, of a narrow model that trains for two iterations."""
    (example,) = _examples(ROOT / "README.md")
    narrow = example.replace('"lightweight"}', '"lightweight", "options": {"width": 8}}')
    short = narrow.replace("10_000", "2")
    assert narrow != example
    assert short != narrow
    paths = [str(path) for path in sorted((faces / "a").iterdir())[:3]]
    _run([f"paths = {paths}", short, "assert faces_of_b.shape == (3, 64, 64, 3)"], faces, tmp_path)


def test_crops_are_those_that_training_cuts_out(faces, model_dir, tmp_path):
    model = dataclasses.replace(load_model(model_dir[0]), coverage=75.0, vertical_offset=-8)
    path = sorted((faces / "a").iterdir())[0]
    crops = read_crops(model, [str(path), path])
    assert crops.shape == (2, model.input_px, model.input_px, 3)
    expected = decode_one(read_face(path)[0], Crop("face", 0.75, -0.08, model.input_px))
    assert (crops == expected).all()
    no_face = tmp_path / "no_face.png"
    no_face.write_bytes(b"no picture")
    for paths, message in (
        ([], "paths must name one face file or more, got none"),
        ([path, no_face], f"^{re.escape(str(no_face))}: "),
        ([tmp_path / "missing.png"], f"^{re.escape(str(tmp_path / 'missing.png'))}: "),
    ):
        with pytest.raises(ValueError, match=message):
            read_crops(model, paths)


def _settings_of_the_process():
    """Settings of this process that a run has its own of."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "products": torch.backends.cudnn.conv.fp32_precision,
        "threads": torch.get_num_threads(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "seed": torch.get_rng_state().tolist(),
    }


def test_a_session_sets_libraries_for_itself_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(False)
    before, cpu = _settings_of_the_process(), torch.device("cpu")
    monkeypatch.setattr(libraries, "thread_count", lambda _: 2 * (before["threads"] + 1))
    with libraries.library_settings(cpu, Ranks(0, 2, 0, 2), deterministic=True):
        # As `precision.mode` and a model with dropout do.
        round_products(before["products"] != "tf32")
        torch.manual_seed(1)
        inside = _settings_of_the_process()
    assert all(inside[name] != value for name, value in before.items())
    assert _settings_of_the_process() == before


def _products():
    """Readings of PyTorch's switches for fp32 products; None where it refuses to tell."""
    backends = torch.backends
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    switches = [backends, matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn.matmul]
    readings = [switch.fp32_precision for switch in switches]
    for older in (
        lambda: matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            readings.append(older())
        except RuntimeError:
            readings.append(None)
    return readings


@pytest.fixture
def switches():
    """PyTorch's backends, their switches for fp32 products as PyTorch starts, also afterwards."""
    _set_back()  # an earlier test may have set them
    before = _products()
    yield torch.backends
    _set_back()
    assert _products() == before


def _set_back():
    backends = torch.backends
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for switch in (backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul):
        switch.fp32_precision = "none"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (None, None),
        ("float32_matmul_precision", "high"),
        ("float32_matmul_precision", "medium"),
        ("cuda.matmul.allow_tf32", True),
        ("cudnn.allow_tf32", False),
        ("cuda.matmul.fp32_precision", "tf32"),
        ("cudnn.conv.fp32_precision", "ieee"),
        ("fp32_precision", "tf32"),
        ("fp32_precision", "ieee"),
    ],
)
def test_a_session_leaves_every_switch_for_products_as_the_program_set_it(switches, name, value):
    if name == "float32_matmul_precision":
        torch.set_float32_matmul_precision(value)
    elif name:
        owner, _, switch = name.rpartition(".")
        setattr(attrgetter(owner)(switches) if owner else switches, switch, value)
    before = _products()
    for is_allowed in (True, False):
        with libraries.library_settings(torch.device("cpu"), ALONE, deterministic=False):
            round_products(is_allowed)
            assert (precision_of_products() == "tf32") is is_allowed
            assert (switches.cudnn.conv.fp32_precision == "tf32") is is_allowed
        assert _products() == before


def test_products_follow_pytorchs_switch_for_all_after_a_session_as_before(switches):
    switches.fp32_precision = "tf32"
    with libraries.library_settings(torch.device("cpu"), ALONE, deterministic=False):
        round_products(False)
    switches.fp32_precision = "ieee"
    assert precision_of_products() == "ieee"


def _examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def _run(lines, faces, tmp_path):
    """Run the lines as a program, in a folder with faces; it prints nothing and leaves a model."""
    (tmp_path / "faces").symlink_to(faces)
    script = tmp_path / "page.py"
    script.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert load_model(tmp_path / "out").sides == ("a", "b")


def test_events_are_those_of_the_command_and_nothing_is_printed(model_dir, capfd):
    _, events = model_dir
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "stop"
    assert {"start", "step", "save", "preview"} <= set(kinds)
    assert events[-1]["exit_code"] == Outcome.DONE
    assert capfd.readouterr() == ("", "")


def test_a_config_of_what_is_set_leaves_the_rest_to_the_model(faces, model_dir, tmp_path):
    """A resumed model keeps its own width and batch size, which are no defaults."""
    path, _ = model_dir
    copied = tmp_path / "m"
    shutil.copytree(path, copied)
    inputs = {f"input_{side}": str(faces / side) for side in "ab"}
    config = from_dict(
        {
            "data": inputs,
            "save": {"model_dir": str(copied)},
            "train": {"iterations": 1, "deterministic": True},
        }
    )
    events, before = [], _settings_of_the_process()
    assert train(config, on_event=events.append) is Outcome.DONE
    assert _settings_of_the_process() == before
    assert events[-1]["iteration"] == 4
    assert next(event for event in events if event["event"] == "start")["batch_size"] == 4


def test_a_request_from_another_thread_stops_after_a_save(faces, tmp_path):
    stop, reached = threading.Event(), threading.Event()
    ended = []

    def on_event(event):
        if event["event"] == "save":
            reached.set()

    def run():
        settings = _settings(faces, tmp_path / "m", iterations=100_000)
        ended.append(train(settings, on_event=on_event, should_stop=stop.is_set))

    thread = threading.Thread(target=run)
    thread.start()
    assert reached.wait(300)
    stop.set()
    thread.join(300)
    assert ended == [Outcome.STOPPED]
    assert load_model(tmp_path / "m").network is not None


def test_metrics_are_the_steps_among_the_events(faces, tmp_path):
    """Settings come from a file here: a third way to give them."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(from_dict(_settings(faces, tmp_path / "m"))))
    metrics, events = [], []
    outcome = train(path, on_metrics=metrics.append, on_event=events.append)
    assert outcome is Outcome.DONE
    assert metrics == [event for event in events if event["event"] == "step"]
    assert metrics[-1]["iteration"] == 3


class _ListenerFailed(Exception):
    """What a listener of the caller's raises."""


def test_training_that_ends_by_an_error_leaves_no_file_and_no_thread(faces, tmp_path):
    """A program that trains once after another would run out of both."""

    def fail(_metrics):
        raise _ListenerFailed

    def left():
        open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        threads = [thread.name for thread in threading.enumerate()]
        ours = [path for path in open_files if path.startswith(str(tmp_path))]
        return ours, [name for name in threads if name.startswith("mien-notify")]

    settings = _settings(faces, tmp_path / "m") | {"notify": {"command": "cat"}}
    settings["log"] = {"file": str(tmp_path / "log.txt")}
    with pytest.raises(_ListenerFailed):
        train(settings, on_metrics=fail)
    assert left() == ([], [])
    assert '"crash"' in (tmp_path / "m/logs/session_1/events.jsonl").read_text()
    settings["train"] = settings["train"] | {"batch_size": 1000}  # refused after files are open
    with pytest.raises(ValueError, match="train.batch_size is 1000"):
        train(settings)
    assert left() == ([], [])


def test_trainings_of_other_settings_share_a_folder_of_decoded_faces(faces, tmp_path):
    """Neither removes the other's, which their next starts read."""
    store, counts = tmp_path / "store", []
    for coverage in (80.0, 90.0):
        settings = _settings(faces, tmp_path / f"m{coverage}", iterations=1)
        settings["data"] |= {"store_dir": str(store), "coverage": coverage}
        train(settings)
        counts.append(len(list(store.glob("*.faces"))))
    assert counts == [2, 4], "a file for each side and coverage"


def test_a_config_takes_tables_for_sections():
    config = Config(train={"iterations": 5}, model={"trainer": "lightweight"})
    assert (config.train.iterations, config.model.trainer) == (5, "lightweight")
    assert config == from_dict({"train": {"iterations": 5}, "model": {"trainer": "lightweight"}})
    with pytest.raises(ValueError, match="unknown setting train.iteration; did you mean"):
        Config(train={"iteration": 5})
    with pytest.raises(ValueError, match="train must be a table of settings, got 5"):
        Config(train=5)


def test_mistakes_are_value_errors_of_one_line(tmp_path):
    with pytest.raises(ValueError, match="^the settings of distribute are for `mien train`"):
        train({"distribute": {"gpus": 2}})
    with pytest.raises(ValueError, match="train must be a table of settings, got 5"):
        train({"train": 5})
    with pytest.raises(ValueError, match="no model folder given"):
        train(Config())
    with pytest.raises(ValueError, match="train.batch_size must be"):
        train({"train": {"batch_size": -3}, "save": {"model_dir": str(tmp_path / "m")}})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("add --model-dir FOLDER", "add save.model_dir=FOLDER"),
        ("choose another --model-dir, or --trainer x", "choose another save.model_dir, or "
         "model.trainer=x"),
        ("use --batch-size 26 or less", "use train.batch_size=26 or less"),
        ("use a new model with --set model.options.lowmem=true --precision bf16",
         "use a new model with model.options.lowmem=true precision.mode=bf16"),
        ("start again with --no-logs; no events", "start again with save.logs=false; no events"),
        ("leave --preview out (a resumed model", "leave preview.window out (a resumed model"),
        ("less often (--save-interval)", "less often (save.save_interval)"),
        ("go on without the recipe: --recipe none", 'go on without the recipe: recipe="none"'),
        ("--use-lr-finder out and give", "optimizer.use_lr_finder out and give"),
        ("x -m pip install --force-reinstall torch", "x -m pip install --force-reinstall torch"),
        ("`mien train --gpus 2`", "`mien train --gpus 2`"),
    ],
)  # fmt: skip
def test_advice_names_settings_in_the_place_of_flags(told, said):
    assert without_flags(told) == said


def test_advice_from_python_names_no_flag(faces, tmp_path):
    """Both what is raised and what a listener is told name settings."""
    with pytest.raises(ValueError, match=r"add save\.model_dir=FOLDER$"):
        train(Config())
    settings, events = _settings(faces, tmp_path / "m"), []
    settings["train"] |= {"batch_size": 1000}
    with pytest.raises(ValueError, match=r"use train\.batch_size=\d+ or less"):
        train(settings, on_event=events.append)
    hand_out = fit._listener(None, events.append)
    hand_out('{"event": "warning", "message": "leave it out (--snapshot-interval 0)"}')
    assert events[-1]["message"] == "leave it out (save.snapshot_interval=0)"


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_swap_is_what_the_network_gives(model_dir, side):
    model = load_model(model_dir[0])
    crops = _crops(edge_px=model.input_px)
    inputs = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        wanted = model.network.swap(inputs, side)[-1].permute(0, 2, 3, 1) * 255
    swapped, masks = swap(model, crops, side, batch_size=2)
    assert swapped.shape == (3, model.output_px, model.output_px, 3)
    assert masks is None
    assert swapped.dtype == np.uint8
    assert np.abs(swapped - wanted.numpy()).max() < 0.51
    assert swap(model, crops[:0], side)[0].shape == (0, model.output_px, model.output_px, 3)


def test_float32_comes_back_as_such(model_dir):
    model, crops = load_model(model_dir[0]), _crops()
    shares = crops.astype(np.float32) / 255
    swapped, _ = swap(model, shares)
    assert swapped.dtype == np.float32
    assert np.array_equal(np.rint(swapped * 255).astype(np.uint8), swap(model, crops)[0])
    enlarged, _ = swap(model, shares[:, ::4, ::4])  # its cubic goes beyond 0..1
    assert 0 <= enlarged.min() <= enlarged.max() <= 1


def test_a_learned_mask_comes_back(faces, tmp_path):
    settings = _settings(faces, tmp_path / "m", iterations=1)
    settings["loss"] = {"learn_mask": True}
    assert train(settings) is Outcome.DONE
    model, crops = load_model(tmp_path / "m"), _crops()
    with torch.no_grad():
        inputs = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
        face, mask = model.network.swap(inputs, "b")
    swapped, masks = swap(model, crops)
    assert masks is not None
    assert masks.shape == (3, model.output_px, model.output_px)
    assert np.abs(masks - mask[:, 0].numpy() * 255).max() < 0.51
    assert np.abs(swapped - face.permute(0, 2, 3, 1).numpy() * 255).max() < 0.51


def test_other_edges_are_resized(model_dir):
    model = load_model(model_dir[0])
    large = _crops(edge_px=4 * model.input_px)
    small = np.stack(
        [cv2.resize(crop, (model.input_px,) * 2, interpolation=cv2.INTER_AREA) for crop in large]
    )
    assert np.array_equal(swap(model, large)[0], swap(model, small)[0])


@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_a_file_for_inference_swaps_like_its_model(model_dir, tmp_path, side):
    path, _ = model_dir
    target = tmp_path / "m.safetensors"
    assert main(["model", "inference", str(path), "-o", str(target), "--side", side]) == 0
    model, of_file = load_model(path), load_model(target)
    assert (of_file.centering, of_file.coverage) == (model.centering, model.coverage)
    for each in "ab":
        if each in side or side == "both":
            found, wanted = swap(of_file, _crops(), each), swap(model, _crops(), each)
            assert np.array_equal(found[0], wanted[0])
        else:
            with pytest.raises(ValueError, match=f"side must be one of {side}"):
                swap(of_file, _crops(), each)


@pytest.mark.parametrize("maps", [True, False])
def test_a_file_may_have_any_name_and_lie_on_a_disk_that_maps_none(
    model_dir, tmp_path, monkeypatch, maps
):
    target = tmp_path / os.fsdecode(b"m\xe4rz.safetensors")
    assert main(["model", "inference", str(model_dir[0]), "-o", str(target)]) == 0
    opened = safetensors.safe_open

    def refuse_files_of_the_disk(path, framework):
        if os.readlink(path) == str(target) and not maps:
            raise OSError("No such device (os error 19)")
        return opened(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", refuse_files_of_the_disk)
    wanted = load_model(model_dir[0]).network.state_dict()
    found, read = load_model(target).network.state_dict(), read_weights(target)[0]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.items())
    assert read


def test_a_file_of_another_kind_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "hero.dfm").write_bytes(b"0123456789" * 10)
    with pytest.raises(ValueError, match="valid safetensors file; give a model folder, or a file"):
        load_model(tmp_path / "hero.dfm")


def test_a_file_that_cannot_be_mapped_from_memory_either_is_refused_with_the_reason(
    tmp_path, monkeypatch
):
    def refuse(path, framework):
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    (tmp_path / "m.safetensors").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"cannot read .*m.safetensors: No such device"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 64, 64, 3), np.float64),
        np.full((1, 64, 64, 3), 1.5, np.float32),
        np.full((1, 64, 64, 3), np.nan, np.float32),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 32, 3), np.uint8),
        np.zeros((1, 64, 64, 4), np.uint8),
    ],
)
def test_pictures_of_another_form_are_refused(model_dir, images):
    with pytest.raises(ValueError, match="faces (must be|of float32 must be)"):
        swap(load_model(model_dir[0]), images)


def test_what_is_no_model_is_refused_in_one_line(model_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    for path in (tmp_path / "none", tmp_path / "empty", text):
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no generation 'x'"):
        load_model(model_dir[0], generation="x")
