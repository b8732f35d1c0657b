"""Means, shares and differences, with intervals that know about clusters."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats
from statsmodels import api as sm

from sao_utils.statistics.errors import two_way_error
from sao_utils.statistics.intervals import (
    Interval,
    clustered_difference,
    clustered_mean,
    wilson,
    win_rate,
)
from sao_utils.statistics.length_control import length_controlled_win_rate
from sao_utils.statistics.ratings import bradley_terry


def within(interval):
    return interval.low <= interval.value <= interval.high


# ---------------------------------------------------------------------- means


def test_two_clusters_resample_to_three_means_with_known_chances():
    # aa (1/4): 2, ab (1/2): (2 * 3 + 8) / 4 = 3.5, bb (1/4): 8. So the 2.5 % and 97.5 % quantiles
    # are the extremes, and a resample is a ratio of sums (not the mean of 2 and 8, which is 5).
    found = clustered_mean([1.0, 2.0, 3.0, 8.0], ["a", "a", "a", "b"])
    assert (found.low, found.value, found.high) == (2.0, 3.5, 8.0)


def test_the_quantiles_are_those_of_all_resamples():
    sizes, levels = [1, 1, 2, 9, 12], [9.0, 4.0, 6.0, 1.0, 2.0]
    clusters = np.repeat(np.arange(5), sizes)
    found = clustered_mean(np.repeat(levels, sizes), clusters, resamples=100_000)
    drawn = np.array(list(itertools.product(range(5), repeat=5)))
    sums, counts = np.multiply(levels, sizes), np.array(sizes)
    # Student's 97.5 % quantile for 4 degrees of freedom is 2.776, and a bootstrap over 5 clusters
    # understates the variance by 4/5.
    tail = stats.norm.cdf(-2.7764451 * math.sqrt(5 / 4))
    exact = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (tail, 1 - tail))
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.02)


def test_the_order_of_the_rows_does_not_matter():
    rng = np.random.default_rng(5)
    values, clusters = rng.random(200), rng.integers(30, size=200)
    first = clustered_mean(values, clusters)
    assert first == clustered_mean(values.tolist(), clusters.tolist())
    shuffled = rng.permutation(200)
    assert first == clustered_mean(values[shuffled], clusters[shuffled])


@pytest.mark.parametrize(
    ("estimate", "message"),
    [
        (lambda: clustered_mean([1.0, None], "ab"), "1 of 2 values are missing"),
        (lambda: clustered_mean([1.0, 2.0], "a"), "2 values, but 1 clusters"),
        (lambda: clustered_difference([1, 2, 3], [1, 2], "abc"), r"a \(3\) as of b \(2\)"),
        (lambda: win_rate([1, 2]), "outcomes must be"),
        (lambda: win_rate([1, 0], "a"), "2 outcomes, but 1 clusters"),
    ],
)
def test_what_is_wrong_with_the_values_is_said(estimate, message):
    with pytest.raises(ValueError, match=message):
        estimate()


# ---------------------------------------------------------------------- differences


def test_a_difference_of_booleans_by_hand():
    found = clustered_difference([True, True, False], [False, True, True], ["a", "a", "b"])
    # Clusters: a (sum 1 of 2), b (sum -1 of 1); resamples 1/2, 0 and -1.
    assert found == Interval(0.0, -1.0, 0.5, 3)


def test_a_difference_that_all_clusters_share_is_no_certainty():
    for n in (4, 400):
        t2 = stats.t.ppf(0.975, n - 1) ** 2
        share = t2 / (n + t2)  # of clusters that may be different: none of n was
        found = clustered_difference([True] * n, [False] * n, range(n))
        assert (found.low, found.high) == (pytest.approx(1 - 2 * share), 1)
        found = clustered_difference([1.0] * n, [1.0] * n, range(n), bca=True)
        assert (found.low, found.high) == pytest.approx((-share, share))


# ---------------------------------------------------------------------- shares


def test_booleans_are_a_share_with_the_interval_of_a_win_rate():
    rng = np.random.default_rng(34)
    values, names, runs = rng.random(90) < 0.97, rng.integers(30, size=90), np.arange(90) // 30
    assert clustered_mean(values, names) == win_rate(values, names)
    assert clustered_mean(values, names, runs=runs) == win_rate(values, names, runs)


@pytest.mark.parametrize("n", [1, 17, 10**7])
def test_wilson_against_scipy(n):
    for successes in {0, 1, n // 3, n - 1, n}:
        found = wilson(successes, n)
        scipys = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
        assert 0 <= found.low and found.high <= 1 and within(found)


# ---------------------------------------------------------------------- win rates


def test_the_bounds_of_a_win_rate_solve_their_equation():
    rng = np.random.default_rng(22)
    wins = rng.choice([0, 0.5, 1], 300, p=[0.1, 0.2, 0.7])
    names = np.arange(300) // 6
    found = win_rate(wins, names)
    sums = np.array([(wins - wins.mean())[names == k].sum() for k in range(50)])
    m = found.value * (1 - found.value) / ((sums**2).sum() * 50 / 49 / 300**2)
    t = stats.t.ppf(0.975, 49)
    for p in (found.low, found.high):
        assert (found.value - p) ** 2 == pytest.approx(t**2 * p * (1 - p) / m, abs=1e-12)


def test_a_win_rate_counts_ties_half_and_leaves_out_what_is_invalid():
    found = win_rate([1, 0.5, 0, 1, None, float("nan"), 0.8])
    assert found.value == pytest.approx(3.3 / 5) and found.n == 5
    assert found == win_rate([1, 0.5, 0, 1, 0.8])


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_a_model_that_wins_all_may_still_lose(outcome):
    found = win_rate([outcome] * 100, np.arange(100) // 4)
    t2 = stats.t.ppf(0.975, 24) ** 2  # 25 clusters, each one trial
    expected = {0.0: (0, t2 / (25 + t2)), 1.0: (25 / (25 + t2), 1)}
    assert found.value == outcome and within(found)
    if outcome != 0.5:
        assert (found.low, found.high) == pytest.approx(expected[outcome], abs=1e-12)


# ---------------------------------------------------------------------- coverage


def comparisons(rng, size, intercepts, slope=1.2, longer=0.6, ties=0.3):
    """Simulated evaluations on the same prompts, one of [n] outcomes for each intercept.

    The chance to win (a tie counting half) is sigmoid(intercept + slope tanh(d)), so answers that
    are `longer` win more often than they should. Prompts come in clusters of `size` that are
    alike (a normal copula: the chance is what it was, but neighbours share their luck).
    """
    n = int(rng.integers(200 // size, 800 // size + 1)) * size
    names = np.arange(n) // size
    shared = rng.normal(size=n // size)[names] if size > 1 else 0.0
    luck = special.ndtr(
        math.sqrt(0.3) * shared + math.sqrt(0.7 if size > 1 else 1) * rng.normal(size=n)
    )
    d = rng.normal(longer, 1, n)
    chance = special.expit(np.array(intercepts)[:, None] + slope * np.tanh(d))
    half = ties * np.minimum(chance, 1 - chance)
    outcomes = ((luck < chance - half).astype(float) + (luck < chance + half)) / 2
    return outcomes, 100 * d, names


def true_rate(intercept, slope=1.2, longer=0.6):
    """The raw win rate of `comparisons`, by Gauss and Hermite."""
    at, weights = np.polynomial.hermite_e.hermegauss(80)
    values = special.expit(intercept + slope * np.tanh(at + longer))
    return weights @ values / weights.sum()


@pytest.mark.parametrize("size", [1, 4])
def test_95_of_100_intervals_hold_the_truth_over_1000_evaluations(size):
    rng = np.random.default_rng(24 + size)
    strong, weak = 0.4, 0.1  # the two models' log-odds to beat the baseline at equal length
    raw, at_equal_length = true_rate(strong), special.expit(strong)
    difference = raw - true_rate(weak)
    assert raw - at_equal_length > 0.05  # length matters: the two must not be mixed up
    covered = []
    for _ in range(1000):
        (a, b), longer, names = comparisons(rng, size, (strong, weak))
        found = (
            (win_rate(a, names), raw),
            (length_controlled_win_rate(a, longer, names), at_equal_length),
            (clustered_difference(a, b, names, resamples=600), difference),
        )
        covered.append([interval.low <= truth <= interval.high for interval, truth in found])
    shares = np.mean(covered, axis=0)
    assert ((shares >= 0.93) & (shares <= 0.97)).all(), shares


@pytest.mark.parametrize(("share", "n"), [(0.5, 200), (0.9, 200), (0.97, 805), (0.03, 300)])
def test_the_interval_of_a_win_rate_holds_at_the_ends_too(share, n):
    # Exactly: every number of wins that can occur, with its probability.
    wins = np.arange(n + 1)
    chance = stats.binom.pmf(wins, n, share)
    likely = wins[chance > 1e-7]
    held = [win_rate(np.arange(n) < k) for k in likely]
    covered = sum(chance[k] for k, i in zip(likely, held) if i.low <= share <= i.high)
    assert 0.93 <= covered <= 0.97


def test_few_clusters_get_students_width():
    rng = np.random.default_rng(26)
    covered = []
    for _ in range(1000):
        values = rng.normal(size=8)
        found = clustered_mean(values, range(8), resamples=2000)
        covered.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97  # plain percentiles: about 0.88


# ---------------------------------------------------------------------- BCa


def test_bca_follows_a_skewed_mean_and_respects_clusters():
    values = np.random.default_rng(28).exponential(size=60) ** 2
    plain = clustered_mean(values, range(60))
    bca = clustered_mean(values, range(60), bca=True)
    assert bca.low > plain.low and bca.high > plain.high  # shifted to the long side
    repeated = clustered_mean(np.repeat(values, 3), np.repeat(np.arange(60), 3), bca=True)
    assert (repeated.low, repeated.high) == pytest.approx((bca.low, bca.high), abs=1e-9)


# ---------------------------------------------------------------------- several trainings


def test_the_error_over_clusters_and_trainings_is_that_of_statsmodels():
    rng = np.random.default_rng(6)
    runs, clusters = np.repeat(np.arange(3), 80), np.tile(np.arange(40), 6)
    values = rng.normal(size=240) + np.array([0.0, 0.5, 1.0])[runs] + rng.normal(size=40)[clusters]
    groups = np.column_stack([clusters, runs])
    theirs = sm.OLS(values, np.ones(240)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    error, freedom = two_way_error((values - values.mean()) / 240, clusters, runs)
    assert error == pytest.approx(theirs.bse[0], rel=1e-9)
    assert 2 < freedom < 39  # between those of three trainings and of 40 clusters
    alone, of_clusters = two_way_error((values - values.mean()) / 240, clusters, 0 * runs)
    assert of_clusters == 39 and alone < error
    untrained = np.where(runs == 0, -1, runs)  # two of three parts come of trainings
    assert two_way_error((values - values.mean()) / 240, clusters, untrained)[0] < error


def trained(rng, scatter, prompts, theta=0.4, trainings=3):
    """Games of a method's trainings, each with an own strength, on the same 100 prompts."""
    names, runs = np.tile(np.arange(100), trainings), np.repeat(np.arange(trainings), 100)
    chance = special.expit(
        theta + rng.normal(0, scatter, trainings)[runs] + rng.normal(0, prompts, 100)[names]
    )
    return (rng.random(len(runs)) < chance).astype(float), names, runs.tolist()


@pytest.mark.parametrize(("scatter", "prompts"), [(0.1, 1.5), (0.4, 0.5)])
def test_95_of_100_intervals_of_three_trainings_hold_the_truth_over_1000_evaluations(
    scatter, prompts
):
    """The truth is that of all trainings: without `runs` an interval speaks of these three."""
    rng, covered = np.random.default_rng(30), []
    at, weights = np.polynomial.hermite_e.hermegauss(60)
    truth = weights @ special.expit(0.4 + math.hypot(scatter, prompts) * at) / weights.sum()
    for _ in range(1000):
        wins, names, runs = trained(rng, scatter, prompts)
        games = [("new", "base", won, name) for won, name in zip(wins, names)]
        found = (
            win_rate(wins, names, runs),
            clustered_mean(wins, names, 300, runs),
            bradley_terry(games, "base", 200, runs)["new"].win_rate,
            win_rate(wins, names),
        )
        covered.append([interval.low <= truth <= interval.high for interval in found])
    *shares, without = np.mean(covered, axis=0)
    assert all(0.93 <= share <= 0.97 for share in shares), shares
    assert without < min(shares) - 0.02
