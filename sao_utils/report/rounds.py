"""The section "rounds" of a run's table of results: the results of each iteration of a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import mean
from typing import get_args

import pandas as pd

from sao_utils import oracles
from sao_utils.engines.base import NO_REPLY
from sao_utils.evaluation import comparisons
from sao_utils.evaluation.answers import Candidate, answer_questions
from sao_utils.evaluation.questions import questions
from sao_utils.methods.iterate import IMITATING, Trained, all_rounds
from sao_utils.methods.synpo import train_on_seeds
from sao_utils.recipe import Arm
from sao_utils.report.sections import mean_of, rate, share_of_good, task_rows
from sao_utils.report.stopping import as_pair
from sao_utils.report.table import make_row, make_table
from sao_utils.stages.diversity import mean_similarity, vectors_in_words
from sao_utils.stages.judging import judge_pairs
from sao_utils.stages.prompts import repetition_rate
from sao_utils.statistics.intervals import Interval, clustered_mean, exact
from sao_utils.store import Run

#: arms whose pairs the judge did not choose
CONTROLS = frozenset(get_args(Arm)) - {"self"}
#: subset of the questions -> which of them it holds
TOPICS: dict[str, Callable[[str], bool | None]] = {
    "all": lambda prompt: True,
    "seed topics": oracles.is_seed_topic,
    "other topics": lambda prompt: oracles.is_seed_topic(prompt) is False,
}


def rounds(run: Run) -> Iterator[dict]:
    """Good answers, lengths and win rates of each round's model, and the quality of its pairs."""
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
    yield from pair_rows(run, made)
    yield from _diversity(run, made)
    yield from _forgotten(run, made)


def quality_of(run: Run, made: list[Trained]) -> pd.DataFrame:
    """Good answers of the base and of some rounds' models, as a table of results."""
    return make_table(_quality(run, answers_of(run, made)))


def quality_rows(run: Run, answers: list[dict]) -> list[dict]:
    """Good answers, lengths and win rates of the base and of some rounds' models, from `answers_of`."""
    return [row for of in (_quality, _lengths, _win_rates) for row in of(run, answers)]


def answers_of(run: Run, made: list[Trained]) -> list[dict]:
    """The answers of the base and of some rounds' models (`evaluation.answers.answer_questions`)."""
    return _answers(run, [one.candidate for one in made])


def _answers(run: Run, candidates: list[Candidate]) -> list[dict]:
    everyone = [Candidate("base", None, run.recipe.model), *candidates]
    asked = questions(run.recipe.evaluation)
    return answer_questions(run, everyone, asked, run.recipe.evaluation.temperatures)


def _models(answers: list[dict]) -> list[tuple[str, int]]:
    """(name, round) of every model but the base, in order."""
    return sorted({(row["model"], row["round"]) for row in answers if row["model"] != "base"})


def _of(rows: list[dict], model: str, number: int = 0) -> list[dict]:
    return [row for row in rows if (row["model"], row["round"]) == (model, number)]


def _quality(run: Run, answers: list[dict]) -> Iterator[dict]:
    known = [row for row in answers if row["good"] is not None]
    # Only SynPO has seed items; without them, all topics are alike.
    topics = TOPICS if run.recipe.synpo else {"all": TOPICS["all"]}
    for temperature in run.recipe.evaluation.temperatures:
        for topic, holds in topics.items():
            rows = [r for r in known if r["temperature"] == temperature and holds(r["question"])]
            where = {"questions": topic, "temperature": temperature, "judge": "oracle"}
            base = _of(rows, "base")
            if not base:
                continue
            for model, number in [("base", 0), *_models(rows)]:
                of = base if model == "base" else [*base, *_of(rows, model, number)]
                names = {"model": model, "round": number, **where}
                yield make_row("rounds", "good answers", share_of_good(run, of, model), **names)
                if model != "base":
                    gain = share_of_good(run, of, model, "base")
                    names["against"] = "base"
                    yield make_row("rounds", "good answers", gain, "points", **names)


def rows_by_seed(run: Run, one: Trained, answers: list[dict]) -> Iterator[dict]:
    """The gain over the base of one round of one seed, and how often the judge of its pairs was right."""
    seed = one.candidate.seed
    of_seed = [row for row in answers if row["seed"] in (None, seed)]
    of_round = [row for row in of_seed if row["round"] in (0, one.candidate.round)]
    gains = [row for row in _quality(run, of_round) if row.get("against")]
    yield from ({**row, "seed": seed} for row in gains)
    if right := pair_metrics([row for row in one.pairs if "rejected" in row]).get("judge is right"):
        names = {"model": run.recipe.method, "round": one.candidate.round, "seed": seed}
        where = {"questions": "training pairs", "judge": "oracle"}
        yield make_row("rounds", "judge is right", right, **names, **where)


def _lengths(run: Run, answers: list[dict]) -> Iterator[dict]:
    first = run.recipe.evaluation.temperatures[0]
    rows = [row for row in answers if row["temperature"] == first]
    for model, number in [("base", 0), *_models(rows)]:
        of = _of(rows, model, number)
        found = mean_of(run, of, [float(row["tokens"]) for row in of])
        names = {"model": model, "round": number, "questions": "all", "temperature": first}
        yield make_row("rounds", "answer length", found, **names)


def _win_rates(run: Run, answers: list[dict]) -> Iterator[dict]:
    """Win rates against the base, with the same judge for all rounds: the recipe's, else the base."""
    first = run.recipe.evaluation.temperatures[0]
    rows = [row for row in answers if row["temperature"] == first]
    judge = run.recipe.judging_model
    for model, number in _models(rows):
        of = _of(rows, model, number)
        verdicts = comparisons.compare_answers(run, of, _of(rows, "base"), "self", judge)
        names = {"model": model, "round": number, "against": "base", "judge": "self"}
        where = {"questions": "all", "temperature": first}
        yield make_row("rounds", "win rate", rate(verdicts), **names, **where)


def funnel(run: Run) -> list[tuple[int, int, str, int]]:
    """(round, seed, step, count) rows: prompts answered, minus each reason for a loss, and the pairs left."""
    rows = []
    for one in all_rounds(run):
        counts = Counter(row["discarded"] or "pairs" for row in one.pairs)
        used = counts.pop("pairs", 0)
        steps = [("prompts answered", len(one.pairs))]
        steps += [(reason, -count) for reason, count in counts.most_common()]
        where = (one.candidate.round, one.candidate.seed)
        rows += [(*where, step, count) for step, count in [*steps, ("pairs", used)]]
    return rows


def pair_rows(run: Run, made: list[Trained]) -> Iterator[dict]:
    """The quality of each round's pairs; nothing for methods whose rows are only imitated (SFT).

    The metrics: how many answered prompts became pairs; how often the chosen answer is truly better, and,
    over all judged pairs, the answer that the judge prefers; how often a prompt repeats an earlier one of
    its seed; and the signs that need no oracle: how often the judge's two orders disagree, and how often
    the base agrees.
    """
    if run.recipe.method in IMITATING:
        return
    for number in range(1, run.recipe.rounds + 1):
        of_round = [one for one in made if one.candidate.round == number]
        rows = [row for one in of_round for row in one.pairs if "rejected" in row]
        if not rows:  # Self-Rewarding's first round imitates
            continue
        used = [row for row in rows if row["discarded"] is None]
        where = {"model": run.recipe.method, "round": number, "questions": "training pairs"}
        found, base = pair_metrics(rows), run.recipe.model
        repeated = [
            repetition_rate([p["prompt"][-1]["content"] for p in of.pairs]) for of in of_round
        ]
        found["repeated prompts"] = exact(mean(repeated), len(rows))
        if used and any(one.judge not in (base, run.recipe.judge) for one in of_round):
            again = judge_pairs(run, [as_pair(row) for row in used], base, "base_verdicts")
            agrees = [row["margin"] is not None and row["margin"] > 0 for row in again]
            found["base agrees"] = _share(used, agrees)
        for metric, one in found.items():
            judge = "oracle" if metric in ("chosen is better", "judge is right") else "self"
            yield make_row("rounds", metric, one, judge=judge, **where)


def pair_metrics(rows: list[dict]) -> dict[str, Interval]:
    """The quality of judged pairs, including discarded ones, by metric (see `pair_rows`)."""
    used = [row for row in rows if row["discarded"] is None]
    gaps = [(row, gap) for row in used if (gap := _true_gap(row))]  # one of the two is better
    found = {
        "pairs kept": _share(rows, [row["discarded"] is None for row in rows]),
        "chosen is better": _share([row for row, _ in gaps], [gap > 0 for _, gap in gaps]),
    }
    judged = [row for row in rows if row["outcome"] in ("consistent", "inconsistent")]
    if judged:
        flipped = [row["outcome"] == "inconsistent" for row in judged]
        found["flip rate"] = _share(judged, flipped)
        # In the control arms, a coin or the oracle chose.
        decided = [row for row in judged if row.get("arm") not in CONTROLS]
        decided = [row for row in decided if row["margin"] and row["discarded"] != NO_REPLY]
        known = [(row, gap) for row in decided if (gap := _true_gap(row))]
        if decided:
            right = _share([row for row, _ in known], [gap > 0 for _, gap in known])
            found["judge is right"] = right
    return found


def _diversity(run: Run, made: list[Trained]) -> Iterator[dict]:
    """How alike the answered prompts of a round are (`stages.diversity`)."""
    model = run.recipe.prompts.diversity_model
    for number in range(1, run.recipe.rounds + 1):
        texts = [
            row["prompt"][-1]["content"]
            for one in made
            if one.candidate.round == number
            for row in one.pairs
        ]
        alike = mean_similarity(texts, model=model)
        names = {"model": run.recipe.method, "round": number, "questions": "training pairs"}
        if alike:
            found = exact(mean(alike), len(alike))
            note = vectors_in_words(model)
            yield make_row("rounds", "similarity of prompts", found, note=note, **names)


def _forgotten(run: Run, made: list[Trained]) -> Iterator[dict]:
    """The scores in the recipe's tasks before and after each round: what was forgotten."""
    by_name = {f"round {one.candidate.round}": one.candidate.round for one in made}
    everyone = [Candidate("base", None, run.recipe.model)]
    for one in made:
        name, seed = f"round {one.candidate.round}", one.candidate.seed
        everyone.append(Candidate(name, seed, one.candidate.model, one.candidate.round))
    for row in task_rows(run, everyone):
        number = by_name.get(row["model"], 0)
        yield {**row, "model": run.recipe.method if number else "base", "round": number}


def _share(rows: list[dict], values: list[bool]) -> Interval:
    """A share of pairs, clustered by what their prompts ask for, over all trainings."""
    by = [oracles.cluster(row["prompt"][-1]["content"]) for row in rows]
    return clustered_mean(values, by, runs=[row["seed"] for row in rows])


def _true_gap(row: dict) -> int | None:
    """By how many flaws the chosen answer is better; None if no oracle knows the prompt."""
    pair = as_pair(row)
    quality = oracles.quality(pair["prompt"], *pair["responses"])
    return None if quality is None else quality[0] - quality[1]
