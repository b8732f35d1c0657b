"""Several raters and several models.

`kappa`: how far two raters (judges, or two ways to query one judge) agree beyond chance.
`bradley_terry`: the strength of several models that were compared two by two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sao_utils.statistics.errors import cluster_codes, widened
from sao_utils.statistics.intervals import (
    Interval,
    Z,
    resampled_sums,
    tail_of,
    win_rate,
    without_interval,
)


def kappa(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    clusters: Sequence | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    r"""Cohen's kappa of two raters with nominal labels, with a bootstrap over clusters.

    kappa = (p_o - p_e) / (1 - p_e): p_o the share of items with the same label, p_e the share that
    two raters with these label frequencies would share by chance (Cohen, 1960, "A coefficient of
    agreement for nominal scales", Educational and Psychological Measurement 20).

    Args:
        a, b: [n] the label that each rater gave to item i (1, 2, "tie", ...): drop and count the
            items that one of them did not label before the call.
        clusters: [n] the cluster of each item; None: items are independent.
        resamples: how many resamples.
        seed: the same seed, labels and clusters give the same interval.

    Returns:
        Kappa, in -1..1, and its interval. Where both raters give one and the same label to all
        items kappa is 0 / 0: the value is NaN and the interval all of -1..1. Where resamples are
        all alike (they always agree on several labels, or never; or one rater gives one label
        only, which makes kappa 0 whatever the other says), the bounds are kappa at the bounds of
        `intervals.win_rate` for p_o. Resamples in which kappa is 0 / 0 are left out. One item
        alone says nothing: the interval is all of -1..1.

    Raises:
        ValueError: missing labels, or lengths that differ.
    """
    if len(a) != len(b):
        raise ValueError(f"kappa needs as many labels of a ({len(a)}) as of b ({len(b)})")
    n = len(a)
    if not n:
        return without_interval(math.nan, 0)
    # NaN is the one label that does not equal itself.
    missing = sum(label is None or label != label for pair in zip(a, b) for label in pair)
    if missing:
        raise ValueError(
            f"{missing} of {2 * n} labels are missing: drop their items first, and count them"
        )
    number = {label: i for i, label in enumerate(dict.fromkeys([*a, *b]))}
    first, second = (np.eye(len(number))[[number[label] for label in of]] for of in (a, b))
    codes = np.arange(n) if clusters is None else cluster_codes(clusters, n, "labels")
    if len(number) == 1:
        return Interval(float("nan"), -1.0, 1.0, n)
    single = n > 1 and not codes.any()
    if single:
        codes = np.arange(n)
    same = (first * second).sum(1)
    items = np.column_stack([same, first, second])
    sums = np.zeros((codes.max() + 1, items.shape[1]))
    np.add.at(sums, codes, items)

    def of(totals: np.ndarray) -> np.ndarray:
        observed, by_a, by_b = np.split(totals, [1, 1 + len(number)], axis=-1)
        size = by_a.sum(-1)
        chance = (by_a * by_b).sum(-1) / size**2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (observed[..., 0] / size - chance) / (1 - chance)

    value = float(of(sums.sum(0)))
    if n == 1:
        return Interval(value, -1.0, 1.0, 1)
    if single:
        return without_interval(value, n)
    found = of(resampled_sums(sums, resamples, np.random.default_rng(seed)))
    tail = tail_of(codes)
    low, high = np.nanquantile(found, (tail, 1 - tail))
    if high - low < 1e-12:
        chance, agreed = float(first.mean(0) @ second.mean(0)), win_rate(same, codes).rate
        low, high = ((p - chance) / (1 - chance) for p in (agreed.low, agreed.high))
        low, high = max(-1.0, low), min(1.0, high)
    return Interval(value, float(low), float(high), n)


ELO = 400 / math.log(10)  # Elo points for a log-odds of 1: 400 points are odds of 10 to 1


@dataclass(frozen=True)
class Strength:
    """How strong a model is: Elo points, and its expected win rate against the baseline.

    `n` of both intervals is the number of the model's games.
    """

    elo: Interval
    win_rate: Interval


def bradley_terry(
    games: Iterable[tuple[str, str, float, float, Hashable]],
    baseline: str,
    resamples: int = 1000,
    seed: int = 0,
    runs: Sequence | None = None,
) -> dict[str, Strength]:
    r"""The strengths of models from games of two, with a bootstrap over prompts.

    P(a wins) = s_a / (s_a + s_b), fitted by maximum likelihood (Bradley and Terry, 1952, Biometrika
    39; evalica's iteration, Newman, 2023, JMLR 24), a tie being half a win of each. Elo points are
    1000 + 400 log10(s / s_baseline), as Arena-Hard has it (Li and others, 2024, arXiv 2406.11939):
    its two games of a prompt are two games here, with a weight of 3 for A>>B and B>>A. Unlike
    there, whole prompts are resampled, not single games, so that the two orders of a prompt, and
    all models' games on it, count as one piece of evidence.

    Args:
        games: (model a, model b, outcome, weight, prompt): outcome 1 if a won, 0 if b did, 0.5 for
            a tie, or between; drop and count what is invalid before the call. Rows that repeat a
            prompt add no certainty.
        baseline: the model that has 1000 points.
        resamples: how many resamples (Arena-Hard takes 100).
        seed: the same seed and games give the same intervals.
        runs: the training (seed) of the models in each game, None where none of both was trained.
            With several, the intervals also hold what other trainings would have changed: the
            variance between them is added on the log-odds (`errors.add_trainings`), from how much
            each game moves the fit. None for all: of one training.

    Returns:
        Each model's strength, the strongest first. The baseline has 1000 and 0.5 without width.

        Where some models won (or lost) all of their games against the others, no finite strength
        fits. With a warning that names them, a drawn game is then added to each pair that met, and
        the intervals are the fit's own, on the log-odds, with each prompt counting as one game of
        each pair: wide. The same is done in single resamples that come out so.

        Games of one prompt have no interval (`intervals.without_interval`). One game alone gets the
        made-up one and such an interval, too.

    Raises:
        ValueError: no games, a baseline without games, a model against itself, outcomes outside of
            0..1, weights that are not above 0, or groups of models that never met.
    """
    rows = list(games)
    if not rows:
        raise ValueError("there are no games: strengths need at least one")
    names = sorted({name for a, b, *_ in rows for name in (a, b)})
    if baseline not in names:
        raise ValueError(f"the baseline {baseline!r} has no games; models with games: {names}")
    number = {name: i for i, name in enumerate(names)}
    first = np.array([number[row[0]] for row in rows])
    second = np.array([number[row[1]] for row in rows])
    outcome = np.array([row[2] for row in rows], dtype=float)
    weight = np.array([row[3] for row in rows], dtype=float)
    if (first == second).any():
        raise ValueError(f"{names[first[first == second][0]]!r} plays against itself")
    if not ((outcome >= 0) & (outcome <= 1)).all():
        raise ValueError("outcomes must lie in 0..1: drop games that are not valid, and count them")
    if not ((weight > 0) & (weight < math.inf)).all():
        raise ValueError("weights must be above 0: leave out games that do not count")
    codes = cluster_codes([row[4] for row in rows], len(rows), "games")
    single = len(rows) > 1 and not codes.any()
    if single:
        codes = np.arange(len(rows))
    of_run = np.zeros_like(codes)
    if runs is not None:
        trained = np.array([run is not None for run in runs])
        of_run = np.where(trained, cluster_codes(runs, len(rows), "games"), -1)
    m, k, zero = len(names), int(codes.max()) + 1, number[baseline]
    others = np.arange(m) != zero
    by_prompt = np.zeros((k, m, m))  # [i, a, b]: a's wins over b on prompt i
    np.add.at(by_prompt, (codes, first, second), outcome * weight)
    np.add.at(by_prompt, (codes, second, first), (1 - outcome) * weight)
    wins = by_prompt.sum(0)
    met = (wins + wins.T > 0).astype(float)
    groups = _groups(met)
    if groups.max() > 0:
        never = [name for name, group in zip(names, groups) if group != groups[zero]]
        raise ValueError(
            f"no chain of games leads from {baseline!r} to {never}: compare them with a model that "
            "has met the baseline, or leave them out"
        )
    groups = _groups(wins)
    if groups.max() == 0 and k > 1:
        counted = wins
        points = _log_strengths(wins, zero)
        totals = resampled_sums(by_prompt.reshape(k, m * m), resamples, np.random.default_rng(seed))
        found = _resampled_strengths(totals.reshape(-1, m, m), met, zero)
        tail = tail_of(codes)
        low, high = np.quantile(found, (tail, 1 - tail), axis=0)
    else:
        parted = [[name for name, g in zip(names, groups) if g == of] for of in set(groups)]
        if len(parted) > 1:
            warnings.warn(
                f"Between some of these groups of models one side won all games: {parted}. Their "
                "strengths are drawn together by a made-up tie of each pair, with wide intervals.",
                stacklevel=2,
            )
        counted = wins + met / 2
        points = _log_strengths(counted, zero)
        information = _information(counted, points, zero) / (wins.sum() / (met.sum() / 2) / k)
        half = np.zeros(m)
        half[others] = Z * np.sqrt(np.diag(np.linalg.inv(information)))
        low, high = points - half, points + half
    if len(set(of_run[of_run >= 0])) > 1:
        expected = 1 / (1 + np.exp(points[second] - points[first]))
        away = (np.eye(m)[first] - np.eye(m)[second]) * (weight * (outcome - expected))[:, None]
        moves = away[:, others] @ np.linalg.inv(_information(counted, points, zero))
        for i, of in zip(np.flatnonzero(others), moves.T):
            low[i], high[i] = widened(points[i], low[i], high[i], of, codes, of_run)
    played = np.bincount(first, minlength=m) + np.bincount(second, minlength=m)

    def strength(i: int) -> Strength:
        if single:
            elo, expected = 1000 + ELO * points[i], 1 / (1 + math.exp(-points[i]))
            return Strength(*(without_interval(x, int(played[i])) for x in (elo, expected)))
        of = [float(x[i]) for x in (points, low, high)]
        elo = Interval(*(1000 + ELO * x for x in of), n=int(played[i]))
        return Strength(elo, Interval(*(1 / (1 + math.exp(-x)) for x in of), n=int(played[i])))

    return {names[i]: strength(i) for i in np.argsort(-points, kind="stable")}


def _groups(wins: np.ndarray) -> np.ndarray:
    """[m] the group of each model: within a group, wins lead from each model to each other one.

    One group: the likelihood has a finite maximum (Ford, 1957, American Mathematical Monthly 64).
    """
    from scipy.sparse.csgraph import connected_components

    return connected_components(wins > 0, directed=True, connection="strong")[1]


def _resampled_strengths(totals: np.ndarray, met: np.ndarray, zero: int) -> np.ndarray:
    """[r, m] log-strengths of each of r resamples; where no finite ones fit, with made-up ties."""
    others = np.arange(len(met)) != zero
    if met[np.ix_(others, others)].any():
        return np.array(
            [_log_strengths(of if _groups(of).max() == 0 else of + met / 2, zero) for of in totals]
        )
    # All met the model `zero` only: the odds are the games won by the games lost.
    won, lost = totals[:, others, zero], totals[:, zero, others]
    tie = np.where(((won > 0) & (lost > 0)).all(1), 0.0, 0.5)[:, None]
    logs = np.zeros(totals.shape[:2])
    logs[:, others] = np.log((won + tie) / (lost + tie))
    return logs


def _log_strengths(wins: np.ndarray, zero: int) -> np.ndarray:
    """[m] maximum likelihood, with 0 for the model `zero`; wins [m, m] of one group."""
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


def _information(wins: np.ndarray, points: np.ndarray, zero: int) -> np.ndarray:
    """[m - 1, m - 1] what the games tell of the log-strengths of all models but `zero`."""
    p = 1 / (1 + np.exp(points[None, :] - points[:, None]))
    between = (wins + wins.T) * p * p.T
    others = np.arange(len(points)) != zero
    return (np.diag(between.sum(1)) - between)[np.ix_(others, others)]
