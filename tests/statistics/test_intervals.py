"""Means, shares and differences, with intervals that know about clusters."""

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from statsmodels import api as sm
from statsmodels.stats.proportion import proportion_confint

from sao_utils.statistics.errors import two_way_error
from sao_utils.statistics.intervals import (
    Interval,
    clustered_difference,
    clustered_mean,
    from_preferences,
    wilson,
    win_rate,
)
from sao_utils.statistics.length_control import length_controlled_win_rate
from sao_utils.statistics.power import (
    design_effect,
    outside_the_noise,
    prompts_needed,
    smallest_difference,
)
from sao_utils.statistics.ratings import bradley_terry


def within(interval):
    return interval.low <= interval.value <= interval.high


# ---------------------------------------------------------------------- means


def test_the_mean_is_the_mean_over_values_not_over_clusters():
    found = clustered_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert found.value == 0.75 and found.n == 4


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


def test_with_single_values_as_clusters_it_agrees_with_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=150)
    ours = clustered_mean(values, range(150))
    scipys = stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    width = ours.high - ours.low
    assert ours.low == pytest.approx(scipys.low, abs=0.03 * width)
    assert ours.high == pytest.approx(scipys.high, abs=0.03 * width)


def test_whole_clusters_are_resampled():
    rng = np.random.default_rng(2)
    values = np.repeat(rng.random(40), 25)  # 1,000 values, but only 40 that are independent
    clustered = clustered_mean(values, np.repeat(np.arange(40), 25))
    single = clustered_mean(values, range(1000))
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(5, 0.1)


def simulate(rng, clusters=40):
    """Clusters of 1 to 5 values that share a level; the mean over values is 0.5."""
    sizes = rng.integers(1, 6, clusters)
    names = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(names)) < rng.beta(1, 1, clusters)[names]), names


def test_the_interval_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(3)
    found = [clustered_mean(*simulate(rng), resamples=1000, seed=i) for i in range(300)]
    covered = np.mean([i.low <= 0.5 <= i.high for i in found])
    assert 0.90 <= covered <= 0.99


def test_10_000_resamples_of_220_clusters_take_well_under_a_second():
    values = np.random.default_rng(4).random(2640) < 0.5
    clusters = [["hobby", [str(i // 12)]] for i in range(2640)]
    clustered_mean(values, clusters)
    started = time.process_time()
    clustered_mean(values, clusters)
    assert time.process_time() - started < 1


def test_seed_and_order_of_the_rows():
    rng = np.random.default_rng(5)
    values, clusters = rng.random(200), rng.integers(30, size=200)
    first = clustered_mean(values, clusters, seed=1)
    assert first == clustered_mean(values.tolist(), clusters.tolist(), seed=1)
    assert first != clustered_mean(values, clusters, seed=2)
    shuffled = rng.permutation(200)
    assert first == clustered_mean(values[shuffled], clusters[shuffled], seed=1)


def test_the_names_of_clusters_do_not_matter_and_json_lists_will_do():
    values = [0.0, 1.0, 1.0, 0.0, 0.5]
    tuples = [("chess", ("risk", "tool")), ("chess", ("risk", "time")), ("yoga", ("risk", "tool"))]
    names = [tuples[i] for i in (0, 0, 1, 2, 2)]
    lists = [[hobby, list(aspects)] for hobby, aspects in names]
    assert clustered_mean(values, names) == clustered_mean(values, lists)


def test_many_clusters_do_not_fill_the_memory():
    values = np.random.default_rng(6).normal(size=100_000)
    tracemalloc.start()
    found = clustered_mean(values, np.arange(100_000), resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # all at once, the draws alone would take 160 MB
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100_000**-0.5, rel=0.2)


def test_clusters_that_are_all_alike_are_no_certainty():
    unknown = (math.nan, math.nan)
    assert clustered_mean([0.1] * 7, "aabbccd") == Interval(0.1, *unknown, 7)
    assert clustered_mean([3.0, 5.0] * 4, "aabbccdd") == Interval(4.0, *unknown, 8)
    t2 = stats.t.ppf(0.975, 2) ** 2
    share = t2 / (3 + t2)  # of clusters that may be different: none of three was
    found = clustered_mean([7.0] * 6, "aabbcc", bounds=(1, 10))
    assert (found.low, found.high) == pytest.approx((7 - 6 * share, 7 + 3 * share))
    found = clustered_mean([10.0] * 6, "aabbcc", bounds=(1, 10))
    assert (found.low, found.high) == (pytest.approx(10 - 9 * share), 10)
    for won in (True, False):
        assert clustered_mean([won] * 6, "aabbcc") == win_rate([won] * 6, "aabbcc").rate
        found = clustered_mean([float(won)] * 6, "aabbcc", bounds=(0, 1))
        expected = win_rate([won] * 6, "aabbcc").rate
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_difference_that_all_clusters_share_is_no_certainty_either():
    for n in (4, 400):
        t2 = stats.t.ppf(0.975, n - 1) ** 2
        share = t2 / (n + t2)
        found = clustered_difference([True] * n, [False] * n, range(n), bounds=(0, 1))
        assert (found.low, found.high) == (pytest.approx(1 - 2 * share), 1)
        found = clustered_difference([1.0] * n, [1.0] * n, range(n), bounds=(0, 1))
        assert (found.low, found.high) == pytest.approx((-share, share))
    one = clustered_difference([True], [True], ["a"], bounds=(0, 1), method="BCa")
    assert one == Interval(0.0, -1.0, 1.0, 1)
    # Each training has its own, the same for all questions: the trainings' variance is added.
    runs, gone = np.repeat([0, 1, 2], 400), np.repeat([0.4, 0.5, 0.6], 400)
    clusters = np.tile(np.arange(400), 3)
    found = clustered_difference(gone, 0 * gone, clusters, runs=runs, bounds=(0, 1))
    assert found.low < 0.4 and found.high > 0.6


def test_shares_near_their_ends_have_score_intervals_and_more_failures_a_wider_one():
    clusters = np.arange(880) // 4
    ends = []
    for failed in (1, 2, 4, 8):  # each in a cluster of its own
        found = clustered_mean([i % 100 == 0 and i < 100 * failed for i in range(880)], clusters)
        ends.append(found.high)
        assert 0 < found.low < found.value < found.high
    assert ends == sorted(ends) and ends[0] > 0.005  # percentiles: 0.003 for 1 of 880
    rng, covered = np.random.default_rng(34), []
    for _ in range(1000):
        values, names = rng.random(116) < 0.97, rng.integers(60, size=116)
        interval = clustered_mean(values, names)
        assert interval == win_rate(values, names).rate
        covered.append(interval.low <= 0.97 <= interval.high)
    assert 0.93 <= np.mean(covered) <= 0.97  # percentiles: 0.906


def test_one_value():
    assert clustered_mean([3.0], ["a"]) == Interval(3.0, math.nan, math.nan, 1)
    assert clustered_mean([3.0], ["a"], bounds=(1, 10)) == Interval(3.0, 1.0, 10.0, 1)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([1.0, None], ["a", "b"], "1 of 2 values are missing"),
        ([1.0, math.inf], ["a", "b"], "1 of 2 values"),
        ([1.0, 2.0], ["a"], "2 values, but 1 clusters"),
        ([[1.0], [2.0]], ["a", "b"], "flat list"),
    ],
)
def test_what_is_missing_is_said(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        clustered_mean(values, clusters)


def test_no_resamples():
    with pytest.raises(ValueError, match="resamples is 0"):
        clustered_mean([1.0, 2.0], ["a", "b"], resamples=0)


# ---------------------------------------------------------------------- differences


def test_a_difference_is_paired():
    rng = np.random.default_rng(6)
    base = rng.random(300)
    clusters = np.arange(300) // 3
    found = clustered_difference(base + rng.uniform(0.249, 0.251, 300), base, clusters)
    assert found.value == pytest.approx(0.25, abs=1e-3)
    assert found.high - found.low < 1e-3  # unpaired, it would be as wide as the values vary
    assert within(clustered_difference(base > 0.3, base > 0.6, clusters))


def test_a_difference_of_booleans_by_hand():
    found = clustered_difference([True, True, False], [False, True, True], ["a", "a", "b"])
    # Clusters: a (sum 1 of 2), b (sum -1 of 1); resamples 1/2, 0 and -1.
    assert found == Interval(0.0, -1.0, 0.5, 3)


def test_a_difference_covers_the_truth():
    rng = np.random.default_rng(7)
    covered = []
    for i in range(300):
        level = np.repeat(rng.random(40), 3)
        a, b = rng.random(120) < 0.2 + 0.8 * level, rng.random(120) < level
        found = clustered_difference(a, b, np.repeat(np.arange(40), 3), resamples=1000, seed=i)
        covered.append(found.low <= 0.1 <= found.high)  # E = 0.2 - 0.2 * 0.5
    assert 0.90 <= np.mean(covered) <= 0.99


def test_differences_need_pairs():
    with pytest.raises(ValueError, match=r"a \(3\) as of b \(2\)"):
        clustered_difference([1, 2, 3], [1, 2], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"a \(1\) as of b \(0\)"):
        clustered_difference([1], [], ["a"])


# ---------------------------------------------------------------------- shares


def test_wilson_by_hand():
    found = wilson(8, 10)
    z2 = 1.959963984540054**2
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    half = math.sqrt(z2 * (0.16 / 10 + z2 / 400)) / (1 + z2 / 10)
    assert found.low == pytest.approx(centre - half, rel=1e-12)
    assert found.high == pytest.approx(centre + half, rel=1e-12)
    assert (found.value, found.n) == (0.8, 10)


@pytest.mark.parametrize("n", [1, 2, 17, 805, 10**7])
def test_wilson_against_scipy_and_statsmodels(n):
    for successes in {0, 1, n // 3, n - 1, n}:
        found = wilson(successes, n)
        scipys = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
        theirs = proportion_confint(successes, n, method="wilson")
        assert (found.low, found.high) == pytest.approx(theirs, abs=1e-12)
        assert 0 <= found.low and found.high <= 1 and within(found)


@pytest.mark.parametrize(
    ("successes", "n", "message"),
    [(0, 0, "no trials"), (3, 2, "n = 2"), (-1, 2, "is -1")],
)
def test_wilson_refuses(successes, n, message):
    with pytest.raises(ValueError, match=message):
        wilson(successes, n)


# ---------------------------------------------------------------------- win rates


def test_a_win_rate_without_ties_and_clusters_is_wilsons_but_for_student():
    found = win_rate([1] * 700 + [0] * 300).rate
    # m = 0.21 / (0.21 / 999) = 999, and Student's quantile for 999 degrees of freedom.
    t, m = stats.t.ppf(0.975, 999), 999
    centre = (0.7 + t**2 / (2 * m)) / (1 + t**2 / m)
    half = t / (1 + t**2 / m) * math.sqrt(0.21 / m + t**2 / (4 * m**2))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    expected = wilson(700, 1000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert (found.value, found.n) == (0.7, 1000)


def test_the_bounds_of_a_win_rate_solve_their_equation():
    rng = np.random.default_rng(22)
    wins = rng.choice([0, 0.5, 1], 300, p=[0.1, 0.2, 0.7])
    names = np.arange(300) // 6
    found = win_rate(wins, names).rate
    sums = np.array([(wins - wins.mean())[names == k].sum() for k in range(50)])
    m = found.value * (1 - found.value) / ((sums**2).sum() * 50 / 49 / 300**2)
    t = stats.t.ppf(0.975, 49)
    for p in (found.low, found.high):
        assert (found.value - p) ** 2 == pytest.approx(t**2 * p * (1 - p) / m, abs=1e-12)


def test_a_win_rate_counts_ties_and_what_is_invalid():
    found = win_rate([1, 0.5, 0, 1, None, float("nan"), 0.8])
    assert (found.wins, found.ties, found.losses, found.invalid) == (3, 1, 1, 2)
    assert found.rate.value == pytest.approx(3.3 / 5) and found.rate.n == 5
    assert found.rate == win_rate([1, 0.5, 0, 1, 0.8]).rate  # what is invalid changes nothing


def test_clusters_widen_a_win_rate_and_ties_narrow_it():
    wins = (np.random.default_rng(23).random(200) < 0.6).astype(float)

    def width(*arguments):
        found = win_rate(*arguments).rate
        return found.high - found.low

    four = np.repeat(wins, 4)
    assert width(four, np.repeat(np.arange(200), 4)) == pytest.approx(width(wins), rel=1e-6)
    assert width(four) == pytest.approx(width(wins) / 2, rel=0.02)
    wins[::2] = 0.5
    assert width(wins) < 0.8 * width(np.round(wins - 0.1))


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_a_model_that_wins_all_may_still_lose(outcome):
    found = win_rate([outcome] * 100, np.arange(100) // 4).rate
    t2 = stats.t.ppf(0.975, 24) ** 2  # 25 clusters, each one trial
    expected = {0.0: (0, t2 / (25 + t2)), 1.0: (25 / (25 + t2), 1)}
    assert found.value == outcome and within(found)
    if outcome != 0.5:
        assert (found.low, found.high) == pytest.approx(expected[outcome], abs=1e-12)


def test_clusters_that_are_all_alike_are_one_trial_each():
    found = win_rate([1, 0] * 10, np.arange(20) // 2).rate
    assert found.high - found.low > 0.5  # no variance between clusters is no certainty


def test_alpaca_evals_preferences_are_outcomes_of_the_second_model():
    assert from_preferences([1, 2, 1.5, 0, None, math.nan, 1.25]) == [
        *(0, 1, 0.5, 0.5, None, None, 0.25)
    ]
    with pytest.raises(ValueError, match="a preference is 3"):
        from_preferences([1, 3])


@pytest.mark.parametrize(
    ("outcomes", "clusters", "message"),
    [
        ([1, 2], None, "outcomes must be"),
        ([[1], [0]], None, "flat list"),
        ([1, 0], ["a"], "2 outcomes, but 1 clusters"),
    ],
)
def test_outcomes_that_have_no_win_rate(outcomes, clusters, message):
    with pytest.raises(ValueError, match=message):
        win_rate(outcomes, clusters)


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
    for i in range(1000):
        (a, b), longer, names = comparisons(rng, size, (strong, weak))
        found = (
            (win_rate(a, names).rate, raw),
            (length_controlled_win_rate(a, longer, names), at_equal_length),
            (clustered_difference(a, b, names, resamples=600, seed=i), difference),
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
    held = [win_rate(np.arange(n) < k).rate for k in likely]
    covered = sum(chance[k] for k, i in zip(likely, held) if i.low <= share <= i.high)
    assert 0.93 <= covered <= 0.97


def test_percentiles_are_too_narrow_at_the_ends():
    # Why `win_rate` is no bootstrap. The percentiles of resampled shares are a binomial's.
    n, share = 200, 0.98
    wins = np.arange(n + 1)
    chance = stats.binom.pmf(wins, n, share)
    low, high = (stats.binom.ppf(q, n, wins / n) / n for q in (0.025, 0.975))
    score = [win_rate(np.arange(n) < k).rate for k in wins]
    held = np.array([i.low <= share <= i.high for i in score])
    assert chance[(low <= share) & (share <= high)].sum() < 0.91
    assert chance[held].sum() > 0.93


def test_few_clusters_get_students_width():
    rng = np.random.default_rng(26)
    covered = []
    for i in range(1000):
        values = rng.normal(size=8)
        found = clustered_mean(values, range(8), resamples=2000, seed=i)
        covered.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97  # plain percentiles: about 0.88


# ---------------------------------------------------------------------- BCa


def test_bca_is_scipys():
    rng = np.random.default_rng(27)
    a, b = rng.gamma(1.0, size=120), rng.gamma(1.0, size=120)
    found = clustered_difference(a, b, range(120), seed=3, method="BCa")
    tail = stats.norm.cdf(-math.sqrt(120 / 119) * stats.t.ppf(0.975, 119))
    theirs = stats.bootstrap(
        (a, b),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        confidence_level=1 - 2 * tail,
        rng=4,
    ).confidence_interval
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_bca_follows_a_skewed_mean_and_respects_clusters():
    values = np.random.default_rng(28).exponential(size=60) ** 2
    plain = clustered_mean(values, range(60))
    bca = clustered_mean(values, range(60), method="BCa")
    assert bca.low > plain.low and bca.high > plain.high  # shifted to the long side
    repeated = clustered_mean(np.repeat(values, 3), np.repeat(np.arange(60), 3), method="BCa")
    assert (repeated.low, repeated.high) == pytest.approx((bca.low, bca.high), abs=1e-9)


def test_bca_covers_a_paired_difference():
    rng = np.random.default_rng(29)
    covered = []
    difference = true_rate(0.4) - true_rate(0.1)
    for i in range(300):
        (a, b), _, names = comparisons(rng, 4, (0.4, 0.1))
        found = clustered_difference(a, b, names, resamples=800, seed=i, method="BCa")
        covered.append(found.low <= difference <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_where_bca_is_undefined_percentiles_are_given():
    values, names = [1.0, 2.0, 3.0, 8.0], ["a", "a", "a", "b"]
    found = clustered_mean(values, names, method="BCa")
    assert math.isfinite(found.low + found.high) and within(found)
    assert clustered_mean([2.0, 2.0], "ab", method="BCa") == Interval(2.0, math.nan, math.nan, 2)
    with pytest.raises(ValueError, match="one training only"):
        clustered_mean([1.0, 2.0], "ab", runs=[0, 1], method="BCa")


# ---------------------------------------------------------------------- several trainings


def test_trainings_that_differ_widen_the_interval_and_equal_ones_do_not():
    rng = np.random.default_rng(5)
    clusters = list(range(200)) * 3
    runs = [run for run in range(3) for _ in range(200)]
    alike = list(rng.random(200)) * 3
    apart = [value + 0.2 * run for value, run in zip(alike, runs)]

    def width(interval):
        return interval.high - interval.low

    pooled, crossed = clustered_mean(alike, clusters), clustered_mean(alike, clusters, runs=runs)
    assert width(crossed) == pytest.approx(width(pooled), rel=0.1)
    assert width(clustered_mean(apart, clusters, runs=runs)) > 2 * width(
        clustered_mean(apart, clusters)
    )
    assert clustered_mean(apart, clusters, runs=runs).value == pytest.approx(np.mean(apart))


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


def test_a_share_stays_a_share_and_a_mean_of_trainings_is_widened_on_both_sides():
    values = [True] * 58 + [False] * 2
    runs = [0] * 20 + [1] * 20 + [2] * 20
    found = clustered_mean(values, list(range(20)) * 3, runs=runs)
    assert found.low < found.value < found.high <= 1.0
    one = clustered_mean(values, list(range(20)) * 3)
    assert found.low < one.low and found.high >= one.high


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
    for i in range(1000):
        wins, names, runs = trained(rng, scatter, prompts)
        games = [("new", "base", won, 1, name) for won, name in zip(wins, names)]
        found = (
            win_rate(wins, names, runs).rate,
            clustered_mean(wins, names, 300, i, runs),
            bradley_terry(games, "base", 200, i, runs)["new"].win_rate,
            win_rate(wins, names).rate,
        )
        covered.append([interval.low <= truth <= interval.high for interval in found])
    *shares, without = np.mean(covered, axis=0)
    assert all(0.93 <= share <= 0.97 for share in shares), shares
    assert without < min(shares) - 0.02


@pytest.mark.parametrize(
    ("trainings", "scatter", "least", "most"),
    [
        (2, 0.04, 0.87, 0.97),  # two trainings alone say too little of how trainings scatter
        (3, 0.04, 0.93, 0.97),
        (3, 0.0, 0.95, 0.99),
        (5, 0.04, 0.93, 0.97),
        (5, 0.01, 0.93, 0.98),
    ],
)
def test_the_gain_of_a_few_trainings_holds_what_others_would_gain(trainings, scatter, least, most):
    """Gains of each training on 200 questions, with an error of 0.013 each, as the tiny model has."""
    rng, held = np.random.default_rng(35), []
    codes, of_run = np.tile(np.arange(200), trainings), np.repeat(np.arange(trainings), 200)
    for _ in range(1000):
        gains = rng.normal(0.08, scatter, trainings)[of_run] + rng.normal(0, 0.18, len(of_run))
        mean = gains.mean()
        error, freedom = two_way_error((gains - mean) / len(gains), codes, of_run)
        held.append(abs(mean - 0.08) <= stats.t.ppf(0.975, freedom) * error)
    assert least <= np.mean(held) <= most


# ---------------------------------------------------------------------- how many prompts


@pytest.mark.parametrize("difference", [0.05, 0.1, 0.2])
def test_the_number_of_prompts_gives_the_power_it_promises_for_a_win_rate(difference):
    n = prompts_needed(difference)
    wins = np.random.default_rng(18).binomial(n, 0.5 + difference, 40_000)
    seen = np.abs(wins / n - 0.5) > 1.959964 * 0.5 / math.sqrt(n)
    assert seen.mean() == pytest.approx(0.8, abs=0.04)  # wins are whole numbers: n = 47 for 0.2


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_the_number_of_prompts_gives_the_power_it_promises_for_pairs_in_clusters(power):
    # Clusters of 5 with a correlation of 1/4: an effect of 1 + 4/4 = 2 on the variance.
    n = prompts_needed(0.1, variance=0.2, design_effect=2.0, power=power)
    rng = np.random.default_rng(19)
    k = math.ceil(n / 5)
    level = rng.normal(0.1, math.sqrt(0.05), (4000, k, 1))
    means = (level + rng.normal(0, math.sqrt(0.15), (4000, k, 5))).mean((1, 2))
    seen = np.abs(means) > 1.959964 * math.sqrt(0.2 * 2 / (5 * k))
    assert seen.mean() == pytest.approx(power, abs=0.02)


def test_numbers_of_prompts_by_hand():
    # (1.96 * 0.5 + 0.8416 * sqrt(0.2475))^2 / 0.0025 = 782.3 (tables print 783 for 55 %).
    assert prompts_needed(0.05) == prompts_needed(-0.05) == 783
    # (1.96 + 0.8416)^2 * 0.25 / 0.01 = 196.2
    assert prompts_needed(0.1, variance=0.25) == 197
    assert prompts_needed(0.1, variance=0.25, design_effect=2) == 393
    assert prompts_needed(0.1, variance=0.0) == 1


@given(
    st.integers(5, 10**6),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.floats(0.5, 0.99),
)
def test_the_smallest_difference_is_the_number_of_prompts_turned_round(n, variance, power):
    d = smallest_difference(n, variance, power=power)
    if math.isfinite(d):
        assert prompts_needed(d * (1 + 1e-6) if d < 0.49 else d, variance, power=power) <= n
        assert prompts_needed(d * 0.999, variance, power=power) >= n * 0.99


def test_three_prompts_show_nothing():
    assert smallest_difference(3) == math.inf
    assert smallest_difference(4) <= 0.5
    assert smallest_difference(8, design_effect=2.0) == smallest_difference(4)


def test_a_design_effect_against_the_formula_of_equal_clusters():
    rng = np.random.default_rng(20)
    level = np.repeat(rng.normal(0, math.sqrt(0.25), 4000), 5)
    values = level + rng.normal(0, math.sqrt(0.75), 20_000)
    names = np.repeat(np.arange(4000), 5)
    assert design_effect(values, names) == pytest.approx(1 + 4 * 0.25, rel=0.05)
    assert design_effect(values, range(20_000)) == pytest.approx(1)
    assert design_effect(np.repeat(level[::5], 5), names) == pytest.approx(5, rel=0.01)
    assert design_effect([1, 1, 1], "abc") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difference": 0}, "no number of prompts"),
        ({"difference": math.nan}, "no number of prompts"),
        ({"difference": 0.6}, "0.5 at most"),
        ({"difference": 0.1, "variance": -1}, "variance is -1"),
        ({"difference": 0.1, "design_effect": 0}, "design effect is 0"),
        ({"difference": 0.1, "power": 0.3}, "power 0.3"),
        ({"difference": 0.1, "level": 1}, "level 1"),
    ],
)
def test_sample_sizes_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompts_needed(**arguments)


def test_no_prompts_have_no_size():
    with pytest.raises(ValueError, match="0 prompts"):
        smallest_difference(0)


# ---------------------------------------------------------------------- many differences


def test_holm_by_hand():
    # z of 3, 2.2, 2: p of 0.0027, 0.0278, 0.0455; times 3, 2, 1 and never falling.
    outside, p = outside_the_noise([0.3, -0.22, 0.2], [0.1, 0.1, 0.1])
    assert outside == [True, False, False]
    assert p == pytest.approx([3 * 0.0026998, 2 * 0.0278069, 2 * 0.0278069], abs=1e-6)
    assert outside_the_noise([0.2], [0.1])[0] == [True]  # alone, it would be outside


def test_holm_keeps_the_chance_of_one_false_alarm(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels does this at each call: 0.2 s
    rng = np.random.default_rng(21)
    noise = rng.normal(size=(2000, 6))
    alarms = np.mean([any(outside_the_noise(row, np.ones(6))[0]) for row in noise])
    assert alarms == pytest.approx(0.05, abs=0.015)
    alone = (np.abs(noise) > 1.96).any(1).mean()
    assert alone > 0.2  # what it is without the correction


def test_differences_without_an_error_or_with_none():
    nan = math.nan
    found = outside_the_noise([0.1, 0.0, nan, 0.3, nan], [0.0, 0.0, 0.1, nan, 0.0])
    assert found[0] == [False] * 5  # 0.1 of how many items?
    assert found[1] == [pytest.approx(x, nan_ok=True) for x in (nan, 1, nan, nan, nan)]


def test_a_few_items_that_all_moved_alike_are_told_by_the_sign_test():
    for n in (1, 2, 5, 6, 40):
        (outside,), (p,) = outside_the_noise([-1.0], [0.0], trials=[n])
        assert p == pytest.approx(stats.binomtest(n, n).pvalue) and outside == (n > 5)
    both = outside_the_noise([0.5, 0.3], [0.0, 0.1], freedoms=[math.inf, 9], trials=[5, 10])
    expected = [0.0625, 2 * 2 * stats.t.sf(3, 9)]
    assert both[0] == [False, True] and both[1] == pytest.approx(expected)


def test_what_has_no_differences_has_none_outside():
    assert outside_the_noise([], []) == ([], [])
    with pytest.raises(ValueError, match="2 differences, but 1"):
        outside_the_noise([1, 2], [1])
    with pytest.raises(ValueError, match="negative"):
        outside_the_noise([1], [-1])
