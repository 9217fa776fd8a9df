"""The engine of fields: one rule, one refusal, wherever a value comes from."""

from dataclasses import dataclass

import pytest

from mien import models
from mien.core.config import all_settings, from_dict
from mien.core.config.recipes import Recipe
from mien.core.system.saved_values import take
from mien.models.fields import (
    MAX_COUNT,
    MAX_NUMBER,
    Checked,
    Field,
    fields_of,
    read_table,
    setting,
)
from mien.models.options import describe

WORDS = tuple[str, ...]


@pytest.mark.parametrize(
    ("field", "value", "held"),
    [
        (Field(type=bool), True, True),
        (Field(type=int, low=1, high=9), 9, 9),
        (Field(type=int, low=1), MAX_COUNT, MAX_COUNT),
        (Field(type=int, low=8, high=24, step=8), 16, 16),
        (Field(type=int, low=0, high=4, words={"auto": 0}), "auto", 0),
        (Field(type=float, low=0, high=1), 1, 1.0),
        (Field(type=float), -MAX_NUMBER, -MAX_NUMBER),
        (Field(type=str), "", ""),
        (Field(type=str, choices=("auto", "cuda:N")), "cuda:12", "cuda:12"),
        (Field(type=WORDS, choices=("a", "b")), "a b", ("a", "b")),
        (Field(type=WORDS, choices=("a", "b")), ["b"], ("b",)),
        (Field(type=WORDS, choices=("a", "b")), (), ()),
        (Field(type=dict), {"a": 1}, {"a": 1}),
    ],
)
def test_a_value_that_keeps_the_rule_is_held_as_its_type(field, value, held):
    taken = field.take(value, "x")
    assert taken == held
    assert type(taken) is type(held)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (Field(type=bool), 1, "true or false, got 1"),
        (Field(type=int), True, "a whole number, got True"),
        (Field(type=int, low=1, high=9), 0, "a whole number from 1 to 9, got 0"),
        (Field(type=int, low=1, high=9), 2.0, "a whole number from 1 to 9, got 2.0"),
        (Field(type=int, low=1, high=9), None, "a whole number from 1 to 9, got None"),
        (Field(type=int, low=1), MAX_COUNT + 1, "a whole number, at least 1, got 1000000000000"),
        (
            Field(type=int, low=8, high=30, step=8),
            27,
            "a whole number from 8 to 30 in steps of 8, got 27; the nearest is 24",
        ),
        (
            Field(type=int, low=8, high=24, step=8),
            -(10**400),
            "a whole number from 8 to 24 in steps of 8, got -1000",
        ),
        (
            Field(type=int, low=0, high=4, words={"auto": 0}),
            "atuo",
            "auto or a whole number from 0 to 4, got 'atuo'",
        ),
        (Field(type=float, low=0, high=1), "1", "a number from 0 to 1, got '1'"),
        (Field(type=float, low=0, high=1), float("nan"), "a number from 0 to 1, got nan"),
        (Field(type=float, low=0), float("inf"), "a number, at least 0, got inf"),
        (Field(type=float, low=0, high=0.9999999), 1.0, "a number from 0 to 0.9999999, got 1.0"),
        (Field(type=str, pattern="#[0-9a-f]+", form="#hex"), "#0١", "#hex, got '#0١'"),
        (Field(type=WORDS, pattern=r"\d", form="digits"), ["1", "11"], "digits, got '11'"),
        (Field(type=float), 10**400, "a finite number, got 1000"),
        (Field(type=str), 3, "text, got 3"),
        (
            Field(type=str, choices=("mae", "mse")),
            "mea",
            "one of mae, mse, got 'mea'; did you",
        ),
        (
            Field(type=str, choices=("auto", "cuda:N")),
            "cuda:01",
            "one of auto, cuda:N, got 'cuda:01'",
        ),
        (Field(type=str, choices=("a", "b")), ["a"], "one of a, b, got ['a']"),
        (Field(type=WORDS, choices=("a", "b")), "a c", "one of a, b, got 'c'"),
        (Field(type=WORDS, choices=("a", "b")), ["a", 1], "a list of words, got ['a', 1]"),
        (Field(type=WORDS, choices=("a", "b")), None, "a list of words, got None"),
        (Field(type=dict), [], "a table, got []"),
    ],
)
def test_what_breaks_the_rule_is_refused_with_name_rule_value_and_remedy(field, value, said):
    with pytest.raises(ValueError, match="must be") as caught:
        field.take(value, "the.name")
    assert str(caught.value).startswith(f"the.name must be {said}")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@dataclass(frozen=True, kw_only=True)
class _Inner:
    """A table within another."""

    size: int = setting(1, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outer(Checked):
    """A dataclass of fields."""

    share: float = setting(0.5, low=0, high=1, locked=True)
    """Share of all,
    in two lines."""

    count: int | None = setting(None, low=1)
    inner: _Inner | None = setting(None)
    table: dict[str, int] = setting({})


def test_fields_are_read_off_a_dataclass():
    fields = fields_of(_Outer)
    assert fields["share"] == Field(
        name="share",
        type=float,
        default=0.5,
        low=0,
        high=1,
        locked=True,
        doc="Share of all, in two lines.",
    )
    assert [each.type for each in fields.values()] == [float, int, _Inner, dict]
    assert _Outer.__dataclass_fields__["table"].default_factory() == {}


def test_a_table_is_read_with_all_that_lies_in_it():
    values = read_table(_Outer, {"share": 1, "inner": {"size": 2}}, "part")
    assert values == {"share": 1.0, "inner": _Inner(size=2)}
    for table, said in (
        ({"inner": {"size": 0}}, "part.inner.size must be a whole number, at least 1, got 0"),
        ({"inner": {"sise": 1}}, "unknown key sise of part.inner; did you mean size?"),
        ({"x\n": 1}, r"unknown key 'x\n' of part; it may be share, count, inner, table"),
        ({"count": None}, "part.count must be a whole number, at least 1, got None"),
        ([], "part must be a table, got []"),
    ):
        with pytest.raises(ValueError, match="part") as caught:
            read_table(_Outer, table, "part")
        assert str(caught.value) == said


def _by_setting(value):
    from_dict({"train": {"rollback_limit": value}})


def _by_option(value):
    models.options_of("original", {"width": value})


def _by_recipe(value):
    Recipe.from_dict({"stage": [{"iterations": value}]})


def _by_state(value):
    take(Field(type=int, low=1, high=100), value, "count")


@pytest.mark.parametrize("give", [_by_setting, _by_option, _by_recipe, _by_state])
@pytest.mark.parametrize("value", [True, "5", 0.5, 0, -1, 10**400, float("nan"), None, [], {}])
def test_the_refusal_reads_alike_wherever_a_value_comes_from(give, value):
    with pytest.raises(ValueError, match=r"must be a whole number(,| from) .*, got ") as caught:
        give(value)
    assert "\n" not in str(caught.value)


def test_every_default_keeps_its_own_rule():
    for spec in all_settings():
        assert spec.take(spec.default, spec.full_name) == spec.default
    for name in models.available():
        for option in fields_of(models.family(name).Config).values():
            assert option.take(option.default, option.name) == option.default


def test_every_option_is_described_as_its_rule_says():
    described = {each["name"]: each for each in describe(models.family("phaze-a").Config)}
    for name, rule in (
        ("output_size", "64 to 2048 in steps of 16"),
        ("fc_dropout", "0 to 0.99"),
        ("enable_gblock", "true or false"),
        ("enc_weights", "text"),
        ("shared_fc", "none, full, half"),
    ):
        assert described[name]["rule"] == rule
        assert described[name]["doc"]
    assert described["fc_dropout"]["free"]
    assert not described["output_size"]["free"]
