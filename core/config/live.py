"""Settings that may be changed while training goes on: the free ones of what is trained, and how.

They touch neither the model nor the faces that were decoded. What is locked, a path, or kept from a
model's first start is none of them.
"""

from typing import Any

from ...models.fields import no_such, shown
from .sections import Config
from .settings import Spec, all_settings
from .toml import parse_assignment

_SECTIONS = ("augment", "loss", "optimizer")

MAIN_SETTINGS = (
    "optimizer.learning_rate",
    "augment.warp",
    "augment.flip",
    "augment.color",
    "loss.eye_multiplier",
    "loss.mouth_multiplier",
    "loss.loss_weight_2",
    "loss.loss_weight_3",
    "loss.loss_weight_4",
)
"""Names of those that are changed most, which a menu offers first."""


def live_settings() -> dict[str, Spec]:
    """Every setting that may be changed while training goes on, by its full name."""
    return {
        spec.full_name: spec
        for spec in all_settings()
        if spec.section in _SECTIONS and not (spec.locked or spec.is_path or spec.stays)
    }


def live_values(config: Config) -> dict[str, Any]:
    """The values of those settings by their full names."""
    return {name: spec.of(config) for name, spec in live_settings().items()}


def parse_change(text: str) -> tuple[Spec, Any]:
    """The setting and the value of ``section.key=value``.

    Raises:
        ValueError: The setting is unknown or not one of these, the value breaks its rule, or it is
            more than a line.
    """
    # A request may have been left by anybody who can write to the folder, and is shown in messages.
    if not text.strip().isprintable():
        raise ValueError(
            "a change must be section.key=value in one line without control characters, got "
            f"{shown(text)}"
        )
    name, _, written = (part.strip() for part in text.partition("="))
    settings = live_settings()
    if name not in settings:
        raise ValueError(_why_not(name, settings))
    spec = settings[name]
    # By the parser of --set, so that a value means the same in both.
    value = parse_assignment(f"{name}={written}")[spec.section][spec.name]
    return spec, spec.take(value, name)


def _why_not(name: str, settings: dict[str, Spec]) -> str:
    """The reason for which a setting of this name cannot be changed now."""
    other = next((spec for spec in all_settings() if spec.full_name == name), None)
    if other is None:
        return no_such("there is no setting", name, settings)
    if other.locked:
        return f"{name} is fixed in a model; begin a new one to have it otherwise"
    return (
        f"{name} cannot be changed while training goes on; stop, and start again with "
        f"--set {name}=VALUE"
    )
