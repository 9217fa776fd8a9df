"""Earlier saves: the previews that are kept of them, and `mien preview`, which draws any save."""

import errno
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from conftest import train_words

from mien.cli import main
from mien.core.history.restore import restore
from mien.core.preview import kept
from mien.core.preview.files import read_jpeg, save_jpeg
from mien.core.preview.kept import KeptPreviews, thinned
from mien.core.preview.tiles import ORIGINAL, Tiles
from mien.core.system.durable_files import temporary_name

SAVES = [1, 2, 4, 6]


@pytest.fixture(scope="module")
def trained(sides, tmp_path_factory):
    """A model of six iterations, its snapshot of the fourth beside it; not to be changed."""
    model_dir = tmp_path_factory.mktemp("trained") / "model"
    words = ("-b", "4", "-i", "6", "-s", "2", "-I", "4")
    assert main(train_words(sides, model_dir, *words)) == 0
    return model_dir


def _preview(*words, code=0):
    assert main(["preview", *map(str, words)]) == code


def _png_text(path):
    content = path.read_bytes()
    start = content.index(b"tEXtDescription\0") + 16
    return content[start : start + 200].decode("latin-1")


# What is kept


def test_every_save_keeps_its_preview(trained):
    previews = KeptPreviews(trained / "previews")
    assert previews.iterations() == SAVES
    tiles = [previews.read(iteration) for iteration in SAVES]
    assert {each.images.shape for each in tiles} == {(2, 2, 3, 64, 64, 3)}
    assert len({each.faces_digest for each in tiles}) == 1
    apart = np.abs(tiles[0].images.astype(int) - tiles[-1].images)
    assert apart[:, :, ORIGINAL].max() == 0
    assert apart[:, :, 1:].mean() > 0.05
    comment = json.loads(read_jpeg(previews.path(6))[1])
    assert comment["description"].startswith("synthetic face: preview by mien ")
    assert comment["description"].endswith("iteration 6, weights of the training")
    assert _png_text(trained / "preview.png").startswith("synthetic face: preview by mien ")


def test_kept_tiles_are_those_of_the_save_to_a_level_or_two(tmp_path):
    y, x = np.mgrid[:64, :64]
    picture = np.stack([2 * x, 2 * y, x + y], axis=-1).astype(np.uint8)
    images = np.broadcast_to(picture, (2, 5, 4, 64, 64, 3)).copy()
    images[1] = 255 - images[1]
    tiles = Tiles(30, ("a", "b"), images, None, 64, "digest")
    previews = KeptPreviews(tmp_path / "previews")
    previews.keep(tiles, "synthetic face", most=3)
    read = previews.read(30)
    assert (read.iteration, read.faces_digest, read.sides) == (30, "digest", ("a", "b"))
    assert np.abs(read.images.astype(int) - images).max() <= 4


def test_large_tiles_are_kept_small(tmp_path):
    tiles = Tiles(1, ("a", "b"), np.zeros((2, 1, 3, 600, 600, 3), np.uint8), None, 600, "")
    KeptPreviews(tmp_path / "p").keep(tiles, "", most=1)
    assert KeptPreviews(tmp_path / "p").read(1).images.shape[-2] == kept.LARGEST_TILE_PX


@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_a_long_run_keeps_few_spread_over_the_logarithm_of_their_age(most):
    stays: list[int] = []
    for iteration in [1, *range(250, 250_001, 250)]:
        stays = thinned([*stays, iteration], most)
    assert len(stays) == most
    assert stays[-1] == 250_000
    assert most == 1 or stays[0] == 1
    if most == 20:
        ages = [250_000 - iteration for iteration in stays[:-1]]
        ratios = [older / newer for older, newer in zip(ages, ages[1:], strict=False)]
        assert max(ratios[:-1]) < 2.5, "no gap"
        assert ages[-1] == 250, "the newest stay"


def test_fewer_than_may_be_kept_all_stay():
    assert thinned([5, 1, 3], 3) == [1, 3, 5]


def test_a_run_that_has_gone_back_keeps_nothing_of_what_it_left(tmp_path):
    previews = KeptPreviews(tmp_path / "previews")
    images = np.zeros((2, 1, 3, 8, 8, 3), np.uint8)
    for iteration in (10, 20, 30, 15):
        previews.keep(Tiles(iteration, ("a", "b"), images, None, 8, ""), "", most=9)
    assert previews.iterations() == [10, 15]


def test_none_are_kept_where_none_are_wanted(sides, tmp_path):
    words = ("-b", "4", "-i", "1", "--set", "preview.history=0")
    assert main(train_words(sides, tmp_path / "model", *words)) == 0
    assert not (tmp_path / "model/previews").exists()


def test_fresh_faces_are_not_those_of_the_history(sides, tmp_path):
    words = ("-b", "4", "-i", "2", "-s", "1", "--set", "preview.faces=fresh")
    assert main(train_words(sides, tmp_path / "model", *words)) == 0
    previews = KeptPreviews(tmp_path / "model/previews")
    assert len({previews.read(iteration).faces_digest for iteration in (1, 2)}) == 1


def test_a_preview_that_cannot_be_kept_is_told_once(sides, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mien.core.preview.kept.save_jpeg", full)
    words = ("-b", "4", "-i", "3", "-s", "1")
    assert main(train_words(sides, tmp_path / "model", *words)) == 0
    said = capsys.readouterr().out
    assert said.count("1.jpg: No space left on device; training goes on without the picture") == 1


def test_what_is_undone_leaves_with_its_previews(trained, tmp_path):
    model_dir = shutil.copytree(trained, tmp_path / "model")
    done = restore(model_dir, snapshot=trained.with_name("model_snapshot_4_iters"))
    assert "previews/6.jpg" in done.archived
    assert KeptPreviews(model_dir / "previews").iterations() == [1, 2, 4]
    assert (done.archive / "previews/6.jpg").is_file()


# What is drawn


def test_any_save_is_drawn_on_any_faces(trained, sides, tmp_path, capsys):
    newest, snapshot, other = (tmp_path / f"{name}.png" for name in ("newest", "old", "other"))
    before = sorted(path for path in trained.rglob("*"))
    _preview(trained, "-o", newest)
    np.testing.assert_array_equal(cv2.imread(str(newest)), _last_preview(trained))
    _preview(trained, "--at", "4", "-o", snapshot, "--json")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["iterations"] == [4]
    assert facts["sides"] == ["a", "b"]
    assert (cv2.imread(str(snapshot)) != cv2.imread(str(newest))).any()
    _preview(trained, "-B", sides[0], "-n", "3", "-o", other)
    assert cv2.imread(str(other)).shape == (48 + 3 * 130, 3 * 130 + 2, 3)
    assert _png_text(other).startswith("synthetic face: preview by mien ")
    _preview(trained, "--at", "4", "--style", "faceswap", "-o", other, "--force")
    assert cv2.imread(str(other)).shape == (2 * 64 + 14, 6 * 64, 3)
    assert sorted(path for path in trained.rglob("*")) == before


def test_a_snapshot_and_the_backup_are_found_too(trained, sides, tmp_path, capsys):
    """As when the newer generations have pushed that of the snapshot out."""
    model_dir = shutil.copytree(trained, tmp_path / "model")
    snapshot = trained.with_name("model_snapshot_4_iters")
    shutil.copytree(snapshot, tmp_path / snapshot.name)
    shutil.move(model_dir / "generations/4", model_dir / "backup")
    faces = ("-A", sides[0], "-n", "1")
    places = {"backup": model_dir / "backup", "4": tmp_path / snapshot.name}
    for at, place in places.items():
        _preview(model_dir, "--at", at, *faces, "-o", tmp_path / f"{at}.png")
        assert f"A at iteration 4, of {place}" in capsys.readouterr().out
        shutil.rmtree(model_dir / "backup", ignore_errors=True)
    one, other = (cv2.imread(str(tmp_path / f"{at}.png")) for at in places)
    np.testing.assert_array_equal(one, other)


def _last_preview(model_dir):
    return cv2.imread(str(model_dir / "preview.png"))


def test_two_saves_are_compared_by_what_was_kept_of_them(trained, sides, tmp_path, capsys):
    by_previews, by_weights = tmp_path / "kept.png", tmp_path / "weights.png"
    _preview(trained, "--compare", "1", "6", "-o", by_previews)
    assert "the previews kept in" in capsys.readouterr().out
    _preview(trained, "--compare", "4", "6", "-A", sides[0], "-B", sides[1], "-o", by_weights)
    assert "the saves of" in capsys.readouterr().out
    _preview(trained, "--compare", "4", "6", "-o", by_previews, "--force")
    one, other = (cv2.imread(str(path)).astype(int) for path in (by_previews, by_weights))
    assert one.shape == (48 + 2 * 130, 2 * 3 * 130 + 16, 3)
    same = other[48 : 48 + 260, :130]
    assert np.abs(one[48 : 48 + 260, :130] - same).mean() < 2, "the same faces, but for JPEG"


def test_a_strip_shows_one_save_after_the_other(trained, tmp_path, capsys):
    path = tmp_path / "strip.png"
    _preview(trained, "--strip", "-o", path, "--enlarge", "nearest")
    assert "1, 2, 4, 6" in capsys.readouterr().out
    picture = cv2.imread(str(path))
    assert picture.shape == (48 + 4 * 130, (1 + len(SAVES)) * 130 + 2, 3)
    _preview(trained, "--strip", "-n", "1", "-o", path, "--enlarge", "nearest", "--force")
    assert cv2.imread(str(path)).shape == (48 + 2 * 130, picture.shape[1], 3)
    original = KeptPreviews(trained / "previews").read(6).images[0, 0, ORIGINAL]
    np.testing.assert_array_equal(
        picture[48 : 48 + 128, 2 : 2 + 128], original.repeat(2, axis=0).repeat(2, axis=1)
    )


def test_a_save_whose_weights_are_gone_is_shown_as_it_was_kept(trained, tmp_path, capsys):
    _preview(trained, "--at", "2", "-o", tmp_path / "old.png")
    assert "the preview kept in" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "old.png")).shape == _last_preview(trained).shape


def test_a_damaged_preview_is_left_out_of_the_strip(trained, tmp_path, capsys):
    model_dir = shutil.copytree(trained, tmp_path / "model")
    (model_dir / "previews/2.jpg").write_bytes(b"no jpeg")
    save_jpeg(model_dir / "previews/4.jpg", np.zeros((8, 8, 3), np.uint8), '{"schema": []}')
    about = json.dumps({"schema": kept.SCHEMA, "tile_px": 64, "faces": 9, "faces_digest": ""})
    save_jpeg(model_dir / "previews/5.jpg", np.zeros((8, 8, 3), np.uint8), about)
    _preview(model_dir, "--strip", "-o", tmp_path / "strip.png")
    said = capsys.readouterr()
    assert said.err.count("left out: ") == 3
    assert "1, 6" in said.out
    _preview(model_dir, "--compare", "1", "2", "-o", tmp_path / "pair.png", code=2)
    assert "2.jpg is no preview of a save" in capsys.readouterr().err


def test_faces_that_a_stranger_names_are_not_opened(trained, sides, tmp_path, capsys):
    """The folder was moved, as one from elsewhere: its paths count no more."""
    model_dir = shutil.copytree(trained, tmp_path / "model")
    _preview(model_dir, "-o", tmp_path / "x.png", code=2)
    said = capsys.readouterr().err
    assert f"the faces that {model_dir} was trained on are not known here; add -A FOLDER" in said
    _preview(model_dir, "-o", tmp_path / "x.png", "-A", sides[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--at", "3"],
            "no save of iteration 3; it has saves of 4, 6, and previews of 1, 2, 4, 6",
        ),
        (["--at", "soon"], "--at must be an iteration, backup or a generation's name, got 'soon'"),
        (["--compare", "1", "3"], "has no save of iteration 1; it has saves of 4, 6, and previews"),
        (["--strip", "-A", "x"], "--strip shows previews that were kept; leave -A and -B out"),
        (["--strip", "--mask", "tint"], "--style and --mask are for the preview of one save"),
        (["-n", "0"], "--faces must be from 1 to 64, got 0"),
        (["--style", "faceswap", "-A", "{a}"], "faceswap's layout shows both sides; add -A and -B"),
        (["-A", "none"], "none"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(trained, sides, tmp_path, words, message, capsys):
    words = [word.format(a=sides[0]) for word in words]
    _preview(trained, "-o", tmp_path / "x.png", *words, code=2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_there_stays(trained, tmp_path, capsys):
    path = tmp_path / "x.png"
    path.write_text("mine")
    _preview(trained, "--strip", "-o", path, code=2)
    assert "add --force to replace it" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_what_a_kill_has_left_beside_kept_previews_is_swept(tmp_path):
    previews = KeptPreviews(tmp_path / "previews")
    tiles = Tiles(7, ("a", "b"), np.zeros((2, 1, 3, 8, 8, 3), np.uint8), None, 8, "")
    previews.keep(tiles, "", most=4)
    left = temporary_name(previews.path(8))
    left.write_bytes(b"half a picture")
    (tmp_path / "previews/mine.tmp").touch()
    previews.keep(tiles, "", most=4)
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["7.jpg", "mine.tmp"]
