"""A file of settings that a user names: mien's TOML, or faceswap's train.ini or preset."""

from pathlib import Path
from typing import Any

from ..core.config import from_dict, presets, read_toml, recipes
from ..core.config.faceswap_ini import read_ini, read_preset
from ..core.system.paths import expanded


def read_settings(path: Path, others: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file, by section and key, and lines about what a file of faceswap
    holds in vain, or means otherwise than here.

    Args:
        path: A train.ini where its name ends so, a preset of faceswap where it ends in .json, else
            TOML.
        others: Other settings of the user: a train.ini is read for the trainer there, or for that
            in the model's folder there.

    Raises:
        ValueError: The file cannot be read, or holds anything else.
    """
    if _is_toml(path):
        return (stages_in(path) or presets.read(path)).settings, []
    is_ini = path.suffix.lower() == ".ini"
    settings, report = read_ini(path, _trainer(others)) if is_ini else read_preset(path)
    return settings, [f"{path.name}: {line}" for line in report]


def stages_in(path: Path) -> recipes.Recipe | None:
    """The recipe that a file of settings is, where it lists stages; ValueError as above."""
    return recipes.read(path) if _is_toml(path) and "stage" in read_toml(path) else None


def _is_toml(path: Path) -> bool:
    return path.suffix.lower() not in (".ini", ".json")


def _trainer(others: dict[str, Any]) -> str:
    """Family of the model: as set, else of the model that is there, else the default."""
    places = (("model", "trainer"), ("save", "model_dir"))
    values = {
        section: {name: others[section][name]}
        for section, name in places
        if name in others.get(section, {})
    }
    config = from_dict(values)
    if "model" in values or "save" not in values:
        return config.model.trainer
    from ..core.checkpoint.format import read_settings as settings_in

    saved = settings_in(expanded(config.save.model_dir))
    return from_dict(saved or {}).model.trainer
