"""Stage 2: two responses of the same model to each prompt (SAO, Algorithm 1, step 3)."""

from __future__ import annotations

from sao_utils.engines import Sampling, limit_met, load_engine, model_name
from sao_utils.personas import write_prompts
from sao_utils.rows import Run, make_rows, row_id, seed_of

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
        chats = [[{"role": "user", "content": job["prompt"]}] for job in outstanding]
        seeds = [seed_of(job["id"]) for job in outstanding]
        for batch in load_engine(recipe.model).generate(chats, sampling, seeds):
            yield [
                {**outstanding[i], "text": c.text, "tokens": c.tokens, "finished": c.finished}
                | limit_met(recipe.model, c, sampling)
                for i, c in batch
            ]

    return make_rows(run, "responses", jobs, work, recipe.model.max_context)


def response_pairs(run: Run) -> list[tuple[dict, dict]]:
    """The two response rows of each prompt."""
    rows = write_responses(run)
    return list(zip(rows[0::PER_PROMPT], rows[1::PER_PROMPT]))
