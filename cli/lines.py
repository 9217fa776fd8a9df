"""What commands print: lines for people, in which no name does anything, or facts as JSON.

It is what most commands are called for: where nobody can read it, `OutputLost` ends them.
"""

import sys
from typing import TYPE_CHECKING, Any

from ..core.system.output import Output
from ..core.system.printable import printable, to_json

if TYPE_CHECKING:
    from rich.table import Table


def tell(*lines: str) -> None:
    """Print lines; each stays one, whatever it holds."""
    for line in lines:
        print(printable(line))
    require_reader()


def tell_stage(line: str) -> None:
    """Print what is being done at once; the work goes on where nobody reads that any more."""
    print(printable(line), flush=True)


def tell_json(value: Any, indent: int | None = 1) -> None:
    """Print plain values as JSON."""
    print(to_json(value, indent))
    require_reader()


def show(table: "Table") -> None:
    """Draw a table on a terminal."""
    from rich.console import Console

    Console().print(table)
    require_reader()


def complain(command: str | None, text: object) -> None:
    """Print a line on the standard error, under the name of the command."""
    name = f"mien {command}" if command else "mien"
    print(f"{name}: {printable(str(text))}", file=sys.stderr)


def require_reader() -> None:
    """Make sure that what was printed can be read."""
    if isinstance(sys.stdout, Output):
        sys.stdout.require()
