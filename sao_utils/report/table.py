"""The tidy table of a run's results: one row per number, and how to select rows.

`results.results` makes it, a run's folder keeps it in tables/, and figures, tables, model cards and
`sao show` select from it. Reading it needs neither torch nor a model.

Columns: `section` (prompts, judge, quality, flaws, win rate, length, comparison, benchmark, task,
leakage; rounds, study) and `metric` name what is measured; `model`: whose number it is; `against`: the
model that it is compared with, so that a difference of two models names both; `judge`: who decided;
`questions`: on which questions; `temperature` of the answers; `seed` of the training, empty for a number
over all seeds; `round` of the method; `value`, with the ends `low` and `high` of its 95 % interval, and
`n`, the number of values behind it; `unit`: shares are 0 to 1 and have the unit "%", differences of
shares "points"; `note`: what to know about the number, or why it could not be estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

if TYPE_CHECKING:
    from sao_utils.statistics.intervals import Interval

COLUMNS = (
    "section metric model against judge questions temperature seed round value low high n unit note"
).split()
#: metric -> its unit, if it is not a share
UNITS = {
    "answer length": "tokens",
    "difference in win rate": "points",
    "Elo": "Elo",
    "kappa": "",
    "kappa, one order": "",
    "length bias": "points",
    "length difference": "characters",
    "minutes": "minutes",
    "similarity of prompts": "",
    "tokens trained on": "tokens",
    "tokens written": "tokens",
}


def make_row(
    section: str, metric: str, found: Interval, unit: str | None = None, note: str = "", **names
) -> dict:
    """A row of the table from an estimate.

    Args:
        unit: by default the metric's unit in `UNITS`, else "%".
        names: the columns from `model` (by default "base") to `round` (by default 0).
    """
    notes = [text for text in (note, found.note) if text]
    if math.isnan(found.value) and not notes:
        notes = ["cannot be estimated from these values"]  # such as kappa, if all are alike
    row = {"section": section, "metric": metric, "model": "base", "round": 0, **names}
    numbers = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    unit = UNITS.get(metric, "%") if unit is None else unit
    return row | numbers | {"unit": unit, "note": "; ".join(notes)}


def make_table(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a data frame of `COLUMNS`; empty cells are None, missing numbers NaN."""
    table = pd.DataFrame(list(rows), columns=COLUMNS, dtype=object)
    table = table.where(table.notna(), None)
    return table.astype(dict.fromkeys(("value", "low", "high"), float))


def select(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """The rows whose columns have the given values.

    Args:
        columns: column=value. None: empty. A list or tuple: any of its values.

    Raises:
        KeyError: there is no such column.
    """
    for name, wanted in columns.items():
        if wanted is None:
            keep = table[name].isna()
        elif isinstance(wanted, (list, tuple)):
            keep = table[name].isin(wanted)
        else:
            keep = table[name] == wanted
        table = table[keep]
    return table


def value_of(table: pd.DataFrame, **columns: object) -> NamedTuple | None:
    """The first row whose columns have the given values; None if there is no such row.

    Unless they are given, `against` and `seed` must be empty: the value of one model, over all seeds. The
    rows of a recipe's first temperature come first.

    Returns:
        A named tuple of `COLUMNS`.
    """
    found = select(table, **{"against": None, "seed": None, **columns})
    return next(found.itertuples(index=False, name="Row"), None)


def as_records(table: pd.DataFrame) -> list[dict]:
    """The rows in a form that JSON can hold: numbers with six decimals, None if they are not finite."""
    finite = table.round(6).replace([math.inf, -math.inf, math.nan], None)
    return finite.to_dict(orient="records")


def as_json(table: pd.DataFrame) -> str:
    """The rows as a JSON array, each on a line of its own."""
    lines = [json.dumps(row, ensure_ascii=False) for row in as_records(table)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def as_csv(table: pd.DataFrame) -> str:
    """The rows as CSV, with a header."""
    return pd.DataFrame(as_records(table), columns=COLUMNS).to_csv(index=False, lineterminator="\n")


def read_table(folder: Path) -> pd.DataFrame:
    """The results that a run's folder holds.

    Raises:
        FileNotFoundError: it has none yet.
        ValueError: the file is damaged, or from an older version of the kit.
    """
    path = Path(folder) / "tables" / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "metric" in r for r in rows):
        raise ValueError(f"{path} is no table of results: run notebook 06 again.")
    return make_table(rows)
