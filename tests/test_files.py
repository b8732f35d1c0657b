"""A user's tables, in the formats that people export."""

import gzip
import json

import pytest

from sao_utils.files import read_column, read_table
from sao_utils.recipe import RecipeError

ROWS = [{"prompt": "What is 2 + 3?", "note": "a, b"}, {"prompt": "Ö,\nnew line", "note": ""}]


def write(path, rows=ROWS):
    import pandas as pd

    table, kind = pd.DataFrame(rows), path.name.split(".")[1]
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = table.to_csv(index=False, sep="\t" if kind == "tsv" else ",")
    if kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"]
)
def test_a_table_is_read_in_every_format_that_people_export(tmp_path, name):
    assert read_table(write(tmp_path / name)) == ROWS
    assert read_column(write(tmp_path / name), "prompt") == [row["prompt"] for row in ROWS]


def test_a_number_in_a_csv_stays_text_and_excels_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,label\nNA,1\n")
    assert read_table(str(path)) == [{"prompt": "NA", "label": "1"}]


@pytest.mark.parametrize("rows", ['{"prompt": "cut \\ud83d"}\n', '[{"prompt": "cut \\uD83D"}]'])
def test_half_of_a_character_is_replaced(tmp_path, rows):
    (tmp_path / "a.json").write_text(rows)
    assert read_table(str(tmp_path / "a.json")) == [{"prompt": "cut ?"}]


def test_a_missing_column_names_those_there_are_so_that_a_semicolon_shows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt;label\nWhy?;1\n")
    with pytest.raises(RecipeError, match="no column 'prompt'. Its columns: 'prompt;label'"):
        read_column(str(path), "prompt")


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.txt", b"x", "a.txt' has a file type that cannot be read. It may be .jsonl"),
        ("gone.csv", None, "There is no file"),
        ("a.jsonl", b'{"prompt": "x"}\nnonsense\n', "line 2 is not JSON"),
        ("a.json", b'["x"]', "row 1 is not a JSON object"),
        ("a.json", b'[{"prompt": "x"', "damaged"),
        ("a.csv", b"prompt\n\xff\xfe\n", "damaged"),
        ("a.csv.gz", b"no gzip", "damaged"),
        ("a.parquet", b"no parquet", "damaged"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": null}\n', "row 2: 'prompt' is empty"),
        ("a.jsonl", b'{"prompt": 5}\n', "row 1: 'prompt' is empty, or no text"),
    ],
)
def test_a_faulty_file_is_named_with_the_place(tmp_path, name, content, fault):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=fault):
        read_column(str(path), "prompt")
