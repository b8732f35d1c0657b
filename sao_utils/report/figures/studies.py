"""The picture of a study: what each member gained over the base."""

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
