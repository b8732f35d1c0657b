"""Length-controlled win rates, their intervals, and what happens where no fit exists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from statsmodels import api as sm

from sao_utils.statistics.intervals import Interval, clustered_mean, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate


def comparisons(rng, win_rate, length_effect, clusters=200, each=4):
    """Comparisons of a model that is 30 tokens longer, against a judge that likes length."""
    names = np.repeat(np.arange(clusters), each)
    difference = np.round(rng.normal(30, 30, clusters * each))
    log_odds = math.log(win_rate / (1 - win_rate))
    log_odds = log_odds + length_effect * np.tanh(difference / difference.std(ddof=1))
    return (rng.random(len(names)) < 1 / (1 + np.exp(-log_odds))).astype(float), difference, names


def test_the_interval_is_that_of_statsmodels_with_a_clustered_covariance():
    wins, difference, clusters = comparisons(np.random.default_rng(11), 0.6, 1.0, clusters=50)
    wins[::7] = 0.5
    x = np.column_stack([np.ones(200), np.tanh(difference / difference.std(ddof=1))])
    model = sm.GLM(wins, x, family=sm.families.Binomial())
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": clusters})
    half = stats.t.ppf(0.975, 49) * fit.bse[0]
    bounds = special.expit(fit.params[0] + half * np.array([-1, 0, 1]))
    found = length_controlled_win_rate(wins, difference, clusters)
    assert (found.low, found.value, found.high) == pytest.approx(tuple(bounds), abs=1e-6)


def test_alpaca_evals_model_with_difficulties_by_newtons_method():
    rng = np.random.default_rng(30)
    n = 805
    difficulty, d = rng.normal(1, 2, n), rng.normal(150, 400, n)
    x = np.column_stack([np.ones(n), np.tanh(d / d.std(ddof=1)), difficulty])
    y = special.expit(x @ [-0.3, 0.8, 0.5] + rng.normal(0, 2, n))

    def without(i):
        """The rate at equal length without prompt i."""
        keep, b = np.arange(n) != i, np.zeros(3)
        for _ in range(8):
            p = special.expit(x[keep] @ b)
            slope = x[keep].T @ (y[keep] - p)
            b = b + np.linalg.solve((x[keep].T * (p * (1 - p))) @ x[keep], slope)
        return special.expit(b[0] + b[2] * difficulty[keep]).mean()

    found = length_controlled_win_rate(y, d, range(n), difficulty)
    assert found.value == pytest.approx(without(-1), abs=1e-10)
    assert length_controlled_win_rate(y, d, range(n)).value != pytest.approx(found.value, abs=1e-4)
    sample = special.logit([without(i) for i in range(n)])  # the jackknife
    error = math.sqrt((n - 1) / n * ((sample - sample.mean()) ** 2).sum())
    half = special.logit([found.low, found.high]) @ [-0.5, 0.5]
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * error, rel=0.01)


def test_it_is_the_raw_win_rate_when_lengths_are_equal():
    rng = np.random.default_rng(12)
    wins, _, clusters = comparisons(rng, 0.6, 0.0)
    wins[::5] = 0.5
    found = length_controlled_win_rate(wins, np.zeros(800), clusters)
    raw = clustered_mean(wins, clusters)
    assert found.value == pytest.approx(raw.value, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((raw.low, raw.high), abs=0.01)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_all_comparisons_end_alike(outcome):
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
def test_any_comparisons_give_an_ordered_interval_or_say_why_not(rows):
    wins, difference, clusters = zip(*rows, strict=True)
    found = length_controlled_win_rate(wins, difference, clusters)
    assert found.n == len(rows)
    if found.note:
        assert math.isnan(found.low) and math.isnan(found.high)
    else:
        assert 0 <= found.low <= found.value <= found.high <= 1
