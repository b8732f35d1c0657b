"""The section "rounds" of a run's table of results: what each iteration of a method came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from sao_utils import oracles
from sao_utils.evaluation import comparisons
from sao_utils.evaluation.answers import Candidate, answer_questions
from sao_utils.evaluation.questions import questions
from sao_utils.methods.iterate import Trained, all_rounds
from sao_utils.methods.synpo import train_on_seeds
from sao_utils.report.sections import rate
from sao_utils.report.table import make_row, make_table
from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean
from sao_utils.store import Run

#: subset of the questions -> which of them it holds
TOPICS: dict[str, Callable[[str], bool | None]] = {
    "all": lambda prompt: True,
    "seed topics": oracles.is_seed_topic,
    "other topics": lambda prompt: oracles.is_seed_topic(prompt) is False,
}


def rounds(run: Run) -> Iterator[dict]:
    """Good answers, lengths and wins of each round's model, and what its pairs are worth."""
    made = all_rounds(run)
    candidates = [one.candidate for one in made]
    if run.recipe.method == "synpo":
        for seed in run.recipe.seeds:
            model = train_on_seeds(run, run.recipe.model, seed)
            candidates.append(Candidate("sft_seeds", seed, model))
    answers = _answers(run, candidates)
    yield from _quality(run, answers)
    yield from _lengths(run, answers)
    yield from _win_rates(run, answers)
    yield from _pairs(run, made)


def quality_of(run: Run, made: list[Trained]) -> pd.DataFrame:
    """Good answers of the base and of some rounds' models, as a table of results."""
    return make_table(_quality(run, _answers(run, [one.candidate for one in made])))


def _answers(run: Run, candidates: list[Candidate]) -> list[dict]:
    everyone = [Candidate("base", None, run.recipe.model), *candidates]
    asked = questions(run.recipe.evaluation)
    return answer_questions(run, everyone, asked, run.recipe.evaluation.temperatures)


def _models(answers: list[dict]) -> list[tuple[str, int]]:
    """(name, round) of every model but the base, in order."""
    return sorted({(row["model"], row["round"]) for row in answers if row["model"] != "base"})


def _of(rows: list[dict], model: str, number: int = 0) -> list[dict]:
    return [row for row in rows if (row["model"], row["round"]) == (model, number)]


def _mean(run: Run, rows: list[dict], values: list) -> Interval:
    """The mean of values of answers, clustered, over all trainings."""
    by, runs = [row["combination"] for row in rows], [row["seed"] for row in rows]
    return clustered_mean(values, by, run.recipe.evaluation.bootstrap, runs=runs)


def _quality(run: Run, answers: list[dict]) -> Iterator[dict]:
    known = [row for row in answers if row["good"] is not None]
    for temperature in run.recipe.evaluation.temperatures:
        for topic, holds in TOPICS.items():
            rows = [r for r in known if r["temperature"] == temperature and holds(r["question"])]
            where = {"questions": topic, "temperature": temperature, "judge": "oracle"}
            before = {row["question_id"]: row["good"] for row in _of(rows, "base")}
            if not before:
                continue
            for model, number in [("base", 0), *_models(rows)]:
                of = _of(rows, model, number)
                good = [row["good"] for row in of]
                names = {"model": model, "round": number, **where}
                yield make_row("rounds", "good answers", _mean(run, of, good), **names)
                if model != "base":
                    gain = clustered_difference(
                        good,
                        [before[row["question_id"]] for row in of],
                        [row["combination"] for row in of],
                        run.recipe.evaluation.bootstrap,
                        runs=[row["seed"] for row in of],
                    )
                    names["against"] = "base"
                    yield make_row("rounds", "good answers", gain, "points", **names)


def _lengths(run: Run, answers: list[dict]) -> Iterator[dict]:
    first = run.recipe.evaluation.temperatures[0]
    rows = [row for row in answers if row["temperature"] == first]
    for model, number in [("base", 0), *_models(rows)]:
        of = _of(rows, model, number)
        found = _mean(run, of, [float(row["tokens"]) for row in of])
        names = {"model": model, "round": number, "questions": "all", "temperature": first}
        yield make_row("rounds", "answer length", found, **names)


def _win_rates(run: Run, answers: list[dict]) -> Iterator[dict]:
    """Against the base, by the same judge for all rounds: the recipe's, else the base."""
    first = run.recipe.evaluation.temperatures[0]
    rows = [row for row in answers if row["temperature"] == first]
    judge = run.recipe.judging_model
    for model, number in _models(rows):
        of = _of(rows, model, number)
        verdicts = comparisons.compare_answers(run, of, _of(rows, "base"), "self", judge)
        names = {"model": model, "round": number, "against": "base", "judge": "self"}
        where = {"questions": "all", "temperature": first}
        yield make_row("rounds", "win rate", rate(verdicts), **names, **where)


def _pairs(run: Run, made: list[Trained]) -> Iterator[dict]:
    """How many prompts came to be pairs, and how often the chosen answer is truly the better one."""
    for number in range(1, run.recipe.rounds + 1):
        rows = [row for t in made if t.candidate.round == number for row in t.pairs]
        used = [row for row in rows if row["discarded"] is None]
        where = {"model": run.recipe.method, "round": number, "questions": "training pairs"}
        by, runs = [row["prompt_id"] for row in rows], [row["seed"] for row in rows]
        kept = clustered_mean([row["discarded"] is None for row in rows], by, runs=runs)
        yield make_row("rounds", "pairs kept", kept, **where)
        right, by, runs = [], [], []
        for row in used:
            texts = [row[key][-1]["content"] for key in ("chosen", "rejected")]
            quality = oracles.quality(row["prompt"][-1]["content"], *texts)
            if quality and quality[0] != quality[1]:
                right.append(quality[0] > quality[1])
                by.append(oracles.cluster(row["prompt"][-1]["content"]))
                runs.append(row["seed"])
        found = clustered_mean(right, by, runs=runs)
        yield make_row("rounds", "chosen is better", found, judge="oracle", **where)
