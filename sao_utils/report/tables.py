"""The paper's tables with this run's rows beneath: what was reported, what is measured, what is not.

A dagger (†) marks a number of ours that was measured in another way than the paper's, or is doubtful;
the column "remarks" says how. The tiny world's counterparts stand under the table that they mirror, to
show that the machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.report.table import select
from sao_utils.report.words import HEADING, NOT_COMPARABLE, markdown, show
from sao_utils.store import Run

DAGGER = "†"
COLUMNS = ["whose", "what", "model", "judge", HEADING, "n", "remarks"]
#: table of the paper -> (what it shows, columns that select the run's rows)
TABLES = {
    "Table 1": (
        "AlpacaEval 2.0, against the answers of GPT-4-Turbo",
        {"section": "benchmark", "questions": ("alpaca_eval", "tiny_alpaca")},
    ),
    "Figure 2": (
        "Arena-Hard and MT-Bench",
        {"section": "benchmark", "questions": ("arena_hard", "mt_bench", "tiny_arena", "tiny_mt")},
    ),
    "Table 2": (
        "Open LLM Leaderboard, first version: what was not forgotten",
        {"section": "task"},
    ),
    "Figure 3f judge": (
        "Who labels the pairs",
        {
            "section": "win rate",
            "metric": "win rate",
            "model": ("self", "random", "oracle"),
            "seed": None,
        },
    ),
}
#: benchmark -> parts of the names of the judges that the paper had
JUDGES = {
    "alpaca_eval": ("gpt-4-1106", "qwen2-72b"),
    "arena_hard": ("gpt-4o-mini",),
    "mt_bench": ("gpt-4o-mini",),
}
MODELS = ("Gemma-2-9B-it", "Llama-3-8B-Instruct")  # those that the paper trains
#: a metric of the paper -> what it is called here
METRICS = {"win_rate": "win rate", "lc_win_rate": "length-controlled win rate"}


def reported(paper: str = "sao") -> pd.DataFrame:
    """The numbers that a paper reports ("sao", "synpo")."""
    folder = Path(__file__).parent / "reported"  # of an installed kit
    if not folder.is_dir():
        folder = Path(__file__).resolve().parents[2] / "results" / "reported"
    return pd.read_csv(folder / f"{paper}.csv", keep_default_na=False)


def frame(run: Run, table: pd.DataFrame, name: str) -> pd.DataFrame:
    """One table of the paper with this run's rows beneath, in words.

    Args:
        table: as `results.results` returns it.
        name: of `TABLES`.

    Returns:
        `COLUMNS`: `whose` is "paper" or "run"; `remarks` says how ours is another measurement than the
        paper's, or doubtful, or how to measure it.
    """
    paper = reported("sao").query("table == @name")
    if name != "Figure 3f judge":  # of the large tables the paper's own models, before and after
        paper = paper[paper["model"].isin(MODELS) & paper["method"].isin(["base", "SAO"])]
    rows = select(table, **TABLES[name][1])
    rows = rows.assign(note=[_remarks(run, row) for row in rows.itertuples(index=False)])
    ours = show(rows).assign(whose="run", judge=rows["judge"].tolist())
    marks = [f" {DAGGER}" if note else "" for note in rows["note"]]
    ours[HEADING] = [value + mark for value, mark in zip(ours[HEADING], marks)]
    lines = [_of_paper(row) for row in paper.to_dict("records")]
    lines += ours.to_dict("records")
    if rows.empty:
        how = "how to measure it: docs/evaluation.md"
        lines.append({"whose": "run", HEADING: "not measured", "remarks": how})
    return pd.DataFrame(lines, columns=COLUMNS, dtype=object).fillna("")


def _of_paper(row: dict) -> dict:
    benchmark = row["benchmark"].removeprefix("Open LLM Leaderboard: ")
    return {
        "whose": "paper",
        "what": f"{benchmark}: {METRICS.get(row['metric'], row['metric'])}",
        "model": " ".join(filter(None, (row["model"], row["method"], row["setting"]))),
        "judge": row["judge"],
        HEADING: f"{row['value']:g} {'of 10' if row['metric'] == 'score' else '%'}",
        "remarks": "as reported",
    }


def _remarks(run: Run, row) -> str:
    """How a row of the run was measured in another way than the paper's, or is doubtful."""
    remarks = [row.note]
    judge = run.recipe.judges.get(row.judge, run.recipe.judging_model)
    theirs = JUDGES.get(row.questions, ())
    if theirs and not any(part in judge.path.lower() for part in theirs):
        remarks.append(f"the paper's judge is {' or '.join(theirs)}")
    if row.section == "task" and row.questions.startswith("tiny_"):
        remarks.append("a task of the tiny world")
    if row.section == "win rate":
        remarks.append("against its own base model (50 is no change), both orders")
    return "; ".join(filter(None, remarks))


def write(run: Run, table: pd.DataFrame) -> None:
    """Write all of the paper's tables with ours, benchmarks.md, into the run's tables."""
    parts = [
        "# The paper's tables, and this run\n",
        f"{DAGGER}: measured in another way than the paper's figures, or doubtful; see the column "
        "remarks. The paper reports no intervals and no numbers of seeds. All of its figures: "
        "results/reported/sao.csv.\n",
    ]
    for name, (about, _) in TABLES.items():
        parts += [f"## {name}: {about}\n", markdown(frame(run, table, name)) + "\n"]
    if run.recipe.model.path == "tiny":
        parts.append(NOT_COMPARABLE + "\n")
    write_whole(run.folder / "tables" / "benchmarks.md", "\n".join(parts))
