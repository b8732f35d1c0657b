"""When does self-alignment work? What a round gains, over how often its judge is right."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from sao_utils.report.table import make_row, select
from sao_utils.statistics.break_even import Points, crossing_shift, zero_crossing


def points(table: pd.DataFrame) -> dict[str, Points]:
    """Way of keeping pairs -> (how often the judge is right, gain over the base), a point a member and seed.

    Of the last round, at the first temperature. The judge counts on all pairs that it judged, kept or
    not: the filter's own work shows in the gain.

    Args:
        table: rows of `report.studies.study_table` of a study with `break_even`.
    """
    found: dict[str, dict[tuple, list]] = {}
    rows = table[table["seed"].notna()]
    right = select(rows, metric="judge is right")
    gains = select(rows, metric="good answers", against="base", questions="all")
    gains = select(gains, temperature=gains["temperature"].min())
    for k, part in enumerate((right, gains)):
        for row in part.itertuples(index=False):
            point = found.setdefault(row.note, {}).setdefault((row.model, row.seed), [None, None])
            point[k] = row.value  # later rounds overwrite earlier ones
    whole = {
        way: [of for of in by.values() if not any(value is None or value != value for value in of)]
        for way, by in found.items()
    }
    return {way: tuple(zip(*of)) for way, of in whole.items() if len(of) > 1}


def break_even_rows(table: pd.DataFrame) -> Iterator[dict]:
    """The break-even accuracy of each way of keeping pairs, and by how much the last moves the first's."""
    of, where = points(table), {"questions": "all", "judge": "oracle"}
    for way, found in of.items():
        crossing = zero_crossing(found)
        yield make_row("study", "break-even accuracy", crossing, model=way, **where)
    ways = list(of)
    if len(ways) == 2:
        moved = crossing_shift(of[ways[1]], of[ways[0]])
        names = {"model": ways[0], "against": ways[1], **where}
        yield make_row("study", "break-even accuracy", moved, "points", **names)
