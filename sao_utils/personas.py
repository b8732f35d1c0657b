"""Stage 1: personas, and the prompt that each of them would write (SAO, Algorithm 1, steps 1-2)."""

from __future__ import annotations

import random
from itertools import islice

from sao_utils import templates
from sao_utils.engines import (
    NO_REPLY,
    Completion,
    Sampling,
    load_engine,
    model_name,
    unanswered,
)
from sao_utils.questions import read_column
from sao_utils.recipe import RecipeError
from sao_utils.rows import Run, complete, make_rows, row_id, seed_of
from sao_utils.tiny import world

HUB_PERSONAS = "proj-persona/PersonaHub"  # CC BY-NC-SA 4.0: read on request, never bundled


def draw_personas(run: Run) -> list[dict]:
    """The personas of every seed.

    Returns:
        Rows {id, seed, persona}, `personas.count` for each seed; from a file and from the hub
        without repetition. Those of the hub are kept in rows/personas.jsonl, so that the rest of a
        run needs no hub.

    Raises:
        RecipeError: the file is missing, empty, or has no column "persona".
    """
    found = []
    for seed in run.recipe.seeds:
        texts = _read_personas(run, seed)
        found += [
            {"id": row_id("persona", seed, k, text), "seed": seed, "persona": text}
            for k, text in enumerate(texts)
        ]
    return found


def _read_personas(run: Run, seed: int) -> list[str]:
    source, count = run.recipe.personas.source, run.recipe.personas.count
    rng = random.Random(seed)
    if source == "tiny":
        return [world.draw_persona(rng, held_out=True)[0] for _ in range(count)]
    if source == "hub":
        job = {"id": row_id("hub personas", HUB_PERSONAS, count, seed)}
        kept = complete(
            run.rows("personas"),
            [job],
            lambda jobs: iter([[{**job, "texts": _stream_from_hub(count, seed)}]]),
            "personas",
        )
        return kept[0]["texts"]
    every = read_column(source, "persona")
    if len(every) < count:
        raise RecipeError(
            f"{source} has {len(every)} personas, personas.count asks for {count}. Lower the count."
        )
    return rng.sample(every, count)


def _stream_from_hub(count: int, seed: int) -> list[str]:
    from datasets import load_dataset

    stream = load_dataset(HUB_PERSONAS, "persona", split="train", streaming=True)
    shuffled = stream.shuffle(seed=seed, buffer_size=10_000)
    return [row["persona"] for row in islice(shuffled, count)]


def write_prompts(run: Run) -> list[dict]:
    """Let the model write each persona's prompt.

    Returns:
        Rows {id, seed, persona, reply, prompt, discarded, tokens, finished}. `discarded` is None,
        or says why the row goes no further: "malformed" (the reply does not begin as the template
        asks), "cut off" (at the token limit), `engines.NO_REPLY`, or "evaluation question" (tiny world: it asks for a
        held-out combination, so training on it would leak).
    """
    recipe = run.recipe
    settings = recipe.personas
    template = "persona" if settings.with_persona else "no_persona"
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = (
        "prompt",
        templates.fingerprint(template),
        vars(sampling),
        model_name(recipe.model),
    )
    jobs = [{**person, "id": row_id(*made_with, person["id"])} for person in draw_personas(run)]

    def work(outstanding):
        chats = [
            [{"role": "user", "content": templates.render(template, persona=job["persona"])}]
            for job in outstanding
        ]
        seeds = [seed_of(job["id"]) for job in outstanding]
        for batch in load_engine(recipe.model).generate(chats, sampling, seeds):
            yield [_prompt_row(outstanding[i], reply) for i, reply in batch]

    return make_rows(run, "prompts", jobs, work)


def _prompt_row(job: dict, reply: Completion) -> dict:
    prompt, discarded = templates.parse_user_prompt(reply.text), None
    if unanswered(reply.tokens, reply.finished):
        discarded = NO_REPLY
    elif prompt is None:
        discarded = "malformed"
    elif not reply.finished:
        discarded = "cut off"
    elif _is_held_out(prompt):
        discarded = "evaluation question"
    return {**job, "reply": reply.text, "prompt": prompt, "discarded": discarded} | {
        "tokens": reply.tokens,
        "finished": reply.finished,
    }


def _is_held_out(prompt: str) -> bool:
    """Whether a prompt is a question of the tiny world from a combination kept for evaluation."""
    question = world.parse_question(prompt)
    return question is not None and world.SPLIT[question.combination] != "train"


def repetition_rate(prompts: list[str]) -> float:
    """Share of prompts that say what an earlier one said, up to case and white space.

    Ours: the paper reports a repetition rate without defining it. 0 for an empty list.
    """
    seen = {" ".join(prompt.lower().split()) for prompt in prompts}
    return 1 - len(seen) / len(prompts) if prompts else 0.0
