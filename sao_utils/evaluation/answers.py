"""Stage 6: answers of the base, the tuned and other models to evaluation questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sao_utils import oracles
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_name
from sao_utils.engines.requests import replies
from sao_utils.recipe import Model
from sao_utils.store import Run


@dataclass(frozen=True)
class Candidate:
    """A model that evaluation compares, with its name in tables."""

    name: str
    seed: int | None
    model: Model
    round: int = 0


def answer_questions(
    run: Run,
    candidates: Sequence[Candidate],
    questions: Sequence[dict],
    temperatures: Sequence[float],
) -> list[dict]:
    """Let every candidate answer every question at every temperature.

    Args:
        questions: rows of `evaluation.questions.questions`.

    Returns:
        Rows {id, model, seed, round, weights, temperature, question_id, question, combination, text,
        tokens, finished, quality, good}, kept in rows/answers.jsonl except for the last two, which come
        from the oracle and are None if no oracle knows the question.
    """
    settings, rows = run.recipe.evaluation, []
    for candidate in candidates:
        weights = model_name(candidate.model)
        requests = [
            {
                "chat": [{"role": "user", "content": question["question"]}],
                "sampling": Sampling(temperature, settings.max_new_tokens, settings.top_p),
                "of": {
                    "model": candidate.name,
                    "seed": candidate.seed,
                    "round": candidate.round,
                    "weights": weights,
                    "temperature": temperature,
                    "question_id": question["id"],
                    "question": question["question"],
                    "combination": question["combination"],
                },
            }
            for temperature in temperatures
            for question in questions
        ]
        for row in replies(run, "answers", candidate.model, requests):
            (quality,) = oracles.quality(row["question"], row["text"]) or (None,)
            good = None if quality is None else quality == 0
            rows.append({**row, "quality": quality, "good": good})
    return rows
