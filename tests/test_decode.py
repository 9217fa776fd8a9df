"""Crops decoded by DALI and by OpenCV: the same bytes, the right bytes, and what is no picture."""

import os
import re
import shutil
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import FACE_SETS

from mien.core.data import decode
from mien.core.data.decode import BATCH_SIZE, choose_backend, decode_crops
from mien.core.faces import geometry, picture, png
from mien.core.faces.folder import Face, read_folder
from mien.core.faces.geometry import Crop
from mien.core.system.threads import thread_count

SIZES_PX = (64, 256, 192, 300, 97, 512, 128)
CROPS = [
    Crop("face", 1.0, 0.0, 64),
    Crop("face", 1.0, 0.0, 192),  # as large as in a 256 px picture: no resize
    Crop("head", 1.0, -0.25, 128),  # leaves the picture, and grows out of 64 px
    Crop("head", 1.0, 0.25, 51),
    Crop("legacy", 0.625, 0.1, 256),
]


def write_face(path, edge_px, seed):
    """A face PNG of smooth noise whose landmarks are the mean face, turned and shaken."""
    random = np.random.default_rng(seed)
    rough = random.integers(0, 256, (edge_px // 8 + 2, edge_px // 8 + 2, 3), dtype=np.uint8)
    image_bgr = cv2.resize(rough, (edge_px, edge_px), interpolation=cv2.INTER_CUBIC)
    image_bgr = cv2.add(image_bgr, random.integers(0, 30, image_bgr.shape, dtype=np.uint8))
    angles = np.linspace(np.pi, 0.0, 17)
    jaw = np.stack([0.5 + 0.65 * np.cos(angles), 0.2 + 0.95 * np.sin(angles)], axis=1)
    with np.load(Path(png.__file__).with_name("mean_face.npz")) as constants:
        points = np.vstack([jaw, constants["mean51"]])
    turn = random.uniform(-0.4, 0.4)
    turn_22 = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ turn_22.T + random.normal(0, 0.02, points.shape)
    png.write_face(path, image_bgr, png.FaceHeader((points * 150 + 40).astype(np.float32)))


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> list[Face]:
    """More than two batches of faces of mixed sizes."""
    folder = tmp_path_factory.mktemp("faces ä b")
    for number in range(2 * BATCH_SIZE + 5):
        write_face(folder / f"{number:03d}.png", SIZES_PX[number % len(SIZES_PX)], number)
    return read_folder(folder).faces


@pytest.fixture
def own_faces(faces, tmp_path) -> list[Face]:
    """The same in a folder of the test's own, to be damaged."""
    shutil.copytree(faces[0].path.parent, tmp_path / "own")
    return read_folder(tmp_path / "own").faces


def expected(face, crop):
    """The crop by the definition, with no part of the code under test."""
    box = geometry.crop_box(face.alignment, face.edge_px, crop)
    picture = cv2.imread(str(face.path))
    margin = 2 * face.edge_px
    wide = cv2.copyMakeBorder(picture, *[margin] * 4, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    top, left = box.top + margin, box.left + margin
    square = wide[top : top + box.side, left : left + box.side]
    if box.side == crop.size_px:
        return square
    method = cv2.INTER_CUBIC if box.side < crop.size_px else cv2.INTER_AREA
    return cv2.resize(square, (crop.size_px, crop.size_px), interpolation=method)


def crops_of(faces, crop, backend, **options):
    numbers, crops = zip(
        *decode_crops(faces, crop, backend=backend, num_threads=2, **options), strict=True
    )
    assert list(numbers) == list(range(len(faces)))
    return crops


def refuse_opencv(monkeypatch):
    """Let DALI not be rescued by the decoder that names damaged files."""

    def refuse(face, crop):
        raise AssertionError(f"{face.path} was decoded by OpenCV")

    monkeypatch.setattr(decode, "decode_one", refuse)


@pytest.mark.parametrize("crop", CROPS, ids=str)
@pytest.mark.parametrize("backend", decode.BACKENDS)
def test_crops_are_exact(faces, crop, backend, monkeypatch):
    if backend == "dali":
        refuse_opencv(monkeypatch)
    for face, crop_bgr in zip(faces, crops_of(faces, crop, backend), strict=True):
        assert crop_bgr.dtype == np.uint8
        np.testing.assert_array_equal(crop_bgr, expected(face, crop), err_msg=str(face.path))


def test_the_crops_above_leave_the_picture_grow_and_shrink(faces):
    boxes = [[geometry.crop_box(f.alignment, f.edge_px, crop) for f in faces] for crop in CROPS]
    assert any(box.top < 0 for box in boxes[3])
    assert any(box.top + box.side > f.edge_px for box, f in zip(boxes[2], faces, strict=True))
    sides = [box.side for box in boxes[2]]
    assert min(sides) < CROPS[2].size_px < max(sides)
    assert CROPS[1].size_px in [box.side for box in boxes[1]]


@pytest.mark.parametrize("folder", [*FACE_SETS, "bad/mixed_sizes"])
@pytest.mark.parametrize("crop", [CROPS[0], Crop("head", 0.9, -0.2, 256)], ids=str)
def test_backends_agree_on_real_faces(faces_dir, folder, crop, monkeypatch):
    if not (faces_dir / folder).is_dir():
        pytest.skip(f"{faces_dir} has no {folder}")
    faces = read_folder(faces_dir / folder, minimum=1).faces[::9]
    by_opencv = crops_of(faces, crop, "opencv")
    refuse_opencv(monkeypatch)
    by_dali = crops_of(faces, crop, "dali")
    for face, one, other in zip(faces, by_dali, by_opencv, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=str(face.path))


@pytest.mark.parametrize("shift", [40.0, -40.0, 1e12])
@pytest.mark.parametrize("backend", decode.BACKENDS)
def test_a_box_outside_the_picture_is_black(faces, backend, shift, monkeypatch):
    if backend == "dali":
        refuse_opencv(monkeypatch)
    face = faces[1]
    alignment = geometry.align(face.landmarks_l2)
    alignment.offsets = {name: np.full(2, shift, np.float32) for name in alignment.offsets}
    alignment.offsets["head"] = np.zeros(2, np.float32)
    far = Face(face.path, face.edge_px, face.landmarks_l2, alignment)
    near = faces[0]
    crops = crops_of([far, near], CROPS[0], backend)
    assert not crops[0].any()
    np.testing.assert_array_equal(crops[1], expected(near, CROPS[0]))


def test_a_note_to_turn_the_picture_is_ignored(own_faces):
    """A crop's place is counted in the pixels as stored, so a viewer's rotation must not act."""
    face = own_faces[1]
    note = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = len(note).to_bytes(4, "big") + b"eXIf" + note
    chunk += zlib.crc32(b"eXIf" + note).to_bytes(4, "big")
    plain = expected(face, CROPS[0])
    content = face.path.read_bytes()
    face.path.write_bytes(content[:33] + chunk + content[33:])
    with picture.open_picture(face.path, face.edge_px) as image_bgr:
        assert (cv2.imread(str(face.path)) != image_bgr).any()
    for backend in decode.BACKENDS:
        np.testing.assert_array_equal(crops_of([face], CROPS[0], backend)[0], plain)


def damage(face, kind):
    content = face.path.read_bytes()
    if kind == "missing":
        face.path.unlink()
    elif kind == "pipe":
        face.path.unlink()
        os.mkfifo(face.path)
    elif kind == "empty":
        face.path.write_bytes(b"")
    elif kind == "text":
        face.path.write_text("no picture")
    elif kind == "truncated":
        face.path.write_bytes(content[: len(content) * 2 // 3])
    elif kind == "garbled":
        middle = len(content) * 2 // 3
        face.path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "garbled"])
@pytest.mark.parametrize("backend", decode.BACKENDS)
def test_a_damaged_file_is_named_and_the_others_are_kept(own_faces, backend, kind):
    culprits = {BATCH_SIZE + 3, BATCH_SIZE + 4, len(own_faces) - 1}
    wanted = [expected(face, CROPS[0]) for face in own_faces]
    for number in culprits:
        damage(own_faces[number], kind)
    told = []
    crops = crops_of(own_faces, CROPS[0], backend, warn=told.append)
    for number, crop_bgr in enumerate(crops):
        if number in culprits:
            assert isinstance(crop_bgr, png.FaceFileError)
            reason = "No such file" if kind == "missing" else "damaged"
            assert re.search(reason, str(crop_bgr))
            assert "\n" not in str(crop_bgr)
        else:
            np.testing.assert_array_equal(crop_bgr, wanted[number])
    assert not told


def _with_profile(path, name):
    """Give a PNG a colour profile that is none, under a name that libpng puts into its warning."""
    content, profile = path.read_bytes(), bytearray(np.random.default_rng(0).bytes(600))
    profile[:4] = (600).to_bytes(4, "big")
    data = name + b"\0\0" + zlib.compress(bytes(profile))
    crc = zlib.crc32(b"iCCP" + data).to_bytes(4, "big")
    chunk = len(data).to_bytes(4, "big") + b"iCCP" + data + crc
    path.write_bytes(content[:33] + chunk + content[33:])


@pytest.mark.parametrize("backend", ["dali", "opencv"])
def test_what_libraries_print_of_a_file_reaches_no_terminal(own_faces, backend, capfd):
    """A stranger's words would do as they like there; and each damaged file would have a line."""
    for face in own_faces[:5]:
        _with_profile(face.path, b"\x1b[31mEVIL\r\nmien: all is well")
    damage(own_faces[6], "garbled")
    expected(own_faces[0], CROPS[0])
    assert "EVIL" in capfd.readouterr().err, "by itself OpenCV prints it"
    found = crops_of(own_faces, CROPS[0], backend)
    assert sum(isinstance(crop, png.FaceFileError) for crop in found) == 1
    assert capfd.readouterr() == ("", "")
    os.write(2, b"ours")
    assert capfd.readouterr().err == "ours", "it is heard again afterwards"


def test_a_pipe_in_the_place_of_a_face_is_waited_for_by_nobody(own_faces):
    damage(own_faces[0], "pipe")
    assert isinstance(decode.decode_one(own_faces[0], CROPS[0]), png.FaceFileError)


def test_every_file_damaged(own_faces):
    for face in own_faces:
        damage(face, "truncated")
    for backend in decode.BACKENDS:
        crops = crops_of(own_faces, CROPS[0], backend)
        assert all(isinstance(result, png.FaceFileError) for result in crops)


def test_other_kinds_of_picture_do_not_crash(specimens, faces):
    """Such files are refused by their header; should one change meanwhile, decoding goes on."""
    bad = [path for path in specimens.values() if path.suffix == ".png"]
    odd = [Face(path, faces[0].edge_px, faces[0].landmarks_l2, faces[0].alignment) for path in bad]
    by_dali, by_opencv = (crops_of(odd, CROPS[0], backend) for backend in decode.BACKENDS)
    for path, one, other in zip(bad, by_dali, by_opencv, strict=True):
        assert isinstance(one, png.FaceFileError) == isinstance(other, png.FaceFileError), path
    results = zip(bad, by_opencv, strict=True)
    refused = {path.name for path, result in results if isinstance(result, png.FaceFileError)}
    hopeless = {"zero_bytes.png", "text_file.png", "truncated_idat.png"}
    assert hopeless & specimens.keys() <= refused


def test_a_picture_that_shrank_since_its_header_was_read(own_faces):
    face = own_faces[5]
    assert face.edge_px == 512
    write_face(face.path, 64, 1)
    for backend in decode.BACKENDS:
        before, shrunk, after = crops_of(own_faces[4:7], CROPS[0], backend)
        assert isinstance(shrunk, png.FaceFileError)  # its landmarks are those of another picture
        assert before.shape == after.shape == (64, 64, 3)


def test_number_of_threads_does_not_matter(faces):
    for backend in decode.BACKENDS:
        runs = [
            [crop for _, crop in decode_crops(faces, CROPS[2], backend=backend, num_threads=count)]
            for count in (1, 3, 40)
        ]
        for crops in zip(*runs, strict=True):
            assert all((crop == crops[0]).all() for crop in crops)


def test_large_pictures_make_small_batches(faces):
    edges = [1000, 8000, 100, 100, 5000, 16000, *[64] * 40]
    large = [Face(faces[0].path, e, faces[0].landmarks_l2, faces[0].alignment) for e in edges]
    batches = list(decode._batches(large))
    assert [face for batch in batches for face in batch.faces] == large
    first = 0
    for batch in batches:
        assert batch.first == first
        first += len(batch.faces)
        num_bytes = sum(6 * face.edge_px**2 for face in batch.faces)
        assert 1 <= len(batch.faces) <= BATCH_SIZE
        assert batch.is_for_dali == (num_bytes <= decode.MAX_BATCH_BYTES)
    assert [batch.first for batch in batches if not batch.is_for_dali] == [1, 5]
    assert list(decode._batches([])) == []


@pytest.mark.parametrize("smallest_px", [0, 256])
def test_pictures_that_fill_a_batch_are_left_to_opencv(faces, monkeypatch, smallest_px):
    """One at a time, wherever they stand, and with the same pixels."""
    monkeypatch.setattr(decode, "MAX_BATCH_BYTES", 6 * smallest_px**2)
    decoded_by_opencv = []
    original = decode.decode_one

    def note(face, crop):
        decoded_by_opencv.append(face.edge_px)
        return original(face, crop)

    monkeypatch.setattr(decode, "decode_one", note)
    crops = crops_of(faces, CROPS[0], "dali")
    assert decoded_by_opencv == [face.edge_px for face in faces if face.edge_px >= smallest_px]
    for face, crop_bgr in zip(faces, crops, strict=True):
        np.testing.assert_array_equal(crop_bgr, expected(face, CROPS[0]))


def test_a_file_far_longer_than_its_picture_is_left_to_opencv(own_faces):
    """DALI reads files whole; OpenCV is handed no more than a face can need."""
    with own_faces[3].path.open("ab") as file:
        file.truncate(2 * decode.MAX_BATCH_BYTES)  # a hole: it takes no room on the disk
    left = [batch for batch in decode._batches(own_faces) if not batch.is_for_dali]
    assert [batch.faces for batch in left] == [[own_faces[3]]]
    crops = crops_of(own_faces, CROPS[0], "dali")
    for face, crop_bgr in zip(own_faces, crops, strict=True):
        if face is not own_faces[3]:
            np.testing.assert_array_equal(crop_bgr, expected(face, CROPS[0]))
    np.testing.assert_array_equal(crops[3], decode.decode_one(own_faces[3], CROPS[0]))


@pytest.mark.parametrize("num_threads", [1, 8])
def test_pictures_being_decoded_take_no_more_than_a_bound(faces, monkeypatch, num_threads):
    """Whatever the number of threads; one that takes more by itself is decoded alone."""
    largest = max(face.decoding_bytes for face in faces)
    bound = largest - 1
    monkeypatch.setattr(picture, "_budget", picture._Budget(bound))
    taken, peak, lock = [], [], threading.Lock()
    original = picture.decode_rgb

    def watched(encoded):
        cost = encoded.nbytes + 6 * picture.edge_of(encoded) ** 2
        with lock:
            taken.append(cost)
            peak.append((sum(taken), len(taken)))
        try:
            return original(encoded)
        finally:
            with lock:
                taken.remove(cost)

    monkeypatch.setattr(picture, "decode_rgb", watched)
    for _, crop_bgr in decode_crops(faces, CROPS[0], backend="opencv", num_threads=num_threads):
        assert crop_bgr.shape == (64, 64, 3)
    assert max(count for total, count in peak if total > bound) == 1
    assert max(count for _, count in peak) <= num_threads
    assert picture._budget._free == bound


def test_no_faces():
    for backend in decode.BACKENDS:
        assert list(decode_crops([], CROPS[0], backend=backend, num_threads=1)) == []


def test_stopping_early_leaves_no_thread(faces):
    before = threading.active_count()
    for backend in decode.BACKENDS:
        crops = decode_crops(faces, CROPS[0], backend=backend, num_threads=2)
        next(crops)
        crops.close()
    assert threading.active_count() == before


def test_dali_that_fails_on_sound_files_is_told_of_and_replaced(faces, monkeypatch):
    class Broken:
        def schedule_run(self):
            raise RuntimeError("Critical error\nencountered:\n\nout of something")

    monkeypatch.setattr(decode, "_pipeline", lambda *arguments: Broken())
    told = []
    many = faces * 3
    crops = crops_of(many, CROPS[0], "dali", warn=told.append)
    assert told == ["DALI fails on sound files, OpenCV decodes the rest: out of something"]
    for face, crop_bgr in zip(many, crops, strict=True):
        np.testing.assert_array_equal(crop_bgr, expected(face, CROPS[0]))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without GPU")
def test_dali_that_cannot_start_is_told_of_and_replaced(faces):
    told = []
    crops = crops_of(faces[:3], CROPS[0], "dali", device="cuda:0", warn=told.append)
    assert len(told) == 1
    assert told[0].startswith("DALI cannot start, OpenCV decodes the faces: ")
    np.testing.assert_array_equal(crops[2], expected(faces[2], CROPS[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_crops_are_exact_on_a_gpu(faces, crop, monkeypatch):
    refuse_opencv(monkeypatch)
    told = []
    for face, crop_bgr in zip(
        faces, crops_of(faces, crop, "dali", device="cuda", warn=told.append), strict=True
    ):
        np.testing.assert_array_equal(crop_bgr, expected(face, crop), err_msg=str(face.path))
    assert not told


def test_choice_of_backend():
    assert choose_backend("auto", "cuda")[0] == choose_backend("dali")[0] == "dali"
    assert re.fullmatch(r"faces are decoded by DALI [\d.]+", choose_backend("auto", "cuda:1")[1])
    assert choose_backend("auto")[0] == choose_backend("opencv", "cuda")[0] == "opencv"
    with pytest.raises(ValueError, match="must be one of auto, dali, opencv, got 'pillow'"):
        choose_backend("pillow")
    with pytest.raises(ValueError, match="backend must be one of dali, opencv, got 'auto'"):
        decode_crops([], CROPS[0], backend="auto", num_threads=1)


def test_choice_without_dali(monkeypatch):
    def refuse(name):
        raise ImportError("libdali.so: cannot open shared object file\nand more")

    monkeypatch.setattr(decode.importlib, "import_module", refuse)
    name, why = choose_backend("auto", "cuda")
    assert name == "opencv"
    assert why.endswith("(libdali.so: cannot open shared object file)")
    with pytest.raises(ValueError, match="-m pip install '?nvidia-dali-cuda130") as caught:
        choose_backend("dali")
    assert "\n" not in str(caught.value)


def test_threads_follow_the_setting_or_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5})
    assert thread_count(7) == 7
    assert thread_count(0) == 3
