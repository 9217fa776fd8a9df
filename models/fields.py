"""Fields of a dataclass with their rules: type, range, steps, choices, lock. One engine checks them
all, wherever a value comes from: a flag, a file, a recipe, the options of a family, a saved state.

A value that breaks its field's rule is refused in one line, with a remedy where there is one:

    NAME must be RULE, got VALUE; the nearest is OTHER
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_COUNT = 10**12 - 1
"""Largest whole number where a field names no other: every count fits in a float and a file."""

MAX_NUMBER = 1e300
"""Largest number where a field names no other: sums of a few stay finite."""

_LARGEST_WHOLE = 2**1000
"""Whole numbers below it have a float."""

_SHOWN_CHARACTERS = 200
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a table",
    tuple[str, ...]: "a list of words",
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """A value's name, its rule, and what is known about it."""

    type: Any
    """One of bool, int, float, str, dict and tuple[str, ...], or a dataclass of fields."""

    low: float | None = None
    high: float | None = None
    step: int = 1
    """Distance of valid whole numbers, from ``low`` on."""

    choices: tuple[str, ...] | None = None
    """Words, one of which it is; of a tuple, those that it may hold. An N stands for a number."""

    words: Mapping[str, int] = field(default_factory=dict)
    """Words that stand for numbers."""

    pattern: str = ""
    """Regular expression of a whole text, or of each in a tuple; empty: any text."""

    form: str = ""
    """Form that the pattern asks for, in words."""

    locked: bool = False
    """Whether it is part of a model's identity; what is free may change at every resume."""

    is_path: bool = False
    flags: tuple[str, ...] = ()
    """Names on the command line."""

    stays: bool = False
    """Whether a model keeps what a flag gives."""

    is_private: bool = False
    """Whether it is the user's alone: no file of a run holds it, and none can set it."""

    name: str = ""
    default: Any = None
    doc: str = ""

    def take(self, value: Any, name: str) -> Any:
        """The value as the field holds it: a word's number, a whole number as a float, words as a
        tuple; ValueError under this name where it breaks the rule."""
        if dataclasses.is_dataclass(self.type):
            kind = typing.cast(type, self.type)
            return kind(**read_table(kind, value, name))
        if self.type == tuple[str, ...]:
            return self._take_words(value, name)
        number = self.words.get(value, value) if isinstance(value, str) else value
        if self.type is float and type(number) is int and abs(number) < _LARGEST_WHOLE:
            # Files and flags write 1 for 1.0.
            number = float(number)
        if not self._holds(number):
            got = f"{shown(value)}{self._remedy(number)}"
            raise ValueError(f"{name} must be {self.rule}, got {got}")
        return number

    @property
    def rule(self) -> str:
        """Valid values, as a message has them after "must be"."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.form:
            return self.form
        kind = " or ".join([*self.words, self._kind])
        if self.low is None:
            return "a finite number" if self.type is float else kind
        if self.high is None:
            return f"{kind}, at least {self._bound(self.low)}"
        return f"{kind} from {self._range}"

    @property
    def values(self) -> str:
        """Valid values, as short as a table has them."""
        if self.choices is not None:
            several = "any of " if self.type == tuple[str, ...] else ""
            return several + ", ".join(self.choices)
        if self.low is None or self.high is None:
            return self.form or self._kind
        return " or ".join([*self.words, self._range])

    @property
    def _range(self) -> str:
        """Both bounds, of a number that has them."""
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self._bound(self.low)} to {self._bound(self.high)}{steps}"

    @property
    def numbers(self) -> range:
        """Valid whole numbers, where both bounds are known."""
        assert self.low is not None
        assert self.high is not None
        return range(int(self.low), int(self.high) + 1, self.step)

    @property
    def _kind(self) -> str:
        """Kind of value, in words."""
        return "a path, or a list of paths" if self.is_list_of_paths else _KINDS[self.type]

    @property
    def is_list_of_paths(self) -> bool:
        """Whether it holds any number of paths."""
        return self.is_path and self.type == tuple[str, ...]

    def word_for(self, value: Any) -> Any:
        """The word that stands for a value, where one does; else the value."""
        return next((word for word, number in self.words.items() if number == value), value)

    def written(self, value: Any) -> str:
        """A value as a user writes it, in one line that is not too long."""
        if self.is_list_of_paths:
            return ", ".join(map(_written, value)) or _written("")
        return _written(self.word_for(value))

    def _take_words(self, value: Any, name: str) -> tuple[str, ...]:
        """The words of a list, or of one text with spaces between them, which a path may hold."""
        words = value
        if isinstance(value, str):
            words = [value] if self.is_path else value.split()
        is_list = isinstance(words, list | tuple)
        if not is_list or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{name} must be {self._kind}, got {shown(value)}")
        if self.is_path:
            # An empty text is no path: with it a user, or a saved model, has none.
            words = [word for word in words if word]
        each = dataclasses.replace(self, type=str)
        return tuple(each.take(word, name) for word in words)

    def _holds(self, value: Any) -> bool:
        # To Python True is a 1: only a switch takes it.
        if isinstance(value, bool) or not isinstance(value, self.type):
            return self.type is bool and isinstance(value, bool)
        if self.choices is not None:
            return any(_fits(value, choice) for choice in self.choices)
        if self.pattern:
            # Of ASCII: \d would else take the digits of every script.
            return bool(re.fullmatch(self.pattern, value, re.ASCII))
        if self.type not in (int, float):
            return True
        low = -MAX_NUMBER if self.low is None else self.low
        high = self.high
        if high is None:
            high = MAX_COUNT if self.type is int else MAX_NUMBER
        return low <= value <= high and (self.step == 1 or (value - low) % self.step == 0)

    def _remedy(self, value: Any) -> str:
        """The valid value that is nearest, of misspelt words and numbers between two steps."""
        if self.choices is not None and isinstance(value, str):
            # An N is a pattern, no word to offer.
            near = nearest(value, (choice for choice in self.choices if "N" not in choice))
            return f"; did you mean {near}?" if near else ""
        if self.step > 1 and type(value) is int:
            numbers = self.numbers
            index = round((min(max(value, numbers[0]), numbers[-1]) - numbers[0]) / self.step)
            return f"; the nearest is {numbers[index]}"
        return ""

    def _bound(self, bound: float | None) -> str:
        short = f"{bound:g}"
        # Not rounded: 0.9999999 as 1 would name a value that is refused.
        return str(bound) if self.type is int or float(short) != bound else short


def setting(
    default: Any, *, path: bool = False, private: bool = False, flag: str = "", **rule: Any
) -> Any:
    """A field of a dataclass with its rule: keywords are those of `Field`, and names of its flag
    with spaces between them."""
    metadata = {
        "is_path": path,
        "is_private": private,
        "flags": tuple(flag.split()),
        **rule,
    }
    if isinstance(default, dict):
        # Not one table that all objects share.
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of dataclasses whose fields are checked when an object is made."""

    # Or objects of a class with slots would have a dict all the same, from here.
    __slots__ = ()

    def __post_init__(self) -> None:
        for name, each in fields_of(type(self)).items():
            value = each.take(getattr(self, name), self.full_name(name))
            # The dataclass is frozen.
            object.__setattr__(self, name, value)

    @classmethod
    def full_name(cls, name: str) -> str:
        """The name under which a user knows a field."""
        return name


def fields_of(kind: type) -> dict[str, Field]:
    """Every field of a dataclass by its name, in the order of the class."""
    return _fields_of(kind)


@functools.cache
def _fields_of(kind: Any) -> dict[str, Field]:
    docs = _field_docs(kind)
    fields = {}
    for item in dataclasses.fields(kind):
        fields[item.name] = Field(
            name=item.name,
            type=_type_of(item.type),
            default={} if item.default is dataclasses.MISSING else item.default,
            doc=docs.get(item.name, ""),
            **item.metadata,
        )
    return fields


def read_table(kind: type, table: Any, name: str) -> dict[str, Any]:
    """The values in a table whose keys are fields of a dataclass.

    Raises:
        ValueError: It is no table, has another key (the nearest is named), or a value breaks its
            field's rule.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, got {shown(table)}")
    fields = fields_of(kind)
    for key in table:
        if key not in fields:
            near = nearest(key, fields)
            hint = f"did you mean {near}?" if near else f"it may be {', '.join(fields)}"
            raise ValueError(f"unknown key {named(key)} of {name}; {hint}")
    return {key: fields[key].take(value, f"{name}.{key}") for key, value in table.items()}


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The word that was meant, as far as spelling shows."""
    return next(iter(difflib.get_close_matches(str(word), list(words), n=1)), None)


def no_such(what: str, word: object, words: Iterable[str]) -> str:
    """The beginning of a message that refuses a word: what there is not, and what was meant."""
    near = nearest(word, words)
    return f"{what} {shown(word)}" + (f" (did you mean {near}?)" if near else "")


def shown(value: Any) -> str:
    """A value as a message has it: in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _written(value: Any) -> str:
    """A single value as a user writes it: a word without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    is_word = isinstance(value, str) and value.isprintable() and 0 < len(value) <= _SHOWN_CHARACTERS
    return value if is_word else shown(plain(value))


def plain(value: Any) -> Any:
    """A value as TOML and JSON give it back: a dataclass as a table, a tuple as a list."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def named(name: object) -> str:
    """A stranger's name as a message has it: as it is where a line can hold that."""
    fits = isinstance(name, str) and name.isprintable() and len(name) <= 100
    return str(name) if fits else shown(name)


def _fits(value: str, choice: str) -> bool:
    """Whether a value is the choice; an N in that stands for a number."""
    return bool(re.fullmatch(re.escape(choice).replace("N", "(0|[1-9][0-9]{0,2})"), value))


def _type_of(annotation: Any) -> Any:
    """The type that a value has, of a field that may also be None or that says what is inside."""
    if isinstance(annotation, types.UnionType):
        annotation = next(each for each in typing.get_args(annotation) if each is not type(None))
    return dict if typing.get_origin(annotation) is dict else annotation


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring that stands under each field of a class."""
    # Python keeps no text that stands under a field: only the source has it.
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for item, below in zip(body, body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = typing.cast(ast.Constant, below.value).value
            docs[typing.cast(ast.Name, item.target).id] = " ".join(str(text).split())
    return docs
