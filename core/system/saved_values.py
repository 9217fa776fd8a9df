"""Plain values of a saved state, read strictly: a wrong type or range, a missing or an unknown key
is refused in one line, whoever wrote it."""

from collections.abc import Iterable
from typing import Any

from ...models.options import shown

MAX_COUNT = 10**12 - 1
MAX_SECONDS = 1e11
LARGEST = 1e300
"""Size of a number, at most: sums of a few stay finite."""


def require(holds: object, name: str, rule: str, value: Any) -> None:
    """Raise ValueError with the name, the rule and the value where a rule does not hold."""
    if not holds:
        got = shown(value)
        name = _printable(name)
        raise ValueError(f"the saved state is not valid: {name} must be {rule}, got {got}")


def require_keys(values: dict[str, Any], expected: Iterable[str], prefix: str = "") -> None:
    """Raise ValueError where a table has other keys than these."""
    expected = set(expected)
    missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
    if missing or unknown:
        verb, key = ("lacks", missing[0]) if missing else ("has the unknown key", unknown[0])
        raise ValueError(f"the saved state is not valid: it {verb} {prefix}{_printable(key)}")


def _printable(name: str) -> str:
    """The name as a line can hold it."""
    return name if name.isprintable() and len(name) <= 100 else shown(name)


def count(
    values: dict[str, Any], key: str, prefix: str = "", *, low: int = 0, high: int = MAX_COUNT
) -> int:
    """The whole number under a key; ValueError where it is none in this range."""
    value = values[key]
    rule = f"a whole number, at least {low}"
    rule += f" and at most {high}" if high < MAX_COUNT else ""
    require(type(value) is int and low <= value <= high, f"{prefix}{key}", rule, value)
    return value


def number(
    values: dict[str, Any],
    key: str,
    prefix: str = "",
    *,
    low: float = -LARGEST,
    high: float = LARGEST,
) -> float:
    """The finite number under a key; ValueError where it is none in this range."""
    value = values[key]
    is_bounded = low > -LARGEST or high < LARGEST
    rule = f"a number from {low:g} to {high:g}" if is_bounded else "a finite number"
    holds = type(value) in (int, float) and low <= value <= high
    require(holds, f"{prefix}{key}", rule, value)
    return float(value)


def optional_number(values: dict[str, Any], key: str, prefix: str = "") -> float | None:
    """The finite number under a key, or None where the value is null."""
    return None if values[key] is None else number(values, key, prefix)


def text(values: dict[str, Any], key: str, prefix: str = "") -> str:
    """The text under a key; ValueError where it is none."""
    require(isinstance(values[key], str), f"{prefix}{key}", "text", values[key])
    return values[key]


def table(values: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """A copy of the object under a key; ValueError where it is none."""
    require(isinstance(values[key], dict), f"{prefix}{key}", "an object", values[key])
    return dict(values[key])
