"""SAO's steps, put together: any stage by name, the funnel, training, and what is compared."""

import dataclasses

import pytest

from sao_utils.methods import evaluate, sao
from sao_utils.recipe import RecipeError
from sao_utils.store import open_run, read_rows
from sao_utils.training import TrainingFailed


def test_a_stage_asked_for_alone_makes_those_before_it_and_no_later_one(results):
    run = open_run("tiny", "alone", {"prompts.count": 24})
    sao.rows(run, "responses")
    assert {path.stem for path in run.rows("x").parent.glob("*.jsonl")} == {"prompts", "responses"}


def test_the_steps_come_in_the_order_of_algorithm_1(small_run):
    names = [name for name, _ in sao.steps(small_run, *[small_run.recipe.model] * 2)]
    assert names == ["personas", "prompts", "responses", "verdicts", "pairs"]


def test_another_judge_and_another_policy_are_handed_in_and_need_no_new_stage(small_run, tmp_path):
    run = dataclasses.replace(small_run, folder=tmp_path)
    other = run.recipe.model.model_copy(update={"dtype": "bfloat16"})
    made = dict(sao.steps(run, other, run.recipe.model))
    usual = dict(sao.steps(small_run, small_run.recipe.model, small_run.recipe.model))
    assert {row["id"] for row in made["responses"]}.isdisjoint(
        row["id"] for row in usual["responses"]
    )
    assert len(made["pairs"]) == len(made["verdicts"]) > 0


def test_the_funnel_adds_up_from_what_was_asked_for_to_the_pairs(small_run):
    counts = sao.funnel(small_run)
    total = {label: count for label, count in counts if count > 0}
    at = [label for label, _ in counts].index("prompts")
    assert total["asked for"] + sum(c for _, c in counts[1:at]) == total["prompts"]
    assert total["prompts"] + sum(c for _, c in counts[at + 1 : -1]) == counts[-1][1]


def test_an_arm_without_pairs_says_what_became_of_them(results):
    run = open_run("tiny", "none", {"prompts.count": 24, "pairs.min_margin": 1000})
    with pytest.raises(TrainingFailed, match="no pairs.*margin too small.*pairs.min_margin"):
        sao.train(run, "self", 0)


def test_a_trained_arm_is_found_again_and_pairs_are_not_built_anew(results, monkeypatch):
    run = open_run("tiny", "trained", {"prompts.count": 60, "training.probe_steps": 0})
    folder = sao.train(run, "self", 0)
    assert read_rows(folder / "log.jsonl")
    monkeypatch.setattr(sao, "build_pairs", None)  # would raise
    assert sao.train(run, "self", 0) == folder
    names = [(c.name, c.seed, c.model.adapter) for c in sao.candidates(run, ["base", "self"])]
    assert names == [("base", None, None), ("self", 0, str(folder))]


def test_a_model_that_is_not_there_cannot_be_compared(small_run):
    with pytest.raises(RecipeError, match="There is no model 'slef'.*base, self"):
        sao.candidates(small_run, ["slef"])
    with pytest.raises(RecipeError, match="There is no judge 'gpt'"):
        evaluate.comparison(small_run, "self", "base", "gpt")
    with pytest.raises(RecipeError, match="compared with itself"):
        evaluate.comparison(small_run, "base", "base")
