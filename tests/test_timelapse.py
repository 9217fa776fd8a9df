"""`mien timelapse`: the order of the pictures, the film that comes out, its refusals."""

import json
import os
import signal

import cv2
import numpy as np
import pytest

from mien.cli import main
from mien.core.preview import timelapse_video
from mien.core.preview.timelapse_video import find_pictures, make_film
from mien.core.system import durable_files

GREYS = {"9.jpg": 40, "10.jpg": 80, "10-2.jpg": 120, "10-10.jpg": 160}


@pytest.fixture
def folder(tmp_path):
    """Pictures of one grey each, in a model's folder; their order is neither that of text."""
    pictures = tmp_path / "model/timelapse"
    pictures.mkdir(parents=True)
    for name, grey in GREYS.items():
        cv2.imwrite(str(pictures / name), np.full((35, 51, 3), grey, np.uint8))
    (pictures / "notes.txt").write_text("no picture")
    return pictures


def _greys(film):
    """The mean of each frame, and the frames' size."""
    video, greys, shape = cv2.VideoCapture(str(film)), [], None
    while True:
        there, frame = video.read()
        if not there:
            return greys, shape, video.get(cv2.CAP_PROP_FPS)
        greys.append(frame.mean())
        shape = frame.shape


def test_a_film_shows_the_pictures_in_order_of_time(folder, tmp_path, capsys):
    film = tmp_path / "film.mp4"
    words = ["timelapse", str(folder.parent), "-o", str(film), "--fps", "10", "--json"]
    assert main([*words, "--last-seconds", "0.3"]) == 0
    greys, shape, fps = _greys(film)
    np.testing.assert_allclose(greys, [40, 80, 120, 160, 160, 160, 160], atol=3)
    assert shape == (34, 50, 3), "even, or MPEG-4 cannot hold it"
    assert fps == 10
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_pictures"], facts["seconds"]) == (4, 0.7)
    assert (facts["width_px"], facts["height_px"]) == (50, 34)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "model"]


def test_pictures_of_other_sizes_are_fitted_to_the_first(folder, tmp_path):
    cv2.imwrite(str(folder / "11.jpg"), np.full((200, 100, 3), 200, np.uint8))
    film = tmp_path / "film.mp4"
    assert main(["timelapse", str(folder), "-o", str(film), "--fps", "25"]) == 0
    greys, shape, _ = _greys(film)
    assert shape == (34, 50, 3)
    assert greys[-1] == pytest.approx(200 * 17 / 50, abs=6), "17 px wide, black beside it"


@pytest.mark.parametrize(
    ("count", "fps", "seconds"),
    [(1, 0.2, 5), (4, 0.8, 5), (125, 25, 5), (300, 25, 12), (500, 25, 20), (700, 35, 20)],
)
def test_a_film_lasts_from_5_to_20_seconds(folder, tmp_path, count, fps, seconds):
    film = make_film(find_pictures(folder)[:1] * count, tmp_path / "film.mp4")
    assert (film.fps, film.seconds) == (pytest.approx(fps), pytest.approx(seconds))
    greys, _, written = _greys(film.path)
    assert (len(greys), written) == (count, pytest.approx(fps))


def test_a_film_of_very_many_pictures_shows_some_evenly_spread(folder, tmp_path):
    first, *_, last = find_pictures(folder)
    film = make_film([first] * 1000 + [last] * 1000, tmp_path / "film.mp4")
    assert (film.num_pictures, film.num_passed_over) == (1200, 800)
    assert (film.fps, film.seconds) == (60, 20)
    greys, _, _ = _greys(film.path)
    assert (greys[0], greys[-1]) == (pytest.approx(40, abs=3), pytest.approx(160, abs=3))
    assert sum(grey > 100 for grey in greys) == 600


def test_a_film_of_few_that_can_be_read_is_long_enough(folder, tmp_path):
    (tmp_path / "no.jpg").write_text("no jpeg")
    film = make_film(find_pictures(folder) + [tmp_path / "no.jpg"] * 46, tmp_path / "film.mp4")
    assert (film.num_pictures, film.seconds) == (4, pytest.approx(5))


def test_a_damaged_picture_is_left_out_and_named(folder, tmp_path, capsys):
    (folder / "9.jpg").write_bytes(b"no jpeg")
    assert main(["timelapse", str(folder), "-o", str(tmp_path / "film.mp4")]) == 0
    said = capsys.readouterr()
    assert f"{folder / '9.jpg'} cannot be read and was left out" in said.err
    assert "3 pictures of 50 x 34 px" in said.out


def test_a_pipe_among_the_pictures_is_waited_for_by_nobody(folder, tmp_path, capsys):
    os.mkfifo(folder / "1.jpg")
    (folder / "2.jpg").symlink_to(folder / "7.jpg")
    assert main(["timelapse", str(folder), "-o", str(tmp_path / "film.mp4")]) == 0
    said = capsys.readouterr()
    assert f"{folder / '1.jpg'} cannot be read and was left out" in said.err
    assert f"{folder / '2.jpg'} cannot be read and was left out" in said.err
    assert sorted(os.listdir(tmp_path)) == ["film.mp4", "model"]


def _jpeg_of_size(edge_px, *how):
    """A small JPEG whose header speaks of a huge one."""
    content = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8), how)[1].tobytes()
    frame = content.index(b"\xff\xc2" if how else b"\xff\xc0") + 5
    return content[:frame] + 2 * edge_px.to_bytes(2) + content[frame + 4 :]


PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)


@pytest.mark.parametrize(
    "content",
    [
        _jpeg_of_size(65_500),
        _jpeg_of_size(0),
        _jpeg_of_size(8_000, *PROGRESSIVE),
        cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes(),
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10**6,
        b"\xff\xd8\xff\xe0\x00\x00",
        b"",
    ],
    ids=range(8),
)
def test_a_picture_that_no_time_lapse_has_is_left_out_undecoded(
    folder, tmp_path, content, monkeypatch
):
    (folder / "9.jpg").write_bytes(content)
    decoded, decode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *a: decoded.append(a) or decode(*a))
    film = make_film(find_pictures(folder), tmp_path / "film.mp4", fps=10)
    assert film.unreadable == [folder / "9.jpg"]
    assert len(decoded) == film.num_pictures == 3


def test_a_picture_wider_than_a_film_can_be_is_halved(folder, tmp_path):
    cv2.imwrite(str(folder / "1.jpg"), np.full((34, 9000, 3), 40, np.uint8))
    film = make_film(find_pictures(folder), tmp_path / "film.mp4", fps=10)
    assert (film.width_px, film.height_px) == (4500, 16)
    assert _greys(film.path)[0][0] == pytest.approx(40, abs=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "-o", "{there}"], "is there already; choose another name, or add --force"),
        (["{model}", "-o", "film.avi"], "--output must end in .mp4, got film.avi"),
        (["{model}", "-o", "none/film.mp4"], "there is no folder none; make it first"),
        (["{model}", "-o", "film.mp4", "--fps", "0"], "--fps must be above 0 and at most 240"),
        (["{model}", "-o", "film.mp4", "--last-seconds", "-1"], "--last-seconds must be from 0"),
        (["{empty}", "-o", "film.mp4"], "holds no time-lapse: train with --timelapse-input-a"),
        (["{empty}/none", "-o", "film.mp4"], "is no folder: give a model's"),
        (["{damaged}", "-o", "film.mp4"], "none of 1 picture can be read"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    folder, tmp_path, words, message, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/1.jpg").write_text("no jpeg")
    (tmp_path / "there.mp4").write_text("a film")
    places = {name: str(tmp_path / name) for name in ("model", "empty", "damaged")}
    places["there"] = str(tmp_path / "there.mp4")
    assert main(["timelapse", *(word.format(**places) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert (tmp_path / "there.mp4").read_text() == "a film"
    assert not list(tmp_path.glob("*film*"))


def test_force_replaces_a_film_and_sweeps_what_a_kill_has_left(folder, tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_text("an older film")
    with monkeypatch.context() as patch:
        patch.setattr(durable_files, "discard", lambda _: None)  # as nobody does after a kill
        patch.setattr(timelapse_video, "sync_file", lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            make_film(find_pictures(folder), film, force=True)
    (left,) = {path.name for path in tmp_path.iterdir()} - {"film.mp4", "model"}
    assert os.listdir(tmp_path / left) == ["film.mp4"]
    assert film.read_text() == "an older film"
    assert main(["timelapse", str(folder), "-o", str(film), "--force"]) == 0
    assert len(_greys(film)[0]) == 4
    assert sorted(os.listdir(tmp_path)) == ["film.mp4", "model"]


def test_a_film_that_a_full_disk_has_cut_short_replaces_none(folder, tmp_path, capfd, monkeypatch):
    """OpenCV writes on and says nothing: here its writer loses the end of the file."""

    plain = cv2.VideoWriter

    class CutShort:
        def __init__(self, name, *settings):
            self.name, self.writer = name, plain(name, *settings)

        def write(self, frame):
            self.writer.write(frame)

        def release(self):
            self.writer.release()
            os.truncate(self.name, os.path.getsize(self.name) // 2)

    film = tmp_path / "film.mp4"
    film.write_text("an older film")
    monkeypatch.setattr(cv2, "VideoWriter", CutShort)
    assert main(["timelapse", str(folder), "-o", str(film), "--force"]) == 2
    said = capfd.readouterr().err
    assert "cannot be written; check the free space" in said
    assert said.count("\n") == 1
    assert film.read_text() == "an older film"
