"""What the evaluation shares with the training prompts, and the results without the shared questions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from sao_utils.evaluation.benchmarks import run_benchmark
from sao_utils.evaluation.leakage import leakage, own_set, question_sets
from sao_utils.evaluation.task_differences import differences, leave_out
from sao_utils.evaluation.tasks import score_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.report.sections import graded_answers, of_benchmark, rate, share_of_good
from sao_utils.report.table import make_row
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run

FEWEST = 10  # questions that must be left for a result "without overlap" (ours)
#: metrics of benchmarks that are also computed without the questions that overlap
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
    """The distinct prompts that any arm or seed is trained on: those that became pairs."""
    used = (row for arm in run.recipe.arms for row in sao.pairs(run, arm))
    return list({r["prompt"][0]["content"]: None for r in used if r["discarded"] is None})


def rows(run: Run) -> Iterator[dict]:
    """The section "leakage": the share of questions that overlap, and the results without them.

    The share is over all questions of a set, not a sample of them, so it has no interval.
    """
    tuned, first = "self" in run.recipe.arms, run.recipe.evaluation.temperatures[0]
    graded = graded_answers(run, first, ["base", "self"]) if tuned else []
    compared = evaluate.comparison(run, "self", "base") if tuned else []
    for row in overlaps(run):
        if not row["items"]:
            continue
        share = Interval(row["share"], math.nan, math.nan, row["items"])
        metric = f"overlap ({row['by']})"
        yield make_row("leakage", metric, share, model=None, questions=row["set"])
        if row["items"] - len(row["matches"]) < FEWEST or not tuned:
            continue
        out = {match["question"] for match in row["matches"]}
        if row["set"] == own_set(run):
            answers = [r for r in graded if r["question"] not in out]
            found = _own_results(run, answers, [r for r in compared if r["prompt"] not in out])
        else:
            found = _results_without(run, row["set"], out)
        without = {"questions": f"{row['set']} without overlap ({row['by']})"}
        yield from ({**one, **without} for one in found)


def _results_without(run: Run, name: str, left_out: Collection[str]) -> Iterator[dict]:
    """The tuned model's results on a benchmark's or task's questions, without those that are left out."""
    both = sao.candidates(run, ["base", "self"])
    if name in run.recipe.evaluation.benchmarks:
        for row in run_benchmark(run, name, both, evaluate.judges(run), left_out):
            if row["metric"] in WITHOUT and row["model"] in ("self", f"self-{run.recipe.seeds[0]}"):
                yield of_benchmark(run, row, "leakage")
        return
    of_task = [row for row in score_tasks(run, both) if row["task"] == name]
    (change,) = differences(leave_out(of_task, left_out))
    if not change["problem"]:
        names = {"model": "self", "against": "base"}
        yield make_row("leakage", change["metric"], change["difference"], "points", **names)


def _own_results(run: Run, answers: list[dict], compared: list[dict]) -> Iterator[dict]:
    """For the run's own questions: the gain in good answers over the base, and the win rate against it."""
    first = run.recipe.evaluation.temperatures[0]
    names = {"model": "self", "against": "base", "temperature": first}
    if answers:
        gain = share_of_good(run, answers, "self", "base")
        yield make_row("leakage", "good answers", gain, "points", judge="oracle", **names)
    yield make_row("leakage", "win rate", rate(compared), judge="self", **names)
