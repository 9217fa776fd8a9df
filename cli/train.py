"""mien train: train a model from two folders of faces, or resume one."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from .. import models
from ..core import config as settings
from ..core.config import presets, recipes
from .faceswap_flags import translated_flags
from .lines import complain, tell, tell_json
from .settings_file import read_settings, stages_in
from .train_flags import add_arguments

if TYPE_CHECKING:
    from ..core.distribute.ranks import Ranks
    from ..core.training.resolve import Overrides, Resolved

__all__ = ["add_arguments", "given_settings", "run"]


def given_settings(args: argparse.Namespace) -> "tuple[Overrides, recipes.Recipe | None]":
    """Settings that the user gave, without defaults, and the recipe.

    Weight, lowest first: preset, recipe, file, ``--set``, flags. What a stage sets comes on top.
    """
    from ..core.console.reporter import Notice
    from ..core.training.resolve import Overrides

    preset = presets.load(args.preset) if "preset" in args else None
    recipe = _recipe(args)
    layers = [chosen.settings for chosen in (preset, recipe) if chosen]
    above_file = [settings.parse_assignment(text) for text in getattr(args, "set", [])]
    flags, notices = translated_flags(args)
    for spec in settings.all_settings():
        if spec.full_name in args:
            flags.setdefault(spec.section, {})[spec.name] = getattr(args, spec.full_name)
    if "configfile" in args:
        others = settings.merge(*layers, *above_file, flags)
        read, report = read_settings(args.configfile, others)
        layers.append(read)
        notices += report
    told = tuple(Notice(text) for text in notices)
    # The flags apart: they hold for this session, all else for the next ones too.
    overrides = Overrides(settings.merge(*layers, *above_file), flags, told)
    if preset and preset.trainer and overrides.trainer != preset.trainer:
        raise ValueError(
            f"preset {preset.name} is for {preset.trainer}, not for {overrides.trainer}; leave one "
            "of them out"
        )
    return overrides, recipe


def _recipe(args: argparse.Namespace) -> recipes.Recipe | None:
    """Stages to train in, of a recipe or in the file of settings."""
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
    overrides, recipe = given_settings(args)
    sections = overrides.sections
    if "print_config" in args:
        return _print_config(overrides, recipe, as_json="json" in args)
    if "options" in args:
        return _options(sections["model"].trainer, as_json="json" in args)
    if "summary" in args:
        return _summary(overrides, recipe, as_json="json" in args)
    if "dry_run" in args:
        return _dry_run(overrides, recipe, as_json="json" in args)
    from ..core.distribute.ranks import from_environment

    ranks = from_environment()
    if sections["distribute"] != settings.DistributeConfig():
        _refuse_in_a_rank(ranks)
        from .launch import launch_ranks

        return launch_ranks(args.words, overrides, recipe, as_json="json" in args)
    return _train(overrides, recipe, ranks, as_json="json" in args)


def _refuse_in_a_rank(ranks: "Ranks | None") -> None:
    """Refuse to start ranks where this process is one."""
    if ranks is not None:
        raise ValueError(
            f"this process is rank {ranks.rank} of {ranks.size} already, by its environment (RANK "
            "or SLURM_PROCID); leave out --gpus, --exclude-gpus and --restarts"
        )


def _train(
    overrides: "Overrides",
    recipe: recipes.Recipe | None,
    ranks: "Ranks | None",
    *,
    as_json: bool,
) -> int:
    """Train in this process, alone or as one of several ranks."""
    from ..core.checkpoint.model_folder import SaveError
    from ..core.console.outcome import Outcome
    from ..core.console.reporter import Reporter
    from ..core.console.requests import Requests
    from ..core.console.stop import StopRequest
    from ..core.training.unattended import train
    from .acknowledge import acknowledge
    from .rank import train_as_rank

    if ranks is not None and ranks.size > 1:
        return train_as_rank(overrides, recipe, ranks, as_json=as_json)
    reporter = Reporter(as_json=as_json, level=overrides.sections["log"].level)
    try:
        # A launcher of ranks may have started one only; a signal comes to that twice all the same.
        stop = StopRequest(can_insist=ranks is None)
        with Requests(stop) as requests:
            stop.when_noted.append(lambda: acknowledge(stop))
            return train(overrides, reporter, recipe, requests)
    except SaveError as error:  # before the first step; later the loop tells of it
        complain("train", error)
        return Outcome.HALTED


def _print_config(overrides: "Overrides", recipe: recipes.Recipe | None, as_json: bool) -> int:
    """Every setting and the stages: of the model folder where there is one, else as given."""
    import tomli_w

    resolved = _settings_of(overrides, recipe, as_json)
    text = settings.to_toml(resolved.config)
    if resolved.progress:
        text += tomli_w.dumps({"stage": resolved.progress.recipe.to_dict()["stage"]})
    tell(*text.rstrip("\n").split("\n"))
    return 0


def _summary(overrides: "Overrides", recipe: recipes.Recipe | None, as_json: bool) -> int:
    """The model layer by layer: of the model folder where there is one, else as given."""
    from ..core.distribute.places import num_planned
    from ..kernels.toolkit import cards
    from .summary import print_summary

    config = _settings_of(overrides, recipe, as_json).config
    num_ranks = num_planned(overrides.sections["distribute"], len(cards()))
    print_summary(config, num_ranks, as_json=as_json)
    return 0


def _settings_of(
    overrides: "Overrides", recipe: recipes.Recipe | None, as_json: bool
) -> "Resolved":
    """The settings that training would have; what there is to tell of them goes to stderr."""
    from ..core.console.reporter import Reporter
    from ..core.training.prepare import report_notices, settings_of

    resolved = settings_of(overrides, recipe)
    reporter = Reporter(sys.stderr, as_json=as_json)
    report_notices(reporter, resolved.notices)
    for change in resolved.changes:
        reporter.notice(f"changed since the last session: {change}")
    return resolved


def _options(trainer: str, as_json: bool) -> int:
    """Options of a family, for `model.options`."""
    from ..models.options import describe

    options = describe(models.family(trainer).Config)
    if as_json:
        tell_json(options)
        return 0
    for option in options:
        lock = "free" if option["free"] else "locked"
        default = json.dumps(option["default"])
        tell(
            f"{option['name']} = {default}  ({lock}: {option['rule']})",
            "    " + option["doc"].replace("``", "`"),
        )
    if not options:
        tell(f"{trainer} has no options")
    return 0


def _dry_run(overrides: "Overrides", recipe: recipes.Recipe | None, as_json: bool) -> int:
    """What the run needs and how fast it could be, from two steps."""
    from .dry_run import print_dry_run

    print_dry_run(overrides, recipe, as_json=as_json)
    return 0
