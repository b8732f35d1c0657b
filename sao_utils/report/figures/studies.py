"""Pictures of a study: each member's gain over the base, and which rules stop in time."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd

from sao_utils.report.break_even import points
from sao_utils.report.figures import style
from sao_utils.report.table import select, value_of
from sao_utils.report.words import decoding, in_words


@style.styled
def study(
    table: pd.DataFrame, title: str, reported: dict[str, float] | None = None, measure: str = ""
):
    """Every member's gain over the base after its last round, with its interval.

    A dot for each set of questions at the first temperature; with one set, a dot for each temperature.
    What the paper reports is below, on an axis of its own, because it measures something else.

    Args:
        table: rows of `report.studies.study_table`.
        reported: `report.studies.reported` of the study.
        measure: what the paper's numbers are, and on how many questions.
    """
    rows = select(table, metric="good answers", against="base", seed=None)
    if rows.empty:
        return style.nothing("no member has been run")
    first, by = rows["temperature"].min(), "temperature"
    if rows["questions"].nunique() > 1:
        rows, by = select(rows, temperature=first), "questions"
        title = textwrap.fill(f"{title} ({decoding(first)})", 55)
    return style.intervals(
        {
            decoding(way) if by == "temperature" else way: {
                row.model: row for row in select(rows, **{by: way}).itertuples(index=False)
            }
            for way in rows[by].unique()
        },
        title,
        "gain over the base, in points,\nof answers without a flaw",
        "no member has been run",
        at=0,
        reported=reported or {},
        measure=measure,
    )


@style.styled
def break_even(table: pd.DataFrame):
    """The gain of a round against its judge's accuracy, one point per member and seed, and the break-even.

    Lines: least squares; bands: the 95 % interval of where they cross zero.

    Args:
        table: rows of `report.studies.study_table` for a study with `break_even`.
    """
    of = points(table)
    if not of:
        return style.nothing("no study of judges has been run")
    size = sum(len(accuracy) for accuracy, _ in of.values())
    x = f"judged pairs on which the judge is right (%; n = {size} trainings)"
    y = "gain over the base (points)"
    figure, axes = style.new("How often must a judge be right?", x, y, 4.2)
    axes.axhline(0, color="black", lw=0.8)
    for k, (way, found) in enumerate(of.items()):
        accuracy, gain = (100 * np.array(values) for values in found)
        looks = dict(color=style.colour(k))
        axes.plot(accuracy, gain, "osD^"[k % 4], mfc="none", **looks)
        at = value_of(table, metric="break-even accuracy", model=way)
        ends = np.array([accuracy.min(), accuracy.max()])
        line = np.polyval(np.polyfit(accuracy, gain, 1), ends) if np.ptp(ends) else gain[:2]
        axes.plot(ends, line, ls=("-", "--")[k % 2], label=f"{way}: {in_words(at)}", **looks)
        if np.isfinite(at.value):
            axes.axvspan(*np.clip([100 * at.low, 100 * at.high], *ends), alpha=0.12, lw=0, **looks)
    figure.legend(title="break-even", loc="outside lower center", ncols=2, fontsize=9)
    return figure


@style.styled
def stopping(table: pd.DataFrame):
    """Where judge and oracle part ways, and how often rules that need no oracle stop in time.

    Left: one line per member, from the base through its rounds: how often its judge (the base, unless the
    member names another) prefers its model to the base, against the gain by the oracle, both with 95 %
    intervals. Down and to the right is real progress that the judge misses; up and to the left, the judge
    is pleased by worse answers. Right: each rule's share of right decisions.

    Args:
        table: rows of `report.studies.study_table` for a study with `stopping`.
    """
    found = select(table, metric="right to stop or go on")
    gains = select(table, metric="good answers", against="base", questions="all", seed=None)
    if found.empty or gains.empty:
        return style.nothing("no run had two rounds that an oracle knows")
    gains = select(gains, temperature=gains["temperature"].min())
    wins = select(table, metric="win rate", against="base")
    asked, judged = (style.sizes(rows.itertuples()) for rows in (gains, wins))
    figure, (left, right) = style.grid(4.2, columns=2)
    for k, member in enumerate(gains["model"].unique()):
        both = [select(rows, model=member).sort_values("round") for rows in (gains, wins)]
        (x, across), (y, up) = (style.percent(list(rows.itertuples(index=False))) for rows in both)
        looks = dict(color=style.colour(k), marker="osD^"[k % 4], label=member)
        left.errorbar(x, y, up, across, elinewidth=0.7, capsize=2, **looks)
        left.plot([0, x[0]], [50, y[0]], color=style.colour(k))  # the base, which has no interval
        for number, at in enumerate(zip(x, y), 1):
            left.annotate(str(number), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.axhline(50, color="black", lw=0.8)
    left.axvline(0, color="black", lw=0.8)
    left.set(
        title="What the judge sees, and what is true",
        xlabel=f"gain by the oracle (points, n = {asked})\nnumbers: rounds; bars: 95 % intervals",
        ylabel=f"its judge prefers it to the base (%, n = {judged})",
    )
    value, reach = style.percent(list(found.itertuples(index=False)))
    right.errorbar(value, range(len(found)), xerr=reach, fmt="o", color=style.BLUE, capsize=3)
    style.name_rows(right, list(found["model"]))
    sized = f"right (%), 95 % interval (n = {found['n'].iloc[0]} decisions)"
    right.set(title="Rules that need no oracle", xlabel=sized, xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure
