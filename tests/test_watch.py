"""What the page tells of a run, as far as it needs none of the page's packages."""

import json
import os
from pathlib import Path

from mien.cli.monitor.journal import Journal
from mien.cli.monitor.watch import Watch
from mien.core.run.checkpoint import ModelFolder
from mien.core.run.holder import holder
from mien.core.run.lock import LOCK
from mien.core.run.log import Reporter


def _told(folder: Path, session: int) -> Reporter:
    """The reports of a run that has begun."""
    reporter = Reporter(open(os.devnull, "w"))
    path = folder / f"logs/session_{session}/events.jsonl"
    reporter.keep_in(events=path, log_file=None, level="info")
    reporter.start({"trainer": "original"})
    return reporter


def test_a_lock_that_is_a_pipe_is_no_holder_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    assert holder(tmp_path) is None


def test_a_run_that_went_back_is_followed_though_its_number_is_lower(tmp_path):
    for session in (1, 2, 3):
        _told(tmp_path, session).stage("the stage is over")
        path = tmp_path / f"logs/session_{session}/events.jsonl"
        os.utime(path, (1e9 + session, 1e9 + session))
    seen = Journal(tmp_path)
    seen.update()
    assert (seen.session, list(seen.latest)) == (3, ["start", "stage"])
    _told(tmp_path, 2).warning("back at iteration 2")
    seen.update()
    assert (seen.session, list(seen.latest)) == (2, ["start", "warning"])


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
