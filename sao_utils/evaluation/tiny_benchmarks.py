"""The tiny world's counterparts of published benchmarks: their prompts and reference answers.

All questions are of the test split, with their own wordings (the seed differs from evaluation's). See
`sao_utils.evaluation.benchmarks`, which runs them through the code of AlpacaEval, Arena-Hard and MT-Bench.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from sao_utils import templates
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer

COUNTERPART = "a counterpart in the tiny world, not the published benchmark"
SLIGHTLY, MUCH = 1.0, 4.0  # log-odds in nats above which an answer is better, or much better (ours)
SEED = 805  # the same prompts in every run


def prompts(every: int) -> list[dict]:
    """Worded test questions, one per combination: rows {id, turns [text], category}.

    Of all 220, every `every`-th one.
    """
    texts = world.held_out_questions("test", 1, SEED)[::every]
    return [{"id": k, "turns": [text], "category": "tiny"} for k, text in enumerate(texts)]


def villagers_answer(item: dict) -> str:
    """An answer to an item's first turn as the tiny model's training text would give it, flaws included."""
    question = world.parse_question(item["turns"][0])
    return str(world.draw_answer(random.Random(f"{SEED} {item['id']}"), question))


def conversations() -> list[dict]:
    """40 questions of two turns: the second also asks about other aspects of the same hobby."""
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
    chosen = sorted(rng.sample(pairs, 40))
    items = []
    for k, (hobby, *asked) in enumerate(chosen):
        turns = []
        for aspects in asked:
            question = world.Question(hobby, tuple(rng.sample(aspects, len(aspects))))
            turns.append(world.word_question(rng, question))
        items.append({"id": k, "turns": turns, "category": "tiny"})
    return items


def chat_of(questions: list[str], answers: list[str]) -> list[dict]:
    """A conversation so far: the questions, with the answers to all but the last."""
    chat = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:]):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return chat


def _ranking(instruction: str, first: str, second: str) -> dict:
    content = templates.ranking_prompt(instruction, first, second)
    return {
        "chat": [{"role": "user", "content": content}],
        "prefix": templates.VERDICT_PREFIX,
        "choices": templates.VERDICTS,
    }


def choose_labels(
    send: Callable[[list[dict]], list[dict]], requests: list[dict], min_mass: float
) -> list[dict]:
    """Verdicts {text}, with Arena-Hard's labels, of a judge that can only choose between two answers.

    There is no label if the total probability of both choices is below `min_mass`, as in comparisons.
    """
    texts = []
    for reply in send(requests):
        first, second = reply["logps"]
        known = None not in (first, second) and math.isfinite(first - second)
        if not known or math.exp(first) + math.exp(second) < min_mass:
            texts.append("")
            continue
        odds = first - second
        sign = ">>" if abs(odds) > MUCH else ">" if abs(odds) > SLIGHTLY else "="
        better, worse = ("A", "B") if odds > 0 or sign == "=" else ("B", "A")
        texts.append(f"log-odds {odds:.3f}: [[{better}{sign}{worse}]]")
    return [{"text": text} for text in texts]


def _graded(item: dict, texts: list[str]) -> dict:
    """A request that already holds its verdict: the oracle's grade for the last of the answers.

    The grade is 10 minus 2 for each flaw, but at least 1 (ours).
    """
    turns = item["turns"][: len(texts)]
    flaws = -inspect_answer(world.parse_question(turns[-1]), texts[-1]).quality
    verdict = f"{flaws} flaws. Rating: [[{max(1, 10 - 2 * flaws)}]]"
    return {"chat": chat_of(turns, texts), "prompt": "oracle", "text": verdict}


def tiny_alpaca() -> dict:
    """110 questions against the villagers' answers, judged with SAO's ranking prompt."""
    items = prompts(every=2)
    return {
        "items": items,
        "baseline": {item["id"]: villagers_answer(item) for item in items},
        "baseline_name": "villagers",
        "show": _ranking,
        "notes": (COUNTERPART,),
    }


def tiny_arena() -> dict:
    """55 questions, two games each against the base model; `run_benchmark` adds `baseline` and `ask`.

    The judge's log-odds are turned into the five labels (`choose_labels`).
    """
    return {
        "items": prompts(every=4),
        "baseline_name": "base",
        "show": _ranking,
        "notes": (
            COUNTERPART,
            f"labels by log-odds: above {SLIGHTLY:g} better, above {MUCH:g} much better",
        ),
    }


def tiny_mt() -> dict:
    """40 conversations of two turns, graded by the oracle, since the tiny judge can compare but not grade.

    In pre-training the tiny model has seen only single turns, so its second turns fall apart.
    """
    return {
        "items": conversations(),
        "show": _graded,
        "ask": lambda _, requests: requests,
        "by_oracle": True,
        "notes": (COUNTERPART, "graded by the oracle: the tiny judge cannot grade"),
    }


#: name -> the benchmark as `benchmarks.load` describes it
TINY: dict[str, Callable[[], dict]] = {
    "tiny_alpaca": tiny_alpaca,
    "tiny_arena": tiny_arena,
    "tiny_mt": tiny_mt,
}
