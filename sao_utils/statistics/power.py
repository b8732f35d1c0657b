"""How many prompts it takes to detect a difference, and which of many differences are not noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from sao_utils.statistics.errors import checked, cluster_codes, variance_of_sums


def design_effect(values: Sequence[float], clusters: Sequence) -> float:
    """The factor by which clusters raise the variance of a mean (Kish, 1965, "Survey sampling").

    1 if values within a cluster are independent, the cluster's size if they are all alike. It is 1 for
    values without any spread, and NaN for values of fewer than two clusters.

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


def prompts_needed(difference: float) -> int:
    r"""How many prompts it takes to distinguish a win rate from 50 %, in four cases out of five.

    n = (z_a / 2 + z_b sqrt(1/4 - d^2))^2 / d^2, where z_a = 1.96 and z_b = 0.84 are the normal quantiles
    for a two-sided test at the 5 % level and for its power of 80 % (Fleiss, Levin and Paik, 2003,
    "Statistical methods for rates and proportions"). With ties, fewer are enough; with clustered prompts,
    `design_effect` times as many are needed.

    Args:
        difference: d, as a share, up to 0.5: 0.05 stands for a win rate of 55 or 45 %.

    Returns:
        The number of prompts, rounded up.
    """
    at_null, at_difference = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
    root = at_null * 0.5 + at_difference * math.sqrt(0.25 - difference**2)
    return math.ceil((root / difference) ** 2)


def outside_the_noise(
    differences: Sequence[float],
    errors: Sequence[float],
    freedoms: Sequence[float],
    trials: Sequence[int],
) -> tuple[list[bool], list[float]]:
    """Which of several differences are more than noise, after Holm's correction.

    Among twenty tasks, one is expected to differ "significantly" by chance. Holm's step-down procedure
    (Holm, 1979, Scandinavian Journal of Statistics 6) keeps the chance of even one false alarm below 5 %,
    however the tasks are correlated. The p-values are from Student's t distribution.

    Args:
        differences: [m] after minus before.
        errors: [m] their standard errors (paired if the same items were asked both times).
        freedoms: [m] the degrees of freedom behind each error.
        trials: [m] the number of items that each difference is the mean of. If all items moved alike,
            the error is 0 and cannot serve as a yardstick: p is then that of the exact sign test, 2 / 2^n.

    Returns:
        [m] whether each difference is outside the noise, and [m] the corrected p-values. What cannot be
        tested (a difference or error that is NaN) is left out of the correction: False and NaN.
    """
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    d, e, n = (np.asarray(values, dtype=float) for values in (differences, errors, trials))
    p = 2 * stats.t.sf(np.abs(d) / np.where(e > 0, e, math.nan), freedoms)
    sign_test = np.where(d == 0, 1.0, np.minimum(1, 2.0 ** (1 - n)))
    p = np.where((e == 0) & ~np.isnan(d), sign_test, p)
    known = ~np.isnan(p)
    corrected, outside = np.full(len(d), math.nan), np.zeros(len(d), bool)
    if known.any():
        outside[known], corrected[known] = multipletests(p[known], 0.05, method="holm")[:2]
    return outside.tolist(), corrected.tolist()
