"""The sections of a run's table of results: one function for each, which yields its rows.

They are made from the rows of the stages and of the evaluation; what is missing of those is made first.
What cannot be estimated has a row without a value, and a note that says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from sao_utils import oracles
from sao_utils.evaluation import comparisons
from sao_utils.evaluation.answers import Candidate
from sao_utils.evaluation.benchmarks import run_benchmark
from sao_utils.evaluation.judge_quality import judge_quality, judges_agree
from sao_utils.evaluation.leakage import own_set
from sao_utils.evaluation.task_differences import differences
from sao_utils.evaluation.tasks import score_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.report.table import make_row
from sao_utils.stages.judging import judge_pairs
from sao_utils.stages.labelled import labelled_pairs
from sao_utils.stages.prompts import near_duplicate_rate, repetition_rate
from sao_utils.stages.scoring import repetition
from sao_utils.statistics.intervals import (
    Interval,
    clustered_difference,
    clustered_mean,
    exact,
    wilson,
)
from sao_utils.store import Run

NAN = float("nan")
missing = partial(Interval, NAN, NAN, NAN, 0)  # for what cannot be estimated; takes the reason
#: prefixes of those metrics of a judge that compare it with the truth
OF_JUDGE = ("accuracy", "longer answer", "length bias")
#: metric of a benchmark that is kept with the other results -> its name in the table
BENCHMARKED = {
    "win_rate": "win rate",
    "lc_win_rate_published": "length-controlled win rate, published fit",
    "lc_win_rate": "length-controlled win rate",
    "score": "score",
    "score.turn_1": "score, turn 1",
    "score.turn_2": "score, turn 2",
    "valid_rate": "valid verdicts",
    "first_rate": "first position",
}
#: share of repeated runs of three words above which an answer repeats itself (ours)
REPETITIVE = 0.2
GRADED = ("mt_bench", "tiny_mt")  # benchmarks whose score is a grade from 1 to 10


def of_questions(run: Run) -> dict:
    """What the run's own comparisons are made on: its questions, at its first temperature."""
    return {"questions": own_set(run), "temperature": run.recipe.evaluation.temperatures[0]}


def _seeds(run: Run) -> tuple:
    """The seeds for which a number is given: all together (None), then each one if there are several."""
    return (None, *run.recipe.seeds) if len(run.recipe.seeds) > 1 else (None,)


def mean_of(run: Run, rows: list[dict], values: list) -> Interval:
    """The clustered mean of values, one per answer or comparison, over all trainings."""
    by, runs = [row["combination"] for row in rows], [row["seed"] for row in rows]
    return clustered_mean(values, by, run.recipe.evaluation.bootstrap, runs=runs)


def prompts(run: Run) -> Iterator[dict]:
    """How the prompt stage went: how many replies are usable, and how often prompts repeat."""
    rows = sao.rows(run, "prompts")
    if run.recipe.prompts.source != "file":
        parsed = [row["prompt"] is not None for row in rows]
        clusters = [row["persona"] or row["id"] for row in rows]
        runs = [row["seed"] for row in rows]
        found = clustered_mean(parsed, clusters, runs=runs)
        yield make_row("prompts", "usable replies", found)
    by_seed = [
        [row["prompt"] for row in rows if row["seed"] == seed and row["prompt"]]
        for seed in run.recipe.seeds
    ]
    rates = {"repeated prompts": repetition_rate, "near-duplicate prompts": near_duplicate_rate}
    for metric, rate in rates.items():
        mean = np.mean([rate(texts) for texts in by_seed])
        yield make_row("prompts", metric, exact(mean, sum(map(len, by_seed))))


def judge(run: Run) -> Iterator[dict]:
    """How accurate and how biased the judge is, on the run's own pairs and on labelled ones."""
    verdicts = {("self", "training pairs"): sao.rows(run, "verdicts")}
    if run.recipe.judging.labelled is not None:
        pairs = labelled_pairs(run.recipe.judging.labelled)
        usable = [pair for pair in pairs if pair["discarded"] is None]
        for name, model in evaluate.judges(run).items():
            verdicts[name, "labelled pairs"] = judge_pairs(run, usable, model, "labelled")
    for (name, on), rows in verdicts.items():
        for metric, found in judge_quality(rows, run.recipe.evaluation.bootstrap).items():
            names = {"model": None, "judge": name, "questions": on}
            yield make_row("judge", metric, found, **names)


def good_answers(run: Run) -> Iterator[dict]:
    """Every model's share of good answers, by the oracle, and the differences that the claim is about."""
    for temperature in run.recipe.evaluation.temperatures:
        answers = graded_answers(run, temperature)
        models = list(dict.fromkeys(row["model"] for row in answers))
        controls = [model for model in models if model not in ("base", "self")]
        wanted = [(model, None, None) for model in models]
        wanted += [(model, "base", None) for model in controls]
        if "self" in models:
            wanted += [("self", other, s) for s in _seeds(run) for other in ("base", *controls)]
        where = {**of_questions(run), "temperature": temperature, "judge": "oracle"}
        for model, against, seed in wanted:
            found = share_of_good(run, answers, model, against, seed)
            names = {"model": model, "against": against, "seed": seed, **where}
            unit = "points" if against else "%"
            yield make_row("quality", "good answers", found, unit, **names)


def graded_answers(run: Run, temperature: float, models: list[str] | None = None) -> list[dict]:
    """The answers at one temperature that the oracle can judge, of some models or of all."""
    answers = evaluate.answers(run, models, temperatures=[temperature])
    return [row for row in answers if row["good"] is not None]


def share_of_good(
    run: Run, answers: list[dict], model: str, against: str | None = None, seed: int | None = None
) -> Interval:
    """A model's share of good answers, or its difference from another's, over all seeds or for one."""
    of = [row for row in answers if row["model"] == model and seed in (None, row["seed"])]
    values = [row["good"] for row in of]
    if against is None:
        return mean_of(run, of, values)
    good = {(r["seed"], r["question_id"]): r["good"] for r in answers if r["model"] == against}
    of_seed = against in run.recipe.arms  # otherwise it has one set of answers for all seeds
    other = [good[r["seed"] if of_seed else None, r["question_id"]] for r in of]
    by, runs = [row["combination"] for row in of], [row["seed"] for row in of]
    return clustered_difference(values, other, by, run.recipe.evaluation.bootstrap, runs=runs)


def _first_answers(run: Run) -> dict[str, list[dict]]:
    """The answers at the first temperature, by model."""
    found: dict[str, list[dict]] = {}
    for row in evaluate.answers(run, temperatures=run.recipe.evaluation.temperatures[:1]):
        found.setdefault(row["model"], []).append(row)
    return found


def flaws(run: Run) -> Iterator[dict]:
    """What is wrong with the answers of every model, at the first temperature.

    An improvement in one kind of flaw may hide a loss in another, and a win rate "at equal length" forgives
    an answer that repeats itself.
    """
    for model, answers in _first_answers(run).items():
        rows = [(row, _flaws(row)) for row in answers if row["good"] is not None]
        for flaw in sorted({kind for _, found in rows for kind in found}):
            of = [(row, found[flaw] > 0) for row, found in rows if flaw in found]
            share = mean_of(run, *map(list, zip(*of)))
            yield make_row("flaws", flaw, share, model=model, judge="oracle", **of_questions(run))


def _flaws(answer: dict) -> dict[str, int]:
    """The flaws that the oracle finds; if it does not look for repetition and a missing end, we do."""
    found = oracles.flaws(answer["question"], answer["text"])
    if "repeated" not in found:
        found["repeated"] = int(repetition(answer["text"]) > REPETITIVE)
        found["unfinished"] = int(not answer["finished"])
    return found


def lengths(run: Run) -> Iterator[dict]:
    """The mean length of the answers at the first temperature, in tokens."""
    for model, rows in _first_answers(run).items():
        found = mean_of(run, rows, [row["tokens"] for row in rows])
        yield make_row("length", "answer length", found, model=model, **of_questions(run))


def win_rates(run: Run) -> Iterator[dict]:
    """The self-judged win rate of every arm against the base, raw and at equal length.

    Invalid verdicts are left out. Then the tuned model's win rate minus that of each control, paired by
    question.
    """
    recipe = run.recipe
    verdicts = {arm: evaluate.comparison(run, arm, "base") for arm in recipe.arms}
    where = {**of_questions(run), "judge": "self"}
    for arm, rows in verdicts.items():
        names = {**where, "model": arm, "against": "base"}
        valid = mean_of(run, rows, [row["win"] is not None for row in rows])
        yield make_row("win rate", "valid verdicts", valid, **names)
        for seed in _seeds(run):
            of = [row for row in rows if seed in (None, row["seed"])]
            yield make_row("win rate", "win rate", rate(of), seed=seed, **names)
            equal = rate(of, comparisons.rate_at_equal_length)
            yield make_row("win rate", "win rate at equal length", equal, seed=seed, **names)
    own, note = verdicts.pop("self", None), "of the win rates against the base"
    for arm, rows in verdicts.items() if own else ():
        found = comparisons.difference_in_win_rate(own, rows, recipe.evaluation.bootstrap)
        for seed, one in found.items():
            names = {**where, "model": "self", "against": arm, "seed": seed, "note": note}
            yield make_row("win rate", "difference in win rate", one, **names)


def rate(rows: list[dict], of=comparisons.rate) -> Interval:
    """A win rate, or the reason why there is none."""
    return of(rows) if comparisons.valid(rows) else missing("no verdict is valid")


def comparison(run: Run) -> Iterator[dict]:
    """The comparison of tuned and base answers: its outcome, the judges' accuracy, and their agreement.

    The training pairs were one model's own answers; here the answers of two models meet, and the tuned
    model was trained to please. The judges are the run's own and the recipe's `judges`, or, if it names
    none, the tuned model, which costs no more than a second pass and shows whether it learned to judge
    differently. Then the strengths of all arms, each against the base.
    """
    if "self" not in run.recipe.arms:
        return
    resamples, where = run.recipe.evaluation.bootstrap, of_questions(run)
    names = {**where, "model": "self", "against": "base"}
    rows = {
        name: evaluate.comparison(run, "self", "base", name)
        for name in ("self", *(run.recipe.judges or ("tuned",)))
    }
    for name, of in rows.items():
        found = {"win rate": rate(of)}
        if name == "self":  # its win rates have a section of their own
            found = comparisons.scores(of, resamples)
        known = [{**r, "quality": oracles.quality(r["prompt"], *r["responses"])} for r in of]
        quality = judge_quality(known, resamples)
        found |= {m: one for m, one in quality.items() if m.startswith(OF_JUDGE)}
        for metric, one in found.items():
            yield make_row("comparison", metric, one, judge=name, **names)
        both = judges_agree(rows["self"], of, resamples) if name != "self" else {}
        for metric, one in both.items():
            yield make_row("comparison", metric, one, judge=f"self and {name}", **names)
    of_arms = [evaluate.comparison(run, arm, "base") for arm in run.recipe.arms]
    for model, strength in comparisons.strengths(of_arms, resamples).items():
        names = {**where, "model": model, "judge": "self"}
        yield make_row("comparison", "Elo", strength.elo, **names)
        yield make_row("comparison", "expected win rate", strength.win_rate, **names)


def compared(run: Run) -> list[Candidate]:
    """The models in benchmarks and tasks: no controls besides "self", which would double the cost."""
    trained = ["self"] if "self" in run.recipe.arms else run.recipe.arms
    return sao.candidates(run, ["base", *trained, *run.recipe.others])


def benchmarks(run: Run) -> Iterator[dict]:
    """The published benchmarks that the recipe names, and their counterparts in the tiny world."""
    for name in run.recipe.evaluation.benchmarks:
        for row in run_benchmark(run, name, compared(run), evaluate.judges(run)):
            if row["metric"] in BENCHMARKED:
                yield of_benchmark(run, row, "benchmark")


def of_benchmark(run: Run, row: dict, section: str) -> dict:
    """A row of `run_benchmark` as a row of the table."""
    graded = row["benchmark"] in GRADED and row["metric"].startswith("score")
    arm, _, seed = row["model"].rpartition("-")
    of_seed = arm in run.recipe.arms and row["model"] not in run.recipe.others
    notes = [row["note"], *(f"doubtful: {remark}" for remark in row["remarks"])]
    return make_row(
        section,
        BENCHMARKED[row["metric"]],
        row["interval"],
        "of 10" if graded else None,
        model=arm if of_seed else row["model"],
        seed=int(seed) if of_seed else None,
        judge=row["judge"],
        questions=row["benchmark"],
        note="; ".join(filter(None, notes)),
    )


def tasks(run: Run) -> Iterator[dict]:
    """lm-eval's tasks: scores before and after training, and whether the change is noise."""
    yield from task_rows(run, compared(run))


def task_rows(run: Run, candidates: list[Candidate]) -> Iterator[dict]:
    """The scores of some models, including the base, in the recipe's tasks, and their changes."""
    if not run.recipe.evaluation.tasks:
        return
    bases = set()
    for row in differences(score_tasks(run, candidates)):
        model, where = row["model"], {"questions": row["task"]}
        if row["problem"]:
            yield make_row("task", "score", missing(row["problem"]), model=model, **where)
            continue
        text, metric = f"the first {row['limit']} items only" if row["limit"] else "", row["metric"]
        if row["task"] not in bases:
            bases.add(row["task"])
            yield make_row("task", metric, _share(row["base"]), note=text, **where)
        yield make_row("task", metric, _share(row["tuned"]), model=model, note=text, **where)
        text = f"change {'outside' if row['outside'] else 'inside'} the noise"
        names = {**where, "model": model, "against": "base", "note": text}
        yield make_row("task", metric, row["difference"], "points", **names)


def _share(found: Interval) -> Interval:
    """A share with its interval clipped to 0..1; Wilson's interval if all items had the same outcome."""
    if found.value in (0, 1):
        return wilson(found.value * found.n, found.n)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))  # NaN stays NaN
