"""SynPO and rounds: what the models of a round are trained on, and that a bad improver is stopped."""

import json
from pathlib import Path

import pytest
from small import all_of

from sao_utils import oracles
from sao_utils.engines.reward import rewards
from sao_utils.methods import scorers, synpo
from sao_utils.methods.iterate import first_round, iterate
from sao_utils.methods.rounds import with_adapter
from sao_utils.methods.sao import sao_round
from sao_utils.stages.prompts import StageFailed
from sao_utils.stages.seeds import seed_items
from sao_utils.store import open_run, read_rows

BRIEF = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8}
SMALL = {
    "prompts.count": 24,
    "prompts.min_usable": 0,
    "synpo.seed_count": 16,
    "synpo.generator": BRIEF,
    "synpo.improver": BRIEF,
    "synpo.scorer": "oracle",
    "synpo.threshold": 0,
    "evaluation.per_combination": 1,
    "evaluation.bootstrap": 200,
}


@pytest.fixture
def run(results):
    return open_run("tiny-synpo", "synpo", SMALL)


def test_an_improver_that_breaks_more_than_it_fixes_stops_the_round_before_a_pair_is_made(run):
    with pytest.raises(StageFailed, match="breaks more answers.*synpo.improver"):
        next(iterate(run, 0))
    assert not run.rows("pairs_synpo").exists()


def test_the_improver_learns_gold_answers_only_where_they_beat_the_policys(run):
    synpo.train_improver(run, first_round(run, 0))
    gold = {item["id"]: item["answer"] for item in seed_items(run, 0)}
    assert len(read_rows(run.rows("responses"))) == len(gold)
    folder = run.folder / "adapters" / "improver-round1-0"
    better = [r for r in read_rows(run.rows("responses")) if not is_good(r)]
    assert json.loads((folder / "done.json").read_text())["pairs"] == len(better) < len(gold)


def is_good(row):
    return oracles.quality(row["prompt"], row["text"]) == [0]


def test_a_tenth_of_the_seed_items_is_kept_from_training_where_there_are_no_check_questions(
    results,
):
    run = open_run("tiny-synpo", "split", {**SMALL, "synpo.check": None})
    used, kept = synpo._split(run, 0)
    assert len(used) == 14 and len(kept) == 2
    assert not {item["id"] for item in used} & {item["id"] for item in kept}


def test_a_round_pairs_rewritten_answers_of_the_policy_with_answers_of_the_base(run, monkeypatch):
    this = first_round(run, 0)
    # Models that have seen 16 seeds write no prompts and improve nothing: what is paired is the point.
    monkeypatch.setattr(synpo, "refuse_if_harmful", lambda *_: None)
    asked = [
        {"id": f"{k}", "seed": 0, "round": 0, "prompt": text, "discarded": None}
        for k, text in enumerate(oracles.tiny_paragraphs(12))
    ]
    monkeypatch.setattr(synpo, "write_synthetic_prompts", lambda *_: asked)
    rows = synpo.synpo_round(run, this)
    improved = {row["id"]: row for row in read_rows(run.rows("improved"))}
    responses = {row["id"]: row for row in read_rows(run.rows("responses"))}
    assert rows
    for row in rows:
        chosen, rejected = row["response_ids"]
        assert row["chosen"][0]["content"] == improved[chosen]["text"]
        assert row["rejected"][0]["content"] == responses[rejected]["text"]
    assert synpo.synpo_round(run, this) == rows  # nothing is made anew


def test_the_tiny_worlds_reward_model_prefers_better_answers_and_is_trained_once(run, monkeypatch):
    monkeypatch.setattr(scorers, "TINY_PAIRS", 640)
    model = scorers.train_scorer(run, 0)
    assert model.path == str(run.folder / "adapters" / "reward-0")
    weights = Path(model.path, "model.safetensors").stat().st_mtime_ns
    assert scorers.train_scorer(run, 0) == model
    assert Path(model.path, "model.safetensors").stat().st_mtime_ns == weights
    held_out = oracles.tiny_pairs(200, 1, "dev")
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, *answers in held_out
        for answer in answers
    ]
    found = all_of(rewards(model, chats))
    right = [found[2 * k] > found[2 * k + 1] for k in range(len(held_out))]
    assert sum(right) / len(right) > 0.6


def sao_run(name, **changes):
    small = {"prompts.count": 60, "rounds": 2, "training.probe_steps": 0, "pairs.min_margin": 0}
    return open_run("tiny", name, {**small, **changes})


def test_each_round_is_made_by_the_model_of_the_one_before_and_trains_the_base(results):
    run = sao_run("iterated")
    first, second = iterate(run, 0)
    assert [first.candidate.round, second.candidate.round] == [1, 2]
    assert {row["round"] for row in first.pairs} == {0}
    assert {row["round"] for row in second.pairs} == {1}
    assert second.judge == first.candidate.model  # "current"
    assert second.candidate.model.path == run.recipe.model.path
    models = {row["round"]: row["model"] for row in read_rows(run.rows("responses"))}
    assert models[0] == "tiny" and models[1] == first.candidate.model.label
    personas = {r["persona"]: r["round"] for r in read_rows(run.rows("prompts"))}
    assert len(personas) > 100  # other personas in each round


def test_with_start_previous_the_second_training_goes_on_from_the_first_rounds_model(results):
    run = sao_run("goes-on", **{"iterations.start": "previous", "iterations.grow": False})
    first, second = iterate(run, 0)
    fresh = sao_run("begins-anew", **{"iterations.grow": False})
    same, anew = iterate(fresh, 0)
    kept = [[row["id"] for row in one.pairs] for one in (first, second, same, anew)]
    assert kept[0] == kept[2]
    logs = [read_rows(Path(one.candidate.model.adapter) / "log.jsonl")[0] for one in (second, anew)]
    assert logs[0]["loss"] != logs[1]["loss"]


@pytest.mark.parametrize("grow", [True, False])
def test_a_data_set_grows_or_does_not(results, grow):
    run = sao_run(f"grows-{grow}", **{"iterations.grow": grow})
    first, second = iterate(run, 0)
    new = [sum(row["discarded"] is None for row in one.pairs) for one in (first, second)]
    done = json.loads((run.folder / "adapters" / "sao-round2-0" / "done.json").read_text())
    assert done["pairs"] == (sum(new) if grow else new[1])


def test_a_method_of_ones_own_is_a_function_of_a_run_and_a_round(results):
    run = sao_run("own", rounds=1)
    seen = []

    def method(run, this):
        seen.append(this)
        return sao_round(run, this)

    [made] = iterate(run, 0, "mine", method)
    assert seen == [first_round(run, 0)]
    assert made.candidate.model == with_adapter(
        run.recipe.model, run.folder / "adapters" / "mine-round1-0"
    )
