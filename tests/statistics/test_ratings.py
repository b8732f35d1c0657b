"""Agreement of raters and strength of models, with intervals."""

import math

import numpy as np
import pytest
from scipy import optimize, special
from statsmodels.stats.inter_rater import cohens_kappa

from sao_utils.statistics import ratings
from sao_utils.statistics.intervals import win_rate
from sao_utils.statistics.ratings import bradley_terry, kappa


def within(interval):
    return interval.low <= interval.value <= interval.high


# ---------------------------------------------------------------------- kappa


def test_kappa_by_hand():
    # The textbook's table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (0.7 - 0.5) / (1 - 0.5).
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = kappa(a, b)
    assert found.value == pytest.approx(0.4, abs=1e-12) and found.n == 50 and within(found)


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


def test_the_kappa_interval_covers_the_truth():
    # Labels are uniform, so chance agreement is 1/3 and kappa is `agree`.
    rng = np.random.default_rng(2)
    found = [kappa(*raters(rng, 200), resamples=600, seed=i) for i in range(400)]
    assert 0.92 <= np.mean([i.low <= 0.6 <= i.high for i in found]) <= 0.98


def test_kappa_counts_clusters_not_items():
    a, b = raters(np.random.default_rng(3), 100)
    one = kappa(a, b)
    nine = kappa(np.repeat(a, 9), np.repeat(b, 9), np.repeat(np.arange(100), 9))
    assert nine.value == pytest.approx(one.value, abs=1e-12)
    assert nine.high - nine.low == pytest.approx(one.high - one.low, rel=0.03)


def test_raters_who_always_agree_are_not_certain_to():
    found = kappa([1, 2] * 20, [1, 2] * 20)
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx((win_rate([1] * 40).rate.low - 0.5) / 0.5)
    few = kappa([1, 2] * 20, [1, 2] * 20, np.arange(40) // 10)
    assert few.low == pytest.approx((win_rate([1] * 4).rate.low - 0.5) / 0.5)


def test_two_judges_that_always_say_1_have_no_kappa():
    found = kappa([1] * 30, [1] * 30)
    assert math.isnan(found.value) and (found.low, found.high, found.n) == (-1.0, 1.0, 30)
    # One judge that always says 1 agrees by chance alone, whatever the other says.
    for n, width in ((30, 0.3), (4, 0.8)):
        one = kappa([1] * n, [1, 2] * (n // 2))
        assert one.value == 0.0 and -1 <= one.low < -width and width < one.high <= 1


def test_raters_who_never_agree():
    found = kappa([1, 2] * 30, [2, 1] * 30)
    assert found.value == -1.0 and within(found)
    # Both orders of a prompt cancel: every cluster is alike, and no resample shows a chance.
    found = kappa([1, 2] * 30, [2, 1] * 30, np.arange(60) // 2)
    assert found.low == found.value == -1.0 and found.high > -0.9


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1], r"a \(2\) as of b \(1\)"),
        ([1, None], [1, 2], "1 of 4 labels are missing"),
        ([1, 2], [math.nan, 2], "1 of 4 labels are missing"),
    ],
)
def test_labels_that_kappa_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        kappa(a, b)


# ---------------------------------------------------------------------- Bradley and Terry


def tournament(rng, strengths, prompts, ties=0.2, weights=(1, 3)):
    """Two games of each pair on each prompt; half of the second ones end like the first."""
    names = list(strengths)
    games = []
    for prompt in range(prompts):
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                chance = special.expit(strengths[a] - strengths[b])
                luck = rng.random()
                for order in range(2):
                    if order and rng.random() < 0.5:
                        luck = rng.random()
                    half = ties * min(chance, 1 - chance)
                    outcome = 0.5 * (luck < chance - half) + 0.5 * (luck < chance + half)
                    weight = rng.choice(weights)
                    if order:
                        games.append((b, a, 1 - outcome, weight, prompt))
                    else:
                        games.append((a, b, outcome, weight, prompt))
    return games


def test_two_models_by_hand():
    # 30 wins of 40 are odds of 3 to 1: 400 log10(3) = 190.85 points.
    games = [("new", "old", i < 30, 1, i) for i in range(40)]
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
    games = tournament(rng, names, prompts=40)

    def loss(theta):
        of = dict(zip(names, theta))
        return sum(
            w * (np.logaddexp(0, of[b] - of[a]) + (1 - y) * (of[a] - of[b]))
            for a, b, y, w, _ in games
        )

    theirs = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    found = bradley_terry(games, "c", resamples=2)
    for name, theta in zip(names, theirs):
        expected = 1000 + 400 * (theta - theirs[2]) / math.log(10)
        assert found[name].elo.value == pytest.approx(expected, abs=0.01)
        assert found[name].win_rate.value == pytest.approx(
            special.expit(theta - theirs[2]), abs=1e-4
        )


def test_a_weight_of_three_is_three_games_and_sides_do_not_matter():
    rng = np.random.default_rng(5)
    games = tournament(rng, {"a": 0.0, "b": 0.5, "c": 1.0}, prompts=50)
    tripled = [(a, b, y, 1, q) for a, b, y, w, q in games for _ in range(w)]
    swapped = [(b, a, 1 - y, w, q) for a, b, y, w, q in games]
    found = bradley_terry(games, "a", resamples=100)
    for other in (bradley_terry(tripled, "a", 100), bradley_terry(swapped, "a", 100)):
        for name in "abc":
            x, y = found[name].elo, other[name].elo
            assert (x.low, x.value, x.high) == pytest.approx((y.low, y.value, y.high), abs=1e-3)


def test_the_interval_of_a_strength_covers_the_truth():
    rng = np.random.default_rng(6)
    strengths = {"base": 0.0, "one": 0.6, "two": 1.2}
    covered = []
    for i in range(60):
        found = bradley_terry(tournament(rng, strengths, 40), "base", resamples=100, seed=i)
        for name in ("one", "two"):
            truth = special.expit(strengths[name])
            rate = found[name].win_rate
            covered.append(rate.low <= truth <= rate.high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_games_with_the_baseline_only_need_no_iteration():
    """The closed form of a resample is what the iteration finds, also where a tie is made up."""
    rng = np.random.default_rng(8)
    totals = np.zeros((6, 4, 4))
    totals[:, 1:, 0], totals[:, 0, 1:] = rng.integers(1, 30, (2, 6, 3))
    totals[5, 2, 0] = 0.0  # never won in this resample
    met = (totals[0] + totals[0].T > 0).astype(float)
    found = ratings._resampled_strengths(totals, met, 0)
    for of, logs in zip(totals, found):
        of = of + met / 2 if (of[1:, 0] == 0).any() else of
        assert logs == pytest.approx(ratings._log_strengths(of, 0), abs=1e-6)


def test_trainings_that_differ_widen_a_strength_and_equal_ones_do_not():
    def league(chances):
        """Three trainings of "new", each with a share of won games, beside an old model."""
        rows = [
            ("new", "base", float(k % 10 < 10 * chance), 1, k)
            for chance in chances
            for k in range(100)
        ]
        rows += [("old", "base", float(k % 10 < 3), 1, k) for k in range(100)]
        return rows, [0] * 100 + [1] * 100 + [2] * 100 + [None] * 100

    def width(strength):
        return strength.elo.high - strength.elo.low

    for chances, least, most in (((0.6, 0.6, 0.6), 0.99, 1.01), ((0.4, 0.6, 0.8), 2, 9)):
        games, runs = league(chances)
        one, three = bradley_terry(games, "base"), bradley_terry(games, "base", runs=runs)
        assert least <= width(three["new"]) / width(one["new"]) <= most
        assert three["new"].elo.value == one["new"].elo.value
        assert three["old"] == one["old"]  # nobody trained it
        assert width(three["base"]) == 0


def test_games_repeated_within_prompts_add_no_certainty():
    games = tournament(np.random.default_rng(7), {"a": 0.0, "b": 0.5}, prompts=100)
    one = bradley_terry(games, "a")["b"].elo
    nine = bradley_terry(games * 9, "a")["b"].elo
    assert (nine.low, nine.high) == pytest.approx((one.low, one.high), abs=1e-3)


def test_a_model_that_wins_all_gets_a_wide_finite_interval_and_a_warning():
    games = [("best", "base", 1, 1, i) for i in range(50)]
    games += [("weak", "base", i % 4 == 0, 1, i) for i in range(50)]
    with pytest.warns(UserWarning, match=r"\['best'\]"):
        found = bradley_terry(games, "base")
    assert list(found) == ["best", "base", "weak"]
    best = found["best"].win_rate
    # 50.5 of 51 won: log-odds of log(101), with an error of sqrt(1 / (51 p q)).
    p = 50.5 / 51
    error = 1.959964 * math.sqrt(1 / (51 * p * (1 - p)))
    assert best.value == pytest.approx(p, abs=1e-6)
    assert best.low == pytest.approx(special.expit(math.log(101) - error), abs=1e-4)
    assert best.low < 0.95 and best.high < 1
    with pytest.warns(UserWarning, match="one side won all"):
        one = bradley_terry([("a", "b", 1, 1, "x")], "b")["a"].win_rate
    assert one.low < 0.2 and within(one)


def test_resamples_in_which_a_model_wins_all_stay_finite():
    games = [("new", "old", i > 0, 1, i) for i in range(30)]  # one loss of 30: often not drawn
    elo = bradley_terry(games, "old")["new"].elo
    assert within(elo) and math.isfinite(elo.high)


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([], "no games"),
        ([("a", "b", 1, 1, 0)], "baseline 'base' has no games"),
        ([("base", "base", 1, 1, 0)], "plays against itself"),
        ([("base", "b", None, 1, 0)], "outcomes must"),
        ([("base", "b", 2, 1, 0)], "outcomes must"),
        ([("base", "b", 1, 0, 0)], "weights must"),
        ([("base", "b", 1, 1, 0), ("c", "d", 1, 1, 1)], r"no chain .* \['c', 'd'\]"),
    ],
)
def test_games_that_give_no_strengths(games, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(games, "base")


def test_one_game_that_was_a_tie_is_a_half_and_says_next_to_nothing():
    found = bradley_terry([("a", "b", 0.5, 1, "p")], "b")["a"].win_rate
    assert found.value == 0.5 and found.low < 0.2 and found.high > 0.8 and found.n == 1
