"""Win rates at equal length: AlpacaEval's model of one pair of models, with an interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

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
    that is sigmoid(a). This is AlpacaEval's model of one pair of models (Dubois and others, 2024,
    arXiv 2404.04475; `length_controlled_v1` in its program). Its program differs in how it fits:
    it adds comparisons of two gamed baselines, takes an L1 penalty chosen by cross-validation, and
    gives no interval. Its published figures are therefore not these to the digit.

    The covariance is robust to clustering (Liang and Zeger, 1986), which also makes it right for
    ties and for judges' probabilities (Papke and Wooldridge, 1996, fractional logit). The interval
    is made on the log-odds, with Student's quantile for the number of clusters, and mapped back, so
    it stays between 0 and 1 (to first order it is the delta method's). std(d) counts as known.

    Args:
        wins: [n] 1 the tuned model wins, 0 it loses, 0.5 a tie, or a judge's probability.
        length_difference: [n] length of the tuned answer minus that of the base's; the kit counts
            characters everywhere, see `evaluation.comparisons`.
        clusters: [n] the cluster of each comparison.
        difficulty: [n] the difficulty g of each prompt, known beforehand (AlpacaEval publishes
            one for each of its 805 prompts); None: without.
        runs: [n] the training (seed) of each comparison; None: of one. With several, the variance
            between trainings is added: what other seeds would have changed, see
            `errors.add_trainings`.

    Returns:
        The length-controlled win rate and its interval. Where that fit has no finite answer:

        - all answers are as long as the base's: the raw win rate, by the same fit without b;
        - all differences are one other number (or all so large against their spread that tanh is
          1 throughout): nothing tells what would happen at equal length. The value is the raw
          win rate, the interval goes from 0 to 1;
        - all comparisons were won, or lost, or tied: 1, 0 or 0.5, with the interval of
          `intervals.win_rate`, which takes each cluster as one trial;
        - length (or difficulty) alone separates wins from losses (say, the longer answer wins
          always): b is unbounded. Each outcome is then drawn towards 1/2 by two made-up
          comparisons in all (half won, at the lengths that occurred), and the covariance is the
          model's own with each cluster counted as one comparison, since the fit leaves too little
          over for a robust one. The interval is wide.

        Comparisons of one cluster, and none at all, have no interval (`intervals.without_interval`).

    Raises:
        ValueError: missing values, wins outside of 0..1, or lengths that differ.
    """
    y = checked(wins, "wins")
    d = checked(length_difference, "length_difference")
    if len(y) != len(d):
        raise ValueError(f"there are {len(y)} wins, but {len(d)} differences in length")
    if not len(y):
        return without_interval(math.nan, 0)
    if y.min() < 0 or y.max() > 1:
        raise ValueError("wins must be 1 (won), 0 (lost) or 0.5 (tie)")
    codes, n = cluster_codes(clusters, len(y), "wins"), len(y)
    if n > 1 and not codes.any():
        return without_interval(float(y.mean()), n)
    design = np.ones((n, 1))
    if difficulty is not None:
        g = checked(difficulty, "difficulty")
        if len(g) != n:
            raise ValueError(f"there are {n} wins, but {len(g)} difficulties")
        if np.ptp(g) > 0:
            design = np.column_stack([design, (g - g.mean()) / g.std()])
    at_zero = design
    if d.any():
        spread = np.std(d, ddof=1) if n > 1 else 0.0
        x = np.tanh(d / spread) if spread > 0 else np.ones(n)  # 0 also for differences of 1e-300
        if np.ptp(x) < 1e-9:
            return Interval(float(y.mean()), 0.0, 1.0, n)
        design = np.column_stack([design, x])
        at_zero = np.column_stack([at_zero, np.zeros(n)])
    if np.ptp(y) == 0:
        return win_rate(y, codes).rate
    of_run = np.zeros_like(codes) if runs is None else cluster_codes(runs, n, "wins")
    has_length = design.shape[1] > 1 and not at_zero[:, -1].any()
    log_odds, error, freedom = None, 0.0, math.inf
    if not (has_length and _separated(y, design[:, -1])):
        try:
            log_odds, error, freedom = _robust_fit(y, design, at_zero, codes, of_run)
        except ArithmeticError:
            pass  # all but separated
    if log_odds is None:
        log_odds, error = _penalised_fit(y, design, at_zero, codes)
    return _on_log_odds(log_odds, error, students_t(freedom), n)


def length_curve(
    wins: Sequence[float], length_difference: Sequence[float], at: Sequence[float]
) -> list[float]:
    """The chance to win by difference in length: the curve of `length_controlled_win_rate`.

    Args:
        wins, length_difference: [n] as there, without difficulties.
        at: [m] differences.

    Returns:
        [m] sigmoid(a + b tanh(at / std(d))), whose value at 0 is the length-controlled win rate; []
        where the fit has no finite answer, or nothing to tell length by.
    """
    import statsmodels.api as sm

    y, d = checked(wins, "wins"), checked(length_difference, "length_difference")
    spread = np.std(d, ddof=1) if len(d) > 2 else 0.0
    if not spread > 0 or np.ptp(y) == 0 or _separated(y, np.tanh(d / spread)):
        return []
    design = np.column_stack([np.ones(len(y)), np.tanh(d / spread)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.GLM(y, design, family=sm.families.Binomial()).fit(maxiter=200, tol=1e-12)
    if not (fit.converged and np.abs(fit.params).max() < 30):
        return []
    a, b = fit.params
    return _sigmoid(a + b * np.tanh(np.asarray(at, dtype=float) / spread)).tolist()


def _separated(y: np.ndarray, x: np.ndarray) -> bool:
    """Whether a threshold on x parts wins from losses (both occur), so that no finite fit exists.

    A tie is half a win and half a loss. Wins and losses may touch at the threshold itself.
    """
    won, lost = x[y > 0], x[y < 1]
    return lost.max() <= won.min() or won.max() <= lost.min()


def _robust_fit(
    y: np.ndarray, design: np.ndarray, at_zero: np.ndarray, codes: np.ndarray, of_run: np.ndarray
) -> tuple[float, float, float]:
    """(log-odds of the mean prediction at equal length, standard error, degrees of freedom).

    Each comparison moves the result by what it does to the coefficients and, where difficulties
    differ, by its own prediction being one of those averaged. The first alone is Liang and
    Zeger's covariance, robust to clustering.

    Args:
        design, at_zero: [n, m] the comparisons as they are, and with length set to equal.

    Raises:
        ArithmeticError: the fit does not converge, or has no comparison left over.
    """
    import statsmodels.api as sm

    n, parameters = design.shape
    if n <= parameters:
        raise ArithmeticError("as many parameters as comparisons")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fit = sm.GLM(y, design, family=sm.families.Binomial()).fit(maxiter=200, tol=1e-12)
    # Beyond 30 a probability is 0 or 1 to the last digit: the fit ran away.
    if not (fit.converged and np.abs(fit.params).max() < 30):
        raise ArithmeticError("the length-controlled fit does not converge")
    log_odds, slopes = _log_odds_of_mean(at_zero @ fit.params)
    residuals = y - _sigmoid(design @ fit.params)
    moves = design @ (fit.normalized_cov_params @ (slopes @ at_zero)) * residuals
    if np.ptp(at_zero, axis=0).any():
        predicted = _sigmoid(at_zero @ fit.params)
        moves += (predicted / predicted.mean() - 1) / (1 - predicted).mean() / n
    error, freedom = two_way_error(moves, codes, of_run)
    error *= math.sqrt((n - 1) / (n - parameters))
    if not math.isfinite(error):
        raise ArithmeticError("the length-controlled fit has no finite error")
    return log_odds, error, freedom


def _penalised_fit(
    y: np.ndarray, design: np.ndarray, at_zero: np.ndarray, codes: np.ndarray
) -> tuple[float, float]:
    """The same with made-up comparisons: always finite.

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
    log_odds, slopes = _log_odds_of_mean(at_zero @ fit.params)
    slope = slopes @ at_zero
    error = math.sqrt(slope @ fit.normalized_cov_params @ slope * n / (codes.max() + 1))
    return log_odds, error


def _log_odds_of_mean(log_odds: np.ndarray) -> tuple[float, np.ndarray]:
    """log-odds of the mean of n probabilities, and its slope in the log-odds of each, [n].

    In logarithms: with few comparisons the fit may say 1 - 1e-20, which is 1 as a number.
    """
    won, lost = -np.logaddexp(0, -log_odds), -np.logaddexp(0, log_odds)
    wins, losses = np.logaddexp.reduce(won), np.logaddexp.reduce(lost)
    return float(wins - losses), np.exp(won - wins + lost - losses) * len(log_odds)


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(log_odds / 2))


def _on_log_odds(log_odds: float, error: float, quantile: float, n: int) -> Interval:
    """The interval of sigmoid(log_odds)."""
    half = quantile * error
    low, value, high = _sigmoid(np.array([log_odds - half, log_odds, log_odds + half]))
    return Interval(float(value), float(low), float(high), n)
