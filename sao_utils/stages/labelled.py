"""A user's pairs whose better answer is known, to judge a judge by."""

from __future__ import annotations

from sao_utils.files import read_table
from sao_utils.recipe import RecipeError
from sao_utils.store import row_id, seed_of

#: column "label" of a user's file -> the quality of response_a and of response_b.
LABELS = {"a": (1, 0), "1": (1, 0), "b": (0, 1), "2": (0, 1), "tie": (0, 0)}


def labelled_pairs(source: str) -> list[dict]:
    """The pairs of a file (see `files`) whose better answer is known.

    Columns: `prompt`, `chosen`, `rejected` (as in RewardBench), or `prompt`, `response_a`,
    `response_b`, `label` (one of `LABELS`); and `subset`, if there is one. In JSON the
    prompt and the answers may be lists of messages {role, content}, as in trl's conversational
    data sets; the answer is then the last message, and those before it (they need no column
    `prompt`) are what is answered. Several messages become one text with the roles in front.

    Returns:
        Rows {id, subset, prompt, responses [a, b], lengths [words of a, b], quality [a, b] (1: the
        better, 0: the worse; equal: a tie), discarded}. Which answer is a is drawn by a seed
        from the pair itself, so that position says nothing of quality. `discarded` is None, "empty
        answer", "identical answers", "repeated pair", or "contradicting labels" (of a repeated
        pair, all of it).

    Raises:
        RecipeError: no such file, no rows, a column that is missing or holds something else, or a
            label that is not known; the message names row and column.
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
    """One row of a user's file as a pair; `where` begins the message of what is wrong with it."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        columns, quality = ("chosen", "rejected"), (1, 0)
    else:
        columns, label = ("response_a", "response_b"), str(row.get("label")).strip().lower()
        if label not in LABELS:
            raise RecipeError(
                f"{where}: column 'label' is {row.get('label')!r}, not one of {', '.join(LABELS)} (a "
                "0 is a tie in some files, and the first answer in others). A file has the columns "
                "prompt, chosen, rejected, or prompt, response_a, response_b, label."
            )
        quality = LABELS[label]
    (before, first), (same, second) = (_answer(row, column, where) for column in columns)
    if before != same:
        raise RecipeError(f"{where}: '{columns[0]}' and '{columns[1]}' answer different messages.")
    turns = before or _messages(row, "prompt", where)
    prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{r}: {text}" for r, text in turns)
    if not prompt.strip():
        raise RecipeError(f"{where}: column 'prompt' is empty.")
    rated = sorted(zip((first, second), quality))
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


def _answer(row: dict, column: str, where: str) -> tuple[list[tuple[str, str]], str]:
    """The messages (role, text) before an answer, and the answer."""
    *before, (role, text) = _messages(row, column, where, "assistant")
    if role != "assistant":
        raise RecipeError(f"{where}: the last message of column '{column}' is not the assistant's.")
    return before, text


def _messages(row: dict, column: str, where: str, role: str = "user") -> list[tuple[str, str]]:
    """A column's messages as (role, text); a plain text is one message of `role`."""
    value = row.get(column)
    if isinstance(value, str):
        return [(role, value)]
    try:
        messages = [(message["role"], message["content"]) for message in value]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(part, str) for pair in messages for part in pair):
        fault = "neither a text nor a list of messages with role and content"
        raise RecipeError(
            f"{where}: column '{column}' is {fault if value is not None else 'missing'}."
        )
    return messages
