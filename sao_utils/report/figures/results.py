"""Pictures of an evaluation: good answers, win rates, differences, length."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.table import select
from sao_utils.report.words import decoding, is_difference, model_in_words, models
from sao_utils.statistics.intervals import win_rate
from sao_utils.statistics.length_control import length_curve


@style.styled
def good_answers(table: pd.DataFrame):
    """Every model's share of good answers, at each temperature (rows of `results.results`)."""
    rows = select(table, section="quality", metric="good answers", against=None, seed=None)
    return style.intervals(
        {decoding(t): _by_model(select(rows, temperature=t)) for t in rows["temperature"].unique()},
        "Answers without a flaw, on held-out questions",
        "share of questions (%)",
        "no oracle for these questions",
    )


@style.styled
def win_rates(table: pd.DataFrame):
    """Every arm's self-judged win rate against the base, raw and at equal length."""
    rows = select(table, section="win rate", against="base", seed=None)
    ways = {"raw": "win rate", "at equal length": "win rate at equal length"}
    return style.intervals(
        {way: _by_model(select(rows, metric=metric)) for way, metric in ways.items()},
        "Does the base model prefer the tuned answer to its own?",
        "win rate (%), 50: no preference",
        "no comparisons",
        at=50,
    )


def _by_model(rows: pd.DataFrame) -> dict:
    return {model_in_words(row.model): row for row in rows.itertuples(index=False)}


@style.styled
def differences(table: pd.DataFrame):
    """Differences between models with their intervals (a forest plot).

    Args:
        table: rows of `results.results`, of one metric and temperature; only differences (in points)
            over all seeds are drawn.
    """
    rows = [row for row in table.itertuples(index=False) if is_difference(row) and row.seed is None]
    return style.intervals(
        {"difference": {models(row): row for row in rows}},
        "Differences; an interval that crosses zero may be none",
        "percentage points",
        "none was measured",
        at=0,
    )


@style.styled
def length_control(rows: list[dict]):
    """The win rate against the difference in length, and the curve that length control reads at 0.

    Dots are groups of about equally many prompts, 20 or more each, in order of the difference.

    Args:
        rows: rows of one call of `methods.evaluate.comparison`.
    """
    there = sorted(
        (len(row["responses"][0]) - len(row["responses"][1]), row["win"], row["combination"])
        for row in rows
        if row["win"] is not None
    )
    if not there:
        return style.nothing("no valid verdict")
    longer, wins, clusters = map(np.array, zip(*there))
    x, y = "characters of the tuned answer - of the base's", "won by the tuned model (%)"
    figure, axes = style.new("How much of the win rate is length?", x, y, height=3.8)
    groups = np.array_split(np.arange(len(wins)), max(1, min(8, len(wins) // 20)))
    values, reach = style.percent([win_rate(wins[k], clusters[k]) for k in groups])
    label = f"mean of {len(groups[0])} prompts, with 95 % interval"
    means = [longer[k].mean() for k in groups]
    axes.errorbar(means, values, reach, fmt="o", capsize=3, color=style.BLUE, label=label)
    at = np.linspace(*axes.get_xlim(), 101)
    if fitted := length_curve(wins, longer, [0.0, *at]):
        label = f"fitted curve; at equal length: {100 * fitted[0]:.1f}"
        axes.plot(at, 100 * np.array(fitted[1:]), color=style.ORANGE, lw=2, label=label)
    raw = 100 * np.mean(wins)
    axes.axhline(raw, color=style.GREY, ls="--", label=f"all, raw: {raw:.1f} (n = {len(wins)})")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_ylim(-2, 102)
    axes.legend(loc="lower right", fontsize=9)
    return figure
