"""Memory of training: what it needs by part, and the token budget that fits into what is free.

Arithmetic on a model's shape, shared by the trainer and by `sao plan`; needs neither torch nor
weights. Compared with runs on a CPU (tests/training/test_memory.py); a GPU has not been measured.
"""

from __future__ import annotations

from typing import NamedTuple

from sao_utils.recipe import Training
from sao_utils.training.shapes import GIB, Shape

#: float32 logits that are held at a time, in bytes, on a CPU and on a GPU (whose big matrix products
#: need more rows to be efficient). The backward pass holds about twice as much.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28}
#: Share of the free memory that one step may fill.
FILLED = 0.7
#: Token budgets that "auto" chooses from, the best first: more tokens make larger matrix products, but
#: no longer faster ones on a CPU.
BUDGETS = {"cuda": (16_384, 8192, 4096, 2048, 1024, 512), "cpu": (4096, 2048, 1024, 512)}
#: Below this a smaller budget costs speed: rather are activations computed twice.
FAST = {"cuda": 2048, "cpu": 512}


class Choice(NamedTuple):
    """How a step is cut into forward passes.

    budget: tokens of a forward pass; a pair that is longer goes alone.
    twice: whether activations are computed twice (gradient checkpointing).
    reason: why, in words.
    """

    budget: int
    twice: bool
    reason: str


def step_bytes(
    shape: Shape,
    settings: Training,
    tokens: int,
    twice: bool,
    longest: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cuda",
) -> dict[str, float]:
    """Bytes that the largest forward and backward pass of a step needs beside weights and states.

    "activations" are what is kept between the two; "working" is the larger of a layer's backward pass
    and the chunked loss.

    Args:
        tokens: of that pass. longest: of the longest sequence, by default half of it.
        twice: with gradient checkpointing only the input of each layer is kept.
        dtype: what is computed in, "float32" or 16 bit.
    """
    full, size = settings.method == "full", 4 if dtype == "float32" else 2
    each = shape.kept_bytes(full, dtype)
    kept, layer = each * shape.layers * tokens, 0.0
    if twice:
        kept, layer = (4 if full else size) * shape.width * shape.layers * tokens, each * tokens
    layer += size * tokens * (3 * shape.inner + 2 * shape.width)  # gradients inside of a layer
    if settings.quantisation == "nf4" or full:  # one matrix unpacked, or in 16 bit
        layer += size * shape.width * shape.inner
    if shape.softcap:  # scores are computed again, with their gradients
        layer += 8 * size * shape.heads * (longest or tokens // 2) ** 2
    loss = CHUNK_BYTES[device] * (3.5 if shape.softcap else 2.5) + size * tokens * shape.width
    if full:  # the head's gradient is summed in float32, and the head stands there in 16 bit
        loss += (4 if size == 4 else 6) * shape.vocabulary * shape.width
    return {"activations": kept, "working": max(layer, loss)}


def training_memory_bytes(
    shape: Shape,
    settings: Training,
    tokens: int,
    twice: bool,
    dtype: str = "bfloat16",
    processes: int = 1,
    **options,
) -> dict[str, float]:
    """Bytes by part that training needs at most on each device; without what libraries take.

    "weights": frozen ones, as they are stored. "trained": each weight is float32 with its gradient,
    Adam's two moments (8 bytes, in 8 bit 2) and, to compute in 16 bit, a copy; several processes share
    it with method=full (FSDP). "activations" and "working": `step_bytes`, with its arguments.

    Raises:
        ValueError: an architecture that is not known.
    """
    full = settings.method == "full"
    adam = 2 if settings.optimiser == "paged_adamw_8bit" else 8
    each = 4 + 4 + adam + (0 if dtype == "float32" else 2)
    trained = shape.parameters / processes if full else shape.adapter(settings.lora_rank)
    weights = 0.0 if full else shape.weight_bytes(dtype, settings.quantisation)
    step = step_bytes(shape, settings, tokens, twice, dtype=dtype, **options)
    return {"weights": weights, "trained": each * trained, **step}


def choose(
    shape: Shape,
    settings: Training,
    longest: int,
    free: float,
    dtype: str = "bfloat16",
    device: str = "cuda",
) -> Choice:
    """The token budget and whether activations are computed twice, by the free memory.

    What the recipe sets stays as it is. "auto" takes the largest budget that fits: first of those that
    cost no speed, then with activations computed twice.

    Args:
        longest: tokens of the costliest pair: the budget is never below it.
        free: bytes for activations, with the model, gradients and optimiser in place.
    """
    auto = settings.token_budget == "auto"
    budgets = BUDGETS[device] if auto else (settings.token_budget,)
    fast = [budget for budget in budgets if budget >= FAST[device]] or budgets
    once, twice = [(budget, False) for budget in fast], [(budget, True) for budget in budgets]
    plans = {"auto": once + twice, "on": twice, "off": [(budget, False) for budget in budgets]}
    for budget, again in plans[settings.gradient_checkpointing]:
        # A pair is two sequences.
        parts = step_bytes(
            shape, settings, max(budget, longest), again, longest // 2, dtype, device
        )
        need = sum(parts.values())
        if need <= FILLED * free:
            break
    reason = f"a forward pass needs about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
    return Choice(max(budget, longest) if auto else budget, again, reason)
