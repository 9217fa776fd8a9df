"""A history of any length as few enough points to draw. Letters: n, iterations; p, points."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.history.history import History
from ...core.history.statistics import rate_per_iteration

# Chosen, unmeasured.
_SECONDS_A_POINT = 2.0  # shorter ones show the beat of log lines and saves, not the speed


def loss_points(
    history: History, first: int | None, last: int | None, most: int, tags: Sequence[str]
) -> dict[str, Any]:
    """Means over equally many events each, at most ``most``; None where nothing was logged.

    Args:
        history: History with the losses to be drawn.
        first: Iteration to begin with; None: the first of all.
        last: Iteration to end with; None: the last of all.
        most: Number of points.
        tags: Losses to be drawn, of those that the history has.

    Returns:
        ``iterations`` (p), the last one of each mean; ``per_point``, how many each is over, on
        average; and ``losses`` (p) by tag.
    """
    parts: list[np.ndarray] = []
    num_iterations = 0
    for session in history.sessions:
        inside = _within(session.iterations_n, first, last)
        num_iterations += int(session.counts_n[inside].sum())
        rows = [session.iterations_n.astype(np.float64)]
        missing = np.full(len(session.iterations_n), np.nan)
        rows += [session.losses.get(tag, missing) for tag in tags]
        parts.append(np.stack(rows)[:, inside])
    table = np.concatenate(parts, axis=1) if parts else np.empty((1, 0))
    num_events = table.shape[1]
    a_point = max(1, -(-num_events // most))
    starts = np.arange(0, num_events, a_point)
    ends = np.minimum(starts + a_point, num_events) - 1
    losses = {
        tag: _plain(_means(row, starts) if len(starts) else row)
        for tag, row in zip(tags, table[1:], strict=True)
    }
    iterations = table[0, ends].astype(np.int64).tolist()
    per_point = round(a_point * num_iterations / max(num_events, 1))
    return {"iterations": iterations, "per_point": max(per_point, 1), "losses": losses}


def speed_points(
    history: History, first: int | None, last: int | None, most: int
) -> dict[str, Any]:
    """Faces of both sides per second over spans of some seconds, about ``most`` of them.

    Returns:
        ``iterations`` (p), the last one of each span, and ``eg_per_s`` (p); both None between
        sessions. Of more sessions than ``most``, only every second, third ... is there.
    """
    timed = []
    for session in history.sessions:
        inside = _within(session.iterations_n, first, last)
        steps_n, times_n = session.iterations_n[inside], session.times_n[inside]
        if len(steps_n) > 1 and session.batch_size is not None:
            timed.append((steps_n, times_n, session.batch_size))
    timed = timed[:: max(1, -(-len(timed) // most))]
    total_s = sum(max(times_n[-1] - times_n[0], 0.0) for _, times_n, _ in timed)
    a_point_s = max(_SECONDS_A_POINT, total_s / most)
    iterations: list[int | None] = []
    rates: list[float | None] = []
    for steps_n, times_n, batch_size in timed:
        spans = int(np.clip((times_n[-1] - times_n[0]) / a_point_s, 1, most))
        edges = np.unique(np.linspace(0, len(steps_n) - 1, spans + 1).astype(np.int64))
        counts_n = np.diff(steps_n[edges], prepend=0)  # the first one is not looked at
        rate = rate_per_iteration(times_n[edges], batch_size, counts_n)
        iterations += [*steps_n[edges[1:]].tolist(), None]
        rates += [*_plain(rate), None]
    return {"iterations": iterations[:-1], "eg_per_s": rates[:-1]}


def loss_tags(history: History) -> list[str]:
    """Losses that were logged, sorted."""
    return sorted({tag for session in history.sessions for tag in session.losses})


def measured_points(
    history: History, first: int | None, last: int | None, most: int
) -> dict[str, dict[str, Any]]:
    """``iterations`` and ``values`` of each metric of held-out faces, of at most about ``most``."""
    columns: dict[str, tuple[list[int], list[float | None]]] = {}
    for session in history.sessions:
        for tag, (steps_n, values_n) in session.measured.items():
            inside = _within(steps_n, first, last)
            steps, values = columns.setdefault(tag, ([], []))
            steps += steps_n[inside].tolist()
            values += _plain(values_n[inside])
    points = {}
    for tag, (steps, values) in sorted(columns.items()):
        every = max(1, -(-len(steps) // most))
        points[tag] = {"iterations": steps[::every], "values": values[::every]}
    return points


def table(history: History, first: int | None, last: int | None, most: int) -> str:
    """The losses and metrics of some iterations as comma-separated values, a line for each point.

    Loss columns are means, as in `loss_points`; the line of a metric has that alone.
    """
    loss = loss_points(history, first, last, most, loss_tags(history))
    measured = measured_points(history, first, last, most)
    rows: dict[int, dict[str, float | None]] = {}
    columns = {tag: (loss["iterations"], values) for tag, values in loss["losses"].items()}
    columns |= {tag: (one["iterations"], one["values"]) for tag, one in measured.items()}
    for tag, (iterations, values) in columns.items():
        for iteration, value in zip(iterations, values, strict=True):
            rows.setdefault(iteration, {})[tag] = value
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["iteration", *columns])
    writer.writerows(
        [iteration, *(row.get(tag) for tag in columns)] for iteration, row in sorted(rows.items())
    )
    return stream.getvalue()


def _within(iterations_n: np.ndarray, first: int | None, last: int | None) -> slice:
    """The places of the iterations from first to last; they rise."""
    start = 0 if first is None else int(np.searchsorted(iterations_n, first, "left"))
    end = len(iterations_n) if last is None else int(np.searchsorted(iterations_n, last, "right"))
    return slice(start, end)


def _means(values_n: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(p,) the mean of what is finite from each start to the next; NaN where nothing is."""
    is_finite = np.isfinite(values_n)
    sums = np.add.reduceat(np.where(is_finite, values_n, 0.0), starts)
    counts = np.add.reduceat(is_finite.astype(np.float64), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _plain(values: np.ndarray) -> list[float | None]:
    """The same as JSON has it, to 6 digits: a pixel of the graph is coarser."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
