"""The search for a learning rate: its numbers, and that it leaves nothing behind but the rate."""

import itertools
import json
import math
import signal
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import assert_same_bits, json_events, tiny_options
from oracle_numbers import oracle_cases

from mien.cli import main
from mien.core.console.outcome import Outcome
from mien.core.data.feed import Feed
from mien.core.training import lr_finder
from mien.core.training.lr_finder import STRENGTHS, Search, draw


@pytest.mark.oracle
@pytest.mark.parametrize("number", oracle_cases("optim/lr_finder.npz"))
def test_a_search_finds_what_the_reference_finds(oracle, number, monkeypatch):
    file = oracle("optim/lr_finder.npz")
    losses = file[f"{number}:loss"]
    num_updates, lowest, highest = file[f"{number}:steps_start_end"].tolist()
    monkeypatch.setattr(lr_finder, "LOWEST", lowest)
    monkeypatch.setattr(lr_finder, "HIGHEST", highest)
    search = Search(int(num_updates))
    assert search.rate(0) == lowest
    for loss in losses:
        if not search.add(float(loss)):
            break
    np.testing.assert_allclose(search.rates, file[f"{number}:lr_recorded"], rtol=1e-6)
    np.testing.assert_allclose(search.smoothed, file[f"{number}:smoothed"], rtol=1e-6)
    best = {strength: float(file[f"{number}:best_lr:{strength}"]) for strength in STRENGTHS}
    if any(map(math.isnan, best.values())):  # the reference found none
        with pytest.raises(ValueError, match="no learning rate was found"):
            search.found()
    else:
        assert search.found() == pytest.approx(best, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_search(bad):
    search = Search(100)
    assert search.add(0.5)
    assert not search.add(bad)
    assert len(search.rates) == len(search.smoothed) == 1


_LIGHTWEIGHT = ("-t", "lightweight", "--set", "model.options.width=8")


def _train(sides, model_dir, *more, model=_LIGHTWEIGHT):
    words = ["train", "-A", str(sides[0]), "-B", str(sides[1]), "-m", str(model_dir), *model]
    words += ["-b", "2", "--device", "cpu", "--json", "--set", "preview.preview_images=2"]
    return main([*words, "--set", "optimizer.lr_finder_iterations=100", *more])


def _events(capsys):
    events = json_events(capsys.readouterr().out)
    return {event["event"]: event for event in events}, [
        event["message"] for event in events if event["event"] == "warning"
    ]


def _assert_leaves_nothing_behind(sides, tmp_path, capsys, *more, **model):
    """A run with the finder has the bits of one that was given the rate which the finder found."""
    searched, given = tmp_path / "searched", tmp_path / "given"
    assert _train(sides, searched, "-i", "4", "-r", *more, **model) == 0
    found = _events(capsys)[0]["found_rates"]["rates"]["default"]
    rate = f"optimizer.learning_rate={found!r}"
    assert _train(sides, given, "-i", "4", "--set", rate, *more, **model) == 0
    assert _events(capsys)[0]["step"]["learning_rate"] == found
    assert_same_bits(searched, given)
    assert json.loads((searched / "state.json").read_text())["iterations"] == 4


@pytest.fixture
def _found(monkeypatch):
    """Whatever a search of a tiny model on few faces has seen, it finds the same."""
    rates = {"default": 1e-3, "aggressive": 2e-3, "extreme": 4e-3}
    monkeypatch.setattr(Search, "found", lambda self: rates)


@pytest.fixture
def _short(monkeypatch):
    """A search ends after 12 updates, at rates that move every weight."""
    original = Search.add
    monkeypatch.setattr(lr_finder, "LOWEST", 1e-4)
    monkeypatch.setattr(
        Search, "add", lambda self, loss: original(self, loss) and len(self.rates) < 12
    )


def test_a_run_after_a_search_equals_one_with_that_rate(sides, tmp_path, capsys):
    _assert_leaves_nothing_behind(
        sides, tmp_path, capsys, "--precision", "fp32", "-a", "3", "-b", "4"
    )


@pytest.mark.usefixtures("_found", "_short")
@pytest.mark.parametrize(
    "more",
    [("--precision", "bf16"), ("--precision", "fp16"), ("--set", "optimizer.overlap=on")],
    ids=lambda words: words[1],
)
def test_so_does_one_in_16_bits_or_with_overlap(sides, tmp_path, capsys, more):
    _assert_leaves_nothing_behind(sides, tmp_path, capsys, *more)


@pytest.mark.usefixtures("_found", "_short")
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_so_does_one_with_noise_and_batch_norms(sides, tmp_path, capsys, mode):
    options = tiny_options("phaze-a") | {"dec_norm": "batch", "dec_gaussian": True}
    model = ["-t", "phaze-a"]
    for name, value in options.items():
        model += ["--set", f"model.options.{name}={json.dumps(value)}"]
    _assert_leaves_nothing_behind(sides, tmp_path, capsys, "--precision", mode, model=model)


@pytest.mark.usefixtures("_found", "_short")
def test_the_rate_stays_for_all_iterations_of_an_update(sides, tmp_path, monkeypatch, capsys):
    rates = []
    original = lr_finder.Update.set_rate
    monkeypatch.setattr(
        lr_finder.Update, "set_rate", lambda self, rate: (rates.append(rate), original(self, rate))
    )
    words = ("--set", "optimizer.gradient_accumulation=2")
    words += ("--set", "optimizer.lr_finder_iterations=200")
    assert _train(sides, tmp_path / "model", "-r", "-i", "2", *words) == 0
    searched = rates[: rates.index(5e-5)]
    assert len(searched) == 12
    assert searched == pytest.approx([Search(100).rate(k) for k in range(len(searched))])


def test_the_loss_of_an_update_is_the_mean_of_its_iterations():
    named = SimpleNamespace(named=lambda rows: {"batch_total": rows[:, 0]})
    run = SimpleNamespace(step=SimpleNamespace(loss=named))
    rows_nv = np.array([[1, 9], [2, 9], [6, 9], [3, 9], [3, 9], [3, 9]], np.float32)
    assert lr_finder._means(run, rows_nv, 3) == [3.0, 3.0]
    assert lr_finder._means(run, rows_nv, 2) == [1.5, 4.5, 3.0]


@pytest.mark.usefixtures("_found")
@pytest.mark.parametrize("ends_after", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_losses_that_are_asked_for_in_blocks_are_the_same(sides, tmp_path, monkeypatch, ends_after):
    """Those of a GPU are; what runs past the end of the search is put back."""
    original, seen = lr_finder._losses, {"each": [], "blocks": []}
    for name, device in (("each", "cpu"), ("blocks", "cuda")):

        def losses(run, search, num_updates, name=name, device=device):
            here, run.device = run.device, SimpleNamespace(type=device)
            for loss in itertools.islice(original(run, search, num_updates), ends_after):
                seen[name].append(loss)
                yield loss
            run.device = here

        monkeypatch.setattr(lr_finder, "_losses", losses)
        assert _train(sides, tmp_path / name, "-r", "-i", "2") == 0
    assert len(seen["each"]) >= 40
    assert seen["each"] == seen["blocks"]
    assert_same_bits(tmp_path / "each", tmp_path / "blocks")


@pytest.fixture
def sees(monkeypatch):
    """A function that sets what the finder sees, in place of training."""

    def of(values):
        monkeypatch.setattr(lr_finder, "_losses", lambda *_: iter(values))

    return of


_FALLS = [1.0 - 0.005 * i for i in range(70)] + [100.0] * 30
_NEVER_FALLS = [1.0 + 0.1 * i for i in range(100)]


def _expected(divisor=10.0):
    search = Search(100)
    for loss in _FALLS:
        if not search.add(loss):
            break
    return search.rates[int(np.argmin(search.smoothed))] / divisor


def test_a_found_rate_stays_until_another_is_given(sides, tmp_path, capsys, sees):
    model = tmp_path / "model"
    sees(_FALLS)
    words = ("-r", "-i", "1", "--set", "optimizer.lr_finder_strength=aggressive")
    assert _train(sides, model, *words, "--set", "optimizer.learning_rate=2e-4") == 0
    events, warnings = _events(capsys)
    rate = _expected(5.0)
    assert events["found_rates"]["chosen"] == "aggressive"
    assert events["found_rates"]["rates"]["aggressive"] == pytest.approx(rate)
    assert events["step"]["learning_rate"] == pytest.approx(rate)
    start = events["start"]
    assert (start["learning_rate"], start["learning_rate_is_found"]) == (2e-4, False)
    assert warnings == []

    for more in ((), ("-r",), ("-r", "--set", "optimizer.learning_rate=2e-4")):
        assert main(["train", "-m", str(model), "-i", "1", "--json", *more]) == 0
        events, warnings = _events(capsys)
        assert events["step"]["learning_rate"] == pytest.approx(rate), more
        assert events["start"]["learning_rate"] == pytest.approx(rate)
        assert events["start"]["learning_rate_is_found"]
        assert warnings == []

    given = ("--set", "optimizer.learning_rate=2e-4")
    assert main(["train", "-m", str(model), "-i", "1", "--json", *given]) == 0
    told = json_events(capsys.readouterr().out)
    notices = [event["message"] for event in told if event["event"] == "notice"]
    (changes,) = (event["changes"] for event in told if event["event"] == "start")
    assert [e["learning_rate"] for e in told if e["event"] == "step"] == [2e-4]
    assert f"the learning rate is 0.0002, as set, in place of {rate:g}, as found" in notices[0]
    finder = {"name": "optimizer.use_lr_finder", "old": True, "new": False, "note": None}
    assert finder in changes
    assert main(["train", "-m", str(model), "-i", "1", "--json"]) == 0
    events, warnings = _events(capsys)
    assert events["step"]["learning_rate"] == 2e-4
    assert warnings == []

    assert main(["train", "-m", str(model), "-i", "1", "--json", "-r"]) == 0
    assert _events(capsys)[0]["step"]["learning_rate"] == pytest.approx(rate)
    both = ("-r", "--set", "optimizer.learning_rate=3e-4")
    assert main(["train", "-m", str(model), "-i", "1", "--json", *both]) == 0
    assert _events(capsys)[0]["step"]["learning_rate"] == 3e-4


def test_the_finder_is_for_new_models(sides, tmp_path, capsys):
    model = tmp_path / "model"
    assert _train(sides, model, "-i", "1") == 0
    capsys.readouterr()
    assert _train(sides, model, "-i", "1", "-r") == 0
    events, warnings = _events(capsys)
    assert events["step"]["learning_rate"] == 5e-5
    assert len(warnings) == 1
    assert "it is for a new model, and this one was trained without" in warnings[0]
    assert "the learning rate is 5e-05, as set" in warnings[0]
    assert main(["train", "-m", str(model), "-i", "1", "--json"]) == 0
    assert _events(capsys)[1] == [], "it was said once"


def test_a_warm_up_rises_to_the_found_rate(sides, tmp_path, capsys, sees):
    sees(_FALLS)
    assert _train(sides, tmp_path / "model", "-r", "-i", "2", "-a", "4") == 0
    events, _ = _events(capsys)
    assert events["step"]["learning_rate"] == pytest.approx(_expected() * 2 / 4)


def _names(model_dir):
    return {path.name for path in model_dir.iterdir()}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (_NEVER_FALLS, "below 1e-09; raise optimizer.lr_finder_iterations from 100, or leave"),
        ([1.0, math.nan], "no learning rate was found: that of optimizer.lr_finder_strength"),
        ([math.nan], "no learning rate was found: the first loss is not a number; leave"),
    ],
    ids=["never falls", "second is nan", "first is nan"],
)
def test_a_search_without_a_result_is_one_line_and_deletes_nothing(
    sides, tmp_path, capsys, sees, losses, message
):
    model = tmp_path / "model"
    sees(losses)
    words = ("-r", "-i", "1", "--set", "optimizer.lr_finder_mode=graph_and_set")
    assert _train(sides, model, *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert "give optimizer.learning_rate" in err
    pictures = list(model.glob("learning_rate_finder_*.png"))
    assert bool(pictures) == (len(losses) > 11), "it shows why"
    assert {"config.toml", "faces"} <= _names(model)
    assert _train(sides, model, "-i", "1") == 0, "the folder is still good for a new model"


def test_a_loss_that_is_nan_in_training_is_no_result(sides, tmp_path, capsys, monkeypatch):
    original = Feed.next

    def poisoned(self, faces_seen):
        batch = original(self, faces_seen)
        batch.input_nchw[0, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(Feed, "next", poisoned)
    assert _train(sides, tmp_path / "model", "-r", "-i", "1") == 2
    assert "the first loss is not a number" in capsys.readouterr().err


def test_steps_that_the_search_left_out_do_not_halt_the_run(sides, tmp_path, monkeypatch):
    """Not-a-number in the search counts as a skipped step, which would halt training in fp32."""
    original = Feed.next

    def poisoned(self, faces_seen):
        batch = original(self, faces_seen)
        if faces_seen["a"] == 2 * 60:
            batch.input_nchw[0, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(Feed, "next", poisoned)
    monkeypatch.setattr(lr_finder, "_LEAST_RATE", 0.0)
    assert _train(sides, tmp_path / "model", "-r", "-i", "2", "--precision", "fp32") == 0


def test_too_few_updates_are_refused(sides, tmp_path, capsys):
    words = ("-r", "-i", "1", "--set", "optimizer.gradient_accumulation=4")
    assert _train(sides, tmp_path / "model", *words) == 2
    err = capsys.readouterr().err
    assert "optimizer.lr_finder_iterations must be at least 400 (100 updates) with " in err
    assert "optimizer.gradient_accumulation 4, got 100" in err


def test_graph_and_exit_leaves_a_picture_and_no_model(sides, tmp_path, capsys, sees):
    model = tmp_path / "model"
    sees(_FALLS)
    words = ("-r", "-i", "3", "--set", "optimizer.lr_finder_mode=graph_and_exit")
    assert _train(sides, model, *words) == 0
    events, _ = _events(capsys)
    assert events["stop"]["exit_code"] == 0
    assert events["stop"]["iteration"] == 0
    assert "step" not in events
    (picture,) = model.glob("learning_rate_finder_*.png")
    assert events["found_rates"]["picture"] == str(picture)
    assert cv2.imread(str(picture)).shape[2] == 3
    assert not {"generations", "state.json", "preview.png"} & _names(model)
    assert _train(sides, model, "-i", "1") == 0
    assert json.loads((model / "state.json").read_text())["iterations"] == 1
    assert picture.exists()


def test_graph_and_set_draws_and_trains(sides, tmp_path, capsys, sees):
    model = tmp_path / "model"
    sees(_FALLS)
    words = ("-r", "-i", "1", "--set", "optimizer.lr_finder_mode=graph_and_set")
    assert _train(sides, model, *words) == 0
    events, _ = _events(capsys)
    assert events["step"]["learning_rate"] == pytest.approx(_expected())
    assert len(list(model.glob("learning_rate_finder_*.png"))) == 1


def test_the_graph_shows_three_dots_in_their_colours(tmp_path):
    search = Search(100)
    for loss in _FALLS:
        if not search.add(loss):
            break
    draw(search, tmp_path / "graph.png")
    pixels_hwc = cv2.imread(str(tmp_path / "graph.png"))[..., ::-1]
    for color in ((0, 128, 0), (255, 215, 0), (255, 0, 0)):
        assert (pixels_hwc == color).all(-1).sum() > 20, color


@pytest.mark.usefixtures("_found", "_short")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_search_and_the_same_line_begins_it_anew(
    sides, tmp_path, capsys, monkeypatch, number
):
    model, words = tmp_path / "model", ("-r", "-i", "3")

    def losses(*_):
        yield 1.0
        signal.raise_signal(number)
        yield 1.0
        pytest.fail("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr(lr_finder, "_losses", losses)
        assert _train(sides, model, *words) == Outcome.STOPPED
    events, _ = _events(capsys)
    assert events["stop"]["reason"] == f"{number.name} received before training began"
    assert "generations" not in _names(model)
    assert _train(sides, model, *words) == 0
    events, _ = _events(capsys)
    assert events["stop"]["iteration"] == 3
    assert events["found_rates"]["chosen"] == "default"


def test_a_dry_run_searches_nothing(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lr_finder, "_losses", lambda *_: pytest.fail("it searched"))
    assert _train(sides, tmp_path / "model", "-r", "--dry-run") == 0
    assert not (tmp_path / "model").exists()
