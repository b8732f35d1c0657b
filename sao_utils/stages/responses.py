"""Stage 2: several responses of the same model to each prompt (SAO, Algorithm 1, step 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_name
from sao_utils.engines.requests import MADE, batches_of_replies
from sao_utils.recipe import Model
from sao_utils.store import Run, make_rows, row_id

PER_PROMPT = 2  # the paper's


def write_responses(
    run: Run, prompts: list[dict], policy: Model, samples: int = PER_PROMPT
) -> list[dict]:
    """Let the policy answer every prompt that is not discarded.

    Args:
        prompts: rows of `select_prompts`.
        samples: number of responses to each prompt.

    Returns:
        Rows {id, prompt_id, seed, round, sample, model, temperature, prompt, text, tokens, finished},
        with the samples (0, 1, ...) of a prompt next to each other; also {reasoning} for a model that
        thinks.
    """
    settings = run.recipe.responses
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = ("response", sampling.named(), model_name(policy))
    jobs = [
        {
            "id": row_id(*made_with, row["id"], sample),
            "prompt_id": row["id"],
            "seed": row["seed"],
            "round": row["round"],
            "sample": sample,
            "model": policy.label,
            "temperature": settings.temperature,
            "prompt": row["prompt"],
        }
        for row in prompts
        if row["discarded"] is None
        for sample in range(samples)
    ]

    chat_of = lambda job: [{"role": "user", "content": job["prompt"]}]  # noqa: E731
    return answer_jobs(run, "responses", policy, jobs, chat_of, sampling)


def answer_jobs(
    run: Run,
    stage: str,
    model: Model,
    jobs: list[dict],
    chat_of: Callable[[dict], list[dict]],
    sampling: Sampling,
    read: Callable[[dict], dict] = lambda row: {},
) -> list[dict]:
    """Let a model write a text for each job that has no row yet, and keep the new rows.

    Args:
        jobs: dicts with an "id" and the other fields that identify the row.
        chat_of: gives the chat that the model is given for a job.
        read: gives additional fields for a row, read from its text.

    Returns:
        The jobs with {text, tokens, finished} and the fields from `read` added, kept in
        rows/<stage>.jsonl.
    """

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        by_id = {job["id"]: job for job in outstanding}
        requests = [
            {"id": job["id"], "chat": chat_of(job), "sampling": sampling} for job in outstanding
        ]
        for batch in batches_of_replies(run, stage, model, requests):
            rows = [
                {**by_id[reply["id"]], **{k: reply[k] for k in ("text", *MADE) if k in reply}}
                for reply in batch
            ]
            yield [{**row, **read(row)} for row in rows]

    return make_rows(run, stage, jobs, work, model.max_context)
