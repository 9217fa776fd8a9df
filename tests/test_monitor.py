"""The page of `mien monitor`: what it serves and to whom, and what it shows in a browser."""

import base64
import csv
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page's server is an extra: pip install '.[monitor]'")
pytest.importorskip("plotly", reason="the page's graphs are an extra: pip install '.[monitor]'")
pytest.importorskip("httpx", reason="Starlette's test client needs httpx")

from starlette.testclient import TestClient

from mien import cli
from mien.cli.monitor import journal, watch
from mien.cli.monitor.access import COOKIE, Access
from mien.cli.monitor.server import make_app
from mien.core.checkpoint.lock_owner import RequestError, lock_owner, send_request
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.console.reporter import Reporter
from mien.core.console.tensorboard import TensorBoardLog
from mien.core.preview import kept
from mien.core.preview.files import save_png
from mien.core.preview.kept import KeptPreviews
from mien.core.preview.tiles import Tiles

TOKEN = "a-token-of-the-tests"
BATCH_SIZE = 8

# A process that holds a model folder as a run does, and tells which signals it was sent.
TRAINER = """
import fcntl, json, os, signal, socket, sys, time
from pathlib import Path
folder, listens = Path(sys.argv[1]), sys.argv[2] == "listens"
lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.ftruncate(lock, 0)
os.pwrite(lock, f"{os.getpid()} {socket.gethostname()}\\n".encode(), 0)
events = folder / f"logs/session_{sys.argv[3]}/events.jsonl"
events.parent.mkdir(parents=True, exist_ok=True)
def tell(event, **fields):
    with events.open("a") as stream:
        stream.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\\n")
asked = []
if listens:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGRTMIN):
        signal.signal(number, lambda number, _: asked.append(number))
tell("start", trainer="lightweight", live={"augment.warp": True, "optimizer.learning_rate": 5e-5})
print("ready", flush=True)
for iteration in range(100, 6000):
    losses = {"loss_a": 0.25, "loss_b": 0.5, "eg_per_s": 123.4, "data_wait": 0.01}
    left = {"seconds_left": 60.0, "seconds_to_save": 30.0}
    tell("step", iteration=iteration, **losses, memory_mib=None, **left)
    for number in asked[:]:
        asked.remove(number)
        print(signal.Signals(number).name, flush=True)
        if number == signal.SIGUSR1:
            tell("save", iteration=iteration, path="x", seconds=0.1, mean_loss=0.5)
        for path in sorted(folder.glob(f".request-{os.getpid()}-*")):
            text = path.read_text()
            path.unlink()
            if "=" in text:
                name, new = text.split("=")
                tell("change", iteration=iteration, name=name, old=True, new=new, by="page")
            else:
                tell(text, iteration=iteration)
            print(text, flush=True)
        if number == signal.SIGTERM:
            tell("stop", iteration=iteration, reason="SIGTERM received", exit_code=4)
            sys.exit(4)
    time.sleep(0.1)
"""


def _session(folder: Path, number: int, first: int, count: int, seconds: float = 0.5) -> np.ndarray:
    """Log ``count`` iterations of a session; their losses of A."""
    log = TensorBoardLog(folder, number, first)
    losses = 1 / np.arange(first, first + count)
    for place, loss in enumerate(losses):
        tags = {"batch_total": 2 * loss, "batch_face_a": loss, "batch_face_b": loss / 2}
        log.scalars(tags, first + place, 1e9 + 1e6 * number + seconds * place)
    log.close()
    return losses


def _events(folder: Path, session: int = 1):
    path = folder / f"logs/session_{session}/events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _tell(folder: Path, session: int = 1, *, ends: bool = False) -> None:
    with _events(folder, session).open("a") as stream:
        reporter = Reporter(stream, as_json=True)
        reporter.start({"trainer": "original"})
        reporter.warning("the disk is nearly full")
        for iteration in range(1, 31):
            reporter.step(iteration=iteration, loss_a=0.1, loss_b=0.2, eg_per_s=50.0, data_wait=0.0)
        if ends:
            reporter.stop(iteration=30, reason="all iterations are done", exit_code=0)


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A model folder with two sessions in its logs: not to be changed."""
    folder = tmp_path_factory.mktemp("logged") / "model"
    ModelFolder(folder).close()
    folder.mkdir(exist_ok=True)
    (folder / ".lock").touch()
    (folder / "config.toml").write_text(f"[train]\nbatch_size = {BATCH_SIZE}\n")
    _session(folder, 1, 1, 40)
    _session(folder, 2, 41, 20, seconds=1.0)
    _tell(folder, 2, ends=True)
    (folder / "preview.png").write_bytes(b"\x89PNG of a test")
    return folder


def _client(
    folder: Path, *, host: str = "127.0.0.1", allows: bool = False, **options
) -> TestClient:
    is_open = host != "127.0.0.1"
    token = TOKEN if is_open or allows else None
    app = make_app([folder], Access(host=host, token=token, is_open=is_open, allows=allows))
    return TestClient(app, base_url="http://127.0.0.1:8420", follow_redirects=False, **options)


@pytest.fixture
def trainer():
    """Start processes that hold a model folder; they are ended after the test."""
    started = []

    def start(folder: Path, listens: bool = True, session: int = 1) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        words = [folder, "listens" if listens else "deaf", str(session)]
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *words], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# What is shown


def test_every_part_of_the_page_is_served_and_guarded(logged):
    client = _client(logged)
    for path, kind in (
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/log.js", "text/javascript"),
        ("/plotly.js", "text/javascript"),
        ("/preview.png", "image/png"),
        ("/api/status", "application/json"),
    ):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/preview.png").content == b"\x89PNG of a test"


def test_the_page_needs_nothing_from_elsewhere():
    folder = Path(watch.__file__).parent
    for name in ("page.html", "page.css", "page.js", "preview.js", "graphs.js", "log.js"):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", (folder / name).read_text())
    page = (folder / "page.html").read_text()
    assert not re.search(r"<script(?! src=)|\son[a-z]+=|\sstyle=", page)


@pytest.mark.parametrize("path", ["/page.html/", "/../pyproject.toml", "/logs", "/api", "/%2e%2e/"])
def test_no_other_path_is_served(logged, path):
    assert _client(logged).get(path).status_code == 404
    assert b"[" not in _client(logged).get(path).content


def test_what_has_not_changed_is_not_sent_again(logged):
    client = _client(logged)
    for path in ("/", "/api/status", "/api/graphs", "/api/analysis", "/preview.png", "/plotly.js"):
        first = client.get(path)
        again = client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(path, headers={"if-none-match": 'W/"other"'}).content == first.content


def test_a_large_answer_is_compressed_for_those_who_take_it(logged):
    client = _client(logged)
    packed = client.get("/plotly.js", headers={"accept-encoding": "gzip"})
    plain = client.get("/plotly.js", headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content


def test_reading_writes_nothing(logged):
    def seen():
        return {path: path.stat().st_mtime_ns for path in sorted(logged.rglob("*"))}

    before = seen()
    client = _client(logged)
    for path in ("/", "/api/status", "/api/graphs", "/api/analysis", "/preview.png"):
        client.get(path)
    assert seen() == before


def test_status_of_a_run_that_has_ended(logged):
    status = _client(logged).get("/api/status").json()
    assert status["state"] == "stopped"
    assert status["session"] == 2
    assert status["latest"]["stop"]["reason"] == "all iterations are done"
    assert status["latest"]["step"]["iteration"] == 30
    assert not status["may_ask"]
    kinds = [event["event"] for event in status["events"]]
    assert kinds == ["start", "warning", *["step"] * 8, "stop"]


def test_status_of_a_folder_that_is_not_there_yet(tmp_path):
    client = _client(tmp_path / "later")
    status = client.get("/api/status").json()
    assert (status["state"], status["latest"], status["preview"]) == ("new", {}, None)
    assert client.get("/preview.png").status_code == 404
    assert "does not exist" in client.get("/api/graphs").json()["problem"]
    assert client.get("/api/analysis").json()["sessions"] == []
    assert not (tmp_path / "later").exists()


def test_status_follows_a_run_as_it_goes_on(tmp_path):
    client = _client(tmp_path)
    with ModelFolder(tmp_path / "model") as folder:
        client = _client(folder.path)
        assert client.get("/api/status").json()["state"] == "running"
        _tell(folder.path)
        status = client.get("/api/status").json()
        assert (status["state"], status["pid"]) == ("running", os.getpid())
        assert status["latest"]["step"]["iteration"] == 30
        with _events(folder.path).open("a") as stream:
            stream.write('{"event": "step", "time": 1e9, "iter')
        assert client.get("/api/status").json()["latest"]["step"]["iteration"] == 30
        with _events(folder.path).open("a") as stream:
            stream.write('ation": 31}\n')
        assert client.get("/api/status").json()["latest"]["step"]["iteration"] == 31
        _tell(folder.path, 2)
        status = client.get("/api/status").json()
        assert (status["session"], len(status["events"])) == (2, 10)
    assert client.get("/api/status").json()["state"] == "running"  # heard of a moment ago


def test_a_run_that_ended_without_a_word_is_lost(tmp_path, monkeypatch):
    _tell(tmp_path)
    monkeypatch.setattr(watch, "_FRESH_SECONDS", 0.0)
    assert _client(tmp_path).get("/api/status").json()["state"] == "lost"


def test_lines_that_are_no_events_are_counted(tmp_path):
    lines = [
        b"\0\0\0",
        b"[1]",
        b'{"event": 1, "time": 2}',
        b'{"event": "x", "time": 1e999}',
        b"\xff",
    ]
    _events(tmp_path).write_bytes(b"\n".join(lines) + b'\n{"event": "save", "time": 5}\n')
    status = _client(tmp_path).get("/api/status").json()
    assert status["unreadable"] == len(lines)
    assert status["latest"] == {"save": {"event": "save", "time": 5}}


def test_a_journal_of_a_stranger_is_bounded(tmp_path):
    huge = '{"event": "x", "time": 5, "text": "' + "x" * (1 << 16) + '"}\n'
    kinds = "".join(f'{{"event": "kind{number}", "time": 5}}\n' for number in range(3000))
    _events(tmp_path).write_text(huge + kinds + '{"event": "save", "time": 5}\n')
    status = _client(tmp_path).get("/api/status").json()
    assert (status["unreadable"], len(status["events"])) == (1, 200)
    assert set(status["latest"]) == {"save"}


def test_only_the_end_of_a_long_journal_is_read(tmp_path, monkeypatch):
    _tell(tmp_path, ends=True)
    (path,) = tmp_path.rglob("events.jsonl")
    last = path.read_bytes().splitlines(keepends=True)[-3:]
    monkeypatch.setattr(journal, "_MAX_BYTES", sum(map(len, last)) + 5)
    status = _client(tmp_path).get("/api/status").json()
    assert status["unreadable"] == 0
    assert [event["event"] for event in status["events"]] == ["step", "step", "stop"]
    assert status["latest"]["start"]["trainer"] == "original"  # with which it begins


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text('{"event": "save", "time": 5}\n')
    folder = tmp_path / "model"
    _events(folder).symlink_to(tmp_path / "secret")
    (folder / "preview.png").symlink_to(tmp_path / "secret")
    client = _client(folder)
    status = client.get("/api/status").json()
    assert (status["events"], status["preview"]) == ([], None)
    assert client.get("/preview.png").status_code == 404


# The kept previews


def _keep(folder: Path, iteration: int, *, kinds: int = 4, tile_px: int = 16, level: int = 0):
    """Keep a preview of two faces a side, whose swap has a square mask."""
    images = np.full((2, 2, kinds, tile_px, tile_px, 3), 40 + level, np.uint8)
    images[:, :, 2] = 200 - level
    if kinds == 4:
        images[:, :, 3] = 0
        images[:, :, 3, 4:12, 4:12] = 255
    tiles = Tiles(iteration, ("a", "b"), images, None, tile_px, "0" * 16)
    KeptPreviews(folder / "previews").keep(tiles, "a test", 10)


def _pixels(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)


def _has_red(image: np.ndarray) -> bool:
    return bool((image[..., 2].astype(int) - image[..., 1] > 100).any())


def test_kept_previews_are_listed_and_drawn(tmp_path):
    client = _client(tmp_path)
    assert client.get("/api/status").json()["kept"] == []
    for iteration in (5, 10):
        _keep(tmp_path, iteration, level=iteration)
    assert client.get("/api/status").json()["kept"] == [5, 10]
    answer = client.get("/kept.png?at=5")
    assert b"synthetic face: preview by mien" in answer.content
    assert answer.content.count(b"iteration 5") == 1
    sheet = _pixels(answer)
    assert not _has_red(sheet)
    outlined = _pixels(client.get("/kept.png?at=5&mask=outline&enlarge=nearest"))
    assert _has_red(outlined)
    assert not np.array_equal(_pixels(client.get("/kept.png?at=5&mask=tint")), sheet)
    two = _pixels(client.get("/kept.png?at=5&other=10"))
    assert two.shape[1] < sheet.shape[1], "three pictures of a face, not four"
    again = client.get("/kept.png?at=5", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    _keep(tmp_path, 5, level=50)
    assert client.get("/kept.png?at=5").headers["etag"] != answer.headers["etag"]


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ("", 400, "at must be the iteration of a kept preview"),
        ("at=../preview", 400, "at must be an iteration"),
        ("at=5&other=x", 400, "other must be an iteration"),
        ("at=5&mask=<b>", 400, "mask must be one of outline, tint, off"),
        ("at=5&enlarge=8k", 400, "enlarge must be one of lanczos, nearest"),
        ("at=5&run=1", 400, "run must be a number from 0 to 0"),
        ("at=7", 404, "no preview of iteration 7 is kept"),
        ("at=6", 404, "is no preview of a save"),
        ("at=8", 404, "is no preview of a save"),
        ("at=9", 404, "must be at most 256 px, got those of iteration 9 with 400"),
        ("at=5&other=6", 404, "is no preview of a save"),
    ],
)
def test_a_kept_preview_of_a_stranger_is_only_data(tmp_path, query, code, words, monkeypatch):
    _keep(tmp_path, 5)
    (tmp_path / "previews/6.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "previews/8.jpg").symlink_to(tmp_path / "previews/5.jpg")
    monkeypatch.setattr(kept, "LARGEST_TILE_PX", 400)
    _keep(tmp_path, 9, tile_px=400)
    answer = _client(tmp_path).get(f"/kept.png?{query}")
    assert (answer.status_code, words in answer.text) == (code, True), answer.text


def test_a_link_in_the_place_of_the_previews_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    _keep(tmp_path / "other", 5)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "previews").symlink_to(tmp_path / "other/previews")
    client = _client(folder)
    assert client.get("/api/status").json()["kept"] == []
    assert client.get("/kept.png?at=5").status_code == 404


# The graphs and the table


def test_graphs_hold_what_was_logged(logged):
    graphs = _client(logged).get("/api/graphs").json()
    loss = graphs["loss"]
    assert graphs["problem"] is None
    assert loss["iterations"] == list(range(1, 61))
    assert loss["per_point"] == 1
    expected = 1 / np.arange(1, 61)
    np.testing.assert_allclose(loss["losses"]["batch_face_a"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss["losses"]["batch_face_b"], expected / 2, rtol=1e-5)
    assert set(loss["losses"]) == {"batch_face_a", "batch_face_b"}
    assert graphs["sessions"] == [{"number": 2, "first": 41}]
    assert (graphs["first"], graphs["last"]) == (1, 60)
    speed = graphs["speed"]
    between = speed["iterations"].index(None)
    assert speed["eg_per_s"][between] is None
    assert set(speed["eg_per_s"][:between]) == {2 * BATCH_SIZE / 0.5}
    assert set(speed["eg_per_s"][between + 1 :]) == {2 * BATCH_SIZE / 1.0}


def test_graphs_of_a_range_are_finer(logged, monkeypatch):
    monkeypatch.setattr(watch, "POINTS", 10)
    client = _client(logged)
    whole = client.get("/api/graphs").json()["loss"]
    assert (len(whole["iterations"]), whole["per_point"]) == (10, 6)
    expected = (1 / np.arange(1, 61)).reshape(10, 6).mean(axis=1)
    np.testing.assert_allclose(whole["losses"]["batch_face_a"], expected, rtol=1e-5)
    part = client.get("/api/graphs?first=36&last=45").json()
    assert part["loss"]["iterations"] == list(range(36, 46))
    assert part["loss"]["per_point"] == 1
    assert part["last"] == 60
    assert client.get("/api/graphs?first=100&last=200").json()["loss"]["iterations"] == []


def test_points_are_few_however_many_sessions_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "POINTS", 10)
    monkeypatch.setattr(watch, "_MOST_BEGINS", 20)
    monkeypatch.setattr(watch, "_MOST_SESSIONS", 30)
    (tmp_path / ".lock").touch()
    (tmp_path / "config.toml").write_text(f"[train]\nbatch_size = {BATCH_SIZE}\n")
    for number in range(1, 41):
        _session(tmp_path, number, 3 * number - 2, 3, seconds=100.0)
    client = _client(tmp_path)
    graphs = client.get("/api/graphs").json()
    assert len(graphs["loss"]["iterations"]) == 10
    rates = [rate for rate in graphs["speed"]["eg_per_s"] if rate is not None]
    assert 5 <= len(rates) <= 20
    assert set(rates) == {2 * BATCH_SIZE / 100.0}
    assert graphs["sessions"] == []
    assert len(client.get("/api/graphs?first=100&last=120").json()["sessions"]) == 7
    analysis = client.get("/api/analysis").json()
    assert (len(analysis["sessions"]), analysis["earlier"]) == (30, 10)
    assert analysis["total"]["iterations"] == 120


def test_only_losses_of_faces_and_masks_are_drawn(tmp_path):
    (tmp_path / ".lock").touch()
    log = TensorBoardLog(tmp_path, 1)
    names = ["batch_total", "batch_face_a", "batch_mask_b_2", "batch_face_<b>x</b>", "batch_face_c"]
    log.scalars(dict.fromkeys(names, 1.0), 1)
    log.close()
    losses = _client(tmp_path).get("/api/graphs").json()["loss"]["losses"]
    assert set(losses) == {"batch_face_a", "batch_mask_b_2"}


def test_every_series_can_be_drawn_and_taken_as_a_file(two_runs):
    client = _client(two_runs[0])
    wanted = "batch_weighted_a/ssim,learning_rate,batch_total,nothing"
    graphs = client.get(f"/api/graphs?series={wanted}").json()
    terms = ["batch_face_a", "batch_face_b", "batch_weighted_a/ssim", "learning_rate"]
    assert graphs["available"] == terms
    assert set(graphs["loss"]["losses"]) == set(terms[2:])
    expected = {
        "iterations": [100, 200, 300, 400, 500, 600],
        "values": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    }
    assert graphs["measured"] == {"evaluate/ssim_a": expected}
    assert graphs["memory"] == {
        "iterations": [301, 351, 401, 451, 501, 551],
        "values": [1201.0, 1251.0, 1301.0, 1351.0, 1401.0, 1451.0],
    }
    analysis = client.get("/api/analysis").json()
    assert [(one["first"], one["last"]) for one in analysis["sessions"]] == [(1, 300), (301, 600)]
    answer = client.get("/series.csv?first=399&last=401")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    head, *lines = list(csv.reader(answer.text.splitlines()))
    assert head == ["iteration", *terms, "evaluate/ssim_a"]
    assert [line[0] for line in lines] == ["399", "400", "401"]
    assert [line[-1] for line in lines] == ["", "0.4", ""]
    assert float(lines[1][1]) == pytest.approx(1 / 400, rel=1e-5)


def test_metrics_of_iterations_that_were_undone_are_not_shown(tmp_path):
    (tmp_path / ".lock").touch()
    for number, first, value in ((1, 1, 0.5), (2, 6, 0.75)):
        log = TensorBoardLog(tmp_path, number, first)
        for step in range(first, first + 10):
            log.scalars({"batch_total": 1.0, "batch_face_a": 1.0}, step, 1e9 + 100 * number + step)
            if step % 5 == 0:
                log.scalars({"evaluate/psnr_a": value}, step)
        log.close()
    measured = _client(tmp_path).get("/api/graphs").json()["measured"]["evaluate/psnr_a"]
    assert measured == {"iterations": [5, 10, 15], "values": [0.5, 0.75, 0.75]}


def test_of_several_runs_each_is_shown_and_asked_by_its_number(two_runs, trainer, tmp_path):
    process = trainer(tmp_path / "third")
    access = Access(host="127.0.0.1", token=TOKEN, is_open=False, allows=True)
    app = make_app([*two_runs, tmp_path / "third"], access)
    client = TestClient(app, base_url="http://127.0.0.1:8420")
    status = client.get("/api/status?run=1").json()
    assert (status["name"], status["runs"]) == ("two <i>&", ["one", "two <i>&", "third"])
    losses = [
        client.get(f"/api/graphs?run={run}").json()["loss"]["losses"]["batch_face_a"][0]
        for run in range(2)
    ]
    assert losses == [1.0, 2.0]
    for run in ("3", "-1", "../one", "1e0", "00000", ""):
        for path in ("/api/status", "/api/graphs", "/kept.png", "/preview.png", "/series.csv"):
            assert client.get(path, params={"run": run, "at": 100}).status_code == 400
    headers = {"x-mien-token": TOKEN}
    assert client.post("/request/save?run=1", headers=headers).status_code == 409
    assert client.post("/request/save?run=9", headers=headers).status_code == 400
    assert client.post("/request/save?run=2", headers=headers).json()["pid"] == process.pid
    assert process.stdout.readline() == "SIGUSR1\n"


def test_means_of_a_graph_leave_out_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "POINTS", 2)
    (tmp_path / ".lock").touch()
    log = TensorBoardLog(tmp_path, 1)
    for step, loss in enumerate([1.0, float("nan"), float("inf"), float("nan")], 1):
        log.scalars({"batch_total": 1.0, "batch_face_a": loss}, step)
    log.close()
    loss = _client(tmp_path).get("/api/graphs").json()["loss"]
    assert loss["losses"]["batch_face_a"] == [1.0, None]


@pytest.mark.parametrize("query", ["first=-1", "last=x", "first=1e3", "first=" + "9" * 13, "last="])
def test_a_range_is_of_iterations(logged, query):
    answer = _client(logged).get(f"/api/graphs?{query}")
    assert answer.status_code == 400
    assert "must be an iteration, got" in answer.text


def test_the_table_tells_the_figures_of_each_session(logged):
    analysis = _client(logged).get("/api/analysis").json()
    first, second = analysis["sessions"]
    assert (first["iterations"], first["batch_sizes"]) == (40, [BATCH_SIZE])
    assert second["elapsed_s"] == 19
    assert second["eg_per_s"] == pytest.approx(2 * BATCH_SIZE * 20 / 19)
    assert analysis["total"]["iterations"] == 60


def test_a_history_is_read_again_where_it_has_grown(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN_READS", 0.0)
    monkeypatch.setattr(watch, "_SHARE_OF_TIME", 1e9)
    (tmp_path / ".lock").touch()
    client = _client(tmp_path)
    assert client.get("/api/graphs").json()["loss"]["iterations"] == []
    _session(tmp_path, 1, 1, 5)
    assert client.get("/api/graphs").json()["loss"]["iterations"] == [1, 2, 3, 4, 5]
    monkeypatch.delattr(watch, "read_history")  # what has not changed is not read
    assert client.get("/api/graphs").json()["loss"]["iterations"] == [1, 2, 3, 4, 5]


def test_a_damaged_model_is_told_of_and_the_page_goes_on(tmp_path):
    folder = tmp_path / "model"
    generation = folder / "generations/5"
    generation.mkdir(parents=True)
    (generation / "manifest.json").write_text("{")
    (folder / "state.json").write_text("{")
    _tell(folder, ends=True)
    client = _client(folder)
    assert "no save whose state can be read" in client.get("/api/analysis").json()["problem"]
    assert client.get("/api/graphs").json()["loss"] is None
    assert client.get("/api/status").json()["state"] == "stopped"


# Who may do what


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "[::1"])
def test_another_name_is_refused(logged, name):
    for path in ("/", "/api/status", "/preview.png"):
        answer = _client(logged).get(path, headers={"host": name})
        assert answer.status_code == 421
        assert "does not know itself by that name" in answer.text


# What a host must not hold: put before a path, it would make another path of it.
HOSTS_WITH_A_PATH = ["127.0.0.1/request/?", "127.0.0.1/request/save?", "localhost/#", "127.0.0.1?"]
OTHER_HOSTS = [
    *("me@127.0.0.1", "127.0.0.1\\request", "127.0.0.1:", "127.0.0.1:x", "[::1]x", "127.0.0.1\t"),
    *(" 127.0.0.1", "127.0.0.1\x00", "127.0.0.1\x7f", "127.0.0.\xb9", "127.0.0.1," + "127.0.0.1"),
    *("localhost:" + "0" * 300, "[" + "0:" * 200 + "1]", "%31%32%37.0.0.1"),
]


@pytest.mark.parametrize("name", [*HOSTS_WITH_A_PATH, *OTHER_HOSTS])
def test_a_host_that_is_more_than_a_host_is_refused(logged, name):
    for client in (_client(logged), _client(logged, host="0.0.0.0"), _client(logged, allows=True)):
        for path in ("/", "/preview.png", "/api/status"):
            headers = {"host": name.encode("latin-1"), "x-mien-token": TOKEN}
            assert client.get(path, headers=headers).status_code == 421
        headers = {
            "host": name.encode("latin-1"),
            "x-mien-token": TOKEN,
            "origin": f"http://{name}",
        }
        headers["origin"] = headers["origin"].encode("latin-1")
        assert client.post("/request/save", headers=headers).status_code == 421


@pytest.mark.parametrize("name", HOSTS_WITH_A_PATH)
def test_the_path_alone_decides_what_is_shown(logged, name, monkeypatch):
    monkeypatch.setattr(Access, "knows_host", lambda *_: True)
    client = _client(logged, host="0.0.0.0")
    for path in ("/", "/page.js", "/preview.png", "/api/status", "/request/", "/request/other"):
        assert client.get(path, headers={"host": name}).status_code == 401


def test_two_hosts_are_refused(logged):
    headers = [("host", "127.0.0.1"), ("host", "127.0.0.1")]
    assert _client(logged).get("/api/status", headers=headers).status_code == 421


@pytest.mark.parametrize("name", ["localhost:1", "127.0.0.1", "[::1]:8420"])
def test_this_machine_is_known_by_its_names(logged, name):
    assert _client(logged).get("/api/status", headers={"host": name}).status_code == 200


def test_an_open_page_needs_its_token_everywhere(logged):
    client = _client(logged, host="0.0.0.0")
    headers = {"host": f"{socket.gethostname()}:8420"}
    for path in ("/", "/page.js", "/plotly.js", "/preview.png", "/api/status", "/api/graphs"):
        assert client.get(path, headers=headers).status_code == 401
        assert client.get(path, headers=headers | {"x-mien-token": "no"}).status_code == 401
    assert client.get("/?token=no", headers=headers).status_code == 401
    assert client.get(f"/api/status?token={TOKEN}", headers=headers).status_code == 401
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    opened = client.get(f"/?token={TOKEN}", headers=headers)
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    kept = {"cookie": cookie.split(";")[0]}
    assert client.get("/api/status", headers=headers | kept).status_code == 200
    assert client.get("/", headers=headers | {"cookie": f"{COOKIE}=no"}).status_code == 401


def test_the_token_leaves_the_address_and_is_given_to_the_page(logged):
    answer = _client(logged, allows=True).get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/#token={TOKEN}")
    assert "set-cookie" not in answer.headers


def _status(client):
    return client.get("/api/status").json()


def test_requests_reach_the_run(tmp_path, trainer):
    process = trainer(tmp_path)
    client = _client(tmp_path, allows=True)
    for name, signal_name in (("save", "SIGUSR1"), ("preview", "SIGUSR2")):
        answer = client.post(f"/request/{name}", headers={"x-mien-token": TOKEN})
        assert (answer.status_code, answer.json()) == (200, {"asked": name, "pid": process.pid})
        assert process.stdout.readline() == f"{signal_name}\n"
    assert (client.get("/sheet.png").status_code, _status(client)["sheet"]) == (404, None)
    save_png(tmp_path / "sheet.png", np.zeros((8, 8, 3), np.uint8), "")
    assert client.get("/sheet.png").content == (tmp_path / "sheet.png").read_bytes()
    assert _status(client)["sheet"]
    listed = client.get("/api/settings").json()
    assert listed[0]["name"] == "optimizer.learning_rate"
    assert listed[0]["values"] == "1e-06 to 0.01"
    for name, state in (
        *(("sheet", "running"), ("pause", "paused"), ("resume", "running"), ("change", "running")),
    ):
        asked = {"change": "augment.warp=false"} if name == "change" else {}
        answer = client.post(f"/request/{name}", data=asked, headers={"x-mien-token": TOKEN})
        assert answer.json() == {"asked": name, "pid": process.pid}
        assert process.stdout.readline() == "SIGRTMIN\n"
        assert process.stdout.readline() == f"{asked.get('change', name)}\n"
        assert _status(client)["state"] == state
    for change, words in (
        ("optimizer.learning_rate=7", "must be a number from 1e-06 to 0.01, got 7"),
        ("model.trainer=dfaker", "is fixed in a model"),
        ("", "there is no setting"),
    ):
        answer = client.post("/request/change", data={"token": TOKEN, "change": change})
        assert answer.status_code == 400
        assert words in answer.json()["error"]
    answer = client.post(
        "/request/stop", data={"token": TOKEN}, headers={"origin": str(client.base_url)}
    )
    assert answer.status_code == 200
    assert process.wait(300) == 4
    answer = client.post("/request/pause", data={"token": TOKEN})
    assert (answer.status_code, list(tmp_path.glob(".request-*"))) == (409, [])
    answer = client.post("/request/stop", data={"token": TOKEN})
    assert answer.status_code == 409
    assert answer.json()["error"] == f"no run to stop: nothing trains {tmp_path} now"
    assert client.get("/api/status").json()["latest"]["stop"]["exit_code"] == 4


def test_requests_are_refused_without_the_token(tmp_path, trainer):
    process = trainer(tmp_path)
    client = _client(tmp_path, allows=True)
    for headers in (
        {},
        {"x-mien-token": ""},
        {"x-mien-token": TOKEN[:-1]},
        {"cookie": f"t={TOKEN}"},
    ):
        answer = client.post("/request/stop", headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (
            403,
            "the token is missing or wrong",
        )
    assert client.post("/request/stop", content=b"x" * 5000 + TOKEN.encode()).status_code == 403
    cookie = {
        "cookie": f"{COOKIE}={Access(host='', token=TOKEN, is_open=True, allows=True).cookie}"
    }
    assert client.post("/request/stop", headers=cookie).status_code == 403
    assert client.get(f"/request/stop?token={TOKEN}").status_code == 405
    assert client.post(f"/request/stop?token={TOKEN}").status_code == 403
    assert client.post("/request/format", headers={"x-mien-token": TOKEN}).status_code == 404
    assert process.poll() is None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "https://127.0.0.1:8420"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_of_another_site_are_refused(tmp_path, trainer, headers):
    process = trainer(tmp_path)
    client = _client(tmp_path, allows=True)
    answer = client.post("/request/stop", headers=headers | {"x-mien-token": TOKEN})
    assert (answer.status_code, answer.json()["error"]) == (
        403,
        "requests come from the page itself",
    )
    assert process.poll() is None


def test_a_page_is_read_only_unless_told_otherwise(tmp_path, trainer):
    process = trainer(tmp_path)
    for client in (_client(tmp_path), _client(tmp_path, host="0.0.0.0")):
        answer = client.post("/request/stop", headers={"x-mien-token": TOKEN})
        assert answer.status_code == 403
        assert "read-only; see mien monitor --allow-requests" in answer.json()["error"]
    for method in ("post", "put", "delete", "patch", "options"):
        assert getattr(client, method)("/api/status").status_code in (401, 405)
    assert process.poll() is None


# Asking the process


def test_a_process_that_does_not_listen_is_left_alone(tmp_path, trainer):
    process = trainer(tmp_path, listens=False)
    for name in ("save", "preview", "stop"):
        with pytest.raises(RequestError, match=f"does not listen for a {name} now"):
            send_request(tmp_path, name)
    time.sleep(0.3)
    assert process.poll() is None


def test_a_process_that_no_longer_trains_is_left_alone(tmp_path, trainer):
    process = trainer(tmp_path / "other")
    (tmp_path / ".lock").write_text(f"{process.pid} {socket.gethostname()}\n")
    found = lock_owner(tmp_path)
    assert found is not None
    assert not found.is_running
    with pytest.raises(RequestError, match="nothing trains"):
        send_request(tmp_path, "stop")
    assert process.poll() is None


def test_a_run_on_another_host_is_left_alone(tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        lock.write(f"{os.getpid()} elsewhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            RequestError, match=r"the run is on host elsewhere, this is .*; ask there"
        ):
            send_request(tmp_path, "stop")


@pytest.mark.parametrize("content", ["", "x y", "12", "0 here", "-1 here", "1 2 3", "٣ here"])
def test_a_lock_file_that_names_no_process_is_nobodys(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    assert lock_owner(tmp_path) is None
    with pytest.raises(RequestError, match="no run to save"):
        send_request(tmp_path, "save")


def test_the_holder_of_a_model_folder_is_found(tmp_path):
    with ModelFolder(tmp_path / "model") as folder:
        found = lock_owner(folder.path)
        assert found is not None
        assert (found.pid, found.is_here, found.is_running) == (os.getpid(), True, True)
        (folder.path / "kept").touch()
    found = lock_owner(folder.path)
    assert found is not None
    assert not found.is_running


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--token", "short", "--allow-requests"], "--token must be at least 16 characters"),
        (["--token", "with a space in it x", "--allow-requests"], "without spaces"),
        (["--token", TOKEN], "--token guards nothing"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1 port 8420"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, message):
    assert cli.main(["monitor", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_told(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["monitor", str(tmp_path), "--port", str(port)]) == 2
    assert "in use; choose others with --host and --port" in capsys.readouterr().err


def test_a_file_is_no_model(tmp_path, capsys):
    (tmp_path / "model").touch()
    assert cli.main(["monitor", str(tmp_path / "model")]) == 2
    assert "MODEL must be a model folder, got the file" in capsys.readouterr().err
    assert cli.main(["monitor", *(str(tmp_path / f"{number}") for number in range(33))]) == 2
    assert "MODEL must be at most 32 folders, got 33" in capsys.readouterr().err


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["monitor", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "the page needs starlette and uvicorn and plotly; install with" in error
    assert f"`{sys.executable} -m pip install 'mien[monitor]'`" in error


@pytest.fixture
def server():
    """Start `mien monitor`; the address that it printed, and the process."""
    started = []

    def start(folder: Path | list[Path], *words: str) -> tuple[str, subprocess.Popen]:
        folders = folder if isinstance(folder, list) else [folder]
        command = [sys.executable, "-m", "mien.cli", "monitor", *folders, *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        line = process.stdout.readline().strip()
        what = f"{len(folders)} runs" if len(folders) > 1 else folder
        assert line.startswith(f"{what} at http://127.0.0.1:"), process.communicate()
        assert process.stdout.readline().startswith("Ctrl-C ends the page; training goes on")
        return line.removeprefix(f"{what} at "), process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_interrupted(tmp_path, server):
    import httpx

    address, process = server(tmp_path, "--port", "0", "--allow-requests")
    root, token = address.split("?token=")
    assert re.fullmatch(r"[\w-]{32}", token)
    answer = httpx.get(f"{root}api/status", timeout=300)  # the socket listens: it is kept waiting
    assert answer.json()["may_ask"]
    assert "server" not in answer.headers
    assert httpx.post(f"{root}request/save", headers={"x-mien-token": token}).status_code == 409
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == 0


def test_a_folder_without_a_run_is_named(tmp_path, server):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text.md").write_text("none")
    _, process = server([tmp_path / "typo", tmp_path / "notes"], "--port", "0")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert f"no model is in {tmp_path / 'typo'}, {tmp_path / 'notes'}: the page waits" in told
    assert not (tmp_path / "typo").exists()


# The page in a browser


@pytest.fixture
def browser():
    """A headless Chromium of 1280 x 900 pixels."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield Browser(chrome)


class Browser:
    """What a user does with the page, and sees on it."""

    def __init__(self, chrome):
        self.chrome = chrome

    def find(self, selector):
        return self.chrome.find_element("css selector", selector)

    def click(self, selector):
        self.find(selector).click()

    def text(self, selector):
        return self.find(selector).text

    def run(self, script):
        return self.chrome.execute_script(f"return {script}")

    def wait(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.1)
        return found

    def drag(self, selector, start, end):
        """Press at one share of an element's width, move to another, and let go."""
        from selenium.webdriver import ActionChains

        target = self.find(selector)
        width = target.size["width"]
        chain = ActionChains(self.chrome)
        chain.move_to_element_with_offset(target, int((start - 0.5) * width), 0).click_and_hold()
        chain.move_by_offset(int((end - start) * width / 2), 0)
        chain.move_by_offset(int((end - start) * width / 2), 0).release().perform()

    def resize(self, width, height, **media):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.chrome.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 600})
        features = [{"name": f"prefers-{name}", "value": value} for name, value in media.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, path):
        """The whole page as PNG."""
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}
        shot = self.chrome.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self):
        return [
            entry["message"]
            for entry in self.chrome.get_log("browser")
            if entry["level"] == "SEVERE"
        ]


# The start of a run as it is told, with what a page must not take for HTML.
START = {
    "trainer": "phaze-a",
    "input_px": 128,
    "output_px": [128, 256],
    "batch_size": 8,
    "precision": "bf16",
    "losses": [{"name": "ssim", "weight": 1.0}, {"name": "<b>mse</b>", "weight": 0.5}],
    "mask_type": "extended",
    "learn_mask": True,
    "warp": True,
    "flip": False,
    "color": True,
    "optimizer": "adam",
    "learning_rate": 5e-5,
    "schedule": "constant",
    "device_name": "CPU",
    "engine": "eager",
    "gpus": 2,
    "faces_a": 1000,
    "faces_b": 2000,
    "save_interval": 250,
    "stage": {"recipe": "long", "name": "detail", "number": 2, "count": 3},
    "ema": 0.9995,
    "changes": [
        {"name": "train.ema", "old": 0.0, "new": 0.9995, "note": "the average begins"},
        {"name": "data.input_a", "old": ["x", "y"], "new": "<i>", "note": None},
    ],
}


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    """Model folders of two runs that have ended, with kept previews and all that is logged."""
    folders = [tmp_path / "one", tmp_path / "two <i>&"]
    for place, folder in enumerate(folders):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "config.toml").write_text(f"[train]\nbatch_size = {BATCH_SIZE}\n")
        for number, first in ((1, 1), (2, 301)):
            log = TensorBoardLog(folder, number, first)
            for step in range(first, first + 300):
                loss = (1 + place) / step
                terms = {"batch_weighted_a/ssim": loss / 3, "learning_rate": 1e-5 * step}
                faces = {"batch_face_a": loss, "batch_face_b": loss / 2}
                log.scalars({"batch_total": 2 * loss} | faces | terms, step, 1e9 + step)
                if step % 100 == 0:
                    log.scalars({"evaluate/ssim_a": step / 1000}, step)
            log.close()
        with _events(folder, 2).open("w") as stream:
            reporter = Reporter(stream, as_json=True)
            reporter.start(START)
            for step in range(301, 601, 50):
                losses = {"loss_a": 0.1, "loss_b": 0.2, "eg_per_s": 50.0, "data_wait": 0.0}
                reporter.step(
                    iteration=step,
                    **losses,
                    memory_mib=900.0 + step,
                    session_iterations=step - 300,
                    elapsed_s=100.0,
                    seconds_left=50.0,
                )
        for iteration in (100, 200, 300):
            _keep(folder, iteration, level=iteration // 10)
        save_png(folder / "preview.png", np.full((120, 240, 3), 200, np.uint8), "")
    return folders


@pytest.fixture
def running(tmp_path, trainer) -> tuple[Path, subprocess.Popen]:
    """A model folder with two logged sessions and a preview, and the process of its third."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.toml").write_text(f"[train]\nbatch_size = {BATCH_SIZE}\n")
    _session(folder, 1, 1, 3000)
    _session(folder, 2, 3001, 1000)
    process = trainer(folder, session=3)
    save_png(folder / "preview.png", np.full((120, 240, 3), 200, np.uint8), "")
    return folder, process


def _iterations(browser):
    """First and last iteration of the loss graph's first line."""
    return browser.run("(x => x && [x[0], x.at(-1)])(document.getElementById('loss').data?.[0]?.x)")


@pytest.mark.slow
def test_the_page_shows_the_run(running, server, browser, tmp_path):
    folder, _ = running
    address, _ = server(folder, "--port", "0")
    browser.chrome.get(address)
    browser.wait(lambda: browser.text("#state") == "running")
    assert browser.text("#name") == "model"
    figures = browser.wait(
        lambda: "0.25000" in browser.text("#figures") and browser.text("#figures")
    )
    assert "123.4" in figures
    browser.wait(lambda: _iterations(browser) == [3, 4000])  # means of 3 iterations
    rows = browser.wait(lambda: browser.chrome.find_elements("css selector", "#sessions tr"))
    assert [row.text.split()[-2] for row in rows] == ["3,000", "1,000"]
    assert not browser.find("#requests").is_displayed()
    assert browser.run("document.getElementById('preview').naturalWidth") == 240
    browser.picture(tmp_path / "wide.png")

    message = "<img src=x onerror=document.title='taken'> & more"
    with _events(folder, 3).open("a") as stream:
        Reporter(stream, as_json=True).warning(message)
    browser.wait(lambda: message in browser.text("#log"))
    assert browser.text("#log .warning").endswith(f"Warning: {message}")
    assert browser.chrome.title.endswith("running – model")

    save_png(folder / "preview.png", np.full((120, 250, 3), 100, np.uint8), "")
    browser.wait(lambda: browser.run("document.getElementById('preview').naturalWidth") == 250)
    browser.click("#enlarge")
    assert browser.find("#large-picture").is_displayed()
    browser.click("#large button")
    assert not browser.find("#large").is_displayed()
    assert browser.errors() == []


@pytest.mark.slow
def test_a_visitor_judges_and_compares_runs(two_runs, server, browser, tmp_path):
    address, _ = server(two_runs, "--port", "0")
    browser.chrome.get(address)
    browser.wait(lambda: "bf16" in browser.text("#setup"))
    _check_header(browser)
    _check_preview(browser)
    _check_graphs(browser)
    _check_runs(browser)
    browser.picture(tmp_path / "wide.png")
    browser.resize(390, 844, **{"color-scheme": "dark"})
    browser.wait(lambda: browser.run("innerWidth") == 390)
    assert browser.run("document.documentElement.scrollWidth") == 390
    browser.picture(tmp_path / "phone.png")
    assert browser.errors() == []


def _check_header(browser):
    shown = browser.text("#setup")
    wanted = (
        *("phaze-a", "128 px in, 128, 256 px out", "8 a side", "ssim 100 %, <b>mse</b> 50 %"),
        *("warp on, flip off, color on", "2 × CPU", "2 of 3: detail (recipe long)"),
        "of the weights, decay 0.9995",
        "train.ema 0 → 0.9995 (the average begins); data.input_a (x, y) → <i>",
    )
    for words in wanted:
        assert words in shown
    started = browser.text("#log li:first-child")
    assert "Started: phaze-a, batch 8 a side, bf16, average of the weights, decay" in started
    assert "; changed since the last session: train.ema 0 → 0.9995" in started
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", browser.text("#summary"))
    figures = browser.text("#figures")
    assert "551" in figures
    assert "251" in figures
    assert "00:01:40" in figures


def _check_preview(browser):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.select import Select

    def width():
        return browser.run("document.getElementById('preview').naturalWidth")

    def source():
        return browser.run("document.getElementById('preview').getAttribute('src')")

    def is_drawn():  # until then the picture before it is there, with its width
        address = browser.run("document.getElementById('preview').currentSrc")
        is_complete = browser.run("document.getElementById('preview').complete")
        return is_complete and address.endswith(source())

    browser.wait(lambda: width() == 240)
    browser.find("#history").send_keys(Keys.HOME)
    browser.wait(lambda: width() > 900)
    assert "iteration 100, as it was kept" in browser.text("#preview-age")
    browser.click("#history-box [data-step='1']")
    assert "at=200" in source()
    Select(browser.find("#mask")).select_by_visible_text("outline")
    assert "mask=outline" in source()
    browser.click("#pixels")
    assert "enlarge=nearest" in source()
    browser.wait(is_drawn)
    alone = width()
    Select(browser.find("#other")).select_by_visible_text("300")
    browser.wait(lambda: width() < alone)
    assert "iterations 200 and 300" in browser.text("#preview-age")
    assert browser.find("#download").get_attribute("href").endswith(source())
    assert browser.find("#download").get_attribute("download") == "preview_200.png"
    browser.click("#enlarge")
    browser.wait(lambda: browser.text("#zoom-value"))
    browser.click("[data-zoom=whole]")
    assert browser.text("#zoom-value") == "100 %"
    browser.click("[data-zoom=in]")
    assert browser.text("#zoom-value") == "150 %"
    browser.click("#large [data-step='-1']")
    assert "at=100" in source()
    browser.click("#large button")
    Select(browser.find("#other")).select_by_visible_text("nothing")
    Select(browser.find("#mask")).select_by_visible_text("as drawn")
    browser.find("#history").send_keys(Keys.END)
    browser.wait(lambda: width() == 240)


def _check_graphs(browser):
    from selenium.webdriver.support.select import Select

    browser.wait(lambda: _iterations(browser) == [1, 600])
    browser.click("#series-box summary")
    browser.click("#series [value='batch_face_b']")
    browser.click("#series [value='batch_weighted_a/ssim']")
    browser.wait(lambda: sorted(_names(browser, "loss")) == ["A face", "A ssim"])
    lower = Select(browser.find("#lower"))
    for text, last in (
        ("learning rate", 6e-3),
        ("held out: ssim_a", 0.6),
        ("peak memory (MiB)", 1451),
        ("speed (EG/s)", 2 * BATCH_SIZE),
    ):
        lower.select_by_visible_text(text)
        y = browser.run("document.getElementById('speed').data[0].y")
        assert y[-1] == pytest.approx(last, rel=1e-3)
    browser.click("#sessions tr:nth-child(2) button")
    browser.wait(lambda: _iterations(browser) == [301, 600])
    file = browser.find("#sessions tr:nth-child(2) a").get_attribute("href")
    assert "first=301&last=600" in file


def _names(browser, graph):
    return browser.run(
        f"[...new Set(document.getElementById('{graph}').data.map(one => one.name))]"
    )


def _check_runs(browser):
    browser.click("#runs-box summary")
    browser.click("#runs input[value='1']")
    browser.wait(lambda: "two &lt;i&gt;&amp;: A face" in _names(browser, "loss"))
    assert "two <i>&: A face" in browser.text("#loss .legend")
    # Chosen while the graphs of the other run are asked for.
    browser.run(
        "void (() => { const ask = askForGraphs; askForGraphs = async () => { askForGraphs = ask; "
        "byId('run').value = 1; chooseRun(); }; poll(0); })()"
    )
    browser.wait(lambda: browser.text("#name") == "two <i>&")
    browser.wait(lambda: len(browser.chrome.find_elements("css selector", "#sessions tr")) == 2)
    browser.wait(lambda: "one: A face" in _names(browser, "loss"))
    browser.wait(lambda: _iterations(browser) == [1, 600])


HTML = "<img src=x onerror=document.title='taken'>"

# What a stranger's journal may hold; of each, a part of what the page must show of it.
FOREIGN_EVENTS = {
    '{"event": "__proto__", "time": 5, "constructor": {"a": 1}}': "__proto__: constructor a 1",
    '{"event": "constructor", "time": 5, "__proto__": 7}': "Constructor: proto 7",
    '{"event": "toString", "time": 5, "x": [1, null]}': "ToString: x (1, none)",
    '{"event": "", "time": 5, "x": null}': ":",
    '{"event": "warning", "time": 5, "message": {"toString": 5}}': 'Warning: {"toString":5}',
    '{"event": "warning", "time": 5}': "Warning: undefined",
    '{"event": "save", "time": 5, "iteration": {"valueOf": 1}}': "Saved iteration {",
    '{"event": "preview", "time": 5, "iteration": [[]]}': "Preview of iteration [[]]",
    '{"event": "step", "time": 5, "iteration": "<b>7</b>", "loss_a": {}, "eg_per_s": 1e308}': (
        "#<b>7</b> loss A –"
    ),
    '{"event": "warning", "time": 5, "message": "a\\u001b[31m\\nb\\u202ec\\udce4d\\u007f"}': (
        "Warning: a\\u001b[31m\\nb\\u{202e}c\\xe4d\\u{7f}"
    ),
    '{"event": "crash", "time": 5, "error": {"toString": []}}': "A failure of mien itself: {",
    '{"event": "stop", "time": 6, "exit_code": {}, "reason": ["x"]}': 'undefined: ["x"]',
}


@pytest.mark.slow
def test_the_page_shows_what_a_stranger_tells_as_text(server, browser, tmp_path):
    folder = tmp_path / "a \x1b[31m\n<img src=x onerror=document.title=1>\u202e b"
    folder.mkdir()
    (folder / ".lock").touch()
    _session(folder, 1, 1, 20)
    lines = [*FOREIGN_EVENTS, f'{{"event": "{HTML}", "time": 5}}', ""]
    _events(folder).write_text("\n".join(lines))
    link = tmp_path / "model"
    link.symlink_to(folder)
    address, _ = server(link, "--port", "0")
    browser.chrome.get(address)
    browser.wait(lambda: browser.text("#state") == "halted")
    shown = browser.wait(lambda: browser.text("#log") and browser.text("#log").splitlines())
    for wanted in [*FOREIGN_EVENTS.values(), HTML]:
        assert any(wanted in line for line in shown), wanted
    name = "a \\u001b[31m\\n<img src=x onerror=document.title=1>\\u{202e} b"
    assert browser.text("#name") == name
    assert '["x"]' in browser.text("#summary")
    assert browser.chrome.title == f"#<b>7</b> halted – {name}"
    assert not browser.chrome.find_elements("css selector", "#log img, h1 img, #log b")
    browser.wait(lambda: _iterations(browser) == [1, 20])
    browser.wait(lambda: not browser.find("#connection").is_displayed())
    assert browser.errors() == []


@pytest.mark.slow
def test_the_page_shows_the_newest_of_many_sessions(server, browser, tmp_path):
    (tmp_path / "config.toml").write_text(f"[train]\nbatch_size = {BATCH_SIZE}\n")
    for number in range(1, 701):
        _session(tmp_path, number, 2 * number - 1, 2)
    (tmp_path / ".lock").touch()
    address, _ = server(tmp_path, "--port", "0")
    browser.chrome.get(address)
    browser.wait(lambda: _iterations(browser) == [1, 1400])
    browser.wait(lambda: browser.text("#earlier") == "200 earlier sessions are in the total alone.")
    assert len(browser.chrome.find_elements("css selector", "#sessions tr")) == 500
    assert browser.text("#total").split()[-2] == "1,400"
    assert browser.run("document.getElementById('loss').layout.shapes.length") == 0
    browser.drag("#loss .nsewdrag", 0.5, 0.55)
    browser.wait(lambda: browser.run("document.getElementById('loss').layout.shapes.length") > 20)
    assert browser.errors() == []


@pytest.mark.slow
def test_the_graphs_are_smoothed_and_zoomed(running, server, browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.select import Select

    folder, _ = running
    address, _ = server(folder, "--port", "0")
    browser.chrome.get(address)
    browser.wait(lambda: browser.run("document.getElementById('loss').data?.length") == 4)

    def line():
        return browser.run("document.getElementById('loss').data[1].y.slice(0, 50)")

    raw = browser.run("document.getElementById('loss').data[0].y.slice(0, 50)")
    expected = []
    for count in range(1, len(raw) + 1):  # the mean with weights 0.9^age: no value has a start
        weights = 0.9 ** np.arange(count - 1, -1, -1)
        expected.append(np.average(raw[:count], weights=weights))
    np.testing.assert_allclose(line(), expected)
    browser.find("#smoothing").send_keys(Keys.ARROW_RIGHT)
    assert browser.text("#smoothing-value") == "0.91"
    assert line() != expected
    browser.find("#smoothing").send_keys(Keys.HOME)
    assert browser.run("document.getElementById('loss').data.length") == 2

    assert browser.run("document.getElementById('loss').layout.yaxis.type") == "linear"
    browser.click("#log-axis")
    assert browser.run("document.getElementById('loss').layout.yaxis.type") == "log"

    browser.drag("#loss .nsewdrag", 0.5, 0.75)
    first, last = browser.wait(lambda: _iterations(browser)[0] > 1900 and _iterations(browser))
    assert 1950 < first < 2050
    assert 2950 < last < 3050
    browser.wait(lambda: "Each point is one iteration" in browser.text("#loss-note"))
    assert browser.run("document.getElementById('speed').layout.xaxis.range[0]") == first
    time.sleep(7)  # a few polls: what is zoomed stays
    assert _iterations(browser) == [first, last]
    ActionChains(browser.chrome).double_click(browser.find("#loss .nsewdrag")).perform()
    browser.wait(lambda: _iterations(browser) == [3, 4000])

    choice = Select(browser.find("#range"))
    choice.select_by_visible_text("last tenth")
    browser.wait(lambda: _iterations(browser) == [3600, 4000])
    choice.select_by_visible_text("all")
    browser.wait(lambda: _iterations(browser) == [3, 4000])
    assert browser.errors() == []


def _ask_for_a_sheet(folder, process, browser):
    browser.click("[data-request=sheet]")
    assert [process.stdout.readline() for _ in range(2)] == ["SIGRTMIN\n", "sheet\n"]
    assert not browser.find("#sheet").is_displayed()
    save_png(folder / "sheet.png", np.full((60, 300, 3), 90, np.uint8), "")
    browser.wait(lambda: browser.run("document.getElementById('preview').naturalWidth") == 300)
    assert browser.text("#preview-age").startswith("sheet of iteration")
    assert browser.find("#download").get_attribute("download") == "sheet.png"
    browser.click("#sheet")
    browser.wait(lambda: browser.run("document.getElementById('preview').naturalWidth") == 240)


@pytest.mark.slow
def test_the_page_asks_the_run_for_work(running, server, browser, tmp_path):
    folder, process = running
    address, _ = server(folder, "--port", "0", "--allow-requests", "--token", TOKEN)
    browser.chrome.get(address.partition("?")[0])
    button = "[data-request=save]"
    browser.wait(lambda: browser.find(button).is_displayed() and browser.find(button).is_enabled())
    browser.find("#token").send_keys("not this one")
    browser.click(button)
    browser.wait(lambda: "the token is missing or wrong" in browser.text("#answer"))
    browser.find("#token").clear()
    browser.find("#token").send_keys(TOKEN)
    browser.click(button)
    assert process.stdout.readline() == "SIGUSR1\n"
    browser.wait(lambda: "Saved iteration" in browser.text("#log"))

    browser.chrome.get("about:blank")
    browser.chrome.get(address)  # as it was printed
    browser.wait(lambda: browser.find(button).is_displayed() and browser.find(button).is_enabled())
    assert browser.chrome.current_url == address.partition("?")[0]
    assert not browser.find("#token").is_displayed()
    browser.click("[data-request=preview]")
    assert process.stdout.readline() == "SIGUSR2\n"

    browser.wait(lambda: browser.find("#rule").text.startswith("1e-06 to 0.01. Step size"))
    assert browser.find("#value").get_attribute("value") == "0.00005"
    browser.find("#setting").send_keys("augment.warp")
    browser.wait(lambda: browser.find("#value").get_attribute("value") == "true")
    browser.find("#value").clear()
    browser.find("#value").send_keys("false")
    browser.click("#change button")
    assert browser.text("#change-text") == "Change augment.warp from true to false?"
    browser.click("#confirm-change [value=change]")
    assert process.stdout.readline() == "SIGRTMIN\n"
    assert process.stdout.readline() == "augment.warp=false\n"
    browser.wait(lambda: "Changed augment.warp from true to false" in browser.text("#log"))
    browser.picture(tmp_path / "change.png")
    _ask_for_a_sheet(folder, process, browser)
    browser.click("#pause")
    browser.wait(lambda: browser.text("#state") == "paused")
    assert not browser.find(button).is_enabled()
    assert browser.text("#pause") == "Go on"
    browser.click("#pause")
    browser.wait(lambda: browser.text("#state") == "running")
    assert [process.stdout.readline() for _ in range(4)] == [
        *("SIGRTMIN\n", "pause\n", "SIGRTMIN\n", "resume\n"),
    ]

    browser.click("[data-request=stop]")
    browser.click("#confirm [value=cancel]")
    time.sleep(0.5)
    assert process.poll() is None
    browser.click("[data-request=stop]")
    browser.click("#confirm [value=stop]")
    assert process.wait(300) == 4
    browser.wait(lambda: browser.text("#state") == "stopped")
    assert "SIGTERM received" in browser.text("#summary")
    assert not browser.find("[data-request=stop]").is_enabled()
    refused = [message for message in browser.errors() if "403" not in message]
    assert refused == []


@pytest.mark.slow
def test_the_page_outlives_the_run_and_the_server(running, server, browser, trainer):
    folder, process = running
    address, monitor = server(folder, "--port", "0")
    port = address.split(":")[2].strip("/")
    browser.chrome.get(address)
    browser.wait(lambda: "session 3" in browser.text("#summary"))
    process.kill()
    process.wait()
    browser.wait(lambda: browser.text("#state") == "ended without a word", 40)

    monitor.send_signal(signal.SIGINT)
    monitor.wait(300)
    browser.wait(lambda: "No answer from mien monitor" in browser.text("#connection"))
    trainer(folder, session=4)
    server(folder, "--port", port)
    browser.wait(lambda: "session 4" in browser.text("#summary"))
    assert browser.text("#state") == "running"
    browser.wait(lambda: not browser.find("#connection").is_displayed())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(running, server, browser, tmp_path, scheme):
    folder, _ = running
    address, _ = server(folder, "--port", "0", "--allow-requests", "--token", TOKEN)
    browser.resize(390, 844, **{"color-scheme": scheme})
    browser.chrome.get(address)
    browser.wait(lambda: browser.run("document.getElementById('loss').data?.length") == 4)
    browser.wait(lambda: browser.find("[data-request=save]").is_enabled())
    assert browser.run("document.documentElement.scrollWidth") == 390
    # A finger on the graph scrolls the page.
    assert browser.run("document.getElementById('loss').layout.dragmode") is False
    assert all(
        button.size["height"] >= 40
        for button in browser.chrome.find_elements("css selector", "button, select")
        if button.is_displayed()
    )
    browser.picture(tmp_path / "phone.png")
    assert browser.errors() == []
