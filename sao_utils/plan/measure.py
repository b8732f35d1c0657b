"""How fast a model is on this machine, from a trial of about a minute: a few rows of each stage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sao_utils.recipe import Recipe

ROWS = 8  # of a batch; twice so many where that takes less than FEW seconds
FEW = 10.0
WORDS = "the model reads and writes some words of no meaning so that its speed can be measured "


def measured(recipe: Recipe) -> dict[str, dict]:
    """Seconds of a few rows of each stage, in the form of a manifest's stages.

    Writes and judges ROWS rows of the lengths that the recipe allows, and trains one step of ROWS pairs.

    Returns:
        stage -> {seconds, made, tokens}: "prompts", "responses", "answers", "verdicts", "comparisons",
        "benchmark_answers", "benchmark_verdicts", "labelled", "training self".
    """
    from sao_utils import templates
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.registry import load_engine

    engine = load_engine(recipe.model)
    question = WORDS * 3

    def write(new_tokens: int) -> tuple[int, int]:
        chats = [[{"role": "user", "content": f"{k}. {question}"}] for k in range(ROWS)]
        sampling = Sampling(recipe.responses.temperature, new_tokens)
        made = [
            reply for batch in engine.generate(chats, sampling, [*range(ROWS)]) for reply in batch
        ]
        return len(made), sum(reply.tokens for _, reply in made)

    def judge() -> tuple[int, int]:
        content = templates.ranking_prompt(question, WORDS * 8, WORDS * 7)
        chats = [[{"role": "user", "content": content}]] * ROWS
        choices = (templates.VERDICT_PREFIX, templates.VERDICTS)
        return len([row for batch in engine.choose(chats, *choices) for row in batch]), 0

    found = {}
    for stages, work in (
        (("prompts",), lambda: write(min(64, recipe.prompts.max_new_tokens))),
        (
            ("responses", "answers", "benchmark_answers"),
            lambda: write(min(256, recipe.responses.max_new_tokens)),
        ),
        (("verdicts", "labelled", "comparisons", "benchmark_verdicts"), judge),
    ):
        row = _timed(work)
        found |= dict.fromkeys(stages, row)
    return found | {"training self": _training(recipe, question)}


def _timed(work: Callable[[], tuple[int, int]]) -> dict:
    """Seconds, rows and tokens of some work, done once more if it was too short to measure."""
    total = {"seconds": 0.0, "made": 0, "tokens": 0}
    for _ in range(2):
        start = time.monotonic()
        made, tokens = work()
        total["seconds"] += time.monotonic() - start
        total["made"] += made
        total["tokens"] += tokens
        if total["seconds"] > FEW:
            break
    return total


def _training(recipe: Recipe, question: str) -> dict:
    from sao_utils.store import read_rows
    from sao_utils.training.fit import fit

    def message(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    pairs = [
        {
            "id": f"measured {k}",
            "prompt": message("user", question),
            "chosen": message("assistant", WORDS * 8 + str(k)),
            "rejected": message("assistant", WORDS * 7 + str(k)),
        }
        for k in range(2 * ROWS)
    ]
    changes = {"batch_size": ROWS, "epochs": 1, "probe_steps": 0}
    settings = recipe.training.model_copy(update=changes)
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe.model, pairs, settings, settings.algorithm, 0, Path(folder) / "measured")
        log = read_rows(Path(folder) / "measured" / "log.jsonl")
    last = log[-1]  # the first step is slower
    return {"seconds": last["seconds"], "pairs": ROWS, "tokens": last["real_tokens"]}
