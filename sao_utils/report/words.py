"""How results are shown: words for what was measured, numbers in their units, data frames to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from sao_utils.statistics.intervals import Interval

NOT_COMPARABLE = (
    "Numbers of the recipe tiny are measured on a toy of 1.2 M parameters in a world of its own; "
    "they are not comparable with the paper's."
)
#: name in the column model -> the same in words
MODELS = {
    "base": "base model",
    "self": "self-judged pairs",
    "sft_random": "SFT on random own answers",
    "random": "the same pairs, random labels",
    "oracle": "pairs with oracle labels",
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
DECIMALS = {"": 2, "of 10": 2, "prompts": 0, "pairs": 0}  # of a unit; others have one
HEADING = "value [95 % interval]"


def number(value: float, unit: str) -> str:
    """A value in its unit: shares in percent, kappa and grades with two decimals."""
    if value is None or math.isnan(value):
        return "nan"
    factor = 100 if unit in ("%", "points") else 1
    return "no end" if math.isinf(value) else f"{factor * value:.{DECIMALS.get(unit, 1)}f}"


def interval_in_words(found: Interval, unit: str = "%") -> str:
    """`71.2 [68.0, 74.1] %`; the value alone where there is no interval, or why there is no value.

    Args:
        found: anything with value, low, high and note, such as an `Interval` or a row of the table.
        unit: of its numbers, as in the table.
    """
    value, low, high = (number(getattr(found, key), unit) for key in ("value", "low", "high"))
    if value == "nan":
        reason = getattr(found, "note", "")
        return f"not estimated: {reason}" if reason else "not estimated"
    interval = "(no interval)" if "nan" in (low, high) else f"[{low}, {high}]"
    return f"{value} {interval} {unit}".rstrip()


def in_words(row) -> str:
    """The value of a row of the table (a named tuple), with its interval and unit."""
    if row.unit == "prompts" and not row.note:  # JSON knows no infinity
        ends = (math.inf if math.isnan(x) else x for x in (row.value, row.low, row.high))
        row = row._replace(**dict(zip(("value", "low", "high"), ends)))
    return interval_in_words(row, row.unit)


def what(row) -> str:
    """What a row of the table measures, without the models: `good answers, greedy`."""
    parts = [f"answer {FLAWS[row.metric]}" if row.metric in FLAWS else row.metric]
    if row.section == "judge":
        parts.insert(0, "judge:" if row.questions == "training pairs" else f"{row.questions}:")
    if row.section in ("benchmark", "task", "leakage", "pairs"):
        parts.insert(0, f"{row.questions}:")
    if row.section in ("quality", "leakage") and row.temperature is not None:
        parts[-1] += f", {decoding(row.temperature)}"
    if row.judge not in (None, "self", "oracle"):
        parts[-1] += f", judged by {row.judge}"
    if row.seed is not None:
        parts[-1] += f", seed {row.seed}"
    return " ".join(parts)


def decoding(temperature: float) -> str:
    """`greedy`, or `T = 0.6`."""
    return f"T = {temperature:g}" if temperature else "greedy"


def model_in_words(name: str | None) -> str:
    """A model's name in the table, in words where it is one of ours."""
    return MODELS.get(name, name or "")


def models(row) -> str:
    """The model of a row: `base model`, or of a difference `self-judged pairs - base model`."""
    if row.against is None:
        return model_in_words(row.model)
    sign = "-" if is_difference(row) else "against"
    return f"{model_in_words(row.model)} {sign} {model_in_words(row.against)}"


def is_difference(row) -> bool:
    """Whether a row is one model's value minus another's."""
    return row.against is not None and row.unit == "points"


def show(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table in words, a line each: what, model, value [95 % interval], n, remarks."""
    lines = [
        {
            "what": what(row),
            "model": models(row),
            HEADING: in_words(row),
            "n": f"{row.n:,}",
            "remarks": row.note,
        }
        for row in rows.itertuples(index=False, name="Row")
    ]
    shown = pd.DataFrame(lines, columns=["what", "model", HEADING, "n", "remarks"])
    return shown if shown["remarks"].any() else shown.drop(columns="remarks")


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table side by side: the base, another model, and their difference if it is there.

    Returns:
        A line for each thing measured and each model beside the base: what, model, base, tuned,
        difference [95 % interval], n (of the difference, else of the model). Then differences to
        others than the base.
    """
    found = list(rows.itertuples(index=False, name="Row"))
    alone = {(what(row), row.model): row for row in found if row.against is None}
    gains = {(what(r), r.model): r for r in found if is_difference(r) and r.against == "base"}
    lines = []
    for measured, model in dict.fromkeys([*alone, *gains]):
        if model != "base":
            tuned, gain = (of.get((measured, model)) for of in (alone, gains))
            base = alone.get((measured, "base"))
            lines.append([measured, model_in_words(model), base, tuned, gain, gain or tuned])
    others = (row for row in found if is_difference(row) and row.against != "base")
    lines += [[what(row), models(row), None, None, row, row] for row in others]
    columns = ["what", "model", "base", "tuned", "difference [95 % interval]", "n"]
    cells = [
        [*names, *("" if row is None else in_words(row) for row in measured), f"{last.n:,}"]
        for *names, base, tuned, gain, last in lines
        for measured in [(base, tuned, gain)]
    ]
    return pd.DataFrame(cells, columns=columns)


def markdown(shown: pd.DataFrame) -> str:
    """A data frame of texts as a Markdown table."""
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "/").split())


def check(statement: str, holds: bool, otherwise: str) -> bool:
    """Print whether what a notebook shows is healthy, and what to do if it is not."""
    print(f"ok    {statement}" if holds else f"LOOK  not so: {statement}\n      {otherwise}")
    return holds
