"""Oracles know for certain how good an answer is. The stages do not need to know which oracle they ask.

There are two: one for the questions of the tiny world (`tiny_world`), and one for any prompt that ends in
an instruction that a program can check (`checkable`). For a prompt that no oracle knows there is no
quality, and whatever needs an oracle is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sao_utils.oracles import checkable, tiny_world
from sao_utils.oracles.tiny_oracle import answer_pair, inspect_answer


class Known(NamedTuple):
    """What an oracle says about a prompt that it knows; see the functions of the same names below."""

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
    """The number of flaws of each possible kind in an answer; None if no oracle knows the prompt."""
    known = _known(prompt)
    return known and known.flaws(answer)


def cluster(prompt: str) -> str:
    """The cluster of a prompt, for intervals: prompts that ask for the same thing share one.

    In the tiny world, the hobby and the aspects asked about; for checkable prompts, the topic and the
    instruction; otherwise the prompt itself.
    """
    known = _known(prompt)
    return known.cluster if known else prompt


def is_held_out(prompt: str, by_topic: bool = False) -> bool:
    """Whether a prompt asks for something reserved for evaluation, so that training on it would leak.

    Args:
        by_topic: whether naming a topic of the checkable questions is enough, even without an instruction.
    """
    known = _known(prompt)
    if known is not None:
        return known.held_out
    return by_topic and checkable.named_topic(prompt) is not None


def instructed(prompt: str, share: float, lot: random.Random) -> str:
    """A prompt, with probability `share` followed by an instruction that an oracle can check."""
    return checkable.instruct(prompt, lot) if lot.random() < share else prompt


def checkable_questions(split: str, wordings: int) -> list[str]:
    """Prompts with checkable instructions that are reserved for evaluation ("dev" or "test")."""
    return checkable.questions(split, wordings)


def tiny_personas(count: int, seed: int) -> list[str]:
    """Personas of the tiny world that its model has not seen in pre-training."""
    rng = random.Random(seed)
    return [tiny_world.draw_persona(rng, held_out=True)[0] for _ in range(count)]


def held_out_questions(split: str, per_combination: int, seed: int) -> list[str]:
    """Questions of the tiny world that are reserved for evaluation ("dev" or "test")."""
    return tiny_world.held_out_questions(split, per_combination, seed)


def tiny_seeds(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts about half of the hobbies, each with a flawless answer, as a teacher would give it."""
    rng, items = random.Random(f"seeds {seed}"), []
    for _ in range(count):
        question = tiny_world.draw_question(rng, hobby=rng.choice(tiny_world.SEED_HOBBIES))
        answer = tiny_world.draw_answer(rng, question, flawed=False)
        items.append((tiny_world.word_question(rng, question), str(answer)))
    return items


def tiny_pairs(count: int, seed: int, split: str = "train") -> list[tuple[str, str, str]]:
    """Questions of a split with two answers that differ in flaws: (prompt, better, worse).

    The answers are the villagers' or damaged copies, as in the rankings of the tiny model's pre-training.
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

    The reply counts the flaws of each kind; an answer without flaws gets five points.
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
    """Whether a prompt is about a hobby of `tiny_seeds`; None if it is no question of the tiny world."""
    question = tiny_world.parse_question(prompt)
    return None if question is None else question.hobby in tiny_world.SEED_HOBBIES


def tiny_paragraphs(count: int = 5_000) -> Iterator[str]:
    """Questions of people of the tiny world about any hobby: the corpus that keywords come from."""
    rng = random.Random("paragraphs")
    for _ in range(count):
        yield tiny_world.word_question(
            rng, tiny_world.draw_question(rng), rng.choice(tiny_world.JOBS)
        )
