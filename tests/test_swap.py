"""`mien swap`: the faces of a film, decoded as the other side, in its frames again."""

import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import struct
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import deepfacelab as dfl
import numpy as np
import pytest
import torch
import warp_reference

from mien.cli import main
from mien.core.blend import BlendOptions, face_mask, matched, softened
from mien.core.checkpoint import inference
from mien.core.convert import convert, film, output, output_lock, video, video_output
from mien.core.convert.film import SwapSettings, swap_film
from mien.core.convert.frames import Frame, read_picture
from mien.core.convert.patch import cut_patch, paste
from mien.core.convert.placement import read_faces
from mien.core.data.decode import decode_one
from mien.core.faces.folder import read_face
from mien.core.faces.geometry import Crop, crop_matrix, rescaled, transform
from mien.core.faces.picture import open_picture
from mien.core.faces.png import read_header, write_face
from mien.core.faces.synthetic import draw_folder
from mien.core.swapping import BatchDecoder, SwapModel, load_model
from mien.core.system.durable_files import temporary_name

NUM_FACES = 5


class StandIn(torch.nn.Module):
    """A network whose faces come back as they are, darker by a share, enlarged by a factor."""

    def __init__(self, factor=1, gain=1.0, learn_mask=False):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.factor, self.build = factor, SimpleNamespace(learn_mask=learn_mask)
        self.input_px, self.output_px = 64, (64 * factor,)
        self.batches = []

    def swap(self, faces_bchw, side):
        self.batches.append(len(faces_bchw))
        if self.factor > 1:
            faces_bchw = torch.nn.functional.interpolate(
                faces_bchw, scale_factor=self.factor, mode="bicubic"
            )
        faces_bchw = faces_bchw * self.gain
        if not self.build.learn_mask:
            return (faces_bchw,)
        mask = torch.zeros_like(faces_bchw[:, :1])
        edge_px = self.output_px[0]
        mask[:, :, edge_px // 4 : -edge_px // 4, edge_px // 4 : -edge_px // 4] = 1
        return faces_bchw, mask


def model_of(**options):
    return SwapModel(
        network=StandIn(**options).eval(),
        sides=("a", "b"),
        centering="face",
        coverage=87.5,
        vertical_offset=0,
        run_id="0123abcd",
        iterations=7,
    )


def frame_of(path, scale=1.0):
    """The frame that a drawn face was cut out of, as far as its picture goes, on grey."""
    face, header = read_face(path)
    height_px, width_px = header.source["source_frame_dims"]
    head_23 = crop_matrix(face.alignment, Crop("head", 1.0, 0.0, face.edge_px))
    frame = np.full((height_px, width_px, 3), 110, np.uint8)
    with open_picture(path, face.edge_px) as image:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        mode = cv2.BORDER_TRANSPARENT
        return cv2.warpAffine(
            image, head_23, (width_px, height_px), dst=frame, flags=flags, borderMode=mode
        )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of faces and one of their frames, with one more that has no face."""
    root = tmp_path_factory.mktemp("film")
    draw_folder(root / "faces", identity="a", count=NUM_FACES, size_px=128)
    (root / "frames").mkdir()
    for path in sorted((root / "faces").iterdir()):
        name = read_header(path)[1].source["source_filename"]
        cv2.imwrite(str(root / "frames" / name), frame_of(path))
    cv2.imwrite(str(root / "frames" / "drawn_empty.png"), np.zeros((40, 60, 3), np.uint8))
    return root


@pytest.fixture
def place(drawn, tmp_path):
    """The same, the test's own."""
    shutil.copytree(drawn, tmp_path / "film")
    return tmp_path / "film"


@pytest.fixture
def run(place, monkeypatch):
    """Swaps the film by a stand-in; gives the report and the events."""

    def swap(model=None, should_stop=lambda: False, **settings):
        model = model or model_of()
        monkeypatch.setattr(film, "load_model", lambda *_, **__: model)
        events = []
        settings = {
            "model": place / "model",
            "faces": place / "faces",
            "frames": place / "frames",
            "output": place / "out",
            "device": "cpu",
            "color": "off",
            "num_threads": 2,
        } | settings
        report = swap_film(
            SwapSettings(**settings),
            emit=lambda event, **fields: events.append({"event": event, **fields}),
            should_stop=should_stop,
        )
        return report, events

    return swap


def faces_of(place):
    return sorted((place / "faces").iterdir())


def stem_of(path):
    return Path(read_header(path)[1].source["source_filename"]).stem


def shift_of(before, after):
    """How far a picture has moved, px in x and y, by least squares over its slopes."""
    before, after = (cv2.GaussianBlur(each, (0, 0), 1.5).astype(float) for each in (before, after))
    slopes = np.stack([np.gradient(before, axis=axis).ravel() for axis in (1, 0)], axis=1)
    return -np.linalg.lstsq(slopes, (after - before).ravel(), rcond=None)[0]


# Geometry


@pytest.mark.parametrize("centering", ["face", "head", "legacy"])
@pytest.mark.parametrize("size_px", [32, 64, 128, 192])
def test_a_patch_is_the_crop_of_training(drawn, centering, size_px):
    """It differs by the rounding of the corner of a crop to a px of the face's picture."""
    path = faces_of(drawn)[0]
    face, crop = read_face(path)[0], Crop(centering, 0.9, 0.1, size_px)
    patch_ssc = cut_patch(frame_of(path), face.frame_matrix(crop), size_px) * 255
    trained_ssc = decode_one(face, crop).astype(float)
    inner = slice(size_px // 8, -size_px // 8)
    moved = shift_of(trained_ssc[inner, inner, 1], patch_ssc[inner, inner, 1])
    assert np.abs(moved).max() < 0.55 * size_px / face.crop_box(crop).side


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.7])
def test_sizes_of_a_patch_show_the_same_area(factor):
    matrix_23 = np.array([[0.8, 0.3, -4.0], [-0.3, 0.8, 9.0]])
    corner = matrix_23 @ (20, 30, 1) + 0.5  # measured from the edge of the first pixel
    assert np.allclose(rescaled(matrix_23, factor) @ (20, 30, 1) + 0.5, corner * factor)


# A face's edge, angle and centre in its frame, px and degrees.
PLACES = {
    "small": (60, 0, (91.3, 78.7)),
    "small and turned": (60, 33, (91.3, 78.7)),
    "as large as its patch": (64, -90, (80.25, 70)),
    "larger than its frame": (400, -21, (95.1, 84.8)),
    "upside down in a corner": (150, 171, (30.6, 115.2)),
    "at the edge": (60, 8, (190.4, 70)),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("at", PLACES)
def test_each_pixel_of_the_way_out_and_back_is_that_of_the_reference(at, dtype):
    (face_px, degrees, centre_xy), size_px = PLACES[at], 64
    turn, scale = math.radians(degrees), size_px / face_px
    cosine, sine = scale * math.cos(turn), scale * math.sin(turn)
    turn_22 = np.array([[cosine, sine], [-sine, cosine]])
    matrix_23 = np.column_stack([turn_22, (size_px - 1) / 2 - turn_22 @ centre_xy])
    rng, peak = np.random.default_rng(3), np.iinfo(dtype).max
    frame = rng.integers(0, peak, (170, 200, 3), dtype, endpoint=True)
    mask_ss = np.pad(rng.random((44, 44), np.float32), 10)

    # Half a level is the last rounding; what fp32 adds moves only levels that lie at a tie.
    most_levels = 0.5 + 2e-5 * peak

    patch_ssc = cut_patch(frame, matrix_23, size_px)
    differences = np.abs(patch_ssc * peak - warp_reference.cut(frame, matrix_23, size_px))
    # Cut at the frame's own size first, a level at a tie there is a share of one in a mean.
    assert differences.max() < most_levels + (0.25 if face_px > size_px else 0)

    after = frame.copy()
    paste(after, patch_ssc, mask_ss, matrix_23)
    expected_hwc = warp_reference.pasted(frame, patch_ssc, mask_ss, matrix_23)
    assert np.abs(after - expected_hwc).max() < most_levels
    assert not (after != frame)[expected_hwc == frame].any()


def test_each_pixel_of_a_converted_frame_is_that_of_the_reference(run, place):
    """The model gives each face back as it got it, and the whole patch goes into the frame."""
    model, path = model_of(), faces_of(place)[0]
    run(model, mask="none", feather_px=0.0)
    before, after = (
        read_picture(place / folder / f"{stem_of(path)}.png") for folder in ("frames", "out")
    )
    matrix_23, whole_ss = read_face(path)[0].frame_matrix(model.crop), np.ones((64, 64))
    patch_ssc = np.rint(warp_reference.cut(before, matrix_23, 64)) / 255
    expected_hwc = warp_reference.pasted(before, patch_ssc, whole_ss, matrix_23)
    differences = np.abs(after - np.rint(expected_hwc))
    # Where a level of the patch lies at a tie, or one of the frame.
    assert differences.max() <= 1
    assert np.count_nonzero(differences) < 1e-3 * np.count_nonzero(after != before)
    assert not (after != before)[expected_hwc == before].any()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_an_identity_changes_nothing_outside_the_mask_and_moves_nothing_inside(drawn, factor):
    for path in faces_of(drawn)[:3]:
        before, after, mask_hw = _identity(path, factor)
        change = after.astype(int) - before
        assert not change[mask_hw == 0].any()
        assert np.abs(change[mask_hw > 0]).mean() < 2.5
        moved = shift_of(before[..., 1], after[..., 1])
        assert np.abs(moved).max() < 0.03, moved


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_whole_conversion_moves_nothing_and_a_planted_shift_is_seen(
    run, place, monkeypatch, is_planted
):
    """The shift is half a pixel of the decoded face, as of a matrix that only multiplies."""
    if is_planted:
        monkeypatch.setattr(convert, "rescaled", lambda matrix_23, factor: matrix_23 * factor)
    run(model_of(factor=2), feather_px=0.0)
    for path in faces_of(place):
        before, after = (
            read_picture(place / folder / f"{stem_of(path)}.png") for folder in ("frames", "out")
        )
        moved = np.abs(shift_of(before[..., 1], after[..., 1])).max()
        assert moved > 0.1 if is_planted else moved < 0.03


def _identity(path, factor):
    """A frame before and after its face was put back enlarged, and the mask in it."""
    face, size_px = read_face(path)[0], 64
    frame = frame_of(path)
    matrix_23 = face.frame_matrix(Crop("face", 0.875, 0.0, size_px))
    patch_ssc = cut_patch(frame, matrix_23, size_px)
    edge_px = size_px * factor
    large_ssc = cv2.resize(patch_ssc, (edge_px, edge_px), interpolation=cv2.INTER_CUBIC)
    large_23 = rescaled(matrix_23, factor)
    options = BlendOptions(mask="extended", feather_px=0, erode_px=0, color="off")
    mask_ss = face_mask(options, face, large_23, edge_px, None)
    after, mask_hw3 = frame.copy(), np.zeros((*frame.shape[:2], 3), np.uint16)
    paste(after, large_ssc, mask_ss, large_23)
    paste(mask_hw3, np.ones_like(large_ssc), mask_ss, large_23)
    return frame, after, mask_hw3[..., 0]


def test_a_face_that_leaves_the_frame_is_blended_as_far_as_it_goes(drawn):
    path = faces_of(drawn)[0]
    face, frame = read_face(path)[0], frame_of(path)
    left = int(face.landmarks_l2[30, 0])
    half = np.ascontiguousarray(frame[:, left:])
    matrix_23 = face.frame_matrix(Crop("face", 0.875, 0.0, 64))
    matrix_23[:, 2] += matrix_23[:, 0] * left
    patch_ssc = cut_patch(half, matrix_23, 64)
    paste(half, patch_ssc, np.ones((64, 64), np.float32), matrix_23)
    assert np.abs(half.astype(int) - frame[:, left:]).mean() < 2


def test_a_face_far_larger_or_smaller_than_any_takes_no_memory_and_fails_nothing():
    frame = np.full((32, 48, 3), 9, np.uint8)
    for scale in (1e-5, 1e3, 1e6):
        matrix_23 = np.array([[scale, 0, 0.0], [0, scale, 0.0]])
        patch_ssc = cut_patch(frame, matrix_23, 64)
        paste(frame, patch_ssc, np.ones((64, 64), np.float32), matrix_23)
    assert frame.shape == (32, 48, 3)


# Blending


def test_a_mask_is_eroded_and_feathered_inwards_only():
    mask_ss = np.zeros((64, 64), np.float32)
    mask_ss[10:54, 20:] = 1  # up to the edge of the face on the right
    soft_ss = softened(mask_ss, 3, 8)
    assert not soft_ss[mask_ss == 0].any()
    assert not soft_ss[:, -3:].any()
    assert not soft_ss[:13].any()
    assert soft_ss[32, 40] == 1
    row = soft_ss[32, 20:40]
    assert (np.diff(row) >= 0).all()
    assert np.count_nonzero((row > 0) & (row < 1)) == 7
    assert softened(mask_ss, 0, 0) is mask_ss


@pytest.mark.parametrize("mask", ["components", "extended", "vgg-clear", "bisenet-fp_face"])
def test_each_mask_lies_on_the_face(drawn, mask):
    face = read_face(faces_of(drawn)[0])[0]
    matrix_23 = face.frame_matrix(Crop("face", 0.875, 0.0, 256))
    options = BlendOptions(mask=mask, feather_px=0, erode_px=0, color="off")
    mask_ss = face_mask(options, face, matrix_23, 256, None)
    landmarks_l2 = face.landmarks_l2 @ matrix_23[:, :2].T + matrix_23[:, 2]
    columns, rows = np.rint(landmarks_l2[27:48]).astype(int).T  # nose and eyes
    assert mask_ss[rows, columns].min() > 0.9
    assert mask_ss[0].max() == 0
    assert 0.15 < mask_ss.mean() < 0.6


def test_a_stored_mask_is_moved_without_a_shift(drawn):
    """It equals the stored one where the face is decoded in just that size and place."""
    face = read_face(faces_of(drawn)[0])[0]
    stored = face.stored_mask("vgg-clear")
    stored_23 = crop_matrix(face.alignment, Crop(stored.centering, 1.0, 0.0, stored.size_px))
    options = BlendOptions(mask="vgg-clear", feather_px=0, erode_px=0, color="off")
    mask_ss = face_mask(options, face, stored_23, stored.size_px, None)
    assert np.abs(mask_ss * 255 - stored.pixels()).max() < 1


@pytest.mark.parametrize("color", ["mean", "full"])
def test_colours_become_those_of_the_frame(color):
    random = np.random.default_rng(0)
    original = random.normal((0.3, 0.5, 0.4), 0.06, (64, 64, 3)).clip(0, 1).astype(np.float32)
    decoded = random.normal((0.6, 0.4, 0.5), 0.1, (128, 128, 3)).clip(0, 1).astype(np.float32)
    decoded = cv2.GaussianBlur(decoded, (0, 0), 2)
    original = cv2.GaussianBlur(original, (0, 0), 1)
    mask_ss = np.zeros((128, 128), np.float32)
    mask_ss[32:96, 32:96] = 1
    result = matched(decoded, original, mask_ss, color)
    lab, wanted = (
        cv2.cvtColor(each, cv2.COLOR_BGR2Lab)[len(each) // 4 : -len(each) // 4][
            :, len(each) // 4 : -len(each) // 4
        ].reshape(-1, 3)
        for each in (cv2.resize(result, (64, 64), interpolation=cv2.INTER_AREA), original)
    )
    assert np.abs(lab.mean(axis=0) - wanted.mean(axis=0)).max() < 0.3
    spreads = lab.std(axis=0) / wanted.std(axis=0)
    assert (np.abs(spreads - 1).max() < 0.1) == (color == "full")
    assert matched(decoded, original, mask_ss, "off") is decoded
    assert matched(decoded, original, np.zeros_like(mask_ss), color) is decoded


def test_colours_of_the_same_face_stay():
    face = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    ones = np.ones((64, 64), np.float32)
    changed = np.abs(matched(face, face, ones, "full") - face)
    assert changed.max() < 0.004  # 0.0034 by OpenCV's way to LAB and back


# The film


def test_a_folder_of_frames(run, place):
    report, events = run(model_of(gain=0.5))
    assert (report.frames, report.faces, report.kept) == (NUM_FACES + 1, NUM_FACES, 0)
    assert [event["event"] for event in events][0] == "start"
    assert events[-1]["frame"] == NUM_FACES + 1
    out, frames = place / "out", place / "frames"
    names = {path.name for path in frames.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"mien_swap.json"}
    assert (out / "drawn_empty.png").read_bytes() == (frames / "drawn_empty.png").read_bytes()
    for path in faces_of(place):
        before, after = (read_picture(each / f"{stem_of(path)}.png") for each in (frames, out))
        x, y = read_face(path)[0].landmarks_l2[30].astype(int)
        assert np.abs(after[y, x].astype(float) - before[y, x] / 2).max() < 6  # the tip of the nose
        assert np.array_equal(before[:9], after[:9])


def test_each_swapped_frame_says_that_it_is_synthetic(run, place):
    run()
    content = (place / "out" / f"{stem_of(faces_of(place)[0])}.png").read_bytes()
    texts, position = {}, 8
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"tEXt":
            keyword, _, text = content[position + 8 : position + 8 + length].partition(b"\0")
            texts[keyword] = text
        position += 12 + length
    assert texts[b"Description"].startswith(b"synthetic face: swapped by mien ")
    assert b"run 0123abcd, iteration 7, decoded as b" in texts[b"Description"]
    manifest = json.loads((place / "out" / "mien_swap.json").read_text())
    assert manifest["kind"] == "synthetic face"
    assert manifest["run_id"] == "0123abcd"


def test_batches_hold_faces_of_several_frames_and_change_nothing(run, place):
    models = [model_of(gain=0.7) for _ in range(2)]
    for model, batch_size in zip(models, (1, 3), strict=True):
        run(model, batch_size=batch_size, output=place / f"by_{batch_size}")
    assert models[0].network.batches == [1] * NUM_FACES
    assert models[1].network.batches == [3, NUM_FACES - 3]
    for path in (place / "by_1").glob("*.png"):
        assert path.read_bytes() == (place / "by_3" / path.name).read_bytes()


def test_rare_faces_hold_no_frames_up(run, place, monkeypatch):
    monkeypatch.setattr(convert, "_MOST_WAITING", 1)
    model = model_of()
    run(model, batch_size=16)
    assert model.network.batches == [1] * NUM_FACES


def test_several_faces_of_a_frame(run, place):
    """Faces of two frames beside each other in one."""
    first, second = faces_of(place)[:2]
    frames = [frame_of(path) for path in (first, second)]
    name = read_header(first)[1].source["source_filename"]
    cv2.imwrite(str(place / "frames" / name), np.hstack(frames))
    for index, path in enumerate((first, second)):
        face, header = read_face(path)
        header.landmarks_l2 = header.landmarks_l2 + np.float32((index * frames[0].shape[1], 0))
        header.source |= {"source_filename": name, "face_index": index}
        header.source["source_frame_dims"] = np.hstack(frames).shape[:2]
        with open_picture(path, face.edge_px) as image:
            write_face(path, image.copy(), header)
    report, _ = run(model_of(gain=0.5))
    assert report.faces == NUM_FACES
    after = read_picture(place / "out" / name)
    for path in (first, second):
        x, y = read_face(path)[0].landmarks_l2[30].astype(int)
        before = np.hstack(frames)[y, x].astype(float)
        assert np.abs(after[y, x] - before / 2).max() < 6


# Faces of DeepFaceLab


def as_jpegs(place, folder="jpegs", **changes):
    """The film's faces as DeepFaceLab cuts them out, turned a little; changes of what they say."""
    (place / folder).mkdir()
    for number, path in enumerate(faces_of(place)):
        face, header = read_face(path)
        frame = read_picture(place / "frames" / header.source["source_filename"])
        to_jpeg_23 = dfl.jpeg_matrix(face.alignment, 256, "whole_face", number / 2)
        values = {
            "landmarks": transform(face.landmarks_l2, to_jpeg_23).tolist(),
            "source_filename": header.source["source_filename"],
            "source_landmarks": face.landmarks_l2.tolist(),
            "image_to_face_mat": to_jpeg_23,
        } | changes
        jpeg = dfl.jpeg_with(
            cv2.warpAffine(frame, to_jpeg_23, (256, 256), flags=cv2.INTER_CUBIC),
            dfl.dumped({key: value for key, value in values.items() if value is not None}),
        )
        (place / folder / f"{path.stem}_0.jpg").write_bytes(jpeg)
    return sorted((place / folder).iterdir())


@pytest.mark.parametrize("centering", ["face", "head", "legacy"])
def test_a_patch_of_a_face_of_deepfacelab_is_the_crop_of_training(place, centering):
    path, crop = as_jpegs(place)[3], Crop(centering, 0.7, 0.0, 96)
    face = read_face(path)[0]
    frame = read_picture(place / "frames" / face.source_filename)
    patch_ssc = cut_patch(frame, face.frame_matrix(crop), 96) * 255
    trained_ssc = decode_one(face, crop).astype(float)
    moved = shift_of(trained_ssc[24:-24, 24:-24, 1], patch_ssc[24:-24, 24:-24, 1])
    assert np.abs(moved).max() < 0.05, moved


@pytest.mark.parametrize("kind", ["jpegs", "pack", "matrix alone"])
def test_faces_of_deepfacelab_are_swapped_without_a_shift(run, place, kind):
    paths = as_jpegs(place, **({"source_landmarks": None} if kind == "matrix alone" else {}))
    faces = place / "jpegs"
    if kind == "pack":
        faces = place / "faceset.pak"
        faces.write_bytes(dfl.pack([path.read_bytes() for path in paths]))
    report, _ = run(model_of(factor=2), faces=faces, feather_px=0.0)
    assert (report.frames, report.faces) == (NUM_FACES + 1, NUM_FACES)
    for path in faces_of(place):
        before, after = (
            read_picture(place / folder / f"{stem_of(path)}.png") for folder in ("frames", "out")
        )
        assert np.abs(after.astype(int) - before).max() > 0
        assert np.abs(shift_of(before[..., 1], after[..., 1])).max() < 0.03


def test_the_mask_of_a_face_of_deepfacelab_lies_on_the_face(place):
    """A disc round the tip of the nose, at an edge of its own, is found there in the patch."""
    path = as_jpegs(place)[3]
    nose_xy = read_face(path)[0].landmarks_l2[30]
    rows, columns = np.indices((128, 128))
    x, y = (nose_xy + 0.5) / 2 - 0.5
    disc = np.where((columns - x) ** 2 + (rows - y) ** 2 < 400, 255, 0).astype(np.uint8)
    xseg = np.frombuffer(cv2.imencode(".png", disc)[1], np.uint8)
    face = read_face(as_jpegs(place, "masked", xseg_mask=xseg)[3])[0]
    crop_23 = face.frame_matrix(Crop("face", 1.0, 0.0, 256))
    options = BlendOptions(mask="custom_head", feather_px=0, erode_px=0, color="off")
    mask_ss = face_mask(options, face, crop_23, 256, None)
    rows, columns = np.indices(mask_ss.shape)
    centre = np.array([(columns * mask_ss).sum(), (rows * mask_ss).sum()]) / mask_ss.sum()
    assert np.abs(centre - transform(face.source_landmarks_l2, crop_23)[30]).max() < 0.25


def test_stored_is_the_mask_that_the_faces_have(run, place):
    xseg = np.frombuffer(cv2.imencode(".png", np.full((64, 64), 255, np.uint8))[1], np.uint8)
    as_jpegs(place, xseg_mask=xseg)
    _, events = run(faces=place / "jpegs", mask="stored")
    assert events[0]["mask"] == "custom_head"
    with pytest.raises(ValueError, match="has 2 stored masks .* give --mask with one of these"):
        run(mask="stored", output=place / "other")
    as_jpegs(place, "bare")
    with pytest.raises(ValueError, match=r"has 0 stored masks \(none\)"):
        run(faces=place / "bare", mask="stored", output=place / "other")


def test_several_faces_of_deepfacelab_in_a_frame_come_in_their_order(place):
    paths = as_jpegs(place, source_filename="one.png")
    for number, path in enumerate(reversed(paths)):
        path.rename(path.with_name(f"one_{number + 8}.jpg"))
    found = read_faces(place / "jpegs", "extended", pytest.fail)
    assert [each.face.path.stem for each in found["one"]] == [f"one_{n}" for n in range(8, 13)]


def test_faces_of_deepfacelab_that_tell_no_place_are_named(run, place):
    as_jpegs(place, source_landmarks=None, image_to_face_mat=None)
    with pytest.raises(ValueError, match="holds no usable face: .*does not say in which frame"):
        run(faces=place / "jpegs")
    as_jpegs(place, "nameless", source_filename=None)
    with pytest.raises(ValueError, match="holds no usable face: .*does not say in which frame"):
        run(faces=place / "nameless")
    (place / "empty.pak").write_bytes(dfl.pack([]))
    with pytest.raises(ValueError, match=r"empty.pak holds no usable face$"):
        run(faces=place / "empty.pak")


def test_jpegs_beside_face_pngs_are_told(run, place):
    for path in as_jpegs(place):
        path.rename(place / "faces" / path.name)
    _, events = run()
    (warning,) = (event["message"] for event in events if event["event"] == "warning")
    assert f"{NUM_FACES} JPEGs are not used: give JPEGs of DeepFaceLab a folder" in warning


# Frames


@pytest.mark.parametrize("kind", ["16 bits", "alpha", "16 bits and alpha", "grey", "tiff", "jpeg"])
def test_kinds_of_frames(run, place, kind):
    path = faces_of(place)[0]
    frame_path = place / "frames" / f"{stem_of(path)}.png"
    frame = read_picture(frame_path)
    if "16" in kind or kind == "tiff":
        frame = frame.astype(np.uint16) * 257 - (frame > 0) * np.uint16(3)
    if "alpha" in kind:
        alpha = np.arange(frame[..., 0].size).reshape(frame.shape[:2]).astype(frame.dtype)
        frame = np.dstack([frame, alpha])
    if kind == "grey":
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    frame_path.unlink()
    suffix = {"tiff": ".tif", "jpeg": ".jpg"}.get(kind, ".png")
    cv2.imwrite(str(frame_path.with_suffix(suffix)), frame)
    before = read_picture(frame_path.with_suffix(suffix))
    run(model_of(gain=0.5))
    after = read_picture(place / "out" / frame_path.name)
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert np.array_equal(after[:9], before[:9])
    x, y = read_face(path)[0].landmarks_l2[30].astype(int)
    peak = np.iinfo(before.dtype).max
    assert np.abs(after[y, x, :3] / peak - before[y, x, :3] / peak / 2).max() < 0.025
    if "alpha" in kind:
        assert np.array_equal(after[..., 3], before[..., 3])


def test_a_jpeg_that_is_to_be_shown_turned_is_turned(run, place):
    """As extraction sees it, which found the faces in the upright frame."""
    path = faces_of(place)[0]
    frame_path = place / "frames" / f"{stem_of(path)}.png"
    upright = read_picture(frame_path)
    frame_path.unlink()
    content = cv2.imencode(".jpg", np.rot90(upright))[1].tobytes()
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # turn it by 90 degrees, clockwise
    body = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + orientation + bytes(4)
    exif = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
    frame_path.with_suffix(".jpg").write_bytes(content[:2] + exif + content[2:])
    run()
    after = read_picture(place / "out" / frame_path.name)
    assert np.abs(after.astype(int) - upright).mean() < 2


def test_a_learned_mask_is_taken_where_there_is_one(run, place):
    _, events = run(model_of(learn_mask=True))
    assert events[0]["mask"] == "learned"
    _, events = run(model_of(), output=place / "other")
    assert events[0]["mask"] == "extended"
    with pytest.raises(ValueError, match="has learned no mask: give --mask components or"):
        run(model_of(), mask="learned", output=place / "third")
    assert not (place / "third").exists()


def test_a_stopped_conversion_goes_on_where_it_was(run, place):
    whole, _ = run(output=place / "whole")
    calls = iter([False, False, True])
    stopped, _ = run(should_stop=lambda: next(calls, True), num_threads=1, batch_size=1)
    assert stopped.is_stopped
    assert stopped.frames == 3
    temporary_name(place / "out/frame.png").write_bytes(b"of a kill")
    resumed, events = run()
    assert resumed.frames == whole.frames
    assert resumed.kept == events[0]["kept"] >= 3
    assert resumed.faces + resumed.kept >= NUM_FACES
    for path in (place / "whole").glob("*.png"):
        assert path.read_bytes() == (place / "out" / path.name).read_bytes()
    assert sorted(os.listdir(place / "out")) == sorted(os.listdir(place / "whole"))


@pytest.mark.parametrize("output_name", ["out", "film.mp4"])
def test_a_second_swap_to_the_same_output_is_refused(run, place, clip, output_name):
    settings = {"frames": clip, "output": place / output_name, "num_threads": 1}
    folder = place / ("out" if output_name == "out" else "film.mp4.parts")
    refusals = []

    def swap_too():
        if not refusals:
            part = temporary_name(folder / "part")
            part.write_bytes(b"under way")
            with pytest.raises(ValueError, match="being written to by another `mien swap`") as told:
                run(**settings)
            part.unlink()  # fails where it was swept
            refusals.append(str(told.value))
        return False

    report, events = run(should_stop=swap_too, **settings)
    assert report.frames == NUM_FACES + 1
    assert "\n" not in refusals[0]
    assert not [event for event in events if event["event"] == "warning"]
    assert run(**settings | {"force": True})[0].frames == NUM_FACES + 1, "its end lets go"


def test_a_disk_without_flock_is_told(run, place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output_lock.fcntl, "flock", refuse)
    report, events = run()
    (line,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "has no flock: let no other `mien swap` write there" in line
    assert report.frames == NUM_FACES + 1


def test_frames_made_otherwise_are_not_completed(run, place):
    run()
    for settings in ({"color": "mean"}, {"side": "a"}, {"feather_px": 1.0}, {"mask": "components"}):
        with pytest.raises(ValueError, match="holds frames made with .* give a new folder"):
            run(**settings)
    manifest = place / "out" / "mien_swap.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"weights": "ema"}))
    with pytest.raises(ValueError, match="made with weights 'ema', now it is 'raw'"):
        run()
    manifest.write_text("[" * 5000)
    with pytest.raises(ValueError, match="is damaged"):
        run()


def test_a_preview_swaps_some_frames_and_the_whole_goes_on_with_them(run, place):
    report, _ = run(preview=2)
    assert (report.frames, report.faces) == (2, 2)
    assert len(list((place / "out").glob("*.png"))) == 2
    report, _ = run()
    assert (report.frames, report.kept) == (NUM_FACES + 1, 2)


def test_a_sheet_shows_faces_before_and_after_even_of_frames_that_are_there(run, place):
    for name in ("first.png", "second.png"):
        report, _ = run(sheet=place / name)
        assert report.sheet == place / name
    sheets = [(place / name).read_bytes() for name in ("first.png", "second.png")]
    assert sheets[0] == sheets[1]
    assert b"synthetic face" in sheets[0]
    assert read_picture(place / "first.png").shape[1] > 4 * 192


# Mistakes: one line, and nothing is written


def _no_frames(place):
    shutil.rmtree(place / "frames")
    (place / "frames").mkdir()
    return {}, "holds no frames"


def _gone(place):
    shutil.rmtree(place / "frames")
    return {}, "does not exist"


def _other_film(place):
    for path in (place / "frames").iterdir():
        path.rename(path.with_stem(f"other_{path.stem}"))
    return {}, "the faces are of another film"


def _frame_missing(place):
    (place / "frames" / f"{stem_of(faces_of(place)[1])}.png").unlink()
    return {}, "lacks 1 of the 5 frames .*--partial"


def _other_sizes(place):
    for path in (place / "frames").iterdir():
        cv2.imwrite(str(path), read_picture(path)[::2, ::2])
    return {}, "give the frames that the faces were extracted from"


def _outside(place):
    path = faces_of(place)[0]
    face, header = read_face(path)
    header.landmarks_l2 = header.landmarks_l2 + np.float32(4000)
    with open_picture(path, face.edge_px) as image:
        write_face(path, image.copy(), header)
    return {}, "all of its landmarks lie outside of its frame"


def _damaged_frame(place):
    path = place / "frames" / f"{stem_of(faces_of(place)[0])}.png"
    path.write_bytes(path.read_bytes()[:900])
    return {}, "damaged or cut short"


def _twins(place):
    path = place / "frames" / "drawn_empty.png"
    cv2.imwrite(str(path.with_suffix(".jpg")), read_picture(path))
    return {}, "cannot tell apart"


def _into_the_frames(place):
    return {"output": place / "frames" / "out"}, "lies in .*frames: choose another place"


def _sheet_among_faces(place):
    return {"sheet": place / "faces" / "sheet.png"}, "lies in .*faces: choose another place"


def _not_empty(place):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    return {}, "is not empty"


def _no_parent(place):
    return {"output": place / "none" / "out"}, "make it first"


def _no_such_mask(place):
    return {"mask": "unet-dfl"}, r"has no mask 'unet-dfl' \(stored: .*vgg-clear\): give --mask"


def _no_faces(place):
    return {"faces": place / "frames"}, "holds no usable face"


def _film_there(place):
    (place / "film.mp4").write_text("mine")
    return {"output": place / "film.mp4"}, "exists; add --force"


def _odd_container(place):
    return {"output": place / "film.avi"}, "must end in .mp4, .mkv, .mov"


def _no_video(place):
    (place / "film.mp4").write_text("mine")
    return {"frames": place / "film.mp4"}, "cannot be read as a video"


def _playlist(place):
    (place / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    return {"frames": place / "list.m3u8"}, "cannot be read as a video"


MISTAKES = [
    _no_frames,
    _gone,
    _other_film,
    _frame_missing,
    _other_sizes,
    _outside,
    _damaged_frame,
    _twins,
    _into_the_frames,
    _sheet_among_faces,
    _not_empty,
    _no_parent,
    _no_such_mask,
    _no_faces,
    _film_there,
    _odd_container,
    _no_video,
    _playlist,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__[1:])
def test_mistakes(run, place, mistake):
    settings, text = mistake(place)
    before = {path for path in place.rglob("*") if path != place / "out"}
    with pytest.raises(ValueError, match=text) as error:
        run(**settings)
    assert "\n" not in str(error.value)
    assert {path for path in place.rglob("*") if path != place / "out"} == before


def test_a_frame_that_is_damaged_later_leaves_whole_frames_only(run, place):
    last = place / "frames" / f"{stem_of(faces_of(place)[-1])}.png"
    content = last.read_bytes()
    last.write_bytes(content[:900])
    with pytest.raises(ValueError, match="damaged or cut short"):
        run()
    for path in (place / "out").glob("*.png"):
        assert read_picture(path).size
    last.write_bytes(content)
    report, _ = run()
    assert report.frames == NUM_FACES + 1


def test_missing_frames_can_be_left_out(run, place):
    _frame_missing(place)
    report, events = run(partial=True)
    assert report.faces == NUM_FACES - 1
    assert [event["message"] for event in events if event["event"] == "warning"]


def test_unusable_faces_are_named(run, place):
    path = faces_of(place)[0]
    face, header = read_face(path)
    del header.source["source_filename"]
    with open_picture(path, face.edge_px) as image:
        write_face(path, image.copy(), header)
    _, events = run()
    (message,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "does not name the frame" in message


def test_another_film_in_the_same_folders_is_no_continuation(run, place):
    run()
    path = faces_of(place)[0]
    face, header = read_face(path)
    header = dataclasses.replace(header, landmarks_l2=header.landmarks_l2 + np.float32(1.5))
    with open_picture(path, face.edge_px) as image:
        write_face(path, image.copy(), header)
    before = {each: each.read_bytes() for each in (place / "out").iterdir()}
    with pytest.raises(ValueError, match="holds frames made with landmarks_sha256 .*new folder"):
        run()
    assert {each: each.read_bytes() for each in (place / "out").iterdir()} == before


def test_a_full_disk_is_told_and_frames_are_completed_later(run, place, monkeypatch):
    real, written = output.write_file, []

    def write_two(path, content):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_file", write_two)
        with pytest.raises(ValueError, match="cannot be written: No space left on device; mend"):
            run(num_threads=1)
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(written)
    report, _ = run()
    assert (report.frames, report.kept) == (NUM_FACES + 1, 1)


def test_a_full_disk_leaves_no_sheet(run, place, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(inference, "write_output", refuse)
    with pytest.raises(ValueError, match="cannot write .*sheet.png: No space left on device"):
        run(sheet=place / "sheet.png")
    assert not (place / "sheet.png").exists()


# Videos


av = pytest.importorskip("av")  # of the extra `film`, which the development extra takes


def _write_video(path, frames, times, *, has_sound, pix_fmt="yuv420p"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=44100) if has_sound else None
        for frame, time_ms in zip(frames, times, strict=True):
            coded = av.VideoFrame.from_ndarray(frame, "bgr24")
            coded.pts, coded.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(coded))
        container.mux(stream.encode(None))
        if sound:
            random = np.random.default_rng(0)
            for number in range(12):
                samples = random.normal(0, 0.1, (1, 1024)).astype(np.float32)
                heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                heard.sample_rate, heard.pts = 44100, number * 1024
                container.mux(sound.encode(heard))
            container.mux(sound.encode(None))


def _read_video(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.video[0]))
        images = [frame.to_ndarray(format="bgr24") for frame in frames]
        times = [float(frame.pts * frame.time_base) for frame in frames]
        comment = container.metadata.get("comment", container.metadata.get("COMMENT", ""))
    with av.open(str(path)) as container:
        sound = [bytes(packet) for packet in container.demux() if packet.stream.type == "audio"]
    return images, times, sound, comment


TIMES_MS = [0, 40, 130, 170, 400, 440]  # at no constant rate


@pytest.fixture
def clip(place):
    """A video of the frames, named as extraction names those of a video; the last has no face."""
    frames = [frame_of(path)[:332, :332] for path in faces_of(place)]
    for number, path in enumerate(faces_of(place), 1):
        face, header = read_face(path)
        header.source |= {
            "source_filename": f"clip_{number:06d}.mp4",
            "source_frame_dims": (332, 332),
            "source_is_video": True,
        }
        with open_picture(path, face.edge_px) as image:
            write_face(path, image.copy(), header)
    path = place / "clip.mp4"
    _write_video(path, [*frames, frames[0]], TIMES_MS, has_sound=True)
    return path


@pytest.mark.parametrize(
    ("suffix", "most_frames"),
    [(".mp4", 250), (".mkv", 250), (".mov", 250), (".mp4", 2), (".mkv", 1)],
)
def test_a_video_keeps_its_times_and_its_sound(run, place, clip, suffix, most_frames, monkeypatch):
    """However many parts it is made of."""
    monkeypatch.setattr(video_output, "MOST_FRAMES", most_frames)
    output = place / f"swapped{suffix}"
    report, _ = run(model_of(gain=0.5), frames=clip, output=output)
    assert (report.frames, report.faces) == (NUM_FACES + 1, NUM_FACES)
    before, after = _read_video(clip), _read_video(output)
    # Matroska has no times below nought, where the sound begins: all of it is moved.
    assert np.allclose(np.array(TIMES_MS) / 1000, np.array(after[1]) - after[1][0], atol=2e-3)
    assert len(after[2]) > 10
    assert b"".join(after[2]) == b"".join(before[2])
    assert after[3].startswith("synthetic face: swapped by mien")
    for path, was, now in zip(faces_of(place), before[0], after[0], strict=False):
        x, y = read_face(path)[0].landmarks_l2[30].astype(int)
        assert np.abs(now[y, x].astype(float) - was[y, x] / 2).max() < 12
        assert np.abs(now[:40].astype(int) - was[:40]).mean() < 1  # its colours stay
    assert np.abs(after[0][-1].astype(int) - before[0][-1]).mean() < 1
    assert sorted(path.name for path in place.iterdir() if "swapped" in path.name) == [output.name]
    assert not list(place.glob(".*"))


def test_a_video_becomes_a_folder(run, place, clip):
    report, _ = run(frames=clip)
    names = [f"clip_{number:06d}.png" for number in range(1, NUM_FACES + 2)]
    assert sorted(path.name for path in (place / "out").glob("*.png")) == names
    assert report.frames == NUM_FACES + 1


@pytest.mark.parametrize("size_px", [332, 333])
def test_a_folder_becomes_a_video(run, place, size_px):
    (place / "frames" / "drawn_empty.png").unlink()
    if size_px == 332:
        for path in faces_of(place):
            face, header = read_face(path)
            header.source["source_frame_dims"] = (332, 332)
            with open_picture(path, face.edge_px) as image:
                write_face(path, image.copy(), header)
        for path in (place / "frames").iterdir():
            cv2.imwrite(str(path), read_picture(path)[:332, :332])
    run(output=place / "film.mp4", fps=10.0)
    images, times, _, _ = _read_video(place / "film.mp4")
    assert {image.shape for image in images} == {(size_px, size_px, 3)}
    assert np.allclose(times, np.arange(NUM_FACES) / 10)


def _stop_after(count):
    """A question that is answered with yes when it is asked so often."""
    calls = iter([False] * (count - 1))
    return lambda: next(calls, True)


@pytest.mark.parametrize("most_frames", [2, 250])
def test_a_stopped_video_goes_on_where_it_was(run, place, clip, most_frames, monkeypatch):
    monkeypatch.setattr(video_output, "MOST_FRAMES", most_frames)
    run(model_of(gain=0.5), frames=clip, output=place / "whole.mp4")
    settings = {"frames": clip, "output": place / "film.mp4", "num_threads": 1, "batch_size": 1}
    stopped, _ = run(model_of(gain=0.5), should_stop=_stop_after(3), **settings)
    assert stopped.is_stopped
    assert not (place / "film.mp4").exists()
    (place / "film.mp4.parts/my notes.txt").write_text("mine")
    model = model_of(gain=0.5)
    resumed, events = run(model, **settings)
    assert (resumed.frames, resumed.kept, resumed.faces) == (6, 3, 2)
    assert events[0]["kept"] == 3
    assert model.network.batches == [1, 1]
    (images, times, sound, comment), whole = (
        _read_video(place / name) for name in ("film.mp4", "whole.mp4")
    )
    assert times == whole[1]
    assert sound == whole[2]
    assert comment == whole[3]
    for image, wanted in zip(images, whole[0], strict=True):
        assert np.abs(image.astype(int) - wanted).mean() < 1
    assert [path.name for path in (place / "film.mp4.parts").iterdir()] == ["my notes.txt"]


def test_a_video_that_has_come_to_be_meanwhile_is_not_replaced(run, place, clip):
    made = place / "film.mp4"
    settings = {"frames": clip, "output": made}

    def appear():
        made.write_text("mine")
        return False

    with pytest.raises(ValueError, match="has come to be meanwhile: move it away"):
        run(should_stop=appear, **settings)
    assert made.read_text() == "mine"
    made.unlink()
    report, _ = run(**settings)
    assert report.kept == report.frames, "its parts were kept"


def test_a_video_that_is_not_whole_is_gone_on_with_by_the_same_call_only(run, place, clip):
    settings = {"frames": clip, "output": place / "film.mp4"}
    run(should_stop=_stop_after(2), **settings)
    before = sorted((place / "film.mp4.parts").iterdir())
    for change in ({"color": "mean"}, {"preview": 3}, {"side": "a"}):
        with pytest.raises(ValueError, match="film.mp4.parts holds frames made with .* remove it"):
            run(**settings | change)
    assert sorted((place / "film.mp4.parts").iterdir()) == before
    (place / "other.mp4.parts").mkdir()
    (place / "other.mp4.parts/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="other.mp4.parts is not empty: remove it, or give"):
        run(frames=clip, output=place / "other.mp4")


def test_parts_of_a_video_are_joined_only_where_they_fit(run, place, clip, monkeypatch):
    monkeypatch.setattr(video_output, "MOST_FRAMES", 2)
    settings = {"frames": clip, "output": place / "film.mp4", "num_threads": 1, "batch_size": 1}
    run(should_stop=_stop_after(4), **settings)
    parts = place / "film.mp4.parts"
    (parts / "000000002-000000003.nut").rename(parts / "000000001-000000003.nut")
    with pytest.raises(ValueError, match="no part that begins at frame 2 of .* begin anew"):
        run(**settings)
    (parts / "000000001-000000003.nut").rename(parts / "000000002-000000003.nut")
    _write_video(
        parts / "000000002-000000003.nut", [np.zeros((32, 32, 3), np.uint8)], [0], has_sound=False
    )
    with pytest.raises(ValueError, match="3.nut is not coded as the part before it: remove"):
        run(**settings)
    (parts / "000000002-000000003.nut").write_bytes(b"no video")
    with pytest.raises(ValueError, match="3.nut is damaged: remove it, and call it again"):
        run(**settings)
    assert not (place / "film.mp4").exists()
    (parts / "000000002-000000003.nut").unlink()
    report, _ = run(**settings)
    assert report.frames == NUM_FACES + 1
    assert not parts.exists()


def test_a_sheet_is_made_of_frames_that_a_part_holds(run, place, clip):
    settings = {"frames": clip, "output": place / "film.mp4", "sheet": place / "sheet.png"}
    run(should_stop=_stop_after(5), **settings)
    (place / "sheet.png").unlink()
    report, _ = run(**settings)
    assert report.kept == 0
    assert report.sheet == place / "sheet.png"
    assert len(_read_video(place / "film.mp4")[0]) == NUM_FACES + 1


def _turned(path, degrees):
    """The video, to be shown turned clockwise by whole degrees."""
    cosine, sine = (round(65536 * f(np.deg2rad(degrees))) for f in (np.cos, np.sin))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("kind", ["video", "folder"])
def test_a_video_that_is_to_be_shown_turned_is_turned(run, place, clip, degrees, kind):
    upright = _read_video(clip)[0]
    stored = [np.rot90(image, degrees // 90) for image in upright]
    _write_video(clip, [np.ascontiguousarray(each) for each in stored], TIMES_MS, has_sound=True)
    upright = [np.rot90(image, -degrees // 90) for image in _read_video(clip)[0]]
    _turned(clip, degrees)
    output = place / "film.mp4" if kind == "video" else place / "out"
    report, _ = run(model_of(), frames=clip, output=output)
    assert report.faces == NUM_FACES
    if kind == "video":
        images = _read_video(output)[0]
    else:
        images = [read_picture(path) for path in sorted(output.glob("*.png"))]
    for image, wanted in zip(images, upright, strict=True):
        assert np.abs(image.astype(int) - wanted).mean() < 2


def test_a_video_that_is_turned_by_less_than_a_quarter_is_refused(run, place, clip):
    _turned(clip, 30)
    with pytest.raises(ValueError, match=r"turned by -?\d+ degrees, which is no quarter turn"):
        run(frames=clip, output=place / "film.mp4")
    assert not list(place.glob("film.mp4*"))


def test_a_full_disk_leaves_no_part_of_a_video(tmp_path):
    stems = [str(number) for number in range(80)]
    written = video_output.VideoOutput(
        tmp_path / "film.mp4", stems, None, Fraction(25), "synthetic face", {}, has_sound=False
    )
    random = np.random.default_rng(0)

    def write():
        with closing(written):
            for number in range(80):
                image = random.integers(0, 255, (128, 128, 3), np.uint8)
                frame = Frame(f"{number}", partial(np.copy, image))
                written.put(written.encode(frame, image))
            written.finish()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a disk that is full
    try:
        with pytest.raises(ValueError, match=r"film.mp4 cannot be written: File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_frames_of_other_sizes_make_no_video(run, place):
    """The frame without a face, the last one, is smaller than the others."""
    for path in faces_of(place):
        face, header = read_face(path)
        header.source["source_filename"] = f"a_{stem_of(path)}.png"
        with open_picture(path, face.edge_px) as image:
            write_face(path, image.copy(), header)
    for path in (place / "frames").iterdir():
        if path.name != "drawn_empty.png":
            path.rename(path.with_stem(f"a_{path.stem}"))
    with pytest.raises(ValueError, match="which a video cannot hold: write a folder"):
        run(output=place / "film.mp4")
    assert not (place / "film.mp4").exists()


def test_frames_of_a_video_are_counted_from_one_or_from_nought(place, clip):
    faces = read_faces(place / "faces", "none", print)
    assert video.Video(clip).stems[0] == "clip_000001"
    assert film.first_number(faces) == 1
    assert film.first_number([*faces, "clip_000000"]) == 0


def test_without_pyav_a_line_says_what_to_install(run, place, clip, monkeypatch):
    monkeypatch.setattr(
        video.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name))
    )
    with pytest.raises(ValueError, match=r"pip install 'mien\[film\]'"):
        run(frames=clip)


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder."""
    from mien.core import train

    root = tmp_path_factory.mktemp("trained")
    for side in "ab":
        draw_folder(root / side, identity=side, count=26, size_px=64)
    settings = {
        "model": {"trainer": "lightweight", "options": {"width": 8}},
        "data": {f"input_{side}": str(root / side) for side in "ab"},
        "train": {"batch_size": 4, "iterations": 1},
        "save": {"model_dir": str(root / "model")},
    }
    assert train(settings) == 0
    return root / "model"


def test_the_command(place, trained, capsys):
    command = ["swap", str(trained), "--faces", str(place / "faces"), "--frames"]
    command += [str(place / "frames"), "-o", str(place / "out"), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events][:1] == ["start"]
    assert events[-1]["event"] == "stop"
    assert events[-1]["exit_code"] == 0
    assert events[-1]["frames"] == NUM_FACES + 1
    assert main(command) == 0
    assert f"{NUM_FACES + 1} frames ({NUM_FACES + 1} were there)" in capsys.readouterr().out
    assert main([*command, "--feather", "-1"]) == 2
    assert main([*command, "--color", "off"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "mien swap: --feather must be from 0 to 1024, got -1"


def test_a_batch_in_bf16_is_near_to_one_in_fp32(trained):
    model = load_model(trained)
    edge_px = model.input_px
    faces = np.random.default_rng(0).random((3, edge_px, edge_px, 3), np.float32)
    exact, _ = BatchDecoder(model, "b", 3)(faces)
    near, _ = BatchDecoder(model, "b", 3, torch.bfloat16)(faces)
    assert near.dtype == np.float32
    assert 0 < np.abs(exact - near).max() < 0.03


def test_a_disk_that_cannot_be_written_to(place, trained, capsys, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    command = ["swap", str(trained), "--faces", str(place / "faces"), "--frames"]
    assert main([*command, str(place / "frames"), "-o", str(place / "out"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Read-only file system; make the disk writable, or name another")
