"""Length-controlled win rates, their intervals, and what happens where no fit exists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from sao_utils.statistics.intervals import Interval, clustered_mean, win_rate
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


def test_alpaca_evals_model_with_difficulties_by_newtons_method():
    rng = np.random.default_rng(30)
    n = 805
    difficulty, d = rng.normal(1, 2, n), rng.normal(150, 400, n)
    x = np.column_stack([np.ones(n), np.tanh(d / d.std(ddof=1)), difficulty])
    y = special.expit(x @ [-0.3, 0.8, 0.5] + rng.normal(0, 2, n))
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


def test_it_is_the_raw_win_rate_when_lengths_are_equal():
    rng = np.random.default_rng(12)
    wins, _, clusters = duels(rng, 0.6, 0.0)
    wins[::5] = 0.5
    found = length_controlled_win_rate(wins, np.zeros(800), clusters)
    raw = clustered_mean(wins, clusters)
    assert found.value == pytest.approx(raw.value, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((raw.low, raw.high), abs=0.01)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_all_duels_end_alike(outcome):
    rng = np.random.default_rng(15)
    found = length_controlled_win_rate([outcome] * 100, rng.normal(9, 5, 100), np.arange(100) // 4)
    expected = win_rate([outcome] * 25)  # a cluster is one trial
    assert found == Interval(outcome, expected.low, expected.high, 100)


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
def test_any_duels_give_an_ordered_interval_or_say_why_not(rows):
    wins, difference, clusters = zip(*rows, strict=True)
    found = length_controlled_win_rate(wins, difference, clusters)
    assert found.n == len(rows)
    if found.note:
        assert math.isnan(found.low) and math.isnan(found.high)
    else:
        assert 0 <= found.low <= found.value <= found.high <= 1
