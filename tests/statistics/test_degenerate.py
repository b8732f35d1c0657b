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
    "BCa": lambda v, c: clustered_difference(v, [0.0] * len(v), c, 50, bca=True),
    "win rate": lambda v, c: win_rate(v, c),
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
@pytest.mark.parametrize("n", [1, 2, 9])
def test_values_that_are_all_alike_or_alone_have_an_interval_or_a_reason(estimate, value, n):
    found = estimate([value] * n, range(n))
    assert isinstance(found, Interval) and found.n == n
    assert found.low <= found.value <= found.high or (math.isnan(found.low) and found.note)


def test_a_mean_that_all_clusters_share_and_no_valid_comparison():
    found = clustered_mean([3.0, 5.0] * 4, "aabbccdd")
    assert found.value == 4 and math.isnan(found.low) and found.note == "all alike: no interval"
    assert win_rate([None, math.nan], ["a", "b"]).note == "nothing to count"


def test_lengths_that_cannot_be_told_from_wins_or_from_each_other_give_no_number():
    lengths = [-3, -2, -1, 1, 2, 3, 4]
    for wins in ([0, 0, 0, 1, 1, 1, 1], [1, 1, 0.5, 0, 0, 0, 0]):
        found = length_controlled_win_rate(wins, lengths, range(7))
        assert math.isnan(found.value) and "length alone" in found.note
        assert length_curve(wins, lengths, [0]) == []
    found = length_controlled_win_rate([1, 0, 1, 1], [50.0] * 4, "abcd")
    assert math.isnan(found.value) and "all differences in length are alike" in found.note
    assert length_curve([], [], [0]) == length_curve([1.0], [3.0], [0]) == []


def test_raters_that_always_agree_or_never_have_no_interval_and_one_label_has_no_kappa():
    found = kappa([1, 2] * 20, [1, 2] * 20)
    assert found.value == 1 and math.isnan(found.low) and found.note
    found = kappa([1, 2] * 30, [2, 1] * 30, [k // 2 for k in range(60)])
    assert found.value == -1 and math.isnan(found.low) and found.note
    assert math.isnan(kappa([1] * 30, [1] * 30).value)


def test_strengths_of_one_prompt_have_no_interval_and_those_that_no_game_bounds_no_number():
    games = [("a", "b", k % 3 > 0, "one prompt") for k in range(30)]
    found = bradley_terry(games, "b", 50)["a"]
    assert found.elo.value > 1000 and math.isnan(found.elo.low) and found.win_rate.note
    won_all = [("best", "base", 1, i) for i in range(9)] + [
        ("a", "base", i > 3, i) for i in range(9)
    ]
    never_met = [("a", "base", i > 3, i) for i in range(9)] + [
        ("c", "d", i > 3, i) for i in range(9)
    ]
    for games in (won_all, never_met, won_all[:1]):
        for strength in bradley_terry(games, "base", 50).values():
            assert math.isnan(strength.elo.value) and "no finite" in strength.elo.note


def test_a_design_effect_of_one_cluster_is_not_a_number():
    assert math.isnan(design_effect([1, 2], "aa")) and math.isnan(design_effect([], []))
