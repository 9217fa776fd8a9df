"""Text for people of what may hold anything: file names, headers, settings of a stranger."""

import json
import os
from typing import Any


def printable(text: str) -> str:
    r"""The same on one line, with escapes in the place of what a terminal or a log would obey.

    These are line ends, control characters such as ESC, marks that turn the direction of writing,
    and what has no sign of its own. A byte of a file name that is no UTF-8 is shown as `\xe4`.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def printable_values(value: Any) -> Any:
    """Plain values whose texts, in lists and dictionaries too, are as `printable` shows them."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: printable_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(printable_values, value))
    return value


def _escape(letter: str) -> str:
    """A letter as TOML and JSON write it, a byte that is no text as shells do."""
    number = ord(letter)
    if 0xDC80 <= number <= 0xDCFF:  # Python's stand-ins for such bytes
        return f"\\x{number - 0xDC00:02x}"
    if letter in "\b\t\n\f\r":
        return json.dumps(letter)[1:-1]
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def plural(count: float, one: str, many: str = "") -> str:
    """The word, or words, that fit a count: those for one, or those for many (one's with an s)."""
    return one if count == 1 else many or f"{one}s"


def to_json(value: Any, indent: int | None = None) -> str:
    """Plain values and paths as JSON, which holds nothing that a terminal would obey."""
    # No NaN, which is Python's own word: other readers of JSON refuse all of the text for it.
    text = json.dumps(value, indent=indent, allow_nan=False, default=os.fspath)
    return text.replace("\x7f", "\\u007f")  # the one such character that JSON leaves as it is
