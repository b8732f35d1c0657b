"""Benchmarks of generation and judging: `python -m sao_utils.bench engines`.

On a CPU: what the kit costs over one raw call of its engine on the embedded tiny model, interleaved
(`--engine vllm`: of vLLM, in the Python that $SAO_VLLM_PYTHON names).
On a GPU (`--device cuda`): replies and verdicts a second and peak memory, with random weights in
the true shapes of models; only shapes matter for time and memory. Everywhere: how much batches by
tokens pad, as counts, which have no noise. Written to results/benchmarks/engines-<device>.csv, with
machine and versions in the .json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sao_utils.bench import training as benchmarks
from sao_utils.bench.contenders import LONGEST
from sao_utils.bench.measuring import GIB, about, as_csv, bar, failure, measure
from sao_utils.bench.models import SHAPES, random_base
from sao_utils.bench.overhead import RAW_CHAT, STAGE, overhead, with_speed
from sao_utils.disk import write_whole
from sao_utils.store import results_folder

COLUMNS = (
    "measurement shapes weights contender batch rows tokens seconds cpu_seconds tokens_per_second "
    "rows_per_second ratio cpu_ratio engine_share peak_bytes planned_bytes padded_ratio batches "
    "largest_batch repeats status note"
).split()
PROMPT, REPLY, JUDGED = 60, 375, 930  # tokens, as facts assumed of real models
BATCHES = (8, 32, 128)
ON_GPU = ("qwen2.5-1.5b", "gemma-2-9b")
BAR = 0.98  # of a raw call's throughput, at 2,000 rows


# ---------------------------------------------------------------------------- the kit's overhead


# ---------------------------------------------------------------------------- batches, as counts


def batching(rows: int = 2000, budget: int = 32_768, fixed: int = 32) -> list[dict]:
    """Padded over real tokens and number of batches, for prompts of lognormal lengths.

    Lengths as in `benchmarks.lengths`. The largest batch, in tokens, is what memory must hold.
    """
    from sao_utils.engines.loading import load_model, load_tokenizer
    from sao_utils.engines.transformers import TransformersEngine
    from sao_utils.recipe import Model

    longest = LONGEST - 1  # what the tiny context takes
    sizes = [min(longest, prompt + chosen) for prompt, chosen, _ in benchmarks.lengths(rows)]
    tiny = Model(path="tiny", dtype="float32")
    engine = TransformersEngine.of(load_model(tiny), load_tokenizer(tiny), budget)
    prompts = [[0] * n for n in sizes]
    ours = list(engine.in_batches(prompts, lambda rows, _: rows, None))
    ordered = sorted(range(rows), key=lambda i: -sizes[i])
    planned = {f"{budget:,} tokens, longest first": ours}
    for name, order in (("as they come", range(rows)), ("longest first", ordered)):
        batches = [list(order[i : i + fixed]) for i in range(0, rows, fixed)]
        planned[f"{fixed} rows, {name}"] = batches
    found = []
    for contender, batches in planned.items():
        fed = [len(batch) * max(sizes[i] for i in batch) for batch in batches]
        row = {"measurement": "counts", "contender": contender, "rows": rows, "tokens": sum(sizes)}
        row |= {"padded_ratio": sum(fed) / sum(sizes), "batches": len(batches)}
        found.append({**row, "largest_batch": max(fed), "status": "ok"})
    return found


# ---------------------------------------------------------------------------- shapes of real models


def of_shape(
    shape: str, nf4: bool, batches: tuple[int, ...], device: str, tokens=(PROMPT, REPLY, JUDGED)
) -> Iterator[list[dict]]:
    """Generation and judging with random weights of a shape, a row a batch size.

    Args:
        tokens: of a prompt, a reply (random weights never end one) and a judge's prompt.

    Yields:
        Rows whose peak_bytes holds everything on the device, weights included.
    """
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.loading import load_tokenizer
    from sao_utils.engines.transformers import TransformersEngine
    from sao_utils.recipe import Model

    base = {"shapes": shape, "weights": "nf4" if nf4 else "16 bit"}
    try:
        model, base["weights"] = random_base(shape, device, nf4)
        model.config.use_cache = True
        engine = TransformersEngine.of(model, load_tokenizer(Model(path="tiny")), 1)
        engine.stops = []
    except Exception as error:
        yield [{**base, "measurement": "generate", "status": failure(error)}]
        return
    prompt, reply, judged = tokens

    def chats(rows: int, wanted: int):
        """Prompts of about so many tokens, and the exact number of them."""
        from sao_utils.engines.base import encode

        one = [{"role": "user", "content": "the " * max(1, wanted - 2)}]
        return [one] * rows, len(encode([one], engine.tokenizer)[0])

    def generate(rows: int, new: int = reply) -> dict:
        asked, length = chats(rows, prompt)
        engine.batch_tokens = rows * (length + new)
        replies = [r for b in engine.generate(asked, Sampling(0.6, new), range(rows)) for r in b]
        return {"rows": rows, "tokens": sum(one.tokens for _, one in replies), "batch": rows}

    def judge(rows: int) -> dict:
        asked, length = chats(rows, judged)
        engine.batch_tokens = rows * (length + 2)
        scored = [s for b in engine.choose(asked, "ranking:", (" 1 > 2", " 2 > 1")) for s in b]
        return {"rows": len(scored), "tokens": rows * length, "batch": rows}

    for name, work in (("generate", generate), ("judge", judge)):
        measure(lambda: generate(1, 2), device)  # the first call of anything is slow
        for batch in batches:
            held = engine.batch_tokens
            row = measure(lambda: work(batch), device, whole=True)  # noqa: B023
            row = {"batch": batch, **row}
            if engine.batch_tokens < held and row["status"] == "ok":
                row["note"] = "out of memory; halved"
            planned = _planned(model.config, base["weights"], name, batch, tokens)
            yield [with_speed({**base, "measurement": name, "planned_bytes": planned, **row})]
            if row["status"] != "ok" or row.get("note"):
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


def not_measured(shapes) -> list[dict]:
    """The rows that only a GPU can show, where none has shown them."""
    return [
        {"measurement": verb, "shapes": shape, "weights": weights, "batch": batch}
        | {"status": "not measured: no GPU"}
        for shape in shapes
        for weights in ("bfloat16", "nf4")
        for verb in ("generate", "judge")
        for batch in BATCHES
    ]


def on_gpu(shapes, device: str, quick: bool) -> Iterator[list[dict]]:
    """All shapes with 16-bit and with NF4 weights."""
    batches, tokens = ((2, 4), (12, 4, 20)) if quick else (BATCHES, (PROMPT, REPLY, JUDGED))
    for shape in shapes:
        for nf4 in (False, True):
            yield from of_shape(shape, nf4, batches, device, tokens)
            if device == "cuda":
                import gc

                import torch

                gc.collect()
                torch.cuda.empty_cache()


# ---------------------------------------------------------------------------- results


def keep(folder: Path, name: str, rows: list[dict]) -> dict:
    """Write name.csv and name.json; returns what the JSON holds."""
    found = about(rows, "cuda" if "cuda" in name else "cpu")
    found["bars"] = [
        bar(promise.format(raw), row[key], BAR, most=False)
        for contender, raw in ((STAGE, "a raw call"), (RAW_CHAT, "a raw call, chats to texts"))
        for row in rows
        if row.get("contender") == contender
        for key, promise in (
            ("ratio", "throughput of the stage over {}, wall time"),
            ("cpu_ratio", "throughput of the stage over {}, CPU time"),
            ("engine_share", "share of the stage's time inside of the engine's call"),
        )
        if row.get(key) is not None
    ]
    write_whole(folder / f"{name}.csv", as_csv(rows, COLUMNS))
    write_whole(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    return found


def table(rows: list[dict]) -> str:
    """The rows for a reader, a line each."""
    lines = []
    for row in rows:
        where = " ".join(str(row[k]) for k in ("measurement", "shapes", "weights") if row.get(k))
        who = row.get("contender") or f"batch {row.get('batch')}"
        facts = [
            f"{label} {row[key]:.4g}"
            for key, label in (
                ("rows_per_second", "rows/s"),
                ("tokens_per_second", "tokens/s"),
                ("ratio", "ratio"),
                ("cpu_ratio", "of CPU time"),
                ("engine_share", "inside of the engine"),
                ("padded_ratio", "padded/real"),
                ("batches", "batches"),
                ("largest_batch", "largest"),
            )
            if row.get(key) is not None
        ]
        if row.get("peak_bytes") and row["measurement"] in ("generate", "judge"):
            planned = row["planned_bytes"] / GIB
            facts.append(f"peak {row['peak_bytes'] / GIB:.2f} GiB, planned {planned:.2f}")
        said = ", ".join(facts) if row["status"] == "ok" else row["status"]
        lines.append(f"{where:44} {who:28} {said} {row.get('note', '')}".rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    ask = argparse.ArgumentParser(prog="python -m sao_utils.bench engines", description=__doc__)
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ask.add_argument("--quick", action="store_true", help="a trial of the program in seconds")
    ask.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="of the overhead"
    )
    ask.add_argument("--shapes", nargs="*", choices=SHAPES, help="of the models")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--folder", type=Path, help="of the results")
    options = ask.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    folder = options.folder or results_folder() / "benchmarks"
    import torch

    from sao_utils.engines.base import EngineError

    gpu, vllm = torch.cuda.is_available(), options.engine == "vllm"
    device = options.device if not vllm else "cuda" if gpu else "cpu"  # vLLM takes what there is
    name = f"engines-{device}" + ("-vllm" if vllm else "") + ("-quick" if options.quick else "")
    there = folder / f"{name}.json"
    if device == "cuda" and not gpu and there.exists():
        if json.loads(there.read_text("utf-8"))["status"] == "measured":
            sys.exit(f"There is no GPU here; {name}.csv of another machine is kept.")

    def groups() -> Iterator[list[dict]]:
        if device == "cuda" and not gpu:
            yield not_measured(options.shapes or ON_GPU)
        elif not vllm and (options.shapes or device == "cuda"):
            yield from on_gpu(options.shapes or ON_GPU, device, options.quick)
        else:
            yield overhead(*((40, 1) if options.quick else (1500, options.repeats)), options.engine)

    rows = [] if vllm else batching()
    try:
        for group in groups():
            rows += group
            keep(folder, name, rows)  # at once: a kill leaves what there is
    except EngineError as error:
        sys.exit(str(error))
    print(table(rows))
