"""Where a gain begins: the zero crossing of a line fitted to points, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sao_utils.statistics.intervals import Interval

Points = tuple[Sequence[float], Sequence[float]]  # the x values and the y values


def zero_crossing(points: Points, resamples: int = 10_000) -> Interval:
    """The x at which the least-squares line through points crosses y = 0 on its way up.

    All points have the same weight. The interval is a percentile bootstrap over points; what all points
    have in common, such as the questions, is held fixed. A resample whose line does not rise has no
    crossing, and counts as infinite.

    Returns:
        The crossing. It may lie outside the range of the points: a note then says so. NaN with a note if
        the line does not rise.
    """
    x, y = (np.asarray(values, dtype=float) for values in points)
    value = _crossings(x[None], y[None])[0]
    if not np.isfinite(value):
        return Interval(np.nan, np.nan, np.nan, len(x), "the line does not rise")
    drawn = _drawn(len(x), resamples)
    note = "" if x.min() <= value <= x.max() else "outside of what was measured"
    return _interval(value, _crossings(x[drawn], y[drawn]), len(x), note)


def crossing_shift(before: Points, after: Points, resamples: int = 10_000) -> Interval:
    """By how much the crossing moves from one set of points to another; each set is resampled separately."""
    first, second = zero_crossing(before, 1), zero_crossing(after, 1)
    if np.isnan(first.value) or np.isnan(second.value):
        return Interval(np.nan, np.nan, np.nan, first.n + second.n, "a line does not rise")
    ends = []
    for seed, (x, y) in enumerate((before, after)):
        drawn = _drawn(len(x), resamples, seed)
        ends.append(_crossings(np.asarray(x, float)[drawn], np.asarray(y, float)[drawn]))
    with np.errstate(invalid="ignore"):  # infinite minus infinite, if neither line crosses, is NaN
        moved = ends[1] - ends[0]
    return _interval(second.value - first.value, moved, first.n + second.n)


def _crossings(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[k] crossings of k sets of n points, x and y each [k, n].

    Infinite where the line does not rise, NaN where all x of a set are the same.
    """
    across = x - x.mean(1, keepdims=True)
    spread, rise = (across**2).sum(1), (across * y).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = x.mean(1) - y.mean(1) * spread / rise
    crossing = np.where(rise > 0, crossing, np.inf)
    return np.where(np.ptp(x, axis=1) > 0, crossing, np.nan)


def _drawn(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def _interval(value: float, found: np.ndarray, n: int, note: str = "") -> Interval:
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(float(value), np.nan, np.nan, n, note)
    ends = np.quantile(found, (0.025, 0.975), method="nearest")  # "nearest" allows infinite values
    return Interval(float(value), *map(float, ends), n, note)
