"""The flags of `mien train`: those that everybody needs, then the others by what they are about."""

import argparse
import functools
from pathlib import Path
from typing import Any

from .. import models
from ..core import config as settings
from ..core.config import presets, recipes
from .completion import complete_with
from .faceswap_flags import add_faceswap_flags

_EVERYBODY = "what everybody needs"

_ESSENTIAL = (
    "data.input_a",
    "data.input_b",
    "save.model_dir",
    "model.trainer",
    "train.batch_size",
    "train.iterations",
)

_TITLES = {
    "data": "faces",
    "augment": "faces",
    "model": "model",
    "loss": "learning",
    "optimizer": "learning",
    "precision": "running",
    "train": "running",
    "distribute": "running",
    "save": "saving",
    "preview": "watching",
    "log": "watching",
    "notify": "watching",
}
"""Title under which the flags of each section stand, in the order of the page."""

_LEARNING = ("train.freeze_weights", "train.seed")  # of the section of the run, but about learning

_EPILOG = (
    "A flag holds for this session, save for those that make a model (-t, -A, -B, -r, --seed); "
    "what comes by --set, --configfile, --preset or --recipe stays with the model. Every switch "
    "has an opposite: --no-warp and --warp, --strict and --no-strict. All settings, also those "
    "without a flag: --print-config. "
    "While it runs, on a terminal and in the window: Enter saves and quits, s saves, r renews the "
    "preview, m shows the mask as a tint, or as it was. From elsewhere: SIGTERM saves and quits, "
    "SIGUSR1 saves, SIGUSR2 renews the preview."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for every setting that has one, and the ways to give all the others."""
    parser.usage = "%(prog)s -A FACES -B FACES -m FOLDER [flags]"
    parser.epilog = _EPILOG
    # In the order of the page: argparse shows groups as they are made.
    titles = dict.fromkeys((_EVERYBODY, *_TITLES.values(), "showing without training"))
    groups = {title: parser.add_argument_group(title) for title in titles}
    specs = [spec for spec in settings.all_settings() if spec.flags]
    # The essential ones in their own order; the sort leaves all others as they are.
    for spec in sorted(specs, key=_place_of):
        _add_flag(groups[_title_of(spec)], spec)
    add_faceswap_flags(groups[_TITLES["distribute"]])
    _add_files(groups[_EVERYBODY])
    _add_looks(groups["showing without training"])
    groups["watching"].add_argument(
        "--json",
        action="store_true",
        help="Print events, one JSON object a line.",
        default=argparse.SUPPRESS,
    )


def _place_of(spec: settings.Spec) -> int:
    """Place of a flag among those that everybody needs; the same number for all others."""
    name = spec.full_name
    return _ESSENTIAL.index(name) if name in _ESSENTIAL else len(_ESSENTIAL)


def _title_of(spec: settings.Spec) -> str:
    """Title under which a flag stands."""
    if spec.full_name in _ESSENTIAL:
        return _EVERYBODY
    return "learning" if spec.full_name in _LEARNING else _TITLES[spec.section]


def _add_files(group: argparse._ArgumentGroup) -> None:
    """Declare the ways to give more than one setting."""
    quiet: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument(
        "-C",
        "--configfile",
        type=Path,
        metavar="RUN.TOML|TRAIN.INI",
        help="Settings and stages, or a faceswap train.ini or preset (.json); what of it has no "
        "effect is told.",
        **quiet,
    )
    preset = group.add_argument(
        "--preset", metavar="NAME", help="Settings under a name: see `mien preset list`.", **quiet
    )
    complete_with(preset, lambda: (each.name for each in presets.available()))
    recipe = group.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="Train in stages: see `mien recipe list`; none: leave the recipe of a model.",
        **quiet,
    )
    complete_with(recipe, lambda: ("none", *(each.name for each in recipes.available())))
    group.add_argument(
        "--set",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="Any setting; `--print-config` shows them all.",
        **quiet,
    )


def _add_looks(group: argparse._ArgumentGroup) -> None:
    """Declare what is shown in place of training."""
    quiet: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    group.add_argument(
        "--dry-run",
        help="Run two steps, say what the run needs and how fast it could be, and leave.",
        **quiet,
    )
    group.add_argument("--print-config", help="Print every setting as TOML and leave.", **quiet)
    group.add_argument(
        "--options", help="Print the options of the trainer, `model.options`, and leave.", **quiet
    )
    group.add_argument(
        "-u",
        "--summary",
        help="Print the model layer by layer and leave; needs no faces.",
        **quiet,
    )


def _add_flag(group: argparse._ArgumentGroup, spec: settings.Spec) -> None:
    # Without a default: what is not given is not in the namespace, and so overrides nothing.
    options: dict[str, Any] = {
        "dest": f"{spec.section}.{spec.name}",
        "default": argparse.SUPPRESS,
        # argparse formats the text with %.
        "help": spec.doc.replace("%", "%%"),
    }
    if spec.type is bool:
        options["action"], opposite = "store_true", "store_false"
        if spec.turns_off:
            options["action"], opposite = opposite, options["action"]
            # The text of a switch is what it does, so it begins with a verb.
            options["help"] = f"Do not {options['help'][0].lower()}{options['help'][1:]}"
    else:
        options["type"] = functools.partial(_value, spec)
        options["metavar"] = spec.name.upper()
        if spec.is_list_of_paths:
            options["action"] = "append"  # a flag for each, since a word behind it may be anything
        elif spec.type == tuple[str, ...]:
            options["nargs"] = "+"
        if spec.default not in ("", ()):
            options["help"] += f" (default: {spec.default})"
        if spec.choices:
            options["help"] += f" One of: {', '.join(spec.choices)}."
        if spec.name == "trainer":
            options["help"] += f" There are: {', '.join(models.available())}."
    action = group.add_argument(*spec.flags, **options)
    words = models.available() if spec.name == "trainer" else spec.choices
    if words:  # else the Tab key completes names of files
        complete_with(action, words)
    if spec.type is bool:
        # Told once, below all flags: a line for each would hide those that matter.
        options |= {"action": opposite, "help": argparse.SUPPRESS}
        group.add_argument(spec.opposite, **options)


def _value(spec: settings.Spec, text: str) -> Any:
    """The value of a flag; a word that stands for a number is left to the settings themselves."""
    if spec.type in (str, tuple[str, ...]) or text.partition(":")[0] in spec.words:
        return text
    try:
        return spec.type(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {spec.rule}, got {text!r}") from None
