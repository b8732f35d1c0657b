"""Memory of training: how much each part needs, and the token budget that fits into free memory.

Arithmetic on a model's shape, shared by the trainer and by `sao plan`; needs neither torch nor
weights. Compared with runs on a CPU (tests/training/test_memory.py); a GPU has not been measured.
"""

from __future__ import annotations

from typing import NamedTuple

from sao_utils.recipe import Training
from sao_utils.training.shapes import GIB, Shape

#: Bytes of float32 logits held at a time, on a CPU and on a GPU (whose large matrix products need more
#: rows to be efficient). The backward pass holds about twice as much.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28}
#: Share of the free memory that one step may fill.
FILLED = 0.7
#: Token budgets that "auto" chooses from, best first: more tokens make larger matrix products, but
#: beyond a point no faster ones on a CPU.
BUDGETS = {"cuda": (16_384, 8192, 4096, 2048, 1024, 512), "cpu": (4096, 2048, 1024, 512)}
#: A budget below this costs speed; computing activations twice is then preferred.
FAST = {"cuda": 2048, "cpu": 512}


class Choice(NamedTuple):
    """How a step is cut into forward passes.

    budget: tokens of a forward pass; a longer pair gets a pass of its own.
    twice: whether activations are computed twice (gradient checkpointing).
    reason: a text that explains the choice.
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
    """Bytes that a step's largest forward and backward pass needs besides weights and optimiser states.

    "activations" is what is kept between the two; "working" is the larger of what a layer's backward
    pass and the chunked loss need.

    Args:
        tokens: of that pass. longest: tokens of the longest sequence, by default half of `tokens`.
        twice: gradient checkpointing: only the input of each layer is kept.
        dtype: of the computation, "float32" or a 16-bit type.
    """
    full, size = settings.method == "full", 4 if dtype == "float32" else 2
    each = shape.kept_bytes(full, dtype)
    kept, layer = each * shape.layers * tokens, 0.0
    if twice:
        kept, layer = (4 if full else size) * shape.width * shape.layers * tokens, each * tokens
    layer += size * tokens * (3 * shape.inner + 2 * shape.width)  # gradients within a layer
    if settings.quantisation == "nf4" or full:  # one matrix, unpacked or cast to 16 bit
        layer += size * shape.width * shape.inner
    if shape.softcap:  # scores are recomputed, with their gradients
        layer += 8 * size * shape.heads * (longest or tokens // 2) ** 2
    loss = CHUNK_BYTES[device] * (3.5 if shape.softcap else 2.5) + size * tokens * shape.width
    if full:  # the head's gradient, summed in float32, and a 16-bit copy of the head
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
    """Most bytes by part that training needs on each device, without what libraries take.

    "weights": the frozen weights, as stored. "trained": each trained weight is float32 and has a
    gradient, Adam's two moments (8 bytes; 2 in 8-bit Adam) and, for computing in 16 bit, a copy; with
    method=full, processes share this (FSDP). "activations" and "working": see `step_bytes`, which takes
    the further arguments.

    Raises:
        ValueError: the architecture is not known.
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
    """Choose the token budget, and whether activations are computed twice, by the free memory.

    What the recipe sets is kept. "auto" takes the largest budget that fits: first among those that
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
