"""Settings that are paths: those declared so in a section, and those of a family's options."""

import os
import re
from typing import Any

from ... import models
from ...models.fields import fields_of as options_of
from ..system.paths import expanded, split_share
from . import nested, setting_at, settings_in
from .settings import Place

_NO_SIGN = re.compile("[\ud800-\udfff]")
"""Stand-ins in a name for bytes that are none of UTF-8."""

Paths = str | list[str]
"""Value of a setting that is a path, or a list of folders with their shares, if any."""


def paths_in(values: dict[str, Any], trainer: str) -> dict[Place, Paths]:
    """Every path that valid nested settings give, by its place; those left empty are none.

    Args:
        values: Values by section and key.
        trainer: Family whose options they hold.
    """
    paths = {spec.place: value for spec, value in settings_in(values) if spec.is_path and value}
    options = values.get("model", {}).get("options", {})
    for name, option in options_of(models.family(trainer).Config).items():
        path = options.get(name)
        # Options are checked by their family later: what is there may still be of any type.
        if option.is_path and path and isinstance(path, str):
            paths["model", "options", name] = path
    return paths


def each_path(value: Paths) -> list[str]:
    """The paths of a setting, without the shares of folders."""
    return [value] if isinstance(value, str) else [split_share(text)[0] for text in value]


def absolute_paths(values: dict[str, Any], trainer: str) -> dict[str, Any]:
    """Nested settings of the paths in these, absolute, to mean the same from every folder."""
    paths: dict[Place, Paths] = {}
    for place, value in paths_in(values, trainer).items():
        if isinstance(value, str):
            paths[place] = absolute(value)
            continue
        # A share stays where it is, at the end of the folder's name.
        paths[place] = [absolute(text) for text in value if text]
    return nested(paths)


def absolute(path: str) -> str:
    """The path from the root, `~` written out; ValueError where there is no such home."""
    # Not resolved: a link is the user's name for a place that may move.
    return os.path.abspath(expanded(path))


def unwritable(values: dict[str, Any], trainer: str) -> dict[Place, str]:
    """Every path in valid nested settings whose name is no UTF-8, so that no TOML can hold it."""
    return {
        place: path
        for place, value in paths_in(values, trainer).items()
        for path in each_path(value)
        if _NO_SIGN.search(path)
    }


def way_to_give(place: Place) -> str:
    """Words that a user writes before the path on the command line: a flag, or `--set` and the
    name."""
    if len(place) == 2:
        return setting_at(place).way_to_give
    return f"--set {'.'.join(place)}="
