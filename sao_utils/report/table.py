"""The tidy table of a run's results: a row a number, and how to select rows.

`results.results` makes it, a run's folder keeps it in tables/, and figures, tables, model cards and
`sao show` select from it. Reading it needs neither torch nor a model.

Columns: `section` (prompts, judge, quality, flaws, win rate, length, comparison, benchmark, task,
leakage; rounds, study) and `metric` name what is measured; `model` whose number it is; `against` the
model that it is compared with, so that a difference of two models names both; `judge` who decided;
`questions` on what; `temperature` of the answers; `seed` of the training, empty: over all of them;
`round` of the method; `value` with the ends `low` and `high` of its 95 % interval, and `n` values
behind it; `unit`: shares are 0 to 1 and have the unit "%", differences of shares "points"; `note`: what
to know about it, or why it could not be estimated.
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
#: metric -> its unit, where it is no share
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
        unit: by default that of `UNITS`, else "%".
        names: the columns from `model` (by default "base") to `round`.
    """
    notes = [text for text in (note, found.note) if text]
    if math.isnan(found.value) and not notes:
        notes = ["cannot be estimated from these values"]  # kappa, say, where all are alike
    row = {"section": section, "metric": metric, "model": "base", "round": 0, **names}
    numbers = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    unit = UNITS.get(metric, "%") if unit is None else unit
    return row | numbers | {"unit": unit, "note": "; ".join(notes)}


def make_table(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a data frame of `COLUMNS`: None where a cell is empty, NaN where there is no number."""
    table = pd.DataFrame(list(rows), columns=COLUMNS, dtype=object)
    table = table.where(table.notna(), None)
    return table.astype(dict.fromkeys(("value", "low", "high"), float))


def select(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """The rows whose columns are as given.

    Args:
        columns: column=value. None: empty. A list or tuple: one of these values.

    Raises:
        KeyError: no such column.
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
    """The first row whose columns are as given, None without one.

    Unless they are named, `against` and `seed` are empty: a value by itself, over all seeds. The rows
    of the first temperature of a recipe come first.

    Returns:
        A named tuple of `COLUMNS`.
    """
    found = select(table, **{"against": None, "seed": None, **columns})
    return next(found.itertuples(index=False, name="Row"), None)


def as_records(table: pd.DataFrame) -> list[dict]:
    """The rows as JSON may hold them: six decimals, None for what is not finite."""
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
    """The results that a run's folder keeps.

    Raises:
        FileNotFoundError: it has none yet.
        ValueError: the file is damaged, or of an older version of the kit.
    """
    path = Path(folder) / "tables" / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "metric" in r for r in rows):
        raise ValueError(f"{path} is no table of results: run notebook 06 again.")
    return make_table(rows)
