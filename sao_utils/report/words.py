"""How results are shown: words for what was measured, numbers with their units, data frames to read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

NOT_COMPARABLE = (
    "Numbers of the recipe tiny are measured on a toy of 1.2 M parameters in a world of its own; "
    "they are not comparable with the paper's."
)
#: name in the column `model` -> the same in words
MODELS = {
    "base": "base model",
    "self": "self-judged pairs",
    "sft_random": "SFT on random own answers",
    "random": "the same pairs, random labels",
    "oracle": "pairs with oracle labels",
    "sao": "SAO",
    "synpo": "SynPO",
    "sft_seeds": "SFT on the seeds",
    "self_rewarding": "Self-Rewarding",
    "sampling_ranking": "sampling and ranking",
}
#: a flaw that the oracle finds -> what an answer with it does
FLAWS = {
    "missing": "leaves out what was asked",
    "wrong": "states something wrong",
    "repeated": "repeats itself",
    "extra": "says more than was asked",
    "off_topic": "is about something else",
    "garbled": "has a garbled sentence",
    "unfinished": "does not come to an end",
}
HEADING = "value [95 % interval]"
DIFFERENCE = "difference [95 % interval]"


def in_words(found, unit: str | None = None) -> str:
    """`71.2 [68.0, 74.1] %`; "(no interval)" if there is none, or the reason why there is no value.

    Args:
        found: anything with value, low, high and note: an `Interval`, or a row of the table (a named
            tuple).
        unit: the unit of its numbers, as in the table; by default the row's own, or "%" for an `Interval`.
    """
    if math.isnan(found.value):
        return f"not estimated: {found.note}".removesuffix(": ")
    unit = getattr(found, "unit", "%") if unit is None else unit
    factor = 100 if unit in ("%", "points") else 1
    decimals = 2 if unit in ("", "of 10") else 1  # kappa and grades
    ends = (factor * getattr(found, key) for key in ("value", "low", "high"))
    value, low, high = (f"{end:.{decimals}f}" for end in ends)
    interval = "(no interval)" if "nan" in (low, high) else f"[{low}, {high}]"
    return f"{value} {interval} {unit}".rstrip()


def sizes(found: Iterable) -> str:
    """`880`, or `880 to 4,400`: the numbers of values behind several estimates."""
    counts = sorted({one.n for one in found})
    return f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")


def sum_in_words(steps: Iterable[tuple[str, int]]) -> str:
    """`40 asked for - 3 malformed = 37 prompts`, from labels and counts; negative counts are subtracted."""
    signs = (f"{'-' if count < 0 else '='} {abs(count):,} {label}" for label, count in steps)
    return " ".join(signs).removeprefix("= ")


def what(row) -> str:
    """What a row of the table measures, without the models: `good answers, greedy`."""
    text = f"answer {FLAWS[row.metric]}" if row.metric in FLAWS else row.metric
    if row.section == "judge" and row.questions == "training pairs":
        text = f"judge: {text}"
    elif row.section in ("judge", "benchmark", "task", "leakage"):
        text = f"{row.questions}: {text}"
    elif row.section in ("rounds", "study") and row.questions not in (
        None,
        "all",
        "training pairs",
    ):
        text = f"{row.questions}: {text}"
    of_quality = row.section in ("quality", "leakage") or row.metric == "good answers"
    if of_quality and row.temperature is not None:
        text += f", {decoding(row.temperature)}"
    if row.judge not in (None, "self", "oracle"):
        text += f", judged by {row.judge}"
    return text if row.seed is None else f"{text}, seed {row.seed}"


def decoding(temperature: float) -> str:
    """`greedy`, or `T = 0.6`."""
    return f"T = {temperature:g}" if temperature else "greedy"


def model_in_words(name: str | None) -> str:
    """A model's name in the table, in words if it is one of `MODELS`."""
    return MODELS.get(name, name or "")


def models(row) -> str:
    """The model of a row: `base model`, or for a difference `self-judged pairs - base model`."""
    name = model_in_words(row.model)
    if row.round:
        name += f", round {row.round}"
    if row.against is None:
        return name
    sign = "-" if is_difference(row) else "against"
    return f"{name} {sign} {model_in_words(row.against)}"


def is_difference(row) -> bool:
    """Whether a row is one model's value minus another's."""
    return row.against is not None and row.unit == "points"


def show(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table in words, one line each: what, model, value [95 % interval], n, remarks."""
    lines = [
        (what(row), models(row), in_words(row), f"{row.n:,}", row.note)
        for row in rows.itertuples(index=False, name="Row")
    ]
    shown = pd.DataFrame(lines, columns=["what", "model", HEADING, "n", "remarks"])
    return shown if shown["remarks"].any() else shown.drop(columns="remarks")


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table side by side: the base, another model, and the difference if there is one.

    Returns:
        A line for each quantity and each model other than the base: what, model, base, tuned,
        difference [95 % interval], n (of the difference, else of the model).
    """
    bases, lines = {}, {}
    for row in rows.itertuples(index=False, name="Row"):
        measured, model = what(row), model_in_words(row.model)
        if row.model == "base":
            bases[measured] = in_words(row)
        elif row.against is None or row.against == "base" and is_difference(row):
            line = lines.setdefault((measured, model), {"what": measured, "model": model})
            line["tuned" if row.against is None else DIFFERENCE] = in_words(row)
            line["n"] = f"{row.n:,}"
    columns = ["what", "model", "base", "tuned", DIFFERENCE, "n"]
    table = pd.DataFrame(lines.values(), columns=columns, dtype=object)
    table["base"] = table["what"].map(bases)
    return table.fillna("")


def markdown(shown: pd.DataFrame) -> str:
    """A data frame of texts as a Markdown table."""
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()]
    cells = [[" ".join(str(text).replace("|", "/").split()) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def check(statement: str, holds: bool, otherwise: str) -> bool:
    """Print whether a statement about what a notebook shows holds, and `otherwise` if not; return `holds`."""
    print(f"ok    {statement}" if holds else f"LOOK  does not hold: {statement}\n      {otherwise}")
    return holds
