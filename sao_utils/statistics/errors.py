"""Standard errors over clusters of questions and over trainings, and checks of the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def add_trainings(
    variance: float, freedom: float, between: float, trainings: int, shared: float
) -> tuple[float, float]:
    """A standard error that also includes what other trainings (seeds) would have changed.

    The variance between clusters of questions, plus the variance between trainings, minus the chance
    variation of single answers, which is in both: V = V_clusters + max(0, V_trainings - V_both) (Cameron,
    Gelbach and Miller, 2011, Journal of Business and Economic Statistics 29). The degrees of freedom are
    Welch and Satterthwaite's for V_clusters and V_trainings.

    Args:
        variance, freedom: the estimate's variance between clusters, and its degrees of freedom.
        between: the estimate's variance between `trainings` trainings, of which there are at least two.
        shared: its variance if each combination of cluster and training counts as a cluster of its own.

    Returns:
        The standard error, and its degrees of freedom.
    """
    total = variance + max(0.0, between - shared)
    spread = variance**2 / freedom + between**2 / (trainings - 1)
    return math.sqrt(total), total**2 / spread if spread else freedom


def two_way_error(moves: np.ndarray, codes: np.ndarray, of_run: np.ndarray) -> tuple[float, float]:
    """The standard error of an estimate over clusters and trainings, and its degrees of freedom.

    Args:
        moves: [n] by how much each value moves the estimate: for a mean, (value - mean) / n.
        codes, of_run: [n] the cluster and the training of each value, both numbered 0, 1, ...; the
            training is -1 for a value that does not come from one.
    """
    variance, freedom = variance_of_sums(moves, codes), float(codes.max())
    trained = of_run >= 0
    trainings = len(np.unique(of_run[trained]))
    if trainings < 2:
        return math.sqrt(variance), freedom
    moves, codes, of_run = moves[trained], codes[trained], of_run[trained]
    cells = np.unique(codes * (of_run.max() + 1) + of_run, return_inverse=True)[1]
    shared, between = variance_of_sums(moves, cells), variance_of_sums(moves, of_run)
    return add_trainings(variance, freedom, between, trainings, shared)


def widened(
    value: float,
    low: float,
    high: float,
    moves: np.ndarray,
    codes: np.ndarray,
    of_run: np.ndarray,
) -> tuple[float, float]:
    """Bounds that account for clusters only, widened by what trainings add (`two_way_error`).

    On each side, the squares of the distances are added (Zou and Donner, 2008, Statistics in Medicine 27).
    """
    error, freedom = two_way_error(moves, codes, of_run)
    known = students_t(int(codes.max())) ** 2 * variance_of_sums(moves, codes)
    more = math.sqrt(max(0.0, (students_t(freedom) * error) ** 2 - known))
    if not more:
        return low, high
    return value - math.hypot(value - low, more), value + math.hypot(high - value, more)


def students_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t distribution with `freedom` degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def variance_of_sums(residuals: np.ndarray, codes: np.ndarray) -> float:
    """The variance of the sum of residuals, from how far their sums by cluster scatter about 0."""
    sums = np.bincount(codes, residuals)
    return float(sums @ sums) * len(sums) / (len(sums) - 1)


def checked(values: Sequence[float], name: str) -> np.ndarray:
    """`values` as [n] floats.

    Raises:
        ValueError: missing (None, NaN) or infinite values.
    """
    numbers = np.asarray(values, dtype=float)
    missing = int((~np.isfinite(numbers)).sum())
    if missing:
        raise ValueError(f"{missing} of {len(numbers)} {name} are missing or infinite")
    return numbers


def cluster_codes(clusters: Sequence, n: int, name: str) -> np.ndarray:
    """The clusters of n values, numbered 0, 1, ... independently of the order of the values.

    Raises:
        ValueError: the number of clusters given is not n.
    """
    names = clusters.tolist() if hasattr(clusters, "tolist") else list(clusters)
    if len(names) != n:
        raise ValueError(f"there are {n} {name}, but {len(names)} clusters: each needs one")
    number = {key: i for i, key in enumerate(sorted(set(names), key=repr))}
    return np.array([number[key] for key in names], dtype=int)
