"""The results of a run: every number with its 95 % interval, in one tidy table (see `report.table`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.engines.loading import model_folder, model_name
from sao_utils.methods import sao
from sao_utils.report import leakage, rounds, sections, tables
from sao_utils.report.card import write_card
from sao_utils.report.table import as_csv, as_json, make_table, read_table
from sao_utils.report.words import NOT_COMPARABLE, markdown, show
from sao_utils.store import Run, note

#: section of the table -> the function that makes its rows, in the order of the table
SECTIONS: dict[str, Callable[[Run], Iterator[dict]]] = {
    "prompts": sections.prompts,
    "judge": sections.judge,
    "quality": sections.good_answers,
    "flaws": sections.flaws,
    "win rate": sections.win_rates,
    "length": sections.lengths,
    "comparison": sections.comparison,
    "benchmark": sections.benchmarks,
    "task": sections.tasks,
    "leakage": leakage.rows,
}
EXAMPLES = 5  # overlapping questions that are listed, per set and definition


def results(run: Run, *names: str) -> pd.DataFrame:
    """The tidy table of a run, or some sections of it; whatever they need is made first.

    Args:
        names: names of `SECTIONS`; by default all.
    """
    every = {"rounds": rounds.rounds} if run.recipe.iterated else SECTIONS
    return make_table(row for name in names or every for row in every[name](run))


def write_tables(run: Run) -> pd.DataFrame:
    """Compute all results and write them into the run's `tables/`.

    The files are results.csv and results.json (the rows), results.md (in words), funnel.csv, leakage.csv
    (the first EXAMPLES overlapping questions for each set of questions and definition of overlap, with the
    words that they share with a training prompt), and the recipe that all this belongs to. Then the paper's
    tables are written (`tables.write`), and the cards of the trained models with the results.
    """
    table, folder = results(run), run.folder / "tables"
    _write(run, table)
    if run.recipe.iterated:
        columns = ["round", "seed", "step", "count"]
        _write_csv(folder / "funnel.csv", rounds.funnel(run), columns)
        return table
    counts = [(arm, *row) for arm in run.recipe.arms for row in sao.funnel(run, arm)]
    _write_csv(folder / "funnel.csv", counts, ["arm", "step", "count"])
    examples = [
        {**row, "overlapping": len(row["matches"]), **match}
        for row in leakage.overlaps(run)
        for match in row["matches"][:EXAMPLES] or [{}]
    ]
    columns = "set by prompts items overlapping question prompt shared".split()
    _write_csv(folder / "leakage.csv", examples, columns)
    tables.write(run, table)
    for candidate in sao.candidates(run, run.recipe.arms):
        write_card(run, candidate.name, candidate.seed)
    return table


def write_judge(run: Run) -> pd.DataFrame:
    """Write the results for the judge alone, which need no training, as `write_tables` writes all results."""
    table, path = results(run, "judge"), run.folder / "tables" / "results.json"
    if not path.is_file() or set(read_table(run.folder)["section"]) <= {"judge"}:
        _write(run, table)  # otherwise the results of the whole run stay
    return table


def _write(run: Run, table: pd.DataFrame) -> None:
    """Write a table in three formats and its recipe beside it, and note its model in the manifest."""
    source = Path(model_folder(run.recipe.model.path)) / "source.json"  # of a fetched model
    weights = {"weights": json.loads(source.read_text("utf-8"))} if source.is_file() else {}
    note(run, model=model_name(run.recipe.model), **weights)
    folder = run.folder / "tables"
    write_whole(folder / "recipe.yaml", (run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    write_whole(folder / "results.json", as_json(table))
    write_whole(folder / "results.csv", as_csv(table))
    remark = f"\n{NOT_COMPARABLE}\n" if run.recipe.model.path == "tiny" else ""
    write_whole(folder / "results.md", f"{markdown(show(table))}\n{remark}")


def _write_csv(path: Path, rows: list, columns: list[str]) -> None:
    frame = pd.DataFrame(rows, columns=columns)
    write_whole(path, frame.to_csv(index=False, lineterminator="\n"))


def judge_matrix(verdicts: list[dict]) -> pd.DataFrame:
    """The confusion matrix of judge and oracle: counts of pairs whose quality is known.

    Args:
        verdicts: rows of `judge_pairs`, with `quality`.

    Returns:
        A row for each verdict of the oracle (a better, b better, equal), a column for each of the judge.
    """
    truths = ["oracle: a better", "oracle: b better", "oracle: equal"]
    judged = ["a in both orders", "b in both orders", "orders disagree", "tie or invalid"]
    counts = pd.DataFrame(0, truths, judged)
    for row in verdicts:
        if row["quality"] is not None and row["outcome"] != "identical":
            a, b = row["quality"]
            truth = truths[0] if a > b else truths[1] if b > a else truths[2]
            said = {"inconsistent": judged[2]}.get(row["outcome"], judged[3])
            if row["outcome"] == "consistent":
                said = judged[0] if row["margin"] > 0 else judged[1]
            counts.loc[truth, said] += 1
    return counts
