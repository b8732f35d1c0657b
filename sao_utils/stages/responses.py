"""Stage 2: two responses of the same model to each prompt (SAO, Algorithm 1, step 3)."""

from __future__ import annotations

from sao_utils.engines.base import Sampling, model_name
from sao_utils.engines.requests import replies
from sao_utils.stages.prompts import MADE, write_prompts
from sao_utils.store import Run, make_rows, row_id

PER_PROMPT = 2  # the paper's


def write_responses(run: Run) -> list[dict]:
    """Answer every prompt twice.

    Returns:
        Rows {id, seed, prompt_id, prompt, sample, text, tokens, finished}, the two samples (0, 1)
        of a prompt after each other.
    """
    recipe = run.recipe
    prompts = [row for row in write_prompts(run) if row["discarded"] is None]
    settings = recipe.responses
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = ("response", vars(sampling), model_name(recipe.model))
    jobs = [
        {
            "id": row_id(*made_with, row["id"], sample),
            "seed": row["seed"],
            "prompt_id": row["id"],
            "prompt": row["prompt"],
            "sample": sample,
        }
        for row in prompts
        for sample in range(PER_PROMPT)
    ]

    def work(outstanding):
        by_id = {job["id"]: job for job in outstanding}
        requests = []
        for job in outstanding:
            chat = [{"role": "user", "content": job["prompt"]}]
            requests.append({"id": job["id"], "chat": chat, "sampling": sampling})
        for batch in replies(run, "responses", recipe.model, requests):
            yield [
                {**by_id[reply["id"]], **{k: reply[k] for k in ("text", *MADE) if k in reply}}
                for reply in batch
            ]

    return make_rows(run, "responses", jobs, work, recipe.model.max_context)


def response_pairs(run: Run) -> list[tuple[dict, dict]]:
    """The two response rows of each prompt."""
    rows = write_responses(run)
    return list(zip(rows[0::PER_PROMPT], rows[1::PER_PROMPT]))
