"""Settings as TOML: read from a file or a `--set`, written, and laid over one another."""

import codecs
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..system.durable_files import open_for_reading
from .sections import Config
from .settings import all_settings, nested, settings_in, to_dict

# All settings, written out, take 3 KiB.
MAX_TOML_BYTES = 1 << 20
MAX_TOML_DEPTH = 32
"""Tables and lists inside one another."""

MAX_TOML_DOTS = 32
"""Most dots in one line: the parser takes time by the square of a dotted key's parts."""

_WINDOWS_PATHS = "; put Windows paths in single quotes, or use / in them"
_SPOILT_WINDOWS_PATH = re.compile(r"(?:[A-Za-z]:|\\[^\\]+)[\b\t\n\f\r\x1b]")
"""Path of a drive or of a server as TOML reads it, such as "C:\\faces" or "\\\\nas\\faces", whose
backslash made an escape."""


def to_toml(config: Config) -> str:
    """The whole config as TOML, with words in the place of the numbers that they stand for."""
    import tomli_w

    values = settings_in(to_dict(config))
    return tomli_w.dumps(nested({spec.place: spec.word_for(value) for spec, value in values}))


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file; ValueError where it cannot be read."""
    content = read_content(path, MAX_TOML_BYTES)
    try:
        return parse_toml(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def read_content(path: Path, max_bytes: int) -> bytes:
    """The content of a file of settings, or of a larger one its first ``max_bytes`` and one more.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        # Links count: whatever is read by this, the user has named.
        with open_for_reading(path, follows_links=True) as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def parse_toml(content: bytes) -> dict[str, Any]:
    """The plain values of TOML that may be a stranger's; ValueError where it is none, or one that
    is too large, too deep or too slow to read."""
    if len(content) > MAX_TOML_BYTES:
        raise ValueError(f"it has more than {MAX_TOML_BYTES} bytes")
    text = decoded(content)
    # Before the parser gets it: once it has begun, nothing stops it.
    if any(line.count(b".") > MAX_TOML_DOTS for line in content.splitlines()):
        raise ValueError(f"a line has more than {MAX_TOML_DOTS} dots")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        # It may quote what it has found, and a stranger's may be as long as the file.
        problem = textwrap.shorten(str(error), 200)
        raise ValueError(f"{problem}{_advice(text, str(error))}") from None
    # Bounded for whoever walks the values by recursion, as JSON and `merge` do.
    if is_deeper(values, MAX_TOML_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_TOML_DEPTH}")
    # Valid TOML, and yet never meant: no path has a tabulator or a form feed in it.
    if any(_SPOILT_WINDOWS_PATH.match(word) for word in _texts(values)):
        raise ValueError(f"a backslash in double quotes begins an escape{_WINDOWS_PATHS}")
    return values


def decoded(content: bytes) -> str:
    """The text of a file of settings, without the byte order mark that some editors put before it;
    ValueError where it is not UTF-8."""
    # Windows's editors save so; without a mark every second byte of plain text is 0.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise ValueError("it is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _advice(text: str, problem: str) -> str:
    """Remedy for a line that is not valid, where it holds a path as Windows writes it."""
    place = re.search(r"at line (\d+)", problem)
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    return _WINDOWS_PATHS if re.search(r'"[^"]*\\', line) else ""


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain values that are not nested deeply."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _texts(inside)


def is_deeper(value: Any, depth: int) -> bool:
    """Whether plain values lie further inside one another than ``depth``."""
    # Level by level and not by recursion, whose limit a stranger's nesting is made to meet.
    level = [value]
    for _ in range(depth + 1):
        inside = (list(v.values()) if isinstance(v, dict) else v for v in level)
        level = [v for values in inside if isinstance(values, list) for v in values]
        if not level:
            return False
    return True


def parse_assignment(text: str) -> dict[str, Any]:
    """``section.key=value`` as nested values; the value is TOML, else plain text.

    Raises:
        ValueError: It is none of that, or its quotes hold what TOML does not allow.
    """
    path, equals, raw = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        meant = [spec.full_name for spec in all_settings() if equals and spec.name == keys[0]]
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise ValueError(f"--set takes section.key=value, got {text!r}{hint}")
    try:
        # As TOML first, so that 5 is a number and true no word; what is none is text as it stands.
        value = parse_toml(f"value = {raw}".encode())["value"]
    except ValueError as error:
        value = raw.strip()
        # Whoever opens a quote means TOML; as plain text the quotes would become part of the value.
        if value.startswith('"'):
            raise ValueError(f"--set {path.strip()} is not valid TOML: {error}") from None
    return nested({tuple(keys): value})
