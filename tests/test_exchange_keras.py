"""Model folders of faceswap: read within the oracle's tolerances, written as faceswap writes them.

MIEN_FUZZ is the number of cases of the test with damaged files (default: 40).
"""

import builtins
import collections
import dataclasses
import errno
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import zipfile

import h5py
import numpy as np
import pytest
import torch
from attribute_server import AttributeServer
from conftest import tiny_options
from oracle_numbers import ORACLE, oracle_files

from mien import models
from mien.cli import exchange, main
from mien.cli.exchange import EXPORTERS
from mien.core.checkpoint import model_folder
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.state import Imported, TrainingState
from mien.core.checkpoint.verify import facts_of
from mien.core.config import from_dict, model_settings
from mien.core.exchange import keras_export, keras_file, legacy_attributes, legacy_h5
from mien.core.exchange.keras_archive import open_archive
from mien.core.exchange.keras_config import from_json, to_json
from mien.core.exchange.keras_export import export_keras
from mien.core.exchange.keras_order import snake_case, weight_paths
from mien.core.exchange.keras_reader import find, graph_of, read_model, settings_of_model
from mien.core.exchange.keras_state import read_state
from mien.core.exchange.matching import match
from mien.core.exchange.onnx_export import export_dfm, export_onnx
from mien.core.exchange.targets import targets_of
from mien.core.exchange.tensors_export import export_tensors
from mien.core.swapping import load_model
from mien.core.training.build import build_model
from mien.models.graph import Network

TOLERANCE, HALF_TOLERANCE = 2e-4, 5e-3  # of the oracle's README; 8e-5 and 3.7e-3 measured
MANY_WEIGHTS = 20_000_000
RUN_ID = "0123456789abcdef" * 2
FUZZ = int(os.environ.get("MIEN_FUZZ", "40"))


def _num_weights(folder):
    """Weights of the model in a folder of the oracle, from its graph alone."""
    found = find(folder)
    settings = settings_of_model(found.state, graph_of(found.model))
    model = models.meta_model(found.state["name"].replace("_", "-"), **settings)
    return sum(parameter.numel() for parameter in model.parameters())


def _folders():
    """Folders of the oracle that hold a model; the large ones are slow."""
    for path in oracle_files("exchange/*/io.npz"):
        marks = [pytest.mark.oracle]
        if _num_weights(path.parent) > MANY_WEIGHTS:
            marks.append(pytest.mark.slow)
        yield pytest.param(path.parent, id=path.parent.name, marks=marks)


def _configs():
    """Names of the models in configs.zip; none where the oracle lacks it."""
    names = set()
    for path in oracle_files("exchange/configs.zip"):
        with zipfile.ZipFile(path) as archive:
            names |= {name.partition("/")[0] for name in archive.namelist()}
    return sorted(names)


def _trained(path, family="lightweight", options=None, **more):
    """A model folder with a model whose every weight is drawn; two sessions, a found rate."""
    options = tiny_options(family) | (options or {})
    settings = {"model": {"trainer": family, "options": options}}
    for section, values in more.items():
        settings.setdefault(section, {}).update(values)
    config = from_dict(settings)
    model = models.build(family, seed=3, pretrained=False, **model_settings(config))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor += 0.2 * torch.rand(tensor.shape)
    state = TrainingState(trainer=family, run_id=RUN_ID)
    for _ in range(2):
        state.begin_session(config, started=1000.0, batch_size=4)
        state.advance(3)
    state.lowest_mean_loss = 0.25
    state.parts["lr_finder"] = {"rate": 2e-5}
    with ModelFolder(path) as folder:
        folder.write_config(config)
        folder.save(dict(model.state_dict()), None, state.to_dict())
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of faceswap as `mien model export` writes it, of a tiny lightweight."""
    path = tmp_path_factory.mktemp("keras")
    _trained(path / "m")
    assert main(["model", "export", str(path / "m"), "--to", "keras", "-o", str(path / "out")]) == 0
    return path / "out"


def _copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "theirs")


def _parts(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path, parts, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def _tree(content):
    """Datasets of an HDF5 file by path, with their shapes; None for a group of weights."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item.shape
        elif name.endswith("vars") and "name" in item.attrs and not len(item):
            found[name] = None

    with h5py.File(io.BytesIO(content)) as file:
        file.visititems(visit)
    return found


# Import


@pytest.mark.parametrize("folder", [*_folders()])
def test_models_of_faceswap_compute_what_they_did_and_go_back_as_they_came(
    folder, tmp_path, capsys
):
    assert main(["model", "import", str(folder), "-m", str(tmp_path / "m"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    state = json.loads(next(folder.glob("*_state.json")).read_text())
    assert facts["iterations"] == state["iterations"]
    assert facts["num_sessions"] == len(state["sessions"])
    _compare(load_model(tmp_path / "m"), np.load(folder / "io.npz"), state["config"])
    out = tmp_path / "out"
    words = ["model", "export", str(tmp_path / "m"), "--to", "keras", "-o", str(out), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["difference"] <= 1e-4
    theirs, ours = find(folder).model, find(out).model
    if theirs.suffix == ".keras":
        weights = "model.weights.h5"
        assert _tree(_parts(theirs)[weights]).items() <= _tree(_parts(ours)[weights]).items()
    before, after = (read_model(find(path)).state_dict() for path in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _compare(model, arrays, config):
    """Compare a model's outputs, and where its faces are cut out, with those of the oracle."""
    limit = HALF_TOLERANCE if config["mixed_precision"] else TOLERANCE
    if "coverage_ratio" in arrays:  # faceswap refuses some of its own models
        assert model.coverage == pytest.approx(100 * float(arrays["coverage_ratio"]))
        assert model.centering == str(arrays["centering"])
    for side in "ab":
        faces_bchw = torch.from_numpy(arrays[f"in_{side}_u8"]).permute(0, 3, 1, 2).float() / 255
        outputs = model.network.swap(faces_bchw, side)
        assert len(outputs) == sum(key.startswith(f"out_{side}") for key in arrays)
        for number, output in enumerate(outputs):
            reference = arrays[f"out_{side}{number}_u16"].astype(np.float32) / 65535
            assert np.abs(output.permute(0, 2, 3, 1).numpy() - reference).max() <= limit


def test_state_is_taken_over_both_ways(tmp_path, exported):
    state = json.loads((exported / "lightweight_state.json").read_text())
    assert (state["name"], state["iterations"], state["lr_finder"]) == ("lightweight", 6, 2e-5)
    assert type(state["config"]["coverage"]) is float
    assert state["config"]["mixed_precision"] is False
    assert state["sessions"]["1"]["iterations"] == 6
    names = {layer.name for layer in graph_of(exported / "lightweight.keras").layers()}
    assert set(state["mixed_precision_layers"]) < names
    assert main(["model", "import", str(exported), "-m", str(tmp_path / "m")]) == 0
    with ModelFolder(tmp_path / "m", read_only=True) as folder:
        saved = folder.load()
    again = TrainingState.from_dict(saved.state)
    assert (again.iterations, again.lowest_mean_loss) == (6, None)
    assert again.imported == Imported(last_session=1, lowest_loss=0.25)
    facts = facts_of(tmp_path / "m")
    assert [session["is_imported"] for session in facts["sessions"]] == [True]
    assert again.parts["lr_finder"] == {"rate": 2e-5}
    config = from_dict(saved.config)
    assert config.optimizer.use_lr_finder
    assert config.model.options["width"] == tiny_options("lightweight")["width"]


def test_info_tells_what_faceswap_has_trained(tmp_path, exported, capsys):
    assert main(["model", "import", str(exported), "-m", str(tmp_path / "m")]) == 0
    capsys.readouterr()
    assert main(["model", "info", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().out
    assert "lowest loss  none yet (0.25 before the import, by faceswap's own mean)\n" in told
    assert "batch size 4, 6 iterations, in faceswap\n" in told
    words = ["model", "export", str(tmp_path / "m"), "--to", "keras", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    again = json.loads((tmp_path / "out/lightweight_state.json").read_text())
    assert again["lowest_avg_loss"] == 0.25


@pytest.mark.parametrize("export", [export_keras, export_onnx, export_dfm, export_tensors])
def test_an_export_tells_its_stages(tmp_path, exported, export):
    assert main(["model", "import", str(exported), "-m", str(tmp_path / "m")]) == 0
    suffix = {export_onnx: ".onnx", export_dfm: ".dfm", export_tensors: ".safetensors"}
    stages = []
    export(tmp_path / "m", tmp_path / f"out{suffix.get(export, '')}", report=stages.append)
    reading, writing, comparing = stages
    assert reading == "reading the save"
    assert writing.startswith("writing the")
    assert comparing.endswith("with the model")


@pytest.mark.parametrize(
    ("is_terminal", "as_json", "out", "err"),
    [(False, False, 1, 0), (False, True, 0, 0), (True, False, 0, 1), (True, True, 0, 1)],
)
def test_stages_are_lines_where_there_is_no_terminal_to_show_them(
    monkeypatch, capsys, is_terminal, as_json, out, err
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with exchange._stages(as_json=as_json) as report:
        report("reading the save")
    said = capsys.readouterr()
    assert ("reading the save\n" in said.out, "reading the save" in said.err) == (out, err)


def test_training_goes_on_with_an_import(tmp_path, exported, sides, capsys):
    folder = str(tmp_path / "m")
    assert main(["model", "import", str(exported), "-m", folder]) == 0
    words = ["-m", folder, "-A", str(sides[0]), "-B", str(sides[1]), "--device", "cpu"]
    assert main(["train", *words, "--iterations", "1", "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "Stopped at iteration 7" in out
    assert main(["model", "export", folder, "--to", "keras", "-o", str(tmp_path / "out")]) == 0
    assert "4 of its own faces" in capsys.readouterr().out
    state = json.loads((tmp_path / "out/lightweight_state.json").read_text())
    assert (state["iterations"], state["lr_finder"]) == (7, 2e-5)


def test_load_weights_takes_a_model_of_faceswap(tmp_path, exported):
    source = read_model(find(exported))
    values = {
        "model": {"trainer": "lightweight", "options": tiny_options("lightweight")}
        | {"load_weights": str(exported)}
    }
    model, loaded = build_model(from_dict(values), torch.device("cpu"), is_new=True)
    assert "encoder" in loaded
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)


def test_order_of_the_list_does_not_matter(tmp_path, exported):
    folder = _copy(exported, tmp_path)
    parts = _parts(folder / "lightweight.keras")
    config = json.loads(parts["config.json"])
    config["config"]["layers"].reverse()
    for layer in config["config"]["layers"]:
        layer["config"].get("layers", []).reverse()
    _write(folder / "lightweight.keras", parts | {"config.json": json.dumps(config)}, 8)
    before, after = (read_model(find(path)).state_dict() for path in (exported, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


# Export


@pytest.mark.oracle
@pytest.mark.parametrize("name", _configs())
def test_graphs_equal_those_of_faceswap(name, tmp_path):
    with zipfile.ZipFile(ORACLE / "exchange/configs.zip") as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if n.startswith(f"{name}/")])
    folder = tmp_path / name
    theirs = from_json(json.loads((folder / "config.json").read_text()))
    state = read_state(next(folder.glob("*_state.json")))
    settings = settings_of_model(state, theirs)
    assert settings["learn_mask"] == state["config"]["learn_mask"]
    assert settings["reflect_padding"] == state["config"]["reflect_padding"]
    ours = models.meta_model(state["name"].replace("_", "-"), **settings).graph()
    pairs, slots, their_slots = match(theirs, ours), weight_paths(ours), weight_paths(theirs)
    assert [slots[our] for our in pairs] == [their_slots[their] for their in pairs.values()]
    assert _contents(ours) == _contents(theirs)
    index = json.loads((folder / "h5index.json").read_text())["h5"]
    shapes = {path: tuple(shape) for path, shape, *_ in index if shape is not None}
    assert shapes == {
        f"{slots[layer]}/{number}": entry.shape
        for layer in ours.layers()
        for number, entry in enumerate(layer.weights)
    }
    groups = {path for path, shape, *_ in index if shape is None}
    assert {slots[layer] for layer in ours.layers() if not layer.weights} <= groups


def _contents(graph):
    """How many layers of each kind and settings each sub-network has."""
    return {
        network.name: collections.Counter(
            (layer.kind, tuple(sorted(layer.attributes.items()))) for layer in network.layers()
        )
        for network in graph.networks()
    }


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((name, {}) for name in models.available() if name not in ("dfl-sae", "unbalanced")),
        ("dfl-sae", {"architecture": "liae", "multiscale_decoder": True}),
        ("dlight", {"details": "good"}),
        ("phaze-a", {"shared_fc": "half", "dec_upscale_method": "resize_images"}),
        ("phaze-a", {"dec_upscale_method": "upscale_dny", "dec_norm": "group"}
        | {"dec_min_filters": 32, "dec_max_filters": 32, "split_decoders": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "tiny",
)  # fmt: skip
def test_every_family_comes_back_as_it_went(family, options, tmp_path, capsys):
    trained = _trained(tmp_path / "m", family, options, loss={"learn_mask": True})
    out = str(tmp_path / "out")
    assert main(["model", "export", str(tmp_path / "m"), "--to", "keras", "-o", out]) == 0
    assert "at most from the model" in capsys.readouterr().out
    assert main(["model", "import", out, "-m", str(tmp_path / "again")]) == 0
    again = load_model(tmp_path / "again").network
    assert all(torch.equal(a, b) for a, b in zip(
        trained.state_dict().values(), again.state_dict().values(), strict=True
    ))  # fmt: skip
    assert dataclasses.asdict(again.config) == dataclasses.asdict(trained.config)
    graph = graph_of(find(tmp_path / "out").model)
    for network in graph.networks():
        assert sum(call.layer is network for call in graph.calls) <= 2 or "half" in str(options)


def test_half_shared_networks_are_called_twice_at_most():
    for options in ({"shared_fc": "half"}, {"shared_fc": "half", "split_fc": False}):
        settings = tiny_options("phaze-a") | options
        graph = models.meta_model("phaze-a", **settings).graph()
        for network in graph.networks():
            assert sum(call.layer is network for call in graph.calls) <= 2


def test_the_file_says_what_it_is(exported):
    metadata = json.loads(_parts(exported / "lightweight.keras")["metadata.json"])
    assert metadata["kind"] == "synthetic face model"
    assert metadata["run_id"] == RUN_ID
    assert {"mien_version", "config_sha256", "keras_version"} <= metadata.keys()


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch, capsys):
    _trained(tmp_path / "m")
    monkeypatch.setattr(keras_export, "MAX_DIFFERENCE", 0.0)
    words = ["model", "export", str(tmp_path / "m"), "--to", "keras", "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "so it was not kept" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_disk_that_is_full_half_way_is_told(exported, tmp_path, share):
    """HDF5 crashes where a file cannot be closed; nothing of the disk's refusal reaches it."""
    whole = exported / "lightweight.keras"
    graph = load_model(exported.parent / "m").network.graph()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * whole.stat().st_size), before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            keras_file.write_keras(tmp_path / "m.keras", graph, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_import_that_the_disk_refuses_is_told_and_called_again(
    exported, tmp_path, capsys, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ["model", "import", str(exported), "-m", str(tmp_path / "m")]
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "write_tensors", refuse)
        assert main(words) == 2
    assert "No space left on device; free space and start again" in capsys.readouterr().err
    assert main(words) == 0


def test_targets_of_an_export(tmp_path, capsys):
    _trained(tmp_path / "m")

    def export(target, *words):
        command = ["model", "export", str(tmp_path / "m"), "--to", "keras", "-o", str(target)]
        return main([*command, *words]), capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty")[0] == 0
    assert "add --force" in export(tmp_path / "empty")[1]
    kept = tmp_path / "empty/notes.txt"
    kept.write_text("mine")
    assert export(tmp_path / "empty", "--force")[0] == 0
    assert kept.read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/original.keras").write_text("theirs")
    (tmp_path / "odd/lightweight_state.json").mkdir(parents=True)
    for target, text in (
        (tmp_path / "other", "holds original.keras"),
        (kept, "is no folder"),
        (tmp_path / "none/out", "make it first"),
        (tmp_path / "m/out", "lies in the model folder"),
        (tmp_path / "odd", "lightweight_state.json is a folder"),
    ):
        code, told = export(target, "--force")
        assert (code, told.count("\n"), text in told) == (2, 1, True), told
    assert (tmp_path / "other/original.keras").read_text() == "theirs"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_a_graph_never_lies_beside_the_state_of_another(tmp_path, monkeypatch, kind):
    """A replacement is cut off at each name in turn; the same export heals it."""
    names, target = ("m.keras", "m_state.json"), tmp_path / "out"

    def pair(folder, text):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text(text)
        return folder

    def found():
        return [path.read_text() if path.exists() else None for path in map(target.joinpath, names)]

    def cut_off(number, call):
        def move(*paths):
            moves.append(paths)
            if len(moves) == number:
                raise kind
            call(*paths)

        return move

    left = []
    for number in range(1, 4):
        pair(target, "old")
        moves = []
        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(keras_export.os, name, cut_off(number, getattr(os, name)))
            with pytest.raises(kind):
                keras_export._move(pair(tmp_path / "new", "new"), target, names)
        left.append(found())
        keras_export._move(pair(tmp_path / "new", "new"), target, names)
        assert found() == ["new", "new"]
        assert sorted(os.listdir(target)) == sorted(names)
    # A refusal of the disk is no kill: what it has moved aside comes back.
    second = "old" if kind is OSError else None
    assert left == [["old", "old"], ["old", second], ["new", None]]


def test_options_of_another_target_are_refused(tmp_path, capsys):
    words = ["model", "export", str(tmp_path), "--to", "keras", "-o", "x", "--mask", "ones"]
    assert main(words) == 2
    assert "--mask is of a .dfm" in capsys.readouterr().err


# Bad input


def _refusal(capsys, source, target):
    """What is said of an import that is refused; nothing is left of it."""
    code = main(["model", "import", str(source), "-m", str(target)])
    told = capsys.readouterr().err
    assert (code, told.count("\n")) == (2, 1), told
    assert len(told) < 800
    assert not target.exists()
    return told


def _changed_graph(change):
    def spoil(folder):
        path = folder / "lightweight.keras"
        parts = _parts(path)
        config = json.loads(parts["config.json"])
        change(config)
        _write(path, parts | {"config.json": json.dumps(config)})

    return spoil


def _changed_arrays(change):
    def spoil(folder):
        path = folder / "lightweight.keras"
        parts = _parts(path)
        content = io.BytesIO(parts["model.weights.h5"])
        with h5py.File(content, "r+") as file:
            change(file)
        _write(path, parts | {"model.weights.h5": content.getvalue()})

    return spoil


KERNEL = "layers/functional/layers/conv2d/vars/0"


def _relinked(link):
    def change(file):
        del file[KERNEL]
        file[KERNEL] = link

    return change


def _replaced(**settings):
    def change(file):
        del file[KERNEL]
        file.create_dataset(KERNEL, **settings)

    return change


def _external(file):
    del file[KERNEL]
    file.create_dataset(KERNEL, (5, 5, 3, 8), "f4", external=[("/etc/passwd", 0, 2400)])


def _virtual(file):
    del file[KERNEL]
    layout = h5py.VirtualLayout((5, 5, 3, 8), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", (5, 5, 3, 8))
    file.create_virtual_dataset(KERNEL, layout)


def _layers(config):
    """Layers of the encoder."""
    return config["config"]["layers"][2]["config"]["layers"]


def _first_layer(config):
    return _layers(config)[1]


def _truncated(folder):
    path = folder / "lightweight.keras"
    path.write_bytes(path.read_bytes()[:-2000])


def _bomb(folder):
    path = folder / "lightweight.keras"
    _write(path, _parts(path) | {"config.json": b" " * (64 << 20)}, zipfile.ZIP_DEFLATED)


def _bomb_of_arrays(folder):
    path = folder / "lightweight.keras"
    parts = _parts(path)
    large = parts | {"model.weights.h5": parts["model.weights.h5"] + bytes(96 << 20)}
    _write(path, large, zipfile.ZIP_DEFLATED)


def _with_entry(name):
    def spoil(folder):
        path = folder / "lightweight.keras"
        _write(path, _parts(path) | {name: b"x"})

    return spoil


def _state(**values):
    def spoil(folder):
        path = folder / "lightweight_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def _made_of(content):
    def spoil(folder):
        path = folder / "lightweight.keras"
        path.unlink()
        path.with_suffix(".h5").write_bytes(content)

    return spoil


BAD = {
    "truncated": (_truncated, "is not a whole zip file"),
    "no zip": (lambda f: (f / "lightweight.keras").write_text("x"), "is not a whole zip file"),
    "bomb": (_bomb, "must have at most 8388608 bytes"),
    "bomb of arrays": (_bomb_of_arrays, "model.weights.h5 of"),
    "foreign entry": (_with_entry("../evil"), "it holds '../evil'"),
    "arrays by pickle": (_with_entry("model.weights.npz"), "it holds 'model.weights.npz'"),
    "soft link": (_changed_arrays(_relinked(h5py.SoftLink("/layers"))), "is a link to elsewhere"),
    "external link": (
        _changed_arrays(_relinked(h5py.ExternalLink("/etc/passwd", "/x"))), "is a link to elsewhere"
    ),
    "external array": (_changed_arrays(_external), "lies in another file"),
    "virtual array": (_changed_arrays(_virtual), "lies in another file"),
    "wrong shape": (
        _changed_arrays(_replaced(shape=(5, 5, 3, 9), dtype="f4", data=np.zeros((5, 5, 3, 9)))),
        f"{KERNEL} must have shape (5, 5, 3, 8), got (5, 5, 3, 9)",
    ),
    "huge shape": (
        _changed_arrays(_replaced(shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))),
        "must have shape (5, 5, 3, 8)",
    ),
    "huge chunks": (
        _changed_arrays(
            _replaced(
                shape=(5, 5, 3, 8), maxshape=(None, None, 3, 8), dtype="f4",
                chunks=(512, 512, 3, 8), compression="gzip",
            )
        ),
        "in pieces much larger",
    ),
    "no numbers": (_changed_arrays(_replaced(shape=(5, 5, 3, 8), dtype="f4")), "holds no numbers"),
    "whole numbers": (
        _changed_arrays(_replaced(data=np.zeros((5, 5, 3, 8), "i4"))), "must hold floating-point"
    ),
    "other packing": (
        _changed_arrays(_replaced(data=np.zeros((5, 5, 3, 8), "f4"), compression="lzf")),
        "packed in a way",
    ),
    "not finite": (
        _changed_arrays(_replaced(data=np.full((5, 5, 3, 8), np.nan, "f4"))), "not finite"
    ),
    "missing array": (_changed_arrays(lambda file: file.__delitem__(KERNEL)), "is missing"),
    "no HDF5": (
        lambda f: _write(
            f / "lightweight.keras",
            _parts(f / "lightweight.keras") | {"model.weights.h5": b"x" * 999},
        ),
        "its HDF5 part is damaged",
    ),
    "lambda": (
        _changed_graph(lambda c: _first_layer(c).update(class_name="Lambda")),
        "is of class 'Lambda'",
    ),
    "other width": (
        _changed_graph(lambda c: _layers(c)[3]["config"].update(filters=24)), "filters of"
    ),
    "other activation": (
        _changed_graph(lambda c: _first_layer(c)["config"].update(activation="tanh")),
        "activation of",
    ),
    "circle": (
        _changed_graph(
            lambda c: _first_layer(c)["inbound_nodes"][0]["args"][0]["config"].update(
                keras_history=[_first_layer(c)["name"], 0, 0]
            )
        ),
        "takes what is not there",
    ),
    "no model": (_changed_graph(lambda c: c.update(class_name="Sequential")), "no functional"),
    "two layers": (
        _changed_graph(lambda c: c["config"]["layers"].append(c["config"]["layers"][0])),
        "has two layers",
    ),
    "second model": (
        lambda f: (f / "original.keras").write_bytes(b""), "must hold one model of faceswap"
    ),
    "no state": (
        lambda f: (f / "lightweight_state.json").unlink(), "must hold one *_state.json"
    ),
    "unknown model": (_state(name="iperov"), "which mien does not have"),
    "other family": (_state(name="villain"), "with these options"),
    "bad option": (_state(config={"coverage": 400.0}), "coverage of the state"),
    "bad count": (_state(iterations=-3), "must be a whole number, at least 0"),
    "known network": (
        _state(name="phaze_a", config={"enc_architecture": "vgg16", "enc_load_weights": False}),
        "has the encoder vgg16, whose layers are not read",
    ),
    "half a state": (
        lambda f: (f / "lightweight_state.json").write_text('{"name": '), "is not valid JSON"
    ),
    "h5 of Keras 3": (_made_of(b"x" * 2048), "its HDF5 part is damaged"),
    "DeepFaceLab": (
        lambda f: (f / "SAEHD_data.dat").write_bytes(b"x"), "its faces can be imported"
    ),
    "before 2020": (
        lambda f: [(f / name).write_bytes(b"x") for name in ("encoder.h5", "decoder_A.h5")],
        "before 2020",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_a_line(name, exported, tmp_path, capsys):
    spoil, text = BAD[name]
    folder = _copy(exported, tmp_path)
    spoil(folder)
    assert text in _refusal(capsys, folder, tmp_path / "m")


def test_missing_sources_and_full_targets(exported, tmp_path, capsys):
    assert "does not exist" in _refusal(capsys, tmp_path / "none", tmp_path / "m")
    (tmp_path / "own.safetensors").write_bytes(b"x")
    refusal = _refusal(capsys, tmp_path / "own.safetensors", tmp_path / "m")
    assert "is no model of faceswap" in refusal
    assert "--load-weights" in refusal
    (tmp_path / "empty").mkdir()
    assert "got none" in _refusal(capsys, tmp_path / "empty", tmp_path / "m")
    _trained(tmp_path / "full")
    before = sorted(tmp_path.rglob("*"))
    assert main(["model", "import", str(exported), "-m", str(tmp_path / "full")]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_are_unpacked_to_where_a_kill_leaves_nothing(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_archive(exported / "lightweight.keras") as archive:
        with archive.unpacked_weights(1 << 30) as copy:
            assert copy.tell() == len(_parts(exported / "lightweight.keras")["model.weights.h5"])
            assert not os.listdir(tmp_path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(ValueError, match=f"unpacked into {tmp_path}: File too large; free"):
                with archive.unpacked_weights(1 << 30):
                    pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_both_ways_say_what_to_install(exported, tmp_path, capsys, monkeypatch):
    _trained(tmp_path / "full")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    text = "pip install 'mien[exchange]'"
    assert text in _refusal(capsys, exported, tmp_path / "m")
    words = ["model", "export", str(tmp_path / "full"), "--to", "keras", "-o", str(tmp_path / "o")]
    assert main(words) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def _spoilt_value(rng, value):
    """A JSON value with one place of it changed."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
            odd = (None, True, -1, 0, 2**63, 1e308, "", "x" * 300, [], {}, [1], "Lambda", [[]])
            node[key] = rng.choice(odd)
            return value
        node = node[key]


def _said_of(folder):
    """The refusal of a folder; empty where it is read."""
    try:
        read_model(find(folder))
    except ValueError as error:
        return str(error)
    return ""


def _spoilt_bytes(rng, content, num_bytes):
    spoilt = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 32))):
        spoilt[rng.randrange(min(num_bytes, len(spoilt)))] = rng.randrange(256)
    return bytes(spoilt[: rng.randrange(len(spoilt))] if rng.random() < 0.1 else spoilt)


def _legacy(path, layers):
    """A file of Keras 2 with a graph of these layers."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.4.0"
        file.attrs["model_config"] = json.dumps({"config": {"name": "model", "layers": layers}})
    return path


def test_modules_in_the_working_folder_are_not_run(tmp_path, monkeypatch):
    path = _legacy(tmp_path / "model.h5", [])
    for name in ("h5py", "json", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}.run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert legacy_h5.graph_of(path)["config"] == {"name": "model", "layers": []}
    assert not list(tmp_path.glob("*.run"))


def test_attributes_without_a_process_are_refused_in_a_line(tmp_path, monkeypatch):
    path = _legacy(tmp_path / "model.h5", [])

    def refuse(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(legacy_attributes.subprocess, "run", refuse)
    with pytest.raises(ValueError, match="no process could be started .*unavailable.*ulimit"):
        graph_of(path)


@pytest.mark.parametrize("node", [[], {}, 7, [[]], [["face"]], [["face", "0", 0]]])
def test_damaged_calls_of_keras_2_are_refused_in_a_line(tmp_path, node):
    face = {"class_name": "InputLayer", "config": {"name": "face"}, "inbound_nodes": []}
    out = {"class_name": "Flatten", "config": {"name": "out"}, "inbound_nodes": [node]}
    with pytest.raises(ValueError, match=r"model.h5: its graph is damaged$"):
        graph_of(_legacy(tmp_path / "model.h5", [face, out]))


def test_damaged_folders_are_read_or_refused_in_a_line(exported, tmp_path):
    folder = _copy(exported, tmp_path)
    path, state_path = folder / "lightweight.keras", folder / "lightweight_state.json"
    parts, state = _parts(path), json.loads(state_path.read_text())
    whole, outcomes = path.read_bytes(), collections.Counter()
    for number in range(FUZZ):
        rng = random.Random(number)
        content, values = whole, state
        kind = number % 4
        if kind == 0:
            graph = _spoilt_value(rng, json.loads(parts["config.json"]))
            _write(path, parts | {"config.json": json.dumps(graph)})
        elif kind == 1:
            arrays = _spoilt_bytes(rng, parts["model.weights.h5"], rng.choice((800, 40_000)))
            _write(path, parts | {"model.weights.h5": arrays})
        else:
            content = _spoilt_bytes(rng, whole, len(whole)) if kind == 2 else whole
            values = _spoilt_value(rng, state) if kind == 3 else state
            path.write_bytes(content)
        state_path.write_text(json.dumps(values))
        said = _said_of(folder)
        assert "\n" not in said
        outcomes["refused" if said else "read"] += 1
    assert outcomes["refused"] > FUZZ // 10
    assert outcomes["read"]


@pytest.mark.oracle
@pytest.mark.parametrize("path", oracle_files("exchange/*/*.h5"), ids=lambda path: path.parent.name)
def test_damaged_files_of_faceswap_2_are_read_or_refused_in_a_line(path, tmp_path, monkeypatch):
    """Attributes are read by a process each, as always, but one that need not load the library."""
    folder = shutil.copytree(path.parent, tmp_path / "theirs")
    (folder / path.name).chmod(0o644)
    content, outcomes = path.read_bytes(), collections.Counter()
    with AttributeServer() as server:
        monkeypatch.setattr(legacy_h5, "read_attributes", server.read)
        for number in range(FUZZ):
            rng = random.Random(number)
            spoilt = _spoilt_bytes(rng, content, rng.choice((800, 40_000, len(content))))
            (folder / path.name).write_bytes(spoilt)
            said = _said_of(folder)
            assert "\n" not in said
            outcomes["refused" if said else "read"] += 1
    assert outcomes["refused"] > FUZZ // 10
    assert outcomes["read"]


# Parts


def test_names_of_classes_in_the_weights():
    names = {
        "Conv2D": "conv2d",
        "LeakyReLU": "leaky_re_lu",
        "PixelShuffler": "pixel_shuffler",
        "UpSampling2D": "up_sampling2d",
        "DepthwiseConv2D": "depthwise_conv2d",
        "InputLayer": "input_layer",
        "BatchNormalization": "batch_normalization",
    }
    assert {name: snake_case(name) for name in names} == names


def test_a_graph_survives_its_json():
    settings = tiny_options("phaze-a")
    graph = models.meta_model("phaze-a", learn_mask=True, **settings).graph()
    again = from_json(json.loads(json.dumps(to_json(graph))))
    assert _contents(again) == _contents(graph)
    assert {layer.name: path for layer, path in weight_paths(again).items()} == {
        layer.name: path for layer, path in weight_paths(graph).items()
    }
    match(again, graph)


def test_graphs_that_differ_are_told_apart():
    def graph(slope, joined=False):
        network = Network("net")
        x = network.input((2, 2, 3))
        y = network.leaky_relu(x, slope)
        network.outputs = (network.add("Add", y, y if joined else x),)
        return network

    match(graph(0.1), graph(0.1))
    swapped = graph(0.1)
    swapped.calls[-1] = dataclasses.replace(
        swapped.calls[-1], inputs=swapped.calls[-1].inputs[::-1]
    )
    swapped.outputs = (dataclasses.replace(swapped.outputs[0], call=swapped.calls[-1]),)
    match(swapped, graph(0.1))  # the order of a sum is free
    with pytest.raises(ValueError, match="negative_slope of .* must be 0.1 .*, got 0.2"):
        match(graph(0.2), graph(0.1))
    with pytest.raises(ValueError, match="is a LeakyReLU, where .* has a InputLayer|stands where"):
        match(graph(0.1, joined=True), graph(0.1))


def test_info_tells_what_a_model_can_be_exported_to(tmp_path, capsys):
    _trained(tmp_path / "m")
    assert main(["model", "info", str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exports"] == [*EXPORTERS]
    options = tiny_options("phaze-a") | {"enc_architecture": "vgg16", "enc_scaling": 20}
    targets, why = targets_of("phaze-a", options | {"enc_load_weights": False})
    assert targets == ["safetensors"]
    assert "vgg16" in why
