"""What a run found: every number with its 95 % interval, as one tidy table (see `report.table`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.engines.loading import model_name
from sao_utils.methods import sao
from sao_utils.report import leakage, sections, tables
from sao_utils.report.card import write_card
from sao_utils.report.leakage import leakage_frame, overlaps  # noqa: F401 - for notebooks
from sao_utils.report.sections import remembered
from sao_utils.report.table import as_csv, as_json, make_table, value_of
from sao_utils.report.words import NOT_COMPARABLE, check, in_words, markdown, show
from sao_utils.store import Run, note

#: section of the table -> what gives its rows, in the order of the table
SECTIONS: dict[str, Callable[[Run], Iterator[dict]]] = {
    "prompts": sections.prompts,
    "judge": sections.judge,
    "pairs": sections.labelled,
    "quality": sections.good_answers,
    "flaws": sections.flaws,
    "win rate": sections.win_rates,
    "length": sections.lengths,
    "comparison": sections.comparison,
    "benchmark": sections.benchmarks,
    "task": sections.tasks,
    "leakage": leakage.rows,
}
EXAMPLES = 5  # overlapping questions that are listed, of each set and definition


def results(run: Run, *names: str) -> pd.DataFrame:
    """The tidy table of a run, or some sections of it, made with what they need.

    Args:
        names: of `SECTIONS`; by default all.

    Raises:
        ValueError: no such section.
    """
    unknown = set(names) - set(SECTIONS)
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    return make_table(
        row for name in names or SECTIONS for row in remembered(run, name, SECTIONS[name])
    )


def write_tables(run: Run) -> pd.DataFrame:
    """Compute all results and write them into the run's `tables/`.

    results.csv, results.json (the rows), results.md (in words), funnel.csv, leakage.csv (for each set of
    questions and definition of overlap the first EXAMPLES that overlap, with the words that they share
    with a training prompt), the recipe that all this belongs to; then the paper's tables
    (`tables.write`), and the results into the trained models' cards.
    """
    table, folder = results(run), run.folder / "tables"
    note(run, model=model_name(run.recipe.model))
    write_whole(folder / "recipe.yaml", (run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    write_whole(folder / "results.json", as_json(table))
    write_whole(folder / "results.csv", as_csv(table))
    remark = f"\n{NOT_COMPARABLE}\n" if run.recipe.model.path == "tiny" else ""
    write_whole(folder / "results.md", f"{markdown(show(table))}\n{remark}")
    counts = [(arm, *row) for arm in run.recipe.arms for row in sao.funnel(run, arm)]
    _write_csv(folder / "funnel.csv", counts, ["arm", "step", "count"])
    examples = [
        {**row, "overlapping": len(row["matches"]), **match}
        for row in overlaps(run)
        for match in row["matches"][:EXAMPLES] or [{}]
    ]
    columns = "set by prompts items overlapping question prompt shared".split()
    _write_csv(folder / "leakage.csv", examples, columns)
    tables.write(run, table)
    for candidate in sao.candidates(run, run.recipe.arms):
        write_card(run, candidate.name, candidate.seed)
    return table


def _write_csv(path: Path, rows: list, columns: list[str]) -> None:
    frame = pd.DataFrame(rows, columns=columns)
    write_whole(path, frame.to_csv(index=False, lineterminator="\n"))


def judge_against_oracle(run: Run) -> None:
    """Print whether the judge's win rates and the oracle's shares of good answers point the same way.

    What pleases the judge that a model was trained on, and is not better by the oracle, is a first sign
    of reward hacking.
    """
    table = results(run, "quality", "win rate")
    win = value_of(table, section="win rate", metric="win rate", model="self", against="base")
    good = {"section": "quality", "model": "self"}
    better = value_of(table, **good, against="base")
    if win is not None and better is not None:
        agree = not (win.low > 0.5 and better.high < 0)
        remark = "it pleases a weak judge, and gets worse"
        check("judge and oracle do not contradict each other", agree, remark)
    by_judge = {"metric": "difference in win rate", "model": "self", "against": "oracle"}
    ahead, really = value_of(table, **by_judge), value_of(table, **good, against="oracle")
    if ahead is not None and really is not None:
        print("by the judge:", in_words(ahead), " by the oracle:", in_words(really))
        agree = not (ahead.low > 0 and really.low <= 0)
        statement = "if the judge sees self ahead of oracle, so does the oracle"
        check(statement, agree, "a first sign of reward hacking")


def judge_matrix(verdicts: list[dict]) -> tuple[list[list[int]], list[str]]:
    """How verdicts fall against the oracle: counts.

    Args:
        verdicts: rows of `judge_pairs`, with `quality`.

    Returns:
        Rows (oracle: a better, b better, tie) of columns (judge: a in both orders, b in both orders,
        orders disagree, tie or invalid), and the names of the columns.
    """
    rows = [[0] * 4 for _ in range(3)]
    for v in verdicts:
        if v["quality"] is None or v["outcome"] == "identical":
            continue
        a, b = v["quality"]
        row = 0 if a > b else 1 if b > a else 2
        if v["outcome"] == "consistent":
            column = 0 if v["margin"] > 0 else 1
        else:
            column = 2 if v["outcome"] == "inconsistent" else 3
        rows[row][column] += 1
    return rows, ["a in both", "b in both", "orders disagree", "tie or invalid"]


def pair_lengths(pairs: list[dict]) -> dict[str, list[int]]:
    """Tokens of the chosen and of the rejected answers of pairs that are trained on."""
    used = [row["lengths"] for row in pairs if row["discarded"] is None]
    return {name: [of[k] for of in used] for k, name in enumerate(("chosen", "rejected"))}
