"""Two measurements of the same things on the same device: what changed, and is it more than noise?

Or of two devices, from two files: how much faster is one?

Run: ``mien bench step --compare FILE``, ``mien bench --compare FILE FILE``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .harness import identity

_METRICS = (  # figure, its low and high end, whether less is better
    ("median_ms", "p10_ms", "p90_ms", True),
    ("faces_per_wall_s", "faces_per_wall_s_low", "faces_per_wall_s_high", False),
    ("eg_per_s", "eg_per_s_low", "eg_per_s_high", False),
    ("first_s", "first_s", "first_s", True),
)


@dataclass(frozen=True)
class Change:
    """One measurement, before and after."""

    what: str
    figure: str
    old: float
    new: float
    exceeds_spread: bool | None
    """Whether the two spreads do not meet; None where a row has none."""

    less_is_better: bool

    @property
    def ratio(self) -> float:
        return self.new / self.old

    @property
    def verdict(self) -> str:
        """Verdict in words."""
        if self.exceeds_spread is None:
            return "spread unknown"
        if not self.exceeds_spread:
            return "within the spread"
        return "better" if (self.new < self.old) == self.less_is_better else "worse"


def require_same_device(old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError unless both results files are of one device, with as many cores."""
    for key, word in (("card", "device"), ("cores", "number of cores")):
        if old[key] != new[key]:
            raise ValueError(
                f"only results of the same {word} can be compared: the file is of {old[key]}, "
                f"this is {new[key]}"
            )


def changes(old_rows: list[dict[str, Any]], new_rows: list[dict[str, Any]]) -> list[Change]:
    """Every measurement that both have, in the order of the new ones."""
    before = {identity(row): row for row in old_rows}
    pairs = [(before.get(identity(row)), row) for row in new_rows]
    found = [_change(old, new) for old, new in pairs if old is not None]
    return [change for change in found if change is not None]


def _change(old: dict[str, Any], new: dict[str, Any]) -> Change | None:
    for figure, low, high, less_is_better in _METRICS:
        if not (old.get(figure) and new.get(figure)):
            continue
        exceeds = None
        if low != figure and all(row.get(end) for row in (old, new) for end in (low, high)):
            exceeds = new[low] > old[high] or new[high] < old[low]
        return Change(name(new), figure, old[figure], new[figure], exceeds, less_is_better)
    return None


def name(row: dict[str, Any]) -> str:
    """What a row measured, in one line."""
    case = row.get("case", {})
    hidden = {"kind", "name", "case", "threads"}
    words = [row["kind"], row.get("name", "")]
    words += [
        str(value)
        for key, value in row.items()
        if key not in hidden and key in _NAMED and value is not None
    ]
    words += [f"{key}={value}" for key, value in case.items()]
    return " ".join(word for word in words if word)


_NAMED = frozenset(
    "kernel variant model batch_size precision engine saves without placement "
    "input_px output_px".split()
)


def lines(found: Iterable[Change]) -> Iterable[str]:
    """Lines for the terminal."""
    for change in found:
        yield (
            f"{change.what}: {change.figure} {change.old:g} -> {change.new:g} "
            f"(x {change.ratio:.3f}, {change.verdict})"
        )


def markdown(found: Iterable[Change], old: dict[str, Any], new: dict[str, Any]) -> str:
    """A table of before and after."""
    if old["card"] == new["card"]:
        title = f"**{new['card']}**, before: commit {old['commit']}, after: commit {new['commit']}"
    else:
        title = f"before: **{old['card']}**, after: **{new['card']}**"
    head = [
        title,
        "",
        "| what | figure | before | after | ratio | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    body = [
        f"| {c.what} | {c.figure} | {c.old:g} | {c.new:g} | {c.ratio:.3f} | {c.verdict} |"
        for c in found
    ]
    return "\n".join([*head, *body, ""])
