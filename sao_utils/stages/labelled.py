"""A user's pairs whose better answer is known, to test a judge on."""

from __future__ import annotations

from sao_utils.files import read_table
from sao_utils.recipe import RecipeError
from sao_utils.store import row_id, seed_of

COLUMNS = ("prompt", "chosen", "rejected")


def labelled_pairs(source: str) -> list[dict]:
    """Read a file of pairs whose better answer is known (for the formats see `files`).

    Its columns are texts: `prompt`, `chosen` and `rejected` (as in RewardBench), and optionally
    `subset`.

    Returns:
        Rows {id, subset, prompt, responses [a, b], lengths [words of a, b], quality [a, b] (1: the
        better, 0: the worse), discarded}. Which answer is a is drawn with a seed derived from the pair
        itself, so that position says nothing about quality. `discarded` is None, "empty answer",
        "identical answers", "repeated pair", or "contradicting labels" (for every copy of such a pair).

    Raises:
        RecipeError: there is no such file, it has no rows, or a column is missing or holds something
            other than text; the message names the row and the column.
    """
    pairs = [
        _labelled_pair(row, f"{source}, row {k}") for k, row in enumerate(read_table(source), 1)
    ]
    if not pairs:
        raise RecipeError(f"{source} has no rows.")
    labels: dict[str, set] = {}
    for pair in pairs:
        labels.setdefault(pair["id"], set()).add(tuple(pair["quality"]))
    seen = set()
    for pair in pairs:
        if not all(text.strip() for text in pair["responses"]):
            pair["discarded"] = "empty answer"
        elif pair["responses"][0] == pair["responses"][1]:
            pair["discarded"] = "identical answers"
        elif len(labels[pair["id"]]) > 1:
            pair["discarded"] = "contradicting labels"
        elif pair["id"] in seen:
            pair["discarded"] = "repeated pair"
        seen.add(pair["id"])
    return pairs


def _labelled_pair(row: dict, where: str) -> dict:
    """One row of a user's file as a pair; `where` is the start of any error message about it."""
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            fault = "missing" if row.get(column) is None else "no text"
            raise RecipeError(
                f"{where}: column '{column}' is {fault}. A file of labelled pairs has the columns "
                f"{', '.join(COLUMNS)}, each of them a text."
            )
    prompt = row["prompt"]
    if not prompt.strip():
        raise RecipeError(f"{where}: column 'prompt' is empty.")
    rated = sorted([(row["chosen"], 1), (row["rejected"], 0)])
    identity = row_id("labelled", prompt, rated[0][0], rated[1][0])
    if seed_of(identity) % 2:
        rated.reverse()
    responses, qualities = ([pair[k] for pair in rated] for k in (0, 1))
    return {
        "id": identity,
        "subset": None if row.get("subset") is None else str(row["subset"]),
        "prompt": prompt,
        "responses": responses,
        "lengths": [len(text.split()) for text in responses],
        "quality": qualities,
        "discarded": None,
    }
