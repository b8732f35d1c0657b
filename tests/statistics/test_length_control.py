"""Length-controlled win rates, their intervals, and what happens where no fit exists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from sao_utils.statistics import length_control
from sao_utils.statistics.intervals import Interval, clustered_mean, from_preferences, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate


def within(interval):
    return interval.low <= interval.value <= interval.high


def duels(rng, win_rate, length_effect, clusters=200, each=4, longer=30.0):
    """Duels of a model that is `longer` tokens longer, against a judge that likes length."""
    names = np.repeat(np.arange(clusters), each)
    difference = np.round(rng.normal(longer, 30, clusters * each))
    log_odds = math.log(win_rate / (1 - win_rate))
    log_odds = log_odds + length_effect * np.tanh(difference / difference.std(ddof=1))
    return (rng.random(len(names)) < 1 / (1 + np.exp(-log_odds))).astype(float), difference, names


def test_a_model_that_is_only_longer_wins_half_of_the_time():
    wins, difference, clusters = duels(np.random.default_rng(8), 0.5, 2.0)
    assert clustered_mean(wins, clusters).low > 0.65  # the raw win rate is fooled
    found = length_controlled_win_rate(wins, difference, clusters)
    assert found.low <= 0.5 <= found.high
    assert found.value == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("truth", [0.3, 0.5, 0.7])
def test_the_length_controlled_interval_covers_the_truth(truth):
    rng = np.random.default_rng(9)
    found = [length_controlled_win_rate(*duels(rng, truth, 1.5, 60)) for _ in range(100)]
    assert 0.88 <= np.mean([i.low <= truth <= i.high for i in found]) <= 1
    assert np.mean([i.value for i in found]) == pytest.approx(truth, abs=0.02)


def test_it_shrinks_nothing_where_length_plays_no_part():
    rng = np.random.default_rng(10)
    wins, difference, clusters = duels(rng, 0.7, 0.0, longer=0.0)
    found = length_controlled_win_rate(wins, difference, clusters)
    assert found.value == pytest.approx(wins.mean(), abs=0.01)


def test_the_fit_by_hand():
    """Maximum likelihood by scipy, and the clustered covariance from its formula."""
    rng = np.random.default_rng(11)
    wins, difference, clusters = duels(rng, 0.6, 1.0, clusters=50)
    wins[::7] = 0.5
    x = np.column_stack([np.ones(200), np.tanh(difference / difference.std(ddof=1))])

    def loss(b):
        return np.sum(np.logaddexp(0, x @ b) - wins * (x @ b))

    def slope(b):
        return x.T @ (1 / (1 + np.exp(-x @ b)) - wins)

    b = optimize.minimize(loss, np.zeros(2), jac=slope, tol=1e-12).x
    p = 1 / (1 + np.exp(-x @ b))
    bread = np.linalg.inv(x.T @ (x * (p * (1 - p))[:, None]))
    scores = np.array([((wins - p)[:, None] * x)[clusters == k].sum(0) for k in range(50)])
    covariance = bread @ scores.T @ scores @ bread * 50 / 49 * 199 / 198
    error = math.sqrt(covariance[0, 0])
    student = stats.t.ppf(0.975, 49)
    bounds = 1 / (1 + np.exp(-(b[0] + student * error * np.array([-1, 0, 1]))))
    found = length_controlled_win_rate(wins, difference, clusters)
    assert (found.low, found.value, found.high) == pytest.approx(tuple(bounds), abs=1e-6)
    # To first order this is the delta method.
    delta = student * error * bounds[1] * (1 - bounds[1])
    assert (found.high - found.low) / 2 == pytest.approx(delta, rel=0.05)


def test_two_lengths_by_hand():
    # Differences of +-10 only, so the fit goes through both shares: 30 of 40 and 12 of 40 won.
    # log(3) = a + b t and log(3/7) = a - b t give a = (log 3 + log(3/7)) / 2.
    wins = [1] * 30 + [0] * 10 + [1] * 12 + [0] * 28
    found = length_controlled_win_rate(wins, [10] * 40 + [-10] * 40, range(80))
    a = (math.log(3) + math.log(3 / 7)) / 2
    assert found.value == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-12)
    # Its variance is a quarter of 1/30 + 1/10 + 1/12 + 1/28, times n / (n - 1) for clusters of one
    # and (n - 1) / (n - 2) for two parameters.
    error = math.sqrt((1 / 30 + 1 / 10 + 1 / 12 + 1 / 28) / 4 * 80 / 78)
    low = 1 / (1 + math.exp(-(a - stats.t.ppf(0.975, 79) * error)))
    assert found.low == pytest.approx(low, abs=1e-12)


def test_alpaca_evals_model_with_difficulties_by_newtons_method():
    rng = np.random.default_rng(30)
    n = 805
    difficulty, d = rng.normal(1, 2, n), rng.normal(150, 400, n)
    x = np.column_stack([np.ones(n), np.tanh(d / d.std(ddof=1)), difficulty])
    preferences = 1 + special.expit(x @ [-0.3, 0.8, 0.5] + rng.normal(0, 2, n))
    y = np.array(from_preferences(preferences))
    b = np.zeros(3)
    for _ in range(30):
        p = special.expit(x @ b)
        b = b + np.linalg.solve((x.T * (p * (1 - p))) @ x, x.T @ (y - p))
    expected = special.expit(b[0] + b[2] * difficulty).mean()
    found = length_controlled_win_rate(y, d, range(n), difficulty)
    assert found.value == pytest.approx(expected, abs=1e-10)
    assert length_controlled_win_rate(y, d, range(n)).value != pytest.approx(expected, abs=1e-4)

    # Its error against fits without each prompt in turn (the jackknife).
    def without(i):
        keep = np.arange(n) != i
        c = b.copy()
        for _ in range(3):
            p = special.expit(x[keep] @ c)
            c = c + np.linalg.solve(
                (x[keep].T * (p * (1 - p))) @ x[keep], x[keep].T @ (y[keep] - p)
            )
        return special.logit(special.expit(c[0] + c[2] * difficulty[keep]).mean())

    sample = np.array([without(i) for i in range(n)])
    error = math.sqrt((n - 1) / n * ((sample - sample.mean()) ** 2).sum())
    half = special.logit([found.low, found.high]) @ [-0.5, 0.5]
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * error, rel=0.01)


def test_difficulties_that_say_nothing_change_nothing():
    wins, difference, clusters = duels(np.random.default_rng(31), 0.6, 1.0)
    plain = length_controlled_win_rate(wins, difference, clusters)
    assert length_controlled_win_rate(wins, difference, clusters, np.full(800, 3.0)) == plain
    with pytest.raises(ValueError, match="800 wins, but 2 difficulties"):
        length_controlled_win_rate(wins, difference, clusters, [1, 2])


def test_difficulty_alone_separates_wins_from_losses():
    rng = np.random.default_rng(32)
    difficulty = rng.normal(size=100)
    found = length_controlled_win_rate(difficulty > 0, rng.normal(size=100), range(100), difficulty)
    assert within(found) and found.low > 0.1 and found.high < 0.9


def test_it_is_the_raw_win_rate_when_lengths_are_equal():
    rng = np.random.default_rng(12)
    wins, _, clusters = duels(rng, 0.6, 0.0)
    wins[::5] = 0.5
    found = length_controlled_win_rate(wins, np.zeros(800), clusters)
    raw = clustered_mean(wins, clusters)
    assert found.value == pytest.approx(raw.value, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((raw.low, raw.high), abs=0.01)


def test_swapping_the_models_mirrors_the_result():
    wins, difference, clusters = duels(np.random.default_rng(13), 0.6, 1.0)
    one = length_controlled_win_rate(wins, difference, clusters)
    other = length_controlled_win_rate(1 - wins, -difference, clusters)
    mirrored = (1 - other.high, 1 - other.value, 1 - other.low)
    assert (one.low, one.value, one.high) == pytest.approx(mirrored, abs=1e-9)


def test_repeating_rows_within_clusters_adds_no_certainty():
    wins, difference, clusters = duels(np.random.default_rng(14), 0.6, 1.0)
    one = length_controlled_win_rate(wins, difference, clusters)
    nine = length_controlled_win_rate(*(np.repeat(a, 9) for a in (wins, difference, clusters)))
    assert nine.high - nine.low == pytest.approx(one.high - one.low, rel=0.01)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_all_duels_end_alike(outcome):
    rng = np.random.default_rng(15)
    found = length_controlled_win_rate([outcome] * 100, rng.normal(9, 5, 100), np.arange(100) // 4)
    expected = win_rate([outcome] * 25).rate  # a cluster is one trial
    assert found == Interval(outcome, expected.low, expected.high, 100)


def test_all_answers_are_longer_by_the_same():
    for difference in (np.full(4, 50.0), np.array([1e6, 1e6 + 1, 1e6, 1e6 + 1])):
        found = length_controlled_win_rate([1, 0, 1, 1], difference, "abcd")
        assert found == Interval(0.75, 0.0, 1.0, 4)


def test_length_alone_separates_wins_from_losses():
    rng = np.random.default_rng(16)
    difference = rng.normal(0, 30, 400)
    clusters = np.arange(400) // 4
    found = length_controlled_win_rate(difference > 0, difference, clusters)
    assert 0.1 < found.low < 0.5 < found.high < 0.9
    shifted = length_controlled_win_rate(difference > 40, difference, clusters)
    assert shifted.value < 0.05 and within(shifted)
    # One cluster for all that belongs together: fewer independent duels, a wider interval.
    coarse = length_controlled_win_rate(difference > 0, difference, np.arange(400) // 40)
    assert coarse.high - coarse.low > 1.5 * (found.high - found.low)


def test_touching_at_the_threshold_is_separation_too():
    # Without losses at 0 nor wins below, the slope grows without bound.
    found = length_controlled_win_rate([0, 0, 0.5, 1, 1], [-2, -1, 0, 1, 2], range(5))
    assert found.value == pytest.approx(0.5, abs=1e-6)
    assert found.low < 0.2 and found.high > 0.8


@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [
        ([0, 0, 1, 1], [-2, -1, 1, 2], True),
        ([1, 1, 0, 0], [-2, -1, 1, 2], True),
        ([0, 0, 1, 1], [-2, 1, 1, 2], True),  # they touch
        ([1, 1, 0, 0], [-2, 1, 1, 2], True),
        ([0, 0.5, 1], [-1, 0, 1], True),
        ([0, 1, 0, 1], [-2, -1, 1, 2], False),
        ([0, 1, 0], [-1, 0, 1], False),
        ([0.5, 0.5], [-1, 1], False),
    ],
)
def test_separation(y, x, expected):
    assert length_control._separated(np.array(y), np.array(x)) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 0.5, 1]),
            st.one_of(st.integers(-3, 3), st.floats(-1e9, 1e9, allow_subnormal=False)),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_duels_give_an_ordered_finite_interval(rows):
    wins, difference, clusters = zip(*rows, strict=True)
    found = length_controlled_win_rate(wins, difference, clusters)
    if len(set(clusters)) == 1 and len(rows) > 1:
        assert found.note and math.isnan(found.low) and 0 <= found.value <= 1
        return
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.n == len(rows)
    assert all(type(x) is float for x in (found.low, found.value, found.high))


@pytest.mark.parametrize(
    ("wins", "difference", "clusters", "message"),
    [
        ([1], [], ["a"], "1 wins, but 0 differences"),
        ([1, 0], [3], ["a", "b"], "2 wins, but 1 differences"),
        ([1, 0], [3, 4], ["a"], "1 clusters"),
        ([1, 2], [3, 4], ["a", "b"], "wins must be"),
        ([1, None], [3, 4], ["a", "b"], "1 of 2 wins are missing"),
    ],
)
def test_what_is_missing_for_length_control_is_said(wins, difference, clusters, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(wins, difference, clusters)


@pytest.mark.parametrize("scatter", [0.2, 0.4])
def test_a_length_controlled_interval_covers_other_trainings_too(scatter):
    """Three trainings whose own log-odds scatter: without `runs` the interval is of these three.

    Over 1,000 evaluations; the truth is the chance to win at equal length of a training yet to come.
    """
    rng, held, narrow = np.random.default_rng(21), [], []
    at, weights = np.polynomial.hermite_e.hermegauss(40)
    truth = weights @ special.expit(0.4 + scatter * at) / weights.sum()
    for _ in range(1000):
        parts = []
        for training in range(3):
            odds = 0.4 + rng.normal(0, scatter)
            wins, longer, names = duels(rng, 1 / (1 + math.exp(-odds)), 1.0, 60)
            parts.append((wins, longer, names, [training] * len(wins)))
        wins, longer, names, runs = (np.concatenate(part) for part in zip(*parts))
        for found, kept in (
            (length_controlled_win_rate(wins, longer, names, runs=runs), held),
            (length_controlled_win_rate(wins, longer, names), narrow),
        ):
            kept.append(found.low <= truth <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97
    assert np.mean(narrow) < np.mean(held) - 0.05
