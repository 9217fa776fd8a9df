"""Settings by their names, and configs of plain values and back."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from ...models.fields import Field
from ...models.fields import fields_of as rules_of
from .sections import SECTIONS, Config, refuse_unknown, section_name, section_of


@dataclass(frozen=True, kw_only=True)
class Spec(Field):
    """Field of a section, and how it is set on the command line."""

    section: str

    @property
    def full_name(self) -> str:
        """Section and name, as `--set` takes them."""
        return f"{self.section}.{self.name}"

    @property
    def turns_off(self) -> bool:
        """Whether the flag of a switch sets it to false."""
        return self.type is bool and any(flag.startswith("--no-") for flag in self.flags)

    @property
    def opposite(self) -> str:
        """The flag that undoes what the flag of a switch does; empty where there is none."""
        long = next((flag for flag in self.flags if flag.startswith("--")), "")
        if self.type is not bool or not long:
            return ""
        return f"--{long.removeprefix('--no-')}" if self.turns_off else f"--no-{long[2:]}"

    @property
    def way_to_give(self) -> str:
        """Words that a user writes before the value on the command line."""
        return self.flags[-1] if self.flags else f"--set {self.full_name}="

    def word_for(self, value: Any) -> Any:
        """The word that stands for a value, where one does; else the value."""
        return next((word for word, number in self.words.items() if number == value), value)


def fields_of(kind: type) -> dict[str, Spec]:
    """Every setting of one section, in the order of the class."""
    return _fields(section_name(kind))


@functools.cache
def _fields(section: str) -> dict[str, Spec]:
    rules = rules_of(SECTIONS[section])
    return {name: Spec(section=section, **vars(rule)) for name, rule in rules.items()}


def all_settings() -> list[Spec]:
    """Every setting of every section."""
    return [spec for kind in SECTIONS.values() for spec in fields_of(kind).values()]


def from_dict(values: dict[str, Any]) -> Config:
    """A config made of nested plain values.

    Raises:
        ValueError: On an unknown section or key (the nearest known one is named), a bad value, or
            values that do not go together.
    """
    return Config(**sections_of(values))


def sections_of(values: dict[str, Any]) -> dict[str, Any]:
    """Sections by name, of nested plain values that may be a part of what will be set.

    Raises:
        ValueError: On an unknown section or key (the nearest known one is named) or a bad value.
    """
    # Before any section is made, whose refusal would hide a mistyped name of a section.
    refuse_unknown(values, SECTIONS)
    return {name: section_of(name, values.get(name, {})) for name in SECTIONS}


def model_settings(config: Config) -> dict[str, Any]:
    """Settings of a run that `models.build` takes."""
    model = config.model
    return {
        "learn_mask": config.loss.learn_mask,
        "reflect_padding": model.reflect_padding,
        "icnr_init": model.icnr_init,
        "conv_aware_init": model.conv_aware_init,
        **model.options,
    }


def without_private(values: dict[str, Any]) -> dict[str, Any]:
    """Nested plain values with the defaults of what no file of a run may hold."""
    public = {section: dict(table) for section, table in values.items()}
    for spec in all_settings():
        if spec.is_private:
            public.setdefault(spec.section, {})[spec.name] = spec.default
    return public


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The whole config as plain values, fit for TOML and JSON."""
    return {
        # Lists, as TOML and JSON give them back: a saved value must equal the same one as set.
        section: {key: list(each) if type(each) is tuple else each for key, each in table.items()}
        for section, table in dataclasses.asdict(config).items()
    }
