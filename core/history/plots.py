"""Graphs of a model's training as PNG: its losses by iteration, its speed by the time trained.

One panel for each kind of loss, side A and side B in it. Letter: n, the points of a line.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..system.printable import printable
from . import statistics
from .history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"A": "tab:blue", "B": "tab:orange", "both sides": "tab:green"}
_TAG = re.compile(
    r"batch_(?P<kind>total|face|mask|weighted|unweighted)"
    r"(_(?P<side>[ab])(_(?P<output>\d+)|/(?P<function>.+))?)?"
)

Span = tuple[int, int | None]
"""First and last iteration that are drawn; None: up to the last there is."""

# Chosen by eye, for a picture that is 1200 px wide.
_DPI, _WIDTH_INCHES, _PANEL_INCHES = 100, 12.0, 3.6
_MOST_MARKED_SESSIONS = 30
_MOST_LABEL_ROWS = 4
_MOST_LINES = 600  # where sessions begin: one in two pixels
_MOST_RUNS = 4000  # several in each column of pixels
_SHOWN_PERCENT = 0.5, 99.5  # of the faint points


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn of each series. Points that are not finite are left out first."""

    smoothing: float = 0.9
    """Amount of `statistics.smoothed`; 0 draws the points as they are."""

    rolling: int | None = None
    """Window of a rolling average to draw too."""

    trend: bool = False
    flatten_outliers: bool = False


@dataclass(frozen=True)
class Tag:
    """What the name of a logged loss says."""

    kind: str
    side: str | None
    output: int | None
    function: str | None

    @classmethod
    def parse(cls, name: str) -> "Tag | None":
        """Parse the name of a logged loss; None for a name of anything else."""
        match = _TAG.fullmatch(name)
        if match is None:
            return None
        output = match["output"]
        number = None if output is None else int(output)
        return cls(match["kind"], match["side"], number, match["function"])

    @property
    def line(self) -> str:
        """Name of its line in its panel."""
        return "both sides" if self.side is None else self.side.upper()

    @property
    def panel(self) -> str:
        """What its panel shows."""
        if self.function is not None:
            return f"{self.function}, {self.kind}"
        return f"{self.kind} loss" + ("" if self.output is None else f" of output {self.output}")

    @property
    def is_usual(self) -> bool:
        """Whether it is drawn if nothing else is requested: what a side's loss consists of."""
        return self.kind in ("face", "mask") and self.side is not None

    @property
    def keys(self) -> set[str]:
        """What a user may call it: `face_a_1`, `face_a` (each output), `a` (its faces and mask)."""
        of_output = "" if self.output is None else f"_{self.output}"
        of_function = "" if self.function is None else f"/{self.function}"
        stem = self.kind if self.side is None else f"{self.kind}_{self.side}"
        keys = {stem + of_output + of_function}
        if self.side is not None and self.is_usual:
            keys |= {stem, self.side}
        return keys


def draw_losses(
    history: History,
    tags: Iterable[str],
    drawing: Drawing,
    span: Span,
    *,
    title: str,
) -> bytes:
    """A PNG, 1200 px wide: the losses that are logged under ``tags``.

    Raises:
        ValueError: There is no iteration in that range, or too few for what is to be drawn.
    """
    iterations, inside = _chosen(history, span)
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name in tags:
        tag = Tag.parse(name)
        assert tag is not None
        losses = [
            one.losses.get(name, np.full(len(one.times_n), np.nan)) for one in history.sessions
        ]
        panels.setdefault(tag.panel, {})[tag.line] = np.concatenate(losses)[inside]
    figure, grid = _panels(len(panels), title, drawing)
    for axis, (panel, lines) in zip(grid, panels.items(), strict=True):
        shown = np.concatenate(
            [
                _draw_line(axis, line, iterations, values, drawing)
                for line, values in sorted(lines.items())
            ]
        )
        _fit_height(axis, shown)
        _mark_sessions(axis, history, iterations)
        # A name may hold `$`, which would be read as a formula, and refused.
        axis.set_ylabel(printable(panel), parse_math=False)
        if len(shown):
            axis.legend(loc="upper right")
    grid[-1].set_xlabel("iteration")
    grid[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _png(figure)


def draw_rate(history: History, drawing: Drawing, span: Span, *, title: str) -> bytes:
    """A PNG, 1200 px wide: EG/s by the time trained, without that between the sessions.

    Raises:
        ValueError: There is no iteration in that range, or too few for what is to be drawn.
    """
    _chosen(history, span)
    hours: list[np.ndarray] = []
    rates: list[np.ndarray] = []
    trained_s, starts = 0.0, []
    for session in history.sessions:
        is_inside = _is_inside(session.iterations_n, span)
        times = session.times_n[is_inside]
        if session.batch_size is None or len(times) < 2:
            continue
        starts.append((session.number, trained_s / 3600))
        hours.append((trained_s + times[1:] - times[0]) / 3600)
        counts = session.counts_n[is_inside]
        rates.append(statistics.rate_per_iteration(times, session.batch_size, counts))
        trained_s += max(times[-1] - times[0], 0.0)  # a clock may have been set back
    if not hours:
        raise ValueError("EG/s need a session of at least two logged iterations")
    figure, (axis,) = _panels(1, title, drawing)
    unit, factor = next(
        (unit, factor)
        for unit, factor, least_s in (
            ("hours", 1, 7200),
            ("minutes", 60, 120),
            ("seconds", 3600, 0),
        )
        if trained_s >= least_s
    )
    places, rate = factor * np.concatenate(hours), np.concatenate(rates)
    shown = _draw_line(axis, "both sides", places, rate, drawing)
    # From 0 on: a rate twice as high has to look so.
    _fit_height(axis, np.append(shown, 0.0))
    if len(starts) > 1:
        _mark(axis, [(number, factor * at) for number, at in starts])
    axis.set_ylabel("EG/s (faces of both sides per second)")
    axis.set_xlabel(f"{unit} trained")
    return _png(figure)


def _is_inside(iterations_n: np.ndarray, span: Span) -> np.ndarray:
    first, last = span
    return (iterations_n >= first) & (iterations_n <= (np.inf if last is None else last))


def _chosen(history: History, span: Span) -> tuple[np.ndarray, np.ndarray]:
    """The logged iterations in a range, and which of all they are."""
    iterations = np.concatenate([one.iterations_n for one in history.sessions])
    inside = _is_inside(iterations, span)
    if not inside.any():
        first, last = span[0], "the last" if span[1] is None else span[1]
        raise ValueError(
            f"no iteration from {first} to {last} was logged; there are {iterations.min()} to "
            f"{iterations.max()}"
        )
    return iterations[inside], inside


def _panels(count: int, title: str, drawing: Drawing) -> tuple["Figure", list["Axes"]]:
    """A figure with its headings, and its empty panels from top to bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 1.2 + _PANEL_INCHES * max(count, 1.4)
    # Without pyplot, which keeps every figure and may ask for a screen.
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), fontsize=13, fontweight="bold", parse_math=False)
    # One axis for all: a peak is looked for in every panel at the same iteration.
    grid = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    grid[0].set_title(_legend(drawing), fontsize=9, color="dimgray")
    for axis in grid:
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    return figure, list(grid)


def _legend(drawing: Drawing) -> str:
    """Legend: which kind of line shows what."""
    words = ["line: every iteration"]
    if drawing.smoothing:
        words = [
            "faint: every iteration (peaks may be cut off)",
            f"bold: smoothed by {drawing.smoothing:g}",
        ]
    if drawing.rolling:
        words.append(f"dark: average over {drawing.rolling:,}")
    if drawing.trend:
        words.append("dashed: trend")
    if drawing.flatten_outliers:
        words.append("outliers flattened")
    return "   ".join(words)


def _draw_line(
    axis: "Axes", label: str, places_n: np.ndarray, values_n: np.ndarray, drawing: Drawing
) -> np.ndarray:
    """Draw one series in all the ways that are requested; the values that must be seen."""
    finite = np.isfinite(values_n)
    places, values = places_n[finite], values_n[finite]
    if not len(values):
        return values
    if drawing.flatten_outliers:
        # Before smoothing, which would spread them.
        values = statistics.flatten_outliers(values)
    color, dark = COLORS[label], _dark(COLORS[label])
    if drawing.smoothing:
        main = statistics.smoothed(values, drawing.smoothing)
        _plot(axis, places, values, color, alpha=0.25, linewidth=0.6)
        _plot(axis, places, main, color, linewidth=1.6, label=label)
        # One peak must not flatten the panel: it shows the smoothed line and most points.
        shown = np.append(main, np.percentile(values, _SHOWN_PERCENT))
    else:
        _plot(axis, places, values, color, linewidth=0.8, label=label)
        shown = values
    if drawing.rolling:
        _plot(axis, places, statistics.rolling_average(values, drawing.rolling), dark)
    if drawing.trend:
        _plot(axis, places, statistics.trend(values), dark, linewidth=1.4, linestyle="--")
    return shown


def _plot(
    axis: "Axes", places_n: np.ndarray, values_n: np.ndarray, color: object, **style: Any
) -> None:
    axis.plot(*_thinned(places_n, values_n), color=color, **style)


def _thinned(places_n: np.ndarray, values_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of fewer points that looks the same: the lowest and highest of each short run."""
    length = -(-len(values_n) // _MOST_RUNS)
    if length <= 2:
        return places_n, values_n
    num_runs = len(values_n) // length
    runs = values_n[: num_runs * length].reshape(num_runs, length)
    begins = length * np.arange(num_runs)
    # The last, shorter run as it is.
    rest = np.arange(num_runs * length, len(values_n))
    ends = [0, len(values_n) - 1]
    kept = np.unique(np.concatenate([begins + runs.argmin(1), begins + runs.argmax(1), rest, ends]))
    return places_n[kept], values_n[kept]


def _fit_height(axis: "Axes", shown_n: np.ndarray) -> None:
    """Have the panel show these values."""
    if len(shown_n):
        # A line that never changes needs some height, too.
        margin = max(0.06 * np.ptp(shown_n), 0.001 * np.abs(shown_n).max()) or 1.0
        axis.set_ylim(shown_n.min() - margin, shown_n.max() + margin)


def _dark(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.45 * part for part in to_rgb(color))


def _mark_sessions(axis: "Axes", history: History, iterations_n: np.ndarray) -> None:
    """Mark where sessions begin, if there are several in the picture."""
    starts = [
        (one.number, max(one.iterations_n[0], iterations_n[0]))
        for one in history.sessions
        if len(one.iterations_n)
        and one.iterations_n[0] <= iterations_n[-1]
        and one.iterations_n[-1] >= iterations_n[0]
    ]
    if len(starts) > 1:
        _mark(axis, starts)


def _mark(axis: "Axes", starts: list[tuple[int, float]]) -> None:
    across = axis.get_xaxis_transform()  # y in shares of the panel's height
    has_room = len(starts) <= _MOST_MARKED_SESSIONS
    drawn = starts[:: -(-len(starts) // _MOST_LINES)]
    style: dict[str, Any] = {"color": "gray", "linewidth": 0.8, "zorder": 0}
    style["alpha"] = 0.6 if has_room else 0.2
    # All in one call: each line of its own would be an artist to lay out and draw.
    axis.vlines([place for _, place in drawn], 0, 1, transform=across, **style)
    for number, place in starts if has_room else ():
        text = f" session {number}" if len(starts) <= 6 else f" {number}"
        axis.text(place, 0.98, text, va="top", fontsize=8, color="gray", transform=across)


def _spread_labels(axis: "Axes") -> None:
    """Move labels of sessions that begin near each other into rows of their own, from the top; one
    for which no row has room is left out."""
    rows_x1: list[float] = []
    """Right ends of the rows, in pixels."""

    height = axis.get_window_extent().height
    for label in axis.texts:  # from left to right
        box = label.get_window_extent()
        row = next((row for row, x1 in enumerate(rows_x1) if x1 <= box.x0), len(rows_x1))
        if row == _MOST_LABEL_ROWS:
            label.set_visible(False)
            continue
        rows_x1[row : row + 1] = [box.x1]
        x, y = label.get_position()
        label.set_position((x, y - row * box.height / height))


def _png(figure: "Figure") -> bytes:
    figure.draw_without_rendering()  # only the layout knows how wide a label is
    for axis in figure.axes:
        _spread_labels(axis)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
