"""All measurements that need a GPU, in at most twelve minutes: `python -m sao_utils.bench gpu`.

Each part runs in its own process with its own time limit, and its rows are kept as they come. A part that
dies or exceeds its limit yields a row that says so, and the others go on. No network is needed, and
besides torch, transformers, accelerate and pandas only pydantic, trl (with datasets), peft and
bitsandbytes.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from sao_utils.bench import engines, training
from sao_utils.bench.measuring import attempt, measure
from sao_utils.bench.models import random_base
from sao_utils.training.shapes import GIB


def measurements(device: str, small: bool) -> Iterator[dict]:
    """The rows of all parts.

    Args:
        small: use shapes that take seconds, even on a CPU, to try out the program.
    """
    for name, (part, seconds) in PARTS.items():
        yield from in_process(name, part, seconds, device, small)


def in_process(name: str, part: Callable, seconds: float, *arguments) -> Iterator[dict]:
    """The rows that `part(*arguments)` yields in a process of its own, within a time limit in seconds.

    If it fails, dies or is not done by then, the last row says so.
    """
    context, until = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(there, name, part, *arguments))
    process.start()
    there.close()  # so that the rows end when the process does
    try:
        while here.poll(max(0.0, until - time.monotonic())):
            yield here.recv()
        yield {"measurement": name, "status": f"failed: not done within {seconds:g} s"}
    except EOFError:
        process.join(10)
        if process.exitcode:
            yield {"measurement": name, "status": f"failed: exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send_rows(to, name: str, part: Callable, *arguments) -> None:
    for row in attempt({"measurement": name}, part, *arguments):
        to.send(row)


# ---------------------------------------------------------------------------- the parts

TRAINING = "training self-0"  # `sao plan`'s name of the stage; here its rows are steps


def loop(device: str, small: bool) -> Iterator[dict]:
    """A round of SAO on real text in bfloat16: speed of its stages, and peak memory beside `sao plan`'s."""
    from sao_utils.engines.base import Sampling, encode
    from sao_utils.engines.registry import load_engine
    from sao_utils.methods import sao
    from sao_utils.plan.hardware import gpus
    from sao_utils.plan.planning import plan
    from sao_utils.recipes import load_recipe
    from sao_utils.store import Run, read_rows
    from sao_utils.templates import ranking_prompt

    changes = {"training.probe_steps": 0, "training.batch_size": 8}
    large = {"model.dtype": "bfloat16", "model.batch_tokens": 65_536, "prompts.count": 320}
    # Not "auto": if a step does not fill the budget, its peak says nothing about the estimate.
    changes |= {"prompts.count": 40} if small else {**large, "training.token_budget": 2048}
    recipe = load_recipe("tiny" if small else "laptop", changes)
    card = None
    if device == "cuda":
        import torch

        total = torch.cuda.get_device_properties(0).total_memory / GIB
        card = replace(gpus()["H200"], memory=total)  # the memory estimates use nothing else of it
    estimates = {
        stage.work.stage: sum(stage.memory.values()) * GIB for stage in plan(recipe, card).stages
    }
    engine = load_engine(recipe.model)
    list(engine.generate([[{"role": "user", "content": "Hi"}]], Sampling(0.0, 4), [0]))  # warms up
    tokenizer = engine.tokenizer
    del engine  # so that training can free it
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Path(folder))
        run.rows("prompts").parent.mkdir()

        def make(stage: str) -> dict:
            if stage == TRAINING:  # the first step is slow
                return {"made": read_rows(sao.train(run, "self", 0) / "log.jsonl")[1:]}
            return {"made": sao.rows(run, stage)}

        for stage in ("prompts", "responses", "verdicts", TRAINING):
            row = measure(partial(make, stage), device, whole=True)
            made = row.pop("made", [])
            if stage == TRAINING:  # timed by its own log, which excludes loading
                row["seconds"] = sum(step["seconds"] for step in made)
                count, tokens = len(made), sum(step["real_tokens"] for step in made)
            elif stage == "verdicts":  # tokens read, in both orders
                texts = [ranking_prompt(one["prompt"], *one["responses"]) for one in made]
                chats = [[{"role": "user", "content": text}] for text in texts]
                count, tokens = 2 * len(made), 2 * sum(map(len, encode(chats, tokenizer)))
            else:
                count, tokens = len(made), sum(one["tokens"] for one in made)
            base = {"measurement": "loop", "contender": stage, "shapes": recipe.model.path}
            base |= {"weights": recipe.model.dtype, "planned_bytes": estimates[stage]}
            yield engines.with_speed({**base, "rows": count, "tokens": tokens, **row})


def nf4(device: str, small: bool) -> Iterator[dict]:
    """QLoRA's loss and gradients on this device compared with a CPU's: same NF4 weights, float32."""
    for shape in ("trial-gemma2",) if small else ("small-llama", "small-gemma2"):
        with tempfile.TemporaryDirectory() as folder:
            random_base(shape, "cpu", nf4=False)[0].save_pretrained(folder)
            (expected, true), (loss, found) = (_gradients(folder, on) for on in ("cpu", device))
        apart = [(a - b).norm() / b.norm() for a, b in zip(found, true)]
        base = {"measurement": "nf4 gradients", "shapes": shape, "contender": device}
        base |= {"weights": "nf4, float32", "status": "ok", "loss": loss}
        differences = {
            "loss_difference": abs(loss / expected - 1),
            "gradient_difference": max(map(float, apart)),
        }
        yield base | differences


def _gradients(folder: str, device: str) -> tuple[float, list]:
    """SimPO's loss on a pair of random tokens, and its gradient for each weight of a random adapter."""
    import torch

    from sao_utils.bench.contenders import LOSSES, PACKED
    from sao_utils.engines.loading import load_model
    from sao_utils.recipe import Model, Training
    from sao_utils.training.setup import add_adapter

    model = load_model(Model(path=folder, dtype="float32", quantisation="nf4"), device)
    settings = Training(learning_rate=1e-5, sft_learning_rate=1e-5, batch_size=1)
    policy = add_adapter(model, settings)
    draw = torch.Generator().manual_seed(0)  # on the CPU: other devices draw other numbers
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    tokens = torch.randint(3, model.config.vocab_size, (2, 128), generator=draw).to(device)
    hidden = model.model(tokens).last_hidden_state
    labels = tokens.clone()
    labels[:, :32] = -100
    loss = LOSSES[PACKED](hidden, model.get_output_embeddings().weight, labels)
    loss.backward()
    return loss.item(), [weight.grad.cpu() for weight in trained]


def train(device: str, small: bool) -> Iterator[dict]:
    """The loss stage and the whole step beside trl's CPOTrainer, with Gemma-2-9B's shape in 23 GiB."""
    shape, caps = ("trial-gemma2", ()) if small else ("gemma-2-9b", (23.0,))
    tokens, repeats, pairs, batches = (64, 1, 4, (2,)) if small else (2048, 3, 16, (1, 4))
    yield from training.counts(training.lengths(128), training.BUDGET)
    base = {"measurement": "loss stage", "shapes": shape, "contender": "all"}
    yield from attempt(base, training.loss_stage, shape, device, tokens, repeats)
    base["measurement"] = "step"
    work = training.whole_steps
    yield from attempt(base, work, shape, device, caps, repeats, pairs, batches)


def write(device: str, small: bool) -> Iterator[dict]:
    """The transformers engine's tokens per second, for models of real shapes with random weights."""
    real = (("smollm2-135m", False), ("qwen2.5-1.5b", False), ("gemma-2-9b", False))
    for shape, four_bit in (("trial-gemma2", True),) if small else (*real, ("gemma-2-9b", True)):
        batches, tokens = ((2,), (12, 4, 20)) if small else ((32, 128), (60, 128, 930))
        base = {"measurement": "generate", "shapes": shape}
        arguments = (shape, four_bit, device, batches, tokens)
        yield from attempt(base, engines.by_batch, *arguments)


#: name -> the function that measures it, and its time limit in seconds
PARTS = {"loop": (loop, 170), "nf4": (nf4, 90), "training": (train, 300), "engines": (write, 160)}
