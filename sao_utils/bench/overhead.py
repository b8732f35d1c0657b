"""What the kit costs over one raw call of its engine, on the embedded tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sao_utils.bench.measuring import interleaved

STAGE, RAW = "stage write_responses", "one raw engine call"
RAW_CHAT = "one raw call, chats to texts"
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
    transformers the raw call is that of the kit's own engine. Beside vLLM it is `vllm.LLM.generate` in
    a process of its own, with the same arguments and seeds. That one gets and gives token ids, so
    there the stage also makes the ids of the chats and the texts of the replies; a third contender,
    `vllm.LLM.chat`, does so, too. All have made the same rows once before: what a prefix cache holds is
    there for all.

    Args:
        kind: the engine, "transformers" or "vllm".

    Returns:
        A row each; cpu_seconds hold those of vLLM's processes. Of the stage: ratio, its throughput
        over the raw call's in wall time (which tells of other programs, too), and cpu_ratio, the same
        in CPU time; the third contender has those of the stage over itself. Beside transformers
        also engine_share, the share of the stage's wall time inside of the engine's call,
        which no other program moves much (vLLM goes on while the stage writes).

    Raises:
        EngineError: there is no vLLM.
    """
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.registry import load_engine, unload_engines
    from sao_utils.methods import sao
    from sao_utils.stages.responses import write_responses
    from sao_utils.store import open_run, seed_of

    vllm = kind == "vllm"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(_environment({"SAO_RESULTS": place} | (_for_vllm() if vllm else {})))
        # vLLM is there twice; both must fit on a GPU.
        changes = {"prompts.count": personas, "model.engine": kind, "model.gpu_memory": 0.4}
        run = open_run("tiny", "overhead", changes)
        prompts, model = sao.rows(run, "prompts"), run.recipe.model
        made = write_responses(run, prompts, model)  # warms everything up
        chats = [[{"role": "user", "content": row["prompt"]}] for row in made]
        seeds = [seed_of(row["id"]) for row in made]
        settings = run.recipe.responses
        sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
        engine = load_engine(model)
        texts, call, shares = [row["text"] for row in made], engine.generate, []

        def stage() -> tuple[list[str], dict]:
            run.rows("responses").unlink()
            inside, started, before = [0.0], time.perf_counter(), _cpu_seconds(child)
            engine.generate = lambda *told: clocked(call(*told), inside)
            try:
                done = write_responses(run, prompts, model)
            finally:
                engine.generate = call
            shares.append(inside[0] / (time.perf_counter() - started))
            told = {"cpu_seconds": _cpu_seconds(child) - before}
            return [row["text"] for row in done], told | ({"peak_bytes": None} if vllm else {})

        def own_call() -> tuple[list[str], dict]:
            found = dict(pair for batch in call(chats, sampling, seeds) for pair in batch)
            return [found[i].text for i in range(len(chats))], {}

        def checked(work: Callable) -> Callable:
            def once() -> dict:
                found, told = work()
                if found != texts:
                    raise RuntimeError("the two do not say the same")
                return told

            return once

        if vllm:
            stack.callback(unload_engines)
            child, device = engine.child.process.pid, "cpu"
            others = stack.enter_context(_raw_vllm(engine, chats, sampling, seeds))
        else:
            child, device, others = None, engine.device, {RAW: own_call}
        works = {STAGE: stage, **others}
        found = interleaved({name: checked(w) for name, w in works.items()}, device, repeats)
    base = {"measurement": "overhead", "shapes": "tiny", "weights": "float32"}
    base |= {"rows": len(made), "tokens": sum(row["tokens"] for row in made)}
    rows = [with_speed({**base, "contender": name, **one}) for name, one in found.items()]
    ours = rows[0]
    for row, other in zip((ours, *rows[2:]), rows[1:]):
        if ours["status"] == other["status"] == "ok":
            row["ratio"] = other["seconds"] / ours["seconds"]
            row["cpu_ratio"] = other["cpu_seconds"] / ours["cpu_seconds"]
    if shares and not vllm:
        ours["engine_share"] = statistics.median(shares)
    return rows


def _for_vllm() -> dict[str, str]:
    import torch

    return {} if torch.cuda.is_available() else CPU_BUILD


def _cpu_seconds(child: int | None) -> float:
    """CPU time of this process so far, and of a child with all that it started."""
    return time.process_time() + (_cpu_seconds_of(child) if child else 0.0)


def _cpu_seconds_of(process: int) -> float:
    import psutil  # comes with ipykernel

    leader = psutil.Process(process)
    times = [one.cpu_times() for one in (leader, *leader.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


@contextlib.contextmanager
def _raw_vllm(engine, chats, sampling, seeds) -> Iterator[dict[str, Callable]]:
    """`vllm.LLM` on these rows: contender -> a function that returns texts, and what they took.

    Args:
        engine: a VllmEngine; its process stays as it is beside the one that this starts.
    """
    from sao_utils.engines.base import encode
    from sao_utils.engines.vllm import vllm_environment, vllm_python

    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [vllm_python(), "-P", str(Path(__file__).with_name("vllm_raw.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=vllm_environment(),
            start_new_session=True,  # a group to end as a whole
            encoding="utf-8",
        )

        def ask(*messages: object):
            for message in messages:
                process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            if answer := process.stdout.readline():
                return json.loads(answer)
            log.seek(0)
            raise RuntimeError(f"vllm.LLM ended. The end of its log:\n{log.read()[-2000:]}")

        def timed(verb: str) -> dict:
            before = _cpu_seconds_of(process.pid)
            seconds = ask(verb)
            spent = _cpu_seconds_of(process.pid) - before
            told = {"seconds": seconds, "cpu_seconds": spent, "peak_bytes": None}
            return told | {"note": f"vLLM {version}"}

        def generate() -> tuple[list[str], dict]:
            told = timed("generate")
            return [engine.completion(*reply).text for reply in ask("replies")], told

        def chat() -> tuple[list[str], dict]:
            told = timed("chat")
            return [text.strip() for text in ask("replies")], told

        try:
            arguments = {**engine.child.ready["arguments"], "skip_tokenizer_init": False}
            version = ask(arguments)["version"]
            work = {
                "sampling": engine.sampling_params(sampling),
                "seeds": list(seeds),
                "chats": chats,
            }
            ask({**work, "prompts": encode(chats, engine.tokenizer)}, "chat")
            ask("generate")
            yield {RAW: generate, RAW_CHAT: chat}
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def clocked(batches: Iterator, inside: list[float]) -> Iterator:
    """Pass batches on, and add the seconds that they took to make to inside[0]."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        inside[0] += time.perf_counter() - started
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def with_speed(row: dict) -> dict:
    """A row with tokens and rows a second, where it was measured."""
    if row.get("seconds"):
        row["rows_per_second"] = row["rows"] / row["seconds"]
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
    return row
