"""Names to model families, without importing any of them, or torch, until it is asked for."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .fields import fields_of, no_such

if TYPE_CHECKING:
    from .autoencoder import Autoencoder

FAMILIES = {  # name -> module; one line a family, alphabetical
    "dfaker": ".dfaker",
    "dfl-h128": ".dfl_h128",
    "dfl-sae": ".dfl_sae",
    "dlight": ".dlight",
    "iae": ".iae",
    "lightweight": ".lightweight",
    "original": ".original",
    "phaze-a": ".phaze_a",
    "realface": ".realface",
    "unbalanced": ".unbalanced",
    "villain": ".villain",
}

_classes: dict[str, type["Autoencoder"]] = {}


def register(name: str) -> Callable[[type["Autoencoder"]], type["Autoencoder"]]:
    """Class decorator: make the class buildable as ``name``."""

    def add(cls: type["Autoencoder"]) -> type["Autoencoder"]:
        if name in _classes:
            raise ValueError(f"model {name!r} is already registered")
        _classes[name] = cls
        cls.Config.family = name
        return cls

    return add


def available() -> list[str]:
    """Names that `family` and `build` take."""
    return sorted(FAMILIES)


def family(name: str) -> type["Autoencoder"]:
    """Class of a family; ValueError naming the known ones where there is no such one."""
    if name not in FAMILIES:
        refusal = no_such("no trainer", name, FAMILIES)
        raise ValueError(f"{refusal}; there are: {', '.join(available())}")
    # Importing registers the class; until then a family costs no start-up time.
    importlib.import_module(FAMILIES[name], __package__)
    return _classes[name]


def options_of(name: str, options: dict[str, Any]) -> Any:
    """The family's ``Config`` made of plain values.

    Raises:
        ValueError: On an unknown option (the known ones are named) or a value that breaks its rule.
    """
    kind = family(name).Config
    known = fields_of(kind)
    for key in options:
        if key not in known:
            refusal = no_such(f"{name} has no option", key, known)
            raise ValueError(f"{refusal}; it has: {', '.join(known) or 'no options'}")
    return kind(**options)


def build(
    name: str, *, seed: int | None = 0, pretrained: bool = True, **settings: Any
) -> "Autoencoder":
    """A model on the CPU, in channels_last; its weights are a pure function of the arguments.

    Args:
        name: Name of the family.
        seed: Seed of the weights; None leaves them unfilled, for a checkpoint to bring them.
        pretrained: Take up pretrained weights where the options ask for it.
        settings: Fields of `Build` and of the family's ``Config``.
    """
    model = _made(name, settings)
    if seed is not None:
        model.initialize(seed)
        if pretrained:
            model.load_pretrained()
    model.to_channels_last()
    return model


def meta_model(name: str, **settings: Any) -> "Autoencoder":
    """The model that `build` makes, without memory for its weights."""
    import torch

    # Shapes alone, for estimates of memory and FLOPs.
    with torch.device("meta"):
        return _made(name, settings)


def _made(name: str, settings: dict[str, Any]) -> "Autoencoder":
    from .autoencoder import Build

    shapes = [item.name for item in dataclasses.fields(Build)]
    shape = Build(**{key: settings[key] for key in shapes if key in settings})
    # The rest are options of the family, which its `Config` checks.
    options = {key: value for key, value in settings.items() if key not in shapes}
    return family(name)(options_of(name, options), shape)
