"""Folders of faces: which files count, what is refused in one line, and shared folders."""

import errno
import os
import shutil
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import FACE_SETS

from mien.core.faces.folder import Rejected, named, read_folder, skipped, uneven
from mien.core.faces.listing import list_pictures, overlap, passed_over
from mien.core.faces.png import FaceHeader, StoredMask, read_header, write_face


def write_faces(folder: Path, names: list[str], edge_px: int = 32, version=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    source = {} if version is None else {"alignments_version": version}
    for name in names:
        landmarks = generator.uniform(50, 150, (68, 2)).astype(np.float32)
        header = FaceHeader(landmarks, source=source)
        write_face(folder / name, np.zeros((edge_px, edge_px, 3), np.uint8), header)
    return folder


def message_of(*args, **options) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        read_folder(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_faces_come_sorted_by_name(tmp_path):
    folder = write_faces(tmp_path / "a", ["f10.png", "f9.PNG", "f1.png", "é.png"])
    found = read_folder(folder, minimum=4)
    assert [face.path.name for face in found.faces] == ["f1.png", "f10.png", "f9.PNG", "é.png"]
    assert found.rejected == []
    assert {face.edge_px for face in found.faces} == {32}
    assert found.faces[0].alignment.matrix_23.shape == (2, 3)


def test_other_entries_are_passed_over(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png"])
    write_faces(folder / "deeper.png", ["f2.png"])
    (folder / "notes.txt").write_text("no face")
    (folder / ".hidden.png").write_text("no face")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    elsewhere = write_faces(tmp_path / "b", ["real.png"])
    (folder / "f0.png").symlink_to(elsewhere / "real.png")
    assert [path.name for path in list_pictures(folder)] == ["f0.png", "f1.png"]
    assert len(read_folder(folder, minimum=2).faces) == 2


def test_rejected_files_are_named_with_their_reason(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    (folder / "f0.png").write_bytes(b"")
    found = read_folder(folder, minimum=2)
    assert len(found.faces) == 2
    assert [(file.path.name, file.reason[:16]) for file in found.rejected] == [
        ("f0.png", "is empty (0 byte")
    ]


def test_strict_stops_at_the_first_rejected_file(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f3.png"])
    (folder / "f2.png").write_bytes(b"no png")
    (folder / "f4.png").write_bytes(b"")
    message = message_of(folder, minimum=2, strict=True)
    assert message.startswith(f"{folder / 'f2.png'}: is no PNG")
    assert (
        len(read_folder(write_faces(tmp_path / "b", ["f.png"]), minimum=1, strict=True).faces) == 1
    )


def test_too_few_faces_are_refused_with_advice(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    message = message_of(folder, side="b")
    assert message.startswith(f"side B: {folder} contains fewer than 25 usable faces (2)")
    assert "at least 500" in message
    for number in range(5):
        (folder / f"g{number}.png").write_bytes(b"")
    message = message_of(folder)
    assert "5 files are unusable" in message
    assert "and 2 more" in message
    assert len(read_folder(folder, minimum=2).faces) == 2


def test_missing_wrong_and_empty_folders_are_refused(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png"])
    assert "does not exist" in message_of(tmp_path / "none")
    assert message_of(tmp_path / "none", side="a").startswith("side A: ")
    assert "is a file" in message_of(folder / "f1.png")
    (tmp_path / "empty").mkdir()
    assert "holds no PNG" in message_of(tmp_path / "empty")


def test_pictures_without_headers_are_no_faces(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    for path in list_pictures(folder):
        content = path.read_bytes()
        start = content.index(b"iTXt") - 4
        path.write_bytes(content[:start] + content[content.index(b"IDAT") - 4 :])
    message = message_of(folder, minimum=1)
    assert "2 PNGs are not extracted faces: extract faces from the pictures first" in message
    assert read_folder(folder, minimum=0).faces == []
    (folder / "f2.png").unlink()
    assert "its only PNG is not an extracted face: extract faces" in message_of(folder, minimum=1)


def test_faces_that_cannot_be_used_are_not_called_pictures(tmp_path):
    """The advice to extract faces helps only where nothing was extracted."""
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    for path in list_pictures(folder):
        path.write_bytes(path.read_bytes()[:60])
    message = message_of(folder, minimum=1)
    assert "not extracted faces" not in message
    assert "none of its 2 PNGs can be used (f1.png" in message
    assert "cut short" in message
    (folder / "f1.png").write_text("no face")
    assert "none of its 2 PNGs can be used (f1.png: is no PNG" in message_of(folder, minimum=1)
    (folder / "f1.png").unlink()
    assert "its only PNG cannot be used (f2.png: " in message_of(folder, minimum=1)


def test_sub_folders_and_jpegs_are_named_where_there_is_no_png(tmp_path):
    folder = tmp_path / "a"
    for name, count in (("right", 2), ("good", 3), ("left", 1), ("empty", 0)):
        write_faces(folder / name, [f"f{number}.png" for number in range(count)])
    (folder / ".hidden").mkdir()
    write_faces(folder / ".hidden", ["f.png"])
    (folder / "link").symlink_to(folder / "good")
    message = message_of(folder, side="a")
    assert message == (
        f"side A: {folder} holds no PNG; its sub-folders good, left, right hold 6: give one of "
        "them, or put the faces into one folder"
    )
    shutil.rmtree(folder / "left")
    shutil.rmtree(folder / "good")
    assert "; its sub-folder right holds 2: give that one, or put" in message_of(folder)
    shutil.rmtree(folder / "right")
    write_faces(folder / "empty/deeper/still", ["f.png"])
    assert "; its sub-folder empty/deeper/still holds 1: give that" in message_of(folder)
    shutil.rmtree(folder / "empty/deeper")
    (folder / "empty" / "1.jpg").write_bytes(b"\xff\xd8\xff")
    assert "; its sub-folder empty holds 1 JPEG: give that one" in message_of(folder)


def test_what_lies_beside_the_faces_is_counted(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png"])
    assert read_folder(folder, minimum=1).passed_over[folder].notice() == ""
    write_faces(folder / "good", ["f2.png", "f3.png"])
    (folder / "f.jpg").write_bytes(b"\xff\xd8\xff")
    found = read_folder(folder, minimum=1)
    assert len(found.faces) == 1
    assert found.passed_over[found.path].counts == ["2 PNGs in its sub-folder good", "1 JPEG"]
    assert found.passed_over[found.path].notice() == (
        "2 PNGs in its sub-folder good and 1 JPEG are not used: put the faces into one folder; "
        "give JPEGs of DeepFaceLab a folder of their own"
    )


def test_only_so_much_of_sub_folders_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.faces.listing._MAX_ENTRIES", 10)
    folder = write_faces(tmp_path / "a", ["f1.png"])
    for number in range(9):
        (folder / f"{number}").mkdir()
        for other in range(3):
            (folder / f"{number}" / f"{other}.png").touch()
    found = passed_over(folder)
    assert found.subfolders == ("0", "1", "2")
    assert found.counts == ["more than 8 PNGs in its sub-folders 0, 1, 2"]
    assert passed_over(tmp_path / "gone").notice() == ""


def test_legacy_crops_are_read_for_the_legacy_crop_only(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"], version=1.0)
    found = read_folder(folder, minimum=1, centering="legacy")
    assert [face.centering for face in found.faces] == ["legacy", "legacy"]
    for centering in ("face", "head"):
        message = message_of(folder, minimum=1, centering=centering, side="b")
        assert message.startswith(f"side B: {folder} holds faces extracted before")
        assert "(f1.png: version 1.0)" in message
        assert "begin a model with data.centering=legacy" in message
    assert len(read_folder(folder, minimum=1).faces) == 2


@pytest.mark.parametrize("later", [2.0, 2.4, None])
def test_legacy_crops_among_later_ones_are_refused(tmp_path, later):
    folder = write_faces(tmp_path / "a", ["f1.png"], version=later)
    for centering in ("face", "head", "legacy"):
        (face,) = read_folder(folder, minimum=1, centering=centering).faces
        assert face.centering == "head"
    write_faces(folder, ["f2.png", "f3.png"], version="1.9")
    for centering in ("face", "head", "legacy"):
        message = message_of(folder, minimum=1, centering=centering)
        assert "mixes 2 faces extracted before alignments version 2.0 (f2.png: version 1.9)" in (
            message
        )
        assert f"with 1 of later ones (f1.png: version {later or 'unknown'})" in message
    assert len(read_folder(folder, minimum=1).faces) == 3


@pytest.mark.parametrize("kind", ["source", "mask", "name of a mask"])
def test_what_a_header_holds_beside_the_landmarks_is_let_go(tmp_path, kind):
    folder = write_faces(tmp_path / "a", [f"f{number}.png" for number in range(4)])
    filler = "a" * 4 * 1024**2
    for path in list_pictures(folder):
        _, header = read_header(path)
        mask = StoredMask(b"a" * 4 * 1024**2, 128, "face", np.eye(3))
        if kind == "mask":
            header.masks["vgg-clear"] = mask
        elif kind == "name of a mask":
            header.masks[filler] = mask
        else:
            header.source["x"] = filler
        write_face(path, np.zeros((32, 32, 3), np.uint8), header)
    tracemalloc.start()
    try:
        found = read_folder(folder, minimum=4)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.faces) == 4
    assert held < 1024**2
    assert peak < 64 * 1024**2


def test_the_first_files_are_named_and_the_others_counted(tmp_path):
    files = [Rejected(tmp_path / f"f{number}", "is empty") for number in range(2)]
    files += [Rejected(tmp_path / "g", "is cut")]
    assert named(files) == "f0, f1: is empty; g: is cut"
    assert named([*files, *files]) == "f0, f1: is empty; g: is cut; and 3 more"
    assert skipped(files[:1]) == f"skipped {tmp_path / 'f0'}: is empty"
    assert skipped(files[:1], "held out") == f"skipped {tmp_path / 'f0'}, held out: is empty"
    many = skipped(files * 50_000)
    assert (
        many == f"skipped 150000 files of {tmp_path}: f0, f1: is empty; g: is cut; and 149997 more"
    )


def test_uneven_sides_are_told():
    assert uneven("A", 26, "B", 130) is None
    assert uneven("A", 0, "B", 130) is None
    assert uneven("A", 26, "B", 353).startswith("B has 353 faces and A 26: the smaller side is")
    assert uneven("A", 353, "B", 26).startswith("A has 353 faces and B 26: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_are_rejected(tmp_path):
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    (folder / "f1.png").chmod(0)
    found = read_folder(folder, minimum=1)
    assert "Permission denied" in found.rejected[0].reason


def test_overlap_names_what_is_shared(tmp_path):
    a = write_faces(tmp_path / "a", ["f1.png", "f2.png"])
    b = write_faces(tmp_path / "b", ["f1.png", "f2.png"])
    inner = write_faces(a / "inner", ["f1.png"])
    assert overlap(a, b) is None
    assert "both use the folder" in overlap(a, a)
    (tmp_path / "link").symlink_to(a)
    assert "both use the folder" in overlap(tmp_path / "link", a)
    assert f"{inner} lies inside {a}" == overlap(a, inner) == overlap(inner, a)
    (b / "f3.png").symlink_to(a / "f1.png")
    assert overlap(a, b).endswith("share 1 file")
    os.link(a / "f2.png", b / "f4.png")
    assert overlap(a, b).endswith("share 2 files")


@pytest.mark.slow
@pytest.mark.parametrize("name", FACE_SETS)
def test_real_folders_are_read_whole(faces_dir, name):
    folder = faces_dir / name
    found = read_folder(folder, strict=True, minimum=1)
    assert len(found.faces) == len(list(folder.glob("*.png")))
    yaws = np.array([face.alignment.yaw for face in found.faces])
    distances = np.array([face.alignment.average_distance for face in found.faces])
    assert np.abs(yaws).max() < 90
    assert np.median(distances) < 0.06


def test_a_folder_of_specimens_yields_its_faces(specimens, faces_dir):
    names = {face.path.name for face in read_folder(faces_dir / "bad", minimum=1).faces}
    assert names <= specimens.keys()
    assert {"good_control.png"} & specimens.keys() <= names
    assert "no_header.png" not in names


def test_a_specimen_without_a_header_is_no_extracted_face(specimens, tmp_path):
    if "no_header.png" not in specimens:
        pytest.skip("the specimens lack no_header.png")
    shutil.copy(specimens["no_header.png"], tmp_path)
    assert "its only PNG is not an extracted face: extract faces" in message_of(tmp_path)


def test_too_few_real_faces_are_refused(faces_dir):
    if not (faces_dir / "bad/too_few").is_dir():
        pytest.skip(f"{faces_dir} has no bad/too_few")
    assert "fewer than 25" in message_of(faces_dir / "bad/too_few", side="a")


def test_real_faces_of_all_sizes_are_read(faces_dir):
    folder = faces_dir / "bad/mixed_sizes"
    if not folder.is_dir():
        pytest.skip(f"{faces_dir} has no bad/mixed_sizes")
    for face in read_folder(folder, minimum=1).faces:
        assert (face.edge_px,) * 2 == cv2.imread(str(face.path)).shape[:2]


def test_too_few_handles_are_no_fault_of_a_face(tmp_path, monkeypatch):
    """Leaving out those that could not be opened would train on other faces, by chance."""
    folder = write_faces(tmp_path / "a", ["f1.png", "f2.png"])

    def refuse(*_args, **_options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("mien.core.faces.png.open_plain", refuse)
    assert "raise the limit (`ulimit -n 4096`)" in message_of(folder, minimum=1)
