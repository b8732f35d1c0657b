"""Numbers with 95 % intervals.

Which function for what:
- a win rate, or another share: `win_rate` (`clustered_mean` of booleans is the same);
- a win rate at equal length: `length_control.length_controlled_win_rate`;
- a difference of two models on the same questions: `clustered_difference`;
- anything over several trainings, or that is no share: `clustered_mean`.

Questions about the same hobby and aspects are alike, and so are several seeds' answers to one question:
what counts is the number of *clusters*, not of values. Anything that can be compared for equality names
a cluster. Values of several seeds are concatenated, each with its question's cluster and, as `runs`, its
seed: the interval then also holds what other seeds would have changed (`errors.add_trainings`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

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
_CHUNK = 4_000_000  # drawn clusters held in memory at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, and the number of values (not clusters) behind it.

    What cannot be estimated is NaN, and `note` has the reason.
    """

    value: float
    low: float
    high: float
    n: int
    note: str = ""


def without_interval(value: float, n: int) -> Interval:
    """What cannot be estimated: no values, or values of one cluster, which say nothing of others."""
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0, "nothing to count")
    return Interval(float(value), math.nan, math.nan, n, "one cluster of questions: no interval")


@dataclass(frozen=True)
class WinRate:
    """A win rate over the valid comparisons, and what all comparisons came to."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    invalid: int


def win_rate(
    outcomes: Sequence[float | None],
    clusters: Sequence | None = None,
    runs: Sequence | None = None,
) -> WinRate:
    r"""The raw win rate of a model, a tie counting half, with a score interval.

    The interval holds all rates p with (p' - p)^2 <= t^2 p (1 - p) / m: Wilson's interval, with
    m = p' (1 - p') / v in place of n, v being the variance of the win rate p' estimated between
    clusters, and t the quantile of Student's distribution with one degree of freedom fewer than
    there are clusters (Kott and Carr, 1997, "Developing an estimation strategy for a pesticide data
    program", Journal of Official Statistics 13; Franco and others, 2019, Journal of Survey
    Statistics and Methodology 7). Clusters that agree within make m smaller than n, ties make it
    larger. Without ties and clusters it is Wilson's interval but for t and n - 1.

    This is the default for win rates because it covers the truth 95 times of 100 at 50 % and also
    near 0 and 100 %, where bootstrap intervals are too narrow: of 1,000 evaluations with a true
    rate of 97 % over 805 prompts percentiles hold the truth in 936 and this in 951, of 98 % over
    200 prompts 908 and 933 (exact figures). It also needs no resamples and no seed.

    Args:
        outcomes: [n] 1 won, 0 lost, 0.5 a tie, or anything between (a judge's probability); None
            or NaN: invalid, left out and counted. A probability above 1/2 counts as a win in
            `wins`, below as a loss.
        clusters: [n] the cluster of each comparison (the prompt, where it occurs several times);
            None: comparisons are independent.
        runs: [n] the training (seed) of each comparison; None: of one. With several, v also has
            the variance between trainings, and t its degrees of freedom (`add_trainings`).

    Returns:
        The win rate, its interval and the counts; `rate.n` is the number of valid comparisons.
        Where all outcomes are 1, or 0, or 1/2, m is the number of clusters. With one comparison the
        interval is all of 0..1; several of one cluster, or none that is valid, have no interval
        (`without_interval`).

    Raises:
        ValueError: outcomes outside of 0..1.
    """
    every = np.asarray(outcomes, dtype=float)
    if every.ndim != 1:
        raise ValueError("outcomes must be a flat list of 1, 0, 0.5 or None")
    valid = ~np.isnan(every)
    if not valid.any():
        return WinRate(without_interval(math.nan, 0), 0, 0, 0, len(every))
    y = every[valid]
    if y.min() < 0 or y.max() > 1:
        raise ValueError("outcomes must be 1 (won), 0 (lost), 0.5 (tie) or between, or None")
    codes = np.arange(len(every))
    if clusters is not None:
        codes = cluster_codes(clusters, len(every), "outcomes")
    of_run = np.zeros_like(codes) if runs is None else cluster_codes(runs, len(every), "outcomes")
    codes, of_run = (np.unique(of[valid], return_inverse=True)[1] for of in (codes, of_run))
    return WinRate(
        rate=_score_interval(y, codes, of_run),
        wins=int((y > 0.5).sum()),
        ties=int((y == 0.5).sum()),
        losses=int((y < 0.5).sum()),
        invalid=int((~valid).sum()),
    )


def from_preferences(preferences: Sequence[float | None]) -> list[float | None]:
    """AlpacaEval's preferences as outcomes of the second model, the one under test.

    A preference goes from 1 (the baseline) to 2 (the model); 1.5 is a tie, which older files
    write as 0; NaN or None is an annotation that failed.

    Returns:
        Outcomes in 0..1, None where it failed: input of `win_rate`.

    Raises:
        ValueError: another number.
    """
    found: list[float | None] = []
    for preference in preferences:
        if preference is None or math.isnan(preference):
            found.append(None)
        elif preference == 0:
            found.append(0.5)
        elif 1 <= preference <= 2:
            found.append(preference - 1)
        else:
            raise ValueError(f"a preference is {preference}, but must be 0 or between 1 and 2")
    return found


def _score_interval(y: np.ndarray, codes: np.ndarray, of_run: np.ndarray) -> Interval:
    """The interval of `win_rate` from [n] outcomes, and clusters and trainings numbered 0, 1, ..."""
    n, value = len(y), float(y.mean())
    if n == 1:
        return Interval(value, 0.0, 1.0, n)
    if not codes.any():
        return without_interval(value, n)
    trials = float(codes.max() + 1)
    freedom = float(codes.max())
    if np.ptp(y) > 0:
        error, freedom = two_way_error((y - value) / n, codes, of_run)
        # Clusters that all have the same share show no variance: each is one trial then.
        trials = value * (1 - value) / error**2 if error > 1e-12 else trials
    t = students_t(freedom)
    centre = (value + t**2 / (2 * trials)) / (1 + t**2 / trials)
    half = (
        t / (1 + t**2 / trials) * math.sqrt(value * (1 - value) / trials + t**2 / (4 * trials**2))
    )
    # At 0 and 1 the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if value == 0 else max(0.0, centre - half)
    high = 1.0 if value == 1 else min(1.0, centre + half)
    return Interval(value, float(low), float(high), n)


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    seed: int = 0,
    runs: Sequence | None = None,
    method: Literal["percentile", "BCa"] = "percentile",
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """The mean of values that come in clusters, with a percentile bootstrap over the clusters.

    Booleans are a share: they get the score interval of `win_rate`, which needs no resamples. Near
    0 and 100 % percentiles are too narrow (97 % of 116 values in 60 clusters: 906 of 1,000 hold the
    truth, of score intervals 962), and 1 failure would look surer than none.

    Each resample draws as many clusters as there are, with replacement, and takes the sum of their
    values over the number of their values. The percentiles lie a little outside of 2.5 and 97.5:
    with few clusters a bootstrap interval is too narrow, and this gives it the width of Student's
    (Hesterberg, 2015, "What teachers should know about the bootstrap", The American Statistician
    69: the expanded percentile interval).

    Where the values come from several trainings (`runs`), the variance between trainings is added
    (`add_trainings`), in squares, to what lies between the mean and each bound (Zou and Donner,
    2008, Statistics in Medicine 27). Drawing trainings with replacement as well would not do: of
    1,000 intervals from three trainings 900 would hold the truth where trainings differ much, and
    990 where they do not.

    Args:
        values: [n] numbers or booleans.
        clusters: [n] the cluster of each value.
        resamples: how many resamples.
        seed: the same seed, values and clusters give the same interval, in whatever order.
        runs: [n] the training (seed) that each value belongs to; None or all equal: one.
        method: "BCa" for the bias-corrected and accelerated bootstrap of scipy (Efron, 1987, JASA
            82), of one training. It follows skewed values better (lengths, rare events); where it
            is undefined, percentiles are given. For win rates and their differences the two cover
            alike, and the percentiles also know several trainings: they are the default.
        bounds: the least and the most that a value can be, where there is such: (1, 10) for a grade.

    Returns:
        The mean and its interval. Where nothing varies between clusters there is nothing to
        resample: the interval is that of `unvaried`.

        Values of one cluster, and no values at all, have no interval (`without_interval`).

    Raises:
        ValueError: missing values, not one cluster for each value, or BCa of several trainings.
    """
    is_share = bool(np.ndim(values)) and all(isinstance(v, (bool, np.bool_)) for v in values)
    numbers = checked(values, "values")
    codes = cluster_codes(clusters, len(numbers), "values")
    if not len(numbers):
        return without_interval(math.nan, 0)
    of_run = np.zeros_like(codes)
    if runs is not None:
        of_run = cluster_codes(runs, len(numbers), "values")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1")
    if method == "BCa" and of_run.any():
        raise ValueError("BCa knows one training only: leave `method` out for several")
    if is_share and (method == "percentile" or np.ptp(numbers) == 0):
        return _score_interval(numbers, codes, of_run)
    value, n = math.fsum(numbers) / len(numbers), len(numbers)
    if np.ptp(numbers) == 0 and (n == 1 or codes.any()):
        return Interval(float(numbers[0]), *unvaried(numbers[0], int(codes.max()) + 1, bounds), n)
    if not codes.any():
        return without_interval(value, n)
    # Sorted first: the sums are then the same to the last digit in whatever order the rows come.
    order = np.lexsort((numbers, codes))
    numbers, codes, of_run = numbers[order], codes[order], of_run[order]
    moves, tail = (numbers - value) / n, tail_of(codes)
    sums = np.column_stack([np.bincount(codes, numbers), np.bincount(codes)])
    if math.sqrt(variance_of_sums(moves, codes)) < 1e-12 * np.abs(numbers).max():
        low, high = unvaried(value, len(sums), bounds)
    elif method == "BCa" and (found := _bca(sums, tail, resamples, seed)):
        return Interval(value, *found, n)
    else:
        totals, sizes = resampled_sums(sums, resamples, np.random.default_rng(seed)).T
        low, high = map(float, np.quantile(totals / sizes, (tail, 1 - tail)))
    low, high = widened(value, low, high, moves, codes, of_run)
    if bounds or is_share:
        least, most = bounds or (0.0, 1.0)
        low, high = max(min(least, value), low), min(max(most, value), high)
    return Interval(value, low, high, n)


def unvaried(
    value: float, trials: int, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The interval of a mean whose clusters are all alike, which is no certainty.

    That none of k clusters is different says that no more than a share s of all clusters is: the
    upper bound of `win_rate` for 0 of k. At worst these lie at the bounds. For a share of 0 or 1
    this is that very interval; for a difference of 0 in each of 100 clusters 0 +- 0.04.

    Args:
        value: of every cluster.
        trials: how many clusters there are.
        bounds: the least and the most that a value can be; None: unknown.

    Returns:
        The bounds of the interval; all of `bounds` for one cluster, NaN without `bounds`.
    """
    if bounds is None:
        return math.nan, math.nan
    least, most = bounds
    quantile = students_t(trials - 1) ** 2 if trials > 1 else math.inf
    share = quantile / (trials + quantile) if trials > 1 else 1.0
    low, high = value - share * (value - least), value + share * (most - value)
    return float(min(low, value)), float(max(high, value))


def clustered_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    seed: int = 0,
    runs: Sequence | None = None,
    method: Literal["percentile", "BCa"] = "percentile",
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """The mean of a - b, paired, with a percentile bootstrap over clusters.

    Args:
        a, b: [n] numbers or booleans; `a[i]` and `b[i]` belong to the same question. Where `a` has
            several seeds and `b` has one, repeat the values of `b` for each seed.
        clusters: [n] the cluster of each pair.
        resamples, seed, runs, method: as in `clustered_mean`.
        bounds: the least and the most that a value of `a` or `b` can be: (0, 1) for what is won,
            right or good.

    Returns:
        The mean difference and its interval (where all differences are equal, that of `unvaried`).

    Raises:
        ValueError: missing values, or lengths that differ.
    """
    first, second = checked(a, "a"), checked(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs as many values of a ({len(first)}) as of b ({len(second)})"
        )
    if bounds is not None:
        bounds = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return clustered_mean(first - second, clusters, resamples, seed, runs, method, bounds)


def wilson(successes: float, n: int) -> Interval:
    """A share of independent trials with Wilson's score interval.

    Args:
        successes: how many of the `n` trials succeeded; a tie may count half.

    Raises:
        ValueError: no trials, or successes outside of 0..n.
    """
    if n < 1:
        raise ValueError("no trials: a share needs at least one")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, but must lie between 0 and n = {n}")
    share = successes / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At 0 and n the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(float(share), float(low), float(high), int(n))


def resampled_sums(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, m] totals of as many clusters as there are, drawn with replacement.

    Args:
        sums: [k, m] what each of the k clusters adds to each of m totals.
    """
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

    Less for few, so that the interval is as wide as Student's (Hesterberg, 2015): a bootstrap over
    k clusters understates the variance by (k - 1) / k and knows nothing of t.
    """
    k = int(codes.max()) + 1
    return NormalDist().cdf(-math.sqrt(k / (k - 1)) * students_t(int(codes.max())))


def _bca(sums: np.ndarray, tail: float, resamples: int, seed: int) -> tuple[float, float] | None:
    """The BCa bounds of a mean over clusters; None where they are undefined.

    Args:
        sums: [k, 2] sum and number of the values of each cluster.
    """
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it is undefined
        found = stats.bootstrap(
            tuple(sums.T),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _CHUNK // len(sums)),
            confidence_level=min(1 - 2 * tail, 1 - 1e-9),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low + high) else None
