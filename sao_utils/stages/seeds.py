"""Seed items: prompts with a gold answer, the outside help that SynPO starts from."""

from __future__ import annotations

from sao_utils import oracles
from sao_utils.files import draw_texts
from sao_utils.store import Run, row_id


def seed_items(run: Run, seed: int) -> list[dict]:
    """`synpo.seed_count` items for one seed of the run, drawn at random from `synpo.seeds`.

    Returns:
        Rows {id, seed, round, prompt, answer, discarded}; `discarded` is None, so that stages that
        answer prompts accept them.

    Raises:
        RecipeError: there is no such file, a column is missing or empty, or there are too few items.
    """
    settings = run.recipe.synpo
    if settings.seeds == "tiny":
        items = oracles.tiny_seeds(settings.seed_count, seed)
    else:
        columns, count = ("prompt", "answer"), settings.seed_count
        items = draw_texts(settings.seeds, columns, count, seed, "synpo.seed_count")
    return [
        {"id": row_id("seed item", seed, k, *item), "seed": seed, "round": 0}
        | {"prompt": item[0], "answer": item[1], "discarded": None}
        for k, item in enumerate(items)
    ]
