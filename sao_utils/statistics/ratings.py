"""Agreement between raters, and the strengths of several models.

`kappa`: how far two raters (judges, or two ways to query one judge) agree beyond chance.
`bradley_terry`: the strengths of several models that were compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from sao_utils.statistics.errors import cluster_codes, widened
from sao_utils.statistics.intervals import (
    ALIKE,
    ONE_CLUSTER,
    Interval,
    resampled_sums,
    tail_of,
    without_interval,
)


def kappa(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    clusters: Sequence | None = None,
    resamples: int = 10_000,
) -> Interval:
    r"""Cohen's kappa of two raters with nominal labels, with a bootstrap over clusters.

    kappa = (p_o - p_e) / (1 - p_e), where p_o is the share of items with the same label, and p_e the share
    on which two raters with these label frequencies would agree by chance (Cohen, 1960, "A coefficient of
    agreement for nominal scales", Educational and Psychological Measurement 20).

    Args:
        a, b: [n] the label that each rater gave to item i (1, 2, "tie", ...). Before the call, drop
            (and count) the items that one of them did not label.
        clusters: [n] the cluster of each item; None: items are independent.

    Returns:
        Kappa, in -1..1, and its interval; resamples in which kappa is 0 / 0 are left out. If both raters
        give the same single label to all items, there is no kappa (0 / 0); if kappa is the same in all
        resamples (the raters always agree, or never), there is no interval.

    Raises:
        ValueError: `a` and `b` differ in length.
    """
    n = len(a)
    if n != len(b):
        raise ValueError(f"kappa needs as many labels of a ({n}) as of b ({len(b)})")
    codes = np.arange(n) if clusters is None else cluster_codes(clusters, n, "labels")
    number = {label: i for i, label in enumerate(dict.fromkeys([*a, *b]))}
    if len(number) == 1:
        return Interval(math.nan, math.nan, math.nan, n, "all labels are the same")
    if not n:
        return without_interval(math.nan, 0)
    first, second = (np.eye(len(number))[[number[label] for label in of]] for of in (a, b))
    items = np.column_stack([(first * second).sum(1), first, second])
    sums = np.zeros((codes.max() + 1, items.shape[1]))
    np.add.at(sums, codes, items)

    def of(totals: np.ndarray) -> np.ndarray:
        observed, by_a, by_b = np.split(totals, [1, 1 + len(number)], axis=-1)
        size = by_a.sum(-1)
        chance = (by_a * by_b).sum(-1) / size**2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (observed[..., 0] / size - chance) / (1 - chance)

    value = float(of(sums.sum(0)))
    if not codes.any():
        return without_interval(value, n)
    found = of(resampled_sums(sums, resamples))
    tail = tail_of(codes)
    low, high = np.nanquantile(found, (tail, 1 - tail))
    if high - low < 1e-12:
        return Interval(value, math.nan, math.nan, n, ALIKE)
    return Interval(value, float(low), float(high), n)


ELO = 400 / math.log(10)  # Elo points per unit of log-odds: 400 points are odds of 10 to 1


@dataclass(frozen=True)
class Strength:
    """How strong a model is: its Elo points, and its expected win rate against the baseline.

    In both intervals, `n` is the number of the model's games.
    """

    elo: Interval
    win_rate: Interval


def bradley_terry(
    games: Iterable[tuple[str, str, float, Hashable]],
    baseline: str,
    resamples: int = 1000,
    runs: Sequence | None = None,
) -> dict[str, Strength]:
    r"""The strengths of models from games between two models, with a bootstrap over prompts.

    P(a wins) = s_a / (s_a + s_b), fitted by maximum likelihood (Bradley and Terry, 1952, Biometrika
    39), a tie counting as half a win for each. Elo points are 1000 + 400 log10(s / s_baseline). Whole
    prompts are resampled, so that all games on a prompt count as one piece of evidence.

    Args:
        games: (model a, model b, outcome, prompt): outcome 1 if a won, 0 if b did, 0.5 for a tie, or
            anything between 0 and 1. Before the call, drop (and count) invalid games.
        baseline: the model that has 1000 points.
        resamples: the number of resamples.
        runs: the training (seed) of the models in each game, None for a game in which neither model was
            trained. With several, the intervals also include what other trainings would have changed
            (`errors.widened`, on the log-odds). If `runs` itself is None: a single training.

    Returns:
        Each model's strength, the strongest first. The baseline has 1000 points and a win rate of 0.5,
        both with intervals of zero width. If some models won (or lost) all of their games against the
        others, or never met them, no finite strengths fit, and every model's numbers are NaN. A resample
        in which this happens is fitted with an artificial tie added for each pair that met. Games on a
        single prompt give no interval.

    Raises:
        ValueError: the baseline has no games, or outcomes lie outside 0..1.
    """
    rows = list(games)
    names = sorted({name for a, b, *_ in rows for name in (a, b)})
    if baseline not in names:
        raise ValueError(f"the baseline {baseline!r} has no games; models with games: {names}")
    number = {name: i for i, name in enumerate(names)}
    first, second = (np.array([number[row[side]] for row in rows]) for side in (0, 1))
    outcome = np.array([row[2] for row in rows], dtype=float)
    if not ((outcome >= 0) & (outcome <= 1)).all():
        raise ValueError("outcomes must lie in 0..1: drop games that are not valid, and count them")
    codes = cluster_codes([row[3] for row in rows], len(rows), "games")
    m, k, zero = len(names), int(codes.max()) + 1, number[baseline]
    played = (np.bincount(first, minlength=m) + np.bincount(second, minlength=m)).tolist()
    by_prompt = np.zeros((k, m, m))  # [i, a, b]: a's wins over b on prompt i
    np.add.at(by_prompt, (codes, first, second), outcome)
    np.add.at(by_prompt, (codes, second, first), 1 - outcome)
    wins = by_prompt.sum(0)
    points = _log_strengths(wins, zero)
    note, low, high = "", np.full(m, math.nan), np.full(m, math.nan)
    if points is None:
        points = low
        note = "some models won, or lost, all games against the others: no finite strength fits"
    elif k == 1:
        note = ONE_CLUSTER
    else:
        low, high = _resampled_bounds(by_prompt, zero, tail_of(codes), resamples)
        if runs is not None:
            trained = np.array([run is not None for run in runs])
            of_run = np.where(trained, cluster_codes(runs, len(rows), "games"), -1)
            residuals = outcome - expit(points[first] - points[second])
            moves = _moves(residuals, first, second, wins, points, zero)
            for i in range(m):
                low[i], high[i] = widened(points[i], low[i], high[i], moves[:, i], codes, of_run)
    found = {}
    for i in np.argsort(-points, kind="stable").tolist():
        logs = np.array([points[i], low[i], high[i]])
        both = (1000 + ELO * logs, expit(logs))
        found[names[i]] = Strength(*(Interval(*of.tolist(), played[i], note) for of in both))
    return found


def _log_strengths(wins: np.ndarray, zero: int) -> np.ndarray | None:
    """[m] maximum-likelihood log-strengths from [m, m] wins, with 0 for the model `zero`.

    None if there is no finite maximum: a chain of wins must lead from each model to every other (Ford,
    1957, American Mathematical Monthly 64).
    """
    others = np.arange(len(wins)) != zero
    if not wins[np.ix_(others, others)].any():  # every other model met only the model `zero`
        won, lost = wins[others, zero], wins[zero, others]
        if not (won.all() and lost.all()):
            return None
        logs = np.zeros(len(wins))
        logs[others] = np.log(won / lost)
        return logs
    from scipy.sparse.csgraph import connected_components

    if connected_components(wins > 0, directed=True, connection="strong")[0] > 1:
        return None
    import evalica

    a, b = np.nonzero(wins)
    found = evalica.bradley_terry(
        a.tolist(),
        b.tolist(),
        [evalica.Winner.X] * len(a),
        weights=wins[a, b].tolist(),
        tolerance=1e-9,
        limit=100_000,
    )
    logs = np.log(found.scores.loc[range(len(wins))].to_numpy())
    return logs - logs[zero]


def _resampled_bounds(
    by_prompt: np.ndarray, zero: int, tail: float, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """[m] lower and [m] upper bounds of log-strengths, over resamples of [k, m, m] wins by prompt."""
    k, m, _ = by_prompt.shape
    wins = by_prompt.sum(0)
    ties = (wins + wins.T > 0) / 2
    totals = resampled_sums(by_prompt.reshape(k, m * m), resamples)
    found = []
    for total in totals.reshape(-1, m, m):
        logs = _log_strengths(total, zero)
        found.append(_log_strengths(total + ties, zero) if logs is None else logs)
    low, high = np.quantile(found, (tail, 1 - tail), axis=0)
    return low, high


def _moves(
    residuals: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    wins: np.ndarray,
    points: np.ndarray,
    zero: int,
) -> np.ndarray:
    """[n, m] by how much each of the n games moves each model's log-strength."""
    m = len(points)
    p = expit(points[:, None] - points[None, :])
    between = (wins + wins.T) * p * p.T
    others = np.arange(m) != zero
    information = (np.diag(between.sum(1)) - between)[np.ix_(others, others)]
    moves = (np.eye(m)[first] - np.eye(m)[second]) * residuals[:, None]
    moves[:, others] = moves[:, others] @ np.linalg.inv(information)
    moves[:, zero] = 0.0
    return moves
