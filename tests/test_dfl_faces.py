"""Faces of DeepFaceLab: its JPEGs and packs, trained on as they are, and imported as PNGs."""

import enum
import json
import os
import pickle
import re
import shutil
import struct
import sys
import types
from pathlib import Path

import cv2
import deepfacelab as dfl
import numpy as np
import pytest
import torch
from conftest import tiny_options

from mien.cli import main
from mien.core.config import DataConfig, EvaluateConfig, LossConfig
from mien.core.convert import placement
from mien.core.data.decode import decode_crops, decode_one
from mien.core.data.sides import open_sides, warnings_of
from mien.core.faces import dfl_pack, dfl_pickle
from mien.core.faces.check import report
from mien.core.faces.dfl_import import import_faces
from mien.core.faces.dfl_pickle import StoredArray, read_values
from mien.core.faces.folder import read_face, read_folder
from mien.core.faces.geometry import (
    Crop,
    align,
    crop_landmarks,
    crop_matrix,
    outside_share,
    transform,
    warp,
)
from mien.core.faces.listing import list_pictures, overlap
from mien.core.faces.masks import stored_mask
from mien.core.faces.png import FaceFileError, read_header
from mien.core.faces.synthetic import draw_face

WHOLE = Crop("face", 1.0, -0.08, 96)
PLAIN = {"dilation": 0, "blur_kernel": 0, "threshold": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty faces of side A."""
    return dfl.write_folder(tmp_path_factory.mktemp("dfl") / "a", 30)


@pytest.fixture(scope="module")
def pak(folder):
    """The same as a pack, in a folder of its own."""
    place = folder.parent / "packed" / "faceset.pak"
    place.parent.mkdir()
    place.write_bytes(dfl.pack([path.read_bytes() for path in sorted(folder.iterdir())]))
    return place


@pytest.fixture
def given(oracle_dir):
    """The oracle's faces and what is expected of them."""
    found = oracle_dir / "exchange/dfl_faces"
    if not found.is_dir():
        pytest.skip("the oracle has no faces of DeepFaceLab")
    return found, json.loads((found / "expected.json").read_text())


def refusal(path: Path) -> str:
    with pytest.raises(FaceFileError) as caught:
        read_face(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder_refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        read_folder(path, minimum=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The oracle


@pytest.mark.oracle
def test_matrices_and_landmarks_are_those_of_the_oracle(given):
    place, expected = given
    for name, wanted in expected.items():
        face, header = read_face(place / name)
        assert (face.edge_px, face.face_type) == (wanted["size"], wanted["face_type"])
        assert header.source["source_filename"] == wanted["source_filename"]
        np.testing.assert_allclose(face.landmarks_l2, wanted["landmarks"], atol=1e-4)
        left, top, right, bottom = wanted["source_rect"]
        assert header.box == (left, top, right - left, bottom - top)
        to_jpeg_23 = np.array(wanted["image_to_face_mat"])
        np.testing.assert_allclose(
            transform(header.landmarks_l2, to_jpeg_23), wanted["landmarks"], atol=2e-3
        )
        assert bool(header.masks) == wanted["has_xseg_mask"]
        assert wanted["crops"]
        for case in wanted["crops"]:
            crop = Crop(case["centering"], case["coverage"], case["y_offset"], case["size"])
            found_l2 = crop_landmarks(face.landmarks_l2, face.alignment, crop)
            np.testing.assert_allclose(found_l2, case["aligned_landmarks"], atol=2e-3)
            corners = np.array([[0, 0], [face.edge_px, 0], [0, face.edge_px]])
            found, exact = (
                corners @ matrix[:, :2].T + matrix[:, 2]
                for matrix in (crop_matrix(face.alignment, crop), np.array(case["matrix"]))
            )
            np.testing.assert_allclose(found, exact, atol=2e-3)


@pytest.mark.oracle
def test_the_oracle_s_pack_holds_the_same_faces(given):
    place, expected = given
    found = read_folder(place / "faceset.pak", minimum=0)
    assert not found.rejected
    for face, name in zip(found.faces, expected, strict=True):
        alone, header = read_face(place / name)
        np.testing.assert_array_equal(face.landmarks_l2, alone.landmarks_l2)
        np.testing.assert_array_equal(decode_one(face, WHOLE), decode_one(alone, WHOLE))
        assert face.read_header().box == header.box


@pytest.mark.oracle
def test_the_hostile_file_is_refused_by_name_and_leaves_nothing(given):
    place, _ = given
    trace = Path("/tmp/dfl_pickle_was_run")
    assert not trace.exists()
    assert re.search(r"its metadata would run '[\w.]+'", refusal(place / "hostile.jpg"))
    assert "without DeepFaceLab's metadata" in refusal(place / "plain_no_metadata.jpg")
    assert not trace.exists()


# The pickle


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("/tmp/mien_pickle_was_run",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_come_back(protocol):
    values = {
        "text": "ä\n",
        "numbers": [0, -1, 255, 256, 70_000, -(2**31), 2**40, 2**70, 0.5, float("inf")],
        "others": (None, True, False, b"bytes", "", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {1: {"a": [[]]}},
        "long": "x" * 300,
        "scalars": [np.float32(1.5), np.float64(2.5), np.int64(-3), np.int32(4), np.bool_(True)],
        "again": ["text", "text"],
    }
    found = read_values(dfl.dumped(values, protocol))
    assert found.pop("scalars") == [1.5, 2.5, -3, 4, True]
    del values["scalars"]
    assert found == values


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("code", sorted(dfl_pickle._DTYPES))
def test_arrays_come_back(protocol, code):
    array = (np.arange(12).reshape(3, 4) % 2).astype(code)
    for one in (array, array.T, array[:0], array.ravel()):
        found = read_values(dfl.dumped(one, protocol))
        assert isinstance(found, StoredArray)
        np.testing.assert_array_equal(found.values(), one)
        assert found.values().dtype == one.dtype


@pytest.mark.parametrize(
    "value",
    [
        *(Hostile(), [1, {"a": Hostile()}], print, dict, os.system, Path("x"), object()),
        *(types.SimpleNamespace(a=1), {1, 2}, frozenset([1]), 1j, np.random.default_rng(0)),
        *(pickle.PickleError("x"), slice(1), type("facelibrary", (), {})),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_would_run_is_refused(value, protocol, tmp_path):
    try:
        data = pickle.dumps(value, protocol)
    except (pickle.PicklingError, AttributeError):
        data = b"\x80\x02cfacelibrary.x\ny\nK\x01\x85R."
    with pytest.raises(FaceFileError, match="would run|opcode|dictionary"):
        read_values(data)
    assert not Path("/tmp/mien_pickle_was_run").exists()


def test_enumerations_are_their_numbers(monkeypatch):
    module = types.ModuleType("core.imagelib.SegIEPolys")
    module.SegIEPolyType = enum.IntEnum(
        "SegIEPolyType", {"EXCLUDE": 0, "INCLUDE": 1}, module=module.__name__
    )
    # As the Pythons of DeepFaceLab write it; 3.11.0 to 3.11.3 call getattr, which is refused.
    module.SegIEPolyType.__reduce_ex__ = lambda self, _: (type(self), (self.value,))
    # Its parents too: a pickle is written after importing them, and mien's own core is not of them.
    for name in ("core", "core.imagelib", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    for protocol in (2, 3, 4):
        assert read_values(pickle.dumps(module.SegIEPolyType.INCLUDE, protocol)) == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x80\x04", "ends early"),
        (b"\x80\x04.", "is damaged"),
        (b"\x80\x06N.", "unknown protocol"),
        (b"\x80\x04X\xff\xff\xff\xffa.", "ends early"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "ends early"),
        (b"\x80\x04h\x05.", "is damaged"),
        (b"\x80\x04t.", "is damaged"),
        (b"\x80\x04NNs.", "is damaged"),
        (b"\x80\x04NNNs.", "no dictionary"),
        (b"\x80\x04NNa.", "no list"),
        (b"\x80\x04}(Nu.", "no dictionary"),
        (b"\x80\x04})Ns.", "neither text nor numbers"),
        (b"\x80\x04N)R.", "no function"),
        (b"\x80\x04cnumpy\nndarray\n)R.", "in a way that NumPy does not"),
        (b"\x80\x04}Nb.", "the state of what is no array"),
        (b"\x80\x04cnumpy.core.multiarray\nscalar\n)R.", "is damaged"),
        (b"\x80\x04cfacelib.FaceType\nFaceType\n)\x85R.", "enumeration that is no number"),
        (b"\x80\x04cos", "is damaged"),
        (b"\x80\x04NN\x93.", "no name"),
        (b"\x80\x04c" + b"x" * 5000 + b"\ny\n.", "would run 'xxx"),
    ],
)
def test_damaged_programs_are_refused(data, text):
    with pytest.raises(FaceFileError, match=text) as caught:
        read_values(data)
    assert len(str(caught.value)) < 400


def test_what_grows_is_bounded(monkeypatch):
    """Deep nesting is held flat; text that is encoded again and again is refused."""
    assert read_values(b"\x80\x04" + b"]" * 30_000 + b"a" * 29_999 + b".")
    text = b"X\xff\xff\0\0" + b"x" * 65_535 + b"q\0" + b"X\x06\0\0\0latin1q\1"
    encode = b"c_codecs\nencode\nh\0h\1\x86R"
    with pytest.raises(FaceFileError, match="again and again"):
        read_values(b"\x80\x02" + text + encode * 100 + b".")
    monkeypatch.setattr(dfl_pickle, "MAX_OPCODES", 10)
    with pytest.raises(FaceFileError, match="more than 10 opcodes"):
        read_values(b"\x80\x04" + b"N" * 20 + b".")


# The JPEG


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_landmarks_may_be_lists_or_arrays(tmp_path, protocol):
    _, values = dfl.drawn()
    landmarks = np.array(values["landmarks"])
    kinds = [landmarks.tolist(), landmarks, landmarks.astype(np.float32), tuple(landmarks.tolist())]
    for number, kind in enumerate(kinds):
        rect = np.array([1.0, 2.0, 11.0, 22.0])
        rect = [rect, list(rect), tuple(rect.astype(np.int64)), rect.tolist()][number]
        path = dfl.write_jpeg(
            tmp_path / f"{number}.jpg", 0, protocol, landmarks=kind, source_rect=rect
        )
        face, header = read_face(path)
        np.testing.assert_allclose(face.landmarks_l2, landmarks, atol=1e-4)
        assert header.box == (1, 2, 10, 20)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"landmarks": None}, "has no landmarks"),
        ({"landmarks": []}, "has 0 landmarks where 68"),
        ({"landmarks": [[1.0, 2.0]] * 67}, "has 67 landmarks where 68"),
        ({"landmarks": [[1.0, 2.0]] * 68}, "in one place or on one line"),
        ({"landmarks": [[float("nan"), 2.0]] * 68}, "not all finite"),
        ({"landmarks": [[10**400, 2.0]] * 68}, "no (x, y) pairs"),
        ({"landmarks": [[1.0, 2.0, 3.0]] * 68}, "no (x, y) pairs"),
        ({"landmarks": "x" * 68}, "no (x, y) pairs"),
        ({"landmarks": np.zeros((68, 3))}, "of shape (68, 3)"),
        ({"landmarks": np.zeros((68, 2), np.float16)}, "elements are none of"),
        ({"landmarks": np.zeros((68, 2), ">f8")}, "elements are none of"),
        ({"landmarks": np.full((68, 2), np.inf)}, "not all finite"),
        ({"face_type": "cat"}, "face_type that is none of"),
        ({"face_type": 4}, "face_type that is none of"),
    ],
)
def test_bad_metadata_is_refused_in_words(tmp_path, changes, text):
    assert text in refusal(dfl.write_jpeg(tmp_path / "f.jpg", **changes))


def test_landmarks_far_outside_the_picture_are_refused(tmp_path):
    _, values = dfl.drawn()
    near, far = (np.array(values["landmarks"]) + shift for shift in (300.0, 700.0))
    assert read_face(dfl.write_jpeg(tmp_path / "near.jpg", landmarks=near))
    assert "more than 4 edges away" in refusal(dfl.write_jpeg(tmp_path / "f.jpg", landmarks=far))


def test_what_training_does_without_may_be_odd(tmp_path):
    """The JPEG stands for the frame then, and nothing of it is a path."""
    odd = {
        "source_rect": [1, 2, 3],
        "source_landmarks": [[1.0, 2.0]],
        "source_filename": "../../etc/passwd",
        "image_to_face_mat": "x",
        "seg_ie_polys": [1, 2, (1, "x"), {"type": 1}],
        "unknown": {"a": np.zeros(3, np.float16)},
    }
    face, header = read_face(dfl.write_jpeg(tmp_path / "f_0.jpg", **odd))
    np.testing.assert_array_equal(header.landmarks_l2, face.landmarks_l2)
    assert header.source["source_filename"] == "f_0.jpg"
    assert not header.masks
    plain = dfl.write_jpeg(tmp_path / "g.jpg", source_filename="..\\..\\x/../frame.png")
    assert read_face(plain)[1].source["source_filename"] == "frame.png"
    for name in ("..", "", "a\nb", "x" * 300, 7):
        path = dfl.write_jpeg(tmp_path / "h.jpg", source_filename=name)
        assert read_face(path)[1].source["source_filename"] == "h.jpg"


def test_landmarks_of_another_face_in_the_frame_are_not_believed(tmp_path):
    _, other = dfl.drawn(number=3)
    path = dfl.write_jpeg(tmp_path / "f.jpg", source_landmarks=other["source_landmarks"])
    face, header = read_face(path)
    assert face.in_frame is None
    np.testing.assert_array_equal(header.landmarks_l2, face.landmarks_l2)


def test_only_a_pickle_s_segment_counts(tmp_path):
    picture_bgr, values = dfl.drawn()
    path = tmp_path / "f.jpg"
    path.write_bytes(dfl.jpeg_with(picture_bgr, b"another program's", dfl.dumped(values)))
    assert read_face(path)
    path.write_bytes(dfl.jpeg_with(picture_bgr, b"another program's"))
    assert "without DeepFaceLab's metadata" in refusal(path)
    path.write_bytes(dfl.jpeg_with(picture_bgr, dfl.dumped([1])))
    assert "is no dictionary" in refusal(path)
    path.write_bytes(dfl.jpeg_with(picture_bgr, dfl.dumped(values), marker=0xEE))
    assert "without DeepFaceLab's metadata" in refusal(path)
    large = [bytes(65_000)] * 10
    path.write_bytes(dfl.jpeg_with(picture_bgr, *large, dfl.dumped(values)))
    assert decode_one(read_face(path)[0], WHOLE).any()
    path.write_bytes(dfl.jpeg_with(picture_bgr, *[b"x"] * 65, dfl.dumped(values)))
    assert "more than 64 segments" in refusal(path)


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (np.zeros((64, 65, 3), np.uint8), "is 65 x 64 px, not square"),
        (np.zeros((16, 16, 3), np.uint8), "is 16 px wide, not 32 to 4096"),
        (np.zeros((5000, 5000), np.uint8), "is 5000 px wide, not 32 to 4096"),
    ],
)
def test_pictures_of_other_sizes_are_refused(tmp_path, picture, text):
    path = tmp_path / "f.jpg"
    path.write_bytes(dfl.jpeg_with(picture, dfl.dumped(dfl.drawn()[1])))
    assert text in refusal(path)


def test_other_frames_are_refused(tmp_path):
    content = dfl.write_jpeg(tmp_path / "f.jpg").read_bytes()
    frame = content.index(b"\xff\xc0\0\x11")
    for place, value, text in ((4, 12, "3 channels of 12 bits"), (9, 4, "4 channels of 8 bits")):
        changed = bytearray(content)
        changed[frame + place] = value
        (tmp_path / "f.jpg").write_bytes(changed)
        assert text in refusal(tmp_path / "f.jpg")


def test_a_file_cut_short_is_told_wherever_it_ends(tmp_path):
    path = dfl.write_jpeg(tmp_path / "f.jpg")
    content = path.read_bytes()
    scan = content.index(b"\xff\xda")
    for size in (*range(0, scan + 10, 97), scan + 5):
        path.write_bytes(content[:size])
        assert refusal(path)
    assert "ends before its picture" in refusal(path)
    for size in (scan + 40, len(content) - 2):
        path.write_bytes(content[:size])
        assert "damaged or cut short" in str(decode_one(read_face(path)[0], WHOLE))
    path.write_bytes(content + b"behind its end")
    assert decode_one(read_face(path)[0], WHOLE).any()


def test_a_grey_or_progressive_jpeg_is_read(tmp_path):
    picture_bgr, values = dfl.drawn()
    grey = cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2GRAY)
    path = tmp_path / "f.jpg"
    for content in (
        dfl.jpeg_with(grey, dfl.dumped(values)),
        dfl.jpeg_with(picture_bgr, dfl.dumped(values), how=[cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    ):
        path.write_bytes(content)
        assert decode_one(read_face(path)[0], WHOLE).any()
    scan = content.rindex(b"\xff\xda")
    path.write_bytes(content[:scan] + content[scan:-2] * 100 + content[-2:])
    assert "damaged" in str(decode_one(read_face(path)[0], WHOLE))


# The crop


def test_the_crop_is_that_of_the_same_face_s_png(tmp_path):
    """Both show the drawn face: one upright, one turned; a shift by half a px would show."""
    image_bgr, header = draw_face("a", 0, size_px=256)
    turned, _ = read_face(dfl.write_jpeg(tmp_path / "f.jpg", edge_px=512, turn_degrees=3.0))
    crop = Crop("legacy", 1.0, 0.0, 154)
    alignment = align(header.landmarks_l2)
    of_png_33, of_crop_33 = (
        np.vstack([crop_matrix(alignment, shown), [0, 0, 1]])
        for shown in (Crop("head", 1.0, 0.0, 256), crop)
    )
    upright = warp(image_bgr, (of_crop_33 @ np.linalg.inv(of_png_33))[:2], 154)
    one, two = (picture.astype(np.float32) for picture in (upright, decode_one(turned, crop)))
    shift, _ = cv2.phaseCorrelate(*(cv2.cvtColor(p, cv2.COLOR_BGR2GRAY) for p in (one, two)))
    assert np.hypot(*shift) < 0.15
    assert np.abs(one - two).mean() < 3.0


def test_a_warp_that_shrinks_is_the_mean_of_the_area():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (96, 96, 3), np.uint8)
    matrix_23 = np.array([[1 / 3, 0.0, -1 / 3], [0.0, 1 / 3, -1 / 3]])  # middles upon middles
    shrunk = warp(image, matrix_23, 32)
    wanted = image.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - wanted).max() <= 1.0
    np.testing.assert_array_equal(warp(image, np.eye(3)[:2], 96), image)
    checks = np.indices((256, 256)).sum(axis=0).astype(np.uint8) % 2 * 255
    turn = np.deg2rad(2.0)
    scale = 0.21
    turned_23 = scale * np.array(
        [[np.cos(turn), -np.sin(turn), 9], [np.sin(turn), np.cos(turn), 0]]
    )
    inner = warp(checks, turned_23, 48)[8:40, 8:40]
    assert np.abs(inner.astype(float) - 127.5).max() < 24  # no moiré


def test_a_warp_far_beyond_its_image_stays_bounded():
    image = np.full((64, 64, 3), 255, np.uint8)
    tiny_23 = np.array([[1e-4, 0.0, 16.0], [0.0, 1e-4, 16.0]])
    assert warp(image, tiny_23, 32).shape == (32, 32, 3)


def test_what_lies_outside_is_black_and_measured():
    image = np.full((64, 64, 3), 255, np.uint8)
    moved_23 = np.array([[1.0, 0.0, 16.0], [0.0, 1.0, 0.0]])
    warped = warp(image, moved_23, 64)
    assert not warped[:, :15].any()
    assert (warped[:, 17:] == 255).all()
    assert outside_share(moved_23, 64, 64) == pytest.approx(0.25)
    assert outside_share(np.eye(3)[:2], 64, 64) == pytest.approx(0.0)
    away_23 = np.array([[1.0, 0.0, 500.0], [0.0, 1.0, 0.0]])
    assert outside_share(away_23, 64, 64) == 1.0


def test_both_backends_give_the_same_bytes_whatever_the_threads(folder, pak):
    faces = read_folder(folder).faces
    wanted = [decode_one(face, WHOLE) for face in faces]
    packed = read_folder(pak).faces
    for given_faces, backend, threads in (
        (faces, "dali", 1),
        (faces, "opencv", 3),
        (packed, "dali", 3),
        (packed, "opencv", 1),
    ):
        crops = decode_crops(given_faces, WHOLE, backend=backend, num_threads=threads)
        for number, crop_bgr in crops:
            np.testing.assert_array_equal(crop_bgr, wanted[number])


# Masks


def encoded(pixels, kind=".png"):
    return np.frombuffer(cv2.imencode(kind, pixels)[1].tobytes(), np.uint8)


def mask_at(path: Path, crop: Crop) -> np.ndarray:
    face, _ = read_face(path)
    return stored_mask(face.stored_mask("custom_head"), face.alignment, crop, **PLAIN)


@pytest.mark.parametrize("kind", [".png", ".jpg"])
@pytest.mark.parametrize("column", [False, True])
def test_a_painted_mask_sits_where_the_picture_does(tmp_path, kind, column):
    """The mask marks what the picture marks: warped alike, they stay alike."""
    picture_bgr, _ = dfl.drawn()
    white = np.zeros_like(picture_bgr)
    cv2.circle(white, (50, 70), 25, (255, 255, 255), -1)
    data = encoded(cv2.resize(white[..., 0], (256, 256), interpolation=cv2.INTER_LINEAR), kind)
    path = dfl.write_jpeg(tmp_path / "f.jpg", xseg_mask=data[:, None] if column else data)
    face, _ = read_face(path)
    crop = Crop("legacy", 1.0, 0.0, 128)
    mask = mask_at(path, crop).astype(int)
    shown = face.cut_out(white, crop)[..., 0].astype(int)
    assert np.abs(mask - shown).mean() < 2.5
    assert abs(int(mask.sum()) - int(shown.sum())) < 0.01 * shown.sum()


def test_polygons_fill_and_cut(tmp_path):
    whole = np.array([[0, 0], [127, 0], [127, 127], [0, 127]], np.float32)
    left = np.array([[0, 0], [60, 0], [60, 127], [0, 127]], np.float32)
    polys = {"polys": [{"type": 0, "pts": left}, {"type": 1, "pts": whole}]}
    path = dfl.write_jpeg(tmp_path / "f.jpg", seg_ie_polys=polys, turn_degrees=0.0)
    mask = mask_at(path, Crop("legacy", 1.0, 0.0, 100))
    assert not mask[:, :35].any()
    assert (mask[:, 65:] == 255).all()
    older = dfl.write_jpeg(tmp_path / "g.jpg", seg_ie_polys=[(1, whole), (0, left)])
    assert mask_at(older, Crop("legacy", 1.0, 0.0, 100)).any()
    painted = encoded(np.full((64, 64), 255, np.uint8))
    both = dfl.write_jpeg(tmp_path / "h.jpg", seg_ie_polys=polys, xseg_mask=painted)
    assert (mask_at(both, Crop("legacy", 0.8, 0.0, 100)) == 255).all()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (np.zeros(10, np.uint8), "no square picture of up to 1024 px"),
        (encoded(np.zeros((32, 33), np.uint8)), "no square picture of up to 1024 px"),
        (encoded(np.zeros((2048, 2048), np.uint8)), "no square picture of up to 1024 px"),
        (encoded(np.zeros((64, 64), np.uint8))[:-20], "damaged xseg_mask"),
        ("text", "no square picture"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told_where_it_is_asked_for(tmp_path, data, text):
    path = dfl.write_jpeg(tmp_path / "f.jpg", xseg_mask=data)
    face, _ = read_face(path)
    assert decode_one(face, WHOLE).any()
    with pytest.raises(FaceFileError, match=text):
        face.stored_mask("custom_head")
    with pytest.raises(FaceFileError, match="has no mask 'vgg-clear'"):
        face.stored_mask("vgg-clear")


# The pack


def test_a_pack_s_faces_are_those_of_its_files(folder, pak):
    loose, packed = read_folder(folder), read_folder(pak)
    in_folder = read_folder(pak.parent)
    assert len(packed.faces) == 30
    for one, two, three in zip(loose.faces, packed.faces, in_folder.faces, strict=True):
        np.testing.assert_array_equal(one.landmarks_l2, two.landmarks_l2)
        assert two.path == three.path
        assert two.file == pak
    again, header = read_face(packed.faces[7].path)
    assert again.part == packed.faces[7].part
    assert header.source["source_filename"] == "frame_00007.png"
    assert "is none of the 30 faces" in refusal(pak / "000030.jpg")
    assert "name one of them, as in faceset.pak/000000.jpg" in refusal(pak)
    assert [path.name for path in list_pictures(pak.parent)] == ["faceset.pak"]
    assert overlap(pak, pak.parent) is not None


def harmed_packs():
    whole = dfl.pack([b"one", b"two"])
    list_bytes = struct.unpack("<QQ", whole[:16])[1]
    table = 16 + list_bytes

    def entry(number, value):
        place = table + 8 * number
        return whole[:place] + struct.pack("<Q", value) + whole[place + 8 :]

    return [
        (b"", "has 0 bytes and is cut short"),
        (whole[:10], "has 10 bytes and is cut short"),
        (b"\x02" + whole[1:], "is of version 2, not 1"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "ends inside its list of faces"),
        (whole[:-1], "no end of its table"),
        (whole + b"x", "no end of its table"),
        (entry(0, 1), "does not rise from 0"),
        (entry(1, 0), "does not rise from 0"),
        (entry(1, 2**63), "does not rise from 0"),
        (entry(1, len(whole) - 1), "begin behind its end"),
        (dfl.pack([]), "fewer than 1 usable face"),
        (whole, "none of its 2 JPEGs can|not extracted faces"),
    ]


@pytest.mark.parametrize(("content", "text"), harmed_packs())
def test_harmed_packs_are_refused(tmp_path, content, text):
    path = tmp_path / "faceset.pak"
    path.write_bytes(content)
    message = folder_refusal(path)
    assert any(part in message for part in text.split("|"))


def test_persons_are_known_by_the_list_alone(tmp_path):
    path = tmp_path / "faceset.pak"
    listed = [{"person_name": "anna", "shape": (1, 2)}, {"person_name": None}, {}]
    path.write_bytes(dfl.pack([b"1", b"2", b"3"], listed))
    assert dfl_pack.read_persons(path, 3) == ["anna", None, None]
    for bad, text in (
        (listed[:2], "does not list its 3 faces"),
        ([{"person_name": "../x"}] * 3, "a person '../x', which no folder"),
        ([{"person_name": 7}] * 3, "no text"),
        ([Hostile()] * 3, "would run 'posix.mkdir'"),
    ):
        path.write_bytes(dfl.pack([b"1", b"2", b"3"], bad))
        with pytest.raises(FaceFileError, match=text):
            dfl_pack.read_persons(path, 3)


# Folders, training, checking


def test_mixed_folders_are_told(folder, pak, tmp_path, sides):
    mixed = tmp_path / "mixed"
    shutil.copytree(sides[0], mixed)
    shutil.copy(next(folder.iterdir()), mixed)
    found = read_folder(mixed)
    assert found.passed_over[found.path].num_jpegs == 1
    assert (
        "give JPEGs of DeepFaceLab a folder of their own" in found.passed_over[found.path].notice()
    )
    shutil.copy(pak, mixed)
    assert "holds faceset.pak and 26 PNGs" in folder_refusal(mixed)
    shutil.copytree(folder, tmp_path / "unpacked")
    shutil.copy(pak, tmp_path / "unpacked")
    found = read_folder(tmp_path / "unpacked")
    assert found.faces[0].file.name == "faceset.pak"
    assert found.passed_over[found.path].counts == ["30 JPEGs"]


def test_frames_beside_aligned_faces_name_the_folder_to_give(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "src/aligned")
    cv2.imwrite(str(tmp_path / "src/00001.jpg"), np.zeros((90, 160, 3), np.uint8))
    message = folder_refusal(tmp_path / "src")
    assert "its sub-folder aligned holds 30 JPEGs: give that one" in message


def test_a_folder_and_a_pack_are_trained_on_as_they_are(folder, pak, tmp_path):
    def opened(a, b, **data):
        config = DataConfig(input_a=str(a), input_b=str(b), num_threads=2, **data)
        device = torch.device("cpu")
        return open_sides(config, EvaluateConfig(), 64, store_dir=tmp_path / "kept", device=device)

    other = dfl.write_folder(tmp_path / "b", 26, "b")
    faces = opened(other, pak, centering="face", coverage=100.0, vertical_offset=-8)
    crop = Crop("face", 1.0, -0.08, 64)
    for face, pixels in zip(faces["b"].folder.faces, faces["b"].store.faces_fssc, strict=True):
        np.testing.assert_array_equal(pixels[..., :3], decode_one(face, crop))
        assert pixels[..., 3].any()
    assert faces["b"].store.backend == "faces are warped out of JPEGs of DeepFaceLab by OpenCV"
    assert not warnings_of(faces, LossConfig())
    again = opened(other, pak, centering="face", coverage=100.0, vertical_offset=-8)
    assert again["b"].store.reused
    warned = warnings_of(opened(other, pak, centering="head", coverage=100.0), LossConfig())
    assert len(warned) == 2
    assert warned[0].startswith("side A: more than 5% of the crop of 26 of 26 faces lies outside")
    assert "data.centering=face, data.coverage=100 and data.vertical_offset=-8" in warned[0]


def test_training_on_a_pack_resumes(folder, pak, tmp_path, capsys):
    other = dfl.write_folder(tmp_path / "b", 26, "b")
    words = ["train", "-A", str(pak), "-B", str(other), "-m", str(tmp_path / "m"), "-b", "2"]
    words += ["-t", "lightweight", "--no-logs"]
    for name, value in tiny_options("lightweight").items():
        words += ["--set", f"model.options.{name}={json.dumps(value)}"]
    for _ in range(2):
        assert main([*words, "-i", "1"]) == 0
    assert "Stopped at iteration 2" in capsys.readouterr().out


def test_check_and_inspect_know_them(folder, pak, tmp_path, capsys):
    found = report(folder)
    assert (found.num_faces, found.shows) == (30, "DeepFaceLab whole_face")
    assert any("train them with data.centering=face" in line for line in found.advice)
    assert report(pak).yaw == found.yaw
    one = sorted(folder.iterdir())[0]
    sheet = tmp_path / "look.png"
    assert main(["faces", "inspect", str(one), "--json", "--output", str(sheet)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shows"] == "DeepFaceLab whole_face crop"
    assert facts["source"]["source_filename"] == "frame_00000.png"
    assert cv2.imread(str(sheet)).any()
    assert main(["faces", "inspect", str(pak / "000003.jpg")]) == 0
    assert main(["faces", "check", str(folder), str(pak)]) == 0


# Import


def test_an_import_shows_what_the_jpeg_shows(folder, tmp_path):
    done = import_faces(folder, tmp_path / "png", progress=lambda *_: None)
    assert (done.num_written, done.num_present, done.rejected) == (30, 0, {})
    assert done.proposals == {
        "whole_face": "data.centering=face, data.coverage=100 and data.vertical_offset=-8"
    }
    crop = Crop("face", 1.0, -0.08, 120)  # of the PNG's own scale
    pngs = read_folder(tmp_path / "png").faces
    for jpeg, png in zip(read_folder(folder).faces, pngs, strict=True):
        one, two = (decode_one(face, crop).astype(float) for face in (jpeg, png))
        assert np.abs(one - two).mean() < 3.5
        _, header = read_header(png.path)
        assert header.source["source_filename"].startswith("frame_")
        assert header.source["original_filename"] == png.path.name
        assert header.source["source_frame_dims"] == [0, 0]
        np.testing.assert_allclose(header.landmarks_l2, jpeg.read_header().landmarks_l2)


def test_an_import_stores_the_mask_for_the_head(tmp_path):
    pixels = np.zeros((128, 128), np.uint8)
    cv2.circle(pixels, (60, 70), 30, 255, -1)
    path = dfl.write_jpeg(tmp_path / "in/f_0.jpg", xseg_mask=encoded(pixels))
    damaged = dfl.write_jpeg(tmp_path / "in/g_0.jpg", xseg_mask=np.zeros(9, np.uint8))
    done = import_faces(tmp_path / "in", tmp_path / "out", progress=lambda *_: None)
    assert done.num_masks == 1
    assert list(done.damaged_masks) == [damaged.name]
    png, header = read_face(tmp_path / "out/f_0.png")
    mask = header.masks["custom_head"]
    assert mask.centering == "head"
    crop = Crop("legacy", 1.0, 0.0, 96)
    one = stored_mask(mask, png.alignment, crop, **PLAIN).astype(int)
    assert np.abs(one - mask_at(path, crop)).mean() < 3.0


def test_an_import_writes_over_nothing_and_goes_on_where_it_was_stopped(tmp_path):
    source = dfl.write_folder(tmp_path / "in", 4)
    out = tmp_path / "out"
    assert import_faces(source, out, progress=lambda *_: None).num_written == 4
    (out / "frame_00002_0.png").unlink()
    again = import_faces(source, out, progress=lambda *_: None)
    assert (again.num_written, again.num_present) == (1, 3)
    mine = out / "frame_00001_0.png"
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there and is not this face"):
        import_faces(source, out, progress=lambda *_: None)
    assert mine.read_bytes() == b"mine"
    assert sorted(path.suffix for path in out.iterdir()) == [".png"] * 4
    with pytest.raises(ValueError, match="holds the faces themselves"):
        import_faces(source, source, progress=lambda *_: None)


def test_a_pack_is_imported_by_person(tmp_path):
    jpegs = [dfl.write_jpeg(tmp_path / f"{n}.jpg", n // 2).read_bytes() for n in range(4)]
    listed = [{"person_name": name} for name in ("anna", "bert", "anna", None)]
    path = tmp_path / "in/faceset.pak"
    path.parent.mkdir()
    path.write_bytes(dfl.pack(jpegs, listed))
    done = import_faces(path.parent, tmp_path / "out", progress=lambda *_: None)
    assert done.persons == ["anna", "bert"]
    found = {str(png.relative_to(tmp_path / "out")) for png in (tmp_path / "out").rglob("*.png")}
    assert found == {"anna/000000.png", "bert/000001.png", "anna/000002.png", "000003.png"}
    assert read_header(tmp_path / "out/bert/000001.png")[1].source["face_index"] == 1
    path.write_bytes(dfl.pack(jpegs, [{"person_name": "../../x"}] * 4))
    done = import_faces(path, tmp_path / "flat", progress=lambda *_: None)
    assert len(list((tmp_path / "flat").glob("*.png"))) == 4
    assert "which no folder can be named" in done.notices[0]
    assert not (tmp_path / "x").exists()


def test_a_swap_takes_faces_imported_and_as_they_are(folder, tmp_path):
    import_faces(folder, tmp_path / "out", progress=lambda *_: None)
    placed = placement.read_faces(tmp_path / "out", "extended", lambda line: None)
    assert sorted(placed) == [f"frame_{number:05d}" for number in range(30)]
    (face,) = placed["frame_00003"]
    assert face.frame_px is None
    alone = read_face(folder / "frame_00003_0.jpg")[1]
    np.testing.assert_allclose(face.face.landmarks_l2, alone.landmarks_l2)
    direct = placement.read_faces(folder, "extended", pytest.fail)
    assert sorted(direct) == sorted(placed)
    np.testing.assert_allclose(
        direct["frame_00003"][0].face.source_landmarks_l2, face.face.landmarks_l2, atol=1e-3
    )


def test_the_import_command(folder, tmp_path, capsys, sides):
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    hostile = dfl.dumped({"landmarks": Hostile()})
    (source / "hostile.jpg").write_bytes(dfl.jpeg_with(dfl.drawn()[0], hostile))
    words = ["faces", "import", str(source), "-o"]
    assert main([*words, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == f"30 faces written to {tmp_path / 'out'}"
    assert "30 of whole_face: train them with data.centering=face, data.coverage=100" in told
    assert "unusable: hostile.jpg: its metadata would run 'posix.mkdir'" in told
    assert not Path("/tmp/mien_pickle_was_run").exists()
    assert main([*words, str(tmp_path / "again"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_written"] == 30
    assert list(facts["rejected"]) == ["hostile.jpg"]
    for wrong, text in (
        (sides[0], "face PNGs are trained on as they are"),
        (tmp_path / "none", "does not exist"),
    ):
        assert main(["faces", "import", str(wrong), "-o", str(tmp_path / "no")]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_an_import_into_a_folder_that_cannot_be_written_says_so(tmp_path):
    source = dfl.write_folder(tmp_path / "in", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file/out|file: ") as caught:
        import_faces(source, tmp_path / "file/out", progress=lambda *_: None)
    assert "\n" not in str(caught.value)
