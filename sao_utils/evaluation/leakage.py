"""Leakage: which evaluation questions occur, wholly or partly, among the prompts trained on.

A model that was trained on a question may know it by heart, and its score then says little. How much
two texts must have in common is a choice, so a strict and a lenient criterion are both reported
(`OVERLAPS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sao_utils.evaluation.benchmarks import load
from sao_utils.evaluation.questions import questions
from sao_utils.evaluation.tasks import tasks_of
from sao_utils.stages.overlap import shared_ngrams, words
from sao_utils.store import Run

Hit = tuple[int, str] | None  # index of the training prompt, and the shared words


def _same(texts: Sequence[str], against: Sequence[str]) -> list[Hit]:
    """For each text, the first of `against` with the same words in the same order; None without one."""
    places: dict[str, int] = {}
    for k, other in enumerate(against):
        places.setdefault(" ".join(words(other)), k)
    worded = [" ".join(words(text)) for text in texts]
    return [(places[of], of) if of in places else None for of in worded]


#: name -> function that finds texts overlapping with another set, the strictest first. GPT-3's authors used
#: 13 words in a row for long texts (Brown et al. 2020, appendix C); "same words" is ours.
OVERLAPS: dict[str, Callable[[Sequence[str], Sequence[str]], list[Hit]]] = {
    "same words": _same,
    "13 words in a row": partial(shared_ngrams, n=13),
}


def question_sets(run: Run, task_rows: Sequence[dict] = ()) -> dict[str, list[str]]:
    """What the run's evaluation asks, by name: its own questions, each benchmark of its recipe, and tasks.

    Args:
        task_rows: rows of `tasks.score_tasks`; what the items of a task ask (`tasks.asked_by`) is a set.

    Returns:
        name -> texts; of items with several turns, the first.
    """
    settings = run.recipe.evaluation
    found = {own_set(run): [row["question"] for row in questions(settings)]}
    for name in settings.benchmarks:
        found[name] = [item["turns"][0] for item in load(settings, name)["items"]]
    for row in task_rows:
        if row["model"] == "base":
            found[row["task"]] = [text for of in row.get("asked", {}).values() for text in of]
    return found


def own_set(run: Run) -> str:
    """The name of the run's own questions: that of a set, or of a file without folder and ending.

    With "own " before it if a benchmark or a task has the same name.
    """
    settings = run.recipe.evaluation
    name = Path(settings.questions).stem
    others = {*settings.benchmarks, *(task.name for task in tasks_of(settings.tasks))}
    return f"own {name}" if name in others else name


def leakage(prompts: Sequence[str], sets: dict[str, list[str]]) -> list[dict]:
    """What each set of questions has in common with the prompts that were trained on.

    Args:
        prompts: the distinct prompts of the training pairs.
        sets: name -> questions (`question_sets`).

    Returns:
        A row for each set and each of `OVERLAPS`: {set, by, prompts, items: how many were compared,
        share: the share of items that overlap (NaN without items), matches: a row {question, prompt,
        shared} for each of them}. A question that occurs twice counts twice.
    """
    found = []
    for name, asked in sets.items():
        for by, find in OVERLAPS.items():
            matches = [
                {"question": text, "prompt": prompts[hit[0]], "shared": hit[1]}
                for text, hit in zip(asked, find(asked, prompts))
                if hit is not None
            ]
            facts = {"set": name, "by": by, "prompts": len(prompts), "items": len(asked)}
            share = len(matches) / len(asked) if asked else math.nan
            found.append({**facts, "share": share, "matches": matches})
    return found
