"""A run's results in one sentence and on one screen (`sao show`). Reads the run's tables; needs no torch."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import pandas as pd
import yaml

from sao_utils.recipe import Model, Recipe
from sao_utils.report.table import read_table, select, value_of
from sao_utils.report.words import (
    NOT_COMPARABLE,
    compare,
    decoding,
    in_words,
    is_difference,
    model_in_words,
    sizes,
    sum_in_words,
    what,
)

WIDTH = 100
ONE_SEED = "One seed: the intervals are over questions only; another training may differ."


def summary(folder: Path) -> str:
    """What was run, what became of the prompts, how good the judge is, the result, and its price.

    For a study, its tables. Raises the errors of `table.read_table`.
    """
    folder = Path(folder)
    path = folder / "tables" / "recipe.yaml"
    if not path.is_file():  # a study has a recipe for each member
        return (folder / "tables" / "results.md").read_text(encoding="utf-8")
    table, recipe = read_table(folder), yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = [
        f"{folder.name}: recipe {recipe['name']}, model {Model(**recipe['model']).label}, "
        f"seeds {recipe['seeds']}, {recipe['prompts']['count']:,} prompts a seed, "
        f"{recipe['training']['algorithm']}"
    ]
    if "rounds" not in set(table["section"]):
        lines += _funnel(folder)
    lines += [line for block in blocks(table).values() for line in _grid(block)]
    if len(recipe["seeds"]) == 1:
        lines += textwrap.wrap(ONE_SEED, WIDTH)
    if recipe["model"]["path"] == "tiny":
        lines += textwrap.wrap(NOT_COMPARABLE, WIDTH)
    return "\n".join(lines)


def sentence(table: pd.DataFrame, recipe: Recipe) -> str:
    """The result of a run, or of a study's last rounds, in one sentence with its interval."""
    good = select(table, metric="good answers", seed=None, section=("quality", "rounds", "study"))
    good = good[good["temperature"] == good["temperature"].min()]
    good = good[~good["questions"].isin(("seed topics", "other topics"))]
    gains = {row.model: row for row in select(good, against="base").itertuples(index=False)}
    if gains and (good["section"] == "study").all():
        least, *_, most = sorted(2 * list(gains.values()), key=lambda row: row.value)
        return (
            f"Of {len(gains)} members, {most.model} gained most over the base model, {in_words(most)} of "
            f"answers without a flaw (n = {most.n:,}); {least.model} gained least, {in_words(least)}."
        )
    model = recipe.method if recipe.iterated else "self"
    if gain := gains.get(model):
        name = f"round {gain.round} of {model_in_words(model)}" if gain.round else "training"
        after, before = (
            in_words(value_of(good, model=one, round=number))
            for one, number in ((model, gain.round), ("base", 0))
        )
        zero = " (no change is in the interval)" if gain.low <= 0 <= gain.high else ""
        return (
            f"After {name}, {after} of the answers are without a flaw; before, {before} are. The difference "
            f"is {in_words(gain)}{zero}; {decoding(gain.temperature)}, n = {gain.n:,}, judged by the "
            f"{gain.judge}."
        )
    if rate := value_of(table, metric="win rate", model=model, against="base"):
        return (
            f"The judge prefers the tuned model's answer to the base model's in {in_words(rate)} of "
            f"comparisons (50 is no preference), n = {rate.n:,}."
        )
    return "The tuned model has not been compared with its base yet."


def cautions(table: pd.DataFrame, recipe: Recipe) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = [NOT_COMPARABLE] if recipe.model.path == "tiny" else []
    if len(recipe.seeds) == 1:
        found.append(ONE_SEED)
    if (table["metric"] == "win rate").any():
        judge = recipe.judge.label if recipe.judge else "the base model itself"
        if "study" in set(table["section"]):
            judge += ", unless a member names another"
        found.append(
            f"The judge 'self' of the comparisons is {judge}. A model that was trained on a judge's verdicts "
            "pleases that judge: believe such a win rate only beside another judge or the oracle."
        )
    overlaps = table[table["metric"].str.startswith("overlap") & (table["value"] > 0)]
    for metric, rows in overlaps.groupby("metric", sort=False):
        shares = [f"{r.questions} {100 * r.value:.1f} % (n = {r.n:,})" for r in rows.itertuples()]
        found.append(
            f"Questions that have an {metric} with a training prompt: {', '.join(shares)}."
        )
    if len(overlaps) and recipe.model.path == "tiny":
        found.append(
            "In the tiny world prompts that ask for a combination of the test are discarded: what the test "
            "questions share with others is wording."
        )
    notes = [note for text in table["note"] for note in (text or "").split("; ")]
    found += dict.fromkeys(note for note in notes if note.startswith("doubtful"))
    if lost := [row for row in table.itertuples(index=False) if math.isnan(row.value)]:
        found.append(f"{len(lost)} numbers could not be estimated, such as {what(lost[0])}.")
    return found


def blocks(table: pd.DataFrame) -> dict[str, list[list[str]]]:
    """The small tables of a summary that are not empty, each as lines of cells, headings first.

    Returns:
        "judge", "result" and "price" for a run of SAO; for a run of rounds, "pairs" instead of "judge".
    """
    if "rounds" in set(table["section"]):
        found = _rounds(table)
    else:
        found = {"judge": _judge(table), "result": _result(table), "price": _price(table)}
    return {name: lines for name, lines in found.items() if lines}


def _rounds(table: pd.DataFrame) -> dict[str, list[list[str]]]:
    """A line per model, in the order of the rounds: good answers by topic and win rates; pairs; price."""
    first = table["temperature"].min()
    greedy = table[table["temperature"].isna() | (table["temperature"] == first)]
    lengths, tasks = greedy["metric"] == "answer length", greedy["section"] == "task"
    of_pairs = greedy["questions"] == "training pairs"
    return {
        "result": _by_round(
            greedy[~(lengths | tasks | of_pairs)], f"Good answers, {decoding(first)}"
        ),
        "pairs": _by_round(greedy[of_pairs], "Training pairs"),
        "price": _by_round(greedy[lengths | tasks], "Price paid"),
    }


def _by_round(rows: pd.DataFrame, title: str) -> list[list[str]]:
    """A line per model, and a column per quantity."""
    columns: dict[str, dict] = {}  # heading -> model -> row
    for row in rows.itertuples(index=False, name="Row"):
        if row.metric == "similarity of prompts" or is_difference(row):
            continue
        heading = "win rate over base" if row.metric == "win rate" else row.metric
        by_questions = row.metric == "good answers" or row.section == "task"
        heading = row.questions if by_questions else heading
        heading += ", tokens" if row.unit == "tokens" else ""
        name = f"round {row.round}" if row.round else model_in_words(row.model)
        columns.setdefault(heading, {})[name] = row
    return [*_headings(title, columns), *_lines(columns)] if columns else []


def _funnel(folder: Path) -> list[str]:
    """`2,400 prompts asked for - 783 evaluation question ... = 854 pairs`, wrapped into lines."""
    path = folder / "tables" / "funnel.csv"
    if not path.is_file():
        return []
    steps = pd.read_csv(path)
    of_first = steps[steps["arm"] == steps["arm"].get(0)]
    text = sum_in_words(zip(of_first["step"], of_first["count"]))
    return textwrap.wrap(f"Data: {text}", WIDTH, subsequent_indent="      ")


def _judge(table: pd.DataFrame) -> list[list[str]]:
    wanted = {
        "accuracy": "where one of the two answers is better, it prefers that one",
        "flip rate": "it prefers another answer when the order is reversed",
        "first position": "it prefers the answer that is shown first",
    }
    own = {"section": "judge", "judge": "self", "questions": "training pairs"}
    rows = {words: value_of(table, metric=metric, **own) for metric, words in wanted.items()}
    lines = [[f"  {w}", in_words(row), f"n = {row.n:,}"] for w, row in rows.items() if row]
    return [["The judge", "", ""], *lines] if lines else []


def advice_on_judge(table: pd.DataFrame) -> str:
    """Whether SAO can work with a judge: does the interval show that it beats chance?"""
    accuracy = value_of(table, metric="accuracy", questions="training pairs")
    if accuracy is None:
        return (
            "How often it is right is not known: there is no pair whose better answer an oracle knows. Set "
            "prompts.instructions=0.8, or give pairs with known labels (judging.labelled)."
        )
    words = f"{in_words(accuracy)} (n = {accuracy.n:,})"
    if accuracy.low > 0.5:
        return f"It is right more often than chance, {words}: its verdicts can teach something."
    return (
        f"Nothing shows that it is right more often than chance, {words}: SAO cannot be expected to work "
        "with it. Take a larger model, another judge (judge.path), or more prompts (prompts.count)."
    )


def _result(table: pd.DataFrame) -> list[list[str]]:
    """Every model's good answers at each temperature, and win rates; then how far "self" is ahead."""
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
    return lines


def _headings(title: str, columns: dict[str, dict]) -> list[list[str]]:
    """The two lines above a table: the name of each column, and the number of values behind it."""
    sized = [f"n = {sizes(column.values())}" for column in columns.values()]
    return [[title, *columns], ["", *sized]]


def _lines(columns: dict[str, dict]) -> list[list[str]]:
    """A line for each name that occurs in any column: the name, and its value in each column."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        [f"  {name}", *(_short(column.get(name)) for column in columns.values())] for name in names
    ]


def _short(row) -> str:
    """A value for a narrow column; if there is none, results.md says why."""
    if row is None:
        return ""
    return (
        "not estimated"
        if math.isnan(row.value)
        else in_words(row).removesuffix(" points").removesuffix(" tokens")
    )


def _price(table: pd.DataFrame) -> list[list[str]]:
    """The price of training: flaws that became more frequent, length, and what was forgotten."""
    rows = select(table, section=("flaws", "length", "task"), model=("base", "self"), seed=None)
    shown = {"repeated"}
    for flaw in rows[rows["section"] == "flaws"]["metric"].unique():
        base, tuned = (value_of(rows, metric=flaw, model=name) for name in ("base", "self"))
        if base and tuned and tuned.value > base.value:
            shown.add(flaw)
    rows = rows[rows["metric"].isin(shown) | (rows["section"] != "flaws")]
    lines = [["Price paid", "base", "tuned", "difference", "n"]]
    tasks = set(rows[rows["section"] == "task"]["questions"])
    for label, _, *cells in compare(rows).itertuples(index=False, name=None):
        if (name := label.split(":")[0]) in tasks:
            label = f"task {name}"
        elif label == "answer length":
            label, cells = f"{label}, tokens", [text.removesuffix(" tokens") for text in cells]
        lines.append([f"  {label}", *(text.removesuffix(" points") for text in cells)])
    return lines if len(lines) > 1 else []


def _grid(lines: list[list[str]]) -> list[str]:
    """Lines of cells in aligned columns; the last column may have any width."""
    widths = [max(map(len, column)) for column in list(zip(*lines))[:-1]] + [0]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths)).rstrip() for line in lines]
