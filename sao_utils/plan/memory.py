"""Memory that a model takes: generating, judging, lm-eval's tasks, training. Sizes are GiB.

Arithmetic on the shape of the model; needs no weights, and torch only to ask what a CPU has. The peaks of
the transformers engine are checked on a CPU. Training has the formula of its trainer (`training.memory`).
"""

from __future__ import annotations

import math

from sao_utils.engines.loading import cpu_has_bfloat16
from sao_utils.plan.hardware import Gpu, architecture, model_shape
from sao_utils.plan.workload import Work
from sao_utils.recipe import Model, Training
from sao_utils.stages.responses import PER_PROMPT
from sao_utils.training.memory import Choice, choose, training_memory_bytes
from sao_utils.training.shapes import GIB, WEIGHT_BYTES, Shape, shape_of

#: GiB that the CUDA context and its libraries take before the first tensor; assumed.
CONTEXT = 0.6
#: vLLM's defaults: sequences at a time, and tokens of one forward pass.
VLLM_ROWS, VLLM_TOKENS = 256, 8192


def dtype_of(model: Model) -> str:
    """What a model computes in, as far as its cost depends on it: float32, or any 16 bit."""
    return "float32" if model.dtype == "float32" else "bfloat16"


def _on_cpu(model: Model) -> str:
    """What a model is trained in without a GPU, and with dtype=auto asked in (`engines.loading`)."""
    return "bfloat16" if model.dtype == "auto" and cpu_has_bfloat16() else "float32"


def _pass_bytes(
    shape: Shape, model: Model, tokens: float, rows: float = 0, each: float = 0
) -> float:
    """Bytes that a forward pass without gradients needs at a time, for `rows` sequences of `each`
    tokens: inside of the gated layer, or of the attention.

    With a softcap the attention's scores stand in memory as a whole (and as their softmax in
    float32), and the layer holds on to the softmax while its gated part runs.
    """
    size, squares = WEIGHT_BYTES[dtype_of(model)], rows * each * each
    held = 3 * shape.width + 2 * shape.head  # embeddings, residual, normed; the rotation's two
    gated = size * tokens * (held + shape.width + 3 * shape.inner)  # the layer's input, too
    attention = size * tokens * (held + 4 * shape.heads * shape.head)
    masks = squares
    if shape.softcap:  # two kinds of masks, in numbers
        masks = 2 * size * squares
        gated += size * shape.heads * squares
        # In 16 bit, in float32 and in 16 bit again; a model in float32 has two of these.
        attention += 8 * shape.heads * squares
    unpacked = size * shape.width * shape.inner if model.quantisation == "nf4" else 0
    return max(gated, attention) + masks + unpacked


def generation_memory(
    config,
    model: Model,
    prompt_tokens: float,
    new_tokens: float,
    total: float | None = None,
) -> dict[str, float]:
    """GiB by part that generating needs at most; without the CUDA context.

    Args:
        config: a config.json as a dict, or transformers' config.
        prompt_tokens, new_tokens: of the longest row.
        total: memory of the GPU; vLLM takes its share (`model.gpu_memory`) of it in any case, and
            wants room for one row of the whole context.
    """
    shape = shape_of(config)
    each = shape.kv_bytes(dtype_of(model))
    if model.engine == "vllm":
        working = _pass_bytes(shape, model, VLLM_TOKENS) + VLLM_ROWS * shape.vocabulary * 8
        parts = _in_gib(shape, model, working=working)
        if total:  # the rest of its share, whatever is needed
            context = model.max_context or shape.context or VLLM_TOKENS
            left = model.gpu_memory * total - sum(parts.values())
            parts["cache"] = max(left, context * each / GIB)
        return parts
    rows = static_rows(model, prompt_tokens + new_tokens)
    cache = rows * (prompt_tokens + new_tokens) * each
    # A drawn token: logits in 16 bit and float32, probabilities, sorted, and summed in float64.
    draw = rows * shape.vocabulary * 44
    # One layer's keys and values, repeated for the heads that share them.
    repeated = cache / shape.layers * (shape.heads // shape.kv_heads)
    # When prompts are read, the part of the cache for replies is not there yet.
    reading = _pass_bytes(shape, model, rows * prompt_tokens, rows, prompt_tokens)
    reading -= rows * new_tokens * each
    return _in_gib(shape, model, cache=cache, working=max(reading, draw, repeated))


def judging_memory(
    config, model: Model, tokens: float, total: float | None = None
) -> dict[str, float]:
    """GiB by part that choosing a verdict needs at most: one pass over prompts of so many tokens, no
    cache. A verdict that is sampled is written: `generation_memory`."""
    if model.engine == "vllm":
        return generation_memory(config, model, tokens, 0, total)
    shape, rows = shape_of(config), static_rows(model, tokens)
    working = _pass_bytes(shape, model, rows * tokens, rows, tokens)
    return _in_gib(shape, model, working=working + rows * shape.vocabulary * 10)


def task_memory(config, model: Model, tokens: float) -> dict[str, float]:
    """GiB by part that lm-eval needs at least: one row of so many tokens, the logits of all of them
    and their logarithms. It tries larger batches first, up to what fits."""
    shape, dtype = shape_of(config), dtype_of(model)
    logits = 2 * WEIGHT_BYTES[dtype] * tokens * (shape.vocabulary + shape.width)
    working = max(_pass_bytes(shape, model, tokens, 1, tokens), logits)
    # It asks for a cache, and does not use it.
    return _in_gib(shape, model, cache=tokens * shape.kv_bytes(dtype), working=working)


def _in_gib(shape: Shape, model: Model, **parts: float) -> dict[str, float]:
    """Bytes by part as GiB, with the weights."""
    weights = shape.weight_bytes(dtype_of(model), model.quantisation)
    return {name: size / GIB for name, size in {"weights": weights, **parts}.items()}


def static_rows(model: Model, tokens: float) -> int:
    """Rows of a batch of the transformers engine, if each has so many tokens."""
    return max(1, int(model.batch_tokens // tokens))


def training_memory(
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
    dtype = _on_cpu(model) if gpu is None else dtype_of(model)
    options = {"longest": longest, "dtype": dtype, "device": device, "processes": processes}
    fixed = training_memory_bytes(shape, settings, 1, False, **options)
    free = room_gib(gpu) * GIB - fixed["weights"] - fixed["trained"]
    pair = PER_PROMPT * longest
    choice = choose(shape, settings, pair, max(0.0, free), dtype, device)
    budget = max(choice.budget, pair)
    parts = training_memory_bytes(shape, settings, budget, choice.twice, **options)
    return {name: size / GIB for name, size in parts.items()}, choice


def work_memory(work: Work, gpu: Gpu | None) -> dict[str, float]:
    """GiB by part that a model takes for requests, the larger of usual and of long prompts."""
    model, config, total = work.model, architecture(work.model), gpu and gpu.memory
    if gpu is None and model.dtype == "auto":
        model = model.model_copy(update={"dtype": _on_cpu(model)})
    context = min(model_shape(model).context or math.inf, model.max_context or math.inf)
    new, found = min(work.lengths.most_written, context), []
    for prompt in (work.lengths.read, min(work.lengths.most_read, context)):
        if work.stage == "tasks":
            found.append(task_memory(config, model, prompt))
        elif new:
            found.append(generation_memory(config, model, prompt, new, total))
        else:
            found.append(judging_memory(config, model, prompt, total))
    return max(found, key=lambda parts: sum(parts.values()))


def room_gib(gpu: Gpu | None) -> float:
    """Memory for tensors: of a GPU, or what is available now on this machine."""
    if gpu is not None:
        return gpu.memory - CONTEXT
    import psutil

    return psutil.virtual_memory().available / GIB
