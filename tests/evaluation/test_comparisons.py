"""Comparisons of two models' answers by any judge, and what verdicts add up to."""

import math
import random

import pytest

from sao_utils.evaluation import comparisons
from sao_utils.evaluation.comparisons import (
    compare_answers,
    difference_in_win_rate,
    rate,
    rate_at_equal_length,
    remarks,
    scores,
    strengths,
)
from sao_utils.statistics.length_control import length_controlled_win_rate
from sao_utils.store import open_run, read_rows


def answers(model, texts, seed=None):
    return [
        {
            "id": f"{model}{seed}{k}",
            "model": model,
            "seed": seed,
            "round": 0,
            "temperature": 0.0,
            "question_id": f"q{k}",
            "question": f"What is tea, number {k}?",
            "combination": f"c{k}",
            "text": text,
            "tokens": len(text.split()),
        }
        for k, text in enumerate(texts)
    ]


def made(outcomes, model="self", opponent="base", judge="self", seed=None, clusters=None):
    """Rows of a comparison: "won", "lost", "flips", "tie", "identical" or "invalid"."""
    margins = {"won": (2, 2), "lost": (-2, -2), "flips": (2, -1), "tie": (0, 0)}
    rows = []
    for k, outcome in enumerate(outcomes):
        m12, m21 = margins.get(outcome, (None, None))
        name = {"won": "consistent", "lost": "consistent", "flips": "inconsistent"}
        row = {
            "model": model,
            "opponent": opponent,
            "judge": judge,
            "seed": seed,
            "question_id": f"q{k}",
            "combination": clusters[k] if clusters else f"c{k}",
            "prompt": f"P{k}",
            "responses": [f"a longer answer {k}", f"answer {k}"],
            "outcome": name.get(outcome, outcome),
            "margin": None if m12 is None else (m12 + m21) / 2,
            "margin_12": m12,
            "margin_21": m21,
        }
        rows.append({**row, "win": comparisons._win(row)})
    return rows


def test_answers_are_paired_by_question_and_seed_and_judged_in_both_orders(results):
    run = open_run("tiny", "pairs")
    base = answers("base", ["A net.", "A bow.", "Same."])
    tuned = answers("self", ["A boat.", "A rod.", "Same."], 0)
    tuned += answers("self", ["An oar.", "A rod.", "Other."], 1)
    rows = compare_answers(run, tuned, base, "self", run.recipe.model)
    assert [(row["seed"], row["question_id"]) for row in rows] == [
        (seed, f"q{k}") for seed in (0, 1) for k in range(3)
    ]
    assert {row["opponent"] for row in rows} == {"base"}
    same = [row for row in rows if row["outcome"] == "identical"]
    assert [(row["seed"], row["win"]) for row in same] == [(0, 0.5)]
    for row in rows:
        if row["outcome"] == "consistent":
            assert row["win"] == float(row["margin"] > 0)
    kept = read_rows(run.rows("comparisons"))
    assert len(kept) == 2 * 5 and {row["order"] for row in kept} == {"12", "21"}
    assert compare_answers(run, tuned, base, "self", run.recipe.model) == rows


def test_a_win_rate_counts_what_flips_or_ties_half_and_leaves_invalid_verdicts_out():
    rows = made(["won", "won", "lost", "flips", "tie", "identical", "invalid"])
    found = scores(rows, 200)
    assert rate(rows).value == pytest.approx((2 + 3 * 0.5) / 6)
    shares = ("won in both orders", "orders disagree", "ties", "identical answers")
    assert [round(6 * found[name].value) for name in shares] == [3, 1, 1, 1]
    assert found["valid verdicts"].value == pytest.approx(6 / 7)
    assert found["length difference"].value == 9
    assert found["first position"].value == pytest.approx((1 + 1 + 1 + 2 + 1) / 10)


def test_the_win_rate_at_equal_length_is_that_of_the_fit_in_characters():
    rng = random.Random(0)
    rows = made([rng.choice(["won", "lost"]) for _ in range(60)])
    for row in rows:
        row["responses"] = ["x" * rng.randint(1, 90), "y" * rng.randint(1, 90)]
    lengths = [len(a) - len(b) for a, b in (row["responses"] for row in rows)]
    clusters = [row["combination"] for row in rows]
    expected = length_controlled_win_rate([row["win"] for row in rows], lengths, clusters)
    assert rate_at_equal_length(rows).value == pytest.approx(expected.value)


@pytest.mark.parametrize(
    "outcomes",
    [["won"], ["tie"] * 5, ["identical"] * 5, ["invalid"] * 5, ["flips"] * 5, ["won"] * 5],
    ids=["one question", "ties", "identical", "invalid", "flips", "won"],
)
@pytest.mark.parametrize("one_cluster", [False, True])
def test_what_cannot_be_estimated_raises_nothing(outcomes, one_cluster):
    rows = made(outcomes, clusters=["same"] * len(outcomes) if one_cluster else None)
    found = scores(rows, 200)
    assert found["valid verdicts"].n == len(rows)
    assert ("ties" in found) == (outcomes[0] != "invalid")
    if one_cluster:
        assert math.isnan(rate(rows).low) and rate(rows).note
    remarks(rows)
    strengths([rows], 50)
    difference_in_win_rate(rows, rows, 50)
    rate_at_equal_length(rows)


def test_a_difference_in_win_rate_is_paired_by_question_over_all_trainings_and_each():
    a = made(["won", "won", "lost", "won"] * 5, seed=0) + made(["won", "lost"] * 10, seed=1)
    b = made(["lost", "won", "lost", "lost"] * 5, model="random", seed=0)
    b += made(["lost", "lost"] * 10, model="random", seed=1)
    found = difference_in_win_rate(a, b, 300)
    assert set(found) == {None, 0, 1}
    assert found[0].value == pytest.approx(0.5) and found[1].value == pytest.approx(0.5)
    assert found[None].value == pytest.approx(0.5) and found[None].low > 0
    one = difference_in_win_rate(made(["won"] * 9), made(["invalid"] * 9), 50)
    assert one == {}


def test_strengths_order_models_by_whom_they_beat():
    games = [made(["won"] * 8 + ["lost"] * 4), made(["won"] * 6 + ["lost"] * 6, model="random")]
    found = strengths(games, 200)
    assert list(found)[0] == "self" and found["base"].elo.value == 1000
    assert found["self"].win_rate.value > 0.5 and strengths([made(["invalid"] * 3)], 50) == {}


def test_remarks_name_a_judge_that_fails_and_empty_answers():
    rows = made(["invalid"] * 3 + ["won"] * 7)
    assert "no valid verdict on 3 of 10" in remarks(rows)[0]
    first = [{**row, "margin_12": 2, "margin_21": -2} for row in made(["flips"] * 10)]
    assert any("shown first in 100%" in text for text in remarks(first))
    rows = made(["won", "lost"] * 5)
    rows[0]["responses"] = [" ", "b"]
    assert remarks(rows) == ["1 of 10 answers of 'self' are empty."]
