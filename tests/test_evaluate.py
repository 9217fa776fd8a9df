"""Held-out faces: never trained on, always the same ones, and measured truly and harmlessly."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import json_events, tiny_options, train_words
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mien import models
from mien.cli import main
from mien.core.config import DataConfig, EvaluateConfig
from mien.core.data.feed import Feed
from mien.core.data.held_out import HeldOutFaces, hold_out, is_held_out, load_held_out
from mien.core.data.landmarks import store_landmarks
from mien.core.data.sides import open_sides
from mien.core.data.store import open_store
from mien.core.evaluate.evaluate import Evaluation, evaluate, masked_psnr, masked_ssim
from mien.core.evaluate.onnx_network import Network
from mien.core.evaluate.swap_metrics import IdentityMetric, PoseMetric, aligned
from mien.core.faces.folder import MINIMUM_FACES, read_folder
from mien.core.faces.geometry import Crop
from mien.core.faces.synthetic import draw_folder
from mien.core.precision import resolve
from mien.core.training import checkpointing
from mien.kernels.draw import draw, records_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of 36 drawn faces a side: enough to hold some out. Not to be changed."""
    root = tmp_path_factory.mktemp("many")
    for side in "ab":
        draw_folder(root / side, identity=side, count=36, size_px=96)
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of 5 drawn faces a side that no other folder has. Not to be changed."""
    root = tmp_path_factory.mktemp("apart")
    for side in "ab":
        draw_folder(root / side, identity=side, count=5, size_px=96, seed=9)
    return root / "a", root / "b"


def _data(folders) -> DataConfig:
    return DataConfig(input_a=str(folders[0]), input_b=str(folders[1]), num_threads=1)


def _own(apart) -> EvaluateConfig:
    return EvaluateConfig(held_out_a=str(apart[0]), held_out_b=str(apart[1]))


def _sets(*pairs) -> list[str]:
    return [word for name, value in pairs for word in ("--set", f"{name}={value}")]


def _words(folders, model_dir, *more) -> list[str]:
    return train_words(folders, model_dir, "-b", "4", *map(str, more))


# Which faces.


def test_the_hash_of_a_name_decides_for_all_time():
    """Another hash would move faces that a model was trained on among those it is measured on."""
    names = [f"frame_{number:06d}_0.png" for number in range(40)]
    assert [i for i, name in enumerate(names) if is_held_out(name, 8)] == [2, 4, 11, 15, 39]
    assert all(is_held_out(name, 1) for name in names)


def test_about_one_in_n_is_held_out():
    names = [f"{number}.png" for number in range(20_000)]
    for one_in in (2, 10, 100):
        share = np.mean([is_held_out(name, one_in) for name in names])
        assert share * one_in == pytest.approx(1, abs=4 * (one_in / len(names)) ** 0.5)


def test_added_and_removed_faces_move_no_other(many, tmp_path):
    settings = EvaluateConfig(held_out=5)
    whole = read_folder(many[0])
    trained, measured = hold_out(whole, settings, side="a", data=DataConfig())
    assert {face.path for face in trained.faces}.isdisjoint(face.path for face in measured.faces)
    assert len(trained.faces) + len(measured.faces) == 36
    fewer = tmp_path / "fewer"
    shutil.copytree(many[0], fewer)
    gone = {trained.faces[0].path.name, measured.faces[0].path.name}
    for name in gone:
        (fewer / name).unlink()
    left, still = hold_out(read_folder(fewer), settings, side="a", data=DataConfig())
    assert [f.path.name for f in left.faces] == [f.path.name for f in trained.faces[1:]]
    assert [f.path.name for f in still.faces] == [f.path.name for f in measured.faces[1:]]


@pytest.mark.parametrize("own", [False, True])
def test_held_out_faces_are_in_no_store_no_landmarks_and_no_batch(
    many, apart, tmp_path, own, monkeypatch
):
    """By name and by the bytes of the pictures; every batch draws of the store alone."""
    settings = _own(apart) if own else EvaluateConfig(held_out=5)
    opened = open_sides(_data(many), settings, 64, store_dir=None, device=CPU)
    pictures = {}
    for side, faces in opened.items():
        names = {face.path.name for face in faces.trained_on}
        held_out = {face.path for face in faces.held_out.faces}
        assert faces.store.names == sorted(names)
        assert (
            faces.store.num_faces == len(faces.landmarks_fl2) == (36 if own else 36 - len(held_out))
        )
        assert held_out.isdisjoint(face.path for face in faces.trained_on)
        assert held_out
        pictures[side] = {bytes(face.numpy()) for face in faces.store.faces_fssc}
    everything = open_sides(_data(many), EvaluateConfig(), 64, store_dir=None, device=CPU)
    for side, faces in everything.items():
        by_name = dict(zip(faces.store.names, faces.store.faces_fssc, strict=True))
        trained = {bytes(by_name[name].numpy()) for name in opened[side].store.names}
        assert pictures[side] == trained
    shown = []
    original = Feed._make

    def noted(self, first):
        made = original(self, first)
        records = records_of(_drawn(self, first))["index"].reshape(2, -1)
        for side, indices in zip("ab", records, strict=True):
            shown.extend(self.stores[side].names[index] for index in indices)
        return made

    monkeypatch.setattr(Feed, "_make", noted)
    pairs = [("evaluate.held_out", 5)]
    if own:
        pairs = [(f"evaluate.held_out_{s}", path) for s, path in zip("ab", apart, strict=True)]
    assert main(_words(many, tmp_path / "model", "-i", "20", *_sets(*pairs))) == 0
    assert set(shown) == set(opened["a"].store.names) | set(opened["b"].store.names)


def _drawn(feed, first):
    """The records of a batch, which the feed draws as a pure function of its place."""
    return draw(
        feed.ranges,
        seed=feed.config.train.seed,
        first=first,
        count=feed.config.train.batch_size,
        num_faces=[feed.stores[side].num_faces for side in "ab"],
        size_px=feed.size_px,
    )


def test_the_decoded_faces_of_the_last_start_are_taken_only_for_the_same_faces(many, tmp_path):
    stores = {}
    for step, one_in in enumerate((0, 5, 5, 0)):
        opened = open_sides(
            _data(many), EvaluateConfig(held_out=one_in), 64, store_dir=tmp_path, device=CPU
        )
        stores[step] = opened["a"].store
        assert opened["a"].store.num_faces == 36 - len(opened["a"].held_out.faces)
    assert [store.reused for store in stores.values()] == [False, False, True, False]
    assert stores[1].names == stores[2].names != stores[0].names == stores[3].names
    assert torch.equal(stores[1].faces_fssc, stores[2].faces_fssc)


def test_faces_are_cut_out_as_those_trained_on(apart):
    """Input, target and mask are the store's pixels at the sizes of the network."""
    data = _data(apart)
    folder = read_folder(apart[0], minimum=1)
    sizes = {"input_px": 64, "output_px": (32, 48), "num_threads": 1}
    faces = load_held_out(folder, data, count=3, **sizes)
    assert faces.inputs_nssc.shape == (3, 64, 64, 3)
    assert faces.targets_nffc.shape == (3, 48, 48, 3)
    assert faces.masks_nff.shape == (3, 48, 48)
    assert faces.landmarks_nl2.shape == (3, 68, 2)
    crop = Crop(data.centering, 1.0, 0.0, 64)
    store = open_store(folder, crop, data, store_dir=None, device=CPU, minimum=1)
    spread = [0, 2, 4]
    np.testing.assert_array_equal(faces.inputs_nssc, store.faces_fssc.numpy()[spread, ..., :3])
    landmarks = store_landmarks(folder.faces, crop)[spread] * 48 / 64
    np.testing.assert_allclose(faces.landmarks_nl2, landmarks, rtol=1e-6)
    inside = faces.masks_nff[np.arange(3), 24, 24]
    assert (inside == 255).all()


# Figures of pictures.


def _ssim_by_hand(pred_hwc, target_hwc):
    """SSIM of each pixel, window by window."""
    places = np.arange(-5, 6)
    taps = np.exp(-(places**2) / 4.5)
    window = np.outer(taps, taps)
    window /= window.sum()
    result = np.empty_like(pred_hwc)
    for channel in range(3):
        x, y = (
            sliding_window_view(np.pad(each[..., channel], 5, mode="reflect"), (11, 11))
            for each in (pred_hwc, target_hwc)
        )
        mean_x, mean_y = (x * window).sum((2, 3)), (y * window).sum((2, 3))
        spread_x = ((x - mean_x[..., None, None]) ** 2 * window).sum((2, 3))
        spread_y = ((y - mean_y[..., None, None]) ** 2 * window).sum((2, 3))
        both = (x - mean_x[..., None, None]) * (y - mean_y[..., None, None])
        covariance = (both * window).sum((2, 3))
        result[..., channel] = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
        result[..., channel] /= (mean_x**2 + mean_y**2 + 1e-4) * (spread_x + spread_y + 9e-4)
    return result


def test_ssim_and_psnr_inside_the_mask_are_those_worked_out_by_hand():
    random = np.random.default_rng(3)
    target = random.random((17, 17, 3))
    pred = np.clip(target + random.normal(scale=0.1, size=target.shape), 0, 1)
    mask = random.random((17, 17)) * (random.random((17, 17)) > 0.5)
    chw = [torch.from_numpy(each).permute(2, 0, 1) for each in (pred, target, mask[..., None])]
    by_hand = np.average(_ssim_by_hand(pred, target).mean(-1), weights=mask)
    assert float(masked_ssim(*chw)) == pytest.approx(by_hand, rel=1e-10)
    error = np.average(((pred - target) ** 2).mean(-1), weights=mask)
    assert float(masked_psnr(*chw)) == pytest.approx(10 * np.log10(1 / error), rel=1e-12)


def test_what_is_outside_the_mask_does_not_count_and_equal_pictures_have_100_db():
    target = torch.rand(3, 16, 16, dtype=torch.float64)
    mask = torch.zeros(1, 16, 16, dtype=torch.float64)
    mask[:, :8] = 1
    pred = target.clone()
    pred[:, 13:] = 0  # 5 px and more from the mask: beyond the window of SSIM
    assert float(masked_psnr(pred, target, mask)) == pytest.approx(100)
    assert float(masked_ssim(pred, target, mask)) == pytest.approx(1)
    assert float(masked_psnr(pred, target, 1 - mask)) < 20


def _evaluation(model, count=5, swap_metrics=(), batch_size=2):
    random = np.random.default_rng(4)
    faces = {}
    for side in "ab":
        input_px, output_px = model.input_px, model.output_px[-1]
        faces[side] = HeldOutFaces(
            random.integers(0, 256, (count, input_px, input_px, 3), np.uint8),
            random.integers(0, 256, (count, output_px, output_px, 3), np.uint8),
            random.integers(1, 256, (count, output_px, output_px), np.uint8),
            random.random((count, 68, 2), np.float32) * output_px,
            [],
        )
    return Evaluation(faces, tuple(swap_metrics), batch_size)


@pytest.mark.parametrize("learn_mask", [False, True])
def test_the_metrics_are_those_of_each_sides_own_decoder(learn_mask):
    """Against faces that go through `swap` one by one."""
    model = models.build("lightweight", seed=1, width=8, learn_mask=learn_mask)
    evaluation = _evaluation(model)
    metrics = evaluate(model, resolve("fp32", CPU), evaluation)
    assert list(metrics) == ["ssim_a", "psnr_a", "ssim_b", "psnr_b"]
    model.eval()
    for side, faces in evaluation.faces.items():
        values = []
        for i in range(5):
            shown, target = (
                torch.from_numpy(each[i]).permute(2, 0, 1).double() / 255
                for each in (faces.inputs_nssc, faces.targets_nffc)
            )
            mask = torch.from_numpy(faces.masks_nff[i])[None].double() / 255
            with torch.no_grad():
                outputs = model.swap(shown[None].float(), side)
            face = next(each for each in reversed(outputs) if each.shape[1] == 3)[0]
            values.append(
                [float(f(face.double(), target, mask)) for f in (masked_ssim, masked_psnr)]
            )
        expected = np.mean(values, axis=0)
        assert [metrics[f"ssim_{side}"], metrics[f"psnr_{side}"]] == pytest.approx(
            expected, rel=1e-5
        )


def test_swap_metrics_see_faces_of_a_decoded_by_b():
    model = models.build("lightweight", seed=1, width=8)
    seen = []

    def metric(swaps_nffc):
        seen.append(swaps_nffc)
        return {"pose_swap": 0.5}

    evaluation = _evaluation(model, swap_metrics=[metric])
    assert evaluate(model, resolve("fp32", CPU), evaluation)["pose_swap"] == 0.5
    inputs = torch.from_numpy(evaluation.faces["a"].inputs_nssc).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        swaps = model.eval().swap(inputs, "b")[-1].permute(0, 2, 3, 1) * 255
    assert seen[0].dtype == np.uint8
    np.testing.assert_allclose(seen[0], swaps, atol=0.51)


@pytest.mark.parametrize(
    ("family", "more"), [("lightweight", {}), ("unbalanced", {}), ("dlight", {"details": "good"})]
)
def test_measuring_changes_nothing_of_a_model(family, more):
    """Weights and random numbers stay, as do the running estimates, which dlight has in `good`."""
    model = models.build(family, seed=2, **tiny_options(family) | more)
    assert any("running_mean" in name for name in model.state_dict()) == bool(more)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    evaluation = _evaluation(model, count=2)
    first = evaluate(model, resolve("fp32", CPU), evaluation)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model, resolve("fp32", CPU), evaluation) == first


# Networks of others.


def _varint(number):
    groups = []
    while True:
        groups.append(number & 127)
        number >>= 7
        if not number:
            return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _field(number, value):
    """A field of a protobuf message: a number, a text or a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _tensor(name, values):
    array = np.asarray(values, np.float32)
    shape = b"".join(_field(1, size) for size in array.shape)
    return shape + _field(2, 1) + _field(8, name) + _field(9, array.tobytes())


def _value(name, shape):
    sizes = b"".join(
        _field(1, _field(2, size) if isinstance(size, str) else _field(1, size)) for size in shape
    )
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sizes)))


def _node(operation, inputs, output):
    given = b"".join(_field(1, name) for name in inputs)
    return _field(1, given + _field(2, output) + _field(4, operation))


def write_onnx(path, weights, bias, shape, more_inputs=(), more_outputs=()):
    """An ONNX file of a network that flattens its input, times weights, plus bias."""
    graph = _node("Flatten", ["picture"], "flat") + _node("Gemm", ["flat", "w", "b"], "out")
    graph += b"".join(_node("Relu", ["out"], name) for name in more_outputs)
    graph += _field(2, "graph") + _field(5, _tensor("w", weights)) + _field(5, _tensor("b", bias))
    # Older exporters list the stored tensors among the inputs.
    for name, size in (("w", np.shape(weights)), ("picture", shape), *more_inputs):
        graph += _field(11, _value(name, size))
    for name in ("out", *more_outputs):
        graph += _field(12, _value(name, (1, len(bias))))
    opset = _field(8, _field(1, "") + _field(2, 13))
    path.write_bytes(_field(1, 8) + _field(7, graph) + opset)
    return path


def _fixed(path, bias, size_px=8, shape=None):
    """A network that gives the same numbers for every picture."""
    weights = np.zeros((3 * size_px**2, len(bias)), np.float32)
    return write_onnx(path, weights, bias, shape or (1, 3, size_px, size_px))


def test_a_network_gets_red_green_blue_in_its_scale(tmp_path):
    random = np.random.default_rng(1)
    weights, bias = random.normal(size=(3 * 64, 7)), random.normal(size=7)
    path = write_onnx(tmp_path / "n.onnx", weights, bias, (1, 3, 8, 8))
    picture_bgr = random.integers(0, 256, (8, 8, 3), np.uint8)
    rgb_chw = picture_bgr[..., ::-1].transpose(2, 0, 1).astype(np.float64)
    for middle, span in ((0.0, 255.0), (127.5, 127.5)):
        network = Network(str(path), "evaluate.x", middle=middle, span=span)
        assert network.size_px == 8
        expected = ((rgb_chw - middle) / span).ravel() @ weights + bias
        np.testing.assert_allclose(network(picture_bgr), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "evaluate.x: {path} cannot be read: No such file or directory"),
        (b"", "is not an ONNX file of a network with an input"),
        (b"\xff" * 64, "is not an ONNX file of a network with an input"),
        (b"\x89PNG and what follows", "is not an ONNX file of a network with an input"),
        ({"shape": (1, 3, "h", "w")}, "of a fixed size S, takes (1, 3, ?, ?)"),
        ({"shape": (1, 1, 8, 8)}, "must take pictures (1, 3, S, S) of a fixed size S, takes (1, 1"),
        ({"shape": (1, 3, 8, 6)}, "takes (1, 3, 8, 6)"),
        ({"more_inputs": [("scale", (1, 1))]}, "must have one input, has 2"),
        ({"more_outputs": ["second"]}, "must have one output, has 2"),
    ],
)
def test_a_file_that_is_no_usable_network_is_refused_in_one_line(tmp_path, content, message, capfd):
    path = tmp_path / "n.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        write_onnx(path, np.zeros((192, 4)), np.zeros(4), **({"shape": (1, 3, 8, 8)} | content))
    with pytest.raises(ValueError, match=".") as caught:
        Network(str(path), "evaluate.x")
    assert message.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_cannot_run_is_refused_in_one_line(tmp_path, capfd):
    path = write_onnx(tmp_path / "n.onnx", np.zeros((100, 4)), np.zeros(4), (1, 3, 8, 8))
    with pytest.raises(
        ValueError, match="evaluate.x: .* cannot be r(ead|un) by OpenCV: "
    ) as caught:
        Network(str(path), "evaluate.x")(np.zeros((8, 8, 3), np.uint8))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class _Finder:
    """In place of a network: finds the landmarks that a picture's first pixels name, moved."""

    name, size_px = "evaluate.landmark_model: stub", 32

    def __init__(self, landmarks_nl2, unit):
        self.landmarks_nl2, self.unit = landmarks_nl2, unit

    def __call__(self, picture_ssc):
        number, moved_px = picture_ssc[0, 0, :2]
        found = self.landmarks_nl2[number] + np.float32([moved_px, 0])
        return (found * self.unit).ravel()


@pytest.mark.parametrize("unit", [1.0, 1 / 32], ids=["px", "shares"])
def test_pose_is_the_landmarks_distance_in_distances_of_the_eyes(unit):
    random = np.random.default_rng(6)
    landmarks = random.random((2, 68, 2), np.float32) * 20 + 5
    landmarks[:, 36], landmarks[:, 45] = (6, 12), ((26, 12), (16, 12))
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    pictures[1, 0, 0, 0] = 1
    pictures[:, 0, 0, 1] = 1
    faces = SimpleNamespace(landmarks_nl2=landmarks, targets_nffc=pictures.copy())
    metric = PoseMetric(_Finder(landmarks, unit), faces)
    pictures[:, 0, 0, 1] = 4
    metrics = metric(pictures)
    assert metrics["pose_original"] == pytest.approx((1 / 20 + 1 / 10) / 2, rel=1e-5)
    assert metrics["pose_swap"] == pytest.approx((4 / 20 + 4 / 10) / 2, rel=1e-5)


def test_what_finds_no_landmarks_is_refused():
    landmarks = np.random.default_rng(6).random((1, 68, 2), np.float32) * 20 + 5
    pictures = np.zeros((1, 32, 32, 3), np.uint8)
    faces = SimpleNamespace(landmarks_nl2=landmarks, targets_nffc=pictures)
    with pytest.raises(
        ValueError, match=r"must give x, y of 68 landmarks in 0\.\.1 or px, but mis"
    ):
        PoseMetric(_Finder(landmarks, 1 / 16), faces)
    finder = _Finder(np.zeros((1, 5, 2), np.float32), 1)
    with pytest.raises(
        ValueError, match="must give 136 numbers, x and y of 68 landmarks, gives 10"
    ):
        PoseMetric(finder, faces)


def _five(landmarks_l2, points_p2):
    """Landmarks whose eyes, nose and corners of the mouth lie at the points."""
    landmarks_l2[36:42], landmarks_l2[42:48] = points_p2[0], points_p2[1]
    landmarks_l2[30], landmarks_l2[48], landmarks_l2[54] = points_p2[2:]
    return landmarks_l2


PLACES = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_a_face_is_aligned_to_where_recognisers_expect_it(scale):
    """Spots on a turned, scaled picture come to lie on the five places."""
    turn = np.deg2rad(20)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    edge = round(200 * scale)
    points = (PLACES - 56) @ matrix.T + edge / 2
    y, x = np.indices((edge, edge)) + 0.5
    spots = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (4 * scale) ** 2)) for px, py in points]
    picture = np.repeat((255 * np.max(spots, axis=0)).astype(np.uint8)[..., None], 3, axis=2)
    found = aligned(picture, _five(np.zeros((68, 2), np.float32), points), 112)[..., 0]
    for px, py in PLACES:
        rows, columns = (slice(round(at) - 7, round(at) + 8) for at in (py, px))
        patch = found[rows, columns].astype(np.float64)
        assert np.average(np.arange(15), weights=patch.sum(0)) + round(px) - 7 == pytest.approx(
            px, abs=1
        )
        assert np.average(np.arange(15), weights=patch.sum(1)) + round(py) - 7 == pytest.approx(
            py, abs=1
        )


def test_a_large_face_is_averaged_when_aligned_and_not_sampled():
    edge = 4 * 112
    checks = np.uint8(255 * (np.indices((edge, edge)).sum(0) % 2))
    landmarks = _five(np.zeros((68, 2), np.float32), 4 * PLACES)
    found = aligned(np.repeat(checks[..., None], 3, axis=2), landmarks, 112)
    assert found[2:-2, 2:-2].astype(float) == pytest.approx(127.5, abs=2)


def test_identity_is_the_cosine_distance_to_the_mean_of_real_faces():
    """The stub's embedding is the mean colour."""

    class Recogniser:
        name, size_px = "evaluate.embedding_model: stub", 112

        def __call__(self, picture_ssc):
            return picture_ssc.mean(axis=(0, 1)).astype(np.float32)

    landmarks = _five(np.zeros((68, 2), np.float32), PLACES)[None]

    def plain(*color):
        return np.broadcast_to(np.uint8(color), (1, 112, 112, 3))

    faces = {
        side: SimpleNamespace(landmarks_nl2=landmarks, targets_nffc=plain(*color))
        for side, color in (("a", (200, 0, 0)), ("b", (0, 200, 0)))
    }
    metric = IdentityMetric(Recogniser(), faces)
    metrics = metric(plain(60, 80, 0))
    assert metrics == pytest.approx({"identity_a": 1 - 0.6, "identity_b": 1 - 0.8}, abs=1e-6)
    faces["a"].targets_nffc = plain(0, 0, 0)
    Recogniser.__call__ = lambda self, picture: np.float32([np.nan, 1])
    with pytest.raises(ValueError, match="must give a vector of finite numbers for a real face"):
        IdentityMetric(Recogniser(), faces)


# As a user sees it.


def test_metrics_rise_while_a_model_learns(many, tmp_path, capsys):
    onnx = tmp_path / "landmarks.onnx"
    settings = read_folder(many[0]), DataConfig()
    sizes = {"count": 36, "input_px": 64, "output_px": (64,), "num_threads": 1}
    mean_l2 = load_held_out(*settings, **sizes).landmarks_nl2.mean(0) / 64
    _fixed(onnx, mean_l2.ravel())
    random = np.random.default_rng(0)
    recogniser = write_onnx(
        tmp_path / "id.onnx", random.normal(size=(3 * 256, 6)), np.zeros(6), (1, 3, 16, 16)
    )
    pairs = (
        ("optimizer.learning_rate", 1e-3),
        ("evaluate.held_out", 6),
        ("evaluate.max_faces", 4),
        ("evaluate.landmark_model", onnx),
        ("evaluate.embedding_model", recogniser),
    )
    words = _words(many, tmp_path / "model", "-i", "40", "-s", "40", "--json", *_sets(*pairs))
    assert main(words) == 0
    events = json_events(capsys.readouterr().out)
    held_out = events[0]["held_out"]
    assert [held_out[side]["measured"] for side in "ab"] == [4, 4]
    assert all(each["count"] > 4 for each in held_out.values())
    first, last = (event for event in events if event["event"] == "evaluate")
    assert (first["iteration"], last["iteration"]) == (1, 40)
    for name in ("ssim_a", "ssim_b", "psnr_a", "psnr_b"):
        assert last[name] > first[name]
    assert last["pose_swap"] == last["pose_original"] == first["pose_original"]
    assert 0 < last["identity_a"] < 2
    assert 0 < last["identity_b"] < 2
    _the_state_and_tensorboard_hold(last, tmp_path / "model")


def _the_state_and_tensorboard_hold(event, model_dir):
    metrics = {name: value for name, value in event.items() if name not in ("event", "time")}
    saved = json.loads((model_dir / "generations/40/state.json").read_text())
    assert saved["parts"]["evaluate"] == metrics
    log = EventAccumulator(str(model_dir / "logs/session_1/train"))
    log.Reload()
    for name, value in metrics.items():
        if name != "iteration":
            told = {e.step: e.value for e in log.Scalars(f"evaluate/{name}")}
            assert told[40] == pytest.approx(value)
            assert told.keys() == {1, 40}


def _newest(model_dir):
    folder = model_dir / "generations/6"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")}


@pytest.mark.parametrize(
    "trainer", ["lightweight", pytest.param("unbalanced", marks=pytest.mark.slow)]
)
def test_a_model_that_is_measured_is_bit_for_bit_the_one_that_is_not(
    sides, apart, tmp_path, trainer, capsys
):
    """unbalanced draws random numbers in training."""
    options = [(f"model.options.{k}", json.dumps(v)) for k, v in tiny_options(trainer).items()]
    folders = [(f"evaluate.held_out_{s}", path) for s, path in zip("ab", apart, strict=True)]
    for name, more in (("plain", []), ("measured", folders)):
        words = ["train", "-A", str(sides[0]), "-B", str(sides[1]), "-m", str(tmp_path / name)]
        words += ["-t", trainer, "-b", "2", "-i", "6", "-s", "2", "--device", "cpu"]
        words += ["--set", "preview.preview_images=2"]
        assert main([*words, *_sets(*options, *more)]) == 0
    said = capsys.readouterr().out
    assert said.count("Measured on held-out faces at iteration ") == 4
    assert "5 of A, 5 of B, never trained on" in said
    plain, measured = _newest(tmp_path / "plain"), _newest(tmp_path / "measured")
    for name, tensors in plain.items():
        assert tensors.keys() == measured[name].keys()
        assert all(torch.equal(tensor, measured[name][key]) for key, tensor in tensors.items())


def test_a_figure_that_is_no_number_is_told_and_does_not_stop_the_save(
    sides, apart, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        checkpointing, "evaluate", lambda *_: {"ssim_a": 0.5, "pose_swap": float("nan")}
    )
    pairs = [(f"evaluate.held_out_{s}", path) for s, path in zip("ab", apart, strict=True)]
    assert main(_words(sides, tmp_path / "model", "-i", "1", "--json", *_sets(*pairs))) == 0
    events = json_events(capsys.readouterr().out)
    (told,) = (event for event in events if event["event"] == "evaluate")
    assert (told["ssim_a"], told["pose_swap"]) == (0.5, None)
    saved = json.loads((tmp_path / "model/generations/1/state.json").read_text())
    assert saved["parts"]["evaluate"] == {"iteration": 1, "ssim_a": 0.5}


def test_a_signal_is_obeyed_without_measuring(sides, apart, tmp_path, monkeypatch):
    original = Feed.next

    def following(self, faces_seen):
        if faces_seen["a"] == 4 * 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, faces_seen)

    monkeypatch.setattr(Feed, "next", following)
    pairs = [(f"evaluate.held_out_{s}", path) for s, path in zip("ab", apart, strict=True)]
    assert main(_words(sides, tmp_path / "model", "-i", "9", *_sets(*pairs))) == 4
    saved = json.loads((tmp_path / "model/generations/3/state.json").read_text())
    assert saved["parts"]["evaluate"]["iteration"] == 1


def test_unreadable_held_out_faces_are_named_and_skipped(many, apart, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(apart[0], own)
    whole = sorted(own.iterdir())[1]
    whole.write_bytes(whole.read_bytes()[:-2000])
    (own / "text.png").write_text("no face")
    pairs = [("evaluate.held_out_a", own), ("evaluate.held_out_b", apart[1])]
    assert main(_words(many, tmp_path / "model", "-i", "1", *_sets(*pairs))) == 0
    said = capsys.readouterr().out
    assert f"skipped {whole}, held out: " in said
    assert f"skipped {own / 'text.png'}" in said
    assert "4 and 5 of them measured" in said
    strict = _words(many, tmp_path / "strict", "-i", "1", "--strict", *_sets(*pairs))
    assert main(strict) == 2


def _refusals(many, apart, tmp_path):
    own = [("evaluate.held_out_a", apart[0]), ("evaluate.held_out_b", apart[1])]
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "linked.png").symlink_to(sorted(many[1].iterdir())[0])
    empty = tmp_path / "empty"
    empty.mkdir()
    two = _fixed(tmp_path / "two.onnx", np.zeros(2))
    many_px = _fixed(tmp_path / "px.onnx", np.full(136, 1000.0))
    return {
        "one folder": (own[:1], "evaluate.held_out_a is given, but evaluate.held_out_b is not"),
        "both ways": ([*own, ("evaluate.held_out", 4)], "choose one of the two ways to hold faces"),
        "the trained folder": (
            [("evaluate.held_out_a", many[0]), own[1]],
            "evaluate.held_out_a must share no faces with data.input_a, but both use the folder",
        ),
        "linked faces": (
            [own[0], ("evaluate.held_out_b", inside)],
            "evaluate.held_out_b must share no faces with data.input_b, but",
        ),
        "one for both": (
            [own[0], ("evaluate.held_out_b", apart[0])],
            "evaluate.held_out_b must share no faces with evaluate.held_out_a, but",
        ),
        "no folder": ([own[0], ("evaluate.held_out_b", "nowhere")], "evaluate.held_out_b: "),
        "empty folder": ([own[0], ("evaluate.held_out_b", empty)], "holds no PNG"),
        "too many": (
            [("evaluate.held_out", 2)],
            f"faces to train on, at least {MINIMUM_FACES} are needed; make it larger",
        ),
        "none": ([("evaluate.held_out", 997)], "= 997 holds out none of 36 faces; make it smaller"),
        "nothing to measure": (
            [("evaluate.landmark_model", two)],
            "evaluate.landmark_model needs faces to measure on; set evaluate.held_out",
        ),
        "missing network": (
            [*own, ("evaluate.embedding_model", tmp_path / "none.onnx")],
            "none.onnx cannot be read: No such file",
        ),
        "other landmarks": ([*own, ("evaluate.landmark_model", two)], "must give 136 numbers"),
        "far landmarks": (
            [*own, ("evaluate.landmark_model", many_px)],
            "misses those of the faces",
        ),
    }


REFUSALS = (
    *("one folder", "both ways", "the trained folder", "linked faces", "one for both", "no folder"),
    *("empty folder", "too many", "none", "nothing to measure", "missing network"),
    *("other landmarks", "far landmarks"),
)


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_one_line(many, apart, tmp_path, case, capfd):
    pairs, message = _refusals(many, apart, tmp_path)[case]
    assert main(_words(many, tmp_path / "model", "-i", "1", *_sets(*pairs))) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
