"""Pictures of an evaluation: good answers, win rates, differences, length."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.table import select
from sao_utils.report.words import decoding, is_difference, model_in_words, models
from sao_utils.statistics.intervals import win_rate
from sao_utils.statistics.length_control import length_curve

#: outcome of a comparison in both orders -> its colour and pattern, from the best to the worst
OUTCOMES = (
    ("wins in both orders", style.BLUE, ""),
    ("the one shown first wins", style.LIGHT, "//"),
    ("tie, identical or invalid", "#E5E5E5", ""),
    ("the one shown second wins", style.LIGHT, "\\\\"),
    ("loses in both orders", style.ORANGE, ""),
)


@style.styled
def good_answers(table: pd.DataFrame):
    """The share of good answers of every model, at each temperature (rows of `results.results`)."""
    rows = select(table, section="quality", metric="good answers", against=None, seed=None)
    found = [(decoding(row.temperature), row) for row in rows.itertuples(index=False)]
    return _by_model(
        found,
        "Answers without a flaw, on held-out questions",
        "share of questions (%), with 95 % interval",
        "no oracle for these questions",
    )


@style.styled
def win_rates(table: pd.DataFrame):
    """The self-judged win rate against the base of every arm, raw and at equal length."""
    kinds = {"win rate": "raw", "win rate at equal length": "at equal length"}
    rows = select(table, section="win rate", metric=list(kinds), against="base", seed=None)
    found = [(kinds[row.metric], row) for row in rows.itertuples(index=False)]
    return _by_model(
        found,
        "Does the base model prefer the tuned answer to its own?",
        "win rate (%), with 95 % interval; 50: no preference",
        "no comparisons",
        at=50,
    )


def _by_model(found: list[tuple], title: str, x: str, why: str, at: float | None = None):
    """A row a model, in it a dot for each way of measuring: `found` has (way, row of the table)."""
    ways = dict(zip(dict.fromkeys(way for way, _ in found), "osD^v"))
    first = next(iter(ways), None)
    lines: dict[str, list[tuple]] = {}
    for name in dict.fromkeys([*style.COLOURS, *(row.model for _, row in found)]):
        dots = {way: row for way, row in found if row.model == name}
        if dots:
            lines[model_in_words(name)] = [
                (dots[way], style.COLOURS.get(name, style.SKY), marker, way == first)
                for way, marker in ways.items()
                if way in dots
            ]
    legend = [(marker, way == first, way) for way, marker in ways.items()]
    return style.interval_chart(lines, title, x, why, at, legend)


@style.styled
def differences(table: pd.DataFrame):
    """Differences between models with their intervals (a forest plot).

    Args:
        table: rows of `results.results`; drawn are those that are differences (in points) of good
            answers at the first temperature, over all seeds. Other differences are drawn if the table
            holds none of these.
    """
    rows = [row for row in table.itertuples(index=False) if is_difference(row) and row.seed is None]
    good = [row for row in rows if (row.section, row.metric) == ("quality", "good answers")]
    rows = [row for row in good if row.temperature == good[0].temperature] or rows
    lines = {}
    for row in rows:
        clear = row.low > 0 or row.high < 0
        lines[models(row)] = [(row, style.BLUE if clear else style.GREY, "o", True)]
    title = "Differences; an interval that crosses zero may be none"
    x = "percentage points, with 95 % interval"
    return style.interval_chart(lines, title, x, "none was measured", at=0)


@style.styled
def length_control(rows: list[dict], groups: int = 8):
    """Won against the difference in length, and the curve that length control reads at 0.

    Args:
        rows: of one call of `methods.evaluate.comparison`.
        groups: so many points at most, of as many prompts each (20 or more), in order of the
            difference.
    """
    figure, axes = style.new(3.8)
    x, y = "characters of the tuned answer - of the base's", "won by the tuned model (%)"
    style.titles(axes, "How much of the win rate is length?", x, y)
    there = sorted(
        (len(row["responses"][0]) - len(row["responses"][1]), row["win"], row["combination"])
        for row in rows
        if row["win"] is not None
    )
    if not there:
        return style.nothing(axes, "no valid verdict")
    size = math.ceil(len(there) / max(1, min(groups, len(there) // 20)))
    for start in range(0, len(there), size):
        longer, wins, by = zip(*there[start : start + size])
        at = sum(longer) / len(longer)
        label = f"mean of {size} prompts, with 95 % interval" if not start else None
        style.points(axes, [at], [win_rate(wins, by).rate], color=style.BLUE, label=label)
    longer, wins, _ = zip(*there)
    low, high = axes.get_xlim()
    at = [low + (high - low) * k / 100 for k in range(101)]
    fitted = length_curve(wins, longer, [0.0, *at])
    if fitted:
        label = f"fitted curve; at equal length: {100 * fitted[0]:.1f}"
        axes.plot(at, [100 * p for p in fitted[1:]], color=style.ORANGE, lw=2, label=label)
    raw = 100 * sum(wins) / len(wins)
    axes.axhline(raw, color=style.GREY, ls="--", label=f"all, raw: {raw:.1f} (n = {len(wins)})")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_ylim(-2, 102)
    axes.legend(loc="lower right", fontsize=9)
    return figure


@style.styled
def outcomes(rows: list[dict]):
    """What both orders said of each model and its opponent (rows of `methods.evaluate.comparison`)."""
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row["model"], Counter())[_outcome(row)] += 1
    figure, axes = style.new(0.5 * len(counts) + 1.6)
    title = "Both orders: who wins, and where the place decides"
    style.titles(axes, title, "share of prompts (%)")
    if not counts:
        return style.nothing(axes, "no comparisons")
    left = [0.0] * len(counts)
    for kind, colour, hatch in OUTCOMES:
        widths = [100 * of[kind] / of.total() for of in counts.values()]
        looks = dict(color=colour, hatch=hatch, edgecolor="white", lw=0.5, label=kind)
        axes.barh(range(len(counts)), widths, left=left, **looks)
        for k, width in enumerate(widths):
            if width >= 4:
                axes.text(left[k] + width / 2, k, f"{width:.0f}", ha="center", va="center")
        left = [a + b for a, b in zip(left, widths)]
    names = (f"{model_in_words(m)} (n = {of.total()})" for m, of in counts.items())
    style.name_rows(axes, list(names))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _outcome(row: dict) -> str:
    if row["outcome"] == "consistent":
        return "wins in both orders" if row["margin"] > 0 else "loses in both orders"
    if row["outcome"] == "inconsistent":
        place = "first" if row["first_wins"][0] else "second"
        return f"the one shown {place} wins"
    return "tie, identical or invalid"
