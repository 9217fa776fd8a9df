"""The run's state survives JSON and refuses disorder."""

import json

import pytest

from mien.core.checkpoint.state import SCHEMA, TrainingState
from mien.core.config import Config, all_settings, from_dict


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


def test_a_session_tells_auto_from_what_it_chose():
    state = TrainingState(trainer="original")
    session = state.begin_session(from_dict({"train": {"batch_size": "auto"}}), batch_size=24)
    assert (session.batch_size, session.settings["train"]["batch_size"]) == (24, 0)


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
