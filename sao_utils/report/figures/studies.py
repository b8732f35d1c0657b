"""Pictures of a study: what each member gained over the base, and which rules stop in time."""

from __future__ import annotations

import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.table import select
from sao_utils.report.words import decoding


@style.styled
def study(table: pd.DataFrame, title: str):
    """The gain of every member over the base, with its interval: a dot for each set of questions.

    Of the last round of each member, at the first temperature.

    Args:
        table: rows of `report.studies.study_table`.
    """
    rows = select(table, metric="good answers", against="base")
    if rows.empty:
        return style.nothing("no member has been run")
    first = rows["temperature"].min()
    rows = select(rows, temperature=first)
    return style.intervals(
        {
            topic: {row.model: row for row in select(rows, questions=topic).itertuples(index=False)}
            for topic in rows["questions"].unique()
        },
        f"{title} ({decoding(first)})",
        "gain over the base, in points, of answers without a flaw",
        "no member has been run",
        at=0,
    )


@style.styled
def stopping(table: pd.DataFrame):
    """Where judge and oracle part ways, and how often rules that need no oracle stop in time.

    Left: a line a member, from the base through its rounds: how often the judge prefers its model to the
    base, over what the oracle says it gained. Down and right is honest progress that the judge misses;
    up and left the judge is pleased by worse answers. Right: each rule's share of right decisions.

    Args:
        table: rows of `report.studies.study_table` of a study with `stopping`.
    """
    found = select(table, metric="right to stop or go on")
    gains = select(table, metric="good answers", against="base", questions="all")
    if found.empty or gains.empty:
        return style.nothing("no run had two rounds that an oracle knows")
    gains = select(gains, temperature=gains["temperature"].min())
    wins = select(table, metric="win rate", against="base")
    figure, (left, right) = style.grid(4.2, columns=2)
    for k, member in enumerate(gains["model"].unique()):
        both = [select(rows, model=member).sort_values("round") for rows in (gains, wins)]
        x, y = ([100 * value for value in rows["value"]] for rows in both)
        looks = dict(marker="osD^"[k % 4], color=style.colour(k), label=member)
        left.plot([0, *x], [50, *y], **looks)
        for number, at in enumerate(zip(x, y), 1):
            left.annotate(str(number), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.axhline(50, color="black", lw=0.8)
    left.axvline(0, color="black", lw=0.8)
    left.set(
        title="What the judge sees, and what is true",
        xlabel="gain by the oracle (points; numbers: rounds)",
        ylabel="the base as judge prefers it (%)",
    )
    value, reach = style.percent(list(found.itertuples(index=False)))
    right.errorbar(value, range(len(found)), xerr=reach, fmt="o", color=style.BLUE, capsize=3)
    style.name_rows(right, list(found["model"]))
    sized = f"right (%), 95 % interval (n = {found['n'].iloc[0]} decisions)"
    right.set(title="Rules that need no oracle", xlabel=sized, xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure
