"""Steering of a run: settings changed while training goes on, and pauses; by keys and a page."""

import json
import os
import pty
import signal
import tty
import weakref

import pytest
from conftest import assert_same_bits, json_events, train_words

from mien.cli import main
from mien.core.checkpoint.left_request import leave_request, take_left_requests
from mien.core.checkpoint.lock import acquire
from mien.core.checkpoint.lock_owner import lock_owner
from mien.core.config import all_settings
from mien.core.config.live import MAIN_SETTINGS, live_settings, parse_change
from mien.core.console.keyboard import Keyboard
from mien.core.console.reporter import Reporter
from mien.core.console.requests import Requests
from mien.core.console.settings_menu import SettingsMenu
from mien.core.console.status_line import fitted
from mien.core.data.feed import Feed
from mien.core.training import unattended
from mien.core.training.training_data import open_sides


def _train(sides, model_dir, *more):
    words = train_words(sides, model_dir, "-b", "4", "--set", "train.log_interval=1", "--json")
    return main([*words, *more])


@pytest.fixture
def during(monkeypatch):
    """A function that has things done, by the running program's requests, before iterations."""
    actions, noted = {}, []
    enter, following, made = Requests.__enter__, Feed.next, Reporter.__init__

    def make(self, *given, **named):
        made(self, *given, **named)
        self.has_status_line = True  # as on a terminal: the menu is there

    def next_batch(self, faces_seen):
        # Once: after a change the next session makes the batch of this iteration again.
        actions.pop(faces_seen["a"] // 4 + 1, lambda _requests: None)(noted[-1])
        return following(self, faces_seen)

    monkeypatch.setattr(Requests, "__enter__", lambda self: noted.append(self) or enter(self))
    monkeypatch.setattr(Feed, "next", next_batch)
    monkeypatch.setattr(Reporter, "__init__", make)
    return actions.update


def _settings(model_dir):
    pointer = json.loads((model_dir / "state.json").read_text())
    newest = model_dir / "generations" / pointer["generation"] / "state.json"
    return [each["settings"] for each in json.loads(newest.read_text())["sessions"]]


def test_changes_by_keys_last_and_equal_a_stop_and_a_start_with_them(
    sides, tmp_path, during, capsys, monkeypatch
):
    live, stopped = tmp_path / "live", tmp_path / "stopped"
    openings = []

    def opening(*given, **named):
        openings.append(given)
        return open_sides(*given, **named)

    monkeypatch.setattr("mien.core.training.training_data.open_sides", opening)
    report = Reporter.pause

    def reporting(self, *, iteration, resumed_by):
        report(self, iteration=iteration, resumed_by=resumed_by)
        if resumed_by:
            os.kill(os.getpid(), signal.SIGCONT)

    monkeypatch.setattr(Reporter, "pause", reporting)
    # A flag holds for its session; what is set live takes its place, and a pause of the same step
    # comes before it.
    keys = ("c2\rtrue\r", "c1\r1e-4\r", "p")
    during({3: lambda requests: [requests.press(each) for each in keys]})
    assert _train(sides, live, "-i", "6", "--no-warp") == 0
    assert len(openings) == 1, "the faces are read once"
    events = json_events(capsys.readouterr().out)
    changes = [event for event in events if event["event"] == "change"]
    assert [(each["name"], each["old"], each["new"], each["by"]) for each in changes] == [
        ("augment.warp", False, True, "keyboard"),
        ("optimizer.learning_rate", 5e-5, 1e-4, "keyboard"),
    ]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind in ("pause", "resume", "change", "stop")] == [
        *("pause", "resume", "change", "change", "stop")
    ]
    assert events[-1]["iteration"] == 6
    logs = [(live / f"logs/session_{n}/events.jsonl").read_text() for n in (1, 2)]
    assert logs[0].count('"change"') == 2
    assert [each["augment"]["warp"] for each in _settings(live)] == [False, True]
    at = changes[0]["iteration"]
    assert _train(sides, stopped, "-i", str(at), "--no-warp") == 0
    more = ("--set", "augment.warp=true", "--set", "optimizer.learning_rate=1e-4")
    assert _train(sides, stopped, "-i", str(6 - at), *more) == 0
    assert_same_bits(live, stopped)
    assert main(["train", "-m", str(live), "-i", "1"]) == 0
    assert _settings(live)[-1]["optimizer"]["learning_rate"] == 1e-4, "the model has kept it"


def test_a_page_s_changes_are_refused_in_one_line_or_taken(sides, tmp_path, during, capsys):
    model_dir = tmp_path / "model"

    def ask_in_vain(_requests):
        for change in (
            "optimizer.learning_rate=7",
            "augment.warq=false",
            "model.trainer=dfaker",
            "train.iterations=9",
            "loss.loss_function_2=lpips_vgg16",
            "augment.flip=true",
        ):
            leave_request(model_dir, os.getpid(), change)
        leave_request(model_dir, 1, "augment.flip=false")
        os.kill(os.getpid(), signal.SIGRTMIN)

    def ask(_requests):
        leave_request(model_dir, os.getpid(), "loss.eye_multiplier = 5")
        os.kill(os.getpid(), signal.SIGRTMIN)

    def ask_too_late(_requests):
        leave_request(model_dir, os.getpid(), "loss.mouth_multiplier=4")
        leave_request(model_dir, os.getpid(), "sheet")
        os.kill(os.getpid(), signal.SIGRTMIN)

    during({2: ask_in_vain, 4: ask, 5: ask_too_late})
    assert _train(sides, model_dir, "-i", "5", "--set", "preview.style=faceswap") == 0
    events = json_events(capsys.readouterr().out)
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert said[-1].startswith("loss.mouth_multiplier was not changed, as the session ended")
    assert said[-1].endswith("start again with --set loss.mouth_multiplier=4")
    said = [message for message in said if message.startswith("nothing was changed")]
    assert len(said) == 5, "one setting is as it was"
    assert "must be a number from 1e-06 to 0.01, got 7" in said[0]
    assert "did you mean augment.warp" in said[1]
    assert "is fixed in a model" in said[2]
    assert "start again with --set train.iterations=VALUE" in said[3]
    assert "lpips" in said[4]
    (change,) = (event for event in events if event["event"] == "change")
    assert (change["name"], change["new"], change["by"]) == ("loss.eye_multiplier", 5, "page")
    assert [each["loss"]["eye_multiplier"] for each in _settings(model_dir)] == [3, 5]
    assert not list(model_dir.glob(".request-*"))
    (sheet,) = (event for event in events if event["event"] == "sheet")
    assert (sheet["iteration"], sheet["path"]) == (5, str(model_dir / "sheet.png"))
    assert main(["preview", str(model_dir), "--style", "sheet", "-o", f"{tmp_path}/x.png"]) == 0
    assert (tmp_path / "x.png").read_bytes() == (model_dir / "sheet.png").read_bytes()


def test_a_setting_of_the_recipe_s_stage_is_left_to_it(sides, tmp_path, during, capsys):
    recipe = tmp_path / "one.toml"
    recipe.write_text("[[stage]]\niterations = 4\nset.augment.warp = false\n")
    during({3: lambda requests: requests.press("c2\rtrue\r")})
    assert _train(sides, tmp_path / "model", "--recipe", str(recipe)) == 0
    assert "augment.warp is set by the stages of the recipe" in capsys.readouterr().out


def test_only_plain_files_are_taken_as_changes(tmp_path):
    (tmp_path / "secret").write_text("augment.warp=false")
    (tmp_path / f".request-{os.getpid()}-1").symlink_to(tmp_path / "secret")
    (tmp_path / f".request-{os.getpid()}-2").write_bytes(b"x" * 5000)
    leave_request(tmp_path, os.getpid(), "augment.warp=true")
    with pytest.raises(ValueError, match="has 1000 bytes at most, got 1014; shorten it"):
        leave_request(tmp_path, os.getpid(), f"augment.warp={1001 * ' '}")
    assert take_left_requests(tmp_path) == ["augment.warp=true"]
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_every_free_setting_of_what_is_trained_can_be_changed_to_its_default():
    settings = live_settings()
    assert set(MAIN_SETTINGS) <= settings.keys()
    assert all(not spec.locked for spec in settings.values())
    for name, spec in settings.items():
        text = json.dumps(spec.default)
        assert parse_change(f"{name}={text}") == (spec, spec.default)
    assert not settings.keys() & {spec.full_name for spec in all_settings() if spec.is_private}
    for text in ("augment.warp=true\n[loss]", "augment.warp=true\x1b[2J"):
        with pytest.raises(ValueError, match="in one line without control characters, got 'augm"):
            parse_change(text)


def test_a_refused_value_is_asked_for_again_and_its_enter_ends_nothing(
    sides, tmp_path, during, capsys
):
    # Seen as a terminal has them: the second value comes once the first one was refused.
    def on_terminal(requests):
        requests.press("c1\r7\r")

    during({2: on_terminal, 3: lambda requests: requests.press("1e-4\r")})
    assert _train(sides, tmp_path / "model", "-i", "5") == 0
    events = json_events(capsys.readouterr().out)
    assert any(
        "must be a number from 1e-06 to 0.01, got 7" in event.get("message", "") for event in events
    )
    (change,) = (event for event in events if event["event"] == "change")
    assert (change["name"], change["new"]) == ("optimizer.learning_rate", 1e-4)
    assert (events[-1]["iteration"], events[-1]["exit_code"]) == (5, 0)


class TestMenu:
    @pytest.fixture
    def menu(self):
        self.lines, self.prompts = [], []
        values = {"augment.warp": "true", "augment.flip": "true", "loss.eye_multiplier": "3"}
        return SettingsMenu(values, 2, write=self.lines.append, prompt=self.prompts.append)

    def test_a_number_a_part_of_a_name_and_a_value_make_a_change(self, menu):
        menu.open()
        assert self.lines == ["1  augment.warp = true", "2  augment.flip = true"]
        assert menu.press("eyx\x7fe\r8") == []
        assert self.prompts[-1] == "loss.eye_multiplier = 3, new value (Enter, Esc leaves): 8_"
        assert menu.press("\r") == ["loss.eye_multiplier=8"]
        assert (menu.is_open, self.prompts[-1]) == (False, "")

    def test_a_value_is_asked_for_again(self, menu):
        menu.open()
        assert menu.press("1\rno\r") == ["augment.warp=no"]
        menu.ask_again("augment.warp")
        assert self.prompts[-1] == "augment.warp = true, new value (Enter, Esc leaves): _"
        assert menu.press("false\r") == ["augment.warp=false"]
        menu.ask_again("loss.nosuch")
        assert not menu.is_open

    @pytest.mark.parametrize("keys", ["\x1b", "1\r\x1b", "\r", "1\r\r", "xyz\x1bfalse\r"])
    def test_it_is_left_without_a_change(self, menu, keys):
        menu.open()
        assert menu.press(keys) == []
        assert not menu.is_open

    def test_a_word_of_several_settings_or_of_none_is_answered(self, menu):
        menu.open()
        menu.press("augment\rnone\r")
        assert self.lines[-2] == "augment may be augment.warp, augment.flip"
        assert self.lines[-1] == "no setting that can be changed now has none in its name"
        assert menu.is_open


def test_each_key_is_answered_and_enter_in_the_menu_ends_nothing():
    requests, answers = Requests(), []
    requests.echo = answers.append
    requests.menu = SettingsMenu(
        {"augment.warp": "true"}, 1, write=answers.append, prompt=lambda _text: None
    )
    requests.press("s?c1\rfalse\r")
    assert requests.take() == {"save", "keys"}
    assert requests.take_changes() == ["augment.warp=false"]
    assert answers == ["Saving after this step...", "1  augment.warp = true"]
    assert requests.stop.signal_name is None
    requests.press("\r")
    assert requests.stop.signal_name == "Enter"
    assert answers[-1] == "Saving after this step, then training ends..."
    requests.press("c")
    requests.begin_pause()
    requests.press("p")
    assert requests.take() == {"pause"}, "the menu is closed, and does not take the key"
    requests.press("c1\rtrue\r")
    assert requests.take_changes() == ["augment.warp=true"], "it opens in a pause, too"
    requests.press("sp")
    requests.wait(list)
    assert answers[-1] == "Paused: p or space goes on, c changes a setting, Enter ends"


def test_arrows_and_function_keys_are_no_letters():
    outer, inner = pty.openpty()
    tty.setcbreak(inner)
    keyboard = Keyboard(inner)
    keyboard._original = []  # as in the foreground, which a test is not
    # Right, F1, F4 with shift, F1 of Linux's own console, and a paste; cut nowhere.
    os.write(outer, b"\x1b[C\x1bOP\x1b[1;2S\x1b[[A\x1b[200~" * 20 + b"s\x1b")
    assert keyboard.keys() == "s\x1b"
    os.close(outer)
    os.close(inner)


def test_no_menu_opens_where_it_could_not_be_seen():
    requests = Requests()
    requests.begin_session(None, can_suspend=True)
    requests.press("c\r")
    assert (requests.take_changes(), requests.stop.signal_name) == ([], "Enter")


def test_the_hint_is_there_where_it_fits():
    assert fitted("one | two", 80, "? keys") == "one | two | ? keys"
    assert fitted("one | two", 15, "? keys") == "one | two"


def test_a_pause_frees_the_model_until_a_signal_a_page_a_key_or_a_stop_ends_it(
    sides, tmp_path, during, capfd, monkeypatch
):
    model_dir, models, stopped, ways = tmp_path / "model", [], [], []
    trainer, report = unattended.Trainer, Reporter.pause

    def training(setup, *others):
        models.append(weakref.ref(setup.model))
        return trainer(setup, *others)

    def leave(text):
        leave_request(model_dir, os.getpid(), text)
        os.kill(os.getpid(), signal.SIGRTMIN)

    def press(keys):
        return lambda requests: requests.press(keys)

    ends = [
        lambda: os.kill(os.getpid(), signal.SIGCONT),
        lambda: leave("resume"),
        lambda: os.kill(os.getpid(), signal.SIGCONT),
        lambda: [leave("augment.flip=false"), os.kill(os.getpid(), signal.SIGTERM)],
    ]

    def reporting(self, *, iteration, resumed_by):
        report(self, iteration=iteration, resumed_by=resumed_by)
        if resumed_by:
            assert [model() for model in models] == [None] * len(models)
            assert lock_owner(model_dir).is_running, "the folder stays this process's"
            with pytest.raises(ValueError, match=rf"{os.getpid()}, which is paused; have it go on"):
                acquire(model_dir)
            ways.append(resumed_by)
            ends.pop(0)()

    monkeypatch.setattr(unattended, "Trainer", training)
    monkeypatch.setattr(Reporter, "pause", reporting)
    # Under a shell it stops here; a test has none.
    monkeypatch.setattr(Requests, "_stop_here", lambda _self: stopped.append(True))
    suspend = {7: lambda _requests: os.kill(os.getpid(), signal.SIGTSTP)}
    during({3: press("p"), 5: lambda _requests: leave("pause"), **suspend, 9: press(" ")})
    assert _train(sides, model_dir, "-i", "20") == 4
    said, told_at_once = capfd.readouterr()
    events = json_events(said)
    told = [event["event"] for event in events if event["event"] in ("pause", "resume", "stop")]
    assert told == ["pause", "resume"] * 3 + ["pause", "stop"]
    assert len(stopped) == 1
    by_signal = f"`kill -CONT {os.getpid()}`"
    assert ways == [by_signal, by_signal, "fg or SIGCONT", by_signal], "there is no keyboard"
    assert events[-1]["reason"] == "SIGTERM received; the state is saved"
    assert "please wait" not in told_at_once, "all is saved"
    assert events[-2]["message"].startswith("augment.flip was not changed, as the session ended")
    at = events[-1]["iteration"]
    straight = tmp_path / "straight"
    assert _train(sides, straight, "-i", str(at)) == 0
    assert_same_bits(model_dir, straight)


def test_a_pause_is_ended_by_keys_of_its_own_and_ctrl_z_stops_at_once_where_none_can_be(
    monkeypatch,
):
    requests, stopped = Requests(), []
    monkeypatch.setattr(Requests, "_stop_here", lambda _self: stopped.append(True))
    requests.press("p")
    requests.wait(lambda: pytest.fail("nothing was left"))
    requests.press("\n")
    requests.wait(lambda: pytest.fail("nothing was left"))
    assert requests.stop.signal_name == "Enter"
    requests = Requests()
    keys = ["", "x", "m", " "]
    requests.wait(list, lambda: keys.pop(0), every_s=0.001)
    assert not keys, "the keys of a window are looked at again and again"
    with requests:
        os.kill(os.getpid(), signal.SIGRTMIN)
        requests.wait(lambda: ["augment.flip=false", "resume"])
        assert requests.take_left_in_pause() == ["augment.flip=false"], "made when it goes on"
        os.kill(os.getpid(), signal.SIGTSTP)
        assert (len(stopped), requests.take()) == (1, set())
        requests.begin_session(None, can_suspend=True)
        os.kill(os.getpid(), signal.SIGTSTP)
        assert (len(stopped), requests.take()) == (1, {"pause"})
        os.kill(os.getpid(), signal.SIGTSTP)
        assert len(stopped) == 2, "a second one does not wait"
