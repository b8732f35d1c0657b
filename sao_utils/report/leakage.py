"""What the evaluation shares with the training prompts, and what the results are without that."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from sao_utils import oracles
from sao_utils.evaluation.benchmarks import run_benchmark
from sao_utils.evaluation.leakage import leakage, own_set, question_sets
from sao_utils.evaluation.task_differences import differences, leave_out
from sao_utils.evaluation.tasks import score_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.report.sections import of_benchmark, rate
from sao_utils.report.table import make_row
from sao_utils.statistics.intervals import Interval, clustered_difference
from sao_utils.store import Run

FEWEST = 10  # questions without which no result is given "without overlap" (ours)
#: metrics of benchmarks that are computed without the questions that overlap
WITHOUT = ("win_rate", "lc_win_rate", "score")


def overlaps(run: Run) -> list[dict]:
    """What each set of questions has in common with the prompts that the run trained on.

    Returns:
        The rows of `evaluation.leakage.leakage`, for the run's own questions, the first turns of each
        benchmark and the items of each task of lm-eval: {set, by, prompts, items, share, matches}.
    """
    tasks = score_tasks(run, sao.candidates(run, ["base"])) if run.recipe.evaluation.tasks else ()
    return leakage(training_prompts(run), question_sets(run, tasks))


def training_prompts(run: Run) -> list[str]:
    """The different prompts that any arm and seed is trained on: those that came to be pairs."""
    used = (row for arm in run.recipe.arms for row in sao.pairs(run, arm))
    return list({r["prompt"][0]["content"]: None for r in used if r["discarded"] is None})


def rows(run: Run) -> Iterator[dict]:
    """The section "leakage": the share of questions that overlap, and the results without these.

    The share is of all questions of a set, no sample of them: no interval.
    """
    for row in overlaps(run):
        if not row["items"]:
            continue
        share = Interval(row["share"], math.nan, math.nan, row["items"])
        metric = f"overlap ({row['by']})"
        yield make_row("leakage", metric, share, model=None, questions=row["set"])
        if row["items"] - len(row["matches"]) < FEWEST or "self" not in run.recipe.arms:
            continue
        left_out = {match["question"] for match in row["matches"]}
        without = {"questions": f"{row['set']} without overlap ({row['by']})"}
        yield from ({**one, **without} for one in _results_without(run, row["set"], left_out))


def _results_without(run: Run, name: str, left_out: Collection[str]) -> Iterator[dict]:
    """What the tuned model is judged by, on the questions of a set that are not left out."""
    if name == own_set(run):
        yield from _own_results(run, left_out)
    elif name in run.recipe.evaluation.benchmarks:
        both = sao.candidates(run, ["base", "self"])
        for row in run_benchmark(run, name, both, evaluate.judges(run), left_out, False):
            if row["metric"] in WITHOUT and row["model"] in ("self", f"self-{run.recipe.seeds[0]}"):
                yield of_benchmark(run, row, "leakage")
    else:
        scores = score_tasks(run, sao.candidates(run, ["base", "self"]))
        of_task = [row for row in scores if row["task"] == name]
        (change,) = differences(leave_out(of_task, left_out))
        if not change["problem"]:
            names = {"model": "self", "against": "base"}
            yield make_row("leakage", change["metric"], change["difference"], "points", **names)


def _own_results(run: Run, left_out: Collection[str]) -> Iterator[dict]:
    """Of the run's own questions: how much better the answers are, and how often they win."""
    settings = run.recipe.evaluation
    rows = [r for r in evaluate.comparison(run, "self", "base") if r["prompt"] not in left_out]
    quality = [oracles.quality(row["prompt"], *row["responses"]) for row in rows]
    known = [(row, *of) for row, of in zip(rows, quality) if of is not None]
    names = {"model": "self", "against": "base", "temperature": settings.temperatures[0]}
    if known:
        gain = clustered_difference(
            [tuned == 0 for _, tuned, _ in known],
            [base == 0 for _, _, base in known],
            [row["combination"] for row, _, _ in known],
            settings.bootstrap,
            runs=[row["seed"] for row, _, _ in known],
        )
        yield make_row("leakage", "good answers", gain, "points", judge="oracle", **names)
    yield make_row("leakage", "win rate", rate(rows), judge="self", **names)
