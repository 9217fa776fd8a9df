"""What mien asks of its environment, and the commands that install what is missing."""

import importlib.metadata
import re
import shlex
import sys

DALI = "nvidia-dali-cuda130"
"""Package that DALI comes in, the one that mien does without where it is missing."""


def install_command(*requirements: str) -> str:
    """Shell command that installs packages for the Python that runs.

    Not `pip install`: where no virtual environment is active, that pip belongs to another Python.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


def uninstall_command(package: str) -> str:
    """Shell command that removes a package from the Python that runs."""
    return shlex.join([sys.executable, "-m", "pip", "uninstall", "--yes", package])


def requirement(package: str) -> str:
    """Versions of a package that mien takes, as pip is told: such as "torch<2.14,>=2.11"."""
    asked_for = (line.partition(";")[0].strip() for line in _asked_for())
    return next((each for each in asked_for if _name(each) == package), package)


def required() -> list[str]:
    """Names of the packages that mien is installed with, whatever extras are asked for."""
    return [_name(line) for line in _asked_for() if "extra ==" not in line]


def _asked_for() -> list[str]:
    """Requirements of mien's metadata; none of a source tree that is only on the path."""
    try:
        return importlib.metadata.requires("mien") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _name(line: str) -> str:
    """Name of the package that a requirement is of."""
    return re.split(r"[^\w.-]", line, maxsplit=1)[0]
