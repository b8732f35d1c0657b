"""Questions, and the answers of models to them, on a small run with the embedded model."""

import pytest

from sao_utils.evaluation.answers import Candidate, answer_questions
from sao_utils.evaluation.questions import questions
from sao_utils.recipes import load_recipe
from sao_utils.store import open_run, read_rows


@pytest.fixture
def run(results):
    small = {"evaluation.questions": "dev", "evaluation.per_combination": 1}
    return open_run("tiny", "answers", small)


def test_test_questions_are_enough_and_apart_from_the_dev_questions():
    test, dev = (
        questions(load_recipe("tiny", {"evaluation.questions": name}).evaluation)
        for name in ("test", "dev")
    )
    assert len(test) >= 800 and len({q["combination"] for q in test}) >= 200
    assert not {q["combination"] for q in test} & {q["combination"] for q in dev}
    assert len({q["id"] for q in test}) == len(test)


def test_every_model_answers_every_question_at_every_temperature_and_rows_say_of_what(run):
    asked = questions(run.recipe.evaluation)[:12]
    twin = run.recipe.model.model_copy(update={"dtype": "auto"})
    models = [Candidate("base", None, run.recipe.model), Candidate("twin", None, twin)]
    answers = answer_questions(run, models, asked, (0.0, 0.6))
    assert len(answers) == 2 * 2 * 12 == len({row["id"] for row in answers})
    for row in answers:
        assert row["good"] == (row["quality"] == 0)
    assert {(row["model"], row["temperature"]) for row in answers} == {
        (name, t) for name in ("base", "twin") for t in (0.0, 0.6)
    }
    on_disk = {row["id"]: row for row in read_rows(run.rows("answers"))}
    facts = ("model", "seed", "round", "temperature", "question_id", "question", "text")
    assert all(on_disk[row["id"]][key] == row[key] for row in answers for key in facts)
    before = run.rows("answers").read_bytes()
    assert answer_questions(run, models, asked, (0.0, 0.6)) == answers
    assert run.rows("answers").read_bytes() == before


def test_an_answer_without_an_oracle_is_neither_good_nor_bad(run):
    asked = [{"id": "q", "question": "Say something about tea.", "combination": "q"}]
    (row,) = answer_questions(run, [Candidate("base", None, run.recipe.model)], asked, (0.0,))
    assert row["good"] is None and row["quality"] is None
