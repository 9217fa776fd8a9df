"""What a series of losses or of times tells, against the oracle and by hand."""

import ast

import numpy as np
import pytest
from oracle_numbers import oracle_keys

from mien.core.history.statistics import (
    SessionStatistics,
    elapsed_text,
    flatten_outliers,
    rate_per_iteration,
    rolling_average,
    session_statistics,
    smoothed,
    total_statistics,
    trend,
)

FILE = "stats/stats.npz"
# The reference computes in float32, this in float64. Measured: 2e-6 where the average is longest.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.oracle
@pytest.mark.parametrize("amount", oracle_keys(FILE, "smoothed:"))
def test_smoothed_as_the_oracle(oracle, amount):
    stats = oracle(FILE)
    ours = smoothed(stats["loss"], float(amount))
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, stats[f"smoothed:{amount}"], **FLOAT32)


@pytest.mark.oracle
@pytest.mark.parametrize("window", oracle_keys(FILE, "rolling_avg:"))
def test_rolling_average_as_the_oracle(oracle, window):
    stats = oracle(FILE)
    ours = rolling_average(stats["loss"], int(window))
    np.testing.assert_allclose(ours, stats[f"rolling_avg:{window}"], rtol=1e-12)


@pytest.mark.oracle
def test_trend_and_outliers_as_the_oracle(oracle):
    stats = oracle(FILE)
    loss = stats["loss"]
    np.testing.assert_allclose(trend(loss), stats["trend"], rtol=1e-12)
    np.testing.assert_allclose(flatten_outliers(loss), stats["flatten_outliers"], **FLOAT32)


@pytest.mark.oracle
def test_times_as_the_oracle(oracle):
    stats = oracle(FILE)
    times, batch = stats["timestamps"], int(stats["batch"])
    figures = session_statistics(1, times, batch)
    assert figures.elapsed_s == int(stats["elapsed"])
    assert figures.eg_per_s == float(stats["egs"])
    rate = rate_per_iteration(times, batch)
    np.testing.assert_allclose(rate, stats["rate_per_iteration"], rtol=1e-12)
    hours, minutes, seconds = ast.literal_eval(str(stats["fmt"]))
    lasted = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    assert elapsed_text(lasted + 0.7) == f"{hours}:{minutes}:{seconds}"


@pytest.mark.oracle
def test_totals_as_the_oracle(oracle):
    """Sums of two sessions, whose iterations follow from all faces and all iterations."""
    expected = ast.literal_eval(str(oracle(FILE)["totals"]))
    start, end, elapsed_s = (expected[name] for name in ("start", "end", "elapsed"))
    size, other_size = map(int, expected["batch"].split(","))
    num_faces = expected["rate"] * elapsed_s / 2
    count = round((num_faces - other_size * expected["iterations"]) / (size - other_size))
    half_s = elapsed_s // 2
    first = session_statistics(1, np.linspace(start, start + half_s, count), size)
    times = np.linspace(end - (elapsed_s - half_s), end, expected["iterations"] - count)
    total = total_statistics([first, session_statistics(2, times, other_size)])
    assert total.session is None
    assert (total.start, total.end) == (expected["start"], expected["end"])
    assert (total.elapsed_s, total.eg_per_s) == (expected["elapsed"], expected["rate"])
    assert ",".join(map(str, total.batch_sizes)) == expected["batch"]
    assert total.iterations == expected["iterations"]


def test_smoothed_by_hand():
    np.testing.assert_allclose(smoothed(np.array([1.0, 2.0, 4.0]), 0.5), [1.0, 1.5, 2.75])
    np.testing.assert_array_equal(smoothed(np.array([1.0, 9.0]), 7), smoothed([1.0, 9.0], 0.999))
    np.testing.assert_array_equal(smoothed(np.array([1.0, 9.0]), -1), smoothed([1.0, 9.0], 0.001))
    np.testing.assert_array_equal(smoothed(np.array([np.nan, np.inf]), 0.5), [0, 0])
    assert smoothed(np.array([]), 0.5).shape == (0,)


@pytest.mark.parametrize("window", [2, 3, 7])
def test_a_rolling_average_is_the_mean_of_its_window(window):
    values = np.random.default_rng(0).random(2 * window + 3)
    ours = rolling_average(values, window)
    first = -(-window // 2)
    assert np.isnan(ours[:first]).all()
    for i in range(first, len(values)):
        begin = i - first
        full = values[begin : begin + window]
        if len(full) == window:
            assert ours[i] == pytest.approx(full.mean(), rel=1e-12)
        else:
            assert np.isnan(ours[i])


def test_a_trend_finds_a_polynomial():
    x = np.arange(20.0)
    np.testing.assert_allclose(trend(x**3 - 4 * x), x**3 - 4 * x, atol=1e-8)


def test_outliers_become_the_mean():
    np.testing.assert_allclose(flatten_outliers(np.array([1, 1, 1, 1, 6.0])), [1, 1, 1, 1, 2])


def test_no_time_gives_no_rate():
    np.testing.assert_array_equal(
        rate_per_iteration(np.array([0.0, 0.5, 0.5, 0.4]), 4), [16, np.nan, np.nan]
    )
    assert session_statistics(1, np.array([5.0]), 4).eg_per_s is None


def test_what_was_not_logged_is_left_out_of_the_totals_rate():
    logged = session_statistics(1, np.linspace(0, 10, 100), 4)
    not_logged = SessionStatistics(
        session=2,
        start=50.0,
        end=None,
        elapsed_s=None,
        batch_sizes=(4,),
        iterations=900,
        eg_per_s=None,
    )
    total = total_statistics([logged, not_logged])
    assert (total.iterations, total.elapsed_s, total.eg_per_s) == (1000, 10, 80.0)
    assert (total.end, total.batch_sizes) == (None, (4,))
    alone = total_statistics([not_logged])
    assert (alone.elapsed_s, alone.eg_per_s) == (None, None)


def test_elapsed_text():
    assert [elapsed_text(s) for s in (0, 59.9, 3600, 360_000)] == [
        "00:00:00",
        "00:00:59",
        "01:00:00",
        "100:00:00",
    ]


def test_refusals():
    with pytest.raises(ValueError, match=r"over 5 values needs more than 10, got 10; take a small"):
        rolling_average(np.zeros(10), 5)
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        rolling_average(np.zeros(10), 1)
    with pytest.raises(ValueError, match="a trend needs at least 10 values, got 9"):
        trend(np.zeros(9))
