"""The paper's tables in the paper's shape, and this run's numbers in the same shape: one row per model.

Each quantity has its columns side by side: the base, the tuned model, and the difference if there is one.
Reported numbers and ours are in separate tables. Footnotes say where ours were measured differently from the
paper's, or are doubtful. The tiny world's counterparts are under the table that they mirror, to show that the
machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.report.table import select
from sao_utils.report.words import (
    NOT_COMPARABLE,
    in_words,
    is_difference,
    markdown,
    model_in_words,
    models,
    sizes,
)
from sao_utils.store import Run

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
        "Open LLM Leaderboard, first version, accuracy: what was not forgotten",
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
#: metrics that the paper's tables do not show; they stay in results.csv
BESIDE = ("first position", "valid verdicts", "score, turn 1", "score, turn 2")
#: benchmark -> parts of the names of the paper's judges
JUDGES = {
    "alpaca_eval": ("gpt-4-1106", "qwen2-72b"),
    "arena_hard": ("gpt-4o-mini",),
    "mt_bench": ("gpt-4o-mini",),
}
MODELS = ("Gemma-2-9B-it", "Llama-3-8B-Instruct")  # those that the paper trains
#: a metric of the paper -> its name here
METRICS = {"win_rate": "win rate", "lc_win_rate": "length-controlled win rate"}
MARKS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
HOW = "Not measured in this run (how to: docs/evaluation.md)."


class PaperTable(NamedTuple):
    """A table of the paper, as reported and as measured in this run (empty: not measured)."""

    about: str
    reported: pd.DataFrame
    ours: pd.DataFrame
    notes: list[str]  # footnotes to ours, each with its mark

    def _repr_markdown_(self) -> str:
        """The table as a notebook and benchmarks.md show it."""
        parts = ["As the paper reports it:", _markdown(self.reported)]
        parts += [HOW] if self.ours.empty else ["This run:", _markdown(self.ours)]
        return "\n\n".join([*parts, *self.notes])


def reported(paper: str = "sao") -> pd.DataFrame:
    """The numbers that a paper reports ("sao", "synpo")."""
    folder = Path(__file__).parent / "reported"  # in an installed kit
    if not folder.is_dir():
        folder = Path(__file__).resolve().parents[2] / "results" / "reported"
    return pd.read_csv(folder / f"{paper}.csv", keep_default_na=False)


def paper_table(run: Run, table: pd.DataFrame, name: str) -> PaperTable:
    """One table of the paper, as reported and as measured in this run.

    Args:
        table: the table of results, as `results.results` returns it.
        name: a name in `TABLES`.
    """
    about, columns = TABLES[name]
    paper = reported("sao").query("table == @name")
    # Of the large tables, only the paper's own models, before and after.
    if name != "Figure 3f judge":
        paper = paper[paper["model"].isin(MODELS) & paper["method"].isin(["base", "SAO"])]
    rows = select(table, **columns)
    ours, notes = _ours(run, rows[~rows["metric"].isin(BESIDE)])
    return PaperTable(about, _pivot(map(_of_paper, paper.to_dict("records"))), ours, notes)


def synpo_table() -> PaperTable:
    """SynPO's Table 2, only the rows of the method itself. Runs of rounds measure none of its benchmarks."""
    paper = reported("synpo").query("table == 'Table 2'")
    paper = paper[paper["method"].str.match("SFT|SynPO")]
    cells = map(_of_paper, paper.to_dict("records"))
    return PaperTable("AlpacaEval 2.0 and Arena-Hard, by round", _pivot(cells), pd.DataFrame(), [])


def _pivot(cells: Iterable[tuple[str, str, str, str]]) -> pd.DataFrame:
    """One row per model, from cells (model, what is measured, "base" or another column, text)."""
    groups: dict[str, dict[str, None]] = {}
    lines: dict[str, dict[tuple, str]] = {}
    for model, what, which, text in cells:
        groups.setdefault(what, {})[which] = None
        lines.setdefault(model, {})[what, which] = text
    columns = [
        (what, which)
        for what, of in groups.items()
        for which in sorted(of, key=lambda which: which != "base")
    ]
    texts = [[line.get(column, "") for column in columns] for line in lines.values()]
    names = pd.MultiIndex.from_tuples(columns) if columns else None
    return pd.DataFrame(texts, list(lines), names)


def _of_paper(row: dict) -> tuple[str, str, str, str]:
    what = row["benchmark"].removeprefix("Open LLM Leaderboard: ")
    if row["metric"] != "accuracy":
        what += f": {METRICS.get(row['metric'], row['metric'])}"
    what += f", by {row['judge']}" if row["judge"] else ""
    what += " (of 10)" if row["metric"] == "score" else " (%)"
    model, which = row["model"], " ".join(filter(None, (row["method"], row["setting"])))
    if row["method"] not in ("base", "SAO"):
        model, which = f"{model}, {row['method']}", row["setting"]
    return model, what, which, f"{row['value']:g}"


def _ours(run: Run, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The run's rows in the paper's shape, and the footnotes with the remarks on them."""
    groups: dict[str, list] = {}
    for row in rows.itertuples(index=False, name="Row"):
        what = f"{row.questions}: {row.metric}" + (f", by {row.judge}" if row.judge else "")
        groups.setdefault(what, []).append(row)
    cells, notes = [], {}
    for what, of in groups.items():
        remarks: dict[str, list[str]] = {}
        for row in of:
            for remark in _remarks(run, row):
                remarks.setdefault(remark, []).append(_name(row, models(row)))
        texts = [
            remark if len(names) == len(of) else f"{remark} ({', '.join(names)})"
            for remark, names in remarks.items()
        ]
        numbers = [notes.setdefault(text, len(notes) + 1) for text in texts]
        unit = next((row.unit for row in of if not is_difference(row)), "points")
        heading = f"{what} ({unit}, n = {sizes(of)})"
        heading += "".join(f"\u00a0{number}" for number in numbers).translate(MARKS)
        names = {_name(r): None for r in of if r.model != "base"} or {"untrained": None}
        for row in of:
            which = "difference" if is_difference(row) else "tuned"
            for name in names if row.model == "base" else [_name(row)]:
                which = "base" if row.model == "base" else which
                text = in_words(row).removesuffix(f" {row.unit}")  # the heading has it
                cells.append((f"{run.recipe.model.label}, {name}", heading, which, text))
    return _pivot(cells), [f"{str(n).translate(MARKS)} {text}" for text, n in notes.items()]


def _name(row, model: str | None = None) -> str:
    """`self-judged pairs, seed 3`."""
    name = model or model_in_words(row.model)
    return name if row.seed is None else f"{name}, seed {row.seed}"


def _remarks(run: Run, row) -> list[str]:
    """Remarks on how a row of the run was measured differently from the paper's, or why it is doubtful."""
    remarks = row.note.split("; ") if row.note else []
    judge = run.recipe.judges.get(row.judge, run.recipe.judging_model)
    theirs = JUDGES.get(row.questions, ())
    if theirs and not any(part in judge.path.lower() for part in theirs):
        remarks.append(f"the paper's judge is {' or '.join(theirs)}")
    if row.section == "task" and row.questions.startswith("tiny_"):
        remarks.append("a task of the tiny world")
    if row.section == "win rate":
        remarks.append("against its own base model (50 is no change), both orders")
    return remarks


def write(run: Run, table: pd.DataFrame) -> None:
    """Write benchmarks.md, all of the paper's tables with ours, into the run's tables/."""
    parts = [
        "# The paper's tables, and this run",
        "The paper reports no intervals and no numbers of seeds. All of its figures: "
        "results/reported/sao.csv; all of ours: results.csv beside this file.",
    ]
    for name in TABLES:
        of = paper_table(run, table, name)
        parts += [f"## {name}: {of.about}", of._repr_markdown_()]
    if run.recipe.model.path == "tiny":
        parts.append(NOT_COMPARABLE)
    write_whole(run.folder / "tables" / "benchmarks.md", "\n\n".join(parts) + "\n")


def _markdown(shown: pd.DataFrame) -> str:
    """A pivoted table as Markdown; only the first column of each group has the group's heading."""
    seen, headings = None, []
    for what, which in shown.columns:
        headings.append(which if what == seen else f"{what}: {which}")
        seen = what
    return markdown(shown.set_axis(headings, axis=1).rename_axis("model").reset_index())
