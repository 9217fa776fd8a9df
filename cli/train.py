"""mien train: train a model from two folders of faces, or resume one."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..core import config as settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting that has one, and the ways to give all the others."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for spec in settings.all_settings():
        if spec.flags:
            _add_flag(parser, spec)
    quiet: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "-C", "--configfile", type=Path, metavar="RUN.TOML", help="settings", **quiet
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
        options["type"] = spec.type
        options["metavar"] = spec.name.upper()
        if spec.default != "":
            options["help"] += f" (default: {spec.default})"
        if spec.choices:
            options["help"] += f" One of: {', '.join(spec.choices)}."
    parser.add_argument(*spec.flags, **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Only what the user gave, nested by section: file, then ``--set``, then flags."""
    layers = []
    if "configfile" in args:
        layers.append(settings.read_toml(args.configfile))
    layers += [settings.parse_assignment(text) for text in getattr(args, "set", [])]
    flags: dict[str, Any] = {}
    for spec in settings.all_settings():
        if f"{spec.section}.{spec.name}" in args:
            value = getattr(args, f"{spec.section}.{spec.name}")
            flags.setdefault(spec.section, {})[spec.name] = value
    return settings.merge(*layers, flags)


def run(args: argparse.Namespace) -> int:
    """Train; the exit code says how it ended."""
    given = given_settings(args)
    config = settings.from_dict(given)
    if "print_config" in args:
        import tomli_w

        sys.stdout.write(tomli_w.dumps(settings.to_dict(config)))
        return 0
    from ..core.run.checkpoint import SaveError
    from ..core.run.log import Reporter
    from ..core.train.loop import HALTED, train

    try:
        return train(given, Reporter(as_json="json" in args))
    except SaveError as error:  # before the first step; later the loop tells of it
        print(f"mien train: {error}", file=sys.stderr)
        return HALTED
