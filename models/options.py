"""Options of a family: typed, ranged and stepped; checked when they are made.

An option is *locked*, part of a model's identity, unless it is *free* to change at every resume.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

LARGEST_WHOLE = 2**1000
"""A whole number beyond is no float."""

_SHOWN_CHARACTERS = 200


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    step: int = 1,
    choices: tuple[str, ...] | None = None,
    free: bool = False,
    path: bool = False,
) -> Any:
    """A field: a number from low to high (whole ones in steps from low), one or more of the
    choices, or a path."""
    rule = {"low": low, "high": high, "step": step, "choices": choices, "free": free, "path": path}
    return field(default=default, metadata=rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every family's ``Config`` is made from: it enforces each field's rule.

    A list of words may also be one text with spaces between them.

    Raises:
        ValueError: On a value that breaks its rule; the option, the rule and, of numbers and
            misspelt words, the nearest valid value are named.
    """

    family: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.type is float and type(value) is int and abs(value) < LARGEST_WHOLE:
                value = float(value)
            if item.type == tuple[str, ...] and isinstance(value, str | list):
                value = tuple(value.split() if isinstance(value, str) else value)
            object.__setattr__(self, item.name, value)
            problem = _problem(value, item)
            if problem:
                raise ValueError(f"model.options.{item.name} of {self.family} must be {problem}")


def _problem(value: Any, item: dataclasses.Field) -> str | None:
    """The rule that ``value`` breaks, and what it is instead; None where it breaks none."""
    rule = item.metadata
    if item.type == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(word, str) for word in value):
            return f"a list of words, got {shown(value)}"
        return next(filter(None, (_misspelt(word, rule["choices"]) for word in value)), None)
    if type(value) is not item.type:
        return f"of type {getattr(item.type, '__name__', item.type)}, got {shown(value)}"
    if rule["choices"] is not None:
        return _misspelt(value, rule["choices"])
    return _out_of_range(value, rule) if rule["low"] is not None else None


def _misspelt(word: str, choices: tuple[str, ...]) -> str | None:
    if word in choices:
        return None
    near = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"one of {', '.join(choices)}, got {shown(word)}{hint}"


def _out_of_range(value: float, rule: Any) -> str | None:
    low, high, step = rule["low"], rule["high"], rule["step"]
    if not isinstance(value, int):
        near = min(max(value, low), high)
        return (
            None
            if low <= value <= high
            else f"{low:g} to {high:g}, got {value:g}; the nearest is {near:g}"
        )
    if low <= value <= high and (value - low) % step == 0:
        return None
    near = low + min(max(round((value - low) / step), 0), (high - low) // step) * step
    steps = f" in steps of {step}" if step > 1 else ""
    return f"{low} to {high}{steps}, got {value}; the nearest is {near}"


def field_docs(kind: type) -> dict[str, str]:
    """The docstring that stands under each field of a class."""
    body = typing.cast(
        ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    ).body
    docs = {}
    for item, below in zip(body, body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = typing.cast(ast.Constant, below.value).value
            docs[typing.cast(ast.Name, item.target).id] = " ".join(str(text).split())
    return docs


def describe(kind: type[Options]) -> list[dict[str, Any]]:
    """Descriptions of all options: name, default, rule in words, whether it is free, and what it
    does."""
    docs = field_docs(kind)
    return [
        {
            "name": item.name,
            "default": list(item.default) if isinstance(item.default, tuple) else item.default,
            "rule": _rule_in_words(item),
            "free": item.metadata["free"],
            "doc": docs[item.name],
        }
        for item in dataclasses.fields(kind)
    ]


def _rule_in_words(item: dataclasses.Field) -> str:
    rule = item.metadata
    if item.type is bool:
        return "true or false"
    if rule["choices"] is not None:
        several = "any of " if item.type == tuple[str, ...] else ""
        return several + ", ".join(rule["choices"])
    if rule["low"] is None:
        return "text"
    steps = f" in steps of {rule['step']}" if rule["step"] > 1 else ""
    return f"{rule['low']:g} to {rule['high']:g}{steps}"


def shown(value: Any) -> str:
    """A value as a message has it: in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
