"""The zero of a line through points, by hand, and the interval of it."""

import math

import numpy as np
import pytest

from sao_utils.statistics.break_even import crossing_shift, zero_crossing


def test_the_crossing_is_that_of_the_least_squares_line():
    # means 1 and 2/3; slope ((-1)(-1) + 0 + (1)(3)) / 2 = 2; so 1 - (2/3) / 2
    found = zero_crossing(([0, 1, 2], [-1, 0, 3]))
    assert found.value == pytest.approx(2 / 3) and found.n == 3 and not found.note


def test_points_on_a_line_leave_no_doubt_and_a_shift_of_them_is_seen():
    x, y = [0.5, 0.6, 0.7, 0.8], [-0.1, 0.0, 0.1, 0.2]
    found = zero_crossing((x, y))
    assert [found.value, found.low, found.high] == pytest.approx([0.6] * 3)
    earlier = ([value - 0.05 for value in x], y)
    moved = crossing_shift((x, y), earlier)
    assert [moved.value, moved.low, moved.high] == pytest.approx([-0.05] * 3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    x = np.repeat(np.linspace(0.5, 1, 6), 3)
    for _ in range(200):
        found = zero_crossing((x, x - 0.7 + rng.normal(0, 0.05, len(x))), 500)
        held += found.low <= 0.7 <= found.high
    assert 175 <= held <= 198


def test_a_line_that_falls_or_crosses_elsewhere_is_told():
    falling = zero_crossing(([0, 1, 2], [2, 1, 0]))
    assert math.isnan(falling.value) and falling.note == "the line does not rise"
    beyond = zero_crossing(([0.5, 0.6, 0.7], [0.1, 0.2, 0.3]))
    assert beyond.value == pytest.approx(0.4) and "outside" in beyond.note
    unsure = zero_crossing(([0.5, 0.6, 0.7, 0.8], [-0.1, 0.1, -0.1, 0.1]))
    assert unsure.high == math.inf
