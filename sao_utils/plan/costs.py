"""What a model costs on a GPU: memory and time of generating, judging and training.

Arithmetic on the shape of the model and the data sheet of the GPU; needs neither torch nor network
nor weights. What training keeps for its backward pass and the peaks of the transformers engine are
checked on a CPU; nothing has been compared with a real GPU yet. Sizes are GiB, times hours.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist

import yaml

from sao_utils.engines.transformers import FEW
from sao_utils.machine import gpu_name
from sao_utils.recipe import Model, Training
from sao_utils.stages.responses import PER_PROMPT
from sao_utils.training.losses import CHUNK_BYTES
from sao_utils.training.shapes import CHECKPOINT_ABOVE, WEIGHT_BYTES, Shape, shape_of

GIB = 2**30

#: Share of a data sheet's speed that decoding reaches; for all else see `Gpu.reached`.
DECODE_SHARE = 0.3
#: Seconds to start the kernels of a layer, one decoding step of transformers; assumed.
LAUNCH_SECONDS = 8e-4
#: Unpacking NF4 adds so much to training time, at 4,096 tokens a microbatch; computed.
NF4_SLOWER = 1.046
#: GiB that the CUDA context and its libraries take before the first tensor; assumed.
CONTEXT = 0.6
#: vLLM's defaults: sequences at a time, and tokens of one forward pass.
VLLM_ROWS, VLLM_TOKENS = 256, 8192
#: lm-eval's: rows of a batch at most, and the context of a model that does not say its own.
EXAM_ROWS, EXAM_CONTEXT = 64, 2048


class PlanError(ValueError):
    """Something cannot be planned; the message says why and what to do."""


@dataclass(frozen=True)
class Gpu:
    """See gpus.yaml for the units."""

    name: str
    memory: float
    bandwidth: float
    compute: float
    capability: float
    named: str
    reached: float = 0.5


# ---------------------------------------------------------------------------- what is there


def gpus() -> dict[str, Gpu]:
    """The GPUs that are known, by the name that `--gpu` takes."""
    text = (files("sao_utils") / "gpus.yaml").read_text(encoding="utf-8")
    return {str(name): Gpu(str(name), **values) for name, values in yaml.safe_load(text).items()}


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of that name; without a name the one of this machine, None if it has none.

    Raises:
        PlanError: a GPU that gpus.yaml does not know.
    """
    known, own = gpus(), gpu_name() if name is None else None
    if name is None and own is None:
        return None
    for gpu in known.values():
        if re.search(gpu.named, own) if own else gpu.name.lower() == name.lower():
            return gpu
    told = f"--gpu plans for one like it: {', '.join(known)}"
    raise PlanError(f"The GPU '{own or name}' is not known; {told}.")


def architecture(model: Model) -> dict:
    """The config.json of a model: from its folder, from the hub's cache, or from architectures.yaml.

    Raises:
        PlanError: it is in none of these.
    """
    from sao_utils.engines.loading import model_folder

    folder = Path(model_folder(model.path))
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = _architectures()
    if model.path in known:
        return known[model.path]
    if model.path.count("/") == 1 and not model.path.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        if isinstance(cached, str):
            return json.loads(Path(cached).read_text(encoding="utf-8"))
    raise PlanError(
        f"The shape of '{model.path}' is not known here. Download its config.json "
        f"(`hf download {model.path} config.json`), give a folder, or one of: {', '.join(known)}."
    )


@lru_cache(maxsize=1)
def _architectures() -> dict[str, dict]:
    return yaml.safe_load((files("sao_utils") / "architectures.yaml").read_text(encoding="utf-8"))


def model_shape(model: Model) -> Shape:
    """The shape of a model. Raises `PlanError` where it is not known."""
    try:
        shape = shape_of(architecture(model))
        shape.parameters  # noqa: B018 - raises where the family is not known
        return shape
    except ValueError as error:
        raise PlanError(str(error)) from None


# ---------------------------------------------------------------------------- memory


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


def exam_memory(config, model: Model, tokens: float) -> dict[str, float]:
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


def training_memory(
    config,
    model: Model,
    training: Training,
    total: float | None = None,
    longest: int | None = None,
    processes: int = 1,
) -> dict[str, float]:
    """GiB by part that training needs at most on each GPU; without the CUDA context.

    Frozen weights as they are stored, in 16 bit or NF4; a trained one is float32 with its gradient,
    Adam's two moments (8 bytes, in 8 bit 2) and a 16-bit copy to compute with. Several processes
    share what is trained with method=full (FSDP, ZeRO-3). Activations: `Shape.kept_bytes`, with
    gradient checkpointing a layer's input only. "working" is the larger of a layer's backward pass
    and the chunked loss.

    Args:
        total: memory of the GPU, for gradient_checkpointing=auto; None takes it to be short.
        longest: tokens of the longest sequence; by default half of the budget.
    """
    shape = shape_of(config)
    full = training.method == "full"
    longest = longest or training.token_budget // 2
    tokens = microbatch(training, longest)
    trained = shape.parameters if full else shape.adapter(training.lora_rank)
    adam = 2 if training.optimiser == "paged_adamw_8bit" else 8
    states = trained * (4 + 4 + adam + 2)
    frozen = 0.0
    if not full:
        frozen = shape.weight_bytes(dtype_of(model), training.quantisation)
    else:
        states /= processes
    each = shape.kept_bytes(full)
    kept = each * shape.layers * tokens
    left = None if total is None else (total - CONTEXT) * GIB - frozen - states
    if checkpoints(training, kept, left):
        inputs = (4 if full else 2) * shape.width * shape.layers * tokens
        layer = each * tokens
    else:
        inputs, layer = kept, 0
    layer += 2 * tokens * (3 * shape.inner + 2 * shape.width)  # gradients inside of a layer
    if training.quantisation == "nf4" or full:  # one matrix unpacked, or in 16 bit
        layer += 2 * shape.width * shape.inner
    if shape.softcap:  # scores are computed again, with their gradients
        layer += 16 * shape.heads * longest * longest
    head = shape.vocabulary * shape.width
    loss = CHUNK_BYTES["cuda"] * (3.5 if shape.softcap else 2.5) + 2 * tokens * shape.width
    if full:  # its gradient is summed in float32, and the head stands there in 16 bit
        loss += 6 * head
    parts = {"weights": frozen, "trained": states, "activations": inputs}
    return {name: size / GIB for name, size in {**parts, "working": max(layer, loss)}.items()}


def microbatch(training: Training, longest: int) -> int:
    """Tokens of the largest microbatch: a pair that is longer than the budget goes alone."""
    return max(training.token_budget, PER_PROMPT * longest)


def checkpoints(training: Training, kept: float, left: float | None) -> bool:
    """Whether activations are computed twice, as training.needs_checkpointing will decide.

    Args:
        kept: bytes of activations. left: bytes of free memory, None if not known.
    """
    if training.gradient_checkpointing != "auto":
        return training.gradient_checkpointing == "on"
    return left is None or kept > CHECKPOINT_ABOVE * max(0.0, left)


# ---------------------------------------------------------------------------- time


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


def exam_hours(model: Model, gpu: Gpu, requests: float, read: float, written: float = 0) -> float:
    """Hours of so many requests of lm-eval, which computes the logits of every token that it reads.

    Args:
        read, written: tokens of a request and of its answer, in the mean.
    """
    shape = model_shape(model)
    head = shape.vocabulary * shape.width
    hours = prefill_hours(shape, gpu, requests * read) * (1 + head / shape.linear) / gpu.reached
    if written:
        # As many rows as fit with the longest prompt that the model takes: so its batch is found.
        longest = shape.context or EXAM_CONTEXT
        row = exam_memory(architecture(model), model, longest)
        each, room = sum(row.values()) - row["weights"], gpu.memory - CONTEXT - row["weights"]
        rows = int(room // each)
        rows = max(1, min(EXAM_ROWS, rows))
        steps = written if rows == 1 else 2 * written  # a batch waits for its longest; ours
        decode = decode_hours(shape, gpu, model, requests, read, written, rows, steps)
        launching = LAUNCH_SECONDS * shape.layers * steps * requests / rows / 3600
        hours += max(decode / DECODE_SHARE, launching)
    return hours
