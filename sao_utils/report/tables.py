"""The paper's tables with this run's rows beneath: what was reported, what is measured, what is not.

A dagger (†) marks a number of ours that was measured in another way than the paper's, or is doubtful;
the column "remarks" says how. The tiny world's counterparts stand under the table that they mirror, to
show that the machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.report.table import select, value_of
from sao_utils.report.words import HEADING, NOT_COMPARABLE, in_words, markdown, model_in_words
from sao_utils.store import Run, results_folder

DAGGER = "†"
COLUMNS = ["whose", "benchmark", "model", "judge", "metric", HEADING, "n", "remarks"]
#: table of the paper -> (what it shows, benchmarks that answer the same question)
TABLES = {
    "Table 1": (
        "AlpacaEval 2.0, against the answers of GPT-4-Turbo",
        ("alpaca_eval", "tiny_alpaca"),
    ),
    "Figure 2": (
        "Arena-Hard and MT-Bench",
        ("arena_hard", "mt_bench", "tiny_arena", "tiny_mt"),
    ),
    "Table 2": ("Open LLM Leaderboard, first version: what was not forgotten", ()),
    "Figure 3f judge": ("Who labels the pairs", ()),
}
#: benchmark -> parts of the names of the judges that the paper had
JUDGES = {
    "alpaca_eval": ("gpt-4-1106", "qwen2-72b"),
    "arena_hard": ("gpt-4o-mini",),
    "mt_bench": ("gpt-4o-mini",),
}
MODELS = ("Gemma-2-9B-it", "Llama-3-8B-Instruct")  # those that the paper trains
LEADERBOARD = {
    "arc_challenge": "ARC (25)",
    "truthfulqa_mc2": "TruthfulQA (0)",
    "winogrande": "Winogrande (5)",
    "gsm8k": "GSM8K (5)",
    "hellaswag": "HellaSwag (10)",
    "mmlu": "MMLU (5)",
}
#: a metric of the paper -> what it is called here
METRICS = {"win_rate": "win rate", "lc_win_rate": "length-controlled win rate"}


def reported(paper: str = "sao") -> pd.DataFrame:
    """The numbers that a paper reports ("sao", "synpo").

    Raises:
        FileNotFoundError: the kit was installed without its results/reported folder.
    """
    folder = results_folder() / "reported"
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
        paper's, or doubtful, or what to do to measure it.
    """
    paper = reported("sao").query("table == @name")
    if name != "Figure 3f judge":  # of the large tables the paper's own models
        paper = paper[paper["model"].isin(MODELS) & paper["method"].isin(["base", "SAO"])]
    lines = [_of_paper(row) for row in paper.to_dict("records")]
    for benchmark in TABLES[name][1]:
        lines += _of_benchmark(run, table, benchmark)
    if name == "Table 2":
        lines += _of_tasks(run, table)
    if name == "Figure 3f judge":
        lines += _of_arms(run, table)
    return pd.DataFrame(lines, columns=COLUMNS, dtype=object).fillna("")


def _of_paper(row: dict) -> dict:
    return {
        "whose": "paper",
        "benchmark": row["benchmark"].removeprefix("Open LLM Leaderboard: "),
        "model": " ".join(filter(None, (row["model"], row["method"], row["setting"]))),
        "judge": row["judge"],
        "metric": METRICS.get(row["metric"], row["metric"]),
        HEADING: f"{row['value']:g} {'of 10' if row['metric'] == 'score' else '%'}",
        "remarks": "as reported",
    }


def _of_run(row, benchmark: str, model: str, judge: str, *remarks: str) -> dict:
    """A line from a row of the tidy table."""
    remark = "; ".join(filter(None, remarks))
    names = {"whose": "run", "benchmark": benchmark, "model": model, "judge": judge}
    value = f"{in_words(row)} {DAGGER if remark else ''}".rstrip()
    return {**names, "metric": row.metric, HEADING: value, "n": f"{row.n:,}", "remarks": remark}


def _not_measured(benchmark: str, how: str) -> dict:
    names = {"whose": "run", "benchmark": benchmark, "model": "this run"}
    return {**names, HEADING: "not measured", "remarks": how}


def _of_benchmark(run: Run, table: pd.DataFrame, benchmark: str) -> list[dict]:
    """Base, tuned model and the recipe's others by every judge."""
    there = select(table, section="benchmark", questions=benchmark)
    if there.empty:
        if benchmark.startswith("tiny_") and run.recipe.model.path != "tiny":
            return []
        return [_not_measured(benchmark, f"add {benchmark} to evaluation.benchmarks")]
    judges = {"self": run.recipe.judging_model, **run.recipe.judges}
    theirs, lines = JUDGES.get(benchmark, ()), []
    for row in there.itertuples(index=False):
        judge = judges.get(row.judge)
        shown = f"{judge.label} ({row.judge})" if judge else row.judge
        other = judge and theirs and not any(part in judge.path.lower() for part in theirs)
        remark = f"the paper's judge is {' or '.join(theirs)}" if other else ""
        lines.append(_of_run(row, benchmark, _model(run, row), shown, row.note, remark))
    return lines


def _model(run: Run, row) -> str:
    if row.model in run.recipe.others:
        return f"{run.recipe.others[row.model].label} ({row.model})"
    name = f"{run.recipe.model.label}, {model_in_words(row.model)}"
    return name if row.seed is None else f"{name}, seed {row.seed}"


def _of_tasks(run: Run, table: pd.DataFrame) -> list[dict]:
    """Base, tuned model and others on each task, and whether the change is more than noise."""
    tasks, lines = select(table, section="task"), []
    for row in select(tasks, against=None).itertuples(index=False):
        change = value_of(tasks, questions=row.questions, model=row.model, against="base")
        own = "" if row.questions in LEADERBOARD else "a task of the tiny world, or one's own"
        task = LEADERBOARD.get(row.questions, row.questions)
        remarks = (own, row.note, change.note if change else "")
        lines.append(_of_run(row, task, _model(run, row), "", *remarks))
    how = 'set evaluation.tasks, to ["leaderboard"] say'
    return lines or [_not_measured("leaderboard", how)]


def _of_arms(run: Run, table: pd.DataFrame) -> list[dict]:
    """Who labelled the pairs: win rates of the arms against their own base model."""
    arms, judge = ("self", "random", "oracle"), f"{run.recipe.judging_model.label} (self)"
    wins = select(table, section="win rate", metric="win rate", model=arms, seed=None)
    remark = "against its own base model (50 is no change), both orders"
    lines = [
        _of_run(row, "held-out questions", _model(run, row), judge, remark, row.note)
        for row in wins.itertuples(index=False)
    ]
    missing = [arm for arm in arms if arm not in run.recipe.arms]
    return lines + [_not_measured("held-out questions", f"add {arm} to arms") for arm in missing]


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
