"""Panel that a run starts with: rows of a name and a text, in a frame on a terminal."""

from typing import TYPE_CHECKING

from ..system.printable import printable

if TYPE_CHECKING:
    from rich.panel import Panel

Rows = list[tuple[str, str]]
"""Names and texts; the name is empty where a row belongs to the one above."""


def plain_lines(rows: Rows) -> list[str]:
    """The rows without a frame, a line each however long it is."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def framed(rows: Rows) -> "Panel":
    """The rows in a frame as wide as they are, at most as wide as the terminal: texts go on in the
    next line, under their beginning."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")  # a path has no spaces to break it at
    for row in rows:
        # As text and not as markup: a name of a folder may hold brackets.
        table.add_row(*(Text(printable(part)) for part in row))
    return Panel.fit(table, title="mien train", title_align="left")
