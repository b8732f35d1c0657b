"""The embedded model's card: what it does on held-out questions, measured."""

from __future__ import annotations

import json
from pathlib import Path

from sao_utils.disk import write_whole
from sao_utils.engines.loading import model_folder
from sao_utils.evaluation.judge_quality import judge_quality
from sao_utils.evaluation.questions import questions
from sao_utils.report.results import results
from sao_utils.report.table import value_of
from sao_utils.report.words import interval_in_words
from sao_utils.stages.judging import judge_pairs, response_pairs
from sao_utils.stages.responses import write_responses
from sao_utils.store import Run, open_run, row_id

CARD = """---
license: mit
language: en
pipeline_tag: text-generation
---
# The tiny model

An ordinary Llama-architecture language model of 1.2 million parameters that knows one thing: the
hobbies of an invented village (`sao_utils/oracles/tiny_world.py`). It answers questions about them, mostly
as badly as the text that it learned from; it writes the questions that a persona would ask; and it
ranks two answers with the SAO paper's prompt. It is the model with which the whole self-alignment
loop runs on any laptop. **It proves nothing about large models.**

## How it was made

`python -m sao_utils.tiny pretrain`: from random weights, on text that the village's grammar makes on
the fly (no corpus, no other model's output), {tokens} tokens (padding included), seed 0; it took
{minutes} minutes on one busy core of a 2-core CPU. The losses are in `pretraining.jsonl`. 300 of the
800 question combinations (hobby and things asked) and a quarter of the personas were held out: 80
combinations for choosing settings, 220 for testing.

Its judgement did not emerge: the ranking items of its pre-training carried the oracle's verdict, and
auxiliary losses on heads that were thrown away afterwards told it which sentences were right.
Every fact was seen in pre-training; what is new in the tests is their combination.

The tokenizer is byte-level BPE; each fixed line of the prompt templates is one token, so that the
paper's ranking prompt, unchanged as text, takes about 85 tokens with two answers. The context is
2,048 tokens. The weights are kept in bfloat16.

## What it does, measured

`python -m sao_utils.tiny card` makes this table. 95 % intervals, bootstrapped over the question
combinations (over personas for the replies that parse). The judge of "good" (no flaw at all) and of
"better" (fewer flaws) is the world's exact oracle.

| measure | value [95 % interval] | n |
|---|---|---|
{table}

Accuracy is measured on pairs of the model's own answers to held-out questions, sampled at T = 0.6,
that differ in their number of flaws; by the mean margin of both orders unless said otherwise. "The
judge prefers the longer answer" is to be read beside what the oracle says of the same pairs.

## Limits

English sentences of one small grammar. It knows the roles user and assistant, no system role.
Whatever it is asked, it answers from within its village.
"""

#: what the card says -> section and metric of the table of results, temperature
OF_THE_RUN = {
    "good answers to held-out questions, greedy": ("quality", "good answers", 0.0),
    "good answers to held-out questions, T = 0.6": ("quality", "good answers", 0.6),
    "replies to the persona template that parse": ("prompts", "usable replies", None),
}
#: what the card says -> metric of `judge_quality`
OF_THE_JUDGE = {
    "judge accuracy on its own pairs": "accuracy",
    "judge accuracy, one order alone": "accuracy, one order",
    "both orders agree": "consistent verdicts",
    "the answer shown first wins": "first position",
    "the judge prefers the longer answer": "longer answer chosen",
    "the oracle prefers the longer answer": "longer answer better",
    "valid verdicts": "valid verdicts",
}


def held_out_pairs(run: Run) -> list[dict]:
    """Two sampled answers of the model to each held-out question, judged in both orders."""
    prompts = [
        {
            "id": row_id("card", q["id"]),
            "seed": 0,
            "round": 1,
            "prompt": q["question"],
            "discarded": None,
        }
        for q in questions(run.recipe.evaluation)
    ]
    pairs = response_pairs(write_responses(run, prompts, run.recipe.model))
    return judge_pairs(run, pairs, run.recipe.model, "card_verdicts")


def write_card() -> None:
    """Measure on held-out questions and held-out personas, and write the card beside the weights."""
    changes = {"arms": [], "prompts.count": 2000, "evaluation.per_combination": 8}
    run = open_run("tiny", "tiny-card", changes)
    table = results(run, "quality", "prompts")
    found = {
        label: value_of(
            table, section=section, metric=metric, model="base", temperature=temperature
        )
        for label, (section, metric, temperature) in OF_THE_RUN.items()
    }
    judged = judge_quality(held_out_pairs(run))
    found |= {label: judged[metric] for label, metric in OF_THE_JUDGE.items()}
    rows = [f"| {label} | {interval_in_words(one)} | {one.n} |" for label, one in found.items()]
    folder = Path(model_folder("tiny"))
    lines = (folder / "pretraining.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    card = CARD.format(
        tokens=f"{last['tokens'] / 1e6:.0f} million",
        minutes=f"{last['seconds'] / 60:.0f}",
        table="\n".join(rows),
    )
    write_whole(folder / "README.md", card)
    print("\n".join(rows))
