"""mien train: train a model from two folders of faces, or resume one."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..core import config as settings
from ..core import presets, recipes
from .lines import complain, tell, tell_json
from .settings_file import read_settings, stages_in

if TYPE_CHECKING:
    from ..core.train.stages import Plan


_WHILE_IT_RUNS = (
    "While it runs, on a terminal and in the window: Enter saves and quits, s saves, r renews the "
    "preview, m shows it with or without its mask. From elsewhere: SIGTERM saves and quits, "
    "SIGUSR1 saves, SIGUSR2 renews the preview."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting that has one, and the ways to give all the others."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.epilog = _WHILE_IT_RUNS
    for spec in settings.all_settings():
        if spec.flags:
            _add_flag(parser, spec)
    quiet: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "-C",
        "--configfile",
        type=Path,
        metavar="RUN.TOML|TRAIN.INI",
        help="settings and stages, or a faceswap train.ini; what of it has no effect is told",
        **quiet,
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="settings under a name: see `mien preset list`", **quiet
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="train in stages: see `mien recipe list`; none: leave the recipe of a model",
        **quiet,
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="any setting; `--print-config` shows them all",
        **quiet,
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting as TOML and leave", **quiet
    )
    parser.add_argument(
        "--options",
        action="store_true",
        help="print the options of the trainer, `model.options`, and leave",
        **quiet,
    )
    parser.add_argument(
        "-u",
        "--summary",
        action="store_true",
        help="print the model layer by layer and leave; needs no faces",
        **quiet,
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run two steps, say what the run needs and how fast it could be, and leave",
        **quiet,
    )
    parser.add_argument(
        "--json", action="store_true", help="print events, one JSON object a line", **quiet
    )


def _add_flag(parser: argparse.ArgumentParser, spec: settings.Spec) -> None:
    options: dict[str, Any] = {
        "dest": f"{spec.section}.{spec.name}",
        "default": argparse.SUPPRESS,
        "help": spec.doc.replace("%", "%%"),
    }
    if spec.type is bool:
        turns_off = any(flag.startswith("--no-") for flag in spec.flags)
        options["action"] = "store_false" if turns_off else "store_true"
        if turns_off:
            options["help"] = f"Turn this off: {options['help']}"
    else:
        # A word that stands for a number is understood by the settings themselves.
        words = spec.words
        options["type"] = (
            (lambda text: text if text in words else int(text)) if words else spec.type
        )
        options["metavar"] = spec.name.upper()
        if spec.default != "":
            options["help"] += f" (default: {spec.default})"
        if spec.choices:
            options["help"] += f" One of: {', '.join(spec.choices)}."
        if spec.name == "trainer":
            options["help"] += f" There are: {', '.join(models.available())}."
    parser.add_argument(*spec.flags, **options)


def given_settings(args: argparse.Namespace) -> tuple[dict[str, Any], recipes.Recipe | None]:
    """Only what the user gave, nested by section, and the recipe.

    Weight, lowest first: preset, recipe, file, ``--set``, flags. What a stage sets comes on top.
    """
    preset = presets.load(args.preset) if "preset" in args else None
    recipe = _recipe(args)
    layers = [chosen.settings for chosen in (preset, recipe) if chosen]
    above_file = [settings.parse_assignment(text) for text in getattr(args, "set", [])]
    flags: dict[str, Any] = {}
    for spec in settings.all_settings():
        if f"{spec.section}.{spec.name}" in args:
            value = getattr(args, f"{spec.section}.{spec.name}")
            flags.setdefault(spec.section, {})[spec.name] = value
    above_file.append(flags)
    if "configfile" in args:
        others = settings.merge(*layers, *above_file)
        layers.append(read_settings(args.configfile, others, as_json="json" in args))
    given = settings.merge(*layers, *above_file)
    trainer = given.get("model", {}).get("trainer")
    if preset and preset.trainer and trainer != preset.trainer:
        raise ValueError(
            f"preset {preset.name} is for {preset.trainer}, not for {trainer}; leave one of them "
            "out"
        )
    return given, recipe


def _recipe(args: argparse.Namespace) -> recipes.Recipe | None:
    """What is to be trained in stages, as a recipe or in the file of settings."""
    in_file = stages_in(args.configfile) if "configfile" in args else None
    if "recipe" not in args:
        return in_file
    if in_file is not None:
        raise ValueError(
            f"{args.configfile} lists stages, and --recipe gives others; leave one of them out"
        )
    return recipes.load(args.recipe)


def run(args: argparse.Namespace) -> int:
    """Train; the exit code says how it ended."""
    given, recipe = given_settings(args)
    config = settings.from_dict(given)
    if "print_config" in args:
        import tomli_w

        stages = {"stage": recipe.to_dict()["stage"]} if recipe and recipe.stages else {}
        tell(*tomli_w.dumps(settings.to_dict(_with_options(config)) | stages).splitlines())
        return 0
    if "options" in args:
        return _options(config.model.trainer, as_json="json" in args)
    if "summary" in args:
        return _summary(given, recipe, as_json="json" in args)
    if "dry_run" in args:
        return _dry_run(given, recipe, as_json="json" in args)
    from ..core.run.checkpoint import SaveError
    from ..core.run.log import Reporter
    from ..core.train.loop import HALTED
    from ..core.train.unattended import train

    try:
        return train(given, Reporter(as_json="json" in args, level=config.log.level), recipe)
    except SaveError as error:  # before the first step; later the loop tells of it
        complain("train", error)
        return HALTED


def _summary(given: dict[str, Any], recipe: recipes.Recipe | None, as_json: bool) -> int:
    """The model layer by layer: of the model folder where there is one, else as given."""
    from ..core.run.log import Reporter
    from ..core.train.prepare import settings_of
    from .summary import print_summary

    config, _ = settings_of(given, Reporter(sys.stderr), recipe)
    print_summary(config, as_json=as_json)
    return 0


def _with_options(config: settings.Config) -> settings.Config:
    """The settings with every option of the trainer written out."""
    options = dataclasses.asdict(models.options_of(config.model.trainer, config.model.options))
    return settings.from_dict(
        settings.merge(settings.to_dict(config), {"model": {"options": options}})
    )


def _options(trainer: str, as_json: bool) -> int:
    """What `model.options` may hold."""
    from ..models.options import describe

    found = describe(models.family(trainer).Config)
    if as_json:
        tell_json(found)
        return 0
    for each in found:
        kept = "free" if each["free"] else "locked"
        default = json.dumps(each["default"])
        tell(f"{each['name']} = {default}  ({kept}: {each['rule']})", f"    {each['doc']}")
    if not found:
        tell(f"{trainer} has no options")
    return 0


def _dry_run(given: dict[str, Any], recipe: recipes.Recipe | None, as_json: bool) -> int:
    """Parameters, memory, two steps, and what the card's roofline allows."""
    from ..benchmarks import ceilings, harness, roofline
    from ..core.run.log import Reporter
    from ..core.train.dry_run import rehearse
    from ..core.train.memory import describe
    from ..core.train.work import meta_model

    found = rehearse(given, Reporter(sys.stderr if as_json else sys.stdout), recipe)
    model, batch_size = found.config.model, found.config.train.batch_size
    card = harness.known_ceilings() or ceilings.measure_ceilings(found.device)
    meta = meta_model(found.config)
    bound = roofline.ceiling(roofline.work_of(meta, batch_size), ceilings.card_of(card))
    facts = {
        "trainer": model.trainer,
        "parameters": found.num_parameters,
        "batch_size": batch_size,
        "precision": found.precision,
        "gpu_memory_mib": round(found.memory.total_mib),
        "free_mib": round(found.free_bytes / 2**20),
        "peak_mib": found.peak_mib,
        "losses": found.losses,
        "second_step_s": found.step_s,
        "roofline_eg_per_s": round(bound.eg_per_s, 1),
        "roofline_of": card["device"],
        "bound_by": bound.binds,
        "stages": _stages(found.plan),
    }
    if as_json:
        tell_json(facts, indent=None)
        return 0
    tell(f"parameters   {found.num_parameters:,}")
    tell(f"GPU memory   {describe(found.memory, found.free_bytes)}")
    for number, losses in enumerate(found.losses, 1):
        tell(f"step {number}       Loss A: {losses['loss_a']:.5f}, Loss B: {losses['loss_b']:.5f}")
    tell(
        f"roofline     {bound.eg_per_s:,.0f} EG/s on {card['device']} in bf16, bound by "
        f"{bound.binds}; no run can be faster, good ones reach half of it"
    )
    for line in _stages(found.plan):
        tell(f"stage        {line}")
    tell("dry run: nothing was kept")
    return 0


def _stages(plan: "Plan | None") -> list[str]:
    """A line for each stage of the run, the present one marked."""
    if plan is None:
        return []
    lines = recipes.describe(plan.recipe)
    lines[plan.place.stage] += f" (now, since iteration {plan.place.begun})"
    return lines
