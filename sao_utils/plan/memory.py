"""Memory that a model takes: generating, judging, lm-eval's tasks, training. Sizes are in GiB.

Arithmetic on the model's shape; needs no weights, and torch only to find out what a CPU supports. The
transformers engine's peaks are checked on a CPU. Training uses the trainer's formula (`training.memory`).
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
#: vLLM's defaults: sequences at a time, and tokens per forward pass.
VLLM_ROWS, VLLM_TOKENS = 256, 8192


def dtype_of(model: Model) -> str:
    """The dtype of a model's computation, as far as cost depends on it: float32 or (any) 16 bit."""
    return "float32" if model.dtype == "float32" else "bfloat16"


def _on_cpu(model: Model) -> str:
    """The dtype for training without a GPU and, with dtype=auto, for requests (`engines.loading`)."""
    return "bfloat16" if model.dtype == "auto" and cpu_has_bfloat16() else "float32"


def _pass_bytes(
    shape: Shape, model: Model, tokens: float, rows: float = 0, each: float = 0
) -> float:
    """Most bytes that a forward pass without gradients needs at any time, in the gated layer or in the
    attention.

    With a softcap, all attention scores are held in memory (and their softmax in float32), and the layer
    keeps the softmax while its gated part runs.

    Args:
        tokens: of the pass.
        rows, each: sequences, and tokens of each, for the attention's scores and masks.
    """
    size, squares = WEIGHT_BYTES[dtype_of(model)], rows * each * each
    held = 3 * shape.width + 2 * shape.head  # embeddings, residual, normed; RoPE's sine and cosine
    gated = size * tokens * (held + shape.width + 3 * shape.inner)  # with the layer's input
    attention = size * tokens * (held + 4 * shape.heads * shape.head)
    masks = squares
    if shape.softcap:  # two kinds of masks, numeric rather than boolean
        masks = 2 * size * squares
        gated += size * shape.heads * squares
        # Copies in 16 bit, in float32 and in 16 bit again; a float32 model has two copies.
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
    """Most GiB by part that generating needs, without the CUDA context.

    Args:
        config: a config.json as a dict, or transformers' config.
        prompt_tokens, new_tokens: of the longest row.
        total: GiB of the GPU; vLLM always takes its share of this (`model.gpu_memory`), and needs room
            for one row of the whole context.
    """
    shape = shape_of(config)
    each = shape.kv_bytes(dtype_of(model))
    if model.engine == "vllm":
        working = _pass_bytes(shape, model, VLLM_TOKENS) + VLLM_ROWS * shape.vocabulary * 8
        parts = _in_gib(shape, model, working=working)
        if total:  # the cache gets the rest of its share, even if it needs less
            context = model.max_context or shape.context or VLLM_TOKENS
            left = model.gpu_memory * total - sum(parts.values())
            parts["cache"] = max(left, context * each / GIB)
        return parts
    rows = static_rows(model, prompt_tokens + new_tokens)
    cache = rows * (prompt_tokens + new_tokens) * each
    # To draw a token: logits in 16 bit and float32, probabilities, sorted and cumulated in float64.
    draw = rows * shape.vocabulary * 44
    # One layer's keys and values, repeated for the heads that share them.
    repeated = cache / shape.layers * (shape.heads // shape.kv_heads)
    # While prompts are read, the part of the cache for replies does not exist yet.
    reading = _pass_bytes(shape, model, rows * prompt_tokens, rows, prompt_tokens)
    reading -= rows * new_tokens * each
    return _in_gib(shape, model, cache=cache, working=max(reading, draw, repeated))


def judging_memory(
    config, model: Model, tokens: float, total: float | None = None
) -> dict[str, float]:
    """Most GiB by part that choosing a verdict needs: one pass over prompts of `tokens` tokens, without a
    cache. For sampled verdicts, which are written, see `generation_memory`."""
    if model.engine == "vllm":
        return generation_memory(config, model, tokens, 0, total)
    shape, rows = shape_of(config), static_rows(model, tokens)
    working = _pass_bytes(shape, model, rows * tokens, rows, tokens)
    return _in_gib(shape, model, working=working + rows * shape.vocabulary * 10)


def task_memory(config, model: Model, tokens: float) -> dict[str, float]:
    """Least GiB by part that lm-eval needs: one row of `tokens` tokens, the logits at all of them and
    their log-softmax. lm-eval tries larger batches first, up to what fits."""
    shape, dtype = shape_of(config), dtype_of(model)
    logits = 2 * WEIGHT_BYTES[dtype] * tokens * (shape.vocabulary + shape.width)
    working = max(_pass_bytes(shape, model, tokens, 1, tokens), logits)
    # It requests a cache, but does not use it.
    return _in_gib(shape, model, cache=tokens * shape.kv_bytes(dtype), working=working)


def _in_gib(shape: Shape, model: Model, **parts: float) -> dict[str, float]:
    """Bytes by part converted to GiB, with the weights added."""
    weights = shape.weight_bytes(dtype_of(model), model.quantisation)
    return {name: size / GIB for name, size in {"weights": weights, **parts}.items()}


def static_rows(model: Model, tokens: float) -> int:
    """Rows in a batch of the transformers engine, if each has `tokens` tokens."""
    return max(1, int(model.batch_tokens // tokens))


def training_memory(
    model: Model, settings: Training, longest: int, gpu: Gpu | None, processes: int = 1
) -> tuple[dict[str, float], Choice]:
    """Most GiB by part that training needs on each GPU, or on this machine's CPU.

    Without the CUDA context, and without what Python and its libraries take.

    Args:
        longest: tokens of the longest prompt with its answer; a pair has two such sequences.
        gpu: None for a CPU, with the memory that is available now.
        processes: GPUs that train together.

    Returns:
        The parts, and how a step is split into forward passes given the free memory.
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
    """GiB by part that a model takes for requests: the larger of those for usual and for long prompts."""
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
    """GiB for tensors: on a GPU, or what is available now on this machine."""
    if gpu is not None:
        return gpu.memory - CONTEXT
    import psutil

    return psutil.virtual_memory().available / GIB
