"""Agreement of raters and strength of models, with intervals."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, special
from statsmodels.stats.inter_rater import cohens_kappa

from sao_utils.statistics.ratings import bradley_terry, kappa


def within(interval):
    return interval.low <= interval.value <= interval.high


# ---------------------------------------------------------------------- kappa


def raters(rng, n, agree=0.6, labels=3):
    """Two raters who share a label with chance `agree` and draw one each otherwise."""
    a, b = rng.integers(labels, size=(2, n))
    return a, np.where(rng.random(n) < agree, a, b)


def test_kappa_against_statsmodels():
    a, b = raters(np.random.default_rng(1), 500)
    table = np.zeros((3, 3))
    np.add.at(table, (a, b), 1)
    theirs = cohens_kappa(table)
    found = kappa(a.tolist(), b.tolist())
    assert found.value == pytest.approx(theirs.kappa, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=0.01)


def test_kappa_counts_clusters_not_items():
    a, b = raters(np.random.default_rng(3), 100)
    one = kappa(a, b)
    nine = kappa(np.repeat(a, 9), np.repeat(b, 9), np.repeat(np.arange(100), 9))
    assert nine.value == pytest.approx(one.value, abs=1e-12)
    assert nine.high - nine.low == pytest.approx(one.high - one.low, rel=0.03)


# ---------------------------------------------------------------------- Bradley and Terry


def test_two_models_by_hand():
    # 30 wins of 40 are odds of 3 to 1: 400 log10(3) = 190.85 points.
    games = [("new", "old", i < 30, i) for i in range(40)]
    found = bradley_terry(games, "old")
    assert list(found) == ["new", "old"]
    assert found["new"].elo.value == pytest.approx(1190.8485, abs=1e-3)
    assert found["new"].win_rate.value == pytest.approx(0.75, abs=1e-9)
    assert (found["old"].elo.low, found["old"].elo.high) == (1000.0, 1000.0)
    # For two models the bootstrap is that of the share of wins.
    assert found["new"].win_rate.low == pytest.approx(0.6, abs=0.03)
    assert found["new"].win_rate.high == pytest.approx(0.875, abs=0.03)
    assert found["new"].elo.n == found["old"].elo.n == 40


def test_strengths_against_a_fit_by_scipy():
    rng = np.random.default_rng(4)
    names = {"a": 0.0, "b": 0.5, "c": -0.3, "d": 1.0}
    games = []
    for prompt in range(40):
        for a, b in itertools.permutations(names, 2):
            chance = special.expit(names[a] - names[b])
            outcome = rng.choice([rng.random() < chance, 0.5], p=[0.8, 0.2])
            games.append((a, b, outcome, prompt))

    def loss(theta):
        of = dict(zip(names, theta))
        return sum(
            np.logaddexp(0, of[b] - of[a]) + (1 - y) * (of[a] - of[b]) for a, b, y, _ in games
        )

    theirs = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    found = bradley_terry(games, "c", resamples=2)
    for name, theta in zip(names, theirs):
        expected = 1000 + 400 * (theta - theirs[2]) / math.log(10)
        assert found[name].elo.value == pytest.approx(expected, abs=0.01)
        assert found[name].win_rate.value == pytest.approx(
            special.expit(theta - theirs[2]), abs=1e-4
        )


def test_trainings_that_differ_widen_a_strength_and_equal_ones_do_not():
    def tournament(chances):
        """Three trainings of "new", each with a share of won games, beside an old model."""
        rows = [
            ("new", "base", float(k % 10 < 10 * chance), k)
            for chance in chances
            for k in range(100)
        ]
        rows += [("old", "base", float(k % 10 < 3), k) for k in range(100)]
        return rows, [0] * 100 + [1] * 100 + [2] * 100 + [None] * 100

    def width(strength):
        return strength.elo.high - strength.elo.low

    for chances, least, most in (((0.6, 0.6, 0.6), 0.99, 1.01), ((0.4, 0.6, 0.8), 2, 9)):
        games, runs = tournament(chances)
        one, three = bradley_terry(games, "base"), bradley_terry(games, "base", runs=runs)
        assert least <= width(three["new"]) / width(one["new"]) <= most
        assert three["new"].elo.value == one["new"].elo.value
        assert three["old"] == one["old"]  # nobody trained it
        assert width(three["base"]) == 0


def test_resamples_in_which_a_model_wins_all_stay_finite():
    games = [("new", "old", i > 0, i) for i in range(30)]  # one loss of 30: often not drawn
    elo = bradley_terry(games, "old")["new"].elo
    assert within(elo) and math.isfinite(elo.high)


def test_games_that_give_no_strengths():
    with pytest.raises(ValueError, match="baseline 'base' has no games"):
        bradley_terry([("a", "b", 1, 0)], "base")
    with pytest.raises(ValueError, match="outcomes must"):
        bradley_terry([("base", "b", None, 0)], "base")
