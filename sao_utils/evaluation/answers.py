"""Stage 6: answers of base, tuned and other models to held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sao_utils.engines.base import Sampling, model_name
from sao_utils.engines.requests import ask
from sao_utils.evaluation.questions import questions
from sao_utils.recipe import Model, RecipeError
from sao_utils.stages.judging import oracle_quality
from sao_utils.store import Run, row_id
from sao_utils.training.fit import train


def models(run: Run) -> list[tuple[str, int | None, Path | None]]:
    """(name, seed, adapter) of the run's own models: "base", then every arm and seed, trained."""
    tuned = [
        (arm, seed, _trained(run, arm, seed))
        for arm in run.recipe.arms
        for seed in run.recipe.seeds
    ]
    return [("base", None, None), *tuned]


_TRAINED: dict[tuple, tuple] = {}


def _trained(run: Run, arm: str, seed: int) -> Path:
    """`train`, asked once a process: it makes all pairs anew to tell that nothing is to be done."""
    key = (str(run.folder), run.recipe.model_dump_json(), arm, seed)
    if key not in _TRAINED or _TRAINED[key][0] != _stamps(run, arm, seed):
        folder = train(run, arm, seed)
        _TRAINED[key] = (_stamps(run, arm, seed), folder)
    return _TRAINED[key][1]


def _stamps(run: Run, arm: str, seed: int) -> list[tuple[int, int] | None]:
    """What tells that a model, or something that it was made from, has changed."""
    files = [run.rows(stage) for stage in ("prompts", "responses", "verdicts")]
    files += [Path(run.recipe.personas.source), Path(run.recipe.evaluation.questions)]
    files.append(run.folder / "adapters" / f"{arm}-{seed}" / "done.json")
    there = [path.stat() if path.is_file() else None for path in files]
    return [found and (found.st_mtime_ns, found.st_size) for found in there]


def competitors(
    run: Run, names: Sequence[str] | None = None
) -> list[tuple[str, int | None, Model]]:
    """(name, seed, model) of all that can be compared: the run's own models, and the recipe's `others`.

    Args:
        names: only these ("base", arms, names of `others`); what is not trained yet will be.

    Raises:
        RecipeError: a name that is none of them.
    """
    recipe = run.recipe
    every = ["base", *recipe.arms, *recipe.others]
    for name in names or ():
        if name not in every:
            raise RecipeError(
                f"There is no model '{name}' to compare. Models: {', '.join(every)}. More: key others."
            )
    found: list[tuple[str, int | None, Model]] = []
    for name in names or every:
        if name in recipe.arms:
            for seed in recipe.seeds:
                adapter = {"adapter": str(_trained(run, name, seed))}
                found.append((name, seed, recipe.model.model_copy(update=adapter)))
        else:
            found.append((name, None, recipe.others.get(name, recipe.model)))
    return found


def answer(
    run: Run,
    names: Sequence[str] | None = None,
    prompts: str | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[dict]:
    """Let every competitor answer every question at every temperature, each on its own engine.

    Args:
        names: as in `competitors`.
        prompts: another set or file than `evaluation.questions`.
        temperatures: others than `evaluation.temperatures`.

    Returns:
        Rows {id, model, seed, weights, temperature, question_id, question, combination, text, tokens,
        finished, quality, good}; the last two by the oracle, None where it has no say.
    """
    settings, rows = run.recipe.evaluation, []
    asked = questions(run, prompts)
    for name, seed, model in competitors(run, names):
        weights, jobs, requests = model_name(model), [], []
        for temperature in temperatures or settings.temperatures:
            sampling = Sampling(temperature, settings.max_new_tokens, settings.top_p)
            for q in asked:
                jobs.append(
                    {
                        "id": row_id("answer", vars(sampling), weights, name, seed, q["id"]),
                        "model": name,
                        "seed": seed,
                        "weights": weights,
                        "temperature": temperature,
                        "question_id": q["id"],
                        "question": q["question"],
                        "combination": q["combination"],
                    }
                )
                chat = [{"role": "user", "content": q["question"]}]
                requests.append({"chat": chat, "sampling": sampling})
        replies = ask(run, "answers", model, requests)
        rows += [_answer_row(job, reply) for job, reply in zip(jobs, replies)]
    return rows


def _answer_row(job: dict, reply: dict) -> dict:
    quality = oracle_quality(job["question"], reply["text"])
    return {
        **job,
        **{key: reply[key] for key in ("text", "tokens", "finished")},
        "quality": quality and quality[0],
        "good": None if quality is None else quality[0] == 0,
    }
