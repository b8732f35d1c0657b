"""Rewriting responses with SynPO's response improver (arXiv 2410.06961, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_name
from sao_utils.engines.requests import MADE, batches_of_replies
from sao_utils.recipe import Model
from sao_utils.store import Run, make_rows, row_id


def improver_chat(question: str, answer: str) -> list[dict]:
    """What the improver reads, in training and when it rewrites."""
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
        finished}, one for each response and in their order, kept in rows/<stage>.jsonl.
    """
    settings = run.recipe.responses
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = (
        "improved",
        templates.fingerprint("improver"),
        vars(sampling),
        model_name(improver),
    )
    jobs = [
        {
            "id": row_id(*made_with, row["id"]),
            "response_id": row["id"],
            **{key: row[key] for key in ("prompt_id", "seed", "round", "prompt")},
            "model": improver.label,
            "temperature": settings.temperature,
        }
        for row in responses
    ]
    draft = {job["id"]: row["text"] for job, row in zip(jobs, responses)}

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        by_id = {job["id"]: job for job in outstanding}
        requests = [
            {"id": job["id"], "chat": improver_chat(job["prompt"], draft[job["id"]])}
            | {"sampling": sampling}
            for job in outstanding
        ]
        for batch in batches_of_replies(run, stage, improver, requests):
            yield [
                {**by_id[reply["id"]], **{k: reply[k] for k in ("text", *MADE) if k in reply}}
                for reply in batch
            ]

    return make_rows(run, stage, jobs, work, improver.max_context)
