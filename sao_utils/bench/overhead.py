"""What the kit costs over one raw call of its engine, on the embedded tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sao_utils.bench.measuring import interleaved

STAGE = "stage write_responses"
#: What vLLM's build for CPUs needs: one thread, nothing compiled, the engine inside of its process.
CPU_BUILD = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def overhead(personas: int, repeats: int, kind: str = "transformers") -> list[dict]:
    """The stage that answers prompts beside a raw call with the same rows, on the tiny model.

    The stage makes ids and seeds, keeps each batch on disk (fsync) and writes the manifest. Beside
    transformers the raw call is that of the kit's own engine; beside vLLM it is `vllm.LLM.chat` in a
    process of its own, with the same arguments and seeds. Both have made the same rows once before: what
    a prefix cache holds is there for both.

    Args:
        kind: the engine, "transformers" or "vllm".

    Returns:
        A row each. Of the stage: ratio, its throughput over the raw call's in wall time (which tells of
        other programs, too), and without vLLM's processes cpu_ratio, the same in CPU time.

    Raises:
        EngineError: there is no vLLM.
    """
    import torch

    from sao_utils.engines.base import Sampling
    from sao_utils.engines.registry import load_engine, unload_engines
    from sao_utils.methods import sao
    from sao_utils.recipes import load_recipe
    from sao_utils.stages.responses import write_responses
    from sao_utils.store import Run, seed_of

    if kind == "vllm" and not torch.cuda.is_available():
        os.environ.update(CPU_BUILD)
    with tempfile.TemporaryDirectory() as folder:
        # vLLM is there twice; both must fit on a GPU.
        changes = {"prompts.count": personas, "model.engine": kind, "model.gpu_memory": 0.4}
        run = Run(load_recipe("tiny", changes), Path(folder))
        prompts, model = sao.rows(run, "prompts"), run.recipe.model
        made = write_responses(run, prompts, model)  # warms everything up
        chats = [[{"role": "user", "content": row["prompt"]}] for row in made]
        seeds = [seed_of(row["id"]) for row in made]
        settings = run.recipe.responses
        sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
        engine = load_engine(model)

        def stage() -> list[str]:
            run.rows("responses").unlink()
            return [row["text"] for row in write_responses(run, prompts, model)]

        peer = raw_vllm if kind == "vllm" else raw_call
        with peer(engine, chats, sampling, seeds) as (name, raw):
            works = {STAGE: stage, name: raw}

            def prepare(contender: str) -> Callable[[], dict]:
                def once() -> dict:
                    if works[contender]() != [row["text"] for row in made]:
                        raise RuntimeError("the two do not give the same replies")
                    return {}

                return once

            found = interleaved(works, prepare, "cpu", repeats)
        unload_engines()
    base = {"measurement": "overhead", "shapes": "tiny", "engine": kind}
    base |= {"rows": len(made), "tokens": sum(row["tokens"] for row in made)}
    ours, other = found.values()
    if kind == "vllm":  # what its processes take is not counted
        for key in ("cpu_seconds", "peak_bytes"):
            ours.pop(key, None)
            other.pop(key, None)
    for ratio, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        if clock in ours and clock in other:
            ours[ratio] = other[clock] / ours[clock]
    return [with_speed({**base, "contender": name, **one}) for name, one in found.items()]


@contextmanager
def raw_call(engine, chats, sampling, seeds) -> Iterator[tuple[str, Callable]]:
    """One call of the kit's own engine: its name, and a function that returns the replies' texts."""

    def call() -> list[str]:
        found = dict(pair for batch in engine.generate(chats, sampling, seeds) for pair in batch)
        return [found[i].text for i in range(len(chats))]

    yield "one raw call", call


@contextmanager
def raw_vllm(engine, chats, sampling, seeds) -> Iterator[tuple[str, Callable]]:
    """`vllm.LLM.chat` on these rows: its name, and a function that returns the replies' texts.

    Args:
        engine: a VllmEngine; its process stays as it is beside the one that this starts.
    """
    from sao_utils.engines.vllm import vllm_environment, vllm_python

    command = [vllm_python(), "-P", str(Path(__file__).with_name("vllm_raw.py"))]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen(command, **pipes, env=vllm_environment()) as process:

        def ask(message: object) -> None:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

        def chat() -> list[str]:
            ask("chat")
            return [text.strip() for text in json.loads(process.stdout.readline())]

        arguments = {**engine.child.ready["arguments"], "skip_tokenizer_init": False}
        parameters = engine.sampling_params(sampling)
        ask({"arguments": arguments, "sampling": parameters, "seeds": seeds, "chats": chats})
        version = json.loads(process.stdout.readline())
        chat()
        yield f"vllm.LLM.chat, vLLM {version}", chat


def with_speed(row: dict) -> dict:
    """A row with tokens and rows a second, where it was measured."""
    if row.get("seconds"):
        row["rows_per_second"] = row["rows"] / row["seconds"]
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    return row
