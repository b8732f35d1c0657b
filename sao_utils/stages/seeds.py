"""Seed items: prompts with a gold answer, the outside help that SynPO starts from."""

from __future__ import annotations

import random

from sao_utils import oracles
from sao_utils.files import read_table
from sao_utils.recipe import RecipeError
from sao_utils.store import Run, row_id


def seed_items(run: Run, seed: int) -> list[dict]:
    """`synpo.seed_count` items for a seed of the run, drawn at random from `synpo.seeds`.

    Returns:
        Rows {id, seed, round, prompt, answer, discarded}; the last is None, so that stages that answer
        prompts take them.

    Raises:
        RecipeError: no such file, a column is missing or empty, or there are too few items.
    """
    settings = run.recipe.synpo
    if settings.seeds == "tiny":
        items = oracles.tiny_seeds(settings.seed_count, seed)
    else:
        items = [
            _item(row, settings.seeds, k) for k, row in enumerate(read_table(settings.seeds), 1)
        ]
        if len(items) < settings.seed_count:
            raise RecipeError(
                f"{settings.seeds} has {len(items)} items, synpo.seed_count asks for "
                f"{settings.seed_count}."
            )
        items = random.Random(seed).sample(items, settings.seed_count)
    return [
        {"id": row_id("seed item", seed, k, *item), "seed": seed, "round": 0}
        | {"prompt": item[0], "answer": item[1], "discarded": None}
        for k, item in enumerate(items)
    ]


def _item(row: dict, source: str, k: int) -> tuple[str, str]:
    for column in ("prompt", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise RecipeError(
                f"{source}, row {k}: no text in column '{column}'. It has: {', '.join(row)}."
            )
    return row["prompt"].strip(), row["answer"].strip()
