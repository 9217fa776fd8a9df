"""What commands print: lines for people, in which no name does anything, or facts as JSON."""

import sys
from typing import Any

from ..core.printable import printable, to_json


def tell(*lines: str) -> None:
    """Print lines; each stays one, whatever it holds."""
    for line in lines:
        print(printable(line), flush=True)


def tell_json(value: Any, indent: int | None = 1) -> None:
    """Print plain values as JSON."""
    print(to_json(value, indent))


def complain(command: str | None, text: object) -> None:
    """Print a line on the standard error, under the name of the command."""
    name = f"mien {command}" if command else "mien"
    print(f"{name}: {printable(str(text))}", file=sys.stderr)
