"""Plain values of a saved state, read strictly: a wrong type or range, a missing or an unknown key
is refused in one line, whoever wrote it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ...models.fields import Field, fields_of, named, shown

MAX_SECONDS = 1e11

_NOT_VALID = "the saved state is not valid"


def require(holds: object, name: str, rule: str, value: Any) -> None:
    """Raise ValueError with the name, the rule and the value where a rule does not hold."""
    if not holds:
        raise ValueError(f"{_NOT_VALID}: {named(name)} must be {rule}, got {shown(value)}")


def require_keys(values: dict[str, Any], expected: Iterable[str], prefix: str = "") -> None:
    """Raise ValueError where a table has other keys than these."""
    expected = set(expected)
    # Sorted, so that the same fault has the same words at every start.
    missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
    if missing or unknown:
        verb, key = ("lacks", missing[0]) if missing else ("has the unknown key", unknown[0])
        raise ValueError(f"{_NOT_VALID}: it {verb} {prefix}{named(key)}")


def record(kind: type, values: Any, prefix: str, **highest: int) -> dict[str, Any]:
    """The values of a table whose keys are the fields of a dataclass, all of them and no other.

    Args:
        kind: Dataclass whose fields say what each may be; null, too, where None is the default.
        values: What was saved.
        prefix: Place of the table in the state, with a dot behind it.
        highest: Highest numbers by field, where they depend on what else was saved.

    Raises:
        ValueError: It is no such table; one line names the value.
    """
    require(isinstance(values, dict), prefix.rstrip("."), "an object", values)
    fields = fields_of(kind)
    require_keys(values, fields, prefix)
    taken = {}
    for name, field in fields.items():
        if field.type is dict:
            taken[name] = table(values, name, prefix)
        elif values[name] is not None or field.default is not None:
            rule = dataclasses.replace(field, high=highest.get(name, field.high))
            taken[name] = _taken(rule, values, name, prefix)
    return taken


def count(
    values: dict[str, Any], key: str, prefix: str = "", *, low: int = 0, high: int | None = None
) -> int:
    """The whole number under a key; ValueError where it is none in this range."""
    return _taken(Field(type=int, low=low, high=high), values, key, prefix)


def number(
    values: dict[str, Any],
    key: str,
    prefix: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """The finite number under a key; ValueError where it is none in this range."""
    return _taken(Field(type=float, low=low, high=high), values, key, prefix)


def optional_number(values: dict[str, Any], key: str, prefix: str = "") -> float | None:
    """The finite number under a key, or None where the value is null."""
    return None if values[key] is None else number(values, key, prefix)


def text(values: dict[str, Any], key: str, prefix: str = "") -> str:
    """The text under a key; ValueError where it is none."""
    return _taken(Field(type=str), values, key, prefix)


def table(values: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """A copy of the object under a key; ValueError where it is none."""
    # Not by a field, whose words are those of settings: JSON calls it an object.
    require(isinstance(values[key], dict), f"{prefix}{key}", "an object", values[key])
    return dict(values[key])


def _taken(field: Field, values: dict[str, Any], key: str, prefix: str) -> Any:
    try:
        return field.take(values[key], named(f"{prefix}{key}"))
    except ValueError as error:
        raise ValueError(f"{_NOT_VALID}: {error}") from None
