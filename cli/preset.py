"""mien preset: settings under a name, mien's and one's own."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..core import config as settings
from ..core.config import presets
from ..core.console.reporter import Reporter
from .lines import tell, tell_json
from .settings_file import read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the three verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = "Name every preset and what it is for."
    listing = verbs.add_parser("list", help=text, description=text)
    text = "Print the settings of a preset, as `--configfile` would take them."
    show = verbs.add_parser("show", help=text, description=text)
    show.add_argument("name", metavar="NAME", help="as `mien preset list` has it")
    text = "Save settings under a name, for `mien train --preset NAME`."
    save = verbs.add_parser(
        "save",
        help=text,
        description=f"{text} Folders and files of a run are left out; every path is, of a model.",
    )
    save.add_argument("name", metavar="NAME", help="letters, digits, '.', '-' and '_'")
    save.add_argument(
        "folder", nargs="?", type=Path, metavar="MODEL_DIR", help="the same as --from MODEL_DIR"
    )
    save.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="MODEL_DIR|RUN.TOML|TRAIN.INI|PRESET.JSON",
        help="a model's folder, a file of settings, or a train.ini or preset of faceswap",
    )
    save.add_argument("-t", "--trainer", metavar="TRAINER", help="model family")
    save.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting"
    )
    save.add_argument("--description", default="", metavar="TEXT", help="one line about it")
    save.add_argument("--force", action="store_true", help="replace the one of this name")
    for verb in (listing, show, save):
        verb.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out one verb."""
    return {"list": _list, "show": _show, "save": _save}[args.verb](args)


def _list(args: argparse.Namespace) -> int:
    available = presets.available()
    if args.json:
        tell_json([_facts(preset) for preset in available])
        return 0
    name_width, trainer_width = (
        max(len(word) for word in words)
        for words in zip(*((preset.name, preset.trainer) for preset in available), strict=True)
    )
    costs = presets.costs()
    for preset in available:
        mark = "own " if preset.is_own else "mien"
        words = f"{mark} {preset.name:<{name_width}} {preset.trainer:<{trainer_width}}"
        cost = _cost(costs[preset.name]) if preset.name in costs and not preset.is_own else ""
        tell(f"{words} {cost}".rstrip(), f"     {preset.description}".rstrip())
    tell(
        "",
        "px in and out, batch size, GPU memory and the most EG/s of an RTX 4090 and an H100, in",
        "bf16: computed from the model, not measured; good steps reach half of it.",
    )
    return 0


def _cost(cost: dict[str, Any]) -> str:
    """What a preset asks of a GPU, in columns."""
    speeds = cost["roofline_eg_per_s"]
    sizes = f"{cost['input_px']}->{cost['output_px']}"
    return (
        f"{sizes:>9} b{cost['batch_size']:<3}{cost['memory_mib'] / 1024:5.1f} GiB"
        f"{speeds['rtx4090']:7,}{speeds['h100']:8,}"
    )


def _show(args: argparse.Namespace) -> int:
    preset = presets.load(args.name)
    if args.json:
        tell_json(_facts(preset) | {"settings": preset.settings})
    else:
        tell(*preset.path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines())
    return 0


def _save(args: argparse.Namespace) -> int:
    if args.folder and args.source:
        raise ValueError(f"--from {args.source} and {args.folder} are two sources; give one")
    args.source = args.folder or args.source
    layers = [settings.parse_assignment(text) for text in args.set]
    if args.trainer is not None:
        layers.append({"model": {"trainer": args.trainer}})
    if args.source is not None and args.source.is_dir():
        layers.insert(0, _settings_of_model(args.source))
    elif args.source is not None:
        others = settings.merge(*layers)
        read, report = read_settings(args.source, others)
        layers.insert(0, read)
        reporter = Reporter(sys.stderr, as_json=args.json)
        for line in report:
            reporter.notice(line)
    values = settings.merge(*layers)
    _check_options(values)
    saved = presets.save(args.name, values, description=args.description, force=args.force)
    if args.json:
        tell_json(_facts(saved), indent=None)
    else:
        tell(f"saved {saved.path}; use it with `mien train --preset {saved.name}`")
    return 0


def _settings_of_model(source: Path) -> dict[str, Any]:
    """The settings in a model's folder, less the paths: it may come from a stranger."""
    from ..core.checkpoint.format import read_settings as settings_in
    from ..core.config.path_settings import paths_in

    values = settings_in(source)
    if values is None:
        raise ValueError(f"{source} holds no config.toml; --from takes a model's folder or a file")
    try:
        values = settings.to_dict(settings.from_dict(values))
    except ValueError as error:
        raise ValueError(f"{source / 'config.toml'}: {error}") from error
    paths = paths_in(values, values["model"]["trainer"])
    return settings.merge(values, settings.nested(dict.fromkeys(paths, "")))


def _check_options(values: dict[str, Any]) -> None:
    """Refuse options that the family does not have, or not so."""
    from .. import models

    model = settings.from_dict(values).model
    models.options_of(model.trainer, model.options)


def _facts(preset: presets.Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "trainer": preset.trainer,
        "description": preset.description,
        "is_own": preset.is_own,
        "path": str(preset.path),
        "cost": None if preset.is_own else presets.costs().get(preset.name),
    }
