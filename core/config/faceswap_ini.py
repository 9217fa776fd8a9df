"""A faceswap `train.ini`, or a preset that its window has saved, as settings of mien.

Two layouts are read: the present one, and that of August 2023, where the optimizer's keys stand in
`[global]` and those of the augmentation in `[trainer.original]`. Of a key that both have, the
present one counts. The file does not name the trainer, and holds the options of all; those of one
are read. As in faceswap, a word may be written in capitals.

A preset is JSON with the options of one section, whose name it tells, as does the name of the file:
`model_phaze_a_NAME_preset.json`.
"""

import configparser
import io
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import models
from ...models.fields import fields_of as rules_of
from ...models.fields import shown
from . import ModelConfig, decoded, nested, setting_at
from .settings import Place
from .toml import read_content

MAX_BYTES = 1 << 20
"""Largest file that is read; one with every help text has a tenth of it."""


def _named_alike(section: str, names: str) -> dict[str, Place]:
    return {name: (section, name) for name in names.split()}


_OPTIMIZER = {
    **_named_alike(
        "optimizer",
        "optimizer learning_rate epsilon_exponent gradient_clipping clipping_value "
        "autoclip_history weight_decay gradient_accumulation ada_beta_1 ada_beta_2 ada_amsgrad",
    ),
    **_named_alike("save", "save_optimizer"),
}
_GLOBAL = {
    **_named_alike("data", "centering coverage vertical_offset"),
    **_named_alike("model", "icnr_init conv_aware_init reflect_padding"),
    **_named_alike("optimizer", "lr_finder_iterations lr_finder_mode lr_finder_strength"),
    **_named_alike("train", "nan_protection"),
    "mixed_precision": ("precision", "mode"),
    "autoclip": ("optimizer", "gradient_clipping"),
}
_LOSS = {
    **_named_alike(
        "loss",
        "loss_function loss_function_2 loss_weight_2 loss_function_3 loss_weight_3 "
        "loss_function_4 loss_weight_4 mask_loss_function eye_multiplier mouth_multiplier "
        "penalized_mask_loss learn_mask",
    ),
    **_named_alike("data", "mask_type mask_dilation mask_blur_kernel mask_threshold"),
}
MODEL_PLACES: dict[str, Place] = _GLOBAL | _OPTIMIZER | _LOSS
"""Place of each option that faceswap keeps with a model, by its name there."""

_AUGMENTATION = {
    **_named_alike("preview", "preview_images mask_opacity mask_color"),
    **_named_alike(
        "augment",
        "zoom_amount rotation_range shift_range flip_chance color_lightness color_ab "
        "color_clahe_chance color_clahe_max_size",
    ),
}
_SECTIONS: dict[str, dict[str, Place]] = {  # of the old layout first: what is read later counts
    "global": _GLOBAL | _OPTIMIZER,
    "global.optimizer": _OPTIMIZER,
    "global.loss": _LOSS,
    "trainer.original": _AUGMENTATION,
    "trainer.augmentation": _AUGMENTATION,
    "trainer.loader": {},
}
SWITCHES = {  # true or false there, words here
    "autoclip": {True: "autoclip", False: "none"},
    "mixed_precision": {True: "auto", False: "fp32"},
    "nan_protection": {True: "halt", False: "off"},
}
_DIFFERENCES = {  # what a value means here, where that is not quite the same
    ("global", "mixed_precision", True): (
        "bf16 where the GPU has it, which needs no loss scaling; fp16 is what it was"
    ),
    ("global", "mixed_precision", False): (
        "nothing is rounded, to tf32 either; auto is faster on a GPU"
    ),
    ("global", "nan_protection", False): "a step that is not finite is still left out",
    ("global", "optimizer", "rms-prop"): (
        "its memory of the square is 0.99, as in newer faceswap; the older had 0.9"
    ),
}
_NOT_HERE = {
    "allow_growth": "GPU memory is taken as it is needed",
    "convert_batchsize": "`mien swap` takes it as --batch-size",
    "num_processes": "threads make the batches; data.num_threads says how many",
    "pre_fetch": "the next batch is made ahead in any case",
}


def read_ini(path: Path, trainer: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The settings of a `train.ini` by section and key, and what there is to know of the rest.

    Args:
        path: The file.
        trainer: Family whose options are read; it stands in the settings too.

    Returns:
        The settings, each valid, not necessarily with the others; one line for each key that is
        left out or means something else here, with the reason.

    Raises:
        ValueError: The file cannot be read or is of another kind; a value breaks its rule; there is
            no such trainer.
    """
    return _settings_in(_parsed(path), path, trainer)


def read_preset(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The settings of a preset of faceswap's window, as `read_ini` gives them.

    Raises:
        ValueError: The file cannot be read or is no such preset; a value breaks its rule.
    """
    values = _parsed_preset(path)
    section = _section_in(values, path)
    family = section.removeprefix("model.").replace("_", "-")
    if section not in _SECTIONS and family not in models.available():
        raise ValueError(f"{path} is for {section}, which mien does not train")
    file = configparser.ConfigParser(interpolation=None, default_section="")
    # As text: an ini holds nothing else, and one way of reading values serves both.
    options = {key: str(value) for key, value in values.items() if not key.startswith("__")}
    file.read_dict({section: options})
    trainer = family if section.startswith("model.") else ModelConfig().trainer
    settings, report = _settings_in(file, path, trainer)
    if not section.startswith("model."):
        del settings["model"]["trainer"]  # it holds for every family
    return settings, report


def _parsed_preset(path: Path) -> dict[str, Any]:
    """The options of a preset, each a plain value."""
    content = read_content(path, MAX_BYTES)
    try:
        values = json.loads(decoded(content)) if len(content) <= MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {shown(str(error))}") from error
    plain = (str, int, float, list)  # true and false are ints
    if not isinstance(values, dict) or not all(isinstance(v, plain) for v in values.values()):
        raise ValueError(f"{path} must be a preset of faceswap, a table of at most 1 MiB")
    return values


def _section_in(values: dict[str, Any], path: Path) -> str:
    """The section that a preset is for, as a train.ini names it."""
    named = str(values.get("__section", "")).split("|")
    if named[0] == "train" and len(named) > 1:
        return ".".join(named[1:])
    # The longest first: `phaze_a` before what else a name may begin with.
    families = sorted(models.available(), key=len, reverse=True)
    for family in families:
        if path.name.startswith(f"model_{family.replace('-', '_')}_"):
            return _section_of(family)
    raise ValueError(
        f"{path} does not say what it is a preset for: it has no __section, and its name does not "
        "begin with model_ and a trainer"
    )


def _settings_in(
    file: configparser.ConfigParser, path: Path, trainer: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The settings of the sections, and what there is to know of the rest."""
    settings: dict[Place, Any] = {("model", "trainer"): trainer}
    report: list[str] = []
    read_from: dict[Place, str] = {}
    for section, places in _SECTIONS.items():
        for key, text in file[section].items() if section in file else ():
            source = f"[{section}] {key}"
            if key not in places:
                report.append(f"{source}: left out; {_NOT_HERE.get(key, 'no such key is known')}")
                continue
            place = places[key]
            # Said, not decided silently: a file of both layouts was edited by hand.
            if place in read_from:
                report.append(f"{read_from[place]}: left out; {source} counts")
            read_from[place] = source
            meant, value = _value_of(key, text, place)
            # One by one, so that a refusal can name the line that it is about.
            with _naming(f"{path}, {source}"):
                settings[place] = setting_at(place).take(value, ".".join(place))
            if (section, key, meant) in _DIFFERENCES:
                name = ".".join(place)
                report.append(
                    f"{source} = {meant}: {name} is {value}; {_DIFFERENCES[section, key, meant]}"
                )
    options = _options(file, path, trainer, report)
    if options:
        settings["model", "options"] = options
    report += _other_sections(file, trainer)
    return nested(settings), report


def _parsed(path: Path) -> configparser.ConfigParser:
    content = read_content(path, MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} must be a train.ini of at most 1 MiB, and is larger")
    # No text but a section's own is anyone's default, and `%` is a sign like others.
    file = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        text = decoded(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text):
            raise ValueError(f"{path} is not text: it holds control characters")
        text = re.sub(r"(?<=\S)[^\S\n]{2,}", " ", text)  # the parser takes time by their square
        file.read_file(io.StringIO(text, newline=None), source=path.name)
    except configparser.Error as error:
        raise ValueError(
            f"{path} is not a valid ini: {textwrap.shorten(str(error), 200)}"
        ) from error
    if not any(section in _SECTIONS for section in file.sections()):
        raise ValueError(
            f"{path} has no section of a faceswap train.ini, such as [global]; settings of mien "
            "are in a file *.toml"
        )
    return file


def _value_of(key: str, text: str, place: Place) -> tuple[Any, Any]:
    """The value as the file has it, and as mien's setting has it."""
    if key not in SWITCHES:
        value = _typed(text, setting_at(place).type)
        return value, value
    meant = _typed(text, bool)
    return meant, SWITCHES[key].get(meant, meant)


def _typed(text: str, kind: Any) -> Any:
    """The value; text that is none stays as it is, for the setting's own check to refuse."""
    text = text.lower()
    if kind is bool:
        return configparser.ConfigParser.BOOLEAN_STATES.get(text, text)
    if kind == tuple[str, ...]:
        return re.findall(r"[^\s,'\"\[\]]+", text)  # with commas, quotes and brackets, or without
    try:
        return kind(text)
    except ValueError:
        return text


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Have a refusal name the source of the value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _section_of(trainer: str) -> str:
    return f"model.{trainer.replace('-', '_')}"


def _options(
    file: configparser.ConfigParser, path: Path, trainer: str, report: list[str]
) -> dict[str, Any]:
    """The options of the family, checked together; the report gets the keys that are none."""
    known = rules_of(models.family(trainer).Config)
    section = _section_of(trainer)
    options = {}
    for key, text in file[section].items() if section in file else ():
        if key in known:
            options[key] = _typed(text, known[key].type)
        else:
            report.append(f"[{section}] {key}: left out; {trainer} has no such option")
    with _naming(f"{path}, [{section}]"):
        models.options_of(trainer, options)
    return options


def _other_sections(file: configparser.ConfigParser, trainer: str) -> list[str]:
    """One line for the sections of all other families, and one for each that is unknown."""
    of_families = {_section_of(name) for name in models.available()}
    unread = [
        name for name in file.sections() if name not in _SECTIONS and name != _section_of(trainer)
    ]
    others = [f"[{name}]" for name in unread if name in of_families]
    # In one line: a train.ini has the sections of every family, which is no fault.
    lines = [f"{', '.join(others)}: left out; the trainer is {trainer}"] if others else []
    unknown = [name for name in unread if name not in of_families]
    return lines + [f"[{name}]: left out; no such section is known" for name in unknown]
