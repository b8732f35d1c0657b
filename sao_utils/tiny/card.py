"""Measure the embedded model and write its card: `python -m sao_utils.tiny.card`."""

from __future__ import annotations

import json
from pathlib import Path

from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_folder
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.questions import questions
from sao_utils.report import results
from sao_utils.stages.judging import oracle_quality, verdict_rows
from sao_utils.store import Run, open_run, row_id, seed_of, write_whole

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

`python -m sao_utils.tiny.pretrain`: from random weights, on text that the village's grammar makes on
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

`python -m sao_utils.tiny.card` makes this table. 95 % intervals, bootstrapped over the question
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

MEASURES = {
    "oracle_good_rate.base": "good answers to held-out questions, greedy",
    "oracle_good_rate_t0.6.base": "good answers to held-out questions, T = 0.6",
    "prompts.parsed": "replies to the persona template that parse",
    "self_judge.accuracy": "judge accuracy on its own pairs",
    "self_judge.accuracy_one_order": "judge accuracy, one order alone",
    "self_judge.consistent_rate": "both orders agree",
    "self_judge.first_position_rate": "the answer shown first wins",
    "self_judge.longer_chosen": "the judge prefers the longer answer",
    "self_judge.longer_better": "the oracle prefers the longer answer",
    "self_judge.valid_rate": "valid verdicts",
}


def held_out_pairs(run: Run) -> list[dict]:
    """Two sampled answers of the model to each held-out question, judged in both orders."""
    asked = questions(run)
    engine = load_engine(run.recipe.model)
    chats = [[{"role": "user", "content": q["question"]}] for q in asked for _ in range(2)]
    seeds = [seed_of(row_id("card", q["id"], sample)) for q in asked for sample in range(2)]
    sampling = Sampling(run.recipe.responses.temperature, run.recipe.responses.max_new_tokens)
    made = dict(pair for batch in engine.generate(chats, sampling, seeds) for pair in batch)
    pairs = []
    for k, q in enumerate(asked):
        a, b = made[2 * k], made[2 * k + 1]
        pairs.append(
            {
                "id": row_id("card", q["id"]),
                "prompt": q["question"],
                "responses": [a.text, b.text],
                "lengths": [a.tokens, b.tokens],
                "quality": oracle_quality(q["question"], a.text, b.text),
            }
        )
    return verdict_rows(run, "held-out-verdicts", pairs)


def main() -> None:
    """Measure on held-out questions and held-out personas, and write the card beside the weights."""
    settings = {"arms": [], "personas.count": 2000, "evaluation.per_combination": 8}
    run = open_run("tiny", "tiny-card", settings)
    found = {
        **results.good_rates(run),
        **results.prompt_scores(run),
        **results.judge_quality(held_out_pairs(run)),
    }
    rows = [
        f"| {label} | {results.in_words(key, found[key])} % | {found[key].n} |"
        for key, label in MEASURES.items()
    ]
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


if __name__ == "__main__":
    main()
