"""The paper's tables with this run's rows beneath: what was reported, what is measured, what is not.

A dagger (†) marks a number of ours that was measured in another way than the paper's, or is doubtful;
the column "remarks" says how. The tiny world's counterparts stand under the table that they mirror, to
show that the machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.methods.sao import pairs as pairs_of
from sao_utils.report.table import select, value_of
from sao_utils.report.words import HEADING, NOT_COMPARABLE, markdown, number
from sao_utils.store import Run, results_folder

DAGGER = "†"
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
    "Figure 3a dataset size": ("How much data it takes", ()),
    "Figure 3d algorithm": ("The algorithm", ()),
    "Figure 3e persona": ("With and without personas", ()),
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
METRICS = {
    "win_rate": "win rate",
    "lc_win_rate": "length-controlled win rate",
    "repetition_rate": "repeated prompts",
}
OWN_BASE = "against its own base model (50 is no change), both orders"
OWN_DEFINITION = (
    "repeated up to case and white space (ours); the paper does not define its repetition rate"
)
COLUMNS = "table by benchmark model judge metric value low high unit n remarks".split()


def reported(paper: str = "sao") -> pd.DataFrame:
    """The numbers that a paper reports ("sao", "synpo").

    Raises:
        FileNotFoundError: the kit was installed without its results/reported folder.
    """
    beside_package = Path(__file__).resolve().parents[2] / "results"
    for folder in (results_folder(), beside_package):
        if (folder / "reported" / f"{paper}.csv").exists():
            return pd.read_csv(folder / "reported" / f"{paper}.csv", keep_default_na=False)
    raise FileNotFoundError(
        f"results/reported/{paper}.csv is missing: it comes with a checkout of the repository."
    )


def rows(run: Run, table: pd.DataFrame) -> list[dict]:
    """One row a result: the paper's, and under them this run's.

    Args:
        table: as `results.results` returns it.

    Returns:
        Rows of `COLUMNS`: `by` is "paper" or "run"; value, low, high as in the tidy table, None where
        the paper gives none or nothing was measured; `remarks`: how ours is another measurement than
        the paper's, or doubtful, or what to do to measure it.
    """
    paper, found = reported("sao").to_dict("records"), []
    for name, (_, benchmarks) in TABLES.items():
        found += [_of_paper(row) for row in paper if _is_shown(row, name)]
        for benchmark in benchmarks:
            found += _of_benchmark(run, table, name, benchmark)
        if name == "Table 2":
            found += _of_tasks(run, table, name)
        if name.startswith("Figure 3"):
            found += _of_ablation(run, table, name)
    return found


def _is_shown(row: dict, table: str) -> bool:
    """Of the large tables the paper's own models, before and after; of the small ones all."""
    if row["table"] != table:
        return False
    small = table.startswith("Figure 3")
    return small or row["model"] in MODELS and row["method"] in ("base", "SAO")


def _row(table: str, by: str, benchmark: str, model: str, found=None, **more) -> dict:
    """A row of `COLUMNS`; `found` is a row of the tidy table, None where nothing was measured."""
    names = {"table": table, "by": by, "benchmark": benchmark, "model": model}
    row = {**dict.fromkeys(COLUMNS, ""), **dict.fromkeys(("value", "low", "high", "n")), **names}
    if found is not None:
        ends = {k: getattr(found, k) for k in ("value", "low", "high")}
        row |= {k: end if math.isfinite(end) else None for k, end in ends.items()}
        row |= {"metric": found.metric, "unit": found.unit, "n": found.n}
    return row | more


def _of_paper(row: dict) -> dict:
    graded = row["metric"] == "score"
    return _row(
        row["table"],
        "paper",
        row["benchmark"].removeprefix("Open LLM Leaderboard: "),
        " ".join(filter(None, (row["model"], row["method"], row["setting"]))),
        judge=row["judge"],
        metric=METRICS.get(row["metric"], row["metric"]),
        value=float(row["value"]) / (1 if graded else 100),
        unit="of 10" if graded else "%",
        remarks="as reported",
    )


def _of_benchmark(run: Run, table: pd.DataFrame, name: str, benchmark: str) -> list[dict]:
    """Base, tuned model and the recipe's others by every judge."""
    there = select(table, section="benchmark", questions=benchmark)
    if there.empty:
        if benchmark.startswith("tiny_") and run.recipe.model.path != "tiny":
            return []
        how = f"add {benchmark} to evaluation.benchmarks"
        return [_row(name, "run", benchmark, "this run", remarks=how)]
    judges, found = {"self": run.recipe.judging_model, **run.recipe.judges}, []
    theirs = JUDGES.get(benchmark, ())
    for row in there.itertuples(index=False):
        remarks, judge = row.note, judges.get(row.judge)
        if judge and theirs and not any(part in judge.path.lower() for part in theirs):
            remarks += f"; the paper's judge is {' or '.join(theirs)}"
        shown = f"{judge.label} ({row.judge})" if judge else row.judge
        more = {"judge": shown, "remarks": remarks.removeprefix("; ")}
        found.append(_row(name, "run", benchmark, _model(run, row), row, **more))
    return found


def _model(run: Run, row) -> str:
    if row.model in run.recipe.others:
        return f"{run.recipe.others[row.model].label} ({row.model})"
    name = "self-judged" if row.model == "self" else row.model
    return f"{run.recipe.model.label}, {name}" + ("" if row.seed is None else f", seed {row.seed}")


def _of_tasks(run: Run, table: pd.DataFrame, name: str) -> list[dict]:
    """Base, tuned model and others on each task, and whether the change is more than noise."""
    if not run.recipe.evaluation.tasks:
        how = 'set evaluation.tasks, to ["leaderboard"] say'
        return [_row(name, "run", "leaderboard", "this run", remarks=how)]
    found, tasks = [], select(table, section="task")
    for row in select(tasks, against=None).itertuples(index=False):
        task = LEADERBOARD.get(row.questions, row.questions)
        change = value_of(tasks, questions=row.questions, model=row.model, against="base")
        own = "" if row.questions in LEADERBOARD else "a task of the tiny world, or one's own"
        remarks = "; ".join(filter(None, (own, row.note, change and change.note)))
        found.append(_row(name, "run", task, _model(run, row), row, remarks=remarks))
    return found


def _of_ablation(run: Run, table: pd.DataFrame, name: str) -> list[dict]:
    """What a run says to the paper's ablations: its win rates against its own base model."""

    def win(arm: str, metric: str = "win rate"):
        return value_of(table, section="win rate", metric=metric, model=arm, against="base")

    algorithm = run.recipe.training.algorithm
    pairs = _pairs_in_words(run) if name == "Figure 3a dataset size" else ""
    personas = ["with persona", "without persona"]
    if run.recipe.prompts.source == "no_persona":
        personas.reverse()
    lines = {
        "Figure 3a dataset size": [
            (pairs, win("self")),
            (pairs, win("self", "win rate at equal length")),
            ("other sizes", None),
        ],
        "Figure 3d algorithm": [
            (each, win("self") if each == algorithm else None) for each in ("simpo", "dpo", "orpo")
        ],
        "Figure 3e persona": [
            (personas[0], win("self")),
            (personas[0], value_of(table, section="prompts", metric="repeated prompts")),
            (personas[1], None),
        ],
        "Figure 3f judge": [
            ("labels of the model itself", win("self")),
            ("random labels", win("random")),
            ("labels of the oracle (in the reward model's place)", win("oracle")),
        ],
    }[name]
    found = []
    for words, row in lines:
        if row is None:
            how = "takes a run of its own, or another arm"
            found.append(_row(name, "run", "", words, remarks=how))
        elif row.section == "prompts":
            more = {"remarks": OWN_DEFINITION}
            model = f"{run.recipe.model.label}, {words}"
            found.append(_row(name, "run", "prompt repetition", model, row, **more))
        else:
            judge = f"{run.recipe.judging_model.label} (self)"
            more = {"judge": judge, "remarks": "; ".join(filter(None, (OWN_BASE, row.note)))}
            model = f"{run.recipe.model.label}, {words}"
            found.append(_row(name, "run", "held-out questions", model, row, **more))
    return found


def _pairs_in_words(run: Run) -> str:
    """How many pairs of its own labels each training saw: `854, 851, 835 pairs a training`."""
    used = [row["seed"] for row in pairs_of(run, "self") if row["discarded"] is None]
    counts = ", ".join(str(used.count(seed)) for seed in run.recipe.seeds)
    return f"{counts} pairs" + (" a training" if len(run.recipe.seeds) > 1 else "")


def _shown(row: dict) -> str:
    """The value of a row in words: `71.2 [68.0, 74.1] % †`, `not measured`."""
    if row["value"] is None:
        return "not measured"
    if row["by"] == "paper":  # as many decimals as it reports
        return f"{row['value'] * (100 if row['unit'] == '%' else 1):.6g} {row['unit']}"
    value, low, high = (number(row[key], row["unit"]) for key in ("value", "low", "high"))
    interval = "" if low == "nan" else f"[{low}, {high}]"
    return " ".join(filter(None, (value, interval, row["unit"], DAGGER if row["remarks"] else "")))


def frame(found: list[dict], table: str) -> pd.DataFrame:
    """One table of the paper with ours beneath, in words.

    Args:
        found: as `rows` returns them.
        table: a name of `TABLES`.
    """
    return pd.DataFrame(
        {
            "whose": row["by"],
            "benchmark": row["benchmark"],
            "model": row["model"],
            "judge": row["judge"],
            "metric": row["metric"],
            HEADING: _shown(row),
            "n": "" if row["n"] is None else f"{row['n']:,}",
            "remarks": row["remarks"],
        }
        for row in found
        if row["table"] == table
    )


def write(run: Run, table: pd.DataFrame) -> list[dict]:
    """Write benchmarks.csv, and benchmarks.md in words, into the run's tables. Returns `rows`."""
    found, folder = rows(run, table), run.folder / "tables"
    csv = pd.DataFrame(found, columns=COLUMNS).to_csv(index=False, lineterminator="\n")
    write_whole(folder / "benchmarks.csv", csv)
    parts = [
        "# The paper's tables, and this run\n",
        f"{DAGGER}: measured in another way than the paper's figures, or doubtful; see the column "
        "remarks. The paper reports no intervals and no numbers of seeds. All of its figures: "
        "results/reported/sao.csv.\n",
    ]
    for name, (about, _) in TABLES.items():
        parts += [f"## {name}: {about}\n", markdown(frame(found, name)) + "\n"]
    if run.recipe.model.path == "tiny":
        parts.append(NOT_COMPARABLE + "\n")
    write_whole(folder / "benchmarks.md", "\n".join(parts))
    return found
