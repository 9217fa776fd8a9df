"""Plain values of a saved state, read strictly: a wrong type or range, a missing or an unknown key
is refused in one line, whoever wrote it."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from ...models.fields import Field, fields_of, named, shown

Record = TypeVar("Record")

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


def record(kind: type[Record], values: Any, name: str = "", **highest: int) -> Record:
    """The object of a dataclass whose fields are the keys of a table, all of them and no other.

    Args:
        kind: Dataclass whose fields say what each may be; null, too, where None is the default.
        values: What was saved.
        name: Name of the table in the state; empty: the state itself.
        highest: Highest numbers by field, also of tables inside, where they depend on what else was
            saved.

    Raises:
        ValueError: It is no such table; one line names the value.
    """
    require(isinstance(values, dict), name, "an object", values)
    fields, prefix = fields_of(kind), f"{name}." if name else ""
    require_keys(values, fields, prefix)
    taken = {
        key: take(field, values[key], f"{prefix}{key}", **highest)
        for key, field in fields.items()
        if values[key] is not None or field.default is not None
    }
    return kind(**taken)


def take(field: Field, value: Any, name: str, **highest: int) -> Any:
    """A saved value as its field holds it; ValueError where it breaks the rule."""
    if dataclasses.is_dataclass(field.type):
        return record(typing.cast(type, field.type), value, name, **highest)
    # Not by the field itself, whose words are those of settings: JSON says array and object.
    if typing.get_origin(field.type) is list:
        require(isinstance(value, list), name, "a list", value)
        (kind,) = typing.get_args(field.type)
        return [record(kind, item, f"{name}[{i}]", **highest) for i, item in enumerate(value)]
    if field.type is dict:
        require(isinstance(value, dict), name, "an object", value)
        return dict(value)
    rule = dataclasses.replace(field, high=highest.get(field.name, field.high))
    try:
        return rule.take(value, named(name))
    except ValueError as error:
        raise ValueError(f"{_NOT_VALID}: {error}") from None
