"""The models that are measured, by name: every family as it comes, and some of its larger forms.

A form of phaze-a is named by its preset; a known network as encoder begins with drawn weights, for
its pretrained ones change no speed.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from .. import models
from ..core.config import presets
from ..models.autoencoder import Autoencoder


@dataclass(frozen=True)
class Variant:
    """A family with some options."""

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Autoencoder:
        """The model, freshly drawn."""
        return models.build(self.trainer, **self.options)

    def meta_model(self) -> Autoencoder:
        """The model without memory for its weights."""
        return models.meta_model(self.trainer, **self.options)


_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dfaker-256": ("dfaker", {"output_size": 256}),
    "dfl-sae-liae": ("dfl-sae", {"architecture": "liae"}),
    "dlight-128": ("dlight", {"output_size": 128}),
    "dlight-384": ("dlight", {"output_size": 384}),
}

_PRESETS = (
    *("clipfaker128", "clipfaker256", "dfl-saehd-df", "dfl-saehd-liae", "dny256", "dny512"),
    *("dny1024", "stojo", "sym384"),
)


def names() -> list[str]:
    """Names of all variants."""
    return [*models.available(), *_OPTIONS, *(f"phaze-a:{preset}" for preset in _PRESETS)]


@functools.cache
def variant(name: str) -> Variant:
    """The variant of this name; ValueError naming the known ones where there is none."""
    if name in models.available():
        return Variant(name)
    if name in _OPTIONS:
        return Variant(*_OPTIONS[name])
    trainer, _, preset = name.partition(":")
    if preset not in _PRESETS:
        raise ValueError(f"no model {name!r} is measured; there are: {', '.join(names())}")
    options = presets.load(preset).settings["model"]["options"]
    return Variant(trainer, options | {"enc_load_weights": False})
