"""Benchmarks of the training step: `python -m sao_utils.bench training`, also notebook 10.

The contenders (`contenders`) run interleaved. Times depend on the machine, so what matters is ratios;
counts of tokens and rows have no noise at all.

On a CPU the models are narrow but with a real vocabulary, lengths and token budget are a quarter of the
real ones, and tokens/s are per second of CPU time; on a GPU everything has its real size.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sao_utils.bench.contenders import CPO, FUSED, LONGEST, LOSSES, PACKED, SHARED, ours, stock
from sao_utils.bench.measuring import attempt, interleaved
from sao_utils.bench.models import SHAPES, random_pairs, random_policy
from sao_utils.training.shapes import GIB

PROMPT, BUDGET = 60, 4096  # tokens: of a prompt, of a packed microbatch
ON_CPU = ("small-llama", "small-qwen2", "small-gemma2")
ON_GPU = ("qwen2.5-1.5b", "llama-3-8b", "gemma-2-9b")


# ---------------------------------------------------------------------------- lengths and counts


def lengths(n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer of n pairs: the same for the same seed.

    Answer lengths are lognormal with mean 375 and a standard deviation of 0.7 of that; prompt and answer
    have at most 2,048. The two answers to one prompt have similar lengths (their logarithms correlate at
    0.8), which is the kinder assumption for trainers that pad.
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
    """Counts for a trainer that pads each microbatch and computes logits at every position."""
    batches = [sizes[i : i + batch] for i in range(0, len(sizes), batch)]
    fed = sum(2 * len(b) * max(p + max(c, r) for p, c, r in b) for b in batches)
    answers = sum(c + r for _, c, r in sizes)
    ratios = {"padded_ratio": fed / real_tokens(sizes), "head_ratio": fed / answers}
    return {**ratios, "microbatches": len(batches)}


def counts(sizes: list[tuple[int, int, int]], budget: int) -> list[dict]:
    """The noise-free rows: tokens fed, head rows and microbatches of one step of these pairs."""
    from sao_utils.training.packing import plan

    base = {"measurement": "counts", "tokens": real_tokens(sizes), "status": "ok"}
    found = [
        {**base, "contender": CPO, "batch": batch, **padded_counts(sizes, batch)}
        for batch in (1, 2, 4, 8)
    ]
    for contender, prompts in ((PACKED, 2), (SHARED, 1)):
        microbatches = len(plan([prompts * p + c + r for p, c, r in sizes], budget))
        ours = {"contender": contender, "batch": len(sizes), "microbatches": microbatches}
        found.append(base | ours)
    return found


# ---------------------------------------------------------------------------- measurements


def loss_stage(
    shape: str, device: str, tokens: int, repeats: int, which: Iterable[str] = tuple(LOSSES)
) -> list[dict]:
    """Peak memory, time and loss of the stage from hidden states to their gradient, with a frozen head.

    Gemma-2's softcap is left out here, since Liger has none.

    Args:
        tokens: hidden rows of one pair: two sequences of tokens / 2, each with a prompt of 60.
        which: contenders.
    """
    import torch

    vocabulary, width = SHAPES[shape][1][:2]
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weight = torch.empty(vocabulary, width, **options).normal_(std=width**-0.5)
    hidden = torch.empty(2, tokens // 2, width, **options).normal_().requires_grad_()
    labels = torch.randint(vocabulary, (2, tokens // 2), device=device)
    labels[:, : min(PROMPT, tokens // 4)] = -100

    def prepare(name: str):
        def once() -> dict:
            hidden.grad = None
            loss = LOSSES[name](hidden, weight, labels)
            loss.backward()
            return {"loss": loss.item()}

        return once

    found = interleaved(which, prepare, device, repeats)
    base = {"measurement": "loss stage", "shapes": shape, "vocabulary": vocabulary}
    base |= {"weights": str(options["dtype"]).split(".")[-1], "batch": 1, "tokens": tokens}
    return with_ratios([{**base, "contender": name, **one} for name, one in found.items()], device)


def whole_step(
    policy, sizes, device: str, repeats: int, budget: int, batches: Sequence[int]
) -> list[dict]:
    """Forward and backward pass of one step on pairs, for all contenders and batch sizes in turn.

    Args:
        sizes: tokens of (prompt, chosen, rejected) of the step's pairs.
        budget: tokens of a packed microbatch.
        batches: pairs per microbatch, for contenders that pad.
    """
    vocabulary = policy.config.vocab_size
    pairs = random_pairs(sizes, vocabulary)
    keys = [(PACKED, len(pairs)), (SHARED, len(pairs))]
    keys += [(name, batch) for batch in batches for name in (CPO, FUSED)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about renamed arguments

        def prepare(key: tuple[str, int]):
            contender, batch = key
            if contender in (PACKED, SHARED):
                return ours(policy, pairs, contender == SHARED, budget, device, Path(folder))
            return stock(policy, pairs, contender == FUSED, batch, device, Path(folder))

        found = interleaved(keys, prepare, device, repeats, whole=True)
    policy.zero_grad(set_to_none=True)
    rows = []
    for (contender, batch), one in found.items():
        counted = {} if contender in (PACKED, SHARED) else padded_counts(sizes, batch)
        if contender == FUSED:
            counted.pop("head_ratio")  # on a CPU it scores every position, on a GPU the answers'
        base = {"vocabulary": vocabulary, "tokens": real_tokens(sizes)}
        rows.append({**base, "contender": contender, "batch": batch, **counted, **one})
    return with_ratios(rows, device)


def with_ratios(rows: list[dict], device: str) -> list[dict]:
    """Add tokens/s, and the ratios to CPOTrainer at its fastest batch size.

    On a CPU, seconds are of CPU time, since wall time there also reflects other programs.
    """
    clock = "cpu_seconds" if device == "cpu" else "seconds"
    ran = [row for row in rows if row["status"] == "ok"]
    for row in ran:
        row["tokens_per_second"] = row["tokens"] / row[clock]
    stock = max(
        (row for row in ran if row["contender"] == CPO),
        key=lambda row: row["tokens_per_second"],
        default=None,
    )
    for row in ran if stock else ():
        row["speed_ratio"] = row["tokens_per_second"] / stock["tokens_per_second"]
        if row["peak_bytes"] and stock["peak_bytes"]:
            row["peak_ratio"] = row["peak_bytes"] / stock["peak_bytes"]
        row["loss_difference"] = abs(row["loss"] / stock["loss"] - 1)
    return rows


# ---------------------------------------------------------------------------- runs


def quick() -> Iterator[dict]:
    """Rows with the ratios, on a CPU in under a minute."""
    yield from counts(lengths(128), BUDGET)
    yield from loss_stage("quick-gemma2", "cpu", 2048, 1, (PACKED, CPO))
    for tokens in (512, 4096):
        yield from loss_stage("quick-gemma2", "cpu", tokens, 1, (PACKED,))
    yield from whole_steps("quick-llama", "cpu", (), 1, 4, (1, 2))


def measurements(shapes, device: str, caps: Sequence[float], repeats: int) -> Iterator[dict]:
    """Rows of all measurements; one that fails as a whole yields a row that says why.

    Args:
        shapes: of the models, keys of SHAPES.
        caps: GiB of GPU memory that may be used, to imitate smaller GPUs.
    """
    yield from counts(lengths(128), BUDGET)
    for shape in shapes:
        base = {"measurement": "loss stage", "shapes": shape, "contender": "all"}
        yield from attempt(base, loss_stage, shape, device, 2048, repeats)
    for tokens in (512, 1024, 4096):
        yield from loss_stage(shapes[-1], device, tokens, repeats, (PACKED,))
    for shape in shapes:
        base = {"measurement": "step", "shapes": shape, "contender": "all"}
        pairs, batches = (16, (1, 2, 4, 8)) if device == "cuda" else (8, (1, 2, 4))
        yield from attempt(base, whole_steps, shape, device, caps, repeats, pairs, batches)


def whole_steps(
    shape: str,
    device: str,
    caps: Sequence[float],
    repeats: int,
    pairs: int,
    batches: Sequence[int],
) -> Iterator[dict]:
    """One pair of the longest sequences, and one step on pairs, under each memory cap.

    Args:
        caps: GiB of GPU memory that may be used. One pair is also measured without a cap.
        pairs: number of pairs in the step. batches: pairs per microbatch, for contenders that pad.
    """
    shrink = 1 if device == "cuda" else 4
    policy, weights = random_policy(shape, device)
    one_pair = [(PROMPT, LONGEST - PROMPT, LONGEST - PROMPT)]
    jobs = [("one pair", one_pair, cap, (1,)) for cap in (None, *caps)]
    jobs += [("step", lengths(pairs), cap, batches) for cap in caps or [None]]
    for name, sizes, cap, tried in jobs:
        sizes = [tuple(max(1, n // shrink) for n in size) for size in sizes]
        _cap(cap, device)
        base = {"measurement": name, "shapes": shape, "weights": weights, "cap_gib": cap}
        for row in whole_step(policy, sizes, device, repeats, BUDGET // shrink, tried):
            yield base | row
    _cap(None, device)


def _cap(gib: float | None, device: str) -> None:
    """Let this process use at most `gib` of GPU memory; None lifts the cap."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole) if gib else 1.0)
