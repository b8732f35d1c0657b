"""How fast a model runs on this machine, from a trial of about a minute: a few rows of each stage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sao_utils.recipe import Recipe

ROWS = 8  # of a batch
TOKENS = 256  # of a reply, at most
WORDS = "the model reads and writes some words of no meaning so that its speed can be measured "


def measured(recipe: Recipe) -> dict[str, dict]:
    """Seconds that ROWS rows take in each stage that asks the model, and a training step of ROWS pairs.

    Returns:
        In the form of a manifest's stages: stage -> {seconds, made}, or {seconds, pairs, tokens} for
        trainings. Stages that do the same work share a trial, as do all trainings.

    Raises:
        ValueError: an engine other than transformers, which may cost money or need a GPU.
        EngineError: the model is missing.
    """
    if recipe.model.engine != "transformers":
        raise ValueError(
            f"--measure works with model.engine=transformers only, not {recipe.model.engine}."
        )
    from sao_utils import templates
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.registry import load_engine

    engine = load_engine(recipe.model)
    chats = [[{"role": "user", "content": f"{k}. {WORDS * 3}"}] for k in range(ROWS)]
    content = templates.ranking_prompt(WORDS * 3, WORDS * 8, WORDS * 7)
    ranking = [[{"role": "user", "content": content}]] * ROWS

    def write(limit: int) -> dict:
        sampling = Sampling(recipe.responses.temperature, min(TOKENS, limit))
        return _timed(lambda rows: engine.generate(chats[:rows], sampling, [*range(rows)]))

    prompts = write(recipe.prompts.max_new_tokens)
    responses = write(recipe.responses.max_new_tokens)
    choices = (templates.VERDICT_PREFIX, templates.VERDICTS)
    verdicts = _timed(lambda rows: engine.choose(ranking[:rows], *choices))
    return {
        "prompts": prompts,
        **dict.fromkeys(("responses", "answers", "benchmark_answers"), responses),
        **dict.fromkeys(("verdicts", "labelled", "comparisons", "benchmark_verdicts"), verdicts),
        "training self": _training(recipe),
    }


def _timed(work: Callable[[int], Iterator]) -> dict:
    """Time some work on ROWS rows, after a warm-up on one row: {seconds, made}."""
    list(work(1))
    start = time.monotonic()
    made = sum(len(batch) for batch in work(ROWS))
    return {"seconds": time.monotonic() - start, "made": made}


def _training(recipe: Recipe) -> dict:
    from sao_utils.store import read_rows
    from sao_utils.training.fit import fit

    pairs = [
        {
            "id": f"measured {k}",
            "prompt": [{"role": "user", "content": WORDS * 3}],
            "chosen": [{"role": "assistant", "content": WORDS * 8 + str(k)}],
            "rejected": [{"role": "assistant", "content": WORDS * 7 + str(k)}],
        }
        for k in range(2 * ROWS)
    ]
    changes = {"batch_size": ROWS, "epochs": 1, "probe_steps": 0, "report_to": ()}
    settings = recipe.training.model_copy(update=changes)
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe.model, pairs, settings, settings.algorithm, 0, Path(folder) / "measured")
        log = read_rows(Path(folder) / "measured" / "log.jsonl")
    last = log[-1]  # the first step is slower
    return {"seconds": last["seconds"], "pairs": ROWS, "tokens": last["real_tokens"]}
