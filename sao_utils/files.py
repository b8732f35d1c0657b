"""Tables in the user's own files: JSON Lines, a JSON array, CSV, TSV or Parquet, also compressed (.gz)."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

from sao_utils.recipe import RecipeError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def is_table(source: str) -> bool:
    """Whether a name has the ending of a file that `read_table` can read."""
    return _kind(source) in KINDS


def _kind(source: str) -> str:
    return Path(source.removesuffix(".gz")).suffix.lower()


def read_table(source: str) -> list[dict]:
    """The rows of a file, unchanged; values from CSV and TSV are strings.

    Raises:
        RecipeError: the file is missing, of another kind, damaged, or has a line that is not a row.
    """
    import pandas as pd

    if not is_table(source) or not Path(source).is_file():
        there, kinds = Path(source).is_file(), ", ".join(KINDS)
        fault = (
            f"'{source}' has a file type that cannot be read."
            if there
            else f"There is no file '{source}'."
        )
        raise RecipeError(f"{fault} It may be {kinds}, or .gz of one.")
    kind = _kind(source)
    try:
        if kind == ".parquet":
            return pd.read_parquet(source).to_dict("records")
        if kind in (".csv", ".tsv"):  # utf-8-sig: Excel begins a file with a byte order mark
            separator = "," if kind == ".csv" else "\t"
            how = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            return pd.read_csv(source, sep=separator, **how).to_dict("records")
        opened = gzip.open if source.endswith(".gz") else open
        with opened(source, "rt", encoding="utf-8-sig") as file:
            return _json_rows(file.read())
    except (OSError, ValueError, EOFError, zlib.error) as error:  # gzip, UTF-8, CSV, Parquet
        raise RecipeError(f"{source} is damaged, or no UTF-8 text: {error}.") from None


def _json_rows(text: str) -> list[dict]:
    """The objects of a JSON array, or of JSON Lines."""
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                raise ValueError(f"line {number} is not JSON") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object")
    if "\\ud" in text or "\\uD" in text:  # perhaps a lone surrogate, which no file can hold
        rows = json.loads(json.dumps(rows, ensure_ascii=False).encode(errors="replace"))
    return rows


def read_column(source: str, column: str) -> list[str]:
    """The texts of one column of a file, stripped.

    Raises:
        RecipeError: see `read_table` and `texts_of`.
    """
    return texts_of(read_table(source), column, source)


def texts_of(rows: list[dict], column: str, source: str) -> list[str]:
    """The texts of one column of rows, stripped. `source` names the rows in messages.

    Raises:
        RecipeError: there is no such column (the message names the existing ones), or a row's value is
            empty or not text.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if column not in columns:
        there = ", ".join(f"'{name}'" for name in columns) or "none"
        raise RecipeError(f"{source} has no column '{column}'. Its columns: {there}.")
    texts = []
    for number, row in enumerate(rows, 1):
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise RecipeError(f"{source}: row {number}: '{column}' is empty, or no text.")
        texts.append(value.strip())
    return texts


def draw_texts(
    source: str, columns: Sequence[str], count: int, seed: int, key: str
) -> list[tuple[str, ...]]:
    """Draw rows of a file at random; each is given as the texts of `columns`.

    Args:
        key: the key of the recipe that asks for `count`, for the message.

    Raises:
        RecipeError: the file has fewer rows; see also `read_table` and `texts_of`.
    """
    rows = read_table(source)
    texts = [texts_of(rows, column, source) for column in columns]
    if len(rows) < count:
        raise RecipeError(f"{source} has {len(rows)} rows, {key} asks for {count}.")
    return random.Random(seed).sample(list(zip(*texts)), count)
