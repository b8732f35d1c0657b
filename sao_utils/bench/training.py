"""Benchmarks of the training step: `python -m sao_utils.bench training`, also notebook 10.

The contenders (`contenders`: this trainer, trl's as shipped and with its fused head, Liger's loss) run
interleaved. Times depend on the machine, so what counts are ratios; counts of tokens and rows have
no noise at all.

On a CPU the models are narrow with a true vocabulary, lengths and token budget are a quarter, and
tokens/s are those of a second of CPU time; on a GPU all is true.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from sao_utils.bench.contenders import (
    CPO,
    FUSED,
    LONGEST,
    PACKED,
    SHARED,
    STAND_IN,
    losses,
    steps,
)
from sao_utils.bench.measuring import (
    GIB,
    failure,
    interleaved,
    measure,
)
from sao_utils.bench.models import SHAPES, random_pairs, random_policy
from sao_utils.bench.results import best, keep, table
from sao_utils.store import results_folder

PROMPT, BUDGET = 60, 4096  # tokens: of a prompt, of a packed microbatch
ON_CPU = ("small-llama", "small-qwen2", "small-gemma2")
ON_GPU = ("qwen2.5-1.5b", "llama-3-8b", "gemma-2-9b")


# ---------------------------------------------------------------------------- lengths and counts


def lengths(n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer of n pairs: the same for the same seed.

    Answers are lognormal, mean 375, standard deviation 0.7 of it, at most 2,048 with the prompt. The
    two answers to one prompt are alike in length (correlation 0.8 of the logarithms), which is
    the kinder assumption for trainers that pad.
    """
    import numpy as np

    spread = math.sqrt(math.log(1 + 0.7**2))
    share = np.array([[math.sqrt(0.8), math.sqrt(0.2), 0], [math.sqrt(0.8), 0, math.sqrt(0.2)]])
    normal = np.random.default_rng(seed).standard_normal((n, 3)) @ share.T
    tokens = np.exp(math.log(375) - spread**2 / 2 + spread * normal)
    clipped = np.clip(tokens.round(), 1, LONGEST - PROMPT).astype(int)
    return [(PROMPT, int(chosen), int(rejected)) for chosen, rejected in clipped]


def real_tokens(sizes: list[tuple[int, int, int]]) -> int:
    """Tokens of both sequences of all pairs. Sharing a prompt saves work, not real tokens."""
    return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in sizes)


def padded_counts(sizes: list[tuple[int, int, int]], batch: int) -> dict:
    """What a trainer feeds that pads each microbatch, and computes logits at every position."""
    batches = [sizes[i : i + batch] for i in range(0, len(sizes), batch)]
    fed = sum(2 * len(b) * max(p + max(c, r) for p, c, r in b) for b in batches)
    answers = sum(c + r for _, c, r in sizes)
    ratios = {"padded_ratio": fed / real_tokens(sizes), "head_ratio": fed / answers}
    return {**ratios, "microbatches": len(batches)}


def counts(sizes: list[tuple[int, int, int]], budget: int) -> list[dict]:
    """The noise-free rows: tokens fed, head rows and microbatches of one step of these pairs."""
    base = {"measurement": "counts", "tokens": real_tokens(sizes), "status": "ok"}
    found = [
        {**base, "contender": CPO, "batch": batch, **padded_counts(sizes, batch)}
        for batch in (1, 2, 4, 8)
    ]
    for contender, prompts in ((PACKED, 2), (SHARED, 1)):
        ours = {**base, "contender": contender, "batch": len(sizes)}
        try:
            from sao_utils.training.packing import plan

            bins = plan([prompts * p + c + r for p, c, r in sizes], budget)
            if sorted(i for one in bins for i in one) != list(range(len(sizes))):
                raise RuntimeError("the plan does not hold each pair once")
            ours["microbatches"] = len(bins)
        except Exception as error:
            ours["status"] = failure(error)
        found.append(ours)
    return found


# ---------------------------------------------------------------------------- measurements


def loss_stage(
    shape: str, device: str, tokens: int, repeats: int, which: Iterable[str] | None = None
) -> list[dict]:
    """Peak memory, time and loss of the stage from hidden states to their gradient, frozen head.

    Args:
        tokens: hidden rows of one pair: two sequences of tokens / 2, each with a prompt of 60. The
            softcap of Gemma-2 is left out here: Liger has none.
        which: contenders; by default all.
    """
    import torch

    vocabulary, width = SHAPES[shape][1][:2]
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weight = torch.empty(vocabulary, width, **options).normal_(std=width**-0.5)
    hidden = torch.empty(2, tokens // 2, width, **options).normal_().requires_grad_()
    labels = torch.randint(vocabulary, (2, tokens // 2), device=device)
    labels[:, : min(PROMPT, tokens // 4)] = -100

    def work(loss_of):
        def once():
            hidden.grad = None
            loss = loss_of(hidden, weight, labels)
            loss.backward()
            return {"loss": loss.item()}

        return once

    loss_of = losses()
    which = list(which or loss_of)
    for name in which if repeats > 1 else ():  # the first call of anything is slow
        small = (hidden[:, :64].detach().requires_grad_(), weight, labels[:, :64].clamp(min=0))
        measure(lambda: {"loss": loss_of[name](*small).backward()}, device)  # noqa: B023
    found = interleaved({name: work(loss_of[name]) for name in which}, device, repeats)
    base = {"measurement": "loss stage", "shapes": shape, "vocabulary": vocabulary}
    base |= {"weights": str(options["dtype"]).split(".")[-1], "batch": 1, "tokens": tokens}
    return with_ratios([{**base, "contender": name, **one} for name, one in found.items()], device)


def whole_step(
    name: str, policy, sizes, device: str, repeats: int, budget: int, batches=(1, 2, 4, 8)
) -> list[dict]:
    """Forward and backward pass of one step of pairs, all contenders and batch sizes in turn.

    Args:
        name: what the measurement is called.
        sizes: tokens of (prompt, chosen, rejected) of the step's pairs.
        budget: tokens of a packed microbatch.
    """
    vocabulary = policy.config.vocab_size
    pairs = random_pairs(sizes, vocabulary)
    batches = [batch for batch in batches if batch <= len(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        makers = steps(policy, pairs, batches, budget, device, Path(folder))
        found, ready = {}, {}
        for key, make in makers.items():
            try:
                with warnings.catch_warnings():  # of renamed arguments
                    warnings.simplefilter("ignore", FutureWarning)
                    ready[key] = _clean(policy, make())
            except Exception as error:
                found[key] = {"status": failure(error)}
        for step in ready.values() if repeats > 1 and len(pairs) == 1 else ():
            measure(step, device)  # the first call of anything is slow
        found |= interleaved(ready, device, repeats, whole=True)
        policy.zero_grad(set_to_none=True)
    base = {"measurement": name, "vocabulary": vocabulary, "tokens": real_tokens(sizes)}
    rows = []
    for (contender, batch), one in ((key, found[key]) for key in makers):
        counted = {} if contender in (PACKED, SHARED) else padded_counts(sizes, batch)
        if contender == FUSED:
            counted.pop("head_ratio")  # on a CPU it scores every position, on a GPU the answers'
        rows.append({**base, "contender": contender, "batch": batch, **counted, **one})
    return with_ratios(rows, device)


def _clean(policy, step):
    """The same step without gradients of another contender."""

    def once():
        policy.zero_grad(set_to_none=True)
        return step()

    return once


def with_ratios(rows: list[dict], device: str) -> list[dict]:
    """Set tokens/s, and the ratios to CPOTrainer at its fastest batch size (else its stand-in).

    On a CPU seconds are those of CPU time: wall time there tells of other programs, too.
    """
    clock = "cpu_seconds" if device == "cpu" else "seconds"
    for row in rows:
        if row.get(clock):
            row["tokens_per_second"] = row["tokens"] / row[clock]
    to = best(rows, CPO) or best(rows, STAND_IN)
    for row in rows if to else ():
        if row["status"] != "ok":
            continue
        row["speed_ratio"] = row["tokens_per_second"] / to["tokens_per_second"]
        if row["peak_bytes"] and to["peak_bytes"]:
            row["peak_ratio"] = row["peak_bytes"] / to["peak_bytes"]
        if row.get("loss") is not None:
            row["loss_difference"] = abs(row["loss"] - to["loss"]) / max(abs(to["loss"]), 1e-12)
    return rows


# ---------------------------------------------------------------------------- runs


def on_cpu(repeats: int, quick: bool) -> Iterator[list[dict]]:
    """The measurements on a CPU, a group of rows at a time."""
    yield counts(lengths(128), BUDGET)
    if quick:
        yield loss_stage("quick-gemma2", "cpu", 2048, 1, (PACKED, CPO))
        for tokens in (512, 4096):
            yield loss_stage("quick-gemma2", "cpu", tokens, 1, (PACKED,))
        yield from of_shape("quick-llama", "cpu", [None], 1, 4, (1, 2), one_pair=False)
        return
    for shape in ON_CPU:
        yield loss_stage(shape, "cpu", 2048, repeats)
    for tokens in (512, 1024, 4096):
        yield loss_stage(ON_CPU[-1], "cpu", tokens, repeats, (PACKED,))
    for shape in ON_CPU:
        yield from of_shape(shape, "cpu", [None], repeats, 8, batches=(1, 2, 4))


def of_shape(
    shape: str,
    device: str,
    caps: list,
    repeats: int,
    pairs: int,
    batches=(1, 2, 4, 8),
    one_pair: bool = True,
) -> Iterator[list[dict]]:
    """One pair of the longest sequences, and one step of pairs, under each cap of memory.

    Args:
        caps: GiB of GPU memory that may be used, None for all; a step is measured under the last ones.
        pairs: of the step.
    """
    shrink = 1 if device == "cuda" else 4
    base = {"shapes": shape, "vocabulary": SHAPES[shape][1][0]}
    gc.collect()  # the model before this one
    try:
        policy, weights = random_policy(shape, device)
    except Exception as error:
        yield [{"measurement": "one pair", **base, "contender": "all", "status": failure(error)}]
        return
    longest = [tuple(n // shrink for n in (PROMPT, LONGEST - PROMPT, LONGEST - PROMPT))]
    step = [tuple(max(1, n // shrink) for n in size) for size in lengths(pairs)]
    jobs = [("one pair", longest, cap, (1,)) for cap in caps if one_pair]
    jobs += [("step", step, cap, batches) for cap in caps if cap or caps == [None]]
    for name, sizes, cap, tried in jobs:
        try:
            _cap(cap, device)
            rows = whole_step(name, policy, sizes, device, repeats, BUDGET // shrink, tried)
        except Exception as error:
            rows = [{"measurement": name, "contender": "all", "status": failure(error)}]
        yield [{**base, **row, "weights": weights, "cap_gib": cap} for row in rows]
    _cap(None, device)


def _cap(gib: float | None, device: str) -> None:
    """Let this process use only so much GPU memory. On a CPU (a trial) nothing is limited."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole) if gib else 1.0)


def on_gpu(shapes, caps: list, repeats: int, pairs: int, device: str) -> Iterator[list[dict]]:
    """The measurements on a GPU, a group of rows at a time."""
    yield counts(lengths(128), BUDGET)
    for shape in shapes:
        try:
            yield loss_stage(shape, device, 2048, repeats)
        except Exception as error:
            base = {"measurement": "loss stage", "shapes": shape, "contender": "all"}
            yield [{**base, "status": failure(error)}]
        yield from of_shape(shape, device, [None, *caps], repeats, pairs)


def not_measured() -> list[dict]:
    """The rows that only a GPU can show, where none has shown them."""
    return [
        {"measurement": name, "shapes": shape, "vocabulary": SHAPES[shape][1][0], "cap_gib": cap}
        | {"contender": contender, "status": "not measured: no GPU"}
        for shape in ON_GPU
        for name, cap in (("loss stage", None), ("one pair", None), ("one pair", 23), ("step", 23))
        for contender in (PACKED, SHARED, CPO, FUSED)
        if (name, contender) != ("loss stage", SHARED)
    ]


# ---------------------------------------------------------------------------- bars


# ---------------------------------------------------------------------------- results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    ask = argparse.ArgumentParser(prog="python -m sao_utils.bench training", description=__doc__)
    ask.add_argument("--quick", action="store_true", help="the CPU ratios in under a minute")
    ask.add_argument("--json", action="store_true", help="print the results as JSON")
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ask.add_argument("--cap-gib", type=float, nargs="*", default=[23.0], help="of a GPU's memory")
    ask.add_argument("--shapes", nargs="*", choices=SHAPES, help="of the models, on a GPU")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--pairs", type=int, default=16, help="of the step, on a GPU")
    ask.add_argument("--folder", type=Path, help="of the results")
    options = ask.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    folder = options.folder or results_folder() / "benchmarks"
    rows: list[dict] = []
    name = f"{options.device}-quick" if options.quick else options.device
    with contextlib.redirect_stdout(sys.stderr):  # the JSON shall stand alone
        import torch

        more = options.shapes or ON_GPU, options.cap_gib, options.repeats, options.pairs
        if options.device == "cpu" and not options.shapes:
            groups = on_cpu(options.repeats, options.quick)
        elif options.device == "cuda" and not torch.cuda.is_available():
            if (folder / "cuda.svg").exists():
                sys.exit(
                    f"There is no GPU here; {folder.name}/cuda.csv of another machine is kept."
                )
            groups = [counts(lengths(128), BUDGET) + not_measured()]
        else:
            groups = on_gpu(*more, options.device)
            name = f"{name}-{'-'.join(options.shapes)}" if options.shapes else name
        for group in groups:
            rows += group
            found = keep(folder, name, rows)  # at once: a kill leaves what there is
    print(json.dumps({**found, "rows": rows}) if options.json else table(rows, found))
