"""What `faces check` says at its end, lists, draws and moves; `faces inspect` of a folder."""

import errno
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from mien.cli import main
from mien.core.faces import check
from mien.core.faces.check import report
from mien.core.faces.review import move_named, named_files
from mien.core.faces.synthetic import draw_folder
from mien.core.preview.review import pose_picture


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("review")
    draw_folder(root / "a", identity="a", count=26, size_px=96)
    return root / "a"


@pytest.fixture
def spoilt(drawn, tmp_path):
    """Faces, one of them twice, and a file that is none, its name odd."""
    folder = tmp_path / "mine"
    shutil.copytree(drawn, folder)
    first = sorted(folder.iterdir())[0]
    shutil.copy(first, folder / "zz again.png")
    (folder / "zz\nno face.png").write_bytes(b"no")
    return folder


def test_the_last_line_is_the_verdict(drawn, tmp_path, capsys):
    assert main(["faces", "check", str(drawn)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(sorted(drawn.iterdir())[0], few)
    assert main(["faces", "check", str(drawn), str(few)]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "not ready, because few has 1 usable face of at least 25"
    assert main(["faces", "check", str(drawn), str(drawn), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ready"] is False
    assert len(facts["reasons"]) == 1


def test_what_rounds_to_nothing_has_no_sign(drawn, capsys, monkeypatch):
    nearly = check.Spread(-0.4, -0.3, -0.2, 0.1, 0.4)
    monkeypatch.setattr(check, "_spread", lambda values: nearly)
    assert main(["faces", "check", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "90 % in 0 to 0, median 0, all in 0 to 0" in said
    assert "within 0 degrees (0 to 0)" in said


def test_lists_are_for_xargs_and_never_written_over(spoilt, tmp_path, capsys):
    lists = tmp_path / "lists"
    words = ["faces", "check", str(spoilt), "--lists", str(lists)]
    assert main(words) == 0
    listed = {path.name: path.read_bytes().split(b"\0")[:-1] for path in lists.iterdir()}
    assert listed["repeated.txt"] == [bytes(spoilt / "zz again.png")]
    assert listed["unusable.txt"] == [bytes(spoilt / "zz\nno face.png")]
    before = {path: path.read_bytes() for path in lists.iterdir()}
    assert main(words) == 2
    assert "cannot write" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in lists.iterdir()}


def test_named_files_are_moved_and_none_is_lost(spoilt, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in spoilt.iterdir()}
    aside = tmp_path / "aside"
    words = ["faces", "check", str(spoilt), "--move-to", str(aside)]
    assert main(words) == 0
    assert "1 unusable" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in spoilt.iterdir()}
    moved = {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert moved.keys() >= {"zz again.png", "zz\nno face.png"}
    assert before == after | moved
    assert not after.keys() & moved.keys()


def test_files_are_moved_on_a_disk_without_hard_links(spoilt, tmp_path, monkeypatch):
    """As exFAT, on which face sets are carried about."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    before = {path.name: path.read_bytes() for path in spoilt.iterdir()}
    measured = report(spoilt)
    monkeypatch.setattr(os, "link", refuse)
    counts = move_named(measured, tmp_path / "aside")
    moved = {path.name: path.read_bytes() for path in (tmp_path / "aside").glob("*/*")}
    after = {path.name: path.read_bytes() for path in spoilt.iterdir()}
    assert sum(counts.values()) == len(moved) > 1
    assert before == after | moved
    assert not after.keys() & moved.keys()


def test_a_move_that_would_hide_a_file_moves_nothing(spoilt, tmp_path):
    place = tmp_path / "aside/repeated/zz again.png"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    measured, before = report(spoilt), sorted(spoilt.iterdir())
    with pytest.raises(ValueError, match="zz again.png is there already; give another folder"):
        move_named(measured, tmp_path / "aside")
    with pytest.raises(ValueError, match="lies in .* itself; give a folder beside it"):
        move_named(measured, spoilt / "aside")
    assert (sorted(spoilt.iterdir()), place.read_bytes()) == (before, b"mine")


def test_a_link_that_is_moved_leads_to_its_file(spoilt, tmp_path):
    """A set of links: relative, absolute, through a linked folder, to one another, to nothing."""
    pool, aside = tmp_path / "store/pool", tmp_path / "out/aside"
    pool.mkdir(parents=True)
    (spoilt / "zz again.png").rename(pool / "face.png")
    (pool / "none.png").write_bytes(b"no")
    (spoilt / "pool").symlink_to(pool)
    (spoilt / "zz\nno face.png").unlink()
    links = {
        "relative.png": "../store/pool/none.png",
        "absolute.png": str(pool / "none.png"),
        "behind.png": "pool/../pool/none.png",
        "chain.png": "relative.png",
        "to moved.png": str(spoilt / "behind.png"),
        "zz again.png": "../store/pool/face.png",
    }
    for name, text in links.items():
        (spoilt / name).symlink_to(text)
    led_to = {name: (spoilt / name).resolve(strict=True) for name in links}
    move_named(report(spoilt), aside)
    moved = {path.name: path for path in aside.rglob("*")}
    assert moved.keys() >= links.keys()
    assert led_to == {name: moved[name].resolve(strict=True) for name in links}
    are_absolute = {name for name in links if moved[name].readlink().is_absolute()}
    assert are_absolute == {"absolute.png", "to moved.png"}, "as the user has made them"


def test_a_file_stays_to_which_a_link_leads_by_way_of_another_folder(drawn, tmp_path):
    faces, beside = tmp_path / "faces", tmp_path / "beside"
    shutil.copytree(drawn, faces)
    beside.mkdir()
    (beside / "middle.png").symlink_to(faces / "zz.png")
    first = min(faces.iterdir())
    first.rename(faces / "zz.png")
    first.symlink_to(beside / "middle.png")
    move_named(report(faces), tmp_path / "aside")
    assert (faces / "zz.png").exists()
    assert not first.is_symlink()


def test_the_file_of_a_link_is_not_named_as_its_repeat(spoilt, tmp_path):
    """A list for `xargs -0 rm`, or a move, would else take the file, and leave a dead link."""
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "middle.png").symlink_to(spoilt / "zz again.png")
    (spoilt / "aa.png").symlink_to("ab.png")
    (spoilt / "ab.png").symlink_to(beside / "middle.png")
    move_named(report(spoilt), tmp_path / "aside")
    assert not any(path.is_symlink() for path in spoilt.iterdir())
    moved = (tmp_path / "aside").rglob("*")
    assert [path for path in [*spoilt.iterdir(), *moved] if not path.exists()] == []
    assert len(list(spoilt.iterdir())) == 26


def test_every_file_is_named_once(spoilt):
    named = named_files(report(spoilt))
    names = [name for of_kind in named.values() for name in of_kind]
    assert len(names) == len(set(names))
    assert {"unusable", "repeated"} <= named.keys()


def test_pictures_of_what_to_look_at_and_of_poses(spoilt, drawn, tmp_path, capsys):
    sheet, poses = tmp_path / "sheet.jpg", tmp_path / "poses.png"
    words = ["faces", "check", str(spoilt), str(drawn), "--sheet", str(sheet)]
    assert main([*words, "--poses", str(poses)]) in (0, 2)
    image = cv2.imread(str(sheet))
    assert image.std() > 20, "there is a face in it"
    assert (image[-60, -60] == image[5, -5]).all(), "where there is no file, there is no tile"
    assert cv2.imread(str(poses)).shape[1] > 900
    for flag, name in (("--sheet", "x.txt"), ("--poses", "x.bmp")):
        assert main(["faces", "check", str(spoilt), flag, str(tmp_path / name)]) == 2
        assert f"{flag} must end in" in capsys.readouterr().err
    clean = tmp_path / "none.png"
    assert main(["faces", "check", str(drawn), "--sheet", str(clean)]) == 0
    assert ("sheet: nothing to show" in capsys.readouterr().out) == (not clean.exists())


def test_names_that_are_no_text_are_drawn_as_escapes(drawn, tmp_path):
    """Bytes that are no UTF-8 end a process inside OpenCV; of dollars matplotlib makes formulas."""
    odd = tmp_path / "$m\udcffine$"
    shutil.copytree(drawn, odd)
    shutil.copy(min(odd.iterdir()), odd / "z\udcff.png")
    sheet, poses = tmp_path / "sheet.png", tmp_path / "poses.png"
    words = ["faces", "check", str(odd), "--sheet", str(sheet), "--poses", str(poses)]
    assert main(words) == 0
    assert sheet.exists()
    assert poses.exists()


def test_poses_of_both_sides_have_one_scale(drawn, tmp_path, monkeypatch):
    """A field has the same colour in both pictures where it has the same share."""
    few = tmp_path / "few"
    few.mkdir()
    for face in sorted(drawn.iterdir())[:3]:
        shutil.copy(face, few)
    scales = []
    imshow = Axes.imshow

    def noted(axis, *args, **settings):
        scales.append((settings["vmin"], settings["vmax"]))
        return imshow(axis, *args, **settings)

    monkeypatch.setattr(Axes, "imshow", noted)
    pose_picture([report(few), report(drawn)], tmp_path / "poses.png")
    assert len(scales) == 2
    assert scales[0] == scales[1]


def test_a_folder_is_inspected_by_a_line_a_face(spoilt, capsys):
    assert main(["faces", "inspect", str(spoilt)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{spoilt}: 27 faces"
    assert lines[1].split()[:2] == ["file", "px"]
    assert any("zz?no face.png" in line or "no face.png" in line for line in lines)
    assert main(["faces", "inspect", str(spoilt), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["faces"]) == 27
    assert np.isfinite(facts["faces"][0]["yaw"])
    assert [*facts["unusable"]] == ["zz\nno face.png"]
    assert main(["faces", "inspect", str(spoilt), "--output", "x.png"]) == 2
