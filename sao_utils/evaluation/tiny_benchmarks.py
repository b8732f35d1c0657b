"""The tiny world's counterparts of published benchmarks: their prompts and reference answers.

All questions are of the test split, in wordings of their own (a seed apart from evaluation's), one
a combination. See `sao_utils.evaluation.benchmarks`, which runs them through the code of AlpacaEval,
Arena-Hard and MT-Bench.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

from sao_utils import templates
from sao_utils.evaluation import alpaca_eval
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer

COUNTERPART = "a counterpart in the tiny world, not the published benchmark"
SLIGHTLY, MUCH = 1.0, 4.0  # log-odds in nats from which an answer is better, much better (ours)
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
    flaws = -inspect_answer(question, texts[-1]).quality
    return f"{flaws} flaws. Rating: [[{max(1, 10 - FLAW * flaws)}]]"


def _worded(rng: random.Random, hobby: str, aspects: tuple[str, ...]) -> str:
    return world.word_question(rng, world.Question(hobby, tuple(rng.sample(aspects, len(aspects)))))


def _item(identity: int, turns: list[str]) -> dict:
    asked = len(world.parse_question(turns[0]).aspects)
    return {"id": identity, "turns": turns, "category": {2: "two_things", 3: "three_things"}[asked]}


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


def tiny_alpaca() -> dict:
    items = prompts(every=2)
    return {
        "items": items,
        "baseline": {item["id"]: villagers_answer(item) for item in items},
        "baseline_name": VILLAGERS,
        "show": _ranking,
        "difficulty": None,
        "gamed": None,
        "notes": (),
        "about": {"lc_win_rate": (alpaca_eval.UNPENALISED,)},
        "counts": Counter(),
    }


def tiny_arena() -> dict:
    return {
        "items": prompts(every=4),
        "baseline_name": "base",
        "show": lambda question, a, b: _ranking(question, a, b)["chat"],
        "notes": (f"labels by log-odds: above {SLIGHTLY:g} better, above {MUCH:g} much better",),
        "counts": Counter(),
    }


def choose_label(
    ask: Callable[[list[dict]], list[dict]], chats: list[list[dict]], min_mass: float
) -> tuple[list[str], list[int]]:
    """Verdicts of a judge that only chooses, in Arena-Hard's labels (see `arena_hard.argue`).

    None where both choices together are less probable than `min_mass`, as in contests.
    """
    about = {"prefix": templates.VERDICT_PREFIX, "choices": templates.VERDICTS}
    texts = []
    for reply in ask([{"chat": chat, **about} for chat in chats]):
        first, second = reply["logps"]
        known = None not in (first, second) and math.isfinite(first - second)
        if not known or math.exp(first) + math.exp(second) < min_mass:
            texts.append("")
            continue
        odds = first - second
        sign = ">>" if abs(odds) > MUCH else ">" if abs(odds) > SLIGHTLY else "="
        better, worse = ("A", "B") if odds > 0 or sign == "=" else ("B", "A")
        texts.append(f"log-odds {odds:.3f}: [[{better}{sign}{worse}]]")
    return texts, []


def tiny_mt() -> dict:
    return {
        "items": conversations(),
        "show": lambda item, texts: (chat_of(item["turns"][: len(texts)], texts), "oracle"),
        "grade": oracle_grade,
        "notes": ("graded by the oracle: the tiny judge cannot grade",),
        "counts": Counter(),
    }


#: name -> the benchmark as `run_benchmark` takes it
TINY: dict[str, Callable[[], dict]] = {
    "tiny_alpaca": tiny_alpaca,
    "tiny_arena": tiny_arena,
    "tiny_mt": tiny_mt,
}
