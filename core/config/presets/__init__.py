"""Settings under a name: those that come with mien, in this folder, and a user's own.

A preset is a TOML file of settings as `--configfile` takes it, with a line that describes it. It
weighs less than all else that a user gives, and more than the defaults.
"""

import functools
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ....models.fields import Field, no_such, plain
from ...system.durable_files import write_output
from ...system.user_folders import settings_folder
from .. import from_dict, nested, read_toml, settings_in

PACKAGED = Path(__file__).parent

# A file's name, so no separator, and no dot in front.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OF_A_RUN = {  # what says where one run's files are, or what it began with
    "model.load_weights",
    *("data.input_a", "data.input_b", "data.store_dir"),
    *("evaluate.held_out_a", "evaluate.held_out_b"),
    "save.model_dir",
}


@dataclass(frozen=True)
class Preset:
    """Settings under a name."""

    name: str
    path: Path
    description: str
    settings: dict[str, dict[str, Any]]
    """Values by section and key."""

    @property
    def is_own(self) -> bool:
        """Whether a user saved it."""
        return self.path.parent != PACKAGED

    @property
    def trainer(self) -> str:
        """The model family that it is for; empty where it is for any."""
        return self.settings.get("model", {}).get("trainer", "")


def own_folder() -> Path:
    """Folder of a user's own presets; ValueError where the user has no home."""
    return settings_folder() / "presets"


def available() -> list[Preset]:
    """Every preset, by name; one that cannot be read says why in its description."""
    return [_readable(path) for _, path in sorted(_paths().items())]


def _readable(path: Path) -> Preset:
    try:
        return read(path)
    except ValueError as error:
        # In the list all the same: a preset that vanished would be looked for.
        return Preset(path.stem, path, f"cannot be used: {error}", {})


@functools.cache
def costs() -> dict[str, dict[str, Any]]:
    """What each of mien's own presets asks of a GPU, computed by `benchmarks.preset_costs`."""
    return json.loads((PACKAGED / "costs.json").read_text(encoding="utf-8"))


def load(name: str) -> Preset:
    """The preset of this name; ValueError naming the nearest where there is none."""
    paths = _paths()
    if name not in paths:
        refusal = no_such("no preset", name, paths)
        raise ValueError(f"{refusal}; there are: {', '.join(sorted(paths))}")
    return read(paths[name])


def read(path: Path) -> Preset:
    """The settings in a file, under its name; ValueError where it holds anything else."""
    values = read_toml(path)
    description = Field(type=str).take(values.pop("description", ""), f"description in {path}")
    try:
        # Only to be checked: what a preset does not set must not come from it.
        from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Preset(path.stem, path, description, values)


def save(
    name: str, settings: dict[str, dict[str, Any]], *, description: str = "", force: bool = False
) -> Preset:
    """The user's own new preset, written. What belongs to one run, as its folders, is left out.

    Args:
        name: Letters, digits, dots, dashes and underscores.
        settings: Values by section and key; of a whole config only what differs from the defaults
            stays.
        description: One line.
        force: Put it in the place of one of the same name.

    Raises:
        ValueError: The name or a setting is not valid, the name is taken, or there is nothing to
            save.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a preset's name must be up to 64 letters, digits, '.', '-' and '_', got {name!r}"
        )
    # Refused and not hidden: the same name must mean the same settings on every machine.
    if (PACKAGED / f"{name}.toml").exists():
        raise ValueError(f"{name} is one of mien's own presets; choose another name")
    path = own_folder() / f"{name}.toml"
    if path.exists() and not force:
        raise ValueError(f"preset {name} exists ({path}); add --force to replace it")
    values = _worth_keeping(settings)
    if not values:
        raise ValueError("there is nothing to save; give --from, --trainer or --set")
    content = _as_toml({"description": description} | values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By the path's own rule: what appeared since the look above is not written over.
        write_output(path, content, force=force)
    except OSError as error:
        raise ValueError(f"cannot write preset {path}: {error.strerror}") from error
    return Preset(name, path, description, values)


def _as_toml(values: dict[str, Any]) -> bytes:
    text = tomli_w.dumps(values)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].count("\n")
        raise ValueError(
            f"a preset cannot hold {text.splitlines()[line]}: the name is no UTF-8; rename it"
        ) from None


def _paths() -> dict[str, Path]:
    """Files by the names of their presets; a user's own never stand for mien's."""
    folders = [PACKAGED]
    with suppress(ValueError):  # who has no home has no presets in it
        # In front, where a later folder's names win.
        folders.insert(0, own_folder())
    return {path.stem: path for folder in folders for path in folder.glob("[!.]*.toml")}


def _worth_keeping(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that are not the defaults and not of one run, but always the trainer."""
    # Through the config, so that 1 and 1.0, or a word and its number, count as the same.
    config = from_dict(settings)
    kept = {
        spec.place: plain(spec.of(config))
        for spec, _ in settings_in(settings)
        # The trainer always: it says which options the preset's are.
        if spec.full_name == "model.trainer"
        or (spec.of(config) != spec.default and spec.full_name not in _OF_A_RUN)
    }
    return nested(kept)
