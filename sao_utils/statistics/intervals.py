"""Numbers with 95 % intervals.

Which function for what:
- a win rate, or another share: `win_rate` (`clustered_mean` of booleans is the same);
- a win rate at equal length: `length_control.length_controlled_win_rate`;
- a difference between two models on the same questions: `clustered_difference`;
- anything that is not a share: `clustered_mean`.

Questions about the same hobby and aspects are alike, and so are several seeds' answers to one question:
what counts is the number of *clusters*, not of values. Any hashable value can name a cluster. To combine
several seeds, concatenate their values and give each its question's cluster and, as `runs`, its seed: the
interval then also includes what other seeds would have changed (`errors.add_trainings`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sao_utils.statistics.errors import (
    checked,
    cluster_codes,
    students_t,
    two_way_error,
    variance_of_sums,
    widened,
)

Z = NormalDist().inv_cdf(0.975)  # 1.96: every interval here is a 95 % one
ALIKE = "all alike: no interval"
ONE_CLUSTER = "one cluster of questions: no interval"
_CHUNK = 4_000_000  # drawn clusters held in memory at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, and the number of values (not clusters) behind it.

    What cannot be estimated is NaN, and `note` gives the reason.
    """

    value: float
    low: float
    high: float
    n: int
    note: str = ""


def exact(value: float, n: int) -> Interval:
    """A number that describes a whole set rather than a sample: it has no interval."""
    return Interval(float(value), math.nan, math.nan, n)


def without_interval(value: float, n: int) -> Interval:
    """The result for no values, or for values of a single cluster, which say nothing about others."""
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0, "nothing to count")
    return Interval(float(value), math.nan, math.nan, n, ONE_CLUSTER)


def win_rate(
    outcomes: Sequence[float | None],
    clusters: Sequence | None = None,
    runs: Sequence | None = None,
) -> Interval:
    r"""The raw win rate of a model, a tie counting half, with a score interval.

    The interval contains all rates p with (p' - p)^2 <= t^2 p (1 - p) / m. This is Wilson's interval with
    m = p' (1 - p') / v in place of n, v being the variance of the win rate p' between clusters, and
    t Student's quantile with one degree of freedom fewer than there are clusters (Kott and Carr,
    1997, Journal of Official Statistics 13; Franco and others, 2019, Journal of Survey Statistics
    and Methodology 7). Near 0 and 100 % bootstrap intervals are too narrow; this one is not.

    Args:
        outcomes: [n] 1 for won, 0 for lost, 0.5 for a tie, or anything between 0 and 1 (a judge's
            probability); None or NaN for invalid ones, which are left out.
        clusters: [n] the cluster of each comparison; None: comparisons are independent.
        runs: [n] the training (seed) of each comparison; None: a single one. With several, v includes
            the variance between trainings, and t the degrees of freedom that go with it
            (`add_trainings`).

    Returns:
        The win rate of the valid comparisons and its interval. If all outcomes are the same, m is the
        number of clusters. Without any valid comparison, or if all are in one cluster, there is no
        interval (`without_interval`).

    Raises:
        ValueError: outcomes outside 0..1, or numbers of outcomes and clusters that differ.
    """
    every = np.asarray(outcomes, dtype=float)
    valid = ~np.isnan(every)
    y = every[valid]
    if ((y < 0) | (y > 1)).any():
        raise ValueError("outcomes must be 1 (won), 0 (lost), 0.5 (tie) or between, or None")
    codes = np.arange(len(every))
    if clusters is not None:
        codes = cluster_codes(clusters, len(every), "outcomes")
    of_run = np.zeros_like(codes) if runs is None else cluster_codes(runs, len(every), "outcomes")
    codes, of_run = (np.unique(of[valid], return_inverse=True)[1] for of in (codes, of_run))
    return _score_interval(y, codes, of_run)


def _score_interval(y: np.ndarray, codes: np.ndarray, of_run: np.ndarray) -> Interval:
    """The interval of `win_rate` from [n] outcomes, and clusters and trainings numbered 0, 1, ..."""
    n = len(y)
    if not codes.any():
        return without_interval(y.mean() if n else math.nan, n)
    value, trials, freedom = float(y.mean()), float(codes.max() + 1), float(codes.max())
    if np.ptp(y) > 0:
        error, freedom = two_way_error((y - value) / n, codes, of_run)
        # Clusters that all have the same share show no variance: each then counts as one trial.
        trials = value * (1 - value) / error**2 if error > 1e-12 else trials
    return _wilson(value, trials, students_t(freedom), n)


def wilson(successes: float, n: int) -> Interval:
    """The share of `successes` among n >= 1 independent trials, with Wilson's score interval."""
    return _wilson(successes / n, n, Z, n)


def _wilson(share: float, trials: float, t: float, n: int) -> Interval:
    """All shares p with (share - p)^2 <= t^2 p (1 - p) / trials."""
    centre = (share + t**2 / (2 * trials)) / (1 + t**2 / trials)
    half = (
        t / (1 + t**2 / trials) * math.sqrt(share * (1 - share) / trials + t**2 / (4 * trials**2))
    )
    # For shares of 0 and 1 the formula gives exactly 0 and 1, except for rounding.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(float(share), float(low), float(high), int(n))


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    runs: Sequence | None = None,
    bca: bool = False,
) -> Interval:
    """The mean of values that come in clusters, with a percentile bootstrap over the clusters.

    The mean of booleans is a share: it gets the score interval of `win_rate`. Each resample draws as many
    clusters as there are, with replacement, and divides the sum of their values by the number of
    their values. The percentiles lie a little outside 2.5 and 97.5 (`tail_of`).

    Args:
        values: [n] numbers or booleans.
        clusters: [n] the cluster of each value.
        resamples: how many resamples are drawn; they are the same in every call.
        runs: [n] the training (seed) that each value belongs to; None: a single one. With several, each
            bound is moved by the uncertainty that they add (`errors.widened`).
        bca: use scipy's bias-corrected and accelerated bootstrap (Efron, 1987, JASA 82) if it is defined
            and all values are of one training.

    Returns:
        The mean and its interval. There is no interval for values of one cluster, for no values
        (`without_interval`), or if all clusters are alike (which does not make the mean certain).

    Raises:
        ValueError: missing values, or numbers of values and clusters that differ.
    """
    numbers = checked(values, "values")
    n = len(numbers)
    codes = cluster_codes(clusters, n, "values")
    of_run = np.zeros_like(codes) if runs is None else cluster_codes(runs, n, "values")
    if all(isinstance(v, (bool, np.bool_)) for v in values):
        return _score_interval(numbers, codes, of_run)
    value = math.fsum(numbers) / n
    if not codes.any():
        return without_interval(value, n)
    # Sorted first, so that the sums do not depend on the order of the rows, not even in the last digit.
    order = np.lexsort((numbers, codes))
    numbers, codes, of_run = numbers[order], codes[order], of_run[order]
    moves, tail = (numbers - value) / n, tail_of(codes)
    sums = np.column_stack([np.bincount(codes, numbers), np.bincount(codes)])
    if math.sqrt(variance_of_sums(moves, codes)) <= 1e-12 * np.abs(numbers).max():
        return Interval(value, math.nan, math.nan, n, ALIKE)
    if bca and not of_run.any() and (found := _bca(sums, tail, resamples)):
        return Interval(value, *found, n)
    totals, sizes = resampled_sums(sums, resamples).T
    low, high = map(float, np.quantile(totals / sizes, (tail, 1 - tail)))
    return Interval(value, *widened(value, low, high, moves, codes, of_run), n)


def clustered_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    runs: Sequence | None = None,
    bca: bool = False,
) -> Interval:
    """The mean of a - b, paired, as in `clustered_mean`.

    Args:
        a, b: [n] numbers or booleans; `a[i]` and `b[i]` belong to the same question. If `a` has several
            seeds and `b` has one, repeat the values of `b` for each seed.

    Returns:
        The mean difference and its interval. If all values lie in 0..1 and all differences are alike,
        the interval is that of `unvaried_difference`.

    Raises:
        ValueError: missing values, or lengths that differ.
    """
    first, second = checked(a, "a"), checked(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs as many values of a ({len(first)}) as of b ({len(second)})"
        )
    found = clustered_mean(first - second, clusters, resamples, runs, bca)
    if found.note == ALIKE:
        both = np.concatenate([first, second])
        return unvaried_difference(found.value, both, len(set(clusters)), found.n)
    return found


def unvaried_difference(value: float, values: np.ndarray, trials: int, n: int) -> Interval:
    """The interval of a difference that is the same in all clusters, and yet not certain.

    If none of k clusters deviates, then at most a share s of all clusters does: the upper bound of
    `win_rate` for 0 of k. At worst, the deviating ones lie at -1 or 1. For a difference of 0 in
    each of 100 clusters this gives 0 +- 0.04.

    Args:
        value: the difference in every cluster.
        values: all values that were subtracted from each other. If any lies outside 0..1, there is no
            interval.
        trials: the number of clusters, at least two.
        n: the number of differences.
    """
    if values.min() < 0 or values.max() > 1:
        return Interval(value, math.nan, math.nan, n, ALIKE)
    quantile = students_t(trials - 1) ** 2
    share = quantile / (trials + quantile)
    return Interval(value, value - share * (value + 1), value + share * (1 - value), n)


def resampled_sums(sums: np.ndarray, resamples: int) -> np.ndarray:
    """[resamples, m] totals over k clusters that are drawn, with replacement, from the k clusters given.

    Args:
        sums: [k, m] what each of the k clusters adds to each of m totals.
    """
    rng = np.random.default_rng(0)
    k = len(sums)
    step = max(1, _CHUNK // k)
    totals = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(k, size=(size, k)) + np.arange(0, size * k, k)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * k).reshape(size, k)
        totals.append(times @ sums)
    return np.concatenate(totals)


def tail_of(codes: np.ndarray) -> float:
    """The share to cut off at each end of a bootstrap distribution: 0.025 for many clusters.

    Less for few: a bootstrap over k clusters understates the variance by a factor of (k - 1) / k and does
    not account for Student's t (Hesterberg, 2015, The American Statistician 69: the expanded percentile
    interval).
    """
    k = int(codes.max()) + 1
    return NormalDist().cdf(-math.sqrt(k / (k - 1)) * students_t(int(codes.max())))


def _bca(sums: np.ndarray, tail: float, resamples: int) -> tuple[float, float] | None:
    """The BCa bounds of a mean over clusters; None where they are undefined.

    Args:
        sums: [k, 2] the sum and the number of values in each cluster.
    """
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns if the bounds are undefined
        found = stats.bootstrap(
            tuple(sums.T),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _CHUNK // len(sums)),
            confidence_level=min(1 - 2 * tail, 1 - 1e-9),
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low + high) else None
