"""A run's evaluation by the names of its models and judges, for the notebooks and the report."""

from __future__ import annotations

from collections.abc import Sequence

from sao_utils.evaluation.answers import answer_questions
from sao_utils.evaluation.comparisons import compare_answers
from sao_utils.evaluation.questions import questions
from sao_utils.methods.sao import candidates
from sao_utils.recipe import Model, RecipeError
from sao_utils.store import Run


def judges(run: Run) -> dict[str, Model]:
    """Every judge for comparisons, by name: "self" (the run's own), then the recipe's `judges`."""
    return {"self": run.recipe.judging_model, **run.recipe.judges}


def answers(
    run: Run,
    names: Sequence[str] | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[dict]:
    """The answers of models to evaluation questions (`evaluation.answers.answer_questions`).

    Args:
        names: names of `methods.sao.candidates`; by default all.
        temperatures: used instead of the recipe's `evaluation.temperatures`.
    """
    settings = run.recipe.evaluation
    asked = questions(settings)
    return answer_questions(
        run, candidates(run, names), asked, temperatures or settings.temperatures
    )


def comparison(run: Run, a: str, b: str, judge: str = "self") -> list[dict]:
    """Let a judge compare two models' answers to the run's questions, at the recipe's first temperature.

    Args:
        a, b: names of `methods.sao.candidates`. A trained model takes part with every seed, against the
            same seed of the other model, or against the other's single set of answers.
        judge: a name of `judges`, or "tuned": the arm "self" (of the first seed) as a judge.

    Raises:
        RecipeError: a name is unknown, or the same model is named twice.
    """
    known = judges(run)
    if judge == "tuned" and judge not in known and "self" in run.recipe.arms:
        known[judge] = candidates(run, ["self"])[0].model
    if judge not in known:
        raise RecipeError(
            f"There is no judge '{judge}'. Judges: {', '.join(known)}. Add judges under the recipe key "
            "`judges`."
        )
    if a == b:
        raise RecipeError(f"'{a}' cannot be compared with itself: name two models.")
    first = run.recipe.evaluation.temperatures[:1]
    of = {name: answers(run, [name], first) for name in (a, b)}
    return compare_answers(run, of[a], of[b], judge, known[judge])
