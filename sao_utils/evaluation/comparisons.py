"""Contests: any two models on the same prompts, any judge, and what their verdicts add up to.

A judge sees both answers with the paper's ranking prompt, in both orders (`judging.verdict_rows`).
A prompt is won where both orders agree, and half won where they disagree, tie, or the answers are
the same (ours: the papers do not say). Names of competitors: "base", the recipe's arms, and
`others`; of judges: "self" (the recipe's own judge, by default its model before training) and
`judges`.

The key of a result says who played whom and who judged: `contest.<a>_vs_<b>.<judge>.<metric>`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance

from sao_utils.evaluation.answers import answer, competitors
from sao_utils.recipe import Model, RecipeError
from sao_utils.stages.judging import first_shown, judges_agree, verdict_rows
from sao_utils.statistics.intervals import (
    Interval,
    clustered_difference,
    clustered_mean,
    design_effect,
    prompts_needed,
    win_rate,
)
from sao_utils.statistics.length_control import length_controlled_win_rate
from sao_utils.statistics.ratings import bradley_terry
from sao_utils.store import Run, row_id

#: metric of a scoreboard -> the outcome of `judging.verdict_rows` that it is the share of
OUTCOMES = {
    "decided": "consistent",
    "inconsistent": "inconsistent",
    "tie": "tie",
    "identical": "identical",
}


def judge_models(run: Run) -> dict[str, Model]:
    """Every judge of contests by name: "self", then the recipe's `judges`."""
    return {"self": run.recipe.judging_model, **run.recipe.judges}


def contest(
    run: Run,
    a: str,
    b: str,
    judge: str = "self",
    prompts: str | None = None,
    temperature: float | None = None,
) -> list[dict]:
    """Let a judge compare two competitors' answers to the same prompts, in both orders.

    Args:
        a, b: names as in `evaluation.competitors`. Trained models take part with every seed, against
            the same seed of the other, or against the other's one set of answers.
        judge: a name of `judge_models`, or "tuned": the arm "self" (of the first seed) as a judge. It
            judges as `judging` of the recipe says.
        prompts: a set or file; by default `evaluation.questions`.
        temperature: of the answers; by default the recipe's first.

    Returns:
        A row a prompt and seed: {id, model (a), opponent (b), judge, seed, prompts, temperature,
        question_id, combination, prompt, responses [a, b], lengths [tokens of a, b], win}, and the keys of
        `judging.verdict_rows`. `win` is 1 or 0 where both orders agree, 0.5 for identical
        answers, ties and disagreeing orders, None for invalid verdicts.

    Raises:
        RecipeError: a name that is not there, or one competitor twice.
    """
    judges = judge_models(run)
    if judge == "tuned" and judge not in judges and "self" in run.recipe.arms:
        judges[judge] = competitors(run, ["self"])[0][2]
    if judge not in judges:
        raise RecipeError(
            f"There is no judge '{judge}'. Judges: {', '.join(judges)}. More: judges."
        )
    if a == b:
        raise RecipeError(f"'{a}' cannot be compared with itself: name two models.")
    settings = run.recipe.evaluation
    prompts = settings.questions if prompts is None else prompts
    temperature = settings.temperatures[0] if temperature is None else temperature
    answers: dict[str, dict] = {a: {}, b: {}}  # model -> (seed, question) -> its answer
    for row in answer(run, (a, b), prompts, (temperature,)):
        answers[row["model"]][row["seed"], row["question_id"]] = row
    seeds = sorted({seed for of in answers.values() for seed, _ in of if seed is not None})
    pairs = []
    for seed in seeds or [None]:
        of_a, of_b = (_of_seed(answers[name], seed) for name in (a, b))
        for question_id, first in of_a.items():
            second = of_b[question_id]
            pairs.append(
                {
                    "id": row_id("contest", first["id"], second["id"]),
                    "model": a,
                    "opponent": b,
                    "judge": judge,
                    "seed": seed,
                    "prompts": prompts,
                    "temperature": temperature,
                    "question_id": question_id,
                    "combination": first["combination"],
                    "prompt": first["question"],
                    "responses": [first["text"], second["text"]],
                    "lengths": [first["tokens"], second["tokens"]],
                }
            )
    judged = verdict_rows(run, "duels", pairs, judges[judge])
    return [{**row, "win": _win(row)} for row in judged]


def _of_seed(answers: dict, seed: int | None) -> dict[str, dict]:
    """question -> a model's answer of a seed, or its only one."""
    return {question: row for (of, question), row in answers.items() if of in (seed, None)}


def _win(row: dict) -> float | None:
    if row["outcome"] == "invalid":
        return None
    if row["outcome"] == "consistent":
        return float(row["margin"] > 0)
    return 0.5


def duel(run: Run) -> list[dict]:
    """Every arm's contest with the base model, judged by the run's own judge. Rows of `contest`."""
    return [row for arm in run.recipe.arms for row in contest(run, arm, "base")]


def name_of(run: Run, row: dict) -> str:
    """The beginning of a contest's keys: models and judge, and what is not the recipe's first choice."""
    return f"contest.{row['model']}_vs_{row['opponent']}.{row['judge']}" + _elsewhere(run, row)


def _elsewhere(run: Run, row: dict) -> str:
    settings, name = run.recipe.evaluation, ""
    if row["prompts"] != settings.questions:
        name += "." + Path(row["prompts"]).stem
    if row["temperature"] != settings.temperatures[0]:
        name += f".t{row['temperature']:g}"
    return name


def scoreboard(run: Run, rows: list[dict]) -> dict[str, Interval]:
    """What one contest came to, each key beginning with `name_of`.

    Args:
        rows: of one call of `contest`, at least one.

    Returns:
        win_rate, win_rate_lc: see `rate_of`, `rate_at_equal_length`.
        Shares of valid verdicts: decided (both orders agree), inconsistent, tie, identical; and
        first_position, the share of verdicts, two a prompt, that prefer what is shown first (half,
        where a verdict's odds are even).
        Shares of all prompts: valid; empty_a, empty_b: answers without text.
        length_difference: a's characters minus b's.
        prompts_needed: to see a win rate that far from 50 % four times of five; low and high are
        those for the ends of its interval, infinite where that holds 50 %.
        Without a valid verdict there is no win rate, and what hangs on it is left out. n counts
        rows: prompts times seeds.
    """
    resamples = run.recipe.evaluation.bootstrap

    def mean(values: list, of: list[dict]) -> Interval:
        by, runs = [row["combination"] for row in of], [row["seed"] for row in of]
        return clustered_mean(values, by, resamples, runs=runs)

    valid = [row for row in rows if row["win"] is not None]
    judged = [row for row in valid if row["margin"] is not None]
    empty = [[not text.strip() for text in row["responses"]] for row in rows]
    found = {
        "valid": mean([row["win"] is not None for row in rows], rows),
        "empty_a": mean([a for a, _ in empty], rows),
        "empty_b": mean([b for _, b in empty], rows),
        "length_difference": mean(_longer(rows), rows),
    }
    if valid:
        rate = rate_of(valid)
        found = {
            "win_rate": rate,
            "win_rate_lc": rate_at_equal_length(valid),
            **{
                key: mean([row["outcome"] == outcome for row in valid], valid)
                for key, outcome in OUTCOMES.items()
            },
            **found,
            "prompts_needed": _needed(rate, valid),
        }
    if judged:
        shown = [
            (float(prefers), row["combination"], row["seed"])
            for row in judged
            for prefers in first_shown(row)
        ]
        found["first_position"] = win_rate(*zip(*shown)).rate
    return {f"{name_of(run, rows[0])}.{key}": value for key, value in found.items()}


def _longer(rows: list[dict]) -> list[int]:
    return [len(row["responses"][0]) - len(row["responses"][1]) for row in rows]


def rate_of(valid: list[dict]) -> Interval:
    """The win rate of contest rows with valid verdicts (`intervals.win_rate`)."""
    wins, by = [row["win"] for row in valid], [row["combination"] for row in valid]
    return win_rate(wins, by, [row["seed"] for row in valid]).rate


def rate_at_equal_length(valid: list[dict]) -> Interval:
    """The length-controlled win rate of contest rows with valid verdicts (`length_control`).

    Length is counted in characters, as AlpacaEval does: a judge is shown text, and the models of a
    contest, or of two runs, may cut the same text into different tokens.
    """
    return length_controlled_win_rate(
        [row["win"] for row in valid],
        _longer(valid),
        [row["combination"] for row in valid],
        runs=[row["seed"] for row in valid],
    )


def _needed(rate: Interval, valid: list[dict]) -> Interval:
    """Prompts, each with all of the trainings, by how much their results differ here."""
    by_question: dict[str, list[dict]] = {}
    for row in valid:
        by_question.setdefault(row["question_id"], []).append(row)
    means = [fmean(row["win"] for row in of) for of in by_question.values()]
    clusters = [of[0]["combination"] for of in by_question.values()]
    spread = {}  # without any to be seen: as if each prompt were won or lost on its own
    if len(set(clusters)) > 1 and (effect := design_effect(means, clusters)) and variance(means):
        spread = {"variance": variance(means), "design_effect": effect}

    def needed(share: float) -> float:
        return math.inf if share == 0.5 else float(prompts_needed(share - 0.5, **spread))

    ends = sorted((needed(rate.low), needed(rate.high)))
    if rate.low <= 0.5 <= rate.high:
        ends[1] = math.inf
    return Interval(needed(rate.value), *ends, rate.n)


def remarks(rows: list[dict]) -> list[str]:
    """What makes a contest's win rate doubtful, in plain sentences; [] if nothing does.

    Args:
        rows: of one call of `contest`, at least one.
    """
    n, bad = len(rows), sum(row["win"] is None for row in rows)
    judged = [row for row in rows if row["margin"] is not None]
    first = [prefers for row in judged for prefers in first_shown(row)]
    said = doubts(rows[0]["judge"], bad, n, sum(first) / len(first) if first else 0.5)
    for k, name in enumerate((rows[0]["model"], rows[0]["opponent"])):
        if empty := sum(not row["responses"][k].strip() for row in rows):
            said.append(f"{empty} of {n} answers of '{name}' are empty.")
    prompts = Counter((row["seed"], row["prompt"]) for row in rows)
    if again := n - len(prompts):
        said.append(f"{again} of {n} prompts repeat an earlier one; they add no certainty.")
    return said


def doubts(judge: str, invalid: int, asked: int, first: float, what: str = "prompts") -> list[str]:
    """What makes a judge's verdicts doubtful, in plain sentences; [] if nothing does.

    Args:
        judge: its name.
        invalid, asked: how many verdicts are not valid, of how many `what`.
        first: the share of its verdicts that prefer what is shown first.
    """
    said = []
    if invalid > asked / 20:
        said.append(f"The judge '{judge}' gave no valid verdict on {invalid} of {asked} {what}.")
    if not 0.2 <= first <= 0.8:
        where, share = ("first", first) if first > 0.5 else ("second", 1 - first)
        said.append(
            f"The judge '{judge}' prefers what is shown {where} in {share:.0%} of its verdicts: they "
            "say little of the answers."
        )
    return said


def compared(
    run: Run, a: str, b: str, opponent: str = "base", judge: str = "self", **options
) -> dict[str, Interval]:
    """How much more often a wins against an opponent than b does, paired by prompt and seed.

    Args:
        options: `prompts` and `temperature` of `contest`.

    Returns:
        `contest.<a>_over_<b>_vs_<opponent>.<judge>.gain`: by scipy's BCa bootstrap over clusters;
        with several trainings by percentiles, over trainings too, and `.gain.seed<k>` of each alone.
        {} if no prompt is judged validly
        in both contests.
    """
    wins = []
    for name in (a, b):
        rows = contest(run, name, opponent, judge, **options)
        wins.append({(row["seed"], row["question_id"]): row for row in rows})
    pairs = [(row, wins[1].get(key) or wins[1].get((None, key[1]))) for key, row in wins[0].items()]
    pairs = [(x, y) for x, y in pairs if y and None not in (x["win"], y["win"])]
    if not pairs:
        return {}
    runs = [x["seed"] for x, _ in pairs]
    several = len(set(runs)) > 1
    name = name_of(run, {**pairs[0][0], "model": f"{a}_over_{b}"})
    resamples, found = run.recipe.evaluation.bootstrap, {}
    for seed in (None, *dict.fromkeys(runs)) if several else (None,):
        of = [pair for pair in pairs if seed in (None, pair[0]["seed"])]
        all_trainings = several and seed is None
        found[f"{name}.gain" + ("" if seed is None else f".seed{seed}")] = clustered_difference(
            [x["win"] for x, _ in of],
            [y["win"] for _, y in of],
            [x["combination"] for x, _ in of],
            resamples,
            runs=runs if all_trainings else None,
            method="percentile" if all_trainings else "BCa",
            bounds=(0, 1),
        )
    return found


def league(
    run: Run,
    judge: str = "self",
    names: Sequence[str] | None = None,
    star: bool = False,
    **options,
) -> dict[str, Interval]:
    """The strengths of several competitors (Bradley-Terry, `ratings.bradley_terry`).

    Args:
        names: who plays; by default all, "base" among them.
        star: each plays against "base" only, instead of all pairs.
        options: `prompts` and `temperature` of `contest`.

    Returns:
        `league.<judge>.<model>.elo` (base: 1000) and `.win_rate` (expected against base), the
        strongest first. Invalid verdicts are left out: n is the number of games. Where there are
        several seeds, the intervals also hold what other trainings would have changed.
    """
    recipe = run.recipe
    names = list(names or ["base", *recipe.arms, *recipe.others])
    pairs = [(name, "base") for name in names if name != "base"]
    if not star:
        pairs = list(combinations(names, 2))
    rows = [row for a, b in pairs for row in contest(run, a, b, judge, **options)]
    valid = [row for row in rows if row["win"] is not None]
    games = [(row["model"], row["opponent"], row["win"], 1.0, row["combination"]) for row in valid]
    strengths = bradley_terry(
        games,
        "base",
        min(1000, recipe.evaluation.bootstrap),
        runs=[row["seed"] for row in valid],
    )
    start = f"league.{judge}{_elsewhere(run, rows[0])}"
    found = {}
    for name, strength in strengths.items():
        found[f"{start}.{name}.elo"] = strength.elo
        found[f"{start}.{name}.win_rate"] = strength.win_rate
    return found


def judges_agreement(
    run: Run, a: str, b: str, judges: Sequence[str] | None = None, **options
) -> dict[str, Interval]:
    """One contest by several judges: the win rate by each, and how far each two of them agree.

    Args:
        judges: names of `judge_models`; by default all.
        options: `prompts` and `temperature` of `contest`.

    Returns:
        `contest.<a>_vs_<b>.<judge>.win_rate` of each (left out where a judge gave no valid verdict),
        and `contest.<a>_vs_<b>.<judge>_and_<judge>.agreement`, `.kappa` (Cohen's), of the verdict on
        a prompt, and `.agreement_one_order`, `.kappa_one_order`: see `judging.judges_agree`.
    """
    resamples, rows, found = run.recipe.evaluation.bootstrap, {}, {}
    for judge in judges or judge_models(run):
        rows[judge] = contest(run, a, b, judge, **options)
        valid = [row for row in rows[judge] if row["win"] is not None]
        if valid:
            found[f"{name_of(run, valid[0])}.win_rate"] = rate_of(valid)
    for one, other in combinations(rows, 2):
        name = name_of(run, {**rows[one][0], "judge": f"{one}_and_{other}"})
        for key, interval in judges_agree(rows[one], rows[other], resamples).items():
            found[f"{name}.{key}"] = interval
    return found
