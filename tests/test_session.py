"""The run's state survives JSON and refuses disorder; resuming keeps what is locked."""

import json
from dataclasses import dataclass

import pytest

from mien import models
from mien.core.config import Config, all_settings, from_dict, to_dict
from mien.core.run.session import SCHEMA, TrainingState, resolve_resume
from mien.models.options import Options, option


def trained_state() -> TrainingState:
    state = TrainingState(trainer="original")
    state.begin_session(Config(), started=1000.5)
    state.advance(3)
    state.add_losses(1.5, 3)
    state.close_interval()
    state.begin_session(from_dict({"train": {"batch_size": 4}}), started=2000.0)
    state.advance(2)
    state.parts["scaler"] = {"scale": 65536.0, "good_steps": 7}
    return state


def as_json(state: TrainingState) -> dict:
    return json.loads(json.dumps(state.to_dict(), allow_nan=False))


def test_round_trip():
    state = trained_state()
    again = TrainingState.from_dict(as_json(state))
    assert again == state
    assert again.to_dict() == state.to_dict()


def test_counters_follow_the_sessions_batch_size():
    state = trained_state()
    assert state.iterations == 5
    assert state.faces_seen == {"a": 3 * 16 + 2 * 4, "b": 3 * 16 + 2 * 4}
    assert [(s.number, s.batch_size, s.iterations) for s in state.sessions] == [
        (1, 16, 3),
        (2, 4, 2),
    ]


def test_a_session_holds_the_free_settings_only():
    settings = trained_state().session.settings
    held = {(section, key) for section, table in settings.items() for key in table}
    assert held == {(spec.section, spec.name) for spec in all_settings() if not spec.locked}
    assert settings["train"]["batch_size"] == 4


def test_a_session_without_iterations_is_not_saved_and_gives_its_number_away():
    state = trained_state()
    state.begin_session(Config())
    assert len(state.to_dict()["sessions"]) == 2
    resumed = TrainingState.from_dict(as_json(state))
    assert resumed.begin_session(Config()).number == 3


LIMIT = 10**12 - 1


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({"iterations": LIMIT - 99}, True),
        ({"iterations": LIMIT - 100}, False),
        ({"faces_seen": {"a": LIMIT - 399, "b": 0}}, True),
        ({"faces_seen": {"a": 0, "b": LIMIT - 400}}, False),
        ({"number": LIMIT}, True),
        ({"number": LIMIT - 1}, False),
    ],
)
def test_what_would_pass_the_largest_count_is_refused_before_it_is_trained(change, is_refused):
    values = as_json(trained_state())
    number = change.get("number")
    if number is not None:
        values["sessions"][1]["number"] = number
    else:
        values |= change
    state = TrainingState.from_dict(values)
    config = from_dict({"train": {"batch_size": 4, "iterations": 100}})
    if is_refused:
        with pytest.raises(ValueError, match=r"would pass the largest count, 9{12}; give fewer"):
            state.begin_session(config)
        assert as_json(state) == values
        return
    state.begin_session(config)
    for _ in range(100):
        state.advance()
    assert TrainingState.from_dict(as_json(state)) == state, "what is written can be read"


def test_a_clock_that_is_far_off_is_no_reason_to_refuse_the_state():
    for started in (-5.0, 1e300, float("inf")):
        state = TrainingState(trainer="original")
        state.begin_session(Config(), started=started)
        state.advance()
        assert TrainingState.from_dict(as_json(state)) == state


def test_the_table_of_sessions_stays_small_and_adds_up():
    state = trained_state()
    for number in range(3, 2500):
        state.begin_session(from_dict({"train": {"batch_size": number % 3 + 1}}), 1e6 + number)
        state.advance(number % 7 + 1)
        if number == 1700:  # and goes on from a save
            state = TrainingState.from_dict(as_json(state))
    text = json.dumps(state.to_dict(), indent=1)
    assert len(text) < 1 << 20
    numbers = [session.number for session in state.sessions]
    assert numbers == [*range(1500, 2500)], "a thousand, without a gap"
    first = state.sessions[0]
    assert (first.started, first.settings) == (1000.5, {})
    assert 2 <= first.batch_size <= 3
    assert sum(session.iterations for session in state.sessions) == state.iterations
    assert all(session.settings for session in state.sessions[-100:])
    assert not any(session.settings for session in state.sessions[:-100])
    assert TrainingState.from_dict(as_json(state)).to_dict() == state.to_dict()


def test_a_strangers_long_table_is_folded_as_it_is_read():
    values = as_json(trained_state())
    one = values["sessions"][0] | {"settings": {}}
    values["sessions"] = [one | {"number": number} for number in range(1, 20_001)]
    state = TrainingState.from_dict(values)
    assert len(state.sessions) == 1000
    assert sum(session.iterations for session in state.sessions) == 20_000 * one["iterations"]


def test_a_state_of_another_trainer_begins_no_session():
    state = TrainingState(trainer="lightweight")
    with pytest.raises(ValueError, match=r"^the state is of lightweight, not of original$"):
        state.begin_session(Config())


def test_backup_is_due_when_the_mean_falls_after_the_first():
    state = TrainingState(trainer="original")
    seen = []
    for total, count in ((8.0, 4), (9.0, 3), (3.0, 2), (3.0, 2), (float("nan"), 1), (1.4, 1)):
        state.add_losses(total, count)
        seen.append((*state.close_interval(), state.lowest_mean_loss))
    assert state.close_interval() == (None, False)
    means = [mean for mean, _, _ in seen]
    assert means[:4] == [2.0, 3.0, 1.5, 1.5]
    assert means[5] == 1.4
    assert [due for _, due, _ in seen] == [False, False, True, False, False, True]
    assert [lowest for _, _, lowest in seen] == [2.0, 2.0, 1.5, 1.5, 1.5, 1.4]


def test_a_newer_schema_is_told_as_such():
    values = as_json(trained_state()) | {"schema": SCHEMA + 1, "something": "new"}
    with pytest.raises(ValueError, match=r"made by a newer version; update mien$"):
        TrainingState.from_dict(values)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("schema", None, "schema must be 1, got None"),
        ("schema", True, "schema must be 1, got True"),
        ("iterations", -1, "iterations must be a whole number, at least 0, got -1"),
        ("iterations", True, "iterations must be a whole number, at least 0, got True"),
        ("iterations", 1.5, "iterations must be a whole number, at least 0, got 1.5"),
        ("run_id", "../x", "run_id must be 32 hex digits, got '../x'"),
        ("trainer", 3, "trainer must be text, got 3"),
        ("faces_seen", {"a": 1}, "it lacks faces_seen.b"),
        ("faces_seen", {"a": 1, "b": "2"}, "faces_seen.b must be a whole number"),
        ("faces_seen", [], "faces_seen must be an object, got []"),
        ("lowest_mean_loss", "0", "lowest_mean_loss must be a finite number, got '0'"),
        ("lowest_mean_loss", float("inf"), "lowest_mean_loss must be a finite number, got inf"),
        ("parts", {"scaler": 1}, "parts.scaler must be an object, got 1"),
        ("parts", {"a\nb": 1}, r"'parts.a\nb' must be an object, got 1"),
        ("sessions", {}, "sessions must be a list, got {}"),
        ("sessions", [1], "sessions[0] must be an object, got 1"),
        ("extra", 1, "it has the unknown key extra"),
    ],
)
def test_a_state_out_of_order_is_refused(key, value, text):
    with pytest.raises(ValueError, match="the saved state is not valid") as caught:
        TrainingState.from_dict(as_json(trained_state()) | {key: value})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("number", 2, "session numbers must be rising, got [2, 2]"),
        ("number", 0, "sessions[0].number must be a whole number, at least 1, got 0"),
        ("started", None, "sessions[0].started must be a number from 0 to 1e+11, got None"),
        ("batch_size", 0, "sessions[0].batch_size must be a whole number, at least 1, got 0"),
        ("logs", 1, "sessions[0].logs must be true or false, got 1"),
        ("settings", None, "sessions[0].settings must be an object, got None"),
    ],
)
def test_a_session_out_of_order_is_refused(key, value, text):
    values = as_json(trained_state())
    values["sessions"][0][key] = value
    with pytest.raises(ValueError, match="the saved state is not valid") as caught:
        TrainingState.from_dict(values)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", sorted(TrainingState(trainer="original").to_dict()))
def test_a_missing_key_is_named(key):
    values = as_json(trained_state())
    del values[key]
    with pytest.raises(ValueError, match="saved state is not valid") as caught:
        TrainingState.from_dict(values)
    assert key in str(caught.value)


SAVED = to_dict(
    from_dict(
        {
            "model": {"trainer": "lightweight", "options": {"width": 32}},
            "data": {"input_a": "old/a", "coverage": 87.5},
            "train": {"batch_size": 8, "seed": 5},
        }
    )
)


def test_resume_with_nothing_given_is_the_saved_config():
    config, changes, refusals = resolve_resume(SAVED, {})
    assert to_dict(config) == SAVED
    assert (changes, refusals) == ([], [])


def test_free_settings_that_are_given_win_and_are_told():
    given = {
        "data": {"input_a": "new/a"},
        "train": {"batch_size": 32},
        "save": {"model_dir": "out", "logs": False},
        "augment": {"zoom_amount": 5},
    }
    config, changes, refusals = resolve_resume(SAVED, given)
    assert refusals == []
    assert (config.data.input_a, config.train.batch_size, config.save.logs) == ("new/a", 32, False)
    assert config.model.trainer == "lightweight"
    assert config.data.coverage == 87.5
    assert changes == [
        "updated data.input_a from old/a to new/a",
        "updated train.batch_size from 8 to 32",
        "updated save.model_dir from '' to out",
        "updated save.logs from true to false",
    ]


def test_locked_settings_may_be_repeated_but_not_changed():
    same = {
        "model": {"trainer": "lightweight", "options": {"width": 32}},
        "data": {"coverage": 87.5},
        "train": {"seed": 5},
    }
    assert resolve_resume(SAVED, same)[2] == []
    given = {"model": {"trainer": "original"}, "data": {"coverage": 100}, "train": {"seed": 6}}
    config, changes, refusals = resolve_resume(SAVED, given)
    assert to_dict(config) == SAVED
    assert changes == []
    assert [line.split(";")[0] for line in refusals] == [
        "model.trainer is fixed at lightweight in this model and cannot become original",
        "data.coverage is fixed at 87.5 in this model and cannot become 100",
        "train.seed is fixed at 5 in this model and cannot become 6",
    ]


@pytest.mark.parametrize("spec", all_settings(), ids=lambda spec: f"{spec.section}.{spec.name}")
def test_every_setting_is_refused_or_updated_as_its_lock_says(spec):
    if spec.type is bool:
        other = not spec.default
    elif spec.choices:
        others = [choice for choice in spec.choices if choice not in (spec.default, "none")]
        if not others:
            pytest.skip(f"{spec.name} has one choice only")
        other = others[0]
    elif spec.type is dict:
        other = {"lowmem": True}
    elif spec.type is str:
        other = {"mask_color": "#00ff00", "write_image": "other.png"}.get(spec.name, "other")
    else:
        other = spec.high if spec.default != spec.high else spec.low
    other = int(other) if spec.type is int else other
    saved = to_dict(Config())
    _, changes, refusals = resolve_resume(saved, {spec.section: {spec.name: other}})
    assert (len(changes), len(refusals)) == ((0, 1) if spec.locked else (1, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _FreeAndLocked(Options):
    """Options of a family, one of each kind and one of several words."""

    family = "original"
    nodes: int = option(8, low=1, high=64)
    dropout: float = option(0.0, low=0.0, high=0.9, free=True)
    layers: tuple[str, ...] = option(("encoder",), choices=("encoder", "fc"), free=True)


@pytest.fixture
def saved_with_options(monkeypatch):
    """Settings of a model made before there were `layers`."""
    monkeypatch.setattr(models.family("original"), "Config", _FreeAndLocked)
    return to_dict(from_dict({"model": {"options": {"nodes": 16, "dropout": 0.25}}}))


def test_free_options_change_and_locked_ones_are_refused_one_by_one(saved_with_options):
    given = {"model": {"options": {"nodes": 16, "dropout": 0.5, "layers": ["encoder", "fc"]}}}
    config, changes, refusals = resolve_resume(saved_with_options, given)
    assert refusals == []
    assert changes == [
        "updated model.options.dropout from 0.25 to 0.5",
        "updated model.options.layers from ['encoder'] to ['encoder', 'fc']",
    ]
    assert config.model.options["nodes"] == 16
    assert config.model.options["dropout"] == 0.5
    given["model"]["options"]["nodes"] = 8
    _, changes, refusals = resolve_resume(saved_with_options, given)
    assert len(changes) == 2
    assert [line.split(";")[0] for line in refusals] == [
        "model.options.nodes is fixed at 16 in this model and cannot become 8"
    ]


def test_an_option_that_the_model_is_older_than_has_its_default(saved_with_options):
    given = {"model": {"options": {"layers": ["encoder"]}}}
    assert resolve_resume(saved_with_options, given)[1:] == ([], [])
    assert resolve_resume(saved_with_options, {})[1:] == ([], [])


def test_options_are_not_compared_with_those_of_another_family(saved_with_options):
    given = {"model": {"trainer": "lightweight", "options": {"width": 8}}}
    _, _, refusals = resolve_resume(saved_with_options, given)
    assert len(refusals) == 1
    assert refusals[0].startswith("model.trainer is fixed at original")


def test_an_option_out_of_its_range_is_refused(saved_with_options):
    given = {"model": {"options": {"dropout": 0.95}}}
    with pytest.raises(
        ValueError, match="model.options.dropout of original must be 0 to 0.9, got 0.95"
    ):
        resolve_resume(saved_with_options, given)


def test_a_lock_is_told_before_a_clash_between_settings():
    _, _, refusals = resolve_resume(to_dict(Config()), {"data": {"mask_type": "none"}})
    assert refusals[0].startswith("data.mask_type is fixed at extended")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"train": {"batch_sise": 3}}, "unknown setting train.batch_sise"),
        ({"trian": {}}, "unknown setting trian; did you mean train?"),
        ({"train": {"batch_size": -1}}, "train.batch_size must be auto or a whole number"),
        ({"train": 5}, "train must be a table"),
        ({"loss": {"loss_weight_3": True}}, "loss.loss_weight_3 must be a whole number"),
    ],
)
def test_resume_refuses_what_no_run_could_have(given, text):
    with pytest.raises(ValueError, match="must be|unknown") as caught:
        resolve_resume(SAVED, given)
    assert text in str(caught.value)


def test_settings_that_an_older_version_lacked_get_their_defaults():
    old = {"model": {"trainer": "original"}, "data": {"coverage": 87.5}}
    config, _, _ = resolve_resume(old, {})
    assert config.data.coverage == 87.5
    assert config.train == Config().train
