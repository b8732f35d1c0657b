"""What models are asked for evaluation: sets of questions, and the users' files they come from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.rows import Run, row_id
from sao_utils.tiny import world

QUESTION_SEED = {"test": 4242, "dev": 2424}  # the same questions in every run


def _held_out(split: str) -> Callable[[Evaluation], list[str]]:
    return lambda settings: world.held_out_questions(
        split, settings.per_combination, QUESTION_SEED[split]
    )


#: name of a set -> its questions, given the recipe's section "evaluation". Add a set here.
SETS: dict[str, Callable[[Evaluation], list[str]]] = {
    **{split: _held_out(split) for split in QUESTION_SEED},
    "everyday": lambda _: _everyday(),
}


def _everyday() -> list[str]:
    """A few plain prompts of our own for any model: a look at it, no benchmark."""
    text = (files("sao_utils") / "prompts" / "everyday.txt").read_text(encoding="utf-8")
    return text.splitlines()


def questions(run: Run) -> list[dict]:
    """The evaluation questions: rows {id, question, combination}.

    `evaluation.questions` of the recipe is the name of one of `SETS`, or a .jsonl or .csv file with
    a column "prompt". `combination` is what intervals are clustered by: of the tiny world the hobby
    and the asked things, of others the question itself.

    Raises:
        RecipeError: neither a set nor a file that `read_column` can read.
    """
    settings = run.recipe.evaluation
    if settings.questions in SETS:
        texts = SETS[settings.questions](settings)
    else:
        texts = read_column(settings.questions, "prompt")
    return [
        {"id": row_id("question", k, text), "question": text, "combination": cluster(text)}
        for k, text in enumerate(texts)
    ]


def cluster(prompt: str) -> str:
    """What an interval is clustered by: the question's combination, else the prompt itself."""
    question = world.parse_question(prompt)
    return " ".join((question.hobby, *question.combination[1])) if question else prompt


def read_table(source: str) -> list[dict]:
    """The rows of a .jsonl or .csv file, as they are.

    Raises:
        RecipeError: the file is missing, of another kind, or has a line that cannot be read.
    """
    path = Path(source)
    if path.suffix not in (".jsonl", ".csv") or not path.is_file():
        raise RecipeError(f"'{source}' is no .jsonl or .csv file that is there.")
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel begins a CSV with a mark
        if path.suffix == ".csv":
            try:
                return list(csv.DictReader(file))
            except csv.Error as error:
                raise RecipeError(f"{source} is no CSV that can be read: {error}.") from None
        return [_read_line(line, k, source) for k, line in enumerate(file, 1) if line.strip()]


def read_column(source: str, column: str) -> list[str]:
    """The non-empty texts of one column of a .jsonl or .csv file (also .gz), stripped.

    Only the texts are held in memory: files may have millions of rows.

    Raises:
        RecipeError: the file is missing, of another kind, damaged, or has no such column.
    """
    path = Path(source)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".csv") or not path.is_file():
        raise RecipeError(f"'{source}' is no .jsonl or .csv file (or .gz of one) that is there.")
    unpack = gzip.open if path.suffix == ".gz" else open
    try:  # Excel begins a CSV with a mark, hence "sig"
        with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:
            numbered = ((k, line) for k, line in enumerate(file, 1) if line.strip())
            lines = (_read_line(line, k, source) for k, line in numbered)
            rows = csv.DictReader(file) if kind == ".csv" else lines
            texts = [str(row.get(column) or "").strip() for row in rows]
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{source} is damaged, or no UTF-8 text: {error}.") from None
    if not any(texts):
        raise RecipeError(f"{source} has no column '{column}' with text in it.")
    if not all(texts):
        raise RecipeError(
            f"{source}: row {texts.index('') + 1} has an empty '{column}'. Remove it."
        )
    return texts


def _read_line(line: str, number: int, source: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise RecipeError(f"{source}, line {number} is no JSON object.")
    return row
