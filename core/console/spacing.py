"""Thinning out of what a run reports at each iteration, so that years of it fit on a disk."""

from typing import Any

_MEANS = ("loss_a", "loss_b", "eg_per_s", "data_wait")


class Pause:
    """Pause of so many seconds, at least, between two of something."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: float | None = None

    def is_over(self, now: float) -> bool:
        """Whether it is time again; then the next pause begins. now: seconds of any clock."""
        # A clock that was set back must not silence the run.
        if self._last is not None and 0 <= now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Spacing:
    """Status reports, of which at most one in some seconds is kept.

    The one that is kept stands for all since the one before: its losses, speed and waits are means
    over the iterations, all else is as it was last.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept_at: float | None = None
        self._iteration = 0
        """Total iteration of the last report."""

        self._held: list[tuple[int, dict[str, Any], float]] = []
        """Reports that are not kept yet: iterations that each stands for, fields, time."""

    def add(self, fields: dict[str, Any], at: float) -> bool:
        """Take in a report of so many seconds since 1970; whether it is time to keep one."""
        # A run that went back has lower numbers: each such report stands for one iteration.
        count = max(fields["iteration"] - self._iteration, 1) if self._iteration else 1
        self._iteration = fields["iteration"]
        self._held.append((count, fields, at))
        # A clock that was set back must not silence the run.
        return self._kept_at is None or not 0 <= at - self._kept_at < self._seconds

    def take(self) -> tuple[dict[str, Any], float] | None:
        """The report to keep and its time; None where there is none since the last one."""
        held, self._held = self._held, []
        if not held:
            return None
        _, latest, self._kept_at = held[-1]
        if len(held) == 1:
            return latest, self._kept_at
        total = sum(count for count, _, _ in held)
        means = {
            name: sum(count * fields[name] for count, fields, _ in held) / total for name in _MEANS
        }
        return latest | means, self._kept_at


class Means:
    """Means over some iterations in a row."""

    def __init__(self) -> None:
        self.count = 0
        self.step, self.wall_time = 0, 0.0
        """Total iteration of the last of them, and its time in seconds since 1970."""

        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float], step: int, wall_time: float) -> None:
        """Take in one more iteration; it may lack values that others have."""
        self.count += 1
        self.step, self.wall_time = step, wall_time
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            # Of each name by itself: a loss that is not logged every time must not count as 0.
            self._counts[name] = self._counts.get(name, 0) + 1

    def values(self) -> dict[str, float]:
        """The mean of each value over the iterations that have it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
