"""The questions that models answer in evaluation: built-in sets, or a user's file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

from sao_utils import oracles
from sao_utils.evaluation.benchmark_files import OFFICIAL, official_questions
from sao_utils.files import read_column
from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.store import row_id

QUESTION_SEED = {"test": 4242, "dev": 2424}  # the same questions in every run


def _held_out(split: str, settings: Evaluation) -> list[str]:
    return oracles.held_out_questions(split, settings.per_combination, QUESTION_SEED[split])


def _checkable(split: str, settings: Evaluation) -> list[str]:
    return oracles.checkable_questions(split, settings.per_combination)


def _first_turns(benchmark: str, settings: Evaluation) -> list[str]:
    return [item["turns"][0] for item in official_questions(settings, benchmark)]


def _everyday(_: Evaluation) -> list[str]:
    """A few plain prompts of our own, for a first look at any model; not a benchmark."""
    text = (files("sao_utils") / "prompts" / "everyday.txt").read_text(encoding="utf-8")
    return text.splitlines()


#: name of a set -> function from the recipe's section "evaluation" to its questions. Add sets here.
SETS: dict[str, Callable[[Evaluation], list[str]]] = {
    **{split: partial(_held_out, split) for split in QUESTION_SEED},
    "everyday": _everyday,
    "checkable": partial(_checkable, "test"),
    "checkable_dev": partial(_checkable, "dev"),
    **{name: partial(_first_turns, name) for name in OFFICIAL},
}


def questions(settings: Evaluation, source: str | None = None) -> list[dict]:
    """The evaluation questions: rows {id, question, combination}.

    `source`, by default the recipe's `evaluation.questions`, is the name of one of `SETS`, or a file
    with a column "prompt". `combination` is what intervals are clustered by: for the tiny world, the
    hobby and the aspects asked about; for other questions see `oracles.cluster`.

    Raises:
        RecipeError: the source is neither a set nor a file that `read_column` can read.
    """
    source = source or settings.questions
    if source not in SETS and not Path(source).is_file():
        there = ", ".join(SETS)
        raise RecipeError(f"'{source}' is no file that is there, and no set of questions: {there}.")
    texts = SETS[source](settings) if source in SETS else read_column(source, "prompt")
    return [
        {"id": row_id("question", k, text), "question": text, "combination": oracles.cluster(text)}
        for k, text in enumerate(texts)
    ]


def evaluated_prompts(settings: Evaluation) -> list[str]:
    """Everything that the run's evaluation asks: its questions, and every turn of published benchmarks.

    This is what to keep out of training. Items of lm-eval's tasks are not included.

    Raises:
        RecipeError: see `questions` and `official_questions`.
    """
    turns = (
        turn
        for name in settings.benchmarks
        if name in OFFICIAL
        for item in official_questions(settings, name)
        for turn in item["turns"]
    )
    return list(dict.fromkeys([*(row["question"] for row in questions(settings)), *turns]))
