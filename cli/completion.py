"""mien completion: what a shell needs so that the Tab key completes commands, flags and words."""

import argparse
from collections.abc import Callable, Iterable

from .lines import tell

SHELLS = ("bash", "zsh", "fish")

_EPILOG = """for every shell from now on:
  bash   mien completion bash >> ~/.bashrc
  zsh    mien completion zsh >> ~/.zshrc
  fish   mien completion fish > ~/.config/fish/completions/mien.fish
for this one alone: source <(mien completion bash)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=SHELLS, help="shell that is to complete")


def run(args: argparse.Namespace) -> int:
    """Print what the shell is to read."""
    from argcomplete import shellcode

    tell(*shellcode(["mien"], shell=args.shell).strip("\n").split("\n"))
    return 0


def complete_with(
    action: argparse.Action, words: Iterable[str] | Callable[[], Iterable[str]]
) -> None:
    """Have the Tab key complete the value of a flag with these words, or those that are there."""

    def completer(**_context: object) -> list[str]:
        return list(words() if callable(words) else words)

    action.completer = completer  # type: ignore[attr-defined]  # argcomplete looks for it
