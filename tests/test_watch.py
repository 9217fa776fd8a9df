"""What the page tells of a run, as far as it needs none of the page's packages."""

import json
import os
from pathlib import Path

from mien.cli.monitor.journal import Journal
from mien.cli.monitor.watch import Watch
from mien.core.checkpoint.lock import LOCK
from mien.core.checkpoint.lock_owner import lock_owner
from mien.core.checkpoint.model_folder import ModelFolder
from mien.core.console.reporter import Reporter


def _told(folder: Path, session: int) -> Reporter:
    """The reports of a run that has begun."""
    reporter = Reporter(open(os.devnull, "w"))
    path = folder / f"logs/session_{session}/events.jsonl"
    reporter.keep_in(events=path, log_file=None, level="info")
    reporter.start({"trainer": "original"})
    return reporter


def test_a_lock_that_is_a_pipe_is_no_holder_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    assert lock_owner(tmp_path) is None


def test_a_run_that_went_back_is_followed_though_its_number_is_lower(tmp_path):
    for session in (1, 2, 3):
        _told(tmp_path, session).save(iteration=session, path=tmp_path)
        path = tmp_path / f"logs/session_{session}/events.jsonl"
        os.utime(path, (1e9 + session, 1e9 + session))
    seen = Journal(tmp_path)
    seen.update()
    assert (seen.session, list(seen.latest)) == (3, ["start", "save"])
    _told(tmp_path, 2).warning("back at iteration 2")
    seen.update()
    assert (seen.session, [event["event"] for event in seen.events]) == (
        2,
        ["start", "save", "start", "warning"],
    )


def test_a_failure_of_ours_is_told_at_once(tmp_path, capsys):
    with ModelFolder(tmp_path / "model") as folder:
        reporter = _told(folder.path, 1)
        reporter.crash(error="ZeroDivisionError", path=folder.path / "crash_report_1.txt")
    status = Watch(tmp_path / "model", may_ask=False).status()
    assert status["state"] == "failed"
    assert status["latest"]["crash"]["error"] == "ZeroDivisionError"
    assert "mien itself has failed" in capsys.readouterr().err


def test_a_time_that_no_clock_shows_is_no_event(tmp_path):
    path = tmp_path / "logs/session_1/events.jsonl"
    path.parent.mkdir(parents=True)
    times = (10**400, -1, 1e12)
    path.write_text("".join(json.dumps({"event": "x", "time": time}) + "\n" for time in times))
    status = Watch(tmp_path, may_ask=False).status()
    assert (status["unreadable"], status["events"]) == (len(times), [])


def test_a_journal_is_followed_when_its_file_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.event_files._MOST_BYTES", 2000)
    reporter = _told(tmp_path, 1)
    seen = Journal(tmp_path)
    for number in range(100):
        reporter.warning(f"number {number}")
        if number % 7 == 0:
            seen.update()
    seen.update()
    later = Journal(tmp_path)
    later.update()
    told = {
        journal: [event.get("message") for event in journal.events] for journal in (seen, later)
    }
    assert told[seen] == [None, *(f"number {number}" for number in range(100))]
    assert "start" in seen.latest
    assert seen.unreadable == later.unreadable == 0
    assert told[later][-1] == "number 99"
    assert len(told[later]) > 30, "also from the file before"


def test_of_what_was_put_aside_no_more_is_read_than_of_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("mien.core.console.event_files._MOST_BYTES", 2000)
    monkeypatch.setattr("mien.cli.monitor.journal._MAX_BYTES", 1000)
    reporter = _told(tmp_path, 1)
    while not (tmp_path / "logs/session_1/events.jsonl.1").exists():
        reporter.warning("once more")
    seen = Journal(tmp_path)
    seen.update()
    assert 5 < len(seen.events) < 14
    assert seen.unreadable == 0


def test_a_journal_that_is_put_aside_at_this_moment_keeps_its_session(tmp_path):
    _told(tmp_path, 1)
    _told(tmp_path, 2).save(iteration=2, path=tmp_path)
    seen = Journal(tmp_path)
    seen.update()
    path = tmp_path / "logs/session_2/events.jsonl"
    path.rename(path.with_name("events.jsonl.1"))
    seen.update()
    assert (seen.session, list(seen.latest)) == (2, ["start", "save"])
    path.write_text('{"event": "stop", "time": 1}\n')
    seen.update()
    assert (seen.session, list(seen.latest)) == (2, ["start", "save", "stop"])
