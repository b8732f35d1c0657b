"""The tiny world's counterparts of published benchmarks: their prompts and reference answers.

All questions are of the test split, in wordings of their own (a seed apart from evaluation's), one
a combination. See `sao_utils.evaluation.benchmarks`, which runs them through the code of AlpacaEval,
Arena-Hard and MT-Bench.
"""

from __future__ import annotations

import random

from sao_utils.oracles import tiny_world as world

SEED = 805  # the same prompts in every run
VILLAGERS = "villagers"  # who answers as the text does that the tiny model learnt from
FLAW = 2  # points that a flaw costs of ten


def prompts(every: int) -> list[dict]:
    """Worded test questions: rows {id, turns [text], category}; each `every`-th of all 220."""
    texts = world.held_out_questions("test", 1, SEED)[::every]
    return [_item(k, [text]) for k, text in enumerate(texts)]


def villagers_answer(item: dict) -> str:
    """The villagers' answer to an item's first turn, flaws and all; always the same."""
    question = world.parse_question(item["turns"][0])
    return str(world.draw_answer(random.Random(f"{SEED} {item['id']}"), question))


def conversations(count: int = 40) -> list[dict]:
    """Two-turn questions: the second asks other things about the same hobby."""
    rng = random.Random(SEED)
    of_hobby: dict[str, list[tuple[str, ...]]] = {}
    for (hobby, aspects), split in sorted(world.SPLIT.items()):
        if split == "test":
            of_hobby.setdefault(hobby, []).append(aspects)
    pairs = [
        (hobby, first, second)
        for hobby, asked in of_hobby.items()
        for first in asked
        for second in asked
        if not set(second) <= set(first)
    ]
    chosen = sorted(rng.sample(pairs, count))
    return [
        _item(k, [_worded(rng, hobby, first), _worded(rng, hobby, second)])
        for k, (hobby, first, second) in enumerate(chosen)
    ]


def oracle_grade(item: dict, texts: list[str]) -> str:
    """The oracle's grade of the last of some answers, from 1 to 10, written as a judge would.

    10 less 2 for each flaw, at least 1 (ours).
    """
    question = world.parse_question(item["turns"][len(texts) - 1])
    flaws = -world.inspect_answer(question, texts[-1]).quality
    return f"{flaws} flaws. Rating: [[{max(1, 10 - FLAW * flaws)}]]"


def _worded(rng: random.Random, hobby: str, aspects: tuple[str, ...]) -> str:
    return world.word_question(rng, world.Question(hobby, tuple(rng.sample(aspects, len(aspects)))))


def _item(identity: int, turns: list[str]) -> dict:
    asked = len(world.parse_question(turns[0]).aspects)
    return {"id": identity, "turns": turns, "category": {2: "two_things", 3: "three_things"}[asked]}
