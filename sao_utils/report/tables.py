"""The paper's tables with this run's rows beneath: what was reported, what is measured, what is not.

A dagger (†) marks a figure of ours that was measured in another way than the paper's; the column
"protocol" says how. The column "remarks" says what makes a figure doubtful, such as a judge that
names what is shown first. The tiny world's counterparts stand under the table that they mirror, to
show that the machinery works: their numbers say nothing about the paper's models.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path

from sao_utils.evaluation import comparisons as contests
from sao_utils.evaluation import tasks as harness
from sao_utils.report.formatting import NOT_COMPARABLE, in_words, unit
from sao_utils.report.results import (
    HEADLINES,
    benchmark_rows,
    examined,
    is_control,
    leakage_effect,
    share,
)
from sao_utils.stages.pairs import build_pairs
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run, results_folder, write_whole

DAGGER = "†"
EXAMPLES = 5  # overlapping questions that are listed, of each set and definition
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
PUBLISHED_FIT = "lc_win_rate_published"  # AlpacaEval's own: the figure of its leaderboard
MODELS = ("Gemma-2-9B-it", "Llama-3-8B-Instruct")  # those that the paper trains
LEADERBOARD = {
    "arc_challenge": "ARC (25)",
    "truthfulqa_mc2": "TruthfulQA (0)",
    "winogrande": "Winogrande (5)",
    "gsm8k": "GSM8K (5)",
    "hellaswag": "HellaSwag (10)",
    "mmlu": "MMLU (5)",
}
OWN_BASE = "against its own base model (50 is no change), both orders"
OWN_DEFINITION = (
    "repetition as defined here (personas.repetition_rate); the paper gives no definition"
)
COLUMNS = (
    "table by benchmark model judge metric value low high unit n differs protocol remarks".split()
)


def reported(paper: str = "sao"):
    """The numbers that a paper reports ("sao", "synpo"), as a pandas data frame.

    Raises:
        FileNotFoundError: the kit was installed without its results/reported folder.
    """
    import pandas as pd

    beside_package = Path(__file__).resolve().parents[2] / "results"
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
        paper gives none or nothing was measured; `differs`: whether protocol and paper's part;
        `remarks`, of benchmarks: what makes a figure doubtful.
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
    value = float(row["value"]) / (1 if graded else 100)
    return {
        "table": row["table"],
        "by": "paper",
        "benchmark": row["benchmark"].removeprefix("Open LLM Leaderboard: "),
        "model": " ".join(filter(None, (row["model"], row["method"], row["setting"]))),
        "judge": row["judge"],
        "metric": row["metric"],
        **_numbers(Interval(value, math.nan, math.nan, 0), "of 10" if graded else "%"),
        "differs": False,
        "protocol": "as reported",
    }


def _numbers(found: Interval, counted_in: str) -> dict:
    """value, low and high in a unit, None for NaN; n, None where nobody gives it."""
    factor = 100 if counted_in in ("%", "points") else 1
    parts = {"value": found.value, "low": found.low, "high": found.high}
    known = {k: round(factor * x, 4) if math.isfinite(x) else None for k, x in parts.items()}
    return {**known, "unit": counted_in, "n": found.n or None}


def _missing(table: str, benchmark: str, what: str, how: str) -> dict:
    """A row for what was not measured; `how` says what to do for it."""
    empty = {"judge": "", "metric": "", **dict.fromkeys(("value", "low", "high")), "unit": ""}
    names = {"table": table, "by": "run", "benchmark": benchmark, "model": what}
    return {**names, **empty, "n": None, "differs": False, "protocol": how}


def _of_benchmark(run: Run, table: str, name: str, measured: dict[str, dict]) -> list[dict]:
    """Base, tuned model and the recipe's others by every judge, without the controls.

    Who judges is compared with the paper's judges, not with the benchmark's own (`judge_note`).
    """
    there = [(key, row) for key, row in measured.items() if row["benchmark"] == name]
    if not there and name.startswith("tiny_") and run.recipe.model.path != "tiny":
        return []
    if not there:
        return [_missing(table, name, "this run", f"add {name} to evaluation.benchmarks")]
    found, judges = [], contests.judge_models(run)
    fitted = {(row["model"], row["judge"]) for _, row in there if row["metric"] == PUBLISHED_FIT}
    theirs = JUDGES.get(name, ())
    for key, row in there:
        if row["metric"] not in HEADLINES or is_control(run, row["model"]):
            continue
        notes, judge = [row["note"]] if row["note"] else [], judges.get(row["judge"])
        by = f"{judge.path} ({row['judge']})" if judge else row["judge"]
        if judge and theirs and not any(part in judge.path.lower() for part in theirs):
            notes.append(f"the paper's judge is {' or '.join(theirs)}")
        found.append(
            {
                "table": table,
                "by": "run",
                "benchmark": name,
                "model": _model(run, row["model"]),
                "judge": by,
                "metric": _metric(row, fitted),
                **_numbers(row["interval"], unit(f"benchmark.{key}")),
                "differs": bool(notes),
                "protocol": "; ".join(notes) or "as published",
                "remarks": " ".join(row["remarks"]),
            }
        )
        if row["metric"] == "valid_rate" and row["interval"].value == 0:
            how = f"no verdict of the judge {by} is valid"
            found.append(_missing(table, name, _model(run, row["model"]), how))
    return found


def _metric(row: dict, fitted: set[tuple[str, str]]) -> str:
    """The published fit is called as the paper's figure is, and ours beside it by what it adds."""
    if row["metric"] == PUBLISHED_FIT:
        return "lc_win_rate"
    if row["metric"] == "lc_win_rate" and (row["model"], row["judge"]) in fitted:
        return "lc_win_rate, our fit with an interval"
    return row["metric"]


def _model(run: Run, name: str) -> str:
    if name in run.recipe.others:
        return f"{run.recipe.others[name].path} ({name})"
    return f"{run.recipe.model.path}, {'self-judged' if name == 'self' else name}"


def _of_harness(run: Run, table: str) -> list[dict]:
    """Base, tuned model and others on each exam, and whether the change is more than noise."""
    if not run.recipe.evaluation.harness:
        how = 'set evaluation.harness, to ["leaderboard"] say'
        return [_missing(table, "leaderboard", "this run", how)]
    rows, bases = [], set()
    for row in harness.differences(harness.score(run, names=examined(run))):
        task = LEADERBOARD.get(row["task"], row["task"])
        if row["problem"]:
            rows.append(_missing(table, task, _model(run, row["model"]), row["problem"]))
            continue
        notes = [] if row["task"] in LEADERBOARD else ["a task of the tiny world, or one's own"]
        notes += [f"the first {row['limit']} items only"] if row["limit"] else []
        notes += [f"{row['truncated']} prompts cut"] if row["truncated"] else []
        change = f"change {'outside' if row['outside'] else 'inside'} the noise"
        for name, key in (("base", "base"), (row["model"], "tuned")):
            if name == "base" and task in bases:
                continue  # it stands beside the first that it is compared with
            bases.add(task)
            told = notes if name == "base" else [*notes, change]
            rows.append(
                {
                    "table": table,
                    "by": "run",
                    "benchmark": task,
                    "model": _model(run, name),
                    "judge": "",
                    "metric": row["metric"],
                    **_numbers(share(row[key]), "%"),
                    "differs": bool(notes),
                    "protocol": "; ".join(told) or "prompts of the installed lm-eval",
                }
            )
    return rows


def _of_ablation(run: Run, table: str, found: dict[str, Interval]) -> list[dict]:
    """What a run says to the paper's ablations: its win rates against its own base model."""
    pairs = _pairs_in_words(run)
    lines = {
        "Figure 3a dataset size": [
            (pairs, "self_win_rate"),
            (pairs, "self_win_rate_lc"),
            ("other sizes", ""),
        ],
        "Figure 3d algorithm": [
            (name, "self_win_rate" if name == run.recipe.training.algorithm else "")
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
            rows.append(_missing(table, "", words, "takes a run of its own, or another arm"))
            continue
        of_prompts = key.startswith("prompts.")
        rows.append(
            {
                "table": table,
                "by": "run",
                "benchmark": "prompt repetition" if of_prompts else "held-out questions",
                "model": f"{run.recipe.model.path}, {words}",
                "judge": "" if of_prompts else f"{run.recipe.judging_model.path} (self)",
                "metric": key.removeprefix("prompts.").split(".")[0],
                **_numbers(found[key], unit(key)),
                "differs": True,
                "protocol": OWN_DEFINITION if of_prompts else OWN_BASE,
            }
        )
    return rows


def _pairs_in_words(run: Run) -> str:
    """How many pairs of its own labels each training saw: `854, 851, 835 pairs a training`."""
    used = [
        sum(row["discarded"] is None for row in build_pairs(run, "self", seed))
        for seed in run.recipe.seeds
    ]
    return ", ".join(map(str, used)) + " pairs" + (" a training" if len(used) > 1 else "")


def shown(row: dict) -> str:
    """The value of a row in words: `71.2 [68.0, 74.1] % †`, `not measured`."""
    if row["value"] is None:
        return "not measured"
    digits = 2 if row["unit"] in ("of 10", "") else 1
    text = f"{row['value']:g}" if row["by"] == "paper" else f"{row['value']:.{digits}f}"
    if row["low"] is not None:
        text += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return " ".join(filter(None, (text, row["unit"], DAGGER if row["differs"] else "")))


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
            "remarks": row.get("remarks", ""),
        }
        for row in rows
        if row["table"] == table
    )


def write(run: Run, found: dict[str, Interval], leaks: list[dict] | None = None) -> list[dict]:
    """Write benchmarks.csv, benchmarks.md (in words), leakage.csv and leakage_effect.csv.

    leakage.csv: of each set of questions and each definition of overlap how many overlap, and the
    first EXAMPLES of them, with the words that they share with a training prompt.
    leakage_effect.csv: each result (a share, or a grade) on all questions, and without those. Both are
    of `leaks`: rows of `results.leakage_effect`, made here if they are not given.

    Returns:
        The rows of the first two.
    """
    rows = benchmarks(run, found)
    folder = run.folder / "tables"
    write_whole(folder / "benchmarks.csv", _as_csv(COLUMNS, rows))
    leaks = leakage_effect(run) if leaks is None else leaks
    told = [{**row, "overlapping": len(row["matches"])} for row in leaks]
    leaks = [{**row, **match} for row in told for match in row["matches"][:EXAMPLES] or [{}]]
    columns = "set by prompts items overlapping question prompt shared".split()
    write_whole(folder / "leakage.csv", _as_csv(columns, leaks))
    effects = [
        {**row, "result": key, **_beside("", on_all), **_beside("_without", without)}
        for row in told
        for key, (on_all, without) in row["effect"].items()
    ]
    columns = "set by items overlapping result".split()
    columns += [part + of for of in ("", "_without") for part in ("value", "low", "high", "n")]
    write_whole(folder / "leakage_effect.csv", _as_csv(columns, effects))
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


def _beside(suffix: str, found: Interval | None) -> dict:
    """An interval as four cells of a row; empty where too few questions are left."""
    return {} if found is None else {f"{k}{suffix}": v for k, v in asdict(found).items()}


def _as_csv(columns: list[str], rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "/").split())


def leakage_frame(leaks: list[dict]):
    """Rows of `results.leakage_effect` as a pandas data frame in words, a line for each result."""
    import pandas as pd

    lines = []
    for row in leaks:
        overlapping = f"{len(row['matches'])} of {row['items']} ({100 * row['share']:.1f} %)"
        if not row["items"]:
            overlapping = "could not be run"
        for key, (on_all, without) in (row["effect"] or {"": (None, None)}).items():
            words = [_result(row["set"], key, found) for found in (on_all, without)]
            lines.append([row["set"], row["by"], overlapping, key, *words])
    columns = "questions|overlap by|overlapping|result|on all|without the overlapping"
    return pd.DataFrame(lines, columns=columns.split("|"))


def _result(name: str, key: str, found: Interval | None) -> str:
    if found is None:
        return "too few left" if key else ""
    key = f"leakage.{name}.{key}"
    return f"{in_words(key, found)} {unit(key)}, n = {found.n}"
