"""Completion of commands, flags and words by the Tab key."""

import os
import subprocess
import sys

import pytest

from mien import models
from mien.cli import COMMANDS, main
from mien.cli.completion import SHELLS


def offered(line: str) -> list[str]:
    """What a shell is offered at the end of a line."""
    # argcomplete writes to handle 8, which `sh` ties to the standard output.
    command = f'"{sys.executable}" -m mien.cli 8>&1 >/dev/null'
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | asked, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.split("\n") if word]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mien tra", ["train"]),
        ("mien train --no-f", ["--no-flip"]),
        ("mien train --trainer ", sorted(models.available())),
        ("mien train --preset clipfaker1", ["clipfaker128"]),
        ("mien model inf", ["inference", "info"]),
    ],
)
def test_the_tab_key(line, words):
    assert sorted(offered(line)) == words


@pytest.mark.parametrize("shell", SHELLS)
def test_what_a_shell_reads(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_ARGCOMPLETE" in capsys.readouterr().out


def test_every_command_can_be_completed():
    assert {word for word in offered("mien ") if not word.startswith("-")} == set(COMMANDS)
