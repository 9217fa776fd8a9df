"""Names to model families, without importing any of them until it is asked for."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any

from .autoencoder import Autoencoder, Build

FAMILIES = {  # name -> module; one line a family, alphabetical
    "lightweight": ".lightweight",
    "original": ".original",
}

_classes: dict[str, type[Autoencoder]] = {}


def register(name: str) -> Callable[[type[Autoencoder]], type[Autoencoder]]:
    """Class decorator: make the class buildable as ``name``."""

    def add(cls: type[Autoencoder]) -> type[Autoencoder]:
        if name in _classes:
            raise ValueError(f"model {name!r} is already registered")
        _classes[name] = cls
        return cls

    return add


def available() -> list[str]:
    """Names that `family` and `build` take."""
    return sorted(FAMILIES)


def family(name: str) -> type[Autoencoder]:
    """Class of a family; ValueError naming the known ones where there is no such one."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"no trainer {name!r}{hint}; there are: {', '.join(available())}")
    importlib.import_module(FAMILIES[name], __package__)
    return _classes[name]


def options_of(name: str, options: dict[str, Any]) -> Any:
    """The family's ``Config`` made of plain values.

    Raises:
        ValueError: On an unknown option (the known ones are named) or a value out of range.
    """
    kind = family(name).Config
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; it has: {', '.join(known)}")
        if type(value) is not known[key].type:
            wanted = getattr(known[key].type, "__name__", known[key].type)
            raise ValueError(f"{name}.{key} must be of type {wanted}, got {value!r}")
    return kind(**options)


def build(
    name: str,
    *,
    learn_mask: bool = False,
    reflect_padding: bool = False,
    seed: int = 0,
    **options: Any,
) -> Autoencoder:
    """A freshly initialised model on the CPU, in channels_last.

    ``options`` are fields of the family's ``Config``; the weights are a pure function of ``seed``.
    """
    cls = family(name)
    settings = options_of(name, options)
    model = cls(settings, Build(learn_mask=learn_mask, reflect_padding=reflect_padding))
    model.initialize(seed)
    return model
