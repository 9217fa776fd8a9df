"""Notifications at the end of a run, of a stage and of a failure, and what must never cause one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mien.cli import main
from mien.core.config import NotifyConfig, from_dict, to_toml
from mien.core.console import notify
from mien.core.console.crash_report import crash_report
from mien.core.console.notify import Notifier
from mien.core.console.reporter import Reporter

SECRET = "token-that-nobody-may-see"


@pytest.fixture
def inbox():
    """What arrives at a local webhook, and its URL."""
    arrived: list[dict] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self):
            arrived.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Webhook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield arrived, f"json://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def report_all(reporter: Reporter) -> None:
    reporter.warning("a face is blurred")
    reporter.stage("the loss has not fallen for 500 iterations")
    reporter.rollback("a loss is not a number; back to iteration 4")
    reporter.stop(iteration=9, reason="all iterations are done", exit_code=0)


def test_news_reach_a_webhook_in_their_order(inbox, tmp_path, capsys):
    arrived, url = inbox
    reporter = Reporter()
    reporter.notify_by(Notifier(NotifyConfig(url=url), tmp_path / "hero"))
    report_all(reporter)
    assert [message["message"] for message in arrived] == [
        "The loss has not fallen for 500 iterations",
        "Warning: a loss is not a number; back to iteration 4",
        "Stopped at iteration 9: all iterations are done",
    ]
    assert {message["title"] for message in arrived} == {"mien: hero"}
    assert capsys.readouterr().err == ""


def test_a_command_is_told_in_two_ways(tmp_path):
    said, read = tmp_path / "texts", tmp_path / "lines"
    command = f'echo "$MIEN_EVENT|$MIEN_TEXT|$MIEN_MODEL_DIR" >>"{said}"; cat >>"{read}"'
    reporter = Reporter()
    reporter.notify_by(Notifier(NotifyConfig(command=command), tmp_path))
    report_all(reporter)
    texts = said.read_text().splitlines()
    assert texts[-1] == f"stop|Stopped at iteration 9: all iterations are done|{tmp_path}"
    events = [json.loads(line) for line in read.read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage", "warning", "stop"]


def test_a_command_that_hangs_does_not_hold_the_end(tmp_path, capsys, monkeypatch):
    """All that the command has begun is ended: the pipe of a child alone would be waited for."""
    monkeypatch.setattr(notify, "_LAST_WAIT_S", 0.2)
    before = set(threading.enumerate())
    reporter = Reporter()
    reporter.notify_by(Notifier(NotifyConfig(command="sleep 60 & wait"), tmp_path))
    reporter.stop(iteration=9, reason="done", exit_code=0)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    assert "a notification was not sent: no answer within" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"command": "echo 'no such topic' >&2; exit 3"}, "ended with 3: no such topic"),
        ({"command": "sleep 60"}, "notify.command took more than"),
        ({"url": f"json://127.0.0.1:9/{SECRET}"}, "the service of notify.url did not take it"),
    ],
)
def test_what_is_not_sent_is_one_line_and_no_more(settings, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.2)
    reporter = Reporter()
    reporter.notify_by(Notifier(NotifyConfig(**settings), tmp_path))
    reporter.stop(iteration=9, reason="done", exit_code=0)
    told = capsys.readouterr()
    assert told.out == "Stopped at iteration 9: done\n"
    (line,) = told.err.splitlines()
    assert line.startswith("Warning: a notification was not sent: ")
    assert problem in line
    assert SECRET not in told.out + told.err


def test_a_url_of_no_known_kind_is_refused_without_telling_it(tmp_path):
    with pytest.raises(ValueError, match="^notify.url is of no known kind; [^\n]*$") as refused:
        Notifier(NotifyConfig(url=SECRET), tmp_path)
    assert SECRET not in str(refused.value)


def test_a_run_tells_its_end_and_keeps_the_address_to_itself(sides, tmp_path, inbox):
    arrived, url = inbox
    model_dir, words = tmp_path / "out", ["train", "-i", "1", "-m", str(tmp_path / "out")]
    words += ["--set", "model.options={width=8}", "-b", "2"]
    faces = ["-A", str(sides[0]), "-B", str(sides[1])]
    command = f"echo {SECRET} >/dev/null"
    secrets = ["--notify-url", f"{url}{SECRET}", "--set", f"notify.command={command}"]
    assert main([*words, *faces, *secrets]) == 0
    assert [message["message"] for message in arrived] == [
        "Stopped at iteration 1: all iterations are done"
    ]
    for path in model_dir.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_a_folder_of_a_stranger_notifies_nobody(sides, tmp_path):
    words = ["train", "-i", "1", "-m", str(tmp_path / "out"), "-b", "2"]
    words += ["--set", "model.options={width=8}", "-A", str(sides[0]), "-B", str(sides[1])]
    assert main(words) == 0
    seen = tmp_path / "seen"
    for config in tmp_path.glob("out/**/config.toml"):
        command = f"touch {seen}"
        text = config.read_text()
        assert 'command = ""' in text
        config.write_text(text.replace('command = ""', f'command = "{command}"'))
    assert main(words) in (0, 2)
    assert not seen.exists()


def test_a_crash_report_holds_no_address():
    config = from_dict({"notify": {"url": f'json://h/"{SECRET}', "command": f"say {SECRET}"}})
    assert SECRET in to_toml(config)
    assert SECRET not in crash_report(RuntimeError(f"say {SECRET}"), config, [])


def test_a_recipe_notifies_nobody(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "r"\ndescription = "d"\n[[stage]]\niterations = 1\n'
        'set = {notify = {command = "x"}}\n'
    )
    assert main(["recipe", "show", str(recipe)]) == 2
