"""Oracles: who knows for certain how good an answer is. The stages do not know which one answers.

There are two: of the questions of the tiny world (`tiny_world`), and of prompts in any words that end in an
instruction that a program can check (`checkable`). A prompt that no oracle knows has no quality, and what
needs an oracle is then left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sao_utils.oracles import checkable, tiny_world
from sao_utils.oracles.tiny_oracle import answer_pair, inspect_answer


class Known(NamedTuple):
    """What an oracle says of a prompt that it knows; the functions below tell what."""

    flaws: Callable[[str], dict[str, int]]
    cluster: str
    held_out: bool


def _known(prompt: str) -> Known | None:
    if question := tiny_world.parse_question(prompt):
        cluster = " ".join((question.hobby, *question.combination[1]))
        held_out = tiny_world.SPLIT[question.combination] != "train"
        return Known(lambda answer: inspect_answer(question, answer).flaws, cluster, held_out)
    if asked := checkable.parse(prompt):
        return Known(asked.flaws, asked.cluster, asked.held_out)
    return None


def quality(prompt: str, *answers: str) -> list[int] | None:
    """Minus the number of flaws of each answer, 0 for a good one; None if no oracle knows the prompt."""
    known = _known(prompt)
    return known and [-sum(known.flaws(answer).values()) for answer in answers]


def flaws(prompt: str, answer: str) -> dict[str, int] | None:
    """How often an answer has each kind of flaw that it can have; None if no oracle knows the prompt."""
    known = _known(prompt)
    return known and known.flaws(answer)


def cluster(prompt: str) -> str:
    """What intervals are clustered by: prompts that ask for the same, in other words, are one.

    In the tiny world the hobby and the things asked about it; of checkable prompts topic and instruction;
    elsewhere the prompt itself.
    """
    known = _known(prompt)
    return known.cluster if known else prompt


def is_held_out(prompt: str, by_topic: bool = False) -> bool:
    """Whether a prompt asks for what is kept for evaluation, so that training on it would leak.

    Args:
        by_topic: whether a topic of the checkable questions is enough, without an instruction.
    """
    known = _known(prompt)
    if known is not None:
        return known.held_out
    return by_topic and checkable.named_topic(prompt) is not None


def instructed(prompt: str, share: float, lot: random.Random) -> str:
    """A prompt, in this share of the cases with an instruction at its end that an oracle can check."""
    return checkable.instruct(prompt, lot) if lot.random() < share else prompt


def checkable_questions(split: str, wordings: int) -> list[str]:
    """Prompts with checkable instructions that are kept for evaluation ("dev" or "test")."""
    return checkable.questions(split, wordings)


def tiny_personas(count: int, seed: int) -> list[str]:
    """Villagers of the tiny world whom its model has not met."""
    rng = random.Random(seed)
    return [tiny_world.draw_persona(rng, held_out=True)[0] for _ in range(count)]


def held_out_questions(split: str, per_combination: int, seed: int) -> list[str]:
    """Questions of the tiny world that are kept for evaluation ("dev" or "test")."""
    return tiny_world.held_out_questions(split, per_combination, seed)


def tiny_seeds(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts about half of the hobbies, each with an answer without a flaw: what a teacher gives."""
    rng, items = random.Random(f"seeds {seed}"), []
    for _ in range(count):
        question = tiny_world.draw_question(rng, hobby=rng.choice(tiny_world.SEED_HOBBIES))
        answer = tiny_world.draw_answer(rng, question, flawed=False)
        items.append((tiny_world.word_question(rng, question), str(answer)))
    return items


def tiny_pairs(count: int, seed: int, split: str = "train") -> list[tuple[str, str, str]]:
    """Questions of a split with two answers that differ in flaws: (prompt, better, worse).

    Answers are the villagers', and damaged copies of them: what the tiny model's pre-training ranks.
    """
    rng, pairs = random.Random(f"pairs {split} {seed}"), []
    for _ in range(count):
        question = tiny_world.draw_question(rng, split)
        job = rng.choice(tiny_world.JOBS) if rng.random() < 0.3 else None
        answers = answer_pair(rng, question)
        worse, better = sorted(answers, key=lambda text: inspect_answer(question, text).quality)
        pairs.append((tiny_world.word_question(rng, question, job), better, worse))
    return pairs


def tiny_judged(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Training questions, answers of any quality, and the reply of a judge who gives 0 to 5 points.

    The reply counts the flaws of each kind; five points are an answer without any.
    """
    rng, items = random.Random(f"judged {seed}"), []
    for _ in range(count):
        question = tiny_world.draw_question(rng)
        answer = rng.choice(answer_pair(rng, question))
        found = inspect_answer(question, answer)
        flaws = ", ".join(f"{kind} {n}" for kind, n in found.flaws.items() if n) or "no flaw"
        reply = f"{flaws}. Score: {max(0, 5 + found.quality)}"
        items.append((tiny_world.word_question(rng, question), answer, reply))
    return items


def is_seed_topic(prompt: str) -> bool | None:
    """Whether a prompt is about a hobby of `tiny_seeds`; None if no oracle knows the prompt."""
    question = tiny_world.parse_question(prompt)
    return None if question is None else question.hobby in tiny_world.SEED_HOBBIES


def tiny_paragraphs(count: int = 5_000) -> Iterator[str]:
    """What people of the tiny world ask, about any hobby: the corpus that keywords come from."""
    rng = random.Random("paragraphs")
    for _ in range(count):
        yield tiny_world.word_question(
            rng, tiny_world.draw_question(rng), rng.choice(tiny_world.JOBS)
        )
