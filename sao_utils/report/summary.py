"""A run's results on one screen, as `sao show` prints them. Reads the run's tables; needs no torch."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import pandas as pd
import yaml

from sao_utils.report.table import read_table, select, value_of
from sao_utils.report.words import (
    FLAWS,
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


def _grid(lines: list[list[str]]) -> list[str]:
    """Lines of cells in aligned columns; the last column is as wide as it likes."""
    widths = [max(map(len, column)) for column in list(zip(*lines))[:-1]] + [0]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths)).rstrip() for line in lines]


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
    """A grid with a line for each model and a column for each thing measured."""
    columns: dict[str, dict] = {}  # heading -> model -> row
    for row in rows.itertuples(index=False, name="Row"):
        if row.metric in ("answer length", "similarity of prompts") or is_difference(row):
            continue
        heading = "win rate over base" if row.metric == "win rate" else row.metric
        heading = row.questions if row.metric == "good answers" else heading
        name = f"round {row.round}" if row.round else model_in_words(row.model)
        columns.setdefault(heading, {})[name] = row
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    lines = [[title, *columns]]
    lines.append(["", *(f"n = {sizes(cells.values())}" for cells in columns.values())])
    lines += [[f"  {name}", *(_short(of.get(name)) for of in columns.values())] for name in names]
    return _grid(lines) if columns else []


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
    columns: dict[str, dict] = {}  # heading -> (whether it is a difference, model) -> row
    for row in rows.itertuples(index=False, name="Row"):
        ahead = is_difference(row)
        if not ahead or row.model == "self":
            heading = what(row) if row.section == "quality" else "win rate over base"
            key = ahead, model_in_words(row.against if ahead else row.model)
            columns.setdefault(heading, {})[key] = row
    if not columns:
        return []
    every = dict.fromkeys(key for cells in columns.values() for key in cells)
    keys, gains = ([key for key in every if key[0] == ahead] for ahead in (False, True))
    lines = [["Result, on held-out questions", *columns]]
    lines.append(["", *(f"n = {sizes(cells.values())}" for cells in columns.values())])
    for title, group in (("", keys), ("Self-judged ahead, in points, of", gains)):
        if title and group:
            lines.append([title, *[""] * len(columns)])
        for key in group:
            cells = (_short(of.get(key)) for of in columns.values())
            lines.append([f"  {key[1]}", *cells])
    return _grid(lines)


def _short(row) -> str:
    """A value in a narrow column: why there is none stands in results.md."""
    if row is None:
        return ""
    return "not estimated" if math.isnan(row.value) else in_words(row).removesuffix(" points")


def _price(table: pd.DataFrame) -> list[str]:
    """What was paid: flaws that became more frequent, length, and what was forgotten."""
    first = select(table, section=("flaws", "length", "task"), model=("base", "self"), seed=None)
    more = {"repeated"}
    for flaw in FLAWS:
        base, tuned = (value_of(first, metric=flaw, model=name) for name in ("base", "self"))
        if base and tuned and tuned.value > base.value:
            more.add(flaw)
    shown = compare(first[first["metric"].isin(more) | (first["section"] != "flaws")])
    lines = [["Price paid", "base", "tuned", "difference", "n"]]
    for line in shown.drop(columns="model").itertuples(index=False, name=None):
        label, *cells = (text.removesuffix(" points") for text in line)
        label = f"task {label.split(':')[0]}" if ":" in label else label
        if cells[0].endswith(" tokens"):
            label, cells = f"{label}, tokens", [text.removesuffix(" tokens") for text in cells]
        lines.append([f"  {label}", *cells])
    return _grid(lines) if len(lines) > 1 else []
