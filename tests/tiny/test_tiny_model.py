"""What the committed tiny model must be able to do, on questions that it never saw."""

import pytest

from sao_utils import store as rows
from sao_utils.engines.base import Sampling
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.judge_quality import judge_quality
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.recipes import load_recipe
from sao_utils.tiny import card as tiny_card

QUESTIONS = 200


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny", {"evaluation.per_combination": 1, "evaluation.bootstrap": 500})


def test_greedy_answers_leave_room_above(recipe):
    engine = load_engine(recipe.model)
    asked = world.held_out_questions("test", 1, seed=7)[:QUESTIONS]
    chats = [[{"role": "user", "content": text}] for text in asked]
    good = 0
    for batch in engine.generate(chats, Sampling(0.0, 128), [0] * len(chats)):
        for k, reply in batch:
            good += inspect_answer(world.parse_question(asked[k]), reply.text).good
    assert 0.3 < good / len(asked) < 0.7


def test_the_judge_is_right_on_its_own_pairs_of_held_out_questions(recipe, tmp_path):
    run = rows.Run(recipe, tmp_path)
    found = judge_quality(tiny_card.held_out_pairs(run, recipe.model), 500)
    assert found["accuracy"].low > 0.9 and found["accuracy"].n > 50
    assert found["valid verdicts"].value > 0.95
    early = recipe.model.model_copy(update={"path": "tiny-early"})
    worse = judge_quality(tiny_card.held_out_pairs(run, early), 500)
    assert 0.5 < worse["accuracy"].value < worse["accuracy"].high < found["accuracy"].low
    assert worse["valid verdicts"].value > 0.95
