"""Settings by their names, and configs of plain values and back."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...models.fields import Field, plain
from ...models.fields import fields_of as rules_of
from .sections import SECTIONS, Config, refuse_unknown, section_name, section_of

Place = tuple[str, ...]
"""Place of a setting in nested settings: section and name; an option is three words deep."""


@dataclass(frozen=True, kw_only=True)
class Spec(Field):
    """Field of a section, and how it is set on the command line."""

    section: str

    @property
    def full_name(self) -> str:
        """Section and name, as `--set` takes them."""
        return f"{self.section}.{self.name}"

    @property
    def place(self) -> Place:
        """Place of its value in nested settings."""
        return self.section, self.name

    def of(self, config: Config) -> Any:
        """The value that a config has of it."""
        return getattr(getattr(config, self.section), self.name)

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


def setting_at(place: Place) -> Spec:
    """The setting of a section and a name."""
    section, name = place
    return fields_of(SECTIONS[section])[name]


def settings_in(values: Mapping[str, Any]) -> Iterator[tuple[Spec, Any]]:
    """Every setting that nested values give, with its value; what is no setting is passed over."""
    for spec in all_settings():
        table = values.get(spec.section)
        if isinstance(table, dict) and spec.name in table:
            yield spec, table[spec.name]


def nested(values: Mapping[Place, Any]) -> dict[str, Any]:
    """Values by their places as nested values."""
    tables: dict[str, Any] = {}
    for (*outer, key), value in values.items():
        table = tables
        for name in outer:
            table = table.setdefault(name, {})
        table[key] = value
    return tables


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested values of all layers; a later layer wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = merge(merged[key], value)
            else:
                # A copy: a layer that is laid over later must not change this one.
                merged[key] = dict(value) if isinstance(value, dict) else value
    return merged


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
    private = {spec.place: spec.default for spec in all_settings() if spec.is_private}
    return merge(values, nested(private))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The whole config as plain values, fit for TOML and JSON."""
    # Lists for tuples: a saved value must equal the same one as set.
    return plain(config)
