"""A run's results on one screen, as `sao show` prints them. Reads the run's tables; needs no torch."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import pandas as pd
import yaml

from sao_utils.report.table import as_csv, as_records, make_table, read_table, select, value_of
from sao_utils.report.words import (
    FLAWS,
    NOT_COMPARABLE,
    compare,
    decoding,
    in_words,
    markdown,
    model_in_words,
    show,
)

WIDTH = 100


def records(folder: Path) -> list[dict]:
    """Every row of a run's results. Errors as of `table.read_table`, here and below."""
    return as_records(read_table(folder))


def csv_text(folder: Path) -> str:
    """Every row of a run's results as CSV."""
    return as_csv(read_table(folder))


def all_rows(folder: Path) -> str:
    """Every row of a run's results in words, under its section, in aligned columns."""
    table, parts = read_table(folder), []
    for section in dict.fromkeys(table["section"]):
        shown = show(select(table, section=section))
        parts.append([section.upper(), *_grid([list(shown.columns), *shown.values.tolist()])])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _grid(lines: list[list[str]]) -> list[str]:
    """Lines of cells in aligned columns; the last column is as wide as it likes."""
    widths = [max(map(len, column)) for column in list(zip(*lines))[:-1]] + [0]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths)).rstrip() for line in lines]


def summary(folder: Path) -> str:
    """What was run, what became of the prompts, how good the judge is, the result, and its price."""
    folder, table = Path(folder), read_table(folder)
    recipe = yaml.safe_load((folder / "tables" / "recipe.yaml").read_text(encoding="utf-8"))
    parts = [
        _run(folder, recipe),
        _funnel(folder),
        _judge(table),
        _result(table),
        _price(table),
    ]
    if recipe["model"]["path"] == "tiny":
        parts.append(textwrap.wrap(NOT_COMPARABLE, WIDTH))
    return "\n".join(line for part in parts for line in part)


def _run(folder: Path, recipe: dict) -> list[str]:
    model, seeds = recipe["model"]["path"], recipe["seeds"]
    several = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    return [
        f"{folder.name}: recipe {recipe['name']}, model {model}, {several}, "
        f"{recipe['prompts']['count']:,} prompts a seed, {recipe['training']['algorithm']}"
    ]


def _funnel(folder: Path) -> list[str]:
    """`2,400 prompts asked for - 783 evaluation question ... = 854 pairs`, in as many lines."""
    path = folder / "tables" / "funnel.csv"
    if not path.is_file():
        return []
    steps = pd.read_csv(path)
    steps = steps[steps["arm"] == steps["arm"].iloc[0]] if len(steps) else steps
    parts = []
    for step, count in zip(steps["step"], steps["count"]):
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
    good = select(table, section="quality", metric="good answers", seed=None)
    wins = select(table, section="win rate", metric="win rate", seed=None)
    ahead = select(table, section="win rate", metric="difference in win rate", seed=None)
    columns = {}  # heading -> (model -> its row, other model -> the difference)
    for temperature in dict.fromkeys(good["temperature"]):
        of = select(good, temperature=temperature)
        gains = of[of["against"].notna()]
        columns[f"good answers, {decoding(temperature)}"] = (
            _by(select(of, against=None), "model"),
            _by(select(gains, model="self"), "against"),
        )
    columns["win rate over base"] = (_by(wins, "model"), _by(ahead, "against"))
    columns = {heading: both for heading, both in columns.items() if both[0]}
    sizes = [_sizes([*alone.values(), *gains.values()]) for alone, gains in columns.values()]
    lines = [["Result, on held-out questions", *columns], ["", *sizes]]
    for k, heading in ((0, ""), (1, "Self-judged ahead, in points, of")):
        models = dict.fromkeys(model for both in columns.values() for model in both[k])
        if heading and models:
            lines.append([heading, *("" for _ in columns)])
        for model in models:
            cells = [both[k].get(model) for both in columns.values()]
            texts = ["" if row is None else _short(row) for row in cells]
            lines.append([f"  {model_in_words(model)}", *texts])
    return _grid(lines) if columns else []


def _by(rows: pd.DataFrame, column: str) -> dict:
    return {getattr(row, column): row for row in rows.itertuples(index=False, name="Row")}


def _sizes(rows: list) -> str:
    found = sorted({row.n for row in rows})
    return f"n = {found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "")


def _short(row) -> str:
    """A value in a narrow column: why there is none is for `all_rows`."""
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


def reference_table(folder: Path) -> str:
    """The results that a reader of the README wants to see, as a Markdown table."""
    table = read_table(folder)
    quality = {"section": "quality", "metric": "good answers"}
    temperatures = list(dict.fromkeys(select(table, **quality)["temperature"])) or [0.0]
    first, last = ({**quality, "temperature": t} for t in (temperatures[0], temperatures[-1]))
    judge = {"section": "judge", "judge": "self", "questions": "training pairs"}
    wanted = [
        {**first, "model": "base"},
        {**first, "model": "self"},
        *({**first, "model": "self", "against": other} for other in ("base", "sft_random")),
        *({**first, "model": m, "against": "base"} for m in ("sft_random", "random", "oracle")),
        *({**last, "model": model} for model in ("base", "self") if last != first),
        {"metric": "win rate at equal length", "model": "self", "against": "base"},
        *({"metric": "repeated", "model": model} for model in ("base", "self")),
        *({**judge, "metric": metric} for metric in ("accuracy", "first position")),
        {"section": "task", "questions": "tiny_facts", "model": "self", "against": "base"},
    ]
    found = [row._asdict() for columns in wanted if (row := value_of(table, **columns))]
    return markdown(show(make_table(found)).drop(columns="remarks", errors="ignore"))
