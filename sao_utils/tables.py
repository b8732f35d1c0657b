"""The paper's tables with this run's rows beneath: what was reported, what is measured, what is not.

A dagger (†) marks a figure of ours that was measured in another way than the paper's; the column
"protocol" says how. The tiny world's counterparts stand under the table that they mirror, to show
that the machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from sao_utils import contests, harness
from sao_utils.intervals import Interval
from sao_utils.pairs import funnel
from sao_utils.results import NOT_COMPARABLE, benchmark_rows, unit
from sao_utils.rows import Run, results_folder, write_whole

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
#: benchmark -> parts of the names of the judges that the paper had.
JUDGES = {
    "alpaca_eval": ("gpt-4-1106", "qwen2-72b"),
    "arena_hard": ("gpt-4o-mini",),
    "mt_bench": ("gpt-4o-mini",),
}
METRICS = ("win_rate", "lc_win_rate", "score", "score.turn_1", "score.turn_2")
MODELS = ("Gemma-2-9B-it", "Llama-3-8B-Instruct")  # those that the paper trains
LEADERBOARD = {
    "arc_challenge": "ARC (25)",
    "truthfulqa_mc2": "TruthfulQA (0)",
    "winogrande": "Winogrande (5)",
    "gsm8k": "GSM8K (5)",
    "hellaswag": "HellaSwag (10)",
    "mmlu": "MMLU (5)",
}
OWN_BASE = "against its own base model (50 is no change), both orders, held-out questions"
COLUMNS = "table by benchmark model judge metric value low high unit n differs protocol".split()


def reported(paper: str = "sao"):
    """The numbers that a paper reports ("sao", "synpo"), as a pandas data frame.

    Raises:
        FileNotFoundError: the kit was installed without its results/reported folder.
    """
    import pandas as pd

    beside_package = Path(__file__).resolve().parents[1] / "results"
    for folder in (results_folder(), beside_package):
        if (folder / "reported" / f"{paper}.csv").exists():
            return pd.read_csv(folder / "reported" / f"{paper}.csv", keep_default_na=False)
    raise FileNotFoundError(
        f"results/reported/{paper}.csv is missing: it comes with a checkout of the repository."
    )


def benchmarks(run: Run, found: dict[str, Interval]) -> list[dict]:
    """One row a result: the paper's, and under them this run's.

    Args:
        found: as `results.scores` returns them.

    Returns:
        Rows of `COLUMNS`: `by` is "paper" or "run"; value, low, high in the `unit`, None where the
        paper gives none or nothing was measured; `differs`: whether protocol and paper's part.
    """
    paper, measured, rows = reported("sao"), benchmark_rows(run), []
    for table, (_, names) in TABLES.items():
        rows += [_of_paper(row) for row in paper.to_dict("records") if _is_shown(row, table)]
        for name in names:
            rows += _of_benchmark(run, table, name, measured)
        if table == "Table 2":
            rows += _of_harness(run, table)
        if table.startswith("Figure 3"):
            rows += _of_ablation(run, table, found)
    return rows


def _is_shown(row: dict, table: str) -> bool:
    """Of the large tables the paper's own models, before and after; of the small ones all."""
    if row["table"] != table:
        return False
    small = table.startswith("Figure 3")
    return small or row["model"] in MODELS and row["method"] in ("base", "SAO")


def _of_paper(row: dict) -> dict:
    graded = row["metric"] == "score"
    return _row(
        row["table"],
        "paper",
        row["benchmark"].removeprefix("Open LLM Leaderboard: "),
        " ".join(filter(None, (row["model"], row["method"], row["setting"]))),
        row["judge"],
        row["metric"],
        Interval(float(row["value"]) / (1 if graded else 100), *[float("nan")] * 2, 0),
        "of 10" if graded else "%",
        "as reported",
    )


def _row(
    table: str,
    by: str,
    benchmark: str,
    model: str,
    judge: str,
    metric: str,
    found: Interval | None,
    counted_in: str,
    protocol: str,
    differs: bool = False,
) -> dict:
    factor = 100 if counted_in in ("%", "points") else 1
    numbers = [found.value, found.low, found.high] if found else [None] * 3
    value, low, high = (x if x is None or x != x else round(factor * x, 4) for x in numbers)
    known = lambda x: None if x is None or x != x else x  # noqa: E731
    n = found.n if found and found.n else None
    cells = (table, by, benchmark, model, judge, metric, known(value), known(low), known(high))
    return dict(zip(COLUMNS, (*cells, counted_in, n, differs, protocol), strict=True))


def _missing(table: str, benchmark: str, what: str, how: str) -> dict:
    return _row(table, "run", benchmark, what, "", "", None, "", how)


def _of_benchmark(run: Run, table: str, name: str, measured: dict[str, dict]) -> list[dict]:
    """Base and tuned model (and those to compare with) by every judge, without the controls."""
    tiny = name.startswith("tiny_")
    rows = [row for row in measured.values() if row["benchmark"] == name]
    if not rows:
        if tiny and run.recipe.model.path != "tiny":
            return []
        return [_missing(table, name, "this run", f"add {name} to evaluation.benchmarks")]
    found, controls = [], set(run.recipe.arms) - {"self"}
    for row in rows:
        if row["metric"] not in METRICS or row["model"].split("-")[0] in controls:
            continue
        notes = [row["note"]] if row["note"] else []
        judge = contests.judge_models(run).get(row["judge"])
        theirs = JUDGES.get(name, ())
        if judge and theirs and not any(part in judge.path.lower() for part in theirs):
            notes.append(f"the paper's judge is {' or '.join(theirs)}")
        key = f"benchmark.{name}.{row['model']}.{row['judge']}.{row['metric']}"
        words = {"self": "self-judged", "base": "base"}.get(row["model"], row["model"])
        judged = _judge_in_words(row["judge"], judge)
        note = "; ".join(notes) or "as published"
        model = f"{run.recipe.model.path}, {words}"
        found.append(
            _row(
                table,
                "run",
                name,
                model,
                judged,
                row["metric"],
                row["interval"],
                unit(key),
                note,
                bool(notes),
            )
        )
    return found


def _judge_in_words(name: str, judge) -> str:
    return name if judge is None else f"{judge.path} ({name})"


def _of_harness(run: Run, table: str) -> list[dict]:
    """Base and tuned model on each exam; differences that are noise say so."""
    if not run.recipe.evaluation.harness:
        how = 'set evaluation.harness, to ["leaderboard"] say'
        return [_missing(table, "leaderboard", "this run", how)]
    rows = []
    for row in harness.differences(harness.score(run)):
        if row["model"] != "self":
            continue
        task = LEADERBOARD.get(row["task"], row["task"])
        if row["problem"]:
            rows.append(_missing(table, task, "this run", row["problem"]))
            continue
        notes = [] if row["task"] in LEADERBOARD else ["a task of the tiny world, or one's own"]
        notes += [f"the first {row['limit']} items only"] if row["limit"] else []
        notes += [f"{row['truncated']} prompts cut"] if row["truncated"] else []
        differs, n = bool(notes), row["difference"].n
        kind = "outside the noise" if row["outside"] else "inside the noise"
        for words, value, error in (
            ("base", row["base"], row["base_error"]),
            ("self-judged", row["tuned"], row["tuned_error"]),
        ):
            interval = Interval(
                value, max(0, value - 1.96 * error), min(1, value + 1.96 * error), n
            )
            told = "; ".join([*notes, f"change {kind}"] if words != "base" else notes)
            model = f"{run.recipe.model.path}, {words}"
            rows.append(
                _row(
                    table,
                    "run",
                    task,
                    model,
                    "",
                    row["metric"],
                    interval,
                    "%",
                    told or "lm-eval's present prompts",
                    differs,
                )
            )
    return rows


def _of_ablation(run: Run, table: str, found: dict[str, Interval]) -> list[dict]:
    """What a run says to the paper's ablations: its win rates against its own base model."""
    algorithm = run.recipe.training.algorithm
    pairs = dict(funnel(run)).get("pairs", 0)
    lines = {
        "Figure 3a dataset size": [
            (f"{pairs} pairs", "self_win_rate"),
            (f"{pairs} pairs", "self_win_rate_lc"),
            ("other sizes", ""),
        ],
        "Figure 3d algorithm": [
            (name, "self_win_rate" if name == algorithm else "")
            for name in ("simpo", "dpo", "orpo")
        ],
        "Figure 3e persona": [
            ("with persona", "self_win_rate"),
            ("with persona", "prompts.repetition_rate"),
            ("without persona", ""),
        ],
        "Figure 3f judge": [
            ("labels of the model itself", "self_win_rate"),
            ("random labels", "self_win_rate.random"),
            ("labels of the oracle (in the reward model's place)", "self_win_rate.oracle"),
        ],
    }[table]
    rows = []
    for words, key in lines:
        if key not in found:
            how = "a run of its own; see 'try next' in notebooks 01 and 04"
            rows.append(_missing(table, "", words, how))
            continue
        judge = "" if key.startswith("prompts") else f"{run.recipe.judging_model.path} (self)"
        note = "repetition as defined here; the paper gives no definition"
        told = note if key.startswith("prompts") else OWN_BASE
        model = f"{run.recipe.model.path}, {words}"
        metric = key.removeprefix("prompts.").split(".")[0]
        rows.append(_row(table, "run", "", model, judge, metric, found[key], unit(key), told, True))
    return rows


def shown(row: dict) -> str:
    """The value of a row in words: `71.2 [68.0, 74.1] % †`, `not measured`."""
    if row["value"] is None:
        return "not measured"
    digits = 2 if row["unit"] == "of 10" or row["by"] == "paper" else 1
    text = f"{row['value']:.{digits}f}".rstrip("0").rstrip(".") if row["by"] == "paper" else ""
    if row["by"] == "run":
        text = f"{row['value']:.{digits}f}"
        if row["low"] is not None:
            text += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{text} {row['unit']}" + (f" {DAGGER}" if row["differs"] else "")


def frame(rows: list[dict], table: str):
    """One table of the paper with ours beneath, as a pandas data frame in words."""
    import pandas as pd

    return pd.DataFrame(
        {
            "whose": row["by"],
            "benchmark": row["benchmark"],
            "model": row["model"],
            "judge": row["judge"],
            "metric": row["metric"],
            "value [95 % interval]": shown(row),
            "n": "" if row["n"] is None else f"{row['n']:,}",
            "protocol": row["protocol"],
        }
        for row in rows
        if row["table"] == table
    )


def write(run: Run, found: dict[str, Interval]) -> list[dict]:
    """Write `tables/benchmarks.csv` (numbers) and `benchmarks.md` (in words); returns the rows."""
    rows = benchmarks(run, found)
    folder, text = run.folder / "tables", io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "benchmarks.csv", text.getvalue())
    parts = [
        "# The paper's tables, and this run\n",
        f"{DAGGER}: measured in another way than the paper's figures; see the column protocol. The "
        "paper reports no intervals and no numbers of seeds. All of its figures: "
        "results/reported/sao.csv.\n",
    ]
    for table, (about, _) in TABLES.items():
        there = frame(rows, table)
        lines = [list(there.columns), ["---"] * len(there.columns), *there.values.tolist()]
        parts += [f"## {table}: {about}\n"]
        parts += ["\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"]
    if run.recipe.model.path == "tiny":
        parts.append(NOT_COMPARABLE + "\n")
    write_whole(folder / "benchmarks.md", "\n".join(parts))
    return rows


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "/").split())
