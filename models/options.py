"""Options of a family: typed, ranged and stepped; checked when they are made.

An option is *locked*, part of a model's identity, unless it is *free* to change at every resume.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .fields import Checked, fields_of, plain, setting


def option(default: Any, *, free: bool = False, **rule: Any) -> Any:
    """A field with a rule, as `fields.setting` takes it; locked where it is not free."""
    return setting(default, locked=not free, **rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Checked):
    """Base of every family's ``Config``: it enforces each field's rule.

    Raises:
        ValueError: On a value that breaks its rule.
    """

    family: ClassVar[str] = ""

    @classmethod
    def full_name(cls, name: str) -> str:
        """The option as messages name it."""
        return f"model.options.{name} of {cls.family}"


def describe(kind: type[Options]) -> list[dict[str, Any]]:
    """Descriptions of all options: name, default, rule in words, whether it is free, and what it
    does."""
    return [
        {
            "name": item.name,
            "default": plain(item.default),
            "rule": item.values,
            "free": not item.locked,
            "doc": item.doc,
        }
        for item in fields_of(kind).values()
    ]
