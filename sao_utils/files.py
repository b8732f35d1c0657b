"""Tables in files of the user's: JSON lines, a JSON array, CSV, TSV or Parquet, also compressed (.gz)."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path

from sao_utils.recipe import RecipeError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HALF = re.compile("[\ud800-\udfff]")  # of a character: no file of ours could hold it


def is_table(source: str) -> bool:
    """Whether a name ends like a file that `read_table` can read."""
    return Path(source.removesuffix(".gz")).suffix.lower() in KINDS


def read_table(source: str) -> list[dict]:
    """The rows of a file, as they are: values of CSV and TSV are texts.

    Raises:
        RecipeError: the file is missing, of another kind, damaged, or has a line that is no row.
    """
    path = Path(source)
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if not is_table(source):
        raise RecipeError(f"'{source}' is none of the kinds of file that can be read: {_kinds()}.")
    if not path.is_file():
        raise RecipeError(f"There is no file '{source}'. It may be {_kinds()}.")
    try:
        if kind == ".parquet":
            import pandas as pd

            return pd.read_parquet(path).to_dict("records")
        unpack = gzip.open if path.suffix == ".gz" else open
        with unpack(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as file:  # Excel begins with a mark
            if kind in (".csv", ".tsv"):
                return _delimited(file, "," if kind == ".csv" else "\t")
            return _json_rows(file.read(), source)
    except RecipeError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:  # of gzip, UTF-8, CSV and Parquet
        raise RecipeError(f"{source} is damaged, or no UTF-8 text: {error}.") from None


def _kinds() -> str:
    return ", ".join(KINDS) + ", or .gz of one"


def _delimited(file, separator: str) -> list[dict]:
    import pandas as pd

    try:
        frame = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return []
    return frame.to_dict("records")


def _json_rows(text: str, source: str) -> list[dict]:
    """The objects of a JSON array, or of JSON lines."""
    if text.lstrip().startswith("["):
        numbered = enumerate(json.loads(text), 1)
        rows = [(row, f"{source}, row {k}") for k, row in numbered]
    else:
        lines = [(line, f"{source}, line {k}") for k, line in enumerate(text.split("\n"), 1)]
        rows = [(_object(line), where) for line, where in lines if line.strip()]
    for row, where in rows:
        if not isinstance(row, dict):
            raise RecipeError(f"{where} is no JSON object.")
        if "\\u" in text and _HALF.search(json.dumps(row, ensure_ascii=False)):
            raise RecipeError(f"{where} holds half of a character (\\ud800 to \\udfff).")
    return [row for row, _ in rows]


def _object(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_column(source: str, column: str) -> list[str]:
    """The non-empty texts of one column of a file, stripped.

    Raises:
        RecipeError: see `read_table`; or there is no such column (the message names those that there
            are), or a row has no text in it.
    """
    return texts_of(read_table(source), column, source)


def texts_of(rows: list[dict], column: str, source: str) -> list[str]:
    """The non-empty texts of one column of rows, stripped. `source` names the rows in messages.

    Raises:
        RecipeError: no rows, no such column, or a row without text in it.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if column not in columns:
        there = ", ".join(f"'{name}'" for name in columns) or "none"
        raise RecipeError(f"{source} has no column '{column}'. Its columns: {there}.")
    texts = []
    for k, row in enumerate(rows, 1):
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            fault = (
                "is empty" if value is None or value == "" or value != value else "holds no text"
            )
            raise RecipeError(f"{source}: row {k}: '{column}' {fault}. Correct or remove it.")
        texts.append(value.strip())
    return texts
