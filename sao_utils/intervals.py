"""Numbers with 95 % intervals.

Questions about the same hobby and aspects are alike, and so are the answers to one question by
several seeds: what counts is the number of *clusters*, not of values. A cluster is named by
anything that can be compared for equality (a string, a number, a tuple or list of those).
Values of several seeds are concatenated, each with the cluster of its question and the seed as
its `runs`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # 1.96: every interval here is a 95 % one
_CHUNK = 4_000_000  # drawn clusters held in memory at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, and the number of values (not clusters) behind it."""

    value: float
    low: float
    high: float
    n: int


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    seed: int = 0,
    runs: Sequence | None = None,
) -> Interval:
    """The mean of values that come in clusters, with a percentile bootstrap over the clusters.

    Each resample draws as many clusters as there are, with replacement, and takes the sum of their
    values over the number of their values. Where the values come from several trainings (`runs`),
    these are drawn with replacement as well, independently of the clusters: the interval then also
    holds what another seed would have changed. With three seeds that is a rough guess: look at each
    seed's own figure too.

    Args:
        values: [n] numbers or booleans.
        clusters: [n] the cluster of each value.
        resamples: how many resamples.
        seed: the same seed, values and clusters give the same interval, in whatever order.
        runs: [n] the training (seed) that each value belongs to; None or all equal: one.

    Returns:
        The mean and its interval. Where nothing varies there is nothing to resample: numbers that
        are all equal get an interval of no width. Booleans that are all equal get Wilson's
        interval with each cluster as one trial instead, because a share of 0 or 1 out of a few
        clusters is not certain.

        With one cluster its values are resampled as if they were independent, with a warning:
        the interval is then too narrow.

    Raises:
        ValueError: no values, missing values, or not one cluster for each value.
    """
    is_share = bool(np.ndim(values)) and all(isinstance(v, (bool, np.bool_)) for v in values)
    numbers = _numbers(values, "values")
    codes = cluster_codes(clusters, len(numbers), "values")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1")
    value, n = math.fsum(numbers) / len(numbers), len(numbers)
    if np.ptp(numbers) == 0:
        value = float(numbers[0])
        if not is_share:
            return Interval(value, value, value, n)
        trials = int(codes.max()) + 1
        bounds = wilson(value * trials, trials)
        return Interval(value, bounds.low, bounds.high, n)
    codes = without_single_cluster(codes)
    of_run = (
        cluster_codes(runs, len(numbers), "values") if runs is not None else np.zeros_like(codes)
    )
    means = _resampled_means(numbers, codes, of_run, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(value, float(low), float(high), n)


def clustered_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence,
    resamples: int = 10_000,
    seed: int = 0,
    runs: Sequence | None = None,
) -> Interval:
    """The mean of a - b, paired, with a percentile bootstrap over clusters.

    Args:
        a, b: [n] numbers or booleans; `a[i]` and `b[i]` belong to the same question. Where `a` has
            several seeds and `b` has one, repeat the values of `b` for each seed.
        clusters: [n] the cluster of each pair.
        resamples, seed, runs: as in `clustered_mean`.

    Returns:
        The mean difference and its interval (of no width when all differences are equal).

    Raises:
        ValueError: nothing to compare, missing values, or lengths that differ.
    """
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs as many values of a ({len(first)}) as of b ({len(second)})"
        )
    return clustered_mean(first - second, clusters, resamples, seed, runs)


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


def length_controlled_win_rate(
    wins: Sequence[float], length_difference: Sequence[float], clusters: Sequence
) -> Interval:
    r"""The win rate that the tuned model would have if its answers were as long as the base's.

    Fits P(win) = sigmoid(a + b tanh(d / std(d))), d being the difference in length, and reports
    sigmoid(a), the prediction at d = 0. This is AlpacaEval's formula without its term for the
    difficulty of its own 805 prompts, and without its penalty, which leans on its own runs. The
    covariance is robust to clustering; the interval is made on the log-odds and mapped back, so
    it stays between 0 and 1 (to first order it is the delta method's).

    Args:
        wins: [n] 1 the tuned model wins, 0 it loses, 0.5 a tie.
        length_difference: [n] tokens of the tuned answer minus tokens of the base's.
        clusters: [n] the cluster of each comparison.

    Returns:
        The length-controlled win rate and its interval. Where that fit has no finite answer:

        - all answers are as long as the base's: the raw win rate, by the same fit without b;
        - all differences are one other number (or all so large against their spread that tanh is
          1 throughout): nothing tells what would happen at equal length. The value is the raw
          win rate, the interval goes from 0 to 1;
        - all comparisons were won, or lost, or tied: 1, 0 or 0.5, with Wilson's interval that
          takes each cluster as one trial;
        - length alone separates wins from losses (say, the longer answer wins always): b is
          unbounded. Each outcome is then drawn towards 1/2 by two made-up comparisons in all
          (half won, at the lengths that occurred), and the covariance is the model's own with
          each cluster counted as one comparison, since the fit leaves too little over for a
          robust one. The interval is wide.

        With one cluster the comparisons count as independent, with a warning.

    Raises:
        ValueError: no comparisons, missing values, wins outside of 0..1, or lengths that differ.
    """
    y = _numbers(wins, "wins")
    d = _numbers(length_difference, "length_difference")
    if len(y) != len(d):
        raise ValueError(f"there are {len(y)} wins, but {len(d)} differences in length")
    if y.min() < 0 or y.max() > 1:
        raise ValueError("wins must be 1 (won), 0 (lost) or 0.5 (tie)")
    codes, n = cluster_codes(clusters, len(y), "wins"), len(y)
    design = np.ones((n, 1))
    if d.any():
        spread = np.std(d, ddof=1) if n > 1 else 0.0
        x = np.tanh(d / spread) if spread > 0 else np.ones(n)  # 0 also for differences of 1e-300
        if np.ptp(x) < 1e-9:
            return Interval(float(y.mean()), 0.0, 1.0, n)
        design = np.column_stack([design, x])
    if np.ptp(y) == 0:
        trials = int(codes.max()) + 1
        bounds = wilson(y[0] * trials, trials)
        return Interval(float(y[0]), bounds.low, bounds.high, n)
    codes = without_single_cluster(codes)
    if not (d.any() and _separated(y, x)):
        try:
            return _at_zero(*_robust_fit(y, design, codes), n)
        except ArithmeticError:
            pass  # all but separated
    return _at_zero(*_penalised_fit(y, design, codes), n)


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


def _numbers(values: Sequence[float], name: str) -> np.ndarray:
    """`values` as [n] floats, checked."""
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1:
        raise ValueError(f"{name} must be a flat list of numbers")
    if not len(numbers):
        raise ValueError(f"{name} is empty: there is nothing to take an interval of")
    missing = int((~np.isfinite(numbers)).sum())
    if missing:
        raise ValueError(f"{missing} of {len(numbers)} {name} are missing or infinite")
    return numbers


def _key(cluster):
    """A cluster's name as something hashable: rows read from JSON carry lists."""
    return tuple(map(_key, cluster)) if isinstance(cluster, (list, tuple)) else cluster


def cluster_codes(clusters: Sequence, n: int, name: str) -> np.ndarray:
    """The clusters numbered 0, 1, ... in an order that does not hang on the order of the rows."""
    names = clusters.tolist() if hasattr(clusters, "tolist") else list(clusters)
    keys = [_key(c) for c in names]
    if len(keys) != n:
        raise ValueError(f"there are {n} {name}, but {len(keys)} clusters: each needs one")
    number = {key: i for i, key in enumerate(sorted(set(keys), key=repr))}
    return np.array([number[key] for key in keys])


def without_single_cluster(codes: np.ndarray) -> np.ndarray:
    """The codes; if there is one cluster only, each value becomes one of its own."""
    if codes.max() > 0:
        return codes
    warnings.warn(
        "There is only one cluster: its values count as independent, and the interval is too "
        "narrow. Evaluate on more question combinations.",
        stacklevel=3,
    )
    return np.arange(len(codes))


def _resampled_means(
    numbers: np.ndarray,
    codes: np.ndarray,
    of_run: np.ndarray,
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """[resamples] means; a few million draws at a time, so that memory stays small."""
    runs, k = int(of_run.max()) + 1, int(codes.max()) + 1
    cells = of_run * k + codes
    # Sorted first: the sums are then the same to the last digit in whatever order the rows come.
    order = np.lexsort((numbers, cells))
    sums = np.bincount(cells[order], numbers[order], minlength=runs * k).reshape(runs, k)
    counts = np.bincount(cells, minlength=runs * k).astype(float).reshape(runs, k)
    if runs == 1:
        totals, sizes = resampled_sums(np.stack([sums[0], counts[0]], 1), resamples, rng).T
        return totals / sizes
    step = max(1, _CHUNK // k)
    means = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(k, size=(size, k))
        # One fewer than there are: drawing all of few runs would understate how they scatter by
        # (runs - 1) / runs, a third for three seeds (Rao and Wu's rescaling).
        times = rng.multinomial(runs - 1, np.full(runs, 1 / runs), size=size)
        rows = np.arange(size)[:, None]
        totals, sizes = ((times @ of)[rows, drawn].sum(1) for of in (sums, counts))
        means.append(totals / np.maximum(sizes, 1))
    return np.concatenate(means)


def _separated(y: np.ndarray, x: np.ndarray) -> bool:
    """Whether a threshold on x parts wins from losses (both occur), so that no finite fit exists.

    A tie is half a win and half a loss. Wins and losses may touch at the threshold itself.
    """
    won, lost = x[y > 0], x[y < 1]
    return lost.max() <= won.min() or won.max() <= lost.min()


def _robust_fit(y: np.ndarray, design: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """(intercept, its standard error) of the plain fit, robust to clustering.

    Raises:
        ArithmeticError: the fit does not converge, or has no comparison left over.
    """
    import statsmodels.api as sm

    if len(y) <= design.shape[1]:
        raise ArithmeticError("as many parameters as comparisons")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fit = sm.GLM(y, design, family=sm.families.Binomial()).fit(
            maxiter=200, tol=1e-12, cov_type="cluster", cov_kwds={"groups": codes}
        )
    intercept, error = float(fit.params[0]), float(fit.bse[0])
    # Beyond 30 a probability is 0 or 1 to the last digit: the fit ran away.
    if not (fit.converged and np.abs(fit.params).max() < 30 and math.isfinite(error)):
        raise ArithmeticError("the length-controlled fit does not converge")
    return intercept, error


def _penalised_fit(y: np.ndarray, design: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """(intercept, its standard error) with made-up comparisons: always finite.

    As many comparisons as there are parameters are added (Clogg and others, 1991), half of them
    won, spread evenly over the lengths that occurred.
    """
    import statsmodels.api as sm

    n, parameters = design.shape
    weight = parameters / n
    drawn = (y + weight / 2) / (1 + weight)
    weights = np.full(n, 1 + weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.GLM(drawn, design, family=sm.families.Binomial(), freq_weights=weights).fit(
            maxiter=200
        )
    return float(fit.params[0]), float(fit.bse[0] * math.sqrt(n / (codes.max() + 1)))


def _at_zero(intercept: float, error: float, n: int) -> Interval:
    """The interval of sigmoid(intercept)."""
    low, value, high = (
        0.5 * (1 + math.tanh(log_odds / 2))
        for log_odds in (intercept - Z * error, intercept, intercept + Z * error)
    )
    return Interval(value, low, high, n)
