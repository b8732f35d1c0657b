"""Benchmarks of generation and judging: `python -m sao_utils.bench engines`.

What the kit costs over one raw call of its engine on the embedded tiny model, interleaved
(`--engine vllm`: of vLLM, in the Python that $SAO_VLLM_PYTHON names). On a GPU also replies and
verdicts a second and peak memory by batch size, with random weights in the true shapes of models;
only shapes matter for time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from sao_utils.bench.measuring import GIB, attempt, measure
from sao_utils.bench.models import random_base
from sao_utils.bench.overhead import overhead, with_speed

PROMPT, REPLY, JUDGED = 60, 375, 930  # tokens, as facts assumed of real models
BATCHES = (8, 32, 128)
ON_GPU = ("qwen2.5-1.5b", "gemma-2-9b")


def measurements(shapes, device: str, kind: str, repeats: int) -> Iterator[dict]:
    """The overhead, and models of these shapes with 16-bit and with NF4 weights.

    Args:
        kind: the engine of the overhead, "transformers" or "vllm".
    """
    yield from attempt({"measurement": "overhead"}, overhead, 1500, repeats, kind)
    for shape in shapes:
        for nf4 in (False, True):
            base = {"measurement": "generate", "shapes": shape}
            yield from attempt(base, by_batch, shape, nf4, device)


def by_batch(
    shape: str, nf4: bool, device: str, batches=BATCHES, tokens=(PROMPT, REPLY, JUDGED)
) -> Iterator[dict]:
    """Generation and judging with random weights of a shape, a row a batch size.

    Args:
        tokens: of a prompt, a reply (random weights never end one) and a judge's prompt.

    Yields:
        Rows whose peak_bytes holds everything on the device, weights included, and whose planned_bytes
        are what `sao plan` predicts for it.
    """
    from sao_utils.engines.base import Sampling, encode
    from sao_utils.engines.loading import load_tokenizer
    from sao_utils.engines.transformers import TransformersEngine
    from sao_utils.recipe import Model

    model, weights = random_base(shape, device, nf4)
    model.config.use_cache = True
    engine = TransformersEngine.of(model, load_tokenizer(Model(path="tiny")), 1)
    engine.stops = []
    prompt, reply, judged = tokens

    def chats(rows: int, wanted: int):
        """Prompts of about so many tokens, and the exact number of them."""
        one = [{"role": "user", "content": "the " * max(1, wanted - 2)}]
        return [one] * rows, len(encode([one], engine.tokenizer)[0])

    def generate(rows: int, new: int = reply) -> dict:
        asked, length = chats(rows, prompt)
        engine.batch_tokens = rows * (length + new)
        replies = [r for b in engine.generate(asked, Sampling(0.6, new), range(rows)) for r in b]
        return {"rows": rows, "tokens": sum(one.tokens for _, one in replies)}

    def judge(rows: int) -> dict:
        asked, length = chats(rows, judged)
        engine.batch_tokens = rows * (length + 2)
        scored = [s for b in engine.choose(asked, "ranking:", (" 1 > 2", " 2 > 1")) for s in b]
        return {"rows": len(scored), "tokens": rows * length}

    generate(1, 2)  # the first call of anything is slow
    for name, work in (("generate", generate), ("judge", judge)):
        for batch in batches:
            row = measure(lambda: work(batch), device, whole=True)  # noqa: B023
            base = {"measurement": name, "shapes": shape, "weights": weights, "batch": batch}
            planned = _planned(model.config, weights, name, batch, tokens)
            yield with_speed({**base, "planned_bytes": planned, **row})
            if row["status"] != "ok":
                break


def _planned(config, weights: str, verb: str, batch: int, tokens) -> float:
    """What `sao plan` predicts for the peak of a batch, bytes."""
    from sao_utils.plan.memory import generation_memory, judging_memory
    from sao_utils.recipe import Model

    prompt, reply, judged = tokens
    kept = weights.split(",")[0]
    model = Model(
        path="tiny",
        dtype="float32" if kept == "float32" else "bfloat16",
        quantisation="nf4" if kept == "nf4" else "none",
        batch_tokens=batch * (judged if verb == "judge" else prompt + reply),
    )
    if verb == "judge":
        parts = judging_memory(config, model, judged)
    else:
        parts = generation_memory(config, model, prompt, reply)
    return GIB * sum(parts.values())
