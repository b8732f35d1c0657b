"""Stage 6: answers of base and tuned models to held-out questions, and the self-judge's duels."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from sao_utils.engines import Sampling, load_engine, model_name
from sao_utils.judging import oracle_quality, verdict_rows
from sao_utils.questions import questions
from sao_utils.rows import Run, make_rows, row_id, seed_of
from sao_utils.training import train


def models(run: Run) -> list[tuple[str, int | None, Path | None]]:
    """(name, seed, adapter) of all that is evaluated: "base", then every arm and seed, trained."""
    tuned = [
        (arm, seed, train(run, arm, seed)) for arm in run.recipe.arms for seed in run.recipe.seeds
    ]
    return [("base", None, None), *tuned]


def answer(run: Run) -> list[dict]:
    """Let every model answer every question at every temperature.

    Returns:
        Rows {id, model, seed, weights, temperature, question_id, question, combination, text, tokens,
        finished, quality, good}; the last two by the oracle, None where it has no say.
    """
    settings, model = run.recipe.evaluation, run.recipe.model
    asked, adapters, jobs = questions(run), {}, []
    for name, seed, adapter in models(run):
        weights = model_name(model, adapter)
        adapters[weights] = adapter
        for temperature in settings.temperatures:
            sampling = vars(Sampling(temperature, settings.max_new_tokens, settings.top_p))
            jobs += [
                {
                    "id": row_id("answer", sampling, weights, name, seed, q["id"]),
                    "model": name,
                    "seed": seed,
                    "weights": weights,
                    "temperature": temperature,
                    "question_id": q["id"],
                    "question": q["question"],
                    "combination": q["combination"],
                }
                for q in asked
            ]

    def work(outstanding):
        kind = lambda job: (job["weights"], job["temperature"])  # noqa: E731
        for (weights, temperature), group in groupby(outstanding, key=kind):
            group = list(group)
            chats = [[{"role": "user", "content": job["question"]}] for job in group]
            seeds = [seed_of(row_id(job["question_id"], temperature)) for job in group]
            sampling = Sampling(temperature, settings.max_new_tokens, settings.top_p)
            engine = load_engine(model, adapters[weights])
            for batch in engine.generate(chats, sampling, seeds):
                yield [_answer_row(group[i], completion) for i, completion in batch]

    return make_rows(run, "answers", jobs, work)


def _answer_row(job: dict, completion) -> dict:
    quality = oracle_quality(job["question"], completion.text)
    return {
        **job,
        "text": completion.text,
        "tokens": completion.tokens,
        "finished": completion.finished,
        "quality": quality and quality[0],
        "good": None if quality is None else quality[0] == 0,
    }


def duel(run: Run) -> list[dict]:
    """Let the frozen base model judge each tuned model's answers against its own.

    On the answers at the first temperature of the recipe, in both orders.

    Returns:
        Rows {model, seed, combination, question, responses [tuned, base], lengths (tokens), win}
        and the keys of `judging.verdict_rows`. `win` is 1 or 0 where both orders agree, 0.5 for
        identical answers, ties and disagreeing orders, None for invalid verdicts.
    """
    temperature = run.recipe.evaluation.temperatures[0]
    rows = [row for row in answer(run) if row["temperature"] == temperature]
    base = {row["question_id"]: row for row in rows if row["model"] == "base"}
    pairs = [
        {
            "id": row_id("duel", row["id"], base[row["question_id"]]["id"]),
            "model": row["model"],
            "seed": row["seed"],
            "combination": row["combination"],
            "prompt": row["question"],
            "responses": [row["text"], base[row["question_id"]]["text"]],
            "lengths": [row["tokens"], base[row["question_id"]]["tokens"]],
        }
        for row in rows
        if row["model"] != "base"
    ]
    judged = verdict_rows(run, "duels", pairs)
    return [{**row, "win": _win(row)} for row in judged]


def _win(row: dict) -> float | None:
    if row["outcome"] == "invalid":
        return None
    if row["outcome"] == "consistent":
        return float(row["margin"] > 0)
    return 0.5
