"""Oracles: who knows for certain how good an answer is. The stages do not know which one answers.

Today there is one, for the questions of the tiny world (`tiny_world`). A prompt that no oracle knows has
no quality, and what needs an oracle is then left out.
"""

from __future__ import annotations

from sao_utils.oracles import tiny_world
from sao_utils.oracles.tiny_oracle import inspect_answer


def quality(prompt: str, *answers: str) -> list[int] | None:
    """Minus the number of flaws of each answer, 0 for a good one; None if no oracle knows the prompt."""
    question = tiny_world.parse_question(prompt)
    if question is None:
        return None
    return [inspect_answer(question, answer).quality for answer in answers]


def flaws(prompt: str, answer: str) -> dict[str, int] | None:
    """How often an answer has each kind of flaw; None if no oracle knows the prompt."""
    question = tiny_world.parse_question(prompt)
    return None if question is None else inspect_answer(question, answer).flaws


def cluster(prompt: str) -> str:
    """What intervals are clustered by: prompts that ask for the same, in other words, are one.

    In the tiny world the hobby and the things asked about it; elsewhere the prompt itself.
    """
    question = tiny_world.parse_question(prompt)
    return " ".join((question.hobby, *question.combination[1])) if question else prompt


def is_held_out(prompt: str) -> bool:
    """Whether a prompt asks for what is kept for evaluation, so that training on it would leak."""
    question = tiny_world.parse_question(prompt)
    return question is not None and tiny_world.SPLIT[question.combination] != "train"


def tiny_personas(count: int, seed: int) -> list[str]:
    """Villagers of the tiny world whom its model has not met."""
    import random

    rng = random.Random(seed)
    return [tiny_world.draw_persona(rng, held_out=True)[0] for _ in range(count)]


def held_out_questions(split: str, per_combination: int, seed: int) -> list[str]:
    """Questions of the tiny world that are kept for evaluation ("dev" or "test")."""
    return tiny_world.held_out_questions(split, per_combination, seed)
