"""Rewriting responses with SynPO's response improver (arXiv 2410.06961, Algorithm 1)."""

from __future__ import annotations

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_name
from sao_utils.recipe import Model
from sao_utils.stages.judging import limits
from sao_utils.stages.responses import answer_jobs
from sao_utils.store import Run, row_id


def improver_chat(question: str, answer: str) -> list[dict]:
    """The chat that the improver is given, both in training and when it rewrites."""
    content = templates.render("improver", question=question, answer=answer)
    return [{"role": "user", "content": content}]


def improve(
    run: Run, responses: list[dict], improver: Model, stage: str = "improved"
) -> list[dict]:
    """Let the improver rewrite every response.

    Args:
        responses: rows of `write_responses`.

    Returns:
        Rows {id, response_id, prompt_id, seed, round, model, temperature, prompt, text, tokens,
        finished}, one for each response and in the same order, kept in rows/<stage>.jsonl.
    """
    settings = run.recipe.responses
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = (
        "improved",
        templates.fingerprint("improver"),
        sampling.named(),
        model_name(improver),
    )
    jobs = [
        {
            "id": row_id(*made_with, row["id"], *limits(row)),
            "response_id": row["id"],
            **{key: row[key] for key in ("prompt_id", "seed", "round", "prompt")},
            "model": improver.label,
            "temperature": settings.temperature,
        }
        for row in responses
    ]
    draft = {job["id"]: row["text"] for job, row in zip(jobs, responses)}

    chat_of = lambda job: improver_chat(job["prompt"], draft[job["id"]])  # noqa: E731
    return answer_jobs(run, stage, improver, jobs, chat_of, sampling)
