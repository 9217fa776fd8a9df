"""The decoded faces: their bytes, where they are kept, and the raw file of the next start."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mien.benchmarks.bench_store import first_start
from mien.core.config import DataConfig
from mien.core.data import store
from mien.core.data.store import choose_placement, open_store
from mien.core.faces import geometry, masks, png
from mien.core.faces.folder import read_folder
from mien.core.faces.geometry import Crop

CPU = torch.device("cpu")
CROP = Crop("face", 0.9, 0.1, 48)
NUM_FACES = 30
GIB = 1024**3
STORED = {"vgg-clear": "face", "bisenet-fp_head": "head"}


def write_face(path, edge_px, seed):
    """A face PNG of noise with two stored masks; its landmarks are the mean face, shaken."""
    random = np.random.default_rng(seed)
    image_bgr = random.integers(0, 256, (edge_px, edge_px, 3), dtype=np.uint8)
    angles = np.linspace(np.pi, 0.0, 17)
    jaw = np.stack([0.5 + 0.65 * np.cos(angles), 0.2 + 0.95 * np.sin(angles)], axis=1)
    with np.load(Path(png.__file__).with_name("mean_face.npz")) as constants:
        points = np.vstack([jaw, constants["mean51"]])
    points = points * 150 + random.normal(0, 3, points.shape)
    blob = cv2.GaussianBlur(random.integers(0, 256, (64, 64), dtype=np.uint8), (15, 15), 0)
    stored = {
        name: png.StoredMask(zlib.compress(blob.tobytes()), 64, centering, np.eye(3))
        for name, centering in STORED.items()
    }
    png.write_face(path, image_bgr, png.FaceHeader(points.astype(np.float32), stored))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(NUM_FACES):
        write_face(folder / f"{number:03d}.png", (64, 100)[number % 2], number)
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """Faces of the test's own, to be changed and damaged."""
    shutil.copytree(drawn, tmp_path / "faces")
    return read_folder(tmp_path / "faces")


@pytest.fixture
def store_dir(tmp_path) -> Path:
    return tmp_path / "model" / "faces store"


def opened(folder, store_dir, crop=CROP, progress=None, minimum=25, num_kept=1, **data):
    return open_store(
        folder,
        crop,
        DataConfig(num_threads=2, **data),
        store_dir=store_dir,
        device=CPU,
        progress=progress,
        minimum=minimum,
        num_kept=num_kept,
    )


def raw_files(store_dir) -> list[Path]:
    return sorted(store_dir.iterdir())


def expected(face, crop, **data):
    """One face's pixels by the parts they are made of."""
    data = DataConfig(**data)
    picture = cv2.imread(str(face.path))
    box = geometry.crop_box(face.alignment, face.edge_px, crop)
    crop_bgr = geometry.resize(geometry.cut(picture, box), crop.size_px)
    planes = masks.training_masks(
        face,
        crop,
        mask_type=data.mask_type,
        dilation=data.mask_dilation,
        blur_kernel=data.mask_blur_kernel,
        threshold=data.mask_threshold,
    )
    empty = np.zeros((crop.size_px, crop.size_px, 2), np.uint8)
    return np.concatenate([crop_bgr, planes, empty], axis=2)


@pytest.mark.parametrize("decoder", ["dali", "opencv"])
@pytest.mark.parametrize("placement", ["host", "file"])
@pytest.mark.parametrize(
    "data",
    [
        {},
        {"mask_type": "components", "mask_dilation": 4.0},
        {"mask_type": "bisenet-fp_head", "mask_blur_kernel": 5, "mask_threshold": 20},
        {"mask_type": "none"},
    ],
    ids=lambda data: data.get("mask_type", "default"),
)
def test_pixels_are_the_crop_and_its_masks(folder, store_dir, decoder, placement, data):
    made = opened(folder, store_dir, decoder=decoder, placement=placement, **data)
    assert made.faces_fssc.dtype == torch.uint8
    assert made.faces_fssc.is_contiguous()
    assert made.faces_fssc.shape == (NUM_FACES, 48, 48, 8)
    assert (made.num_faces, made.size_px, made.nbytes) == (NUM_FACES, 48, NUM_FACES * 48 * 48 * 8)
    assert made.names == [face.path.name for face in folder.faces]
    assert (made.placement, made.rejected, made.warnings) == (placement, [], [])
    assert "DALI" in made.backend if decoder == "dali" else "in threads" in made.backend
    for face, pixels in zip(folder.faces, made.faces_fssc.numpy(), strict=True):
        np.testing.assert_array_equal(pixels, expected(face, CROP, **data))


@pytest.mark.parametrize("placement", ["host", "file"])
def test_the_next_start_reads_the_raw_file(folder, store_dir, placement, monkeypatch):
    first = opened(folder, store_dir, placement=placement)
    assert not first.reused
    assert raw_files(store_dir) == [first.path]
    before = first.path.read_bytes()

    def refuse(*arguments, **options):
        raise AssertionError("decoded again")

    monkeypatch.setattr(store, "decoding", refuse)
    monkeypatch.setattr(store, "decoded_by", refuse)
    ticks = []
    second = opened(
        folder, store_dir, placement=placement, progress=lambda *tick: ticks.append(tick)
    )
    assert second.reused
    assert torch.equal(second.faces_fssc, first.faces_fssc)
    assert (second.names, second.path) == (first.names, first.path)
    assert str(first.path) in second.backend
    assert ticks == [(NUM_FACES, NUM_FACES)]
    second.faces_fssc.zero_()  # writing to the tensor must not reach the file
    assert first.path.read_bytes() == before


def test_a_file_placement_is_the_mapping_and_no_copy(folder, store_dir):
    opened(folder, store_dir, placement="file")
    mapped = opened(folder, store_dir, placement="file")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0] for line in maps if str(mapped.path).split()[-1] in line]
    address = mapped.faces_fssc.data_ptr()
    spans = [[int(end, 16) for end in span.split("-")] for span in ranges]
    assert any(low <= address < high for low, high in spans)


def test_the_raw_file_says_what_it_holds(folder, store_dir):
    made = opened(folder, store_dir)
    content = made.path.read_bytes()
    first, second, _ = content.split(b"\n", 2)
    frame, facts = json.loads(first), json.loads(second)
    assert frame["schema"] == "mien.faces/1"
    assert frame["header_bytes"] % 4096 == 0
    assert facts["names"] == made.names
    assert facts["folder"] == str(folder.path)
    assert facts["key"] == made.path.stem
    assert content[frame["header_bytes"] :] == made.faces_fssc.numpy().tobytes()


def test_two_starts_give_the_same_file(folder, store_dir, tmp_path):
    first = opened(folder, store_dir, decoder="dali")
    second = opened(folder, tmp_path / "other", decoder="opencv")
    assert first.path.name == second.path.name
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"crop": Crop("face", 0.9, 0.1, 49)},
        {"crop": Crop("face", 0.91, 0.1, 48)},
        {"crop": Crop("face", 0.9, 0.0, 48)},
        {"crop": Crop("legacy", 0.9, 0.1, 48)},
        {"mask_type": "components"},
        {"mask_dilation": 3.0},
    ],
    ids=str,
)
def test_other_settings_make_it_anew_and_replace_it(folder, store_dir, change):
    first = opened(folder, store_dir)
    second = opened(folder, store_dir, **change)
    assert not second.reused
    assert raw_files(store_dir) == [second.path]
    assert first.path != second.path
    crop = change.get("crop", CROP)
    data = {name: value for name, value in change.items() if name != "crop"}
    np.testing.assert_array_equal(second.faces_fssc[7], expected(folder.faces[7], crop, **data))


def test_in_a_shared_folder_other_settings_live_beside_it(folder, store_dir):
    """Two trainings of one face folder take turns, and neither decodes anew."""
    small = Crop("face", 0.9, 0.1, 24)
    paths = [opened(folder, store_dir, crop, num_kept=2).path for crop in (CROP, small)]
    assert raw_files(store_dir) == sorted(paths)
    for crop in (CROP, small, CROP):
        assert opened(folder, store_dir, crop, num_kept=2).reused


def _opened_in_turn(folder, store_dir, num_kept):
    """Files of three sizes, made in this order; the oldest has been used since."""
    paths = []
    for age, size_px in ((30, 16), (20, 24), (10, 32)):
        crop = Crop("face", 0.9, 0.1, size_px)
        paths.append(opened(folder, store_dir, crop, num_kept=num_kept).path)
        os.utime(paths[-1], (time.time() - age,) * 2)
    assert opened(folder, store_dir, Crop("face", 0.9, 0.1, 16), num_kept=num_kept).reused
    return paths


def test_a_shared_folder_keeps_the_files_that_were_used_last(folder, store_dir):
    paths = _opened_in_turn(folder, store_dir, num_kept=3)
    new = opened(folder, store_dir, num_kept=3).path
    assert raw_files(store_dir) == sorted([paths[0], paths[2], new])


@pytest.mark.parametrize(("num_free", "num_left"), [(0, 3), (1, 2), (2, 1)])
def test_a_shared_folder_on_a_full_disk_gives_up_what_was_used_longest_ago(
    folder, store_dir, monkeypatch, num_free, num_left
):
    """But nothing where that would not do."""
    paths = _opened_in_turn(folder, store_dir, num_kept=9)
    sizes = [path.stat().st_size for path in paths]
    plan = store._plan(folder, CROP, DataConfig())
    room = store._padded(2 * len(store._header(plan, 0)) + 256 * NUM_FACES) + plan.num_bytes
    # As much as is lacking without the first `num_free` of them.
    base = room - sum([sizes[1], sizes[2], sizes[0]][: max(num_free, 1)]) - (num_free == 0) * 10**9

    def free(_path: Path):
        removed = sum(size for path, size in zip(paths, sizes, strict=True) if not path.exists())
        return shutil._ntuple_diskusage(0, 0, base + removed)

    monkeypatch.setattr("shutil.disk_usage", free)
    made = opened(folder, store_dir, num_kept=9)
    left = [path for path in paths if path.exists()]
    assert left == {3: paths, 2: [paths[0], paths[2]], 1: [paths[0]]}[num_left]
    assert bool(made.path) is (num_free > 0)


def test_settings_that_do_not_matter_do_not_make_it_anew(folder, store_dir):
    opened(folder, store_dir)
    assert opened(folder, store_dir, mask_blur_kernel=7, mask_threshold=9).reused
    assert opened(folder, store_dir, decoder="opencv", placement="file", strict=True).reused


@pytest.mark.parametrize("change", ["touch", "rename", "remove", "add", "rewrite"])
def test_a_changed_folder_makes_it_anew(folder, store_dir, change):
    first = opened(folder, store_dir)
    path = folder.faces[4].path
    if change == "touch":
        os.utime(path, ns=(1, 1))
    elif change == "rename":
        path.rename(path.with_name("zzz.png"))
    elif change == "remove":
        path.unlink()
    elif change == "add":
        write_face(path.with_name("new.png"), 64, 99)
    else:
        write_face(path, 64, 98)
    changed = read_folder(folder.path)
    second = opened(changed, store_dir)
    assert not second.reused
    assert second.num_faces == len(changed.faces)
    assert raw_files(store_dir) == [second.path] != [first.path]
    for face, pixels in zip(changed.faces, second.faces_fssc.numpy(), strict=True):
        np.testing.assert_array_equal(pixels, expected(face, CROP))


def test_two_folders_keep_one_file_each(folder, store_dir, tmp_path):
    shutil.copytree(folder.path, tmp_path / "b")
    os.utime(tmp_path / "b" / folder.faces[0].path.name)
    side_b = read_folder(tmp_path / "b")
    paths = [opened(side, store_dir).path for side in (folder, side_b)]
    assert raw_files(store_dir) == sorted(paths)
    assert opened(folder, store_dir).reused
    assert opened(side_b, store_dir).reused


def _cut_last_byte(content, header_bytes):
    return content[:-1]


def _cut_in_header(content, header_bytes):
    return content[:100]


def _empty(content, header_bytes):
    return b""


def _longer(content, header_bytes):
    return content + b"\0"


def _facts_changed(content, header_bytes):
    return content.replace(b"001.png", b"002.png", 1)


def _other_schema(content, header_bytes):
    return content.replace(b"mien.faces/1", b"mien.faces/9", 1)


def _garbage(content, header_bytes):
    return b"\xff" * 5000


def _deep(content, header_bytes):
    return b"[" * 4096


def _a_list(content, header_bytes):
    return b"[1]\n" + content


def _huge_header(content, header_bytes):
    return content.replace(b'"header_bytes": ', b'"header_bytes": 9999999', 1)


@pytest.mark.parametrize(
    "spoil",
    [
        _cut_last_byte,
        _cut_in_header,
        _empty,
        _longer,
        _facts_changed,
        _other_schema,
        _garbage,
        _deep,
        _a_list,
        _huge_header,
    ],
)
def test_a_spoilt_raw_file_is_made_anew(folder, store_dir, spoil):
    first = opened(folder, store_dir)
    content = first.path.read_bytes()
    header_bytes = json.loads(content.split(b"\n", 1)[0])["header_bytes"]
    spoilt = spoil(content, header_bytes)
    assert spoilt != content
    first.path.write_bytes(spoilt)
    second = opened(folder, store_dir)
    assert not second.reused
    assert second.warnings == []
    assert second.path.read_bytes() == content
    assert torch.equal(second.faces_fssc, first.faces_fssc)


def _forged(content, header_bytes, **changes):
    """The raw file with other facts, and a digest that fits them."""
    first, text = (json.loads(line) for line in content.split(b"\n", 2)[:2])
    text = json.dumps(text | changes, sort_keys=True).encode()
    first["sha256"] = hashlib.sha256(text).hexdigest()
    header = json.dumps(first).encode() + b"\n" + text + b"\n"
    return header.ljust(header_bytes) + content[header_bytes:]


@pytest.mark.parametrize(
    "changes",
    [
        {"size_px": -CROP.size_px},
        {"size_px": True},
        {"size_px": 1.5},
        {"size_px": None},
        {"names": "x" * 30},
        {"names": [1] * 30},
        {"names": [f"{number}.png" for number in range(30)]},
        {"names": {}},
        {"settings": []},
        {"settings": {}},
        {"rejected": [["a.png"]]},
        {"rejected": [["a.png", "one\ntwo"]]},
        {"rejected": [["a.png", "a face that is not there"]]},
        {"rejected": 1},
        {"empty": None},
        {"empty": [["a face that is not there", "its mask is empty"]]},
        {"areas_outside": []},
        {"areas_outside": {"eye": -1}},
        {"areas_outside": {"x\ny": 1}},
        {"folder": 1},
        {"key": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_raw_file_with_facts_that_are_none_is_made_anew(folder, store_dir, changes):
    first = opened(folder, store_dir)
    content = first.path.read_bytes()
    header_bytes = json.loads(content.split(b"\n", 1)[0])["header_bytes"]
    assert _forged(content, header_bytes) == content
    first.path.write_bytes(_forged(content, header_bytes, **changes))
    second = opened(folder, store_dir)
    assert not second.reused
    assert second.path.read_bytes() == content


@pytest.mark.parametrize("header_bytes", [4096.0, True, "4096", -4096, 0, 4095, [4096], 2**70])
def test_a_raw_file_whose_header_has_no_size_is_made_anew(folder, store_dir, header_bytes):
    first = opened(folder, store_dir)
    content = first.path.read_bytes()
    line, rest = content.split(b"\n", 1)
    changed = json.dumps(json.loads(line) | {"header_bytes": header_bytes}).encode()
    first.path.write_bytes(changed + b"\n" + rest)
    assert not opened(folder, store_dir).reused


def test_a_raw_file_under_another_name_is_not_taken(folder, store_dir):
    first = opened(folder, store_dir)
    os.utime(folder.faces[0].path, ns=(1, 1))
    renamed = store._plan(read_folder(folder.path), CROP, DataConfig()).key
    first.path.rename(store_dir / f"{renamed}.faces")
    assert not opened(read_folder(folder.path), store_dir).reused


def test_a_raw_file_that_cannot_be_read_is_made_anew(folder, store_dir, monkeypatch):
    first = opened(folder, store_dir)
    first.path.unlink()
    first.path.mkdir()  # not readable as a file, and in the way of the new one
    second = opened(folder, store_dir)
    assert not second.reused
    assert torch.equal(second.faces_fssc, first.faces_fssc)
    assert second.path is None
    assert len(second.warnings) == 1


def test_a_pipe_in_the_place_of_a_raw_file_is_waited_for_by_nobody(folder, store_dir):
    first = opened(folder, store_dir)
    first.path.unlink()
    os.mkfifo(first.path)
    second = opened(folder, store_dir)
    assert not second.reused
    assert torch.equal(second.faces_fssc, first.faces_fssc)


def test_a_pipe_among_files_under_way_is_waited_for_by_nobody(folder, store_dir):
    store_dir.mkdir(parents=True, exist_ok=True)
    os.mkfifo(store_dir / ".aaaa-1.part")
    os.mkfifo(store_dir / "aaaa.faces")
    assert opened(folder, store_dir).path is not None


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("mmap.mmap", errno.ENODEV),
        ("os.posix_fallocate", errno.EOPNOTSUPP),
        ("os.posix_fallocate", errno.EINVAL),
    ],
)
def test_a_disk_that_maps_no_files_keeps_them_all_the_same(
    folder, store_dir, monkeypatch, call, error
):
    mapped = opened(folder, store_dir)
    content = mapped.path.read_bytes()
    mapped.path.unlink()

    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(call, refuse)
    made = opened(folder, store_dir)
    assert (made.reused, made.warnings) == (False, [])
    assert made.path.read_bytes() == content
    again = opened(folder, store_dir)
    assert (again.reused, again.warnings) == (True, [])
    for store_ in (made, again):
        np.testing.assert_array_equal(store_.faces_fssc.numpy(), mapped.faces_fssc.numpy())


def test_faces_that_are_to_stay_in_a_file_need_a_disk_that_maps_it(folder, store_dir, monkeypatch):
    opened(folder, store_dir)

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(ValueError, match="disk of .* maps no files; set data.placement to host"):
        opened(folder, store_dir, placement="file")
    shutil.rmtree(store_dir)
    with pytest.raises(ValueError, match="maps no files.*; set data.store_dir"):
        opened(folder, store_dir, placement="file")
    assert raw_files(store_dir) == []


def test_without_flock_only_what_is_a_day_old_counts_as_left_behind(folder, store_dir, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    store_dir.mkdir(parents=True, exist_ok=True)
    for name, age_s in (("young", 3600.0), ("old", 90_000.0)):
        part = store_dir / f".{name}-1.part"
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age_s,) * 2)
    made = opened(folder, store_dir)
    assert sorted(path.name for path in raw_files(store_dir)) == [".young-1.part", made.path.name]


def test_without_a_folder_it_works_in_memory(folder):
    made = opened(folder, None)
    assert (made.path, made.placement, made.warnings) == (None, "host", [])
    assert made.why.endswith("; not kept for the next start (data.store_dir is off)")
    np.testing.assert_array_equal(made.faces_fssc[3], expected(folder.faces[3], CROP))


def test_a_folder_that_cannot_be_made_is_told_of(folder, tmp_path):
    (tmp_path / "file").write_text("")
    made = opened(folder, tmp_path / "file" / "store")
    assert made.path is None
    assert len(made.warnings) == 1
    assert "Not a directory" in made.warnings[0]
    assert "not kept for the next start" in made.why
    np.testing.assert_array_equal(made.faces_fssc[3], expected(folder.faces[3], CROP))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_is_told_of(folder, store_dir):
    store_dir.mkdir(parents=True)
    store_dir.chmod(0o500)
    made = opened(folder, store_dir)
    assert "Permission denied" in made.warnings[0]


@pytest.mark.parametrize(
    "step", ["tempfile.mkstemp", "os.posix_fallocate", "os.fsync", "os.rename"]
)
@pytest.mark.parametrize("placement", ["host", "auto"])
def test_a_disk_that_fails_is_told_of(folder, store_dir, monkeypatch, step, placement):
    def fail(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(step, fail)
    made = opened(folder, store_dir, placement=placement)
    assert made.path is None
    assert made.warnings == [
        f"decoded faces are not kept for the next start ({store_dir}: Read-only file system)"
    ]
    assert raw_files(store_dir) == []
    monkeypatch.undo()
    for face, pixels in zip(folder.faces, made.faces_fssc.numpy(), strict=True):
        np.testing.assert_array_equal(pixels, expected(face, CROP))


def _set_free_bytes(monkeypatch, num_bytes):
    free = shutil._ntuple_diskusage(num_bytes, 0, num_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)


def test_a_full_disk_is_not_filled(folder, store_dir, monkeypatch):
    _set_free_bytes(monkeypatch, 1000)
    made = opened(folder, store_dir)
    assert "No space left on device" in made.warnings[0]
    assert raw_files(store_dir) == []
    assert made.num_faces == NUM_FACES


@pytest.mark.parametrize(("reserve_mib", "is_kept"), [("100", True), ("101", False), (None, False)])
def test_a_disk_keeps_its_reserve(folder, store_dir, monkeypatch, reserve_mib, is_kept):
    """A reserve of the user's, else 256 MiB."""
    _set_free_bytes(monkeypatch, 101 * 1024**2)
    monkeypatch.delenv("MIEN_DISK_RESERVE_MIB")
    if reserve_mib is not None:
        monkeypatch.setenv("MIEN_DISK_RESERVE_MIB", reserve_mib)
    assert bool(opened(folder, store_dir).path) is is_kept


@pytest.mark.parametrize("text", ["", "-1", "1.5", "much"])
def test_a_reserve_that_is_no_number_is_refused(folder, store_dir, monkeypatch, text):
    monkeypatch.setenv("MIEN_DISK_RESERVE_MIB", text)
    message = f"MIEN_DISK_RESERVE_MIB must be a whole number of MiB, got '{text}'"
    with pytest.raises(ValueError, match=message):
        opened(folder, store_dir)


def test_file_placement_survives_a_failing_sync(folder, store_dir, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    made = opened(folder, store_dir, placement="file")
    assert raw_files(store_dir) == []
    np.testing.assert_array_equal(made.faces_fssc[9], expected(folder.faces[9], CROP))


def test_file_placement_without_a_folder_says_what_to_do(folder, tmp_path):
    with pytest.raises(ValueError, match="need a file.*data.store_dir is off.*set data.store_dir"):
        opened(folder, None, placement="file")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Not a directory"):
        opened(folder, tmp_path / "file" / "store", placement="file")


def test_a_start_that_breaks_off_leaves_nothing(folder, store_dir):
    def stop(done, total):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(folder, store_dir, progress=stop)
    assert raw_files(store_dir) == []


def test_what_a_killed_start_left_is_removed(folder, store_dir):
    store_dir.mkdir(parents=True)
    (store_dir / f".{'0' * 32}-abc.part").write_bytes(bytes(1000))
    made = opened(folder, store_dir)
    assert raw_files(store_dir) == [made.path]


def test_a_raw_file_that_another_start_removes_is_read_all_the_same(folder, store_dir, monkeypatch):
    """A start with other settings replaces it by its own, after it was found and before it is
    read."""
    first, choose = opened(folder, store_dir), store.choose_placement

    def be_late(*args):
        first.path.unlink(missing_ok=True)
        return choose(*args)

    monkeypatch.setattr(store, "choose_placement", be_late)
    second = opened(folder, store_dir, placement="file")
    assert (second.reused, second.path.exists()) == (True, False)
    np.testing.assert_array_equal(second.faces_fssc, first.faces_fssc)


@pytest.mark.parametrize("placement", ["host", "file"])
def test_a_part_that_another_start_removes_before_it_is_locked_is_made_anew(
    folder, store_dir, monkeypatch, placement
):
    mkstemp, parts = tempfile.mkstemp, []

    def be_taken_for_a_leftover(**words):
        parts.append(mkstemp(**words))
        if len(parts) == 1:
            store._remove_left_behind(store_dir)
        return parts[-1]

    monkeypatch.setattr(tempfile, "mkstemp", be_taken_for_a_leftover)
    made = opened(folder, store_dir, placement=placement)
    assert (len(parts), made.warnings, raw_files(store_dir)) == (2, [], [made.path])


def test_what_another_start_is_writing_is_left_alone(folder, store_dir):
    plan = store._plan(folder, Crop("face", 1.0, 0.0, 32), DataConfig())
    other = store._RawFile(store_dir / f"{plan.key}.faces", plan)
    made = opened(folder, store_dir)
    parts = [path for path in raw_files(store_dir) if path != made.path]
    assert len(parts) == 1
    other.pixels_fssc[:] = 7
    other.keep(plan, other.pixels_fssc)
    other.close()
    assert (store_dir / f"{plan.key}.faces").exists()


def change_mask(path, data, name="vgg-clear"):
    """Write a face again with other data of a mask; None: without the mask."""
    _, header = png.read_header(path)
    mask = header.masks.pop(name)
    if data is not None:
        header.masks[name] = dataclasses.replace(mask, data=data)
    png.write_face(path, cv2.imread(str(path)), header)


def damage(face):
    content = face.path.read_bytes()
    face.path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("decoder", ["dali", "opencv"])
@pytest.mark.parametrize("placement", ["host", "file"])
def test_a_damaged_face_is_left_out_and_named(folder, store_dir, decoder, placement):
    culprits = [0, 17, 29]
    for number in culprits:
        damage(folder.faces[number])
    sound = [face for number, face in enumerate(folder.faces) if number not in culprits]
    ticks = []
    first = opened(
        folder,
        store_dir,
        decoder=decoder,
        placement=placement,
        progress=lambda *tick: ticks.append(tick),
    )
    second = opened(folder, store_dir, placement=placement)
    third = opened(folder, None, decoder=decoder)
    assert second.reused
    assert ticks == [(done, NUM_FACES) for done in range(1, NUM_FACES + 1)]
    for made in (first, second, third):
        assert made.names == [face.path.name for face in sound]
        assert [found.path for found in made.rejected] == [
            folder.faces[number].path for number in culprits
        ]
        assert all("damaged" in found.reason for found in made.rejected)
        for face, pixels in zip(sound, made.faces_fssc.numpy(), strict=True):
            np.testing.assert_array_equal(pixels, expected(face, CROP))


def test_strict_stops_at_a_damaged_face_also_when_reusing(folder, store_dir):
    damage(folder.faces[17])
    message = f"{folder.faces[17].path}: the picture is damaged"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opened(folder, store_dir, strict=True)
        assert not store_dir.exists() or raw_files(store_dir) == []
    opened(folder, store_dir)
    with pytest.raises(ValueError, match=message):
        opened(folder, store_dir, strict=True)


def test_too_few_faces_left(folder, store_dir):
    for face in folder.faces[:6]:
        damage(face)
    with pytest.raises(ValueError, match="24 usable faces of 30, at least 25 are needed") as caught:
        opened(folder, store_dir)
    assert "\n" not in str(caught.value)
    assert folder.faces[0].path.name in str(caught.value)
    assert raw_files(store_dir) == []
    assert opened(folder, store_dir, minimum=24).num_faces == 24
    with pytest.raises(ValueError, match="at least 25"):
        opened(folder, store_dir)


def test_no_faces(folder, store_dir):
    empty = dataclasses.replace(folder, faces=[])
    with pytest.raises(ValueError, match="0 usable faces"):
        opened(empty, store_dir, minimum=0)


def test_a_face_without_the_mask_is_left_out_and_named(folder, store_dir):
    change_mask(folder.faces[3].path, None)
    made = opened(folder, store_dir, mask_type="vgg-clear")
    assert made.num_faces == NUM_FACES - 1
    (found,) = made.rejected
    assert found.path == folder.faces[3].path
    assert "'vgg-clear'" in found.reason
    assert "bisenet-fp_head" in found.reason
    with pytest.raises(ValueError, match="has no mask 'vgg-clear'"):
        opened(folder, None, mask_type="vgg-clear", strict=True)
    with pytest.raises(ValueError, match="has no mask 'unet-dfl'"):
        opened(folder, None, mask_type="unet-dfl")


def test_a_damaged_mask_is_left_out_and_named(folder, store_dir):
    change_mask(folder.faces[5].path, b"no zlib")
    made = opened(folder, store_dir, mask_type="vgg-clear")
    assert [found.path.name for found in made.rejected] == ["005.png"]


def test_damaged_masks_are_not_held(folder, store_dir):
    """Nor is what they were read from, by the errors that say so."""
    mask_bytes = 2 * 1024**2
    for face in folder.faces:
        change_mask(face.path, b"a" * mask_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="0 usable faces of 30"):
            opened(read_folder(folder.path), None, mask_type="vgg-clear")
        assert tracemalloc.get_traced_memory()[1] < NUM_FACES * mask_bytes
    finally:
        tracemalloc.stop()


def test_what_an_earlier_version_decoded_is_replaced(folder, store_dir, monkeypatch):
    """Its files say less: they are not taken, but known well enough to be removed."""
    with monkeypatch.context() as context:
        context.setattr(store, "CONTENT_VERSION", 1)
        first = opened(folder, store_dir)
    head, text, rest = first.path.read_bytes().split(b"\n", 2)
    facts = json.loads(text)
    del facts["empty"], facts["areas_outside"]
    text = json.dumps(facts, sort_keys=True).encode()
    head = json.dumps(json.loads(head) | {"sha256": hashlib.sha256(text).hexdigest()}).encode()
    header_bytes = json.loads(head)["header_bytes"]
    pixels = rest[-first.nbytes :]
    first.path.write_bytes((head + b"\n" + text + b"\n").ljust(header_bytes) + pixels)
    with contextlib.ExitStack() as stack:
        assert store._open_raw(first.path, stack) is not None
    second = opened(folder, store_dir)
    assert not second.reused
    assert raw_files(store_dir) == [second.path]


def test_faces_whose_mask_is_empty_are_kept_and_told_at_every_start(folder, store_dir):
    change_mask(folder.faces[3].path, zlib.compress(bytes(64 * 64)))
    change_mask(folder.faces[7].path, zlib.compress(bytes([1]) * 64 * 64))
    folder = read_folder(folder.path)
    for is_read in (False, True):
        made = opened(folder, store_dir, mask_type="vgg-clear")
        assert made.reused == is_read
        assert made.num_faces == NUM_FACES
        assert made.rejected == []
        assert [found.path for found in made.empty] == [folder.faces[i].path for i in (3, 7)]
        assert "is empty: make it again" in made.empty[0].reason
        assert "holds 0 and 1" in made.empty[1].reason
    assert opened(folder, store_dir).empty == []  # extended is drawn


def test_number_of_threads_does_not_matter(folder):
    one, many = (
        open_store(folder, CROP, DataConfig(num_threads=count), store_dir=None, device=CPU)
        for count in (1, 9)
    )
    assert torch.equal(one.faces_fssc, many.faces_fssc)


@pytest.mark.oracle
def test_oracle_sets(oracle_paths, tmp_path):
    """Any set of faces of the oracle: both decoders and every place give one tensor."""
    for side in filter(Path.is_dir, oracle_paths("sets/*")):
        folder = read_folder(side, minimum=1)
        stores = [
            opened(folder, directory, minimum=1, decoder=decoder, placement=placement)
            for decoder, placement, directory in (
                ("dali", "host", None),
                ("opencv", "host", None),
                ("dali", "file", tmp_path),
            )
        ]
        for made in stores[1:]:
            assert torch.equal(made.faces_fssc, stores[0].faces_fssc)
        np.testing.assert_array_equal(stores[0].faces_fssc[0], expected(folder.faces[0], CROP))


def rooms(monkeypatch, host, gpu=None):
    monkeypatch.setattr(store, "available_host_bytes", lambda: host)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu, gpu))
    return torch.device("cuda" if gpu is not None else "cpu")


@pytest.mark.parametrize(
    ("num_bytes", "host", "gpu", "place"),
    [
        (5, 10, None, "host"),
        (6, 10, None, "file"),
        (5, 10, 10, "gpu"),
        (4, 10, 7, "host"),
        (5, 10, 9, "file"),  # page-locked it would take 8
        (6, 11, 11, "file"),
    ],
)
def test_auto_takes_the_first_place_with_room(monkeypatch, num_bytes, host, gpu, place):
    device = rooms(monkeypatch, host * GIB, None if gpu is None else gpu * GIB)
    chosen, why = choose_placement("auto", num_bytes * GIB, device)
    assert chosen == place
    assert f"{num_bytes}.0 GiB of faces" in why
    passed_over = {"gpu": [], "host": [gpu] if gpu else [], "file": [gpu, host] if gpu else [host]}
    for room in passed_over[place]:
        assert "too many for half of" in why
        assert f"({room}.0 GiB free)" in why


def test_a_place_asked_for_by_name(monkeypatch):
    device = rooms(monkeypatch, 10 * GIB, 10 * GIB)
    for place in ("gpu", "host", "file"):
        chosen, why = choose_placement(place, 8 * GIB, device)
        assert chosen == place
        assert why.endswith("as set by data.placement")
    for place in ("gpu", "host"):
        with pytest.raises(ValueError, match="do not fit in .* set it to auto or file"):
            choose_placement(place, 11 * GIB, device)
    assert choose_placement("gpu", 9 * GIB, device)[0] == "gpu"
    with pytest.raises(ValueError, match="9.0 GiB of faces, which take 16.0 GiB there"):
        choose_placement("host", 9 * GIB, device)
    with pytest.raises(ValueError, match="this run has no GPU"):
        choose_placement("gpu", 1, CPU)


def test_room_of_a_control_group(tmp_path):
    """Version 2 and 1; the tightest of the group and those around it counts."""

    def group(path, current, limit, inactive, names):
        path.mkdir(parents=True, exist_ok=True)
        (path / names[0]).write_text(f"{current}\n")
        (path / names[1]).write_text(f"{limit}\n")
        (path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")

    version_2 = ("memory.current", "memory.max")
    version_1 = ("memory.usage_in_bytes", "memory.limit_in_bytes")
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu:/else\n4:memory:/old\n0::/outer/inner\n")
    root = tmp_path / "fs"
    group(root / "outer/inner", 100, "max", 0, version_2)
    group(root / "outer", 700, 1000, 50, version_2)
    group(root / "memory/old", 10, 500, 5, version_1)
    assert sorted(store._group_rooms(membership, root)) == [350, 495]
    assert store._group_rooms(tmp_path / "none", root) == []


def test_available_memory_is_plausible():
    assert (
        2**20
        < store.available_host_bytes()
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


@pytest.mark.slow
def test_benchmark_of_the_first_start():
    row = first_start(60, 64, 32, repeats=1)
    assert (row["num_faces"], row["nbytes"]) == (60, 60 * 32 * 32 * 8)
    bare = min(row["bare_dali_s"], row["bare_opencv_s"])
    assert row["ratio"] == row["first_s"] / bare
    assert 0 < row["headers_s"]
    assert 0 < row["second_s"]
    json.dumps(row)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["auto", "gpu", "host", "file"])
@pytest.mark.parametrize("keep", [True, False])
def test_places_on_a_gpu_machine(folder, store_dir, placement, keep, monkeypatch):
    if placement == "file" and not keep:
        pytest.skip("a file needs a folder")
    monkeypatch.setattr(store, "COPY_BYTES", 3 * 48 * 48 * 8)
    device = torch.device("cuda")
    for reused in (False, keep):
        made = open_store(
            folder,
            CROP,
            DataConfig(placement=placement),
            store_dir=store_dir if keep else None,
            device=device,
        )
        assert made.reused == reused
        assert made.faces_fssc.is_cuda == (placement in ("auto", "gpu"))
        assert made.faces_fssc.is_pinned() == (placement == "host")
        for face, pixels in zip(folder.faces, made.faces_fssc.cpu().numpy(), strict=True):
            np.testing.assert_array_equal(pixels, expected(face, CROP))
