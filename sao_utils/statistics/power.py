"""How many prompts a difference takes, and which of many differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from sao_utils.statistics.errors import checked, cluster_codes, variance_of_sums


def design_effect(values: Sequence[float], clusters: Sequence) -> float:
    """How many times wider clusters make the variance of a mean (Kish, 1965, "Survey sampling").

    1 where values within a cluster are independent, the cluster's size where they are all alike.
    Values without spread have no effect to show: 1. Values of fewer than two clusters have none that
    could be estimated: NaN.

    Raises:
        ValueError: missing values, or lengths that differ.
    """
    numbers = checked(values, "values")
    codes, n = cluster_codes(clusters, len(numbers), "values"), len(numbers)
    if not codes.any():
        return math.nan
    if np.ptp(numbers) == 0:
        return 1.0
    clustered = variance_of_sums(numbers - numbers.mean(), codes) / n**2
    return clustered / (float(np.var(numbers, ddof=1)) / n)


def prompts_needed(
    difference: float,
    variance: float | None = None,
    design_effect: float = 1.0,
    power: float = 0.8,
    level: float = 0.05,
) -> int:
    r"""How many prompts it takes to see a difference, by a two-sided test.

    A win rate against 50 % (no `variance`): n = (z_a / 2 + z_b sqrt(1/4 - d^2))^2 / d^2, z_a and
    z_b being the normal quantiles of 1 - level / 2 and of the power (Fleiss, Levin and Paik, 2003,
    "Statistical methods for rates and proportions", one proportion against a known one). Ties make
    it fewer. A paired difference: n = (z_a + z_b)^2 variance / d^2. Both times the design effect.

    Args:
        difference: the difference d to be seen, as a share: 0.05 is a win rate of 55 or 45 %.
        variance: the variance over prompts of the paired difference (or of any mean that is
            tested against a fixed number), observed in a pilot or an earlier run.
        design_effect: how much clusters widen the variance (`design_effect`), 1 without.
        power: the chance to see it.
        level: the chance to see a difference where there is none.

    Returns:
        The number of prompts, rounded up.

    Raises:
        ValueError: a difference of 0, or above 1/2 for a win rate; a negative variance; a design
            effect of 0 or less; power not between 0.5 and 1, or level not between 0 and 1.
    """
    at_null, at_difference = _needed_quantiles(variance, design_effect, power, level)
    d = abs(difference)
    if not 0 < d < math.inf:
        raise ValueError(f"the difference is {difference}: no number of prompts can show that")
    if variance is None:
        if d > 0.5:
            raise ValueError(f"a win rate differs from 50 % by 0.5 at most, not by {d}")
        needed = (at_null * 0.5 + at_difference * math.sqrt(0.25 - d**2)) ** 2 / d**2
    else:
        needed = (at_null + at_difference) ** 2 * variance / d**2
    # A hair less, so that rounding errors do not cost a prompt.
    return max(1, math.ceil(needed * design_effect * (1 - 1e-12)))


def smallest_difference(
    n: int,
    variance: float | None = None,
    design_effect: float = 1.0,
    power: float = 0.8,
    level: float = 0.05,
) -> float:
    """The smallest difference that n prompts can show: `prompts_needed`, the other way round.

    Returns:
        A share; infinite where n is so small that not even a win rate of 100 % would do.

    Raises:
        ValueError: no prompts, and as in `prompts_needed`.
    """
    at_null, at_difference = _needed_quantiles(variance, design_effect, power, level)
    if n < 1:
        raise ValueError(f"{n} prompts: at least one is needed")
    size = n / design_effect
    if variance is not None:
        return (at_null + at_difference) * math.sqrt(variance / size)
    if size < at_null**2:
        return math.inf
    # d sqrt(size) - at_null / 2 = at_difference sqrt(1/4 - d^2), squared and solved for d.
    root = at_difference * math.sqrt(size - at_null**2 + at_difference**2)
    return (at_null * math.sqrt(size) + root) / (2 * (size + at_difference**2))


def _needed_quantiles(
    variance: float | None, design_effect: float, power: float, level: float
) -> tuple[float, float]:
    """The two normal quantiles of a sample size, and the checks that its functions share."""
    if variance is not None and not 0 <= variance < math.inf:
        raise ValueError(f"the variance is {variance}, but must be 0 or more")
    if not 0 < design_effect < math.inf:
        raise ValueError(f"the design effect is {design_effect}, but must be above 0")
    if not (0 < level < 1 and 0.5 <= power < 1):
        raise ValueError(f"power {power} must lie between 0.5 and 1, level {level} between 0 and 1")
    normal = NormalDist()
    return normal.inv_cdf(1 - level / 2), normal.inv_cdf(power)


def outside_the_noise(
    differences: Sequence[float],
    errors: Sequence[float],
    level: float = 0.05,
    freedoms: Sequence[float] | None = None,
    trials: Sequence[int] | None = None,
) -> tuple[list[bool], list[float]]:
    """Which of several differences are more than noise, after Holm's correction.

    Among twenty tasks one differs "significantly" by chance. Holm's step-down procedure (Holm,
    1979, Scandinavian Journal of Statistics 6) keeps the chance of even one false alarm below
    `level`, however the tasks hang together. The p-values are the normal distribution's, or with
    `freedoms` Student's.

    Args:
        differences: [m] after minus before.
        errors: [m] their standard errors (paired where the same items were asked both times).
        freedoms: [m] the degrees of freedom behind each error, where they are few (a few seeds).
        trials: [m] of how many items each difference is the mean. Where all of them moved alike
            there is no error (0) to measure it by: p is then that of the exact sign test, 2 / 2^n.

    Returns:
        [m] whether it is outside the noise, and [m] the corrected p-values. What cannot be
        tested is left out, False and NaN: a difference or error that is NaN, and without `trials` a
        difference whose error is 0.

    Raises:
        ValueError: lengths that differ, or a negative error.
    """
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    d, e = np.asarray(differences, dtype=float), np.asarray(errors, dtype=float)
    if d.ndim != 1 or d.shape != e.shape:
        raise ValueError(f"there are {d.size} differences, but {e.size} standard errors")
    if (e < 0).any():
        raise ValueError("a standard error is negative")
    freedom = np.broadcast_to(math.inf if freedoms is None else freedoms, d.shape).astype(float)
    n = np.broadcast_to(math.nan if trials is None else trials, d.shape).astype(float)
    p = 2 * stats.t.sf(np.abs(d) / np.where(e > 0, e, math.nan), freedom)
    p = np.where((e == 0) & ~np.isnan(d), np.where(d == 0, 1.0, np.minimum(1, 2.0 ** (1 - n))), p)
    known = ~np.isnan(p)
    corrected, outside = np.full(len(d), math.nan), np.zeros(len(d), bool)
    if known.any():
        outside[known], corrected[known] = multipletests(p[known], level, method="holm")[:2]
    return outside.tolist(), corrected.tolist()
