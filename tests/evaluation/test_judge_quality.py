"""What can be said of a judge from its verdicts: how right, how biased, how calibrated."""

import random
from statistics import NormalDist

import numpy as np
import pytest

from sao_utils.evaluation.judge_quality import (
    judge_quality,
    judges_agree,
    known_pairs,
)


def verdict(k, m12, m21, quality=(1, 0), lengths=(10, 10), prompt=None):
    if m12 * m21 > 0:
        outcome = "consistent"
    else:
        outcome = "inconsistent" if m12 * m21 < 0 else "tie"
    return {
        "id": str(k),
        "prompt": prompt or f"P{k}",
        "responses": ["x", "y"],
        "quality": list(quality),
        "lengths": list(lengths),
        "outcome": outcome,
        "margin": (m12 + m21) / 2,
        "margin_12": m12,
        "margin_21": m21,
        "mass": 0.9,
    }


def test_a_judge_that_always_says_1_is_seen_through():
    found = judge_quality([verdict(k, 3.0, -3.0) for k in range(80)], 200)
    assert found["first position"].value == found["flip rate"].value == 1
    assert 0.9 < found["first position"].low < 1, "80 pairs do not make it certain"
    assert (
        found["accuracy, better answer first"].value == 1
        and found["accuracy, better answer second"].value == 0
    )
    assert found["accuracy"].value == found["accuracy, one order"].value == 0.5
    assert found["consistent verdicts"].value == 0 and found["valid verdicts"].value == 1


def test_a_judge_that_only_counts_words_shows_its_bias_and_a_fair_one_does_not():
    draw, by_length, fair = random.Random(1), [], []
    for k in range(400):
        lengths = draw.choice(((30, 10), (10, 30)))
        longer = 1 if lengths[0] > lengths[1] else -1
        better = longer if draw.random() < 0.7 else -longer  # longer answers ARE better, mostly
        quality = (1, 0) if better > 0 else (0, 1)
        by_length.append(verdict(k, 2.0 * longer, 2.0 * longer, quality, lengths))
        fair.append(verdict(k, 2.0 * better, 2.0 * better, quality, lengths))
    found, other = (judge_quality(by_length)), (judge_quality(fair))
    assert (
        found["longer answer chosen"].value == found["longer answer chosen, all pairs"].value == 1
    )
    assert found["longer answer better"].low < 0.7 < found["longer answer better"].high
    assert found["length bias"].low < 0.3 < found["length bias"].high
    assert found["length bias"].low > 0.2
    assert found["accuracy, better answer longer"].value == 1
    assert found["accuracy, better answer shorter"].value == 0
    assert other["longer answer chosen"].value > 0.6, "which alone would look like a bias"
    bias = other["length bias"]
    assert bias.value == 0 and -0.02 < bias.low < 0 < bias.high < 0.02  # in 400 pairs


def test_length_groups_are_by_share_of_the_longer_answer():
    judged = [
        verdict(0, 1, 1, lengths=(100, 91)),
        verdict(1, 1, 1, lengths=(100, 89)),
        verdict(2, 1, 1, lengths=(89, 100)),
    ]
    assert [row["better_is"] for row in known_pairs(judged)] == ["about equal", "longer", "shorter"]


def drawn_judge(seed, n, right=0.8, first=1.0):
    """Verdicts of a judge with known habits: right with probability `right` when position is left
    out, and a bonus for the first position, in nats, against a strength of 2 with noise of 1."""
    draw = random.Random(seed)
    judged = []
    for k in range(n):
        quality = draw.choice(((1, 0), (0, 1)))
        better = quality[0] - quality[1]
        told = better if draw.random() < right else -better
        strength = told * max(0.1, draw.gauss(2, 1))
        judged.append(verdict(k, strength + first, strength - first, quality))
    return judged


def test_the_diagnostics_find_the_habits_of_a_judge():
    weaker = NormalDist(2, 1).cdf(1.0)  # how often the bonus of position exceeds the strength
    truth = {
        "accuracy": 0.8,
        "flip rate": weaker,
        "flip rate, unequal quality": weaker,
        "consistent verdicts": 1 - weaker,
        "first position": 0.5 + weaker / 2,
        "accuracy, better answer first": 0.8 + 0.2 * weaker,
        "accuracy, better answer second": 0.8 * (1 - weaker),
        "accuracy, one order": 0.8 + (0.2 - 0.8) * weaker / 2,
    }
    found = judge_quality(drawn_judge(0, 20_000), 200)
    assert {key: found[key].value for key in truth} == pytest.approx(truth, abs=0.01)


def test_intervals_follow_the_number_of_questions_and_not_of_pairs():
    base = drawn_judge(7, 40)
    repeated = [{**row, "id": f"{row['id']}-{k}"} for row in base for k in range(10)]
    one, ten = ((judge_quality(each, 2000))["accuracy"] for each in (base, repeated))
    assert ten.n == 10 * one.n
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.15)


def test_the_agreement_of_two_judges_with_independent_errors_has_the_known_kappa():
    """Right with probability p and q on balanced labels: kappa = (2p - 1)(2q - 1)."""
    draw = random.Random(11)
    truth = [draw.choice((1, -1)) for _ in range(900)]

    def judged(right):
        said = [t if draw.random() < right else -t for t in truth]
        return [verdict(k, s, s) for k, s in enumerate(said)]

    found = judges_agree(judged(0.9), judged(0.8)[::-1], 1000)
    assert found["kappa"].n == 900 and found["kappa, one order"].n == 1800
    assert found["kappa"].low < 0.8 * 0.6 < found["kappa"].high
    assert found["agreement"].low < 0.9 * 0.8 + 0.1 * 0.2 < found["agreement"].high
    assert found["kappa"].high - found["kappa"].low < 0.15


def test_agreement_leaves_out_what_one_judge_did_not_say_and_tells_neither_from_a_verdict():
    invalid = {**verdict(0, 1, 1), "outcome": "invalid", "margin": None}
    one = [invalid, verdict(1, 1, 1), verdict(2, 2, -1), verdict(3, -1, -1), verdict(9, 1, 1)]
    two = [verdict(k, 1, 1) for k in range(3)] + [verdict(3, -1, -1)]
    found = judges_agree(one, two, 200)
    assert found["agreement"].n == 3 and found["agreement"].value == pytest.approx(2 / 3)
    assert found["agreement, one order"].value == pytest.approx(5 / 6)
    assert np.isfinite(found["kappa"].value)
