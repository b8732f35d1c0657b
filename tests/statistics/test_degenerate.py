"""What cannot be estimated has no bounds, and says why; nothing raises for want of data."""

import math

import pytest

from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate, length_curve
from sao_utils.statistics.power import design_effect
from sao_utils.statistics.ratings import bradley_terry, kappa

#: name -> (of values, clusters): each as an interval
ESTIMATES = {
    "share": lambda v, c: clustered_mean([x > 0.5 for x in v], c, 50),
    "mean": lambda v, c: clustered_mean(v, c, 50),
    "mean of two seeds": lambda v, c: clustered_mean(v, c, 50, runs=[k % 2 for k in range(len(v))]),
    "difference": lambda v, c: clustered_difference(v, [0.0] * len(v), c, 50),
    "win rate": lambda v, c: win_rate(v, c).rate,
    "win rate at equal length": lambda v, c: length_controlled_win_rate(
        v, [k - 1 for k in range(len(v))], c
    ),
    "kappa": lambda v, c: kappa(v, [1.0] * len(v), c, 50),
}


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_values_of_one_cluster_have_a_value_and_no_interval(estimate):
    found = estimate([1.0, 0.0, 1.0, 0.5], ["same question"] * 4)
    assert math.isfinite(found.value) and found.n == 4
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.note == "one cluster of questions: no interval"


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_no_values_are_nothing_to_count(estimate):
    found = estimate([], [])
    assert math.isnan(found.value) and found.n == 0 and found.note == "nothing to count"


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_values_that_are_all_alike_or_alone_do_not_raise(estimate, value):
    for n in (1, 2, 9):
        found = estimate([value] * n, range(n))
        assert isinstance(found, Interval) and found.n == n
        if n == 9 and math.isfinite(found.low):
            assert found.low <= found.value <= found.high or math.isnan(found.value)


def test_a_win_rate_without_a_valid_comparison_is_nothing_to_count():
    found = win_rate([None, math.nan], ["a", "b"])
    assert found.rate.note == "nothing to count" and found.invalid == 2


def test_one_comparison_says_nothing():
    assert win_rate([1]).rate == Interval(1.0, 0.0, 1.0, 1)
    assert kappa([1], [1]).low == -1.0 and kappa([1], [2]).value == 0.0


def test_strengths_of_one_prompt_have_no_interval():
    games = [("a", "b", k % 3 > 0, 1, "one prompt") for k in range(30)]
    found = bradley_terry(games, "b", 50)["a"]
    assert found.elo.value > 1000 and math.isnan(found.elo.low) and found.win_rate.note


def test_a_design_effect_of_one_cluster_is_not_a_number():
    assert math.isnan(design_effect([1, 2], "aa")) and math.isnan(design_effect([], []))
    assert design_effect([1, 1, 1], "abc") == 1


def test_a_length_curve_with_nothing_to_fit_is_empty():
    assert length_curve([], [], [0]) == length_curve([1.0], [3.0], [0]) == []
