"""A run's results on one screen, as `sao show` prints them. Reads the run's tables; needs no torch."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import pandas as pd
import yaml

from sao_utils.report.table import read_table, select, value_of
from sao_utils.report.words import (
    NOT_COMPARABLE,
    compare,
    decoding,
    in_words,
    is_difference,
    model_in_words,
    sizes,
    what,
)

WIDTH = 100


def summary(folder: Path) -> str:
    """What was run, what became of the prompts, how good the judge is, the result, and its price.

    Errors as of `table.read_table`.
    """
    folder, table = Path(folder), read_table(folder)
    recipe = yaml.safe_load((folder / "tables" / "recipe.yaml").read_text(encoding="utf-8"))
    lines = [
        f"{folder.name}: recipe {recipe['name']}, model {recipe['model']['path']}, "
        f"seeds {recipe['seeds']}, {recipe['prompts']['count']:,} prompts a seed, "
        f"{recipe['training']['algorithm']}"
    ]
    if "rounds" in set(table["section"]):
        lines += _rounds(table)
    else:
        lines += [*_funnel(folder), *_judge(table), *_result(table), *_price(table)]
    if recipe["model"]["path"] == "tiny":
        lines += textwrap.wrap(NOT_COMPARABLE, WIDTH)
    return "\n".join(lines)


def _rounds(table: pd.DataFrame) -> list[str]:
    """A line for each model, in the order of the rounds: good answers by topic, wins; then its pairs."""
    first = table["temperature"].min()
    greedy = table["temperature"].isna() | (table["temperature"] == first)
    rows = table[greedy & (table["section"] == "rounds")]
    of_pairs = rows["questions"] == "training pairs"
    return [
        *_by_round(rows[~of_pairs], f"Good answers, {decoding(first)}"),
        *_by_round(rows[of_pairs], "Training pairs"),
    ]


def _by_round(rows: pd.DataFrame, title: str) -> list[str]:
    """A line for each model and a column for each thing measured."""
    columns: dict[str, dict] = {}  # heading -> model -> row
    for row in rows.itertuples(index=False, name="Row"):
        if row.metric in ("answer length", "similarity of prompts") or is_difference(row):
            continue
        heading = "win rate over base" if row.metric == "win rate" else row.metric
        heading = row.questions if row.metric == "good answers" else heading
        name = f"round {row.round}" if row.round else model_in_words(row.model)
        columns.setdefault(heading, {})[name] = row
    return _grid([*_headings(title, columns), *_lines(columns)]) if columns else []


def _funnel(folder: Path) -> list[str]:
    """`2,400 prompts asked for - 783 evaluation question ... = 854 pairs`, in as many lines."""
    path = folder / "tables" / "funnel.csv"
    if not path.is_file():
        return []
    steps, parts = pd.read_csv(path), []
    of_first = steps[steps["arm"] == steps["arm"].get(0)]
    for step, count in zip(of_first["step"], of_first["count"]):
        sign = "- " if count < 0 else "" if not parts else "= "
        parts.append(f"{sign}{abs(count):,} {step}")
    return textwrap.wrap("Data: " + " ".join(parts), WIDTH, subsequent_indent="      ")


def _judge(table: pd.DataFrame) -> list[str]:
    wanted = {
        "accuracy": "where one of the two answers is better, it prefers that one",
        "flip rate": "it prefers another answer when the order is reversed",
        "first position": "it prefers the answer that is shown first",
    }
    own = {"section": "judge", "judge": "self", "questions": "training pairs"}
    rows = {words: value_of(table, metric=metric, **own) for metric, words in wanted.items()}
    lines = [[f"  {w}", in_words(row), f"n = {row.n:,}"] for w, row in rows.items() if row]
    return ["The judge", *_grid(lines)] if lines else []


def _result(table: pd.DataFrame) -> list[str]:
    """Good answers at each temperature and win rates, of every model; then how far "self" is ahead."""
    metrics = ("good answers", "win rate", "difference in win rate")
    rows = select(table, section=("quality", "win rate"), metric=metrics, seed=None)
    values, ahead = {}, {}  # heading -> model -> row
    for row in rows.itertuples(index=False, name="Row"):
        heading = what(row) if row.section == "quality" else "win rate over base"
        if not is_difference(row):
            values.setdefault(heading, {})[model_in_words(row.model)] = row
        elif row.model == "self":
            ahead.setdefault(heading, {})[model_in_words(row.against)] = row
    if not values:
        return []
    lines = [*_headings("Result, on held-out questions", values), *_lines(values)]
    if ahead:
        lines.append(["Self-judged ahead, in points, of", *[""] * len(values)])
        lines += _lines({heading: ahead.get(heading, {}) for heading in values})
    return _grid(lines)


def _headings(title: str, columns: dict[str, dict]) -> list[list[str]]:
    """Two lines above a table: the name of each column, and how many values are behind it."""
    sized = [f"n = {sizes(column.values())}" for column in columns.values()]
    return [[title, *columns], ["", *sized]]


def _lines(columns: dict[str, dict]) -> list[list[str]]:
    """A line for each name that is in any of the columns: the name, and its value in each."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        [f"  {name}", *(_short(column.get(name)) for column in columns.values())] for name in names
    ]


def _short(row) -> str:
    """A value in a narrow column: why there is none stands in results.md."""
    if row is None:
        return ""
    return "not estimated" if math.isnan(row.value) else in_words(row).removesuffix(" points")


def _price(table: pd.DataFrame) -> list[str]:
    """What was paid: flaws that became more frequent, length, and what was forgotten."""
    rows = select(table, section=("flaws", "length", "task"), model=("base", "self"), seed=None)
    shown = {"repeated"}
    for flaw in rows[rows["section"] == "flaws"]["metric"].unique():
        base, tuned = (value_of(rows, metric=flaw, model=name) for name in ("base", "self"))
        if base and tuned and tuned.value > base.value:
            shown.add(flaw)
    rows = rows[rows["metric"].isin(shown) | (rows["section"] != "flaws")]
    lines = [["Price paid", "base", "tuned", "difference", "n"]]
    for label, _, *cells in compare(rows).itertuples(index=False, name=None):
        if ":" in label:
            label = f"task {label.split(':')[0]}"
        elif label == "answer length":
            label, cells = f"{label}, tokens", [text.removesuffix(" tokens") for text in cells]
        lines.append([f"  {label}", *(text.removesuffix(" points") for text in cells)])
    return _grid(lines) if len(lines) > 1 else []


def _grid(lines: list[list[str]]) -> list[str]:
    """Lines of cells in aligned columns; the last column is as wide as it likes."""
    widths = [max(map(len, column)) for column in list(zip(*lines))[:-1]] + [0]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths)).rstrip() for line in lines]
