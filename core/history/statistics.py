"""Statistics of losses and times in a row: averages, trend, rates, totals of a session.

Pure functions in float64. Letter: n, one iteration after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

# Bounds of faceswap's smoothing, whose graphs these are compared with.
LEAST_AMOUNT, MOST_AMOUNT = 0.001, 0.999
POINTS_FOR_TREND = 10
_NUM_SIDES = 2


def smoothed(values_n: np.ndarray, amount: float) -> np.ndarray:
    """(n,) exponential average: s[0] = x[0], s[i] = (1 - amount) x[i] + amount s[i - 1].

    ``amount`` is brought into 0.001 to 0.999. What is not finite counts as 0.
    """
    amount = min(max(amount, LEAST_AMOUNT), MOST_AMOUNT)
    values = _finite(values_n).tolist()
    # In Python: each value needs the one before, and SciPy is no dependency.
    average = accumulate(values, lambda before, value: (1 - amount) * value + amount * before)
    return np.fromiter(average, np.float64, len(values))


def rolling_average(values_n: np.ndarray, window: int) -> np.ndarray:
    """(n,) mean over ``window`` values, in their middle; NaN where the window is not full.

    The first mean is at index ceil(window / 2). What is not finite counts as 0.

    Raises:
        ValueError: For a window under 2, and where there are not more values than two windows.
    """
    if window < 2:
        raise ValueError(f"a rolling average must be over at least 2 values, got {window}")
    # faceswap's rule.
    if len(values_n) <= 2 * window:
        raise ValueError(
            f"a rolling average over {window} values needs more than {2 * window}, "
            f"got {len(values_n)}; take a smaller one"
        )
    # Differences of running sums: a window of any size costs the same.
    sums = np.concatenate([[0.0], np.cumsum(_finite(values_n))])
    means = (sums[window:] - sums[:-window]) / window
    averages = np.full(len(values_n), np.nan)
    first = -(-window // 2)
    averages[first : first + len(means)] = means[: len(averages) - first]
    return averages


def trend(values_n: np.ndarray) -> np.ndarray:
    """(n,) the polynomial of third degree that fits best. What is not finite counts as 0.

    Raises:
        ValueError: For fewer than 10 values.
    """
    if len(values_n) < POINTS_FOR_TREND:
        raise ValueError(f"a trend needs at least {POINTS_FOR_TREND} values, got {len(values_n)}")
    places = np.arange(len(values_n))
    # Fitted by a domain of -1 to 1: powers of a million iterations would leave no digits.
    return np.polynomial.Polynomial.fit(places, _finite(values_n), 3)(places)


def flatten_outliers(values_n: np.ndarray) -> np.ndarray:
    """(n,) the mean in place of each value that is more than one standard deviation from it.

    What is not finite counts as 0.
    """
    values = _finite(values_n)
    mean = values.mean()
    return np.where(np.abs(values - mean) > values.std(), mean, values)


def rate_per_iteration(
    times_n: np.ndarray, batch_size: int, counts_n: np.ndarray | None = None
) -> np.ndarray:
    """(n - 1,) faces of both sides per second of each iteration but the first.

    ``times_n`` are the seconds at which the iterations ended; or at which so many of them did, if
    ``counts_n`` are given. NaN where no time went by.
    """
    faces = _NUM_SIDES * batch_size * (1 if counts_n is None else counts_n[1:])
    seconds = np.diff(np.asarray(times_n, np.float64))
    # A clock that was set back gives a negative time; a rate of that would bend the scale.
    rate = np.full(len(seconds), np.nan)
    return np.divide(faces, seconds, out=rate, where=seconds > 0)


@dataclass(frozen=True, kw_only=True)
class SessionStatistics:
    """Statistics of one session, or of several together. None is what is not known without logs."""

    session: int | None
    """Number of the session; None: of several."""

    start: float | None
    """Time at which the first iteration ended, in seconds since 1970."""

    end: float | None
    """Time at which the last iteration ended, in seconds since 1970."""

    elapsed_s: int | None
    batch_sizes: tuple[int, ...]
    """Batch sizes, each once, in the order of the sessions."""

    iterations: int
    eg_per_s: float | None
    """Faces of both sides per second."""


def session_statistics(
    session: int,
    times_n: np.ndarray,
    batch_size: int | None,
    *,
    iterations: int | None = None,
    pauses_s: float = 0.0,
) -> SessionStatistics:
    """The statistics of a session.

    Args:
        session: Number of the session.
        times_n: Times at which its iterations ended, at least one; seconds since 1970.
        batch_size: Faces a side; None where it is not known.
        iterations: How many it had, where not the end of each is known.
        pauses_s: Seconds in between that were not spent on it.
    """
    iterations = len(times_n) if iterations is None else iterations
    start, end = float(np.min(times_n)), float(np.max(times_n))
    # Whole seconds, as faceswap's table has them, so that the rates are the same.
    elapsed_s = int(end - start - pauses_s)
    rate = None if batch_size is None else _rate(batch_size * iterations, elapsed_s)
    return SessionStatistics(
        session=session,
        start=start,
        end=end,
        elapsed_s=elapsed_s,
        batch_sizes=() if batch_size is None else (batch_size,),
        iterations=iterations,
        eg_per_s=rate,
    )


def total_statistics(sessions: Sequence[SessionStatistics]) -> SessionStatistics:
    """Sum up all sessions, at least one; time and rate are of those where they are known."""
    timed = [one for one in sessions if one.elapsed_s is not None and one.batch_sizes]
    faces = sum(size * one.iterations for one in timed for size in one.batch_sizes)
    known = [one.elapsed_s for one in sessions if one.elapsed_s is not None]
    return SessionStatistics(
        session=None,
        start=sessions[0].start,
        end=sessions[-1].end,
        elapsed_s=sum(known) if known else None,
        batch_sizes=tuple(dict.fromkeys(size for one in sessions for size in one.batch_sizes)),
        iterations=sum(one.iterations for one in sessions),
        eg_per_s=_rate(faces, sum(one.elapsed_s or 0 for one in timed)) if timed else None,
    )


def elapsed_text(seconds: float) -> str:
    """Whole hours, minutes and seconds, as 26:03:04; hours may pass 99."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def _finite(values_n: np.ndarray) -> np.ndarray:
    values = np.asarray(values_n, np.float64)
    return np.where(np.isfinite(values), values, 0.0)


def _rate(faces_a_side: int, elapsed_s: int) -> float | None:
    """Faces of both sides per second; None where less than a second is known to have passed."""
    return _NUM_SIDES * faces_a_side / elapsed_s if elapsed_s else None
