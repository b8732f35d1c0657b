"""Scorers give one number each: how much better the first response is."""

import itertools
import math

import pytest
import torch
from scripted_server import reply, settings

from sao_utils import templates
from sao_utils.engines.base import EngineError
from sao_utils.engines.loading import load_tokenizer
from sao_utils.recipe import Model
from sao_utils.stages.judging import judge_pairs, side_by_side
from sao_utils.stages.pairs import build_scored_pairs
from sao_utils.stages.scoring import Scorer, best_and_worst, repetition, score_gaps
from sao_utils.store import open_run, read_rows

QUESTION = "Can you explain the right tool and where to go for chess?"
ANSWERS = (
    "Bring a kettle for chess. Good luck!",
    "Go to the barn. Good luck!",
    "Nothing at all.",
    "Bring a kettle for chess.",
)


@pytest.fixture
def run(results):
    return open_run("tiny-synpo", "scoring")


def response(k, text, prompt="p"):
    return {
        "id": f"{prompt}{k}",
        "prompt_id": prompt,
        "seed": 0,
        "round": 0,
        "prompt": QUESTION,
        "text": text,
        "tokens": len(text.split()),
        "finished": True,
    }


@pytest.fixture
def pairs():
    rows = [response(k, text) for k, text in enumerate(ANSWERS)]
    return side_by_side(itertools.combinations(rows, 2))


def test_the_oracle_scores_by_the_difference_of_flaws(run, pairs):
    for row in score_gaps(run, pairs, Scorer("oracle")):
        assert row["gap"] == row["quality"][0] - row["quality"][1]


def test_a_judge_scores_by_its_margin(run, pairs):
    judge = run.recipe.model
    scored = score_gaps(run, pairs, Scorer("judge", judge))
    assert [row["gap"] for row in scored] == [
        row["margin"] for row in judge_pairs(run, pairs, judge)
    ]
    assert any(row["gap"] for row in scored)


def classifier(folder, outputs=1):
    """A small sequence classifier with random weights and a padding of its own, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = load_tokenizer(Model(path="tiny"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=outputs,
        pad_token_id=1,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_reward_model_scores_by_its_rewards_which_are_kept(run, pairs, tmp_path):
    model, tokenizer = classifier(tmp_path)
    scored = score_gaps(
        run, pairs, Scorer("reward", Model(path=str(tmp_path), dtype="float32", batch_tokens=64))
    )

    def reward(text):
        chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        return model(input_ids=ids["input_ids"]).logits.item()

    for row in scored:
        a, b = row["responses"]
        assert row["gap"] == pytest.approx(reward(a) - reward(b), abs=1e-5)
    assert len(read_rows(run.rows("scores"))) == len(ANSWERS)  # each response once


def test_a_reward_that_is_no_number_is_no_score(run, pairs, tmp_path):
    model, tokenizer = classifier(tmp_path)
    model.model.embed_tokens.weight.data[tokenizer("N")["input_ids"]] = math.nan
    model.save_pretrained(tmp_path)
    scored = score_gaps(run, pairs, Scorer("reward", Model(path=str(tmp_path), dtype="float32")))
    assert [row["gap"] is None for row in scored] == [
        ANSWERS[2] in row["responses"] for row in scored
    ]


def test_a_judges_points_are_the_mean_of_its_replies_and_no_score_is_no_gap(results, pairs, server):
    run = open_run("tiny-synpo", "points", {"points.samples": 2})
    judge = Scorer("points", settings(server))
    given = ["Short. Score: 4", "Score: 2, no: score: 3", "It is fine.", "**Score:** 1"]
    for text, written in zip(ANSWERS, given):
        asked = templates.points_prompt("points", QUESTION, text)
        server.answers[asked] = [(200, reply(written), {})]
    rows = score_gaps(run, pairs, judge)
    points = dict(zip(ANSWERS, (4, None, None, 1)))
    for row in rows:
        a, b = (points[text] for text in row["responses"])
        assert row["gap"] == (None if None in (a, b) else a - b)
    kept = read_rows(run.rows("scores"))
    assert sorted(row["text"] for row in kept) == sorted(given * 2)  # those without a score, too

    responses = [response(k, text) for k, text in enumerate(ANSWERS)]
    [pair] = best_and_worst(run, responses, judge, "scores")
    assert (pair["responses"], pair["gap"]) == ([ANSWERS[0], ANSWERS[3]], 2 * 3)
    [none] = best_and_worst(run, responses[1:3], judge, "scores")
    assert none["gap"] is None


def test_a_model_that_is_no_reward_model_is_refused_with_what_to_take(run, pairs, tmp_path):
    classifier(tmp_path, outputs=2)
    for path in (str(tmp_path), "tiny"):  # two outputs; and a language model without a head
        with pytest.raises(EngineError, match="one output.*such as"):
            score_gaps(run, pairs, Scorer("reward", Model(path=path)))


def test_the_best_and_worst_of_several_are_those_with_fewest_and_most_flaws(run):
    rows = [response(k, text, prompt) for prompt in "pq" for k, text in enumerate(ANSWERS)]
    found = best_and_worst(run, rows, Scorer("oracle"))
    quality = score_gaps(run, side_by_side(itertools.combinations(rows[:4], 2)), Scorer("oracle"))
    every = sorted({value for row in quality for value in row["quality"]})
    assert [row["prompt_id"] for row in found] == ["p", "q"]
    assert all(row["quality"] == [every[-1], every[0]] for row in found)
    # The mean gap to three others, of the best minus of the worst: 4/3 of their difference in score.
    assert found[0]["gap"] == pytest.approx(4 / 3 * (every[-1] - every[0]))


@pytest.mark.parametrize(
    "text, share",
    [("", 0), ("one two three", 0), ("a b c a b c", 1 / 4), ("so so so so so so", 3 / 4)],
)
def test_repetition_is_the_share_of_runs_of_three_words_that_came_before(text, share):
    assert repetition(text) == pytest.approx(share)


def scored(k, **changes):
    row = side_by_side([(response("a", ANSWERS[0], f"p{k}"), response("b", ANSWERS[2], f"p{k}"))])[
        0
    ]
    return {**row, "gap": 3.0, "outcome": None, "margin": None, **changes}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"gap": None}, "not scored"),
        ({"gap": 2.0}, "gap too small"),
        ({"responses": ["so so so so so so", "Good luck!"]}, "repetitive"),
        ({"responses": ["Good luck!", "Good luck!"]}, "identical answers"),
        ({"finished": [True, False]}, "cut off"),
    ],
)
def test_each_pair_that_is_dropped_names_its_reason(run, changes, reason):
    row = build(run, [scored(0, **changes)])[0]
    assert row["discarded"] == reason
    assert row["chosen"][0]["content"] == {**scored(0), **changes}["responses"][0]


def build(run, rows, **changes):
    settings = run.recipe.synpo.model_copy(update=changes)
    return build_scored_pairs(run, rows, run.recipe.model, "synpo", settings)


def test_of_more_pairs_than_wanted_some_are_drawn_and_the_others_counted(run):
    rows = build(run, [scored(k) for k in range(20)], max_pairs=5)
    assert sorted(row["discarded"] or "" for row in rows) == [""] * 5 + ["not drawn"] * 15
    assert len(read_rows(run.rows("pairs_synpo"))) == 5


def test_the_pairs_of_a_round_stand_beside_those_of_others_and_in_the_place_of_its_own(run):
    first = [scored(k) for k in range(3)]
    build(run, first)
    build(run, [{**row, "round": 1} for row in first])
    build(run, first[:2])
    assert [row["round"] for row in read_rows(run.rows("pairs_synpo"))] == [0, 0, 1, 1, 1]
