"""The drawn people: exact landmarks, masks that sit, two identities, variety, safe folders."""

import os

import cv2
import numpy as np
import pytest

from mien.core.faces import geometry, masks
from mien.core.faces.folder import read_folder
from mien.core.faces.png import read_header
from mien.core.faces.synthetic import draw_face, draw_folder
from mien.core.faces.synthetic.film import draw_film
from mien.core.system.durable_files import temporary_name

COUNT = 26


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small folder of each person, with their faces as `read_folder` gives them."""
    found = {}
    for identity in ("a", "b"):
        path = tmp_path_factory.mktemp("drawn") / identity
        draw_folder(path, identity=identity, count=COUNT, size_px=128, seed=3)
        found[identity] = read_folder(path, strict=True)
    return found


def _head_landmarks(header, size_px):
    crop = geometry.Crop("head", 1.0, 0.0, size_px)
    return geometry.crop_landmarks(header.landmarks_l2, geometry.align(header.landmarks_l2), crop)


def _at(image, points_2):
    """Mean colour of a 3 x 3 px patch about the mean of some points, B, G, R."""
    x, y = np.rint(np.atleast_2d(points_2).mean(axis=0)).astype(int)
    return image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)


def _open_eyed(identity):
    """Faces with open eyes and an open mouth: picture, header and landmarks of the picture."""
    for number in range(40):
        image, header = draw_face(identity, number, size_px=256)
        points = _head_landmarks(header, 256)
        lids = np.linalg.norm(points[[37, 38, 43, 44]] - points[[41, 40, 47, 46]], axis=1)
        gap = np.linalg.norm(points[62] - points[66])
        if lids.min() > 6.0 and gap > 8.0:
            yield image, header, points


def test_headers_pass_and_hold_what_extraction_writes(folders):
    for identity, folder in folders.items():
        assert len(folder.faces) == COUNT
        assert folder.rejected == []
        for number, face in enumerate(folder.faces):
            assert face.edge_px == 128
            assert face.path.name == f"drawn_{identity}_{number:06d}_0.png"
            _, header = read_header(face.path)
            assert sorted(header.masks) == ["bisenet-fp_face", "vgg-clear"]
            assert set(header.source) == {
                "alignments_version",
                "original_filename",
                "face_index",
                "source_filename",
                "source_is_video",
                "source_frame_dims",
            }
            left, top, width, height = header.box
            low, high = face.landmarks_l2.min(axis=0), face.landmarks_l2.max(axis=0)
            assert (low >= (left - 1, top - 1)).all()
            assert (high <= (left + width + 1, top + height + 1)).all()


def test_landmarks_and_picture_survive_the_file(tmp_path):
    draw_folder(tmp_path / "faces", identity="b", count=2, size_px=128, seed=9)
    for number, path in enumerate(sorted((tmp_path / "faces").iterdir())):
        image, header = draw_face("b", number, size_px=128, seed=9)
        edge_px, found = read_header(path)
        assert edge_px == 128
        np.testing.assert_array_equal(found.landmarks_l2, header.landmarks_l2)
        np.testing.assert_array_equal(cv2.imread(str(path)), image)
        for name, mask in header.masks.items():
            np.testing.assert_array_equal(found.masks[name].pixels(), mask.pixels())
            np.testing.assert_array_equal(found.masks[name].affine_33, mask.affine_33)


@pytest.mark.parametrize("identity", ["a", "b"])
def test_features_lie_where_the_header_says(identity):
    faces = list(_open_eyed(identity))
    assert len(faces) >= 5
    for image, _, points in faces:
        cheek = _at(image, points[[41, 31, 48]]).sum()
        cheek = max(cheek, _at(image, points[[46, 35, 54]]).sum())
        for eye in (slice(36, 42), slice(42, 48)):
            low = np.floor(points[eye].min(axis=0)).astype(int)
            high = np.ceil(points[eye].max(axis=0)).astype(int)
            inside = image[low[1] : high[1] + 1, low[0] : high[0] + 1].sum(axis=2)
            assert inside.min() < 0.35 * cheek, "no pupil or lashes between the landmarks"
        blue, green, red = _at(image, points[[57, 66]])
        assert red > 1.15 * max(green, blue), "no lip between landmarks 57 and 66"
        for brow, lid in ((19, 37), (24, 44)):
            away = points[brow] - points[lid]
            skin = max(_at(image, points[brow] + share * away).sum() for share in (-0.55, 0.4))
            assert _at(image, points[brow]).sum() < 0.85 * skin, "no brow on its landmark"


def test_the_pupil_moves_with_the_face():
    """Darkest px of each eye lie inside its outline, whatever the pose: the patch is in place."""
    seen = 0
    for image, _, points in _open_eyed("b"):
        grey = cv2.GaussianBlur(image.sum(axis=2).astype(np.float32), (3, 3), 0)
        for eye in (points[36:42], points[42:48]):
            outline = np.zeros(grey.shape, np.uint8)
            cv2.fillPoly(outline, [np.rint(eye).astype(np.int32)], 255)
            inner = cv2.erode(outline, np.ones((3, 3), np.uint8)) > 0
            ring = (cv2.dilate(outline, np.ones((17, 17), np.uint8)) > 0) & ~(outline > 0)
            below = ring & (np.arange(256)[:, None] > eye[:, 1].max() + 2)
            assert grey[inner].min() < 0.5 * np.median(grey[below])
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("identity", ["a", "b"])
@pytest.mark.parametrize("name", ["vgg-clear", "bisenet-fp_face"])
def test_stored_masks_cover_the_landmarks_and_leave_the_rest(folders, identity, name):
    crop = geometry.Crop("face", 1.0, 0.0, 128)
    for face in folders[identity].faces:
        drawn = masks.training_masks(
            face, crop, mask_type="components", dilation=0.0, blur_kernel=0, threshold=0.0
        )[..., 0]
        stored = masks.training_masks(
            face, crop, mask_type=name, dilation=0.0, blur_kernel=0, threshold=0.0
        )[..., 0]
        assert set(np.unique(stored)) > {0, 255}, "a network's mask has a soft rim"
        assert (stored[drawn == 255] > 127).mean() > 0.96
        assert 0.1 < (stored > 127).mean() < 0.6
        assert not stored[0].any()
        assert not stored[:, [0, -1]].any()


def test_alignment_finds_the_pose_that_was_drawn(folders):
    for folder in folders.values():
        assert max(abs(face.alignment.roll) for face in folder.faces) < 8.0
        assert max(face.alignment.average_distance for face in folder.faces) < 0.08


@pytest.mark.parametrize("identity", ["a", "b"])
def test_poses_expressions_and_light_vary(folders, identity):
    faces = folders[identity].faces
    yaw = np.array([face.alignment.yaw for face in faces])
    pitch = np.array([face.alignment.pitch for face in faces])
    assert yaw.min() < -12
    assert yaw.max() > 12
    assert np.std(yaw) > 7
    assert np.std(pitch) > 3
    points = np.array([face.alignment.normalized_l2 for face in faces])
    gap = points[:, 66, 1] - points[:, 62, 1]
    assert gap.min() < 0.02
    assert gap.max() > 0.10
    lids = points[:, 41, 1] - points[:, 37, 1]
    assert lids.min() < 0.6 * lids.max()
    frame = np.array([face.landmarks_l2 for face in faces])
    tilt = np.degrees(np.arctan2(*(frame[:, 45] - frame[:, 36]).T[::-1]))
    assert np.ptp(tilt) > 12
    light = [cv2.imread(str(face.path))[48:80, 32:96].mean(axis=(0, 1)) for face in faces]
    assert np.std(light, axis=0).min() > 6


def test_every_face_is_nearer_to_its_own_person():
    pictures = {
        identity: np.array([draw_face(identity, n, size_px=64)[0] for n in range(16)], np.float32)
        for identity in ("a", "b")
    }
    middle = {identity: faces.mean(axis=0) for identity, faces in pictures.items()}
    for own, other in (("a", "b"), ("b", "a")):
        for picture in pictures[own]:
            inner = (slice(18, 50), slice(16, 48))
            to_own = np.abs(picture - middle[own])[inner].mean()
            assert to_own < np.abs(picture - middle[other])[inner].mean()
    shape = [geometry.align(draw_face(i, 1)[1].landmarks_l2).normalized_l2 for i in ("a", "b")]
    assert np.abs(shape[0] - shape[1]).max() > 0.05


def test_a_face_depends_on_identity_number_and_seed_only(tmp_path):
    draw_folder(tmp_path / "few", identity="a", count=2, size_px=64, seed=5)
    draw_folder(tmp_path / "more", identity="a", count=4, size_px=64, seed=5)
    for path in sorted((tmp_path / "few").iterdir()):
        assert path.read_bytes() == (tmp_path / "more" / path.name).read_bytes()
    first, _ = draw_face("a", 0, size_px=64, seed=5)
    for other in (("a", 1, 5), ("b", 0, 5), ("a", 0, 6)):
        identity, number, seed = other
        assert (draw_face(identity, number, size_px=64, seed=seed)[0] != first).mean() > 0.5


def test_two_people_do_not_share_their_random_numbers(folders):
    yaw = {side: [face.alignment.yaw for face in folders[side].faces] for side in ("a", "b")}
    assert np.abs(np.subtract(yaw["a"], yaw["b"])).mean() > 5
    assert np.corrcoef(yaw["a"], yaw["b"])[0, 1] < 0.6


def test_the_same_set_is_left_alone(tmp_path):
    path = tmp_path / "faces"
    draw_folder(path, identity="a", count=3, size_px=64)
    before = {found.name: found.stat().st_mtime_ns for found in path.iterdir()}
    draw_folder(path, identity="a", count=3, size_px=64)
    assert {found.name: found.stat().st_mtime_ns for found in path.iterdir()} == before


@pytest.mark.parametrize(
    "changes", [{"count": 4}, {"count": 2}, {"identity": "b"}, {"seed": 1}, {"size_px": 72}]
)
def test_another_set_in_the_folder_is_refused_and_kept(tmp_path, changes):
    path = tmp_path / "faces"
    draw_folder(path, identity="a", count=3, size_px=64)
    before = {found.name: found.read_bytes() for found in path.iterdir()}
    with pytest.raises(ValueError, match=r"faces is not empty: give a new folder, or empty") as no:
        draw_folder(path, **({"identity": "a", "count": 3, "size_px": 64} | changes))
    assert "\n" not in str(no.value)
    assert {found.name: found.read_bytes() for found in path.iterdir()} == before


def test_a_damaged_face_or_a_foreign_file_is_not_this_set(tmp_path):
    for name, harm in (("cut", b"\x89PNG"), ("foreign", None)):
        path = tmp_path / name
        draw_folder(path, identity="a", count=2, size_px=64)
        if harm:
            next(path.iterdir()).write_bytes(harm)
        else:
            (path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="is not empty"):
            draw_folder(path, identity="a", count=2, size_px=64)


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    draw_folder(tmp_path / "empty", identity="b", count=1, size_px=64)
    assert len(list((tmp_path / "empty").iterdir())) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file is a file: give a folder for the drawn faces"):
        draw_folder(tmp_path / "file", identity="b", count=1)


def test_what_a_kill_has_left_is_removed(tmp_path):
    for name in ("faces", "frames"):
        temporary_name(tmp_path / name).mkdir()
    draw_folder(tmp_path / "faces", identity="a", count=1, size_px=64)
    draw_film(tmp_path / "frames", tmp_path / "film", identity="a", count=1, size_px=64)
    assert sorted(os.listdir(tmp_path)) == ["faces", "film", "frames"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("mien.core.faces.synthetic.write_face", full_disk)
    with pytest.raises(ValueError, match="cannot write .*faces: No space left on device"):
        draw_folder(tmp_path / "faces", identity="a", count=2, size_px=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "c"}, r"identity must be one of \['a', 'b'\], got 'c'"),
        ({"count": 0}, "count must be 1 to 100000, got 0"),
        ({"size_px": 32}, "size_px must be 64 to 1024, got 32"),
        ({"seed": -1}, r"seed must be 0 to 2\*\*63 - 1, got -1"),
    ],
)
def test_refuses_arguments_out_of_range(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_folder(tmp_path / "faces", **({"identity": "a", "count": 1} | changes))
    assert not (tmp_path / "faces").exists()


def test_a_drawn_film_and_its_faces(tmp_path, monkeypatch):
    frames, faces = tmp_path / "film", tmp_path / "faces"
    draw_film(frames, faces, identity="a", count=3, size_px=96)
    assert sorted(path.stem for path in faces.iterdir()) == [
        f"{path.stem}_0" for path in sorted(frames.iterdir())
    ]
    for path in sorted(faces.iterdir()):
        edge_px, header = read_header(path)
        frame = cv2.imread(str(frames / header.source["source_filename"]))
        assert frame.shape[:2] == tuple(header.source["source_frame_dims"])
        head = geometry.crop_matrix(
            geometry.align(header.landmarks_l2), geometry.Crop("head", 1.0, 0.0, edge_px)
        )
        again = cv2.warpAffine(frame, head, (edge_px, edge_px), flags=cv2.INTER_LINEAR)
        assert np.array_equal(again, cv2.imread(str(path)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    draw_film(frames, faces, identity="a", count=3, size_px=96)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    first, second = (cv2.imread(str(path)) for path in sorted(frames.iterdir())[:2])
    change = np.abs(first.astype(int) - second).mean()
    assert 0 < change < 6, "it moves, and softly"
    monkeypatch.setattr("mien.core.faces.synthetic.film.DRAWING_VERSION", 2)
    with pytest.raises(ValueError, match="film is not empty: give a new folder"):
        draw_film(frames, faces, identity="a", count=3, size_px=96)


def test_a_film_is_not_drawn_over_what_is_there(tmp_path):
    (tmp_path / "film").mkdir()
    (tmp_path / "film/mine.png").touch()
    with pytest.raises(ValueError, match="film is not empty: give a new folder"):
        draw_film(tmp_path / "film", tmp_path / "faces", identity="a", count=2, size_px=96)
    assert [path.name for path in tmp_path.rglob("*")] == ["film", "mine.png"]
