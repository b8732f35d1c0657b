"""The sections of a run's table of results: a function each that gives its rows.

They are made from the rows of the stages and of the evaluation, which are made first as far as they are
missing. What cannot be estimated has a row without a value, and a note that says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from sao_utils import oracles
from sao_utils.evaluation import comparisons
from sao_utils.evaluation.benchmarks import run_benchmark
from sao_utils.evaluation.judge_quality import judge_quality, judges_agree
from sao_utils.evaluation.tasks import differences, score_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.report.table import make_row
from sao_utils.stages.judging import judge_pairs
from sao_utils.stages.labelled import labelled_pairs
from sao_utils.stages.prompts import near_duplicate_rate, repetition_rate
from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean
from sao_utils.store import Run

NAN = float("nan")
#: what a judge does (`evaluation.judge_quality`) -> the metric of the table
JUDGE_METRICS = {
    "valid_rate": "valid verdicts",
    "consistent_rate": "both orders agree",
    "mass": "probability on the verdicts",
    "flip_rate": "flip rate",
    "flip_rate_unequal": "flip rate, one answer better",
    "first_position_rate": "first position",
    "longer_chosen_all": "longer answer preferred",
    "longer_chosen": "longer answer preferred, one answer better",
    "longer_better": "longer answer better",
    "length_bias": "length bias",
    "accuracy": "accuracy",
    "accuracy_one_order": "accuracy, one order",
    "accuracy_gold_first": "accuracy, better answer first",
    "accuracy_gold_second": "accuracy, better answer second",
    "accuracy_better_longer": "accuracy, better answer longer",
    "accuracy_better_about_equal": "accuracy, about equally long",
    "accuracy_better_shorter": "accuracy, better answer shorter",
}
#: what a comparison came to (`comparisons.scoreboard`) -> the metric and its unit
BOARD = {
    "decided": ("both orders agree", "%"),
    "inconsistent": ("orders disagree", "%"),
    "tie": ("ties", "%"),
    "identical": ("identical answers", "%"),
    "valid": ("valid verdicts", "%"),
    "empty_a": ("empty answers", "%"),
    "empty_b": ("empty answers of the base", "%"),
    "length_difference": ("length difference", "characters"),
    "prompts_needed": ("prompts needed to tell the difference", "prompts"),
    "first_position": ("first position", "%"),
}
AGREEMENT = {
    "agreement": ("agreement of two judges", "%"),
    "kappa": ("kappa of two judges", ""),
    "agreement_one_order": ("agreement of two judges, one order", "%"),
    "kappa_one_order": ("kappa of two judges, one order", ""),
}
#: metric of a benchmark that is kept with the other results -> what it is called
BENCHMARK_METRICS = {
    "win_rate": "win rate",
    "lc_win_rate_published": "length-controlled win rate, published fit",
    "lc_win_rate": "length-controlled win rate",
    "score": "score",
    "score.turn_1": "score, turn 1",
    "score.turn_2": "score, turn 2",
    "valid_rate": "valid verdicts",
    "first_rate": "first position",
    "kappa": "kappa of two judges",
}
GRADED = ("mt_bench", "tiny_mt")  # benchmarks whose score is a grade from 1 to 10


def _without_interval(value: float, n: int) -> Interval:
    """A count, or a property of a whole set: no sample of anything."""
    return Interval(value, NAN, NAN, n)


def _mean(run: Run, rows: list[dict], values: list) -> Interval:
    """The mean of values of answers or comparisons, clustered, over all trainings."""
    by, runs = [row["combination"] for row in rows], [row["seed"] for row in rows]
    return clustered_mean(values, by, run.recipe.evaluation.bootstrap, runs=runs)


def prompts(run: Run) -> Iterator[dict]:
    """How the prompt stage went: usable replies, and how often prompts repeat."""
    rows = sao.rows(run, "prompts")
    if run.recipe.prompts.source != "file":
        parsed = [row["prompt"] is not None for row in rows]
        clusters = [row["persona"] or row["id"] for row in rows]
        yield make_row("prompts", "usable replies", clustered_mean(parsed, clusters))
    by_seed = [
        [row["prompt"] for row in rows if row["seed"] == seed and row["prompt"]]
        for seed in run.recipe.seeds
    ]
    for metric, rate in (
        ("repeated prompts", repetition_rate),
        ("near-duplicate prompts", near_duplicate_rate),
    ):
        mean = float(np.mean([rate(prompts) for prompts in by_seed]))
        of_set = "of the whole set, mean over the seeds" if len(by_seed) > 1 else "of the whole set"
        yield make_row("prompts", metric, _without_interval(mean, len(by_seed[0])), note=of_set)


def judge(run: Run) -> Iterator[dict]:
    """How right and how biased the judge is, on the run's own pairs and on labelled ones."""
    yield from _quality_of_judge(run, sao.rows(run, "verdicts"), "self", "training pairs")
    if run.recipe.judging.labelled is not None:
        pairs = labelled_pairs(run.recipe.judging.labelled)
        usable = [pair for pair in pairs if pair["discarded"] is None]
        for name, model in evaluate.judges(run).items():
            verdicts = judge_pairs(run, usable, model, "labelled")
            yield from _quality_of_judge(run, verdicts, name, "labelled pairs")


def _quality_of_judge(run: Run, verdicts: list[dict], judge: str, on: str) -> Iterator[dict]:
    found = judge_quality(verdicts, run.recipe.evaluation.bootstrap)
    for key, interval in found.items():
        metric, _, subset = key.partition(".")
        unit = "points" if key == "length_bias" else "%"
        questions = f"{on}: {subset}" if subset else on
        yield make_row(
            "judge",
            JUDGE_METRICS[metric],
            interval,
            unit,
            model=None,
            judge=judge,
            questions=questions,
        )


def labelled(run: Run) -> Iterator[dict]:
    """How many rows of the file of labelled pairs are judged, and why the others are not."""
    if run.recipe.judging.labelled is None:
        return
    pairs = labelled_pairs(run.recipe.judging.labelled)
    for reason, count in Counter(pair["discarded"] or "usable" for pair in pairs).items():
        found = _without_interval(float(count), len(pairs))
        yield make_row("pairs", reason, found, "pairs", model=None, questions="labelled pairs")


def good_answers(run: Run) -> Iterator[dict]:
    """The oracle's share of good answers, of every model, and the differences of the claim."""
    recipe, every = run.recipe, evaluate.answers(run)
    for temperature in recipe.evaluation.temperatures:
        good: dict[str, dict] = {}  # model -> (seed, question) -> whether its answer is good
        clusters: dict[str, str] = {}  # question -> combination
        for row in every:
            if row["temperature"] == temperature and row["good"] is not None:
                key = (row["seed"], row["question_id"])
                good.setdefault(row["model"], {})[key] = row["good"]
                clusters[row["question_id"]] = row["combination"]
        where = {
            "judge": "oracle",
            "questions": recipe.evaluation.questions,
            "temperature": temperature,
        }
        for model in good:
            yield _share_of_good(run, good, clusters, model, **where)
        controls = [model for model in good if model not in ("base", "self")]
        contrasts = [(model, "base") for model in controls]
        contrasts += [("self", other) for other in ("base", *controls)] if "self" in good else []
        for model, against in contrasts:
            yield _share_of_good(run, good, clusters, model, against, **where)
        if len(recipe.seeds) > 1:
            for seed in recipe.seeds:
                for model, against in contrasts:
                    if model == "self":
                        yield _share_of_good(run, good, clusters, model, against, seed, **where)


def _share_of_good(
    run: Run,
    good: dict[str, dict],
    clusters: dict[str, str],
    model: str,
    against: str | None = None,
    seed: int | None = None,
    **where,
) -> dict:
    """A model's share of good answers, or its difference to another's, over all seeds or of one."""
    arms, resamples = run.recipe.arms, run.recipe.evaluation.bootstrap
    over = run.recipe.seeds if seed is None else (seed,)
    if model not in arms and against not in arms:
        over = over[:1]
    values = {
        name: [good[name][s if name in arms else None, q] for s in over for q in clusters]
        for name in (model, against)
        if name is not None
    }
    by, runs = [*clusters.values()] * len(over), [s for s in over for _ in clusters]
    if against is None:
        found, unit = clustered_mean(values[model], by, resamples, runs=runs), "%"
    else:
        found = clustered_difference(
            values[model], values[against], by, resamples, runs=runs, bounds=(0, 1)
        )
        unit = "points"
    names = {"model": model, "against": against, "seed": seed}
    return make_row("quality", "good answers", found, unit, **names, **where)


def _first_answers(run: Run) -> dict[str, list[dict]]:
    """The answers at the first temperature, by model."""
    first, found = run.recipe.evaluation.temperatures[0], {}
    for row in evaluate.answers(run):
        if row["temperature"] == first:
            found.setdefault(row["model"], []).append(row)
    return found


def flaws(run: Run) -> Iterator[dict]:
    """What is wrong with the answers of base and tuned model, at the first temperature.

    A gain in one kind of flaw may hide a loss in another, and a win rate "at equal length" forgives an
    answer that repeats itself.
    """
    answers, settings = _first_answers(run), run.recipe.evaluation
    for model in ("base", "self"):
        rows = [(r, oracles.flaws(r["question"], r["text"])) for r in answers.get(model, ())]
        known = [(row, flaws) for row, flaws in rows if flaws is not None]
        for flaw in sorted(known[0][1]) if known else ():
            found = _mean(run, [row for row, _ in known], [f[flaw] > 0 for _, f in known])
            where = {"questions": settings.questions, "temperature": settings.temperatures[0]}
            yield make_row("flaws", flaw, found, model=model, judge="oracle", **where)


def lengths(run: Run) -> Iterator[dict]:
    """Mean tokens of the answers at the first temperature."""
    settings = run.recipe.evaluation
    where = {"questions": settings.questions, "temperature": settings.temperatures[0]}
    for model, rows in _first_answers(run).items():
        found = _mean(run, rows, [row["tokens"] for row in rows])
        yield make_row("length", "answer length", found, "tokens", model=model, **where)


def win_rates(run: Run) -> Iterator[dict]:
    """The self-judged win rate of every arm against the base, raw and at equal length.

    Invalid verdicts are left out of it. Then by how much more often the tuned model wins than each
    control, paired by prompt.
    """
    seeds, resamples = run.recipe.seeds, run.recipe.evaluation.bootstrap
    verdicts = {arm: evaluate.comparison(run, arm, "base") for arm in run.recipe.arms}
    for arm, rows in verdicts.items():
        where = {**_where(run), "judge": "self", "model": arm, "against": "base"}
        valid = _mean(run, rows, [row["win"] is not None for row in rows])
        yield make_row("win rate", "valid verdicts", valid, **where)
        for seed in (None, *seeds) if len(seeds) > 1 else (None,):
            of = [row for row in rows if seed in (None, row["seed"])]
            rate, equal = comparisons.rate_of(of), comparisons.rate_at_equal_length(of)
            yield make_row("win rate", "win rate", rate, seed=seed, **where)
            yield make_row("win rate", "win rate at equal length", equal, seed=seed, **where)
    for arm in [arm for arm in verdicts if "self" in verdicts and arm != "self"]:
        for seed in (None, *seeds) if len(seeds) > 1 else (None,):
            both = [
                [row for row in verdicts[name] if seed in (None, row["seed"])]
                for name in ("self", arm)
            ]
            found = comparisons.gain(*both, resamples)
            where = {**_where(run), "judge": "self", "model": "self", "against": arm, "seed": seed}
            text = "of the win rates against the base"
            yield make_row(
                "win rate", "difference in win rate", found, "points", note=text, **where
            )


def _where(run: Run) -> dict:
    settings = run.recipe.evaluation
    return {"questions": settings.questions, "temperature": settings.temperatures[0]}


def comparison(run: Run) -> Iterator[dict]:
    """What the comparison of tuned and base answers came to, how right its judges were and agree.

    The training pairs were one model's own answers; here two models' meet, and the tuned one's were
    trained to please. Beside the run's own judge the recipe's `judges`, or without any the tuned model,
    which costs no more than a second look: did it learn to judge otherwise? Then the strengths of all
    arms, each against the base.
    """
    if "self" not in run.recipe.arms:
        return
    resamples, base = run.recipe.evaluation.bootstrap, {**_where(run), "model": "self"}
    base["against"] = "base"
    rows = {
        judge: evaluate.comparison(run, "self", "base", judge)
        for judge in ("self", *(run.recipe.judges or ("tuned",)))
    }
    board = comparisons.scoreboard(rows["self"], resamples)
    for key, (metric, unit) in BOARD.items():
        if key in board:
            yield make_row("comparison", metric, board[key], unit, judge="self", **base)
    for judge, of in rows.items():
        if judge != "self":
            rate = comparisons.rate_of(of)
            yield make_row("comparison", "win rate", rate, judge=judge, **base)
            both = judges_agree(rows["self"], of, resamples)
            for key, (metric, unit) in AGREEMENT.items():
                if key in both:
                    pair = {**base, "judge": f"self and {judge}"}
                    yield make_row("comparison", metric, both[key], unit, **pair)
        known = [{**r, "quality": oracles.quality(r["prompt"], *r["responses"])} for r in of]
        for key, found in judge_quality(known, resamples).items():
            if key.startswith(("accuracy", "longer_", "length_bias")):
                unit = "points" if key == "length_bias" else "%"
                yield make_row("comparison", JUDGE_METRICS[key], found, unit, judge=judge, **base)
    every = [row for arm in run.recipe.arms for row in evaluate.comparison(run, arm, "base")]
    for model, strength in comparisons.strengths(every, min(1000, resamples)).items():
        where = {**_where(run), "model": model, "judge": "self"}
        yield make_row("comparison", "Elo", strength.elo, "Elo", **where)
        yield make_row("comparison", "expected win rate", strength.win_rate, **where)


def compared(run: Run) -> list:
    """The candidates of benchmarks and tasks: no controls beside "self", which would double the cost."""
    arms = run.recipe.arms
    names = ("base", *(["self"] if "self" in arms else arms), *run.recipe.others)
    return sao.candidates(run, names)


def benchmarks(run: Run) -> Iterator[dict]:
    """The published benchmarks that the recipe names, and their counterparts in the tiny world."""
    for name in run.recipe.evaluation.benchmarks:
        for row in run_benchmark(run, name, compared(run), evaluate.judges(run)):
            yield from benchmark_row("benchmark", row, name)


def benchmark_row(section: str, row: dict, questions: str) -> Iterator[dict]:
    """A row of `run_benchmark` in the table, if its metric is one of `BENCHMARK_METRICS`."""
    metric = row["metric"]
    if metric not in BENCHMARK_METRICS:
        return
    graded = row["benchmark"] in GRADED and metric.startswith("score")
    unit = "of 10" if graded else "" if metric == "kappa" else "%"
    notes = [row["note"], *(f"doubtful: {remark}" for remark in row["remarks"])]
    yield make_row(
        section,
        BENCHMARK_METRICS[metric],
        row["interval"],
        unit,
        model=row["model"],
        seed=row["seed"],
        judge=row["judge"],
        questions=questions,
        note="; ".join(filter(None, notes)),
    )


def tasks(run: Run) -> Iterator[dict]:
    """lm-eval's tasks: what the models knew before and after, and whether the change is noise."""
    if not run.recipe.evaluation.tasks:
        return
    bases = set()
    for row in differences(score_tasks(run, compared(run))):
        task, model = row["task"], row["model"]
        if row["problem"]:
            missing = Interval(NAN, NAN, NAN, 0)
            yield make_row(
                "task", "score", missing, model=model, questions=task, note=row["problem"]
            )
            continue
        notes = [f"the first {row['limit']} items only"] if row["limit"] else []
        notes += [f"{row['truncated']} prompts cut"] if row["truncated"] else []
        where = {"questions": task, "note": "; ".join(notes)}
        if task not in bases:
            bases.add(task)
            yield make_row("task", row["metric"], row["base"], **where)
        yield make_row("task", row["metric"], row["tuned"], model=model, **where)
        where["note"] = f"change {'outside' if row['outside'] else 'inside'} the noise"
        change = row["difference"]
        yield make_row(
            "task", row["metric"], change, "points", model=model, against="base", **where
        )
