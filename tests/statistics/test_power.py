"""How many prompts a difference takes, and what is more than noise."""

import math

import numpy as np
import pytest
from scipy import stats

from sao_utils.statistics.power import design_effect, outside_the_noise, prompts_needed


def test_the_number_of_prompts_by_hand():
    # (1.96 * 0.5 + 0.8416 * sqrt(0.2475))^2 / 0.0025 = 782.3 (tables print 783 for 55 %).
    assert prompts_needed(0.05) == prompts_needed(-0.05) == 783


def test_a_design_effect_against_the_formula_of_equal_clusters():
    rng = np.random.default_rng(20)
    level = np.repeat(rng.normal(0, math.sqrt(0.25), 4000), 5)
    values = level + rng.normal(0, math.sqrt(0.75), 20_000)
    names = np.repeat(np.arange(4000), 5)
    assert design_effect(values, names) == pytest.approx(1 + 4 * 0.25, rel=0.05)
    assert design_effect(values, range(20_000)) == pytest.approx(1)
    assert design_effect(np.repeat(level[::5], 5), names) == pytest.approx(5, rel=0.01)
    assert design_effect([1, 1, 1], "abc") == 1


# ---------------------------------------------------------------------- many differences


def test_holm_by_hand():
    # z of 3, 2.2, 2: p of 0.0027, 0.0278, 0.0455; times 3, 2, 1 and never falling.
    many = [math.inf] * 3
    outside, p = outside_the_noise([0.3, -0.22, 0.2], [0.1, 0.1, 0.1], many, [9, 9, 9])
    assert outside == [True, False, False]
    assert p == pytest.approx([3 * 0.0026998, 2 * 0.0278069, 2 * 0.0278069], abs=1e-6)
    assert outside_the_noise([0.2], [0.1], [math.inf], [9])[0] == [True]  # alone: outside


def test_items_that_all_moved_alike_are_told_by_the_sign_test_and_what_is_unknown_by_none():
    for n in (1, 2, 5, 6, 40):
        (outside,), (p,) = outside_the_noise([-1.0], [0.0], [math.inf], [n])
        assert p == pytest.approx(stats.binomtest(n, n).pvalue) and outside == (n > 5)
    gaps, errors = [0.5, 0.3, 0.0, math.nan, 0.3], [0.0, 0.1, 0.0, 0.1, math.nan]
    outside, p = outside_the_noise(gaps, errors, [math.inf, 9, 9, 9, 9], [5, 10, 5, 5, 5])
    assert outside == [False, True, False, False, False]
    assert p == pytest.approx(
        [2 * 0.0625, 3 * 2 * stats.t.sf(3, 9), 1, math.nan, math.nan], nan_ok=True
    )
