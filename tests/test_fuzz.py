"""Whatever a stranger's file holds, it is read or refused in words, in bounded time and memory.

MIEN_FUZZ is the number of cases of each test (default: some hundreds in all).
"""

import contextlib
import copy
import json
import math
import os
import random
import resource
import struct
import time
import zlib

import cv2
import deepfacelab
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import train_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mien import models
from mien.cli import main
from mien.core.checkpoint import format as manifests
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.state import TrainingState
from mien.core.checkpoint.verify import facts_of, nan_scan, verify
from mien.core.checkpoint.weights import read_weights
from mien.core.config import Config, from_dict, parse_toml, presets, recipes, to_dict
from mien.core.config.faceswap_ini import read_ini
from mien.core.data.store import _is_of, _open_raw
from mien.core.evaluate.evaluate import measured_at
from mien.core.faces import png
from mien.core.faces.dfl_pack import read_persons
from mien.core.faces.dfl_pickle import StoredArray, read_values
from mien.core.faces.folder import read_face, read_folder
from mien.core.faces.geometry import Crop, crop_landmarks
from mien.core.faces.masks import training_masks
from mien.core.faces.png import FaceFileError, FaceHeader, StoredMask, read_header, write_face
from mien.core.faces.synthetic import draw_folder
from mien.core.history.restore import restore
from mien.core.optim.lr_schedule import begin_schedule, found_rate, rate_factor
from mien.core.system.image_text import png_chunk
from mien.core.training.divergence import DivergenceDetector, NotFinite, TrainingDiverged, settle
from mien.core.training.recipe_progress import RecipeProgress, StageState, find_progress

CASES = int(os.environ.get("MIEN_FUZZ", "0"))
MAX_SECONDS = 3.0
"""Processor time, which other programs do not take; what waits for ever meets pytest's timeout."""

MAX_MORE_KIB = 256 << 10
RUN_ID = "0123456789abcdef" * 2


def cases(count):
    """A test of that many cases, or of MIEN_FUZZ; the same ones in every run."""
    return settings(
        max_examples=CASES or count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bounded():
    """What happens inside is quick and takes little memory."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    yield
    assert time.process_time() - started < MAX_SECONDS
    more_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert more_kib < MAX_MORE_KIB


def one_line(error):
    text = str(error)
    assert text
    assert "\n" not in text.strip(), text
    assert len(text) < 4000


@contextlib.contextmanager
def refused_in_words(kind=ValueError):
    """Only this error may come, as one line."""
    with bounded():
        try:
            yield
        except kind as error:
            one_line(error)


seeds = st.integers(0, 2**32 - 1)


def harm(content: bytes, seed: int) -> bytes:
    """Bits flipped, bytes replaced, parts cut out, doubled, moved or filled in."""
    generator = random.Random(seed)
    spoilt = bytearray(content)
    for _ in range(generator.randrange(1, 5)):
        size = len(spoilt)
        start = generator.randrange(size + 1)
        end = min(size, start + generator.choice((1, 1, 2, 4, 8, 64, size)))
        kind = generator.randrange(6)
        if kind == 0 and start < size:
            spoilt[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            spoilt[start:end] = generator.randbytes(end - start)
        elif kind == 2:
            del spoilt[start:end]
        elif kind == 3:
            spoilt[start:start] = spoilt[start:end]
        elif kind == 4:
            spoilt[start:end] = bytes([generator.choice((0, 255, 32))]) * (end - start)
        else:
            number = generator.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            spoilt[start : start + 8] = number.to_bytes(8, generator.choice(("little", "big")))
    return bytes(spoilt)


ODD = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e308, -0.0, 1e-320, 0.5),
    *("", "x", "../../x", "a\nb", "\ud800", "\x00", "\x1b[2J", "x" * 10_000, b"", b"x" * 100),
    *([], {}, [[]], [[1], [2, 3]], {"": {}}, [None] * 100, list(range(1000))),
]


def _places(values, path=()):
    """Every place in nested plain values."""
    yield path
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _places(value, (*path, key))


def odd_values(values, seed, odd=ODD):
    """Nested plain values with one to three of them missing, doubled or something else."""
    generator = random.Random(seed)
    values = copy.deepcopy(values)
    for _ in range(generator.randrange(1, 4)):
        places = [place for place in _places(values) if place]
        if not places:
            break
        *way, key = generator.choice(places)
        inner = values
        for step in way:
            inner = inner[step]
        kind = generator.randrange(4)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[generator.choice(("", "x", "../x", "\x1b", key * 2))] = inner[key]
        elif kind == 2:
            nested = copy.deepcopy(generator.choice(odd))
            for _ in range(generator.choice((1, 20, 50))):
                nested = {"a": nested} if generator.random() < 0.5 else [nested]
            inner[key] = nested
        else:
            inner[key] = copy.deepcopy(generator.choice(odd))
    return values


# Faces


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    """The bytes of a drawn face PNG, a folder to write others to, and its header's values."""
    folder = tmp_path_factory.mktemp("faces")
    draw_folder(folder / "drawn", identity="a", count=1, size_px=64)
    path = next((folder / "drawn").glob("*.png"))
    edge_px, header = read_header(path)
    mask = StoredMask(zlib.compress(bytes(64 * 64)), 64, "face", np.eye(3))
    header = FaceHeader(header.landmarks_l2, {"custom": mask}, header.box, {"n": [1, "two"]})
    write_face(folder / "face.png", np.zeros((edge_px, edge_px, 3), np.uint8), header)
    return (folder / "face.png").read_bytes(), folder, png._as_dict(header)


def _use(path):
    """What training does with a face file before its picture."""
    with contextlib.suppress(ValueError):  # too few faces
        for found in read_folder(path.parent, minimum=0).faces:
            for centering in ("face", "head", "legacy"):
                crop = Crop(centering, 1.0, 0.0, 64)
                box = found.crop_box(crop)
                assert 0 < box.side < 8 * found.edge_px
                crop_landmarks(found.landmarks_l2, found.alignment, crop)
                for kind in ("extended", *read_header(path)[1].masks):
                    with contextlib.suppress(FaceFileError):
                        training_masks(
                            found, crop, mask_type=kind, dilation=0, blur_kernel=3, threshold=4
                        )


def _write(folder, content):
    place = folder / "one"
    place.mkdir(exist_ok=True)
    path = place / "face.png"
    path.write_bytes(content)
    return path


def with_text(content: bytes, text: bytes) -> bytes:
    """A face PNG with another header text."""
    first = 8 + 25
    length = struct.unpack_from(">I", content, first)[0]
    chunk = png_chunk(b"iTXt", png.KEYWORD + bytes(5) + text)
    return content[:first] + chunk + content[first + 12 + length :]


@cases(150)
@given(seed=seeds)
def test_face_files(face, seed):
    content, folder, _ = face
    path = _write(folder, harm(content, seed))
    with refused_in_words(FaceFileError):
        read_header(path)
    with bounded():
        _use(path)


@cases(150)
@given(seed=seeds)
def test_face_headers(face, seed):
    content, folder, values = face
    text = repr(odd_values(values, seed)).encode("utf-8", "backslashreplace")
    path = _write(folder, with_text(content, text))
    with refused_in_words(FaceFileError):
        read_header(path)
    with bounded():
        _use(path)


@cases(150)
@given(data=st.binary(max_size=300), size_px=st.integers(-1, 5000), seed=seeds)
def test_masks(data, size_px, seed):
    packed = zlib.compress(bytes(size_px**2 if 0 < size_px < 300 else 99))
    for content in (data, packed, harm(packed, seed)):
        with refused_in_words(FaceFileError):
            pixels = StoredMask(content, size_px, "face", np.eye(3)).pixels()
            assert pixels.shape == (size_px, size_px)


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@pytest.mark.filterwarnings("ignore:invalid escape", "ignore:invalid octal")
@cases(150)
@given(values=literals, noise=st.text(max_size=5), seed=seeds)
def test_literals(values, noise, seed):
    text = repr(values)
    generator = random.Random(seed)
    start = generator.randrange(len(text) + 1)
    for spoilt in (text, text[:start] + noise + text[start + generator.randrange(3) :]):
        with refused_in_words(FaceFileError):
            png.parse_literal(spoilt)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        "{'a': " * 10**6,
        "(" * 16 + ")" * 16,
        "'" + "\\" * 10**6 + "'",
        "\\'" * 10**6,
        "[" + "9" * 10**6 + "]",
        "[" + "1," * 999_999 + "1]",
        "{'identity': {" + "'a': [1], " * 10**5 + "}}",
        "[" + ", " * 10**6,
        "(" + "," + " " * 10**6 + "1)",
        "[" + "nan " * 10**5 + "]",
    ],
)
def test_slow_literals(text):
    with refused_in_words(FaceFileError):
        png.parse_literal(text)


# Faces of DeepFaceLab


@pytest.fixture(scope="module")
def deepfacelab_face(tmp_path_factory):
    """Picture and metadata of a JPEG with masks, and a folder to write to."""
    picture_bgr, values = deepfacelab.drawn(edge_px=64)
    mask = cv2.imencode(".png", np.full((32, 32), 255, np.uint8))[1].tobytes()
    values["xseg_mask"] = np.frombuffer(mask, np.uint8)
    polygon = np.array([[1, 1], [60, 1], [30, 60]], np.float32)
    values["seg_ie_polys"] = {"polys": [{"type": 1, "pts": polygon}]}
    values["source_rect"] = list(np.array(values["source_rect"], np.float32))
    return picture_bgr, values, tmp_path_factory.mktemp("deepfacelab")


def _use_jpeg(path):
    """What training, `faces inspect` and an import do with a face of DeepFaceLab."""
    with refused_in_words(FaceFileError):
        found, header = read_face(path)
        crop = Crop("face", 1.0, -0.08, 64)
        assert 0.0 <= found.outside_share(crop) <= 1.0
        crop_landmarks(found.landmarks_l2, found.alignment, crop)
        assert found.read_header().box == header.box
        with found.open_picture() as image_bgr:
            assert found.cut_out(image_bgr, crop).shape == (64, 64, 3)
        for kind in ("extended", "custom_head"):
            training_masks(found, crop, mask_type=kind, dilation=0, blur_kernel=3, threshold=4)


@cases(150)
@given(seed=seeds)
def test_pickles(deepfacelab_face, seed):
    _, values, _ = deepfacelab_face
    generator = random.Random(seed)
    data = deepfacelab.dumped(values, generator.choice((2, 3, 4, 5)))
    with refused_in_words(FaceFileError):
        found = read_values(harm(data, seed))
        for value in found.values() if isinstance(found, dict) else ():
            if isinstance(value, StoredArray):
                value.values()


@cases(100)
@given(seed=seeds)
def test_jpegs_of_deepfacelab(deepfacelab_face, seed):
    """Files that are harmed anywhere, and whole ones whose metadata are odd."""
    picture_bgr, values, folder = deepfacelab_face
    generator = random.Random(seed)
    path = folder / "face.jpg"
    if generator.random() < 0.5:
        data = deepfacelab.dumped(odd_values(values, seed), generator.choice((2, 3, 4)))
    else:
        data = deepfacelab.dumped(values, generator.choice((2, 3, 4)))
        if generator.random() < 0.5:
            data = harm(data[:-1], seed) + b"."
    jpeg = deepfacelab.jpeg_with(picture_bgr, data[:65_533])
    path.write_bytes(jpeg if generator.random() < 0.5 else harm(jpeg, seed))
    _use_jpeg(path)


@cases(100)
@given(seed=seeds)
def test_packs(deepfacelab_face, seed):
    picture_bgr, values, folder = deepfacelab_face
    jpeg = deepfacelab.jpeg_with(picture_bgr, deepfacelab.dumped(values))
    pack = deepfacelab.pack([jpeg, b"", jpeg], [{"person_name": "anna"}] * 3)
    generator = random.Random(seed)
    head = len(pack) - 2 * len(jpeg)
    path = folder / "faceset.pak"
    path.write_bytes(
        harm(pack[:head], seed) + pack[head:] if generator.random() < 0.7 else harm(pack, seed)
    )
    with refused_in_words():
        for found in read_folder(path, minimum=0).faces:
            assert found.file == path
    with refused_in_words(FaceFileError):
        assert len(read_persons(path, 3)) == 3


def test_a_million_chunks_are_not_walked_through(face):
    content, folder, _ = face
    path = _write(folder, content[:33] + png_chunk(b"teXt", b"") * 10**6 + content[33:])
    with bounded(), pytest.raises(FaceFileError, match="more than 1000 chunks"):
        read_header(path)


def test_a_landmark_far_away_is_refused(face):
    content, folder, values = face
    values = copy.deepcopy(values)
    values["alignments"]["landmarks_xy"][3] = [900_000.0, -900_000.0]
    path = _write(folder, with_text(content, repr(values).encode()))
    with bounded(), pytest.raises(FaceFileError, match="a landmark far away from the others"):
        read_header(path)


def test_a_picture_that_was_replaced_by_a_larger_one_is_not_decoded(face, monkeypatch):
    from mien.core.data.decode import decode_one

    content, folder, _ = face
    path = _write(folder, content)
    found = read_folder(path.parent, minimum=1).faces[0]
    assert isinstance(decode_one(found, Crop("face", 1.0, 0.0, 32)), np.ndarray)
    huge = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(content[:8] + png_chunk(b"IHDR", huge) + content[33:])

    def refuse(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    assert isinstance(decode_one(found, Crop("face", 1.0, 0.0, 32)), FaceFileError)


def test_links_to_pictures_are_read_and_others_are_not(face, tmp_path):
    content, _, _ = face
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(content)
    (tmp_path / "secret").write_text("words")
    for name, target in (
        ("a.png", tmp_path / "elsewhere.png"),
        ("b.png", tmp_path / "secret"),
        ("c.png", tmp_path),
        ("d.png", tmp_path / "nothing"),
        ("e.png", tmp_path / "set/e.png"),
        ("f.png", "/dev/zero"),
    ):
        (tmp_path / "set" / name).symlink_to(target)
    os.mkfifo(tmp_path / "set/g.png")
    found = read_folder(tmp_path / "set", minimum=1)
    assert [face.path.name for face in found.faces] == ["a.png"]
    assert [(bad.path.name, "words" in bad.reason) for bad in found.rejected] == [("b.png", False)]


# Settings


def _toml(seed):
    import tomli_w

    odd = [value for value in ODD if value is not None and not isinstance(value, bytes)]
    for values in (to_dict(Config()), recipes.load("standard").settings | STAGES):
        with contextlib.suppress(TypeError, ValueError):  # no TOML can say it
            yield tomli_w.dumps(odd_values(values, seed, odd)).encode("utf-8", "ignore")


STAGES = {
    "stage": [
        {"name": "a", "iterations": 5, "set": {"augment": {"warp": False}}},
        {"name": "b", "plateau": {"metric": "loss", "window": 5, "patience": 2}},
    ]
}


def _settings(path):
    for read in (presets.read, recipes.read):
        with refused_in_words():
            found = read(path)
            if isinstance(found, presets.Preset):
                model = from_dict(found.settings).model
                models.options_of(model.trainer, model.options)


@cases(60)
@given(seed=seeds)
def test_settings_in_toml(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    for content in _toml(seed):
        for spoilt in (content, harm(content, seed)):
            path.write_bytes(spoilt)
            _settings(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a=" + b"[" * 10**5,
        b"a=" + b"{a=" * 10**5,
        b"a." * 10**5 + b"b=1",
        b"[" + b"a." * 10**5 + b"b]",
        (b"a." * 30 + b"b%d=1\n") * 100,
        b"".join(b"%s.b%d=1\n" % (b".".join([b"a%d" % n] * 30), n) for n in range(3000)),
        b"a=" + b"9" * 10**5,
        b"a=1\n" * 250_000,
        b"x" * (2 << 20),
        b"a='''" + b"\n" * 10**6,
        b"".join(b"[[s]]\n" for _ in range(10**5)),
    ],
    ids=range(11),
)
def test_slow_toml(content):
    started = time.process_time()
    with contextlib.suppress(ValueError):
        parse_toml(content)
    assert time.process_time() - started < 2 * MAX_SECONDS


INI = b"""[global]
centering = face
coverage = 87.5
learning_rate = 5e-05
[global.loss]
loss_function = ssim
eye_multiplier = 3
[model.phaze_a]
freeze_layers = encoder, "fc_b"
output_size = 128
[trainer.augmentation]
mask_color = #ff0000
"""


@cases(100)
@given(seed=seeds, noise=st.text(max_size=20))
def test_train_ini(tmp_path_factory, seed, noise):
    path = tmp_path_factory.getbasetemp() / "train.ini"
    generator = random.Random(seed)
    lines = INI.splitlines()
    lines.insert(generator.randrange(len(lines)), noise.encode())
    for content in (harm(INI, seed), b"\n".join(lines)):
        path.write_bytes(content)
        with refused_in_words():
            read_ini(path, "phaze-a")


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", "\xa0 "])
def test_a_slow_train_ini(tmp_path, blank):
    path = tmp_path / "train.ini"
    path.write_text("[global]\n" + ("a" + blank * 4000 + "b\n") * 40, encoding="utf-8")
    with refused_in_words():
        read_ini(path, "original")


# Model folders


def _save(path):
    config = Config()
    weight = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}
    with ModelFolder(path) as folder:
        folder.write_config(config)
        for iterations in (2, 4):
            state = TrainingState(trainer="original", run_id=RUN_ID)
            state.begin_session(config, started=0.0)
            state.advance(iterations)
            saved = folder.save(weight, {"mean": torch.zeros(3)}, state.to_dict())
        folder.back_up(saved)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m"
    _save(path)
    contents = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for file, content in contents.items():  # no two are one file
        file.unlink()
        file.write_bytes(content)
    return path, contents


@pytest.fixture
def model(saved):
    """A model folder to spoil, and the contents of its files."""
    _put_back(saved[1])
    for read in (facts_of, verify, nan_scan):  # what they import takes memory too
        read(saved[0])
    return saved


def vouch(folder, seed=None, files=None):
    """A manifest that fits the files, as a stranger can make one."""
    body = json.loads((folder / "manifest.json").read_bytes())
    for name in body["files"] if files is None else files:
        content = (folder / name).read_bytes()
        body["files"][name] = {
            "size": len(content),
            "sha256": manifests.sha256_of(folder / name),
        }
    del body["digest"]
    body = body if seed is None else odd_values(body, seed, PLAIN)
    if isinstance(body, dict):
        body["digest"] = manifests.digest_of(body)
    (folder / "manifest.json").write_text(json.dumps(body))


PLAIN = [value for value in ODD if not isinstance(value, bytes)]


def _read_all(path, *, is_changed=False):
    """Everything that reads a model folder; a restore too, where it may be changed."""
    readers = [facts_of, verify, nan_scan, read_weights]
    for read in readers + [restore] * is_changed:
        with refused_in_words():
            result = read(path)
            json.dumps(result, default=str).encode()
            str(result).encode()
    with refused_in_words(), ModelFolder(path, read_only=True) as folder:
        found = folder.load()
        for warning in folder.warnings:
            one_line(warning)
        if found is not None:
            TrainingState.from_dict(found.state)
            if found.config is not None:
                from_dict(found.config)


def _put_back(contents):
    for file, content in contents.items():
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)


@cases(10)
@given(seed=seeds)
def test_damaged_model_folders(model, seed):
    path, contents = model
    generator = random.Random(seed)
    files = [file for file in contents if file.name != ".lock"]
    for file in generator.sample(files, generator.randrange(1, 4)):
        file.write_bytes(harm(contents[file], generator.randrange(2**32)))
    _read_all(path)
    _put_back(contents)


@cases(10)
@given(seed=seeds, name=st.sampled_from(["state.json", "config.toml", "manifest.json"]))
def test_made_up_model_folders(model, seed, name):
    import tomli_w

    path, contents = model
    newest = path / "generations/4"
    if name == "manifest.json":
        vouch(newest, seed)
    elif name == "state.json":
        state = odd_values(json.loads(contents[newest / name]), seed, PLAIN)
        (newest / name).write_text(json.dumps(state))
        vouch(newest)
    else:
        odd = [value for value in PLAIN if value is not None]
        with contextlib.suppress(TypeError, ValueError, UnicodeError):
            text = tomli_w.dumps(odd_values(to_dict(Config()), seed, odd))
            (newest / name).write_bytes(text.encode())
        vouch(newest)
    _read_all(path)
    _put_back(contents)


def _tensor_file(header, num_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


TENSORS = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


def _with(tensor="b", **change):
    return TENSORS | {tensor: TENSORS[tensor] | change}


@pytest.mark.parametrize(
    "content",
    [
        _tensor_file(_with(data_offsets=[4, 12]), 16),
        _tensor_file(_with(data_offsets=[0, 8]), 16),
        _tensor_file(_with(data_offsets=[12, 20]), 20),
        _tensor_file(_with(data_offsets=[16, 8]), 16),
        _tensor_file(TENSORS, 15),
        _tensor_file(TENSORS, 17),
        _tensor_file(_with(shape=[2**62, 4]), 16),
        _tensor_file(_with(shape=[0, 2**63], data_offsets=[8, 8]), 8),
        _tensor_file(_with(shape=[-2]), 16),
        _tensor_file(_with(dtype="F4", shape=[16]), 16),
        _tensor_file(_with(dtype="F8_E8M0", shape=[8]), 16),
        _tensor_file(_with(dtype="OBJECT"), 16),
        _tensor_file({"a\nb": TENSORS["a"]}, 8),
        _tensor_file({"a" * 300: TENSORS["a"]}, 8),
        _tensor_file({"a\x1b[2J": TENSORS["a"]}, 8),
        _tensor_file(b'{"a":' * 10**5, 0),
        _tensor_file({"__metadata__": {"a": 1}}, 0),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        b"",
    ],
    ids=range(20),
)
def test_tensor_files_out_of_order(model, content):
    path, contents = model
    newest = path / "generations/4"
    (newest / "model.safetensors").unlink()
    (newest / "model.safetensors").write_bytes(content)
    with bounded(), pytest.raises(ValueError, match="cannot read weights"):
        read_weights(newest / "model.safetensors")
    vouch(newest)
    with bounded(), pytest.raises(ValueError, match="is damaged"):
        nan_scan(path)
    _read_all(path)
    _put_back(contents)


@cases(150)
@given(seed=seeds)
def test_tensor_files(model, seed):
    path, contents = model
    newest = path / "generations/4"
    good = safetensors.torch.save({"a": torch.arange(4.0), "b": torch.zeros(2, 3).half()})
    generator = random.Random(seed)
    header = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])
    for content in (
        harm(good, seed),
        _tensor_file(odd_values(header, seed, PLAIN), generator.randrange(40)),
        _tensor_file(odd_values(header, seed, [0, 1, 4, 8, 16, 28, "F64", "I8", "F4"]), 28),
    ):
        (newest / "model.safetensors").write_bytes(content)
        with refused_in_words():
            read_weights(newest / "model.safetensors")
        vouch(newest, files=["model.safetensors"])
        with refused_in_words():
            nan_scan(path)
    _put_back(contents)


SETTINGS = {
    "train": {"iterations": 9},
    "optimizer": {"use_lr_finder": True, "schedule": "cosine", "warmup_steps": 3},
}
FIGURES = {"ssim_a": 0.5, "psnr_b": 20.0}
LOSSES = {
    name: np.linspace(1.0, 2.0, 40)
    for name in ("batch_total", "loss_a", "loss_b", "batch_face_a", "batch_face_b")
}


def _state_with_parts():
    """A state with every part that a run may keep, as plain values."""
    recipe = recipes.Recipe.from_dict({"name": "two", **STAGES})
    progress = RecipeProgress(
        recipe, StageState(stage=1, begun=5, best=0.5, loss_sum=1.5, loss_count=3)
    )
    state = TrainingState(run_id=RUN_ID, trainer="original", iterations=40)
    config = from_dict(SETTINGS)
    begin_schedule(state, config)
    settle(state, config, config)
    parts = {
        "recipe": progress.to_dict(seconds=3.0),
        "lr_finder": {"rate": 1e-4},
        "rollback": {"rate_factor": 0.5},
        "evaluate": {"iteration": 40, **FIGURES},
    }
    state.parts |= parts
    return state.to_dict()


def _resume(values):
    """What a run does with the state that it resumes from, and after some iterations."""
    config = from_dict(SETTINGS)
    progress = find_progress(values, None)
    state = TrainingState.from_dict(values)
    measured_at(state)
    settle(state, config, config)
    schedule = begin_schedule(state, config)
    found_rate(state), rate_factor(state), str(schedule)
    detector = DivergenceDetector(state, NotFinite(scales_loss=False), schedule.rate)
    with contextlib.suppress(TrainingDiverged):
        detector.check_losses(LOSSES, state.iterations + 1, skipped=0)
    for iterations in range(state.iterations, state.iterations + 40):
        assert 0 <= schedule.rate(iterations) < math.inf
    if progress:
        progress.take_losses(LOSSES)
        progress.take_metrics(state.iterations + 40, FIGURES)
        progress.end(state.iterations + 40, seconds=60.0)
        progress.advance(state.iterations + 40)
        assert progress.iterations_left(state.iterations + 40, at_most=9) <= 9
        state.parts["recipe"] = progress.to_dict(seconds=60.0)
        one_line(str(progress))
    state.parts["divergence"] = detector.to_dict()
    again = json.loads(json.dumps(state.to_dict(), allow_nan=False))
    find_progress(again | {"iterations": state.iterations + 40}, None)


def test_the_parts_of_a_state_that_a_run_has_saved_are_taken_up():
    values = _state_with_parts()
    assert values["parts"].keys() == {
        *("divergence", "evaluate", "lr_finder", "recipe", "rollback", "schedule")
    }
    _resume(json.loads(json.dumps(values)))


@cases(50)
@given(seed=seeds)
def test_parts_of_a_state(seed):
    values = _state_with_parts()
    values["parts"] = odd_values(values["parts"], seed, PLAIN)
    with refused_in_words():
        _resume(json.loads(json.dumps(values)))


def test_a_restore_of_a_made_up_backup(tmp_path):
    for seed in range(CASES or 6):
        path = tmp_path / str(seed)
        _save(path)
        backup = path / "backup"
        state = odd_values(json.loads((backup / "state.json").read_bytes()), seed, PLAIN)
        (backup / "state.json").unlink()
        (backup / "state.json").write_text(json.dumps(state))
        content = (backup / "manifest.json").read_bytes()
        (backup / "manifest.json").unlink()
        (backup / "manifest.json").write_bytes(content)
        vouch(backup, seed if seed % 2 else None)
        _read_all(path, is_changed=True)
        with ModelFolder(path) as folder:
            assert folder.load() is not None, "some save is still whole"


def test_settings_of_a_far_larger_model_than_the_saved_one_build_none(
    sides, tmp_path, monkeypatch, capsys
):
    model_dir = tmp_path / "m"
    words = train_words(sides, model_dir, "-b", "2", "-i", "1")
    assert main(words) == 0
    (newest,) = (model_dir / "generations").iterdir()
    settings = (newest / "config.toml").read_text()
    (newest / "config.toml").write_text(settings.replace("width = 8", "width = 512"))
    vouch(newest)
    capsys.readouterr()

    def refuse(*_, **__):
        raise AssertionError("it was built")

    monkeypatch.setattr(models, "build", refuse)
    assert main(["train", "-m", str(model_dir), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"{newest} does not fit this model: encoder.0.0.conv" in said
    assert "`mien model restore` goes back to another save" in said
    assert said.count("\n") == 1


RAW = {"key": "k", "folder": "f", "size_px": 2, "settings": {}, "names": ["a"], "rejected": []}


@cases(150)
@given(seed=seeds)
def test_raw_faces(tmp_path_factory, seed):
    import hashlib

    path = tmp_path_factory.getbasetemp() / "k.faces"
    text = json.dumps(odd_values(RAW, seed, PLAIN)).encode()
    digest = hashlib.sha256(text).hexdigest()
    first = {"schema": "mien.faces/1", "header_bytes": 4096, "sha256": digest}
    first = odd_values(first, seed, PLAIN) if seed % 3 == 0 else first
    content = (json.dumps(first).encode() + b"\n" + text + b"\n").ljust(4096) + bytes(32)
    for spoilt in (content, harm(content, seed)):
        path.write_bytes(spoilt)
        with bounded(), contextlib.ExitStack() as stack:
            _open_raw(path, stack)
            _is_of(path, "f")
