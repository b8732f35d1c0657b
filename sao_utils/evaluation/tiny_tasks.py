"""The items of the tiny world's tasks for lm-eval: what the model may forget when trained on other things.

They are made from the grammar alone, with a fixed seed, and kept beside the task files in `tiny/tasks/`;
`python -m sao_utils.evaluation.tiny_tasks` writes them again. Each item asks about a different fact, so
the items of a task are independent.

- facts.jsonl: facts on which all villagers agree, in questions of the training split. The model
  learnt both the facts and the questions in pre-training.
- myths.jsonl: facts about which a wrong value is in circulation, in questions of the training split.
  One of the choices is that value; a model that says what it read most often falls for it.
- recall.jsonl: all facts, in questions of the test split: the fact is known, but the combination of
  aspects asked about is new. The answer must be written, not chosen.
"""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from sao_utils.oracles import tiny_world as world

CHOICES = 4


def items() -> dict[str, list[dict]]:
    """The items, by the name of their file.

    Each is {question, choices, answer}: a worded question whose first aspect is the one to be known, four
    sentences that differ in the value they state, and the index of the true one. Wrong values are those of
    other hobbies, the neighbour's first; a wrong value in circulation is always one of them. An item of
    "recall" is {question, answer}, the answer being the value.
    """
    rng = random.Random(2468)
    believed = [fact for fact, wrong in world.BELIEF.items() if wrong == 0]
    myths = [fact for fact, wrong in world.BELIEF.items() if wrong > 0]
    return {
        "facts": [_choice_item(rng, *fact) for fact in believed if _partners(*fact, "train")],
        "myths": [_choice_item(rng, *fact) for fact in myths if _partners(*fact, "train")],
        "recall": [
            {"question": _question(rng, *fact, "test"), "answer": world.TRUTH[fact]}
            for fact in world.TRUTH
            if _partners(*fact, "test")
        ],
    }


def _partners(hobby: str, aspect: str, split: str) -> list[str]:
    """The aspects that, asked together with this one, give a question of `split`."""
    return [
        other
        for other in world.ASPECTS
        if world.SPLIT.get((hobby, tuple(sorted((aspect, other))))) == split
    ]


def _question(rng: random.Random, hobby: str, aspect: str, split: str) -> str:
    other = rng.choice(_partners(hobby, aspect, split))
    return world.word_question(rng, world.Question(hobby, (aspect, other)))


def _choice_item(rng: random.Random, hobby: str, aspect: str) -> dict:
    fact = hobby, aspect
    elsewhere = [world.NEIGHBOUR[hobby], *rng.sample(world.HOBBIES, len(world.HOBBIES))]
    wrong = [world.MYTH[fact]] if world.BELIEF[fact] else []
    wrong += [world.TRUTH[other, aspect] for other in elsewhere]
    wrong = [value for value in dict.fromkeys(wrong) if value != world.TRUTH[fact]]
    values = [world.TRUTH[fact], *wrong[: CHOICES - 1]]
    rng.shuffle(values)
    return {
        "question": _question(rng, hobby, aspect, "train"),
        "choices": [str(world.Statement(hobby, aspect, value, 0)) for value in values],
        "answer": values.index(world.TRUTH[fact]),
    }


if __name__ == "__main__":
    folder = Path(str(files("sao_utils") / "tiny" / "tasks"))
    for name, rows in items().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
