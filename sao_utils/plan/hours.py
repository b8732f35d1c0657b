"""Hours that a model takes on a GPU, from the GPU's data sheet; right within a factor of about two.

Two operations per weight and token; decoding is bound by the memory that every step reads. `Gpu.reached`
and DECODE_SHARE say what share of the data sheet's speed is assumed.
"""

from __future__ import annotations

from sao_utils.plan.hardware import Gpu, model_shape
from sao_utils.plan.memory import VLLM_ROWS, dtype_of, static_rows
from sao_utils.plan.workload import Work
from sao_utils.recipe import Training
from sao_utils.training.shapes import GIB

#: Share of the data sheet's speed that decoding reaches; for everything else see `Gpu.reached`.
DECODE_SHARE = 0.3
#: Seconds to launch the kernels of one layer in one decoding step of transformers; assumed.
LAUNCH_SECONDS = 8e-4
#: Length of the longest reply in a batch, for which transformers waits, over the mean; assumed.
LONGEST_REPLY = 3
#: Rows that lm-eval decodes at a time; assumed.
TASK_ROWS = 8


def training_hours(work: Work, gpu: Gpu, training: Training, twice: bool) -> float:
    """Hours of a training on one GPU.

    Per token, a weight costs 2 operations forward and 2 for the gradient of its input; 2 more if it is
    trained, and 2 more if activations are computed twice. The output head is assumed to be computed for
    every token, although the trainer computes it for the answers' tokens only.

    Args:
        twice: whether activations are computed twice (gradient checkpointing).
    """
    shape, full = model_shape(work.model), training.method == "full"
    each = (4 + 2 * full + 2 * twice) * shape.linear
    each += (8 if full else 4) * shape.vocabulary * shape.width
    return each * work.tokens / (gpu.compute * 1e12) / gpu.reached / 3600


def work_hours(work: Work, gpu: Gpu, memory: dict[str, float]) -> float:
    """Hours of requests to a model on one GPU: reading prompts, and writing replies if there are any.

    A decoding step takes as long as reading all weights and the batch's KV cache once, or as its
    computation if that is longer.

    Args:
        memory: GiB by part that the work needs (`work_memory`).
    """
    model, shape = work.model, model_shape(work.model)
    read, written, _, most_written = work.lengths
    requests, head = work.rows * work.requests, shape.vocabulary * shape.width
    each = shape.linear + (head if work.stage == "tasks" else 0)  # logits at every token
    hours = 2 * each * requests * read / (gpu.compute * 1e12) / gpu.reached / 3600
    if not written:
        return hours
    row = shape.kv_bytes(dtype_of(model)) * (read + written / 2)
    batch, steps = static_rows(model, read + most_written), LONGEST_REPLY * written
    if work.stage == "tasks":
        batch = TASK_ROWS
    elif model.engine == "vllm":  # a row that ends is replaced at once
        batch, steps = min(VLLM_ROWS, memory["cache"] * GIB / row), written
    batch, steps = max(1, min(batch, requests)), min(steps, most_written)
    rows = batch * written / steps  # not yet done, on average over the steps
    weights = shape.weight_bytes(dtype_of(model), model.quantisation)
    reading = (weights + rows * row) / (gpu.bandwidth * 1e9)
    computing = 2 * (shape.linear + head) * rows / (gpu.compute * 1e12)
    seconds = max(reading, computing) / DECODE_SHARE
    if model.engine == "transformers":
        seconds = max(seconds, LAUNCH_SECONDS * shape.layers)
    return hours + requests / batch * steps * seconds / 3600
