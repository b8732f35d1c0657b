"""Win rates at equal length: AlpacaEval's regression for one pair of models, with an interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from sao_utils.statistics.errors import checked, cluster_codes, students_t, two_way_error
from sao_utils.statistics.intervals import Interval, win_rate, without_interval


def length_controlled_win_rate(
    wins: Sequence[float],
    length_difference: Sequence[float],
    clusters: Sequence,
    difficulty: Sequence[float] | None = None,
    runs: Sequence | None = None,
) -> Interval:
    r"""The win rate that the tuned model would have if its answers were as long as the base's.

    Fits P(win) = sigmoid(a + b tanh(d / std(d)) + c g), d being the difference in length and g the
    prompt's difficulty, and reports the mean over prompts of the prediction at d = 0; without g
    that is sigmoid(a). This is AlpacaEval's regression for one pair of models (Dubois and others, 2024,
    arXiv 2404.04475; `length_controlled_v1` in its program). The program differs in how it fits:
    it adds comparisons of two gamed baselines, uses an L1 penalty chosen by cross-validation, and
    gives no interval. Its published figures therefore do not agree with these to the last digit.

    The covariance is robust to clustering (Liang and Zeger, 1986), which also makes it valid for
    ties and for judges' probabilities (Papke and Wooldridge, 1996, fractional logit). The interval
    is computed on the log-odds, with Student's quantile for the number of clusters, and mapped back.
    std(d) is treated as known.

    Args:
        wins: [n] 1 if the tuned model wins, 0 if it loses, 0.5 for a tie, or a judge's probability.
        length_difference: [n] length of the tuned model's answer minus length of the base's.
        clusters: [n] the cluster of each comparison.
        difficulty: [n] the difficulty g of each prompt, known beforehand (AlpacaEval publishes
            one for each of its 805 prompts); None: a fit without difficulties.
        runs: [n] the training (seed) of each comparison; None: a single one. With several, the variance
            between trainings is added (`errors.add_trainings`).

    Returns:
        The length-controlled win rate and its interval. If all answers are as long as the base's, it
        comes from the same fit without b; if all comparisons were won, all lost or all tied, from
        `win_rate`. It is NaN if the fit has no finite solution: all differences in length are alike, or
        length (or difficulty) alone separates wins from losses. Without comparisons, or with those of
        one cluster only, there is no interval (`without_interval`).

    Raises:
        ValueError: missing values, or lengths that differ.
    """
    y, d = checked(wins, "wins"), checked(length_difference, "length_difference")
    n = len(y)
    if n != len(d):
        raise ValueError(f"there are {n} wins, but {len(d)} differences in length")
    codes = cluster_codes(clusters, n, "wins")
    of_run = np.zeros_like(codes) if runs is None else cluster_codes(runs, n, "wins")
    if not codes.any():
        return without_interval(y.mean() if n else math.nan, n)
    design = np.ones((n, 1))
    if difficulty is not None:
        g = checked(difficulty, "difficulty")
        if np.ptp(g) > 0:
            design = np.column_stack([design, (g - g.mean()) / g.std()])
    at_zero = design
    if d.any():
        x = _scaled(d)
        if x is None:
            return Interval(math.nan, math.nan, math.nan, n, "all differences in length are alike")
        design = np.column_stack([design, x])
        at_zero = np.column_stack([at_zero, np.zeros(n)])
    if np.ptp(y) == 0:
        return win_rate(y, codes)
    fit = _fit(y, design)
    if fit is None:
        return Interval(math.nan, math.nan, math.nan, n, "length alone parts wins from losses")
    return _at_equal_length(y, design, at_zero, fit, codes, of_run)


def length_curve(
    wins: Sequence[float], length_difference: Sequence[float], at: Sequence[float]
) -> list[float]:
    """The win probability by difference in length: the fitted curve of `length_controlled_win_rate`.

    Args:
        wins, length_difference: [n] as in `length_controlled_win_rate`; the fit is without difficulties.
        at: [m] differences in length at which the curve is evaluated.

    Returns:
        [m] sigmoid(a + b tanh(at / std(d))), whose value at 0 is the length-controlled win rate; []
        if the fit has no finite solution, or all outcomes or all differences in length are the same.
    """
    y, d = checked(wins, "wins"), checked(length_difference, "length_difference")
    x = _scaled(d)
    if x is None or np.ptp(y) == 0:
        return []
    fit = _fit(y, np.column_stack([np.ones(len(y)), x]))
    if fit is None:
        return []
    a, b = fit.params
    spread = np.std(d, ddof=1)
    return expit(a + b * np.tanh(np.asarray(at, dtype=float) / spread)).tolist()


def _scaled(d: np.ndarray) -> np.ndarray | None:
    """tanh(d / std(d)); None if these values are all alike."""
    spread = np.std(d, ddof=1) if len(d) > 1 else 0.0
    if not spread > 0:
        return None
    x = np.tanh(d / spread)
    return x if np.ptp(x) > 1e-9 else None


def _fit(y: np.ndarray, design: np.ndarray):
    """statsmodels' logistic fit of [n] outcomes on [n, m] columns, the last of which is the length.

    None if it has no finite solution, or no more comparisons than parameters to estimate its error from.
    """
    import statsmodels.api as sm

    n, parameters = design.shape
    won, lost = design[y > 0, -1], design[y < 1, -1]  # a tie is half of each
    parted = parameters > 1 and (lost.max() <= won.min() or won.max() <= lost.min())
    if parted or n <= parameters:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fit = sm.GLM(y, design, family=sm.families.Binomial()).fit(maxiter=200, tol=1e-12)
    # With coefficients beyond 30, probabilities are 0 or 1 to the last digit: the fit has diverged.
    return fit if fit.converged and np.abs(fit.params).max() < 30 else None


def _at_equal_length(
    y: np.ndarray,
    design: np.ndarray,
    at_zero: np.ndarray,
    fit,
    codes: np.ndarray,
    of_run: np.ndarray,
) -> Interval:
    """The mean prediction of a fit at equal length, with its interval.

    Each comparison moves the result through its effect on the coefficients and, if difficulties differ,
    also because its own prediction is one of those averaged. The first effect alone gives Liang and
    Zeger's covariance, which is robust to clustering.

    Args:
        design, at_zero: [n, m] the comparisons as they are, and with the length difference set to 0.
    """
    n, parameters = design.shape
    predicted = expit(at_zero @ fit.params)
    mean = predicted.mean()
    log_odds = math.log(mean / (1 - mean))
    slopes = predicted * (1 - predicted) / (n * mean * (1 - mean))
    residuals = y - expit(design @ fit.params)
    moves = design @ (fit.normalized_cov_params @ (slopes @ at_zero)) * residuals
    if np.ptp(at_zero, axis=0).any():
        moves += (predicted / mean - 1) / (1 - mean) / n
    error, freedom = two_way_error(moves, codes, of_run)
    half = students_t(freedom) * error * math.sqrt((n - 1) / (n - parameters))
    low, value, high = expit(log_odds + half * np.array([-1, 0, 1]))
    return Interval(float(value), float(low), float(high), n)
