"""One thing that a run reports, in its two forms: text for people, JSON for programs."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from ..system.printable import printable, to_json

LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Report:
    """One report."""

    event: str
    time: float
    """Seconds since 1970."""

    level: str
    text: str
    """Text for people, of one or more lines."""

    line: str
    """JSON object for programs, in one line."""

    @classmethod
    def of(
        cls, event: str, at: float, level: str, lines: list[str], fields: dict[str, Any]
    ) -> "Report":
        """A report in both forms.

        Args:
            event: Kind of it, for programs.
            at: Seconds since 1970.
            level: One of `LEVELS`.
            lines: What people read, in which anything may stand.
            fields: What programs read; values of NumPy and torch, and paths, too.
        """
        # Event and time first, where a reader of many lines looks for them.
        line = to_json({"event": event, "time": at} | _plain(fields))
        return cls(event, at, level, "\n".join(map(printable, lines)), line)

    def is_worth(self, level: str) -> bool:
        """Whether a reader who wants reports from this level on wants this one."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


def _plain(value: Any) -> Any:
    """The same in what JSON has: a number that is not finite becomes null, a path its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    # NumPy's numbers, which JSON does not know, are of these kinds as well.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        # JSON has no NaN: a reader would refuse the whole line.
        return float(value) if math.isfinite(value) else None
    return str(value)
