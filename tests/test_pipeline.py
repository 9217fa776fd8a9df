"""Faces decoded while headers are read: what runs beside what, how often, and how it ends."""

import os
import shutil
import threading

import cv2
import numpy as np
import pytest
import torch

from mien.core.config import DataConfig, EvaluateConfig
from mien.core.data import decode, pipeline
from mien.core.data.held_out import is_held_out
from mien.core.data.sides import open_sides
from mien.core.faces import folder as folders
from mien.core.faces.folder import read_folder
from mien.core.faces.geometry import Crop

CPU = torch.device("cpu")
DATA = DataConfig()
CROP = Crop(DATA.centering, DATA.coverage / 100, DATA.vertical_offset / 100, 32)
WAIT_S = 60


def opened(sides, store_dir=None, held_out=0, **data):
    given = {"num_threads": 2, "decoder": "opencv"} | data
    config = DataConfig(input_a=str(sides[0]), input_b=str(sides[1]), **given)
    evaluate = EvaluateConfig(held_out=held_out)
    return open_sides(config, evaluate, 32, store_dir=store_dir, device=CPU)


class Noted:
    """Calls of a function that takes a face, or its path, first: by name, and before each one."""

    def __init__(self, monkeypatch, module, name, before=lambda name: None):
        self.names = []
        self._original, self._before = getattr(module, name), before
        monkeypatch.setattr(module, name, self)

    def __call__(self, face, *arguments):
        path = getattr(face, "path", face)
        self._before(path.name)
        self.names.append((path.parent.name, path.name))
        return self._original(face, *arguments)


def names_of(sides) -> list[tuple[str, str]]:
    return [(path.parent.name, path.name) for side in sides for path in sorted(side.iterdir())]


def test_decoding_begins_before_the_last_header_is_read(sides, monkeypatch):
    """And each header is read once, in the order of the names, and each picture decoded once."""
    last = sorted(sides[0].iterdir())[-1].name
    is_decoding = threading.Event()

    def wait(name):
        assert name != last or is_decoding.wait(WAIT_S)

    headers = Noted(monkeypatch, folders, "read_placement", wait)
    decoded = Noted(monkeypatch, decode, "decode_one", lambda name: is_decoding.set())
    opened(sides)
    assert headers.names == names_of(sides)
    assert sorted(decoded.names) == names_of(sides)


def test_faces_have_the_cores_without_threads_of_opencv(sides, monkeypatch):
    """Those wait by spinning, for calls that are too small to be divided."""
    before, seen = cv2.getNumThreads(), []
    cv2.setNumThreads(2)
    try:
        for module, name in ((decode, "decode_one"), (pipeline, "_masks_of")):
            Noted(monkeypatch, module, name, lambda _: seen.append(cv2.getNumThreads()))
        opened(sides)
        assert seen == [1] * 2 * len(names_of(sides))
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_the_second_side_is_decoded_while_the_first_one_is_kept(sides, tmp_path, monkeypatch):
    is_decoding = threading.Event()
    first_of_b = sorted(sides[1].iterdir())[0].name
    original = os.fsync

    def sync(handle):
        assert is_decoding.wait(WAIT_S)
        original(handle)

    def note(name):
        if name == first_of_b:
            is_decoding.set()

    Noted(monkeypatch, decode, "decode_one", note)
    monkeypatch.setattr("os.fsync", sync)
    faces = opened(sides, tmp_path)
    assert all(side.store.path for side in faces.values())


@pytest.mark.parametrize("room", [1, 5])
def test_no_more_than_a_bound_waits(sides, monkeypatch, room):
    """What is ready waits for its row; a few more are under way in the threads."""
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", room * 6 * 32**2)
    decoded = Noted(monkeypatch, decode, "decode_one")
    faces = read_folder(sides[0]).faces * 10
    data = DataConfig(num_threads=1, decoder="opencv")
    with pipeline.decoding(faces, CROP, data, CPU) as decoder:
        waiting = iter(decoder)
        for number in range(1, 100):
            next(waiting)
            assert len(decoded.names) <= number + room + 1 + 5  # threads have 4 and one more
        assert len(list(waiting)) == len(faces) - 99


def test_what_was_decoded_before_is_not_decoded_ahead(sides, tmp_path, monkeypatch):
    first = opened(sides, tmp_path)
    decoded = Noted(monkeypatch, decode, "decode_one")
    second = opened(sides, tmp_path)
    assert decoded.names == []
    for side in "ab":
        assert second[side].store.reused
        assert torch.equal(second[side].store.faces_fssc, first[side].store.faces_fssc)


def test_faces_of_a_folder_that_was_decoded_otherwise_are_decoded_once(
    sides, tmp_path, monkeypatch
):
    opened(sides, tmp_path, coverage=80.0)
    decoded = Noted(monkeypatch, decode, "decode_one")
    assert not opened(sides, tmp_path)["a"].store.reused
    assert sorted(decoded.names) == names_of(sides)


def test_faces_that_are_held_out_are_not_decoded(sides, tmp_path, monkeypatch):
    many = tmp_path / "a", tmp_path / "b"
    for source, folder in zip(sides, many, strict=True):
        folder.mkdir()
        for number, path in enumerate([*source.iterdir()] * 2):
            os.link(path, folder / f"{number:03}.png")
    decoded = Noted(monkeypatch, decode, "decode_one")
    faces = opened(many, held_out=9)
    trained_on = [each for each in names_of(many) if not is_held_out(each[1], 9)]
    assert len(trained_on) < len(names_of(many))
    assert sorted(decoded.names) == trained_on
    for side, opened_side in faces.items():
        assert opened_side.store.names == [name for at, name in trained_on if at == side]


def test_a_refusal_ends_the_decoding(sides, tmp_path, monkeypatch):
    """With the text it has always had; no thread and no file is left."""
    bad = tmp_path / "a"
    shutil.copytree(sides[0], bad)
    last = sorted(bad.iterdir())[-1]
    last.write_bytes(b"no picture")
    before = threading.active_count()
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", 1)  # so that the decoder is stuck
    with pytest.raises(ValueError, match=f"{last.name}: is no PNG") as refusal:
        opened((bad, sides[1]), tmp_path / "store", strict=True)
    assert str(refusal.value).startswith(str(last))
    assert threading.active_count() == before
    assert not (tmp_path / "store").exists()


def test_what_ends_the_decoding_is_raised(sides, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(decode, "decode_one", fail)
    with pytest.raises(MemoryError, match="no room"):
        opened(sides)


def test_a_face_that_changes_while_others_are_read_is_decoded_anew_later(
    sides, tmp_path, monkeypatch
):
    """Its old pixels may be kept, but never under the name of the new ones."""
    own = tmp_path / "a"
    shutil.copytree(sides[0], own)
    first, *_, last = sorted(own.iterdir())
    is_decoded = threading.Event()

    def note(face, crop, original=decode.decode_one):
        result = original(face, crop)
        if face.path == first:
            is_decoded.set()
        return result

    def change(name):
        if name == last.name and not first.with_suffix(".old").exists():
            assert is_decoded.wait(WAIT_S)
            content = last.read_bytes()
            first.rename(first.with_suffix(".old"))
            first.write_bytes(content)

    monkeypatch.setattr(decode, "decode_one", note)
    Noted(monkeypatch, folders, "read_placement", change)
    opened((own, sides[1]), tmp_path / "store")
    store = opened((own, sides[1]), tmp_path / "store")["a"].store
    assert not store.reused
    np.testing.assert_array_equal(store.faces_fssc[0], store.faces_fssc[-1])


@pytest.mark.parametrize("decoder", ["dali", "opencv"])
def test_the_pixels_are_those_of_faces_that_were_all_known(sides, decoder):
    faces = opened(sides, decoder=decoder)
    for side in faces.values():
        for face, pixels_ssc in zip(side.folder.faces, side.store.faces_fssc, strict=True):
            crop_bgr = decode.decode_one(face, CROP)
            masks_ssc = pipeline.configured_masks(face, CROP, DATA)
            np.testing.assert_array_equal(pixels_ssc[..., :6], np.dstack([crop_bgr, masks_ssc]))
