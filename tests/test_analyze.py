"""`mien analyze`: the table, the graphs, and models in every state, also in training."""

import csv
import errno
import itertools
import json
import os
import re
import shutil
import struct

import cv2
import numpy as np
import pytest
import torch
from conftest import train_words
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mien.cli import main
from mien.core.checkpoint.generations import Generations
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.checkpoint.state import Session, TrainingState
from mien.core.console.tensorboard import TensorBoardLog
from mien.core.history import plots
from mien.core.history.history import (
    BATCH_SIZE_TAG,
    _EventFile,
    _leave_out_undone,
    _sessions,
    read_history,
)
from mien.core.history.plots import Tag, _thinned
from mien.core.history.statistics import rate_per_iteration, total_statistics


def _analyze(capsys, *words):
    code = main(["analyze", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(sides, tmp_path_factory):
    """A model of two sessions, of 5 and 3 iterations. Not to be changed."""
    model = tmp_path_factory.mktemp("analyze") / "model"
    words = ["-A", str(sides[0]), "-B", str(sides[1]), "-m", str(model), "--device", "cpu"]
    words += ["-t", "lightweight", "--set", "model.options.width=8"]
    words += ["--set", "loss.learn_mask=true"]
    assert main(["train", *words, "-i", "5", "-b", "4"]) == 0
    assert main(["train", *words, "-i", "3", "-b", "6"]) == 0
    return model


def _log(model, session, iterations, *, batch_seconds=1.0, began=0.0):
    log = TensorBoardLog(model, session, iterations[0])
    for iteration in iterations:
        values = {f"batch_face_{side}": iteration + session / 10 for side in "ab"}
        values["batch_face_b"] += 5  # or its line would hide the other
        values["batch_weighted_a/ssim"] = 7.0
        total = {"batch_total": sum(values.values())}
        log.scalars(total | values, iteration, began + iteration * batch_seconds)
    log.close()


def _save(model, *iterations, batch_size=2, logs=True):
    """A model folder with a save after sessions of so many iterations."""
    state = TrainingState(trainer="original", iterations=sum(iterations))
    for number, count in enumerate(iterations, 1):
        state.sessions.append(
            Session(
                number=number,
                started=1000.0 * number,
                batch_size=batch_size,
                logs=logs,
                iterations=count,
            )
        )
    with ModelFolder(model) as folder:
        folder.save({"w": torch.zeros(2)}, None, state.to_dict())


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_table_of_a_trained_model(trained, capsys):
    before = _files(trained)
    code, out, err = _analyze(capsys, trained)
    assert (code, err) == (0, "")
    title, head, *rows = out.splitlines()
    assert title == f"{trained}: lightweight"
    assert head.split() == ["session", "start", "end", "elapsed", "batch", "iterations", "EG/s"]
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    for row, number, batch, count in zip(
        rows, ("1", "2", "total"), ("4", "6", "4,6"), (5, 3, 8), strict=True
    ):
        pattern = rf"{number}  {moment}  {moment}  00:00:\d\d +{batch} +{count} +(?:\d+\.\d|-)"
        assert re.fullmatch(pattern, row.strip()), row
    assert _files(trained) == before


def test_json_and_csv_tell_the_same(trained, tmp_path, capsys):
    _, table, _ = _analyze(capsys, trained, "--csv", tmp_path / "table.csv")
    assert table.splitlines()[-1] == f"wrote {tmp_path / 'table.csv'}"
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    in_table = [re.split(r"  +", line.strip()) for line in table.splitlines()[1:-1]]
    assert rows == in_table
    _, printed, _ = _analyze(capsys, trained, "--csv", "-")
    assert printed == (tmp_path / "table.csv").read_text()
    _, facts, _ = _analyze(capsys, trained, "--json")
    facts = json.loads(facts)
    assert facts["trainer"] == "lightweight"
    for row, one in zip(rows[1:], [*facts["sessions"], facts["total"]], strict=True):
        assert row[0] == str(one["session"] or "total")
        assert row[4] == ",".join(map(str, one["batch_sizes"]))
        assert row[5] == str(one["iterations"])
        assert row[6] == ("-" if one["eg_per_s"] is None else f"{one['eg_per_s']:.1f}")
        assert one["elapsed_s"] == int(one["end"] - one["start"]) or one["session"] is None
    assert facts["total"]["start"] == facts["sessions"][0]["start"]


def test_the_time_of_each_iteration_is_logged(sides, tmp_path):
    """Also where many are written to the log at once."""
    settings = ("-b", "2", "--set", "train.log_interval=6", "-i", "7")
    assert main(train_words(sides, tmp_path / "model", *settings)) == 0
    (session,) = read_history(tmp_path / "model").sessions
    seconds = np.diff(session.times_n)
    assert (seconds > 1e-4).all()
    np.testing.assert_allclose(seconds[1:], seconds[1:].mean(), rtol=1e-3)


def test_graphs(trained, tmp_path, capsys):
    losses, rate = tmp_path / "losses.png", tmp_path / "rate.png"
    for path, more in (
        (losses, ["--loss", "a", "--loss", "mask_b", "--rolling", "3", "--smoothing", "0.5"]),
        (rate, ["--rate", "--range", "2:"]),
    ):
        code, out, err = _analyze(capsys, trained, "--graph", path, *more)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == f"wrote {path}"
        assert cv2.imread(str(path)).shape[1] == 1200
    content = losses.read_bytes()
    code, _, err = _analyze(capsys, trained, "--graph", losses)
    assert (code, losses.read_bytes()) == (2, content)
    assert "is there already; name another file, or add --force" in err
    assert _analyze(capsys, trained, "--graph", losses, "--force")[0] == 0
    assert losses.read_bytes() != content


def _is_drawn(path, bgr, tolerance=12):
    """Whether there is a good deal of a colour in a picture."""
    difference = np.abs(cv2.imread(str(path)).astype(int) - np.array(bgr)).max(axis=2)
    return (difference < tolerance).sum() > 200


def test_a_graph_shows_what_is_chosen(tmp_path, capsys):
    model, blue, orange = tmp_path / "model", (180, 119, 31), (14, 127, 255)
    _save(model, 40)
    _log(model, 1, range(1, 41))
    for key, colors in (("a", (True, False)), ("face_b", (False, True)), (None, (True, True))):
        words = ["--loss", key] if key else []
        path = tmp_path / f"{key}.png"
        assert _analyze(capsys, model, "--graph", path, "--smoothing", "0", *words)[0] == 0
        assert (_is_drawn(path, blue), _is_drawn(path, orange)) == colors


@pytest.mark.parametrize("name", ["gesichter_\udce4", "a$\\no$b", "$$", "a\nb\x1b[2J", "{}%s"])
def test_a_graph_of_a_model_of_any_name(tmp_path, capsys, name):
    model, graph = tmp_path / name, tmp_path / "graph.png"
    _save(model, 3)
    _log(model, 1, range(1, 4))
    assert _analyze(capsys, model, "--graph", graph)[0] == 0
    assert cv2.imread(str(graph)) is not None


def test_labels_of_sessions_that_begin_near_each_other_do_not_overlap():
    figure, (axis,) = plots._panels(1, "model", plots.Drawing())
    starts = [(1, 1), (2, 3), (3, 5), (4, 7), (5, 9), (6, 500)]
    axis.set_xlim(0, 1000)
    plots._mark(axis, starts)
    plots._png(figure)
    boxes = [label.get_window_extent() for label in axis.texts if label.get_visible()]
    assert len(boxes) == 5, "four rows, and the last session beside the first"
    for one, other in itertools.combinations(boxes, 2):
        assert one.x1 <= other.x0 or one.y0 >= other.y1 - 1e-6, "an overlap"
    frame = axis.get_window_extent()
    assert all(frame.y0 < box.y0 < box.y1 <= frame.y1 for box in boxes)


def test_a_long_line_is_thinned_to_what_can_be_seen():
    values = np.random.default_rng(0).random(100_003)
    values[[12_345, 54_321]] = 9, -9
    places, thinned = _thinned(np.arange(len(values)), values)
    assert len(thinned) < 12_000
    assert (np.diff(places) > 0).all()
    np.testing.assert_array_equal(thinned, values[places])
    assert {0, 12_345, 54_321, 100_002} <= set(places)
    short = np.arange(5000.0)
    assert _thinned(short, short)[1] is short


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-3, float("nan"), float("inf")])
def test_a_graph_of_what_never_changes(tmp_path, capsys, value):
    model = tmp_path / "model"
    _save(model, 12)
    log = TensorBoardLog(model, 1, 1)
    for iteration in range(1, 13):
        log.scalars({"batch_total": 1.0, "batch_face_a": value}, iteration)
    log.close()
    assert _analyze(capsys, model, "--graph", tmp_path / "graph.png", "--flatten-outliers")[0] == 0


def test_only_some_sessions(trained, capsys):
    facts = json.loads(_analyze(capsys, trained, "--session", "2", "--json")[1])
    assert [one["session"] for one in facts["sessions"]] == [2]
    assert facts["total"]["iterations"] == 3
    code, _, err = _analyze(capsys, trained, "--session", "7")
    assert code == 2
    assert err.endswith("has no such session, only 1, 2\n")


def test_a_model_without_logs(tmp_path, capsys):
    model = tmp_path / "model"
    _save(model, 5, 2, logs=False)
    code, out, err = _analyze(capsys, model)
    assert (code, err) == (0, "")
    cells = [line.split() for line in out.splitlines()[2:-1]]
    assert [row[-4:] for row in cells] == [["-", "2", n, "-"] for n in ("5", "2", "7")]
    assert out.splitlines()[-1].startswith("-: not known, since the folder has no logs")
    code, _, err = _analyze(capsys, model, "--graph", tmp_path / "graph.png")
    assert code == 2
    assert "so there is nothing to draw: it was trained with --no-logs" in err
    assert not (tmp_path / "graph.png").exists()


def test_a_model_in_training(trained, tmp_path, capsys):
    """Its folder is locked, a session is not in the save yet, its file grows and ends midway."""
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    log = TensorBoardLog(model, 3, 9)
    log.scalars({BATCH_SIZE_TAG: 6}, 8)
    for iteration in range(9, 29):
        log.scalars({"batch_total": 1.0}, iteration, 1e9 + iteration)
    log.close()
    (path,) = (model / "logs/session_3/train").iterdir()
    content = path.read_bytes()
    counts = []
    with ModelFolder(model):
        for size in range(len(content) - 90, len(content) + 1):
            path.write_bytes(content[:size])
            code, out, err = _analyze(capsys, model, "--json")
            assert (code, err) == (0, "")
            session = json.loads(out)["sessions"][2]
            assert session["batch_sizes"] == [6], "as the events begin"
            counts.append(session["iterations"])
    assert counts[-1] == 20
    assert counts == sorted(counts)
    assert set(counts) == {18, 19, 20}


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 64, b"\x05" + b"\0" * 11 + b"\0" * 9])
def test_a_torn_end_of_the_logs(tmp_path, tail):
    model = tmp_path / "model"
    _save(model, 4)
    _log(model, 1, range(1, 5))
    (path,) = (model / "logs/session_1/train").iterdir()
    path.write_bytes(path.read_bytes() + tail)
    assert len(read_history(model).sessions[0].times_n) == 4


def test_settings_that_are_none_of_ours_end_in_one_line_at_most(tmp_path):
    model = tmp_path / "model"
    _log(model, 1, range(1, 3))
    (model / "generations").mkdir()
    config = model / "config.toml"
    config.write_text("train = 3")
    assert read_history(model).sessions[0].batch_size is None
    for content in ("a = " + "[" * 5000, "a" + ".a" * 5000 + " = 1"):
        config.write_text(content)
        with pytest.raises(ValueError, match=r"config\.toml is not valid TOML"):
            read_history(model)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ValueError, match="not a plain file"):
        read_history(model)


def _add_event(model, **fields):
    """Add an event, as a stranger may have made it, to the only file of events."""
    (path,) = (model / "logs/session_1/train").iterdir()
    with path.open("ab") as stream:
        RecordWriter(stream).write(Event(**fields).SerializeToString())


@pytest.mark.parametrize(
    ("wall_time", "step"),
    [
        *((time, 3) for time in (float("nan"), float("inf"), 1e308, -1.0)),
        *((1e9, step) for step in (-1, -(2**63), 2**63 - 1)),
    ],
)
def test_times_and_iterations_that_there_cannot_be_are_left_out(tmp_path, capsys, wall_time, step):
    model = tmp_path / "model"
    _save(model, 4)
    _log(model, 1, range(1, 3))
    summary = Summary(value=[Summary.Value(tag="batch_total", simple_value=1.0)])
    _add_event(model, wall_time=wall_time, step=step, summary=summary)
    began = SessionLog(status=SessionLog.START)
    _add_event(model, wall_time=wall_time, step=step, session_log=began)
    _add_event(model, wall_time=4.0, step=4, summary=summary)
    for words in ([], ["--json"], ["--graph", tmp_path / f"{step}.png", "--rate"]):
        code, _, err = _analyze(capsys, model, *words)
        assert code == 0
        assert "2 events of the logs have no time or no iteration that there can be" in err
    assert read_history(model).sessions[0].iterations_n.tolist() == [1, 2, 4]


def test_an_iteration_that_is_logged_again_takes_the_place_of_what_followed(tmp_path):
    model = tmp_path / "model"
    _save(model, 6)
    log = TensorBoardLog(model, 1, 1)
    for iteration in (1, 2, 3, 4, 3, 4, 5, 5, 2, 3):
        log.scalars({"batch_total": 1.0}, iteration)
    log.close()
    assert read_history(model).sessions[0].iterations_n.tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [10, 1 << 20, 3 << 20])
def test_what_follows_a_preview_is_read_however_large_its_picture_is(tmp_path, size):
    model = tmp_path / "model"
    _save(model, 4)
    log = TensorBoardLog(model, 1, 1)
    log.scalars({"batch_total": 1.0}, 1)
    log.picture("preview", lambda: (b"\xff" * size, (64, 64)), 1)
    for iteration in (2, 3, 4):
        log.scalars({"batch_total": 1.0}, iteration)
    log.close()
    assert read_history(model).sessions[0].iterations_n.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("declared", [1 << 40, (1 << 64) - 1, (1 << 20) + 1])
@pytest.mark.parametrize("has_them", [False, True], ids=["missing", "sparse"])
def test_a_record_of_a_terabyte_is_not_read(tmp_path, declared, has_them):
    model = tmp_path / "model"
    _save(model, 4)
    _log(model, 1, range(1, 5))
    (path,) = (model / "logs/session_1/train").iterdir()
    with path.open("ab") as stream:
        stream.write(struct.pack("<QI", declared, 0))
        if has_them:
            stream.truncate(1 << 41)
    assert len(read_history(model).sessions[0].times_n) == 4
    with path.open("r+b") as stream:  # nothing but a hole of the disk
        stream.truncate(path.stat().st_size // 2)
        stream.truncate(1 << 41)
    assert len(read_history(model).sessions[0].times_n) <= 4


def test_a_pipe_or_a_folder_in_the_place_of_events_is_no_file_of_events(tmp_path):
    model = tmp_path / "model"
    _save(model, 4)
    _log(model, 1, range(1, 5))
    os.mkfifo(model / "logs/session_1/train/events.out.tfevents.1")
    (model / "logs/session_1/train/events.out.tfevents.2").mkdir()
    (model / "logs/session_2").touch()
    os.mkfifo(model / "logs/session_3")
    for name in ("session_0", "session_01", "session_\u0661", "session_" + "9" * 200, "other"):
        shutil.copytree(model / "logs/session_1/train", model / f"logs/{name}", copy_function=_link)
    assert [one.number for one in read_history(model).sessions] == [1]


def _link(source, target):
    os.link(source, target)


def test_no_more_tags_are_kept_than_a_model_can_have(tmp_path):
    model = tmp_path / "model"
    _save(model, 500)
    log = TensorBoardLog(model, 1, 1)
    for iteration in range(1, 501):
        log.scalars({"batch_total": 1.0, f"batch_face_a_{iteration}": 1.0}, iteration)
    log.close()
    history = read_history(model, lambda tag: tag.startswith("batch_face"))
    assert len(history.sessions[0].losses) == 64


def test_many_sessions_are_told_apart_in_one_pass():
    """Comparing each of 20,000 files with each other would take minutes."""
    files = [
        _EventFile(session=n, is_mark=False, first_iteration=2 * n - 1) for n in range(1, 20_001)
    ]
    for file in files:
        file.iterations.extend(range(2 * file.session - 1, 2 * file.session + 3))
        file.counts.extend([1] * 4)
        file.times.extend([1.0] * 4)
    saved = [
        Session(number=n, started=0.0, batch_size=1, logs=True, iterations=2)
        for n in range(1, 20_001)
    ]
    _leave_out_undone(files, saved)
    assert {len(file.iterations) for file in files[:-1]} == {2}
    sessions = _sessions(files, saved, None)
    assert [one.number for one in sessions] == list(range(1, 20_001))


def test_a_table_of_sessions_whose_first_stands_for_many(tmp_path):
    """What was logged of those is shown one by one."""
    model = tmp_path / "model"
    state = TrainingState(trainer="original", iterations=12)
    for number, count in ((7, 10), (8, 2)):  # the first seven have made ten
        state.sessions.append(
            Session(number=number, started=1.0, batch_size=3, logs=True, iterations=count)
        )
    with ModelFolder(model) as folder:
        folder.save({"w": torch.zeros(2)}, None, state.to_dict())
    assert [one.number for one in read_history(model).sessions] == [7, 8]
    for number, iterations in ((5, range(1, 9)), (6, range(9, 13)), (8, range(11, 13))):
        _log(model, number, iterations)
    sessions = read_history(model).sessions
    assert {one.number: one.iterations_n.tolist() for one in sessions} == {
        5: list(range(1, 9)),
        6: [9, 10],
        8: [11, 12],
    }
    assert {one.batch_size for one in sessions} == {3}


def test_what_a_crash_undid_is_left_out(tmp_path):
    model = tmp_path / "model"
    _save(model, 5, 2)
    _log(model, 1, range(1, 9))  # crashed at 8, the last save was of 5
    _log(model, 2, range(6, 7))  # crashed before its first save, so that it came again
    _log(model, 2, range(6, 11))  # goes on: 7 are saved
    history = read_history(model, lambda tag: tag == "batch_face_a")
    one, two = history.sessions
    assert one.iterations_n.tolist() == [1, 2, 3, 4, 5]
    assert two.iterations_n.tolist() == [6, 7, 8, 9, 10]
    np.testing.assert_allclose(two.losses["batch_face_a"], two.iterations_n + 0.2, rtol=1e-6)
    assert history.tags == ["batch_face_a", "batch_face_b", "batch_total", "batch_weighted_a/ssim"]


def test_sessions_that_a_way_back_undid_are_left_out(tmp_path):
    model = tmp_path / "model"
    for session, iterations in ((1, range(1, 5)), (2, range(5, 9)), (3, range(9, 12))):
        _log(model, session, iterations)
    _log(model, 2, range(3, 6))  # after going back to iteration 2
    (model / "generations").mkdir()
    assert {one.number: one.iterations_n.tolist() for one in read_history(model).sessions} == {
        1: [1, 2],
        2: [3, 4, 5],
    }


def test_a_session_without_logs_ends_what_was_logged_before(tmp_path):
    model = tmp_path / "model"
    _save(model, 5, 2)
    _log(model, 1, range(1, 9))  # crashed at 8; then came session 2, with --no-logs
    one, two = read_history(model).sessions
    assert one.iterations_n.tolist() == [1, 2, 3, 4, 5]
    assert two.statistics().iterations == 2


@pytest.mark.parametrize("lost", [None, 2])
def test_sessions_that_are_no_longer_kept_apart_still_add_up(tmp_path, capsys, lost):
    """The first entry of the table stands for sessions 1 to 3; what is logged counts."""
    model = tmp_path / "model"
    state = TrainingState(trainer="original", iterations=14)
    for number, count in ((3, 9), (4, 5)):
        state.sessions.append(
            Session(number=number, started=5.0, batch_size=2, logs=True, iterations=count)
        )
    with ModelFolder(model) as folder:
        folder.save({"w": torch.zeros(2)}, None, state.to_dict())
    for session, first, last in ((1, 1, 5), (2, 6, 7), (3, 8, 9), (4, 10, 14)):
        if session != lost:
            _log(model, session, range(first, last + 1), began=1000.0 * session)
    history = read_history(model, lambda tag: tag == "batch_face_a")
    figures = [one.statistics() for one in history.sessions]
    numbers = [one.number for one in history.sessions]
    told = dict(zip(numbers, (one.iterations for one in figures), strict=True))
    assert told == ({1: 5, 2: 2, 3: 2, 4: 5} if lost is None else {3: 7, 4: 5})
    total = sum(told.values())
    assert total_statistics(figures).iterations == total
    code, out, _ = _analyze(capsys, model)
    assert code == 0
    assert re.search(rf"total .* {total} ", out)


def test_a_loss_that_is_not_always_logged(tmp_path):
    model = tmp_path / "model"
    _save(model, 3, 2)
    _log(model, 1, range(1, 4))
    log = TensorBoardLog(model, 2, 4)
    log.scalars({"batch_total": 1.0}, 4)
    log.scalars({"batch_mask_a": 3.0, "batch_total": 1.0}, 5)
    log.scalars({"batch_total": 1.0, "other": 2.0}, 6)
    log.close()
    history = read_history(model, lambda tag: tag in ("batch_face_a", "batch_mask_a"))
    assert set(history.sessions[0].losses) == {"batch_face_a"}
    np.testing.assert_array_equal(history.sessions[1].losses["batch_mask_a"], [np.nan, 3, np.nan])


def test_logs_that_lack_iterations_are_told_of(tmp_path, capsys):
    model = tmp_path / "model"
    _save(model, 9)
    _log(model, 1, range(1, 5))
    code, _, err = _analyze(capsys, model)
    assert code == 0
    assert (
        "the logs hold 4 of the 9 iterations of session 1; its statistics are those of the" in err
    )


def test_events_that_stand_for_several_iterations_count_as_such(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mien.core.console.tensorboard._FINENESS", 10)
    model = tmp_path / "model"
    _save(model, 60, 30)
    _log(model, 1, range(1, 66))  # crashed at 65, the last save was of 60
    _log(model, 2, range(61, 91))
    one, two = read_history(model, lambda tag: tag == "batch_face_a").sessions
    assert one.iterations_n[-1] == one.num_logged == 56, "the next event was of 57 to 62"
    assert two.iterations_n.tolist() == [66, 73, 81, 89, 90]
    assert two.counts_n.tolist() == [6, 7, 8, 8, 1]
    means = [63.7, 70.2, 77.7, 85.7, 90.2]
    np.testing.assert_allclose(two.losses["batch_face_a"], means, rtol=1e-6)
    code, table, err = _analyze(capsys, model, "--json", "--graph", tmp_path / "x.png", "--rate")
    assert code == 0
    second = json.loads(table)["sessions"][1]
    assert (second["iterations"], second["elapsed_s"]) == (30, 24)


def test_the_speed_of_a_long_training_counts_every_iteration():
    times = np.array([10.0, 14.0, 16.0])
    assert rate_per_iteration(times, 3, np.array([9, 8, 2])).tolist() == [12.0, 6.0]


def test_the_newest_whole_state_is_read(tmp_path):
    model = tmp_path / "model"
    _save(model, 5)
    _save(model, 5, 2)
    newest = model / "generations/7/state.json"
    newest.write_text(newest.read_text().replace("7", "8"))
    assert [one.number for one in read_history(model).sessions] == [1]
    (model / "generations/5/state.json").unlink()
    with pytest.raises(ValueError, match="holds no save whose state can be read; put back a copy"):
        read_history(model)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--trend"], "--trend is about graphs; add --graph FILE.png, or leave it out"),
        (["--smoothing", "0"], "--smoothing is about graphs"),
        (["--graph", "x.jpg"], "--graph must end in .png, got x.jpg"),
        (["--graph", "no/x.png"], "--graph no/x.png: No such file or directory"),
        (["--graph", "x.png", "--smoothing", "1"], "--smoothing must be from 0 to 0.99, got 1"),
        (["--graph", "x.png", "--smoothing", "nan"], "--smoothing must be from 0 to 0.99"),
        (["--graph", "x.png", "--rolling", "1"], "--rolling must be at least 2, got 1"),
        (["--graph", "x.png", "--rolling", "4"], "over 4 values needs more than 8, got 8"),
        (["--graph", "x.png", "--trend"], "a trend needs at least 10 values, got 8"),
        (["--graph", "x.png", "--range", "5"], "--range must be FIRST:LAST, such as 1000:5000"),
        (["--graph", "x.png", "--range", "5:2"], "--range must not end before it begins, got 5:2"),
        (["--graph", "x.png", "--range", "50:"], "no iteration from 50 to the last was logged"),
        (["--graph", "x.png", "--rate", "--range", "1:1"], "of at least two logged iterations"),
        (["--graph", "x.png", "--loss", "c"], "--loss c was not logged; there are a, b, face_a,"),
        (["--graph", "x.png", "--loss", "a", "--rate"], "--rate draws EG/s and --loss draws"),
        (["--json", "--csv", "-"], "--json and --csv - both print; leave one out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(trained, tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    code, out, err = _analyze(capsys, trained, *words)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_a_run_deletes_meanwhile_is_read_anew(tmp_path, monkeypatch):
    model = tmp_path / "model"
    _save(model, 5)
    listed = Generations.manifests

    def slow(generations, unreadable=None):
        found = listed(generations, unreadable)
        if (model / "generations/5").is_dir() and found:
            (model / "generations/5").rename(model / "generations/.5.trash")
            shutil.copytree(model / "generations/.5.trash", model / "generations/5-2")
        return found

    with ModelFolder(model, read_only=True) as folder:
        monkeypatch.setattr(Generations, "manifests", slow)
        assert folder.newest_state()["iterations"] == 5


def test_a_graph_that_cannot_be_written_whole_is_not_written(
    trained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "old.png").write_bytes(b"mine")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for words in (["--graph", tmp_path / "old.png", "--force"], ["--csv", tmp_path / "new.csv"]):
        code, _, err = _analyze(capsys, trained, *words)
        assert (code, err) == (
            2,
            f"mien analyze: {words[0]} {words[1]}: No space left on device\n",
        )
    assert (tmp_path / "old.png").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["old.png"]


def test_folders_that_hold_no_model(tmp_path, capsys):
    code, _, err = _analyze(capsys, tmp_path / "none")
    assert (code, err) == (2, f"mien analyze: model folder {tmp_path / 'none'} does not exist\n")
    code, _, err = _analyze(capsys, tmp_path)
    assert (code, err) == (
        2,
        f"mien analyze: nothing was trained in {tmp_path} yet; `mien train` does\n",
    )


@pytest.mark.parametrize(
    ("name", "panel", "line", "keys"),
    [
        ("batch_total", "total loss", "both sides", {"total"}),
        ("batch_face_a", "face loss", "A", {"face_a", "a"}),
        ("batch_face_b_1", "face loss of output 1", "B", {"face_b_1", "face_b", "b"}),
        ("batch_mask_b", "mask loss", "B", {"mask_b", "b"}),
        ("batch_weighted_a/ssim", "ssim, weighted", "A", {"weighted_a/ssim"}),
    ],
)
def test_tags(name, panel, line, keys):
    tag = Tag.parse(name)
    assert (tag.panel, tag.line, tag.keys) == (panel, line, keys)
    assert Tag.parse("keras") is None
