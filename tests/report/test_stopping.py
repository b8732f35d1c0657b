"""Rules that stop the rounds without an oracle, and whether they were right."""

import pytest

from sao_utils.evaluation.answers import Candidate
from sao_utils.methods.iterate import Trained
from sao_utils.report.stopping import Signs, decisions, signs_of, stopping_rows, stops
from sao_utils.store import open_run

BEFORE = Signs(flips=0.2, margin=3.0, base_agrees=0.9)


@pytest.mark.parametrize(
    "now, expected",
    [
        (Signs(0.3, 3.0, 0.9), {"flip rate rises"}),
        (Signs(0.2, 2.0, 0.8), {"margins shrink", "base agrees less", "two of the three"}),
        (BEFORE, set()),
    ],
)
def test_a_rule_stops_where_its_sign_shows(now, expected):
    found = stops(BEFORE, now)
    assert {rule for rule, stop in found.items() if stop} == expected
    assert "never stop" in found


def pair(k, outcome, margin, discarded=None):
    texts = ("Go to the barn. Good luck!", "Nothing at all.")
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "id": f"pair {k}",
        "prompt": [{"role": "user", "content": "Can you explain where to go for chess?"}],
        "chosen": messages[0],
        "rejected": messages[1],
        "outcome": outcome,
        "margin": margin,
        "discarded": discarded,
    }


@pytest.fixture
def run(results):
    return open_run("tiny-iterations", "stopping", {"rounds": 2})


def test_signs_are_of_judged_pairs_and_the_base_is_asked_about_those_that_are_used(run):
    pairs = [
        pair(0, "consistent", 4.0),
        pair(1, "inconsistent", 1.0, "orders disagree"),
        pair(2, "identical", None, "identical answers"),
    ]
    found = signs_of(run, pairs, run.recipe.model)
    assert (found.flips, found.margin) == (0.5, 2.5)
    assert found.base_agrees in (0, 1)  # one pair
    turned = {**pairs[0], "id": "turned", "chosen": pairs[0]["rejected"]}
    turned["rejected"] = pairs[0]["chosen"]
    assert signs_of(run, [turned], run.recipe.model).base_agrees == 1 - found.base_agrees
    assert signs_of(run, pairs[1:], run.recipe.model) is None


def test_a_decision_is_right_if_it_stops_before_a_worse_model_or_goes_on_to_one_as_good(run):
    rounds = [[pair(0, "consistent", 4.0)], [pair(0, "consistent", 3.0)]]  # margins shrink
    trained = [
        Trained(Candidate("sao", 0, run.recipe.model, k), run.recipe.model, pairs)
        for k, pairs in enumerate(rounds, 1)
    ]
    answers = [
        {"model": "sao", "seed": 0, "round": number, "good": good}
        for number, all_good in ((1, (True, True)), (2, (True, False)))
        for good in all_good
    ]
    made = list(decisions(run, trained, answers))
    assert {row["round"] for row in made} == {2} and all(row["worse"] for row in made)
    rows = stopping_rows([{**row, "member": "m"} for row in made])
    right = {row["model"]: row["value"] for row in rows}
    assert right["margins shrink"] == 1 and right["never stop"] == right["flip rate rises"] == 0

    unknown = [{**row, "good": None} for row in answers]
    assert not list(decisions(run, trained, unknown))
