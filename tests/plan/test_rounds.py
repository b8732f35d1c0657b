"""A plan of several rounds counts each of them."""

import pytest

from sao_utils.plan.rounds import work_of
from sao_utils.recipes import load_recipe

FIRST = {
    "self_rewarding.judged_count": 100,
    "self_rewarding.first": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8},
}


def rows(recipe, stage, part=None):
    return [w.rows for w in work_of(recipe) if w.stage == stage and part in (None, w.part)]


@pytest.mark.parametrize("name", ["tiny-iterations", "tiny-synpo"])
def test_every_round_of_every_seed_writes_its_prompts(name):
    recipe = load_recipe(name, {"rounds": 2, "seeds": [0, 1], "prompts.count": 100})
    assert rows(recipe, "prompts") == [200, 200]
    assert rows(recipe, "prompts", "round 2") == [200]


def test_a_growing_data_set_makes_each_training_larger_than_the_last():
    grows = load_recipe("tiny-iterations", {"iterations.grow": True})
    stays = load_recipe("tiny-iterations", {"iterations.grow": False})
    of = lambda recipe: [rows(recipe, f"training sao-round{k}-0")[0] for k in (1, 2, 3)]  # noqa: E731
    first, second, third = of(grows)
    assert (second, third) == (2 * first, 3 * first)
    assert of(stays) == [first] * 3


def test_synpo_trains_its_generator_once_and_an_improver_each_round():
    stages = [w.stage for w in work_of(load_recipe("tiny-synpo", {"rounds": 3}))]
    assert stages.count("training generator-0") == 1
    assert sum(stage.startswith("training improver") for stage in stages) == 3


def test_topics_are_asked_of_a_judge_that_is_a_real_model_and_of_no_more_than_a_sample():
    server = {"path": "m", "engine": "api", "url": "http://localhost:1/v1", "price_out": 1.0}
    priced = {f"judge.{key}": value for key, value in server.items()}
    real = load_recipe("tiny-synpo", {**priced, "prompts.count": 5000})
    [work] = [work for work in work_of(real) if work.stage == "topics"]
    assert (work.who, work.rows) == ("judge", 1000) and work.dollars[1] > work.dollars[0] > 0
    assert not rows(load_recipe("tiny-synpo"), "topics")


@pytest.mark.parametrize("method", ["sao", "synpo", "sampling_ranking", "self_rewarding"])
def test_at_most_as_many_rows_are_paid_for_as_if_no_prompt_were_dropped(method):
    changes = {"method": method, "rounds": 2, "synpo.scorer": "self", **FIRST}
    if method != "synpo":
        changes |= {"prompts.source": "persona", "prompts.data": None}
    works = work_of(load_recipe("tiny-synpo", changes))
    kept = [w for w in works if w.stage in ("responses", "verdicts", "improved", "scores", "ranks")]
    assert kept and all(work.most_rows > work.rows for work in kept)


def test_where_an_answer_is_imitated_a_training_reads_no_other():
    def read(method, number):
        changes = {"method": method, "rounds": 2, "training.epochs": 2, **FIRST}
        changes |= {"prompts.source": "persona", "prompts.data": None}
        works = work_of(load_recipe("tiny-synpo", changes))
        stage = f"training {method}-round{number}-0"
        return next(work.lengths.read for work in works if work.stage == stage)

    pair = read("sampling_ranking", 1)
    assert [read("sft_random", 2), read("sft_seeds", 1)] == [pair / 2] * 2
    assert [read("self_rewarding", 1), read("self_rewarding", 2)] == [pair / 4, pair]


def test_a_ranking_of_four_answers_compares_every_two_of_them():
    sao, ranked = (
        load_recipe("tiny", {"method": method, "rounds": 2, "prompts.count": 100})
        for method in ("sao", "sampling_ranking")
    )
    assert rows(ranked, "responses") == [2 * n for n in rows(sao, "responses")]
    assert rows(ranked, "verdicts") == [6 * n for n in rows(sao, "verdicts")]


def test_self_rewarding_trains_first_and_then_asks_for_points_of_each_response():
    recipe = load_recipe(
        "tiny-synpo",
        {
            "method": "self_rewarding",
            "rounds": 2,
            "iterations.grow": False,
            "prompts.source": "persona",
            "prompts.data": None,
            **FIRST,
        },
    )
    assert rows(recipe, "responses", "round 1") == [] == rows(recipe, "verdicts", "round 2")
    [responses] = rows(recipe, "responses", "round 2")
    assert rows(recipe, "ranks", "round 2") == [3 * responses]
    assert rows(recipe, "training self_rewarding-round1-0") == [600 + 100]
