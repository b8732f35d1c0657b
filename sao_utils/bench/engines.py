"""Benchmarks of generation and judging: `python -m sao_utils.bench engines`.

Measures the kit's overhead over one raw call of its engine, on the embedded tiny model, interleaved. On a
GPU also replies and verdicts per second and peak memory by batch size, for models of real shapes with
random weights, since only shapes matter for time and memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from sao_utils.bench.measuring import attempt, interleaved, measure
from sao_utils.bench.models import random_base
from sao_utils.training.shapes import GIB

STAGE, RAW = "stage write_responses", "one raw call"
PROMPT, REPLY, JUDGED = 60, 375, 930  # tokens, as assumed of real models
BATCHES = (8, 32, 128)
ON_GPU = ("qwen2.5-1.5b", "gemma-2-9b")


def measurements(shapes, device: str, repeats: int) -> Iterator[dict]:
    """Rows for the overhead, and for models of these shapes with 16-bit and with NF4 weights."""
    yield from attempt({"measurement": "overhead"}, overhead, 1500, repeats)
    for shape in shapes:
        for nf4 in (False, True):
            base = {"measurement": "generate", "shapes": shape}
            yield from attempt(base, by_batch, shape, nf4, device)


def overhead(personas: int, repeats: int) -> list[dict]:
    """Compare the stage that answers prompts with a raw call of its engine on the same rows.

    The stage also makes ids and seeds, writes each batch to disk (fsync) and writes the manifest.

    Returns:
        One row for each. The stage's row has "ratio", its throughput over the raw call's in wall time
        (which also reflects other programs), and "cpu_ratio", the same in CPU time.
    """
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.registry import load_engine, unload_engines
    from sao_utils.methods import sao
    from sao_utils.recipes import load_recipe
    from sao_utils.stages.responses import write_responses
    from sao_utils.store import Run, seed_of

    with tempfile.TemporaryDirectory() as folder:
        run = Run(load_recipe("tiny", {"prompts.count": personas}), Path(folder))
        prompts, model = sao.rows(run, "prompts"), run.recipe.model
        made = write_responses(run, prompts, model)  # warms everything up
        chats = [[{"role": "user", "content": row["prompt"]}] for row in made]
        seeds = [seed_of(row["id"]) for row in made]
        settings = run.recipe.responses
        sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
        engine = load_engine(model)

        def stage() -> dict:
            run.rows("responses").unlink()
            return checked(row["text"] for row in write_responses(run, prompts, model))

        def raw_call() -> dict:
            replies = dict(r for batch in engine.generate(chats, sampling, seeds) for r in batch)
            return checked(replies[i].text for i in range(len(chats)))

        def checked(texts: Iterable[str]) -> dict:
            if list(texts) != [row["text"] for row in made]:
                raise RuntimeError("the two do not give the same replies")
            return {}

        contenders = {STAGE: stage, RAW: raw_call}
        found = interleaved(contenders, contenders.get, "cpu", repeats)
        unload_engines()
    ours, raw = found.values()
    for ratio, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        if clock in ours and clock in raw:
            ours[ratio] = raw[clock] / ours[clock]
    base = {"measurement": "overhead", "shapes": "tiny"}
    base |= {"rows": len(made), "tokens": sum(row["tokens"] for row in made)}
    return [with_speed({**base, "contender": name, **one}) for name, one in found.items()]


def by_batch(
    shape: str, nf4: bool, device: str, batches=BATCHES, tokens=(PROMPT, REPLY, JUDGED)
) -> Iterator[dict]:
    """Generation and judging by a model of this shape with random weights, one row per batch size.

    Args:
        tokens: of a prompt, a reply (always of full length here) and a judge's prompt.

    Yields:
        Rows with peak_bytes, for everything on the device, weights included, and planned_bytes, what
        `sao plan` predicts for it.
    """
    from sao_utils.engines.base import Sampling, encode
    from sao_utils.engines.loading import load_tokenizer
    from sao_utils.engines.transformers import TransformersEngine
    from sao_utils.plan.memory import generation_memory, judging_memory
    from sao_utils.recipe import Model

    network, weights = random_base(shape, device, nf4)
    network.config.use_cache = True
    engine = TransformersEngine(network, load_tokenizer(Model(path="tiny")), 1)
    engine.stops = []
    prompt, reply, judged = tokens
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = Model(path="tiny", dtype=dtype, quantisation="nf4" if nf4 else "none")

    def chat(wanted: int):
        """A prompt of about the wanted number of tokens, and its exact number."""
        one = [{"role": "user", "content": "the " * max(1, wanted - 2)}]
        return one, len(encode([one], engine.tokenizer)[0])

    def generate(rows: int, new: int = reply) -> dict:
        one, length = chat(prompt)
        engine.batch_tokens = rows * (length + new)
        made = engine.generate([one] * rows, Sampling(0.6, new), range(rows))
        return {"rows": rows, "tokens": sum(r.tokens for batch in made for _, r in batch)}

    def judge(rows: int) -> dict:
        one, length = chat(judged)
        engine.batch_tokens = rows * (length + 2)
        scored = list(engine.choose([one] * rows, "ranking:", (" 1 > 2", " 2 > 1")))
        return {"rows": sum(map(len, scored)), "tokens": rows * length}

    generate(1, 2)  # warms up: the first call is slow
    jobs = (
        ("generate", generate, generation_memory, (prompt, reply)),
        ("judge", judge, judging_memory, (judged,)),
    )
    for name, work, memory, sizes in jobs:
        for batch in batches:
            row = measure(partial(work, batch), device, whole=True)
            batched = model.model_copy(update={"batch_tokens": batch * sum(sizes)})
            planned = GIB * sum(memory(network.config, batched, *sizes).values())
            base = {"measurement": name, "shapes": shape, "weights": weights, "batch": batch}
            yield with_speed({**base, "planned_bytes": planned, **row})
            if row["status"] != "ok":
                break


def with_speed(row: dict) -> dict:
    """The row, with tokens and rows per second if its time was measured."""
    if row.get("seconds"):
        row["rows_per_second"] = row["rows"] / row["seconds"]
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    return row
