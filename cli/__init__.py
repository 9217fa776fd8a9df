"""The `mien` command. A subcommand's module is imported only when it is the one that runs."""

import argparse
import importlib
import os
import sys

from .. import __version__

COMMANDS = {
    "train": "Train a model, or resume one.",
    "demo": "Draw two face sets and train a small model on them.",
    "faces": "Check, inspect or draw folders of faces.",
    "model": "Look after a model folder: inform, verify, restore, scan, write for inference.",
    "timelapse": "Make a film of a time-lapse's pictures.",
    "preset": "List, show and save settings under a name.",
    "recipe": "List and show recipes: training in stages.",
    "analyze": "Show how a model was trained: its sessions, graphs of its losses.",
    "monitor": "Show a run on a page in the browser: status, preview, graphs, log.",
    "bench": "Measure the parts and the whole.",
    "doctor": "Say what this machine has and which path each part will take.",
}

EXIT_CODES = """exit codes:
  0  done
  1  a failure of mien itself; its traceback is printed
  2  a mistake in the input or the settings; one line says what to do
  3  training halted itself; the state is saved as far as it was good
  4  stopped by a signal; the state is saved
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code (see `EXIT_CODES`)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="mien",
        description="Train face-swap autoencoders, fast and without losing a run.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mien {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    module = None
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(sub)
    args = parser.parse_args(argv)
    assert module is not None  # argparse has refused everything else
    try:
        return module.run(args)
    except ValueError as error:  # the user's mistake; anything else is ours and keeps its trace
        print(f"mien {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            f"mien {args.command}: interrupted before there was anything to save", file=sys.stderr
        )
        return 4
