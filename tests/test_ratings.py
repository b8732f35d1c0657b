"""Agreement of raters and strength of models, with intervals."""

import math

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from sao_utils.intervals import wilson
from sao_utils.ratings import kappa


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
    assert found.low == pytest.approx((wilson(40, 40).low - 0.5) / 0.5)
    few = kappa([1, 2] * 20, [1, 2] * 20, np.arange(40) // 10)
    assert few.low == pytest.approx((wilson(4, 4).low - 0.5) / 0.5)


def test_two_judges_that_always_say_1_have_no_kappa():
    found = kappa([1] * 30, [1] * 30)
    assert math.isnan(found.value) and (found.low, found.high, found.n) == (-1.0, 1.0, 30)
    # One judge that always says 1 agrees by chance alone.
    assert kappa([1] * 30, [1, 2] * 15).value == 0.0


def test_raters_who_never_agree():
    found = kappa([1, 2] * 30, [2, 1] * 30)
    assert found.value == -1.0 and within(found)


def test_one_item_and_one_cluster():
    assert kappa([1], [1]).low == -1.0
    assert kappa([1], [2]).value == 0.0  # chance agreement of (1) and (2) is 0, too
    with pytest.warns(UserWarning, match="only one cluster"):
        found = kappa([1, 2, 1], [1, 2, 2], ["x"] * 3)
    assert found == kappa([1, 2, 1], [1, 2, 2])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "no labels"),
        ([1, 2], [1], r"a \(2\) as of b \(1\)"),
        ([1, None], [1, 2], "1 of 4 labels are missing"),
        ([1, 2], [math.nan, 2], "1 of 4 labels are missing"),
    ],
)
def test_labels_that_kappa_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        kappa(a, b)
