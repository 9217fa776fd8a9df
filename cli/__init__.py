"""The `mien` command. A subcommand's module is imported only when it is the one that runs."""

import argparse
import difflib
import importlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..core.config import all_settings
from ..core.system.output import OutputLost, guarded_streams
from ..core.system.paths import refusals_told, require_working_folder
from ..core.system.printable import printable
from .lines import complain, require_reader

COMMANDS = {
    "train": "Train a model, or resume one.",
    "demo": "Draw a film and two people, train a small model, swap the film.",
    "faces": "Check, inspect, draw or import folders of faces.",
    "model": "Look after a model folder: inform, verify, restore, scan, write for inference.",
    "swap": "Put the swapped faces into the frames of a film.",
    "preview": "Draw what a save makes of faces; compare saves.",
    "timelapse": "Make a video of a time-lapse's pictures.",
    "preset": "List, show and save settings under a name.",
    "recipe": "List and show recipes: training in stages.",
    "analyze": "Show how a model was trained: its sessions, graphs of its losses.",
    "monitor": "Show a run on a page in the browser: status, preview, graphs, log.",
    "bench": "Measure the parts and the whole.",
    "doctor": "Say what this machine has and which path each part will take.",
    "completion": "Have the Tab key complete commands and flags in a shell.",
}

EXIT_CODES = """exit codes:
  0  done
  1  a failure of mien itself; its traceback is printed
  2  a mistake in the input or the settings; one line says what to do
  3  training halted itself; the state is saved as far as it was good
  4  stopped by a signal; the state is saved
  130, 143  ended at once by a second Ctrl-C or SIGTERM; the last save stays whole
"""


class _Help(argparse.HelpFormatter):
    """Help whose column of meanings leaves room for the names of commands and verbs as well."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        # argparse measures them without the indent that they are printed with.
        for named in self._iter_indented_subactions(action):
            end = self._current_indent + len(self._format_action_invocation(named))
            self._action_max_length = max(self._action_max_length, end)


class _RawHelp(_Help, argparse.RawDescriptionHelpFormatter):
    """The same, with the line breaks of the description and the epilog kept."""


class _Parser(argparse.ArgumentParser):
    """A parser, also of every verb, whose complaints are one line each, whatever is complained of,
    and that takes no flag for another that begins like it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | settings | {"allow_abbrev": False})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1)
            if not meant:
                raise
            hint = f"{error.message}; did you mean {meant[0]}?{_odd_space([str(value)])}"
            raise argparse.ArgumentError(action, hint) from None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see `{self.prog} --help`\n")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code (see `EXIT_CODES`)."""
    argv = sys.argv[1:] if argv is None else argv
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        # Read when PyTorch is loaded, which else prints traces of C++ where another rank has ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "_ARGCOMPLETE" in os.environ:  # set by the shell at each press of the Tab key
        _complete()
    command = argv[0] if argv and argv[0] in COMMANDS else None
    with guarded_streams():
        try:
            return _run(argv, command)
        except OutputLost as lost:
            if lost.reader_has_left:  # whoever reads the output has seen enough
                return 0
            complain(
                command, f"cannot write the output: {lost}; free space, or have it go elsewhere"
            )
            return 2


def _run(argv: list[str], command: str | None) -> int:
    try:
        args, module = _parse(argv, command)
        _refuse_odd_names(args)
        # For the ranks that --gpus starts: they get the same words.
        args.words = argv
        require_working_folder()
        with refusals_told():
            return module.run(args)
    except SystemExit:  # argparse has printed what was asked for
        require_reader()
        raise
    except ValueError as error:  # the user's mistake; anything else is ours and keeps its trace
        complain(command, error)
        return 2
    except KeyboardInterrupt as stopped:
        complain(command, str(stopped) or "interrupted before there was anything to save")
        return 4


def _unknown(word: str, command: str, module: ModuleType | None) -> str:
    """What is wrong with a word that no parser takes, and what may have been meant."""
    if not word.startswith("-"):
        return f"unexpected argument {word}{_odd_dash(word)}"
    name, flags = word.partition("=")[0], _flags_of(command, module)
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
    hint = f"; did you mean `{flags[near[0]]}`?" if near else ""
    return f"unknown flag {name}{hint}"


def _odd_dash(word: str) -> str:
    """Advice where a word begins with a dash that only looks like that of a flag."""
    if not word or unicodedata.category(word[0]) != "Pd":
        return ""
    return f"; its first character is a dash of another kind (U+{ord(word[0]):04X}): type -"


def _odd_space(words: list[str]) -> str:
    """Advice where a word holds a space at which no shell divides, as an input method types it."""
    for word in words:
        for character in filter(_is_odd_space, word):
            return (
                f"; there is a space of another kind (U+{ord(character):04X}) in {word}: "
                "type an ordinary one"
            )
    return ""


def _is_odd_space(character: str) -> bool:
    return character != " " and unicodedata.category(character) == "Zs"


def _refuse_odd_names(args: argparse.Namespace) -> None:
    """Refuse, by ValueError, a name with such a space at an end, which a user does not see there.

    A file or folder that is there may be called so; of others it is most likely the space before
    the next word.
    """
    for path in _paths_in(args):
        odd = next(filter(_is_odd_space, path.name[:1] + path.name[-1:]), None)
        if odd and not os.path.lexists(os.path.expanduser(path)):
            raise ValueError(
                f"{path} begins or ends with a space of another kind (U+{ord(odd):04X}): type an "
                "ordinary space between words, or none"
            )


def _paths_in(args: argparse.Namespace) -> Iterator[Path]:
    """What of the arguments may be a path, each with the folders that it lies in."""
    for name, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) or (isinstance(path, str) and not _is_text(name)):
                yield from (Path(path), *Path(path).parents)


def _is_text(name: str) -> bool:
    """Whether an argument is text that may end as it likes: a command, an address, a sentence."""
    if "." not in name:
        # What is set as plain text loses such spaces by itself.
        return name in ("set", "description")
    from ..core.config.settings import setting_at

    section, key = name.split(".")
    return not setting_at((section, key)).is_path


def _flags_of(command: str, module: ModuleType | None) -> dict[str, str]:
    """How what a flag may be called is given to a command."""
    parser = _Parser()
    assert module is not None  # argparse has refused everything else
    module.add_arguments(parser)
    flags = {flag: flag for action in parser._actions for flag in action.option_strings}
    if command == "train":
        by_set = (spec for spec in all_settings() if not spec.flags)
        flags |= {f"--{spec.name.replace('_', '-')}": spec.way_to_give for spec in by_set}
    return flags


def _complete() -> None:
    """Tell the shell what may follow on its command line, and leave."""
    from argcomplete import autocomplete

    words = os.environ.get("COMP_LINE", "").split()[1:]
    command = words[0] if words and words[0] in COMMANDS else None
    autocomplete(_parser(command)[0])


def _parse(argv: list[str], command: str | None) -> tuple[argparse.Namespace, ModuleType]:
    """The arguments, and the module of the subcommand."""
    parser, subparsers, module = _parser(command)
    # `parse_args` would refuse by itself, and not say what may have been meant.
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        subparsers[args.command].error(
            _unknown(unknown[0], args.command, module) + _odd_space(argv)
        )
    assert module is not None  # argparse has refused everything else
    return args, module


def _parser(
    command: str | None,
) -> tuple[_Parser, dict[str, _Parser], ModuleType | None]:
    """The parser, those of all commands, and the module of this one, whose flags it knows."""
    parser = _Parser(
        prog="mien",
        description="Train face-swap autoencoders, fast and without losing a run.",
        epilog=EXIT_CODES,
        formatter_class=_RawHelp,
    )
    parser.add_argument("--version", action="version", version=f"mien {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(sub)
    return parser, subparsers.choices, module
