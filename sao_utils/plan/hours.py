"""Hours that a model takes on a GPU, by its data sheet: generating, judging, training, tasks."""

from __future__ import annotations

import math
from statistics import NormalDist

from sao_utils.engines.transformers import FEW
from sao_utils.plan.hardware import CONTEXT, GIB, Gpu, architecture, model_shape
from sao_utils.plan.memory import VLLM_ROWS, dtype_of, static_rows, task_memory
from sao_utils.recipe import Model, Training
from sao_utils.training.shapes import WEIGHT_BYTES, Shape

#: Share of a data sheet's speed that decoding reaches; for all else see `Gpu.reached`.
DECODE_SHARE = 0.3
#: Seconds to start the kernels of a layer, one decoding step of transformers; assumed.
LAUNCH_SECONDS = 8e-4
#: Unpacking NF4 adds so much to training time, at 4,096 tokens a microbatch; computed.
NF4_SLOWER = 1.046
#: lm-eval's: rows of a batch at most, and the context of a model that does not say its own.
TASK_ROWS, TASK_CONTEXT = 64, 2048


def prefill_hours(shape: Shape, gpu: Gpu, tokens: float) -> float:
    """Floor of reading prompts: two operations a weight of the linear layers and a token."""
    return 2 * shape.linear * tokens / (gpu.compute * 1e12) / 3600


def decode_hours(
    shape: Shape,
    gpu: Gpu,
    model: Model,
    replies: float,
    prompt: float,
    new: float,
    batch: float,
    steps: float | None = None,
) -> float:
    """Floor of writing replies: every step reads all weights and the batch's KV cache once, or, if
    that takes longer, computes two operations a weight and row.

    Args:
        replies, prompt, new: how many, of how many tokens, after prompts of how many.
        batch: rows at a time. steps: of one batch, by default `new` (places are filled again at once).
    """
    dtype = dtype_of(model)
    head = shape.vocabulary * shape.width
    weights = shape.linear * WEIGHT_BYTES[
        dtype if model.quantisation == "none" else model.quantisation
    ] + (head * WEIGHT_BYTES[dtype])
    cache = batch * shape.kv_bytes(dtype) * (prompt + new / 2)
    reading = (weights + cache) / (gpu.bandwidth * 1e9)
    computing = 2 * (shape.linear + head) * batch / (gpu.compute * 1e12)
    count = replies / batch * (steps or new)
    return count * max(reading, computing) / 3600


def training_hours(
    shape: Shape, gpu: Gpu, training: Training, tokens: float, answers: float, twice: bool
) -> float:
    """Floor of training on so many tokens, of which so many stand in answers.

    A weight costs 2 operations forward and 2 for the gradient of its input; 2 more if it is
    trained, and 2 more if activations are computed twice. So 4 or 6 with frozen weights, 6 or 8 with
    trained ones. The output head sees the answers only: 4 frozen, 8 trained (its logits come twice).
    """
    full = training.method == "full"
    each = 4 + 2 * full + 2 * twice
    work = each * shape.linear * tokens
    work += (8 if full else 4) * shape.vocabulary * shape.width * answers
    if training.quantisation == "nf4":
        work *= NF4_SLOWER
    return work / (gpu.compute * 1e12) / 3600


def shrinking(rows: int, mean: float, spread: float, most: int) -> list[tuple[int, float]]:
    """(rows, steps) of a batch of the transformers engine, for lognormal lengths of at most `most`.

    Whenever half of its rows have ended the batch shrinks; the last few wait for the longest.
    """
    found, done, left = [], 0.0, rows
    while left >= FEW:
        length = length_at(1 - left / 2 / rows, mean, spread, most)
        found.append((left, length - done))
        done, left = length, left // 2
    return [*found, (left, length_at(rows / (rows + 1), mean, spread, most) - done)]


def length_at(share: float, mean: float, spread: float, most: int) -> float:
    """The length below which such a share of lognormal lengths lies, at most `most`."""
    sigma = math.sqrt(math.log(1 + spread**2))
    return min(most, mean * math.exp(sigma * NormalDist().inv_cdf(share) - sigma**2 / 2))


def batch_rows(model: Model, shape: Shape, parts: dict, mean: float, most: float) -> int:
    """Rows that are decoded at a time, of so many tokens in the mean and at most.

    vLLM: as many as its KV cache holds (0: not even one). transformers: by `model.batch_tokens`.
    """
    if model.engine == "vllm":
        held = parts["KV cache"] * GIB / (shape.kv_bytes(dtype_of(model)) * mean)
        return min(VLLM_ROWS, int(held))
    return static_rows(model, most)


def writing_hours(
    model: Model,
    gpu: Gpu,
    parts: dict[str, float],
    rows: float,
    prompt: float,
    new: float,
    most: float,
    spread: float,
    shared: float = 0,
) -> float | None:
    """Hours to write so many replies; None if not even one fits into the memory.

    Args:
        parts: `generation_memory`. prompt, new: tokens in the mean; most: tokens of the longest
            reply. spread: of reply lengths, standard deviation over mean.
        shared: tokens of a prompt, in the mean, that vLLM has read for an earlier row.
    """
    shape, vllm = model_shape(model), model.engine == "vllm"
    batch = batch_rows(model, shape, parts, prompt + new / 2, prompt + most)
    if not batch:
        return None
    if vllm:
        going = [(batch, new)]
    else:
        batch = max(1, min(batch, rows))
        going = shrinking(batch, new, spread, most)
    hours = prefill_hours(shape, gpu, rows * (prompt - (shared if vllm else 0))) / DECODE_SHARE
    for left, steps in going:
        count, rounds = left * rows / batch, rows / batch
        writing = decode_hours(shape, gpu, model, count, prompt, new, left, steps)
        launching = 0 if vllm else LAUNCH_SECONDS * shape.layers * steps * rounds / 3600
        hours += max(writing / DECODE_SHARE, launching)
    return hours


def reading_hours(
    model: Model,
    gpu: Gpu,
    parts: dict[str, float],
    rows: float,
    prompt: float,
    shared: float = 0,
) -> float | None:
    """Hours to read so many prompts, and choose after each; None if none fits.

    Args:
        parts: `judging_memory`. shared: as in `writing_hours`.
    """
    shape = model_shape(model)
    batch = batch_rows(model, shape, parts, prompt, prompt)
    if not batch:
        return None
    read = rows * (prompt - (shared if model.engine == "vllm" else 0))
    return prefill_hours(shape, gpu, read) / gpu.reached


def task_hours(model: Model, gpu: Gpu, requests: float, read: float, written: float = 0) -> float:
    """Hours of so many requests of lm-eval, which computes the logits of every token that it reads.

    Args:
        read, written: tokens of a request and of its answer, in the mean.
    """
    shape = model_shape(model)
    head = shape.vocabulary * shape.width
    hours = prefill_hours(shape, gpu, requests * read) * (1 + head / shape.linear) / gpu.reached
    if written:
        # As many rows as fit with the longest prompt that the model takes: so its batch is found.
        longest = shape.context or TASK_CONTEXT
        row = task_memory(architecture(model), model, longest)
        each, room = sum(row.values()) - row["weights"], gpu.memory - CONTEXT - row["weights"]
        rows = int(room // each)
        rows = max(1, min(TASK_ROWS, rows))
        steps = written if rows == 1 else 2 * written  # a batch waits for its longest; ours
        decode = decode_hours(shape, gpu, model, requests, read, written, rows, steps)
        launching = LAUNCH_SECONDS * shape.layers * steps * requests / rows / 3600
        hours += max(decode / DECODE_SHARE, launching)
    return hours
