"""When does self-alignment work? The gain of a round against how often its judge is right."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from sao_utils.report.table import make_row, select
from sao_utils.statistics.break_even import Points, crossing_shift, zero_crossing


def points(table: pd.DataFrame) -> dict[str, Points]:
    """The accuracy of the judge and the gain over the base, one point per member and seed.

    Both are of the last round, the gain at the first temperature. The accuracy counts all pairs that were
    judged, kept or not; what the filter does shows in the gain.

    Args:
        table: rows of `report.studies.study_table` of a study with `break_even`.

    Returns:
        Way of keeping pairs -> (how often the judge is right [n], gain [n]), if it has two points or more.
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
    """The break-even accuracy of each way of keeping pairs; if there are two, also first minus second."""
    of, where = points(table), {"questions": "all", "judge": "oracle"}
    for way, found in of.items():
        crossing = zero_crossing(found)
        yield make_row("study", "break-even accuracy", crossing, model=way, **where)
    ways = list(of)
    if len(ways) == 2:
        moved = crossing_shift(of[ways[1]], of[ways[0]])
        names = {"model": ways[0], "against": ways[1], **where}
        yield make_row("study", "break-even accuracy", moved, "points", **names)
