"""Benchmarks of generation and judging: `python -m sao_utils.bench.engines`.

On a CPU: what the kit costs over one raw call of its engine on the embedded tiny model, interleaved
(`--engine vllm`: of vLLM, in the Python that $SAO_VLLM_PYTHON names).
On a GPU (`--device cuda`): replies and verdicts a second and peak memory, with random weights in
the true shapes of models; only shapes matter for time and memory. Everywhere: how much batches by
tokens pad, as counts, which have no noise. Written to results/benchmarks/engines-<device>.csv, with
machine and versions in the .json beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sao_utils.bench import training as benchmarks
from sao_utils.bench.contenders import LONGEST, SHAPES, random_base
from sao_utils.bench.measuring import GIB, about, as_csv, bar, failure, interleaved, measure
from sao_utils.store import results_folder, write_whole

COLUMNS = (
    "measurement shapes weights contender batch rows tokens seconds cpu_seconds tokens_per_second "
    "rows_per_second ratio cpu_ratio engine_share peak_bytes planned_bytes padded_ratio batches "
    "largest_batch repeats status note"
).split()
PROMPT, REPLY, JUDGED = 60, 375, 930  # tokens, as facts assumed of real models
BATCHES = (8, 32, 128)
ON_GPU = ("qwen2.5-1.5b", "gemma-2-9b")
STAGE, RAW = "stage write_responses", "one raw engine call"
RAW_CHAT = "one raw call, chats to texts"
BAR = 0.98  # of a raw call's throughput, at 2,000 rows
#: What vLLM's build for CPUs needs: one thread, nothing compiled, the engine inside of its process.
CPU_BUILD = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


# ---------------------------------------------------------------------------- the kit's overhead


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
    from sao_utils.stages.responses import write_responses
    from sao_utils.store import open_run, seed_of

    vllm = kind == "vllm"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(_environment({"SAO_RESULTS": place} | (_for_vllm() if vllm else {})))
        # vLLM is there twice; both must fit on a GPU.
        model = {"model.engine": kind, "model.gpu_memory": 0.4}
        run = open_run("tiny", "overhead", {"personas.count": personas, **model})
        made = write_responses(run)  # writes the prompts, too, and warms everything up
        chats = [[{"role": "user", "content": row["prompt"]}] for row in made]
        seeds = [seed_of(row["id"]) for row in made]
        settings = run.recipe.responses
        sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
        engine = load_engine(run.recipe.model)
        texts, call, shares = [row["text"] for row in made], engine.generate, []

        def stage() -> tuple[list[str], dict]:
            run.rows("responses").unlink()
            inside, started, before = [0.0], time.perf_counter(), _cpu_seconds(child)
            engine.generate = lambda *told: clocked(call(*told), inside)
            try:
                done = write_responses(run)
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
    from sao_utils.plan import costs
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
        parts = costs.judging_memory(config, model, judged)
    else:
        parts = costs.generation_memory(config, model, prompt, reply)
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
    ask = argparse.ArgumentParser(prog="python -m sao_utils.bench.engines", description=__doc__)
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


if __name__ == "__main__":
    main()
