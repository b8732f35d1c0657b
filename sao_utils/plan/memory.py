"""Memory that a model takes on a GPU: generating, judging, lm-eval's tasks. Sizes are GiB.

Arithmetic on the shape of the model; needs neither torch nor weights. The peaks of the transformers
engine are checked on a CPU. Memory of training: `training.memory`.
"""

from __future__ import annotations

from sao_utils.plan.hardware import GIB
from sao_utils.recipe import Model
from sao_utils.training.shapes import WEIGHT_BYTES, Shape, shape_of

#: vLLM's defaults: sequences at a time, and tokens of one forward pass.
VLLM_ROWS, VLLM_TOKENS = 256, 8192


def dtype_of(model: Model) -> str:
    """What a model computes in, as far as its cost depends on it: float32, or any 16 bit."""
    return "float32" if model.dtype == "float32" else "bfloat16"


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
        total: memory of the GPU; vLLM takes its share (`model.gpu_memory`) of it in any case.
    """
    shape = shape_of(config)
    dtype = dtype_of(model)
    weights = shape.weight_bytes(dtype, model.quantisation)
    if model.engine == "vllm":
        working = _pass_bytes(shape, model, VLLM_TOKENS) + VLLM_ROWS * shape.vocabulary * 8
        parts = {"weights": weights / GIB, "working": working / GIB}
        if total:  # the rest of its share, whatever is needed
            left = model.gpu_memory * total - sum(parts.values())
            parts["KV cache"] = max(0.0, left)
        return parts
    rows = static_rows(model, prompt_tokens + new_tokens)
    cache = rows * (prompt_tokens + new_tokens) * shape.kv_bytes(dtype)
    # A drawn token: logits in 16 bit and float32, probabilities, sorted, and summed in float64.
    draw = rows * shape.vocabulary * 44
    # One layer's keys and values, repeated for the heads that share them.
    repeated = cache / shape.layers * (shape.heads // shape.kv_heads)
    reading = _pass_bytes(shape, model, rows * prompt_tokens, rows, prompt_tokens)
    later = cache * new_tokens / (prompt_tokens + new_tokens)  # not there yet when prompts are read
    working = max(reading - later, draw, repeated)
    parts = {"weights": weights, "KV cache": cache, "working": working}
    return {name: size / GIB for name, size in parts.items()}


def judging_memory(
    config, model: Model, tokens: float, total: float | None = None
) -> dict[str, float]:
    """GiB by part that choosing a verdict needs at most: one pass over prompts of so many tokens, no
    cache. A verdict that is sampled is written: `generation_memory`."""
    if model.engine == "vllm":
        return generation_memory(config, model, tokens, 0, total)
    shape = shape_of(config)
    rows = static_rows(model, tokens)
    working = _pass_bytes(shape, model, rows * tokens, rows, tokens)
    working += rows * shape.vocabulary * 10
    weights = shape.weight_bytes(dtype_of(model), model.quantisation)
    return {"weights": weights / GIB, "working": working / GIB}


def task_memory(config, model: Model, tokens: float) -> dict[str, float]:
    """GiB by part that lm-eval needs at least: one row of so many tokens, the logits of all of them
    and their logarithms. It tries larger batches first, up to what fits."""
    shape, size = shape_of(config), WEIGHT_BYTES[dtype_of(model)]
    cache = tokens * shape.kv_bytes(dtype_of(model))  # that it asks for, and does not use
    working = max(
        _pass_bytes(shape, model, tokens, 1, tokens),
        tokens * (2 * size * shape.vocabulary + 2 * size * shape.width),
    )
    weights = shape.weight_bytes(dtype_of(model), model.quantisation)
    parts = {"weights": weights, "KV cache": cache, "working": working}
    return {name: size / GIB for name, size in parts.items()}


def static_rows(model: Model, tokens: float) -> int:
    """Rows of a batch of the transformers engine, if each has so many tokens."""
    return max(1, int(model.batch_tokens // tokens))
