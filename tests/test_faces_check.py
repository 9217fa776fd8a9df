"""What is measured in a face folder, what is said about it, and the command that prints it."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mien.cli import main
from mien.core.faces import check, geometry
from mien.core.faces.check import compare, report
from mien.core.faces.folder import read_folder
from mien.core.faces.inspect import contact_sheet, inspect
from mien.core.faces.picture import open_picture
from mien.core.faces.png import (
    FaceFileError,
    FaceHeader,
    StoredMask,
    read_header,
    write_face,
)

with np.load(Path(geometry.__file__).with_name("mean_face.npz")) as _constants:
    MEAN_51_2 = _constants["mean51"]


def face_landmarks(scale: float = 120.0) -> np.ndarray:
    """A frontal face: the mean inner landmarks and a round jaw, px of a frame."""
    angle = np.linspace(np.pi, 0, 17)
    jaw = np.column_stack([0.5 + 0.62 * np.cos(angle), 0.25 + 0.95 * np.sin(angle)])
    return (np.vstack([jaw, MEAN_51_2]) * scale + 200).astype(np.float32)


def turned(landmarks: np.ndarray, yaw: float) -> np.ndarray:
    """The landmarks squeezed as by a turned head: only the measured angle need move."""
    x = (landmarks[:, 0] - landmarks[:, 0].mean()) / 100
    bent = landmarks.copy()
    bent[:, 0] += (yaw * (1 - x**2) * 10).astype(np.float32)
    return bent


def write(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    edge_px: int = 128,
    light: float = 1.0,
    blur: int = 0,
    yaw: float = 0.0,
    masks: dict | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    size = (edge_px, edge_px)
    coarse, fine = (
        cv2.resize(
            generator.uniform(*limits, (cells, cells, 3)), size, interpolation=cv2.INTER_CUBIC
        )
        for cells, limits in ((12, (100, 160)), (edge_px // 2, (-20, 20)))
    )
    image = np.clip(coarse + fine, 0, 255).astype(np.uint8)
    if blur:
        image = cv2.GaussianBlur(image, (blur, blur), 0)
    image = np.clip(image * light, 0, 255).astype(np.uint8)
    header = FaceHeader(turned(face_landmarks(), yaw), masks=masks or {}, source={"face_index": 0})
    write_face(folder / name, image, header)
    return folder / name


@pytest.fixture
def faces(tmp_path) -> Path:
    """30 different faces."""
    folder = tmp_path / "a"
    for number in range(30):
        write(folder, f"f{number:02}.png", seed=number)
    return folder


def said(advice: list[str], text: str) -> bool:
    return any(text in sentence for sentence in advice)


def test_counts_sizes_and_progress(faces):
    write(faces, "large.png", seed=99, edge_px=256)
    calls = []
    found = report(faces, progress=lambda done, total: calls.append((done, total)))
    assert (found.num_files, found.num_faces, found.trainable) == (31, 31, True)
    assert found.sizes_px == {128: 30, 256: 1}
    assert calls == [(done, 31) for done in range(1, 32)]
    assert said(found.advice, "have 2 sizes (30 of 128 px, 1 of 256 px)")
    assert said(found.advice, "31 faces are few")
    assert found.repeats == []
    assert found.blurred == found.blank == found.odd_landmarks == []
    assert json.loads(json.dumps(found.as_dict()))["sizes_px"] == {"128": 30, "256": 1}


def test_native_px_is_the_head_in_the_source(faces):
    found = report(faces)
    # 120 px for the inner box of the mean face, which is 3/8 of the head crop.
    assert found.native_px.median == pytest.approx(120 / 0.375, rel=1e-3)
    assert said(found.advice, "96 real px of a face: fit for models of up to 64 px")


def test_repeats_are_grouped_and_named(faces):
    again = cv2.imread(str(faces / "f03.png"))
    header = FaceHeader(face_landmarks())
    brighter = np.clip(again.astype(np.float32) * 1.05 + 4, 0, 255).astype(np.uint8)
    write_face(faces / "g1.png", brighter, header)
    soft = cv2.GaussianBlur(again, (3, 3), 0.5)
    write_face(faces / "g2.png", soft, header)
    found = report(faces)
    assert found.repeats == [["f03.png", "g1.png", "g2.png"]]
    assert found.num_repeats == 2
    assert said(found.advice, "2 of 32 files repeat")


def test_repeats_are_found_across_blocks(faces, monkeypatch):
    write_face(faces / "z.png", cv2.imread(str(faces / "f00.png")), FaceHeader(face_landmarks()))
    monkeypatch.setattr("mien.core.faces.check._BLOCK_ROWS", 7)
    assert report(faces).repeats == [["f00.png", "z.png"]]


def test_a_chain_of_likeness_is_no_group():
    """Each file is held against the group's first: a slow film is not one picture."""
    signs = np.ones((4, 255), np.float32)
    for number, num_changed in enumerate((0, 10, 20, 11)):
        signs[number, :num_changed] = -1
    measured = [SimpleNamespace(signs=row) for row in signs]
    assert check._repeats(["f0", "f1", "f2", "f3"], measured) == [["f0", "f1"], ["f2", "f3"]]
    assert check._repeats([], []) == []


def test_light_is_measured_on_the_face(faces, tmp_path):
    plain = report(faces)
    assert 45 < plain.lightness.median < 60
    assert said(plain.advice, "One light")
    dark = tmp_path / "dark"
    for number in range(30):
        write(dark, f"f{number:02}.png", seed=number, light=0.4)
    darker = report(dark)
    assert darker.lightness.median < plain.lightness.median - 15
    compared = compare(plain, darker)
    assert said(compared.advice, "Side A has faces as light as")
    assert said(compared.advice, "Side B has faces as dark as")
    for number in range(30):
        write(faces, f"h{number:02}.png", seed=100 + number, light=0.3 + number / 40)
    assert not said(report(faces).advice, "One light")


def test_pose_is_spread_and_compared(faces, tmp_path):
    turned_folder = tmp_path / "b"
    for number in range(30):
        write(turned_folder, f"f{number:02}.png", seed=number + 50, yaw=(number % 5 - 2) * 1.0)
    straight, other = report(faces), report(turned_folder)
    assert straight.yaw.range < 1 < other.yaw.range
    assert said(straight.advice, "Little variety of yaw")
    assert sum(straight.poses.values()) == 30
    compared = compare(straight, other)
    assert compared.poses_only_a == {}
    assert sum(compared.poses_only_b.values()) > 0.2
    assert said(compared.advice, " % of side B's faces look where side A has none")
    assert json.dumps(compared.as_dict())


def test_blur_blank_and_odd_faces_are_named(faces):
    write(faces, "soft.png", seed=200, blur=21)
    write_face(faces / "black.png", np.zeros((128, 128, 3), np.uint8), FaceHeader(face_landmarks()))
    odd = np.random.default_rng(0).uniform(0, 200, (68, 2)).astype(np.float32)
    write_face(faces / "odd.png", cv2.imread(str(faces / "f00.png"))[::-1].copy(), FaceHeader(odd))
    found = report(faces)
    assert found.blurred == ["soft.png"]
    assert found.blank == ["black.png"]
    assert found.odd_landmarks == ["odd.png"]
    assert said(found.advice, "1 face with a blank picture (black.png)")


def test_unreadable_files_are_named_with_reasons(faces):
    (faces / "empty.png").write_bytes(b"")
    cut = (faces / "f01.png").read_bytes()
    (faces / "cut.png").write_bytes(cut[: len(cut) * 2 // 3])
    damaged = bytearray((faces / "f02.png").read_bytes())
    damaged[-40] ^= 0xFF
    (faces / "damaged.png").write_bytes(damaged)
    found = report(faces)
    assert (found.num_files, found.num_faces) == (33, 30)
    assert list(found.unreadable) == ["cut.png", "damaged.png", "empty.png"]
    assert "0 bytes" in found.unreadable["empty.png"]
    assert "cut short" in found.unreadable["cut.png"]
    assert said(found.advice, "3 of 33 files cannot be used")


def test_a_refused_folder_counts_its_unusable_files_as_the_check_does(faces):
    (faces / "no_header.png").write_bytes(b"")
    cut = sorted(faces.glob("*.png"))[0]
    cut.write_bytes(cut.read_bytes()[:-40])  # its header is whole
    found = report(faces)
    with pytest.raises(
        ValueError, match=rf"fewer than 1000 usable faces \({found.num_faces}\)"
    ) as e:
        read_folder(faces, minimum=1000)
    assert f"{len(found.unreadable)} files are unusable" in str(e.value)
    assert "cut short" in str(e.value)


def test_masks_are_counted_and_checked(faces):
    good = StoredMask(zlib.compress(b"\xff" * 64), 8, "face", np.eye(3))
    bad = StoredMask(b"no zlib", 8, "face", np.eye(3))
    write(faces, "f00.png", masks={"vgg-clear": good})
    write(faces, "f01.png", seed=1, masks={"vgg-clear": bad, "components": bad})
    found = report(faces)
    assert found.masks == {"components": 1, "vgg-clear": 2}
    assert list(found.damaged_masks) == ["f01.png"]
    assert found.damaged_masks["f01.png"].startswith("vgg-clear: a stored mask is damaged")
    assert said(found.advice, "Only 2 of 30 faces have the mask 'vgg-clear'")


def constant(value: int) -> StoredMask:
    return StoredMask(zlib.compress(bytes([value]) * 64 * 64), 64, "face", np.eye(3))


def test_empty_masks_are_counted_by_mask_with_their_reason(faces, capsys):
    for number, value in enumerate((0, 1, 255, 255)):
        masks = {"vgg-clear": constant(value), "unet-dfl": constant(255)}
        write(faces, f"f{number:02}.png", seed=number, masks=masks)
    found = report(faces)
    assert list(found.empty_masks) == ["vgg-clear"]
    assert list(found.empty_masks["vgg-clear"]) == ["f00.png", "f01.png"]
    assert "is empty: make it again" in found.empty_masks["vgg-clear"]["f00.png"]
    assert "holds 0 and 1 in place of" in found.empty_masks["vgg-clear"]["f01.png"]
    assert said(found.advice, "2 faces with an (almost) empty mask 'vgg-clear' (f00.png, f01.png)")
    assert json.loads(json.dumps(found.as_dict()))["empty_masks"] == found.empty_masks
    assert main(["faces", "check", str(faces)]) == 0
    assert "unet-dfl (4), vgg-clear (4, 2 empty)" in capsys.readouterr().out


def set_version(path: Path, version) -> None:
    _, header = read_header(path)
    header.source["alignments_version"] = version
    write_face(path, cv2.imread(str(path)), header)


@pytest.mark.parametrize("version", ["1.0.0", "new", "a" * 1000, [1.0], True, 10**400, "1e400"])
def test_a_version_that_is_no_number_is_not_taken_for_a_late_one(faces, version):
    """The crop depends on it: a face from before 2.0 would train at another zoom, in silence."""
    path = sorted(faces.iterdir())[0]
    set_version(path, version)
    with pytest.raises(FaceFileError, match="alignments version that is no number"):
        read_header(path)


def test_versions_are_counted_and_mixed_crops_are_no_side(faces, capsys):
    for path in sorted(faces.iterdir()):
        set_version(path, 1.0)
    found = report(faces)
    assert (found.versions, found.num_legacy, found.trainable) == ({"1.0": 30}, 30, True)
    assert said(found.advice, "train them with data.centering=legacy")
    assert said(found.advice, "At legacy centring these files hold about 128 real px")
    # 120 px for the inner box of the mean face, which is 5/8 of the legacy crop.
    assert found.native_px.median == pytest.approx(120 / 0.625, rel=1e-3)
    for name, version in (("f00.png", 2.4), ("f01.png", None)):
        set_version(faces / name, version)
    found = report(faces)
    assert found.versions == {"1.0": 28, "2.4": 1, "unknown": 1}
    assert not found.trainable
    assert said(found.advice, "28 faces were extracted before alignments version 2.0 and 2 later")
    assert main(["faces", "check", str(faces)]) == 2
    assert "1.0 (28), 2.4 (1), unknown (1)" in capsys.readouterr().out


def test_a_legacy_picture_is_shown_and_measured_as_its_crop(faces, tmp_path):
    """The landmarks of a legacy crop lie in the picture where extraction put them."""
    path = faces / "f00.png"
    set_version(path, 1.0)
    face = read_folder(faces, minimum=0).faces[0]
    assert inspect(path)["shows"] == "legacy crop"
    crop = geometry.Crop("legacy", 1.0, 0.0, 128)
    landmarks_l2 = geometry.crop_landmarks(face.landmarks_l2, face.alignment, crop)
    image = cv2.imread(str(path))
    for x, y in np.rint(landmarks_l2).astype(int).clip(1, 126).tolist():
        image[y, x] = (0, 0, 255)
    _, header = read_header(path)
    write_face(path, image, header)
    sheet = contact_sheet(path, tile_px=128)
    assert sheet.shape == (2 * (128 + 8 + 20) + 8, 4 * (128 + 8) + 8, 3)
    picture, dots = (sheet[28 : 28 + 128, left : left + 128] for left in (8, 8 + 136))
    np.testing.assert_array_equal(picture, image)
    inner = np.rint(landmarks_l2).astype(int).clip(1, 126)
    is_green = (dots[inner[:, 1], inner[:, 0]] == (0, 255, 0)).all(axis=1)
    assert is_green.mean() > 0.9


def test_a_note_to_turn_the_picture_is_ignored(faces):
    """Training ignores it, since the landmarks know nothing of it: so do check and inspect."""
    plain, sheet = report(faces), contact_sheet(faces / "f00.png")
    note = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = len(note).to_bytes(4, "big") + b"eXIf" + note
    chunk += zlib.crc32(b"eXIf" + note).to_bytes(4, "big")
    for path in faces.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:33] + chunk + content[33:])
    turned_by_viewers = cv2.imread(str(faces / "f00.png"))
    with open_picture(faces / "f00.png", 128) as image_bgr:
        assert (turned_by_viewers != image_bgr).any()
    found = report(faces)
    assert found == plain
    np.testing.assert_array_equal(contact_sheet(faces / "f00.png"), sheet)


def test_masks_that_cannot_be_used_are_told_and_left_out_of_the_sheet(faces):
    bad = StoredMask(b"no zlib", 8, "face", np.eye(3))
    odd = StoredMask(b"", 8, "nose", np.eye(3))
    path = write(faces, "f00.png", masks={"a": bad, "b": odd, "vgg-clear": constant(255)})
    facts = inspect(path)["masks"]
    assert "no zlib data" in facts["a"]["problem"]
    assert "stored_centering is none of" in facts["b"]["problem"]
    assert facts["vgg-clear"] == {"size_px": 64, "centering": "face", "inside": 1.0}
    found = report(faces)
    assert found.damaged_masks["f00.png"].startswith("a: a stored mask is damaged")
    write(faces, "f01.png", masks={"vgg-clear": constant(255)})
    assert contact_sheet(path).shape == contact_sheet(faces / "f01.png").shape


def test_sub_folders_and_jpegs_are_counted(faces, capsys):
    for name in ("good", "left"):
        write(faces / name, "f.png")
    (faces / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    found = report(faces)
    assert found.num_files == 30
    assert found.as_dict()["passed_over"] == {
        "num_jpegs": 1,
        "subfolders": ("good", "left"),
        "num_deeper": 2,
        "kind": "PNG",
        "is_whole": True,
    }
    assert said(found.advice, "2 PNGs in its sub-folders good, left and 1 JPEG are not used: ")
    assert main(["faces", "check", str(faces)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("30 of 30 files; 2 PNGs in its sub-folders good, left; 1 JPEG")


def test_one_of_a_kind_is_told_in_the_singular(tmp_path, capsys):
    write(tmp_path, "face.png")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    found = report(tmp_path)
    assert said(found.advice, "1 usable face is too few to train")
    assert said(found.advice, "1 JPEG is not used: ")
    assert main(["faces", "check", str(tmp_path)]) == 2
    text = capsys.readouterr().out
    assert "1 of 1 file; 1 JPEG\n" in text
    assert "has 1 usable face of at least 25" in text
    (tmp_path / "cut.png").write_bytes(b"\x89")
    found = report(tmp_path)
    assert found.unreadable["cut.png"].startswith("ends after 1 byte: ")
    assert said(found.advice, "1 of 2 files cannot be used and is left out: repair or remove it.")
    with pytest.raises(ValueError, match=r"usable faces \(1\), 1 file is unusable"):
        read_folder(tmp_path, minimum=2)
    assert main(["faces", "inspect", str(tmp_path)]) == 0
    assert f"{tmp_path}: 1 face\n" in capsys.readouterr().out


def test_one_face_to_look_at_is_told_in_the_singular(faces):
    bad = StoredMask(b"no zlib", 8, "face", np.eye(3))
    write(faces, "f00.png", masks={"vgg-clear": bad})
    advice = report(faces).advice
    assert said(advice, "Only 1 of 30 faces has the mask 'vgg-clear'")
    assert said(advice, "(f00.png): look at it, and remove it if it is bad.")


def test_names_do_nothing_to_a_terminal(faces, capsys):
    forged = "f\x1b[31m\nforged: line.png"
    (faces / forged).write_bytes(b"no face")
    (faces / os.fsdecode(b"f\xe4.png")).write_bytes(b"no face")
    path = faces / "g\x1b[1m\n.png"
    shutil.copy(faces / "f00.png", path)
    _, header = read_header(path)
    header.source["source_filename"] = "frame\x1b[2J\n.png"
    write_face(path, cv2.imread(str(path)), header)
    assert main(["faces", "check", str(faces)]) == 0
    shown = capsys.readouterr().out
    assert main(["faces", "inspect", str(path)]) == 0
    shown += capsys.readouterr().out
    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith(("forged", ".png"))]
    assert "f\\u001b[31m\\nforged: line.png: is no PNG" in shown
    assert "f\\xe4.png: is no PNG" in shown
    assert "frame\\u001b[2J\\n.png" in shown


def test_few_or_no_faces_are_reported(tmp_path):
    write(tmp_path / "few", "f.png")
    found = report(tmp_path / "few")
    assert not found.trainable
    assert said(found.advice, "1 usable face is too few to train: at least 25")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "f.png").write_bytes(b"text")
    found = report(tmp_path / "none")
    assert found.num_faces == 0
    assert found.yaw is None
    assert compare(found, found).shared is not None
    with pytest.raises(ValueError, match="does not exist"):
        report(tmp_path / "nowhere")


def test_same_folder_on_both_sides_is_said(faces):
    found = report(faces)
    compared = compare(found, found)
    assert "both use the folder" in compared.shared
    assert said(compared.advice, "give each person a folder")


def test_decode_refuses_pictures_of_another_size(faces):
    face = read_folder(faces).faces[0]
    with (
        pytest.raises(FaceFileError, match="damaged or cut short"),
        open_picture(face.path, face.edge_px // 2),
    ):
        pass


@pytest.mark.oracle
def test_inspect_and_sheet_of_oracle_samples(oracle_dir, oracle_paths):
    for sample in oracle_paths("samples/*.png"):
        facts = inspect(sample)
        with np.load(oracle_dir / "geometry" / f"{sample.stem}.npz") as golden:
            pose = [facts["pitch"], facts["yaw"], facts["roll"]]
            assert np.allclose(pose, golden["pitch_yaw_roll"], atol=0.11)
        assert all("problem" not in mask for mask in facts["masks"].values())
        json.dumps(facts)
        sheet = contact_sheet(sample, tile_px=64)
        drawn = sum(name not in ("components", "extended") for name in facts["masks"])
        rows = -(-(8 + drawn) // 4)
        assert sheet.shape == (rows * (64 + 8 + 20) + 8, 4 * (64 + 8) + 8, 3)
        assert sheet.dtype == np.uint8


def test_specimens_are_reported(specimens, faces_dir):
    found = report(faces_dir / "bad")
    if "truncated_idat.png" in specimens:
        assert "cut short" in found.unreadable["truncated_idat.png"]
    assert {*found.blank} == {"all_black.png"} & specimens.keys()
    assert "good_control.png" not in found.unreadable
    assert {"header_expression.png"} & specimens.keys() <= found.unreadable.keys()


def test_command_check_prints_json(faces, tmp_path, capsys):
    assert main(["faces", "check", str(faces), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folders"][0]["num_faces"] == 30
    write(tmp_path / "few", "f.png")
    assert main(["faces", "check", str(faces), str(tmp_path / "few"), "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["comparison"]["shared"] is None
    assert [one["trainable"] for one in facts["folders"]] == [True, False]


def test_command_check_prints_text(faces, capsys):
    (faces / "empty.png").write_bytes(b"")
    assert main(["faces", "check", str(faces)]) == 0
    text = capsys.readouterr().out
    assert "30 of 31 files" in text
    assert "unusable: empty.png: is empty" in text
    assert "30 faces are few" in text
    assert "pitch \\ yaw" in text


def test_command_inspect_writes_a_picture(faces, tmp_path, capsys):
    output = tmp_path / "sheet.png"
    file = str(faces / "f00.png")
    assert main(["faces", "inspect", file, "--json", "--output", str(output)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["edge_px"] == 128
    assert facts["box"] == {"left": 0, "top": 0, "width": 0, "height": 0}
    assert cv2.imread(str(output)).shape[2] == 3
    assert main(["faces", "inspect", file]) == 0
    assert "native_px" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "{tmp}/none"], "does not exist"),
        (["check", "{tmp}"], "holds no PNG"),
        (["inspect", "{tmp}/none.png"], "none.png: cannot be read: No such file"),
        (["inspect", "{tmp}/a/f00.png", "--output", "{tmp}/x.txt"], "must end in .png"),
        (["inspect", "{tmp}/a/f00.png", "--output", "{tmp}/no/x.png"], "No such file"),
        (["draw", "{tmp}/new", "--count", "0"], "--count must be at least 1, got 0"),
    ],
)
def test_command_says_mistakes_in_one_line(faces, tmp_path, capsys, arguments, text):
    assert main(["faces", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mien faces: ")
    assert captured.err.count("\n") == 1
    assert text in captured.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, mien.cli\n"
        "try: mien.cli.main(['faces', 'check', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'cv2', 'numpy', 'rich'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FOLDER_B" in done.stdout
