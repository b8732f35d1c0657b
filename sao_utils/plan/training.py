"""Memory of training a recipe's model, by the formula that the trainer itself uses."""

from __future__ import annotations

from sao_utils.plan.hardware import CONTEXT, GIB, Gpu, model_shape
from sao_utils.plan.memory import dtype_of
from sao_utils.recipe import Model, Training
from sao_utils.stages.responses import PER_PROMPT
from sao_utils.training.memory import Choice, choose, training_memory_bytes


def training_gib(
    model: Model, settings: Training, longest: int, gpu: Gpu | None, processes: int = 1
) -> tuple[dict[str, float], Choice]:
    """GiB by part that training needs at most on each GPU, or on this machine's CPU.

    Without the CUDA context, and without what Python and its libraries take.

    Args:
        longest: tokens of the longest prompt with its answer; a pair has two.
        gpu: None: a CPU, with the memory that is available now.
        processes: GPUs that train together.

    Returns:
        The parts, and how a step is cut into forward passes by what is free.
    """
    shape, device = model_shape(model), "cpu" if gpu is None else "cuda"
    dtype = "float32" if gpu is None else dtype_of(model)
    options = {"longest": longest, "dtype": dtype, "device": device}
    fixed = training_memory_bytes(shape, settings, 1, False, **options, processes=processes)
    held = fixed["weights"] + fixed["trained"]
    free = (available_gib() if gpu is None else gpu.memory - CONTEXT) * GIB - held
    pair = PER_PROMPT * longest
    choice = choose(shape, settings, pair, max(0.0, free), dtype, device)
    tokens = max(choice.budget, pair)
    parts = training_memory_bytes(
        shape, settings, tokens, choice.twice, **options, processes=processes
    )
    return {name: size / GIB for name, size in parts.items()}, choice


def available_gib() -> float:
    """The memory of this machine that is available now."""
    import psutil

    return psutil.virtual_memory().available / GIB
