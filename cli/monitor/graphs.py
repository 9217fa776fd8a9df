"""A history of any length as few enough points to draw. Letters: n, iterations; p, points."""

from typing import Any

import numpy as np

from ...core.history.history import History
from ...core.history.statistics import rate_per_iteration

# Chosen, unmeasured.
_SECONDS_A_POINT = 2.0  # shorter ones show the beat of log lines and saves, not the speed


def loss_points(history: History, first: int | None, last: int | None, most: int) -> dict[str, Any]:
    """Means over equally many events each, at most ``most``; None where nothing was logged.

    Args:
        history: History with the losses to be drawn.
        first: Iteration to begin with; None: the first of all.
        last: Iteration to end with; None: the last of all.
        most: Number of points.

    Returns:
        ``iterations`` (p), the last one of each mean; ``per_point``, how many each is over, on
        average; and ``losses`` (p) by tag.
    """
    tags = sorted({tag for session in history.sessions for tag in session.losses})
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
