"""Benchmarks of the training step: `python -m sao_utils.benchmarks`, also notebook 10.

This trainer beside trl's CPOTrainer as shipped, CPOTrainer with trl's own fused head, and Liger's
SimPO loss, interleaved in one run. Times depend on the machine, so what counts are ratios; counts of
tokens and rows have no noise at all. A contender that is not installed, fails or runs out of memory
is a row with a status: the rest goes on.

The models have random weights: only their shapes matter for time and memory. On a CPU they are
narrow with a true vocabulary, lengths and token budget are a quarter, and tokens/s are those of a
second of CPU time; on a GPU all is true.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

from sao_utils.rows import hardware, results_folder, versions, write_whole

BETA, GAMMA, PROMPT, LONGEST, BUDGET = 10.0, 3.0, 60, 2048, 4096
GIB = 2**30
PACKED, SHARED = "ours, packed", "ours, packed, prompt shared"
CPO, FUSED, LIGER = "CPOTrainer", "CPOTrainer + fused head", "Liger"
#: CPOTrainer's computation by hand, for machines without trl (there without its Triton kernel).
STAND_IN = "full logits (stand-in for CPOTrainer)"
COLUMNS = (
    "measurement shapes vocabulary weights cap_gib contender batch tokens peak_bytes peak_ratio "
    "seconds cpu_seconds tokens_per_second speed_ratio loss loss_difference padded_ratio head_ratio "
    "microbatches repeats status note"
).split()
#: name -> model type; vocabulary, width, MLP, layers, heads, key-value heads, head width; tied head?
#: The first group is for CPUs, the second for GPUs, the last for a trial of the program in seconds.
SHAPES = {
    "small-llama": ("llama", (32_000, 256, 768, 2, 4, 2, 64), False),
    "small-qwen2": ("qwen2", (151_936, 256, 768, 2, 4, 2, 64), True),
    "small-gemma2": ("gemma2", (256_000, 256, 768, 2, 4, 2, 64), True),
    "qwen2.5-1.5b": ("qwen2", (151_936, 1536, 8960, 28, 12, 2, 128), True),
    "llama-3-8b": ("llama", (128_256, 4096, 14_336, 32, 32, 8, 128), False),
    "gemma-2-9b": ("gemma2", (256_000, 3584, 14_336, 42, 16, 8, 256), True),
    "quick-llama": ("llama", (32_000, 64, 192, 2, 2, 1, 32), False),
    "quick-gemma2": ("gemma2", (256_000, 64, 192, 2, 2, 1, 32), True),
    "trial-gemma2": ("gemma2", (2_000, 64, 192, 2, 2, 1, 32), True),
}
ON_CPU = ("small-llama", "small-qwen2", "small-gemma2")
ON_GPU = ("qwen2.5-1.5b", "llama-3-8b", "gemma-2-9b")


# ---------------------------------------------------------------------------- lengths and counts


def lengths(n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer of n pairs: the same for the same seed.

    Answers are lognormal, mean 375, standard deviation 0.7 of it, at most 2,048 with the prompt. The
    two answers to one prompt are alike in length (correlation 0.8 of the logarithms), which is
    the kinder assumption for trainers that pad.
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
    """What a trainer feeds that pads each microbatch, and computes logits at every position."""
    batches = [sizes[i : i + batch] for i in range(0, len(sizes), batch)]
    fed = sum(2 * len(b) * max(p + max(c, r) for p, c, r in b) for b in batches)
    answers = sum(c + r for _, c, r in sizes)
    ratios = {"padded_ratio": fed / real_tokens(sizes), "head_ratio": fed / answers}
    return {**ratios, "microbatches": len(batches)}


def counts(sizes: list[tuple[int, int, int]], budget: int) -> list[dict]:
    """The noise-free rows: tokens fed, head rows and microbatches of one step of these pairs."""
    base = {"measurement": "counts", "tokens": real_tokens(sizes), "status": "ok"}
    found = [
        {**base, "contender": CPO, "batch": batch, **padded_counts(sizes, batch)}
        for batch in (1, 2, 4, 8)
    ]
    for contender, prompts in ((PACKED, 2), (SHARED, 1)):
        ours = {**base, "contender": contender, "batch": len(sizes)}
        try:
            from sao_utils.packing import plan

            bins = plan([prompts * p + c + r for p, c, r in sizes], budget)
            if sorted(i for one in bins for i in one) != list(range(len(sizes))):
                raise RuntimeError("the plan does not hold each pair once")
            ours["microbatches"] = len(bins)
        except Exception as error:
            ours["status"] = failure(error)
        found.append(ours)
    return found


# ---------------------------------------------------------------------------- measuring


def failure(error: BaseException) -> str:
    """An exception as the status of a row."""
    first = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, ImportError):
        return f"not available: {error.name or first}"
    if isinstance(error, MemoryError):
        return first or "out of memory"
    low = str(error).lower()
    if (
        type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in low
        or "allocate memory" in low
    ):
        return "out of memory"
    return f"failed: {type(error).__name__}: {first}"


def _memory(key: str, file: str = "self/status") -> int | None:
    """A value of Linux's account of this process or machine, bytes; None elsewhere."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _begin(device: str) -> int | None:
    """Empty the caches, start the peak anew, and return what is held now, bytes."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _memory("VmRSS")


def measure(work, device: str, whole: bool = False) -> dict:
    """Call `work` once; it returns a dict of findings.

    Returns:
        its findings with "status", "seconds" (wall), "cpu_seconds" and "peak_bytes": above what was
        held before, or on a GPU with `whole` everything. None where it cannot be measured.
    """
    import torch

    found = {"status": "ok", "peak_bytes": None}
    try:
        held = _begin(device)
        started, cpu = time.perf_counter(), time.process_time()
        found |= work()
        if device == "cuda":
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        found["cpu_seconds"] = time.process_time() - cpu
        if device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - (0 if whole else held)
        elif held is not None:
            found["peak_bytes"] = max(0, _memory("VmHWM") - held)
    except Exception as error:
        found = {"status": failure(error), "peak_bytes": None}
    return found


def interleaved(contenders: dict, device: str, repeats: int, whole: bool = False) -> dict:
    """Measure contenders in turn, `repeats` times; one that failed is not tried again.

    Args:
        contenders: key -> function without arguments, which returns a dict of findings.

    Returns:
        key -> findings: medians of the times and the peak (now and then an allocator keeps a block).
    """
    found = {key: [] for key in contenders}
    for _ in range(repeats):
        for key, work in contenders.items():
            if all(one["status"] == "ok" for one in found[key]):
                found[key].append(measure(work, device, whole))
                if sys.stderr.isatty():
                    print(".", end="", flush=True, file=sys.stderr)
    merged = {}
    for key, several in found.items():
        merged[key] = one = {**several[-1], "repeats": len(several)}
        if one["status"] == "ok":
            for name in ("seconds", "cpu_seconds", "peak_bytes"):
                if one[name] is not None:
                    one[name] = statistics.median(each[name] for each in several)
    return merged


def _need(rows: int, vocabulary: int, device: str) -> None:
    """Refuse full logits that this machine's memory cannot hold: a killed process has no row."""
    free, wanted = _memory("MemAvailable", "meminfo"), 3.5 * 4 * rows * vocabulary
    if device == "cpu" and free is not None and wanted > 0.9 * free:
        raise MemoryError(f"not run: needs about {wanted / GIB:.0f} GiB")


# ---------------------------------------------------------------------------- the loss stage


def _simpo(means):
    """SimPO's loss of mean log-probabilities [2 * pairs], the chosen ones first."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = means.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def _own_means(logps, mask):
    """Mean of logps [rows where mask] over each row of mask [sequences, tokens]."""
    sums = logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)
    return sums / mask.sum(-1)


def _loss_ours(hidden, weight, labels):
    from sao_utils.losses import token_logps

    mask = labels[:, 1:] != -100
    logps = token_logps(hidden[:, :-1][mask], weight, labels[:, 1:][mask])
    return _simpo(_own_means(logps, mask))


def _full_means(logits, labels, trl: bool):
    """Mean log-probability a sequence from full logits, by trl's function or by hand."""
    if trl:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import
        from trl.experimental.cpo import CPOTrainer

        return CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    logits, labels = logits[:, :-1], labels[:, 1:]
    mask, safe = labels != -100, labels.clamp(min=0)[..., None]
    picked = logits.gather(-1, safe)[..., 0]
    logps = picked - logits.logsumexp(-1)
    return (logps * mask).sum(-1) / mask.sum(-1)


def _loss_full(hidden, weight, labels, trl: bool = True):
    _need(labels.numel(), len(weight), hidden.device.type)
    logits = (hidden @ weight.T).float()  # with mixed precision, accelerate makes outputs float32
    return _simpo(_full_means(logits, labels, trl))


def _loss_stand_in(hidden, weight, labels):
    return _loss_full(hidden, weight, labels, trl=False)


def _loss_fused(hidden, weight, labels):
    """As `add_fused_lm_head` calls it: on a CPU at every position, on a GPU where there are labels."""
    from trl.kernels import ChunkedLogProbFunction

    mask = labels[:, 1:] != -100
    where = mask if hidden.is_cuda else mask | True
    rows, targets = hidden[:, :-1][where], labels[:, 1:][where].clamp(min=0)
    outputs = ("log_probs",)
    logps = ChunkedLogProbFunction.apply(
        rows, weight, None, targets, 1.0, 32_768, None, 1.0, outputs
    )[0]
    return _simpo(_own_means(logps[mask[where]], mask))


def _loss_liger(hidden, weight, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    _need(labels[:, 1:].numel() // max(1, len(labels) // 2), len(weight), hidden.device.type)
    loss = LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=hidden.is_cuda
    )
    return loss(weight, hidden[:, :-1].contiguous(), labels[:, 1:].contiguous())[0]


LOSSES = {
    PACKED: _loss_ours,
    CPO: _loss_full,
    FUSED: _loss_fused,
    LIGER: _loss_liger,
    STAND_IN: _loss_stand_in,
}


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def loss_stage(shape: str, device: str, tokens: int, repeats: int, which=tuple(LOSSES)) -> list:
    """Peak memory, time and loss of the stage from hidden states to their gradient, frozen head.

    Args:
        tokens: hidden rows of one pair: two sequences of tokens / 2, each with a prompt of 60. The
            softcap of Gemma-2 is left out here: Liger has none.
    """
    import torch

    vocabulary, width = SHAPES[shape][1][:2]
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weight = torch.empty(vocabulary, width, **options).normal_(std=width**-0.5)
    hidden = torch.empty(2, tokens // 2, width, **options).normal_().requires_grad_()
    labels = torch.randint(vocabulary, (2, tokens // 2), device=device)
    labels[:, : min(PROMPT, tokens // 4)] = -100

    def work(contender):
        def once():
            hidden.grad = None
            loss = LOSSES[contender](hidden, weight, labels)
            loss.backward()
            return {"loss": loss.item()}

        return once

    which = [name for name in which if name != STAND_IN or not _has("trl")]
    work_of = {name: work(name) for name in which}
    for name in which if repeats > 1 else ():  # the first call of anything is slow
        small = (hidden[:, :64].detach().requires_grad_(), weight, labels[:, :64].clamp(min=0))
        measure(lambda: {"loss": LOSSES[name](*small).backward()}, device)  # noqa: B023
    found = interleaved(work_of, device, repeats)
    base = {"measurement": "loss stage", "shapes": shape, "vocabulary": vocabulary}
    base |= {"weights": str(options["dtype"]).split(".")[-1], "batch": 1, "tokens": tokens}
    return with_ratios([{**base, "contender": name, **one} for name, one in found.items()], device)


def with_ratios(rows: list[dict], device: str) -> list[dict]:
    """Set tokens/s, and the ratios to CPOTrainer at its fastest batch size (else its stand-in).

    On a CPU seconds are those of CPU time: wall time there tells of other programs, too.
    """
    clock = "cpu_seconds" if device == "cpu" else "seconds"
    for row in rows:
        if row.get(clock):
            row["tokens_per_second"] = row["tokens"] / row[clock]
    to = best(rows, CPO) or best(rows, STAND_IN)
    for row in rows if to else ():
        if row["status"] != "ok":
            continue
        row["speed_ratio"] = row["tokens_per_second"] / to["tokens_per_second"]
        if row["peak_bytes"] and to["peak_bytes"]:
            row["peak_ratio"] = row["peak_bytes"] / to["peak_bytes"]
        if row.get("loss") is not None:
            row["loss_difference"] = abs(row["loss"] - to["loss"]) / max(abs(to["loss"]), 1e-12)
    return rows


def best(rows: list[dict], *contenders: str) -> dict | None:
    """The fastest row of these contenders, None when none ran."""
    ran = [r for r in rows if r["contender"] in contenders and r["status"] == "ok"]
    return max(ran, key=lambda row: row.get("tokens_per_second") or 0, default=None)


# ---------------------------------------------------------------------------- the whole step


def random_policy(shape: str, device: str, nf4: bool | None = None):
    """A model of a shape with random weights and a LoRA adapter, and how its weights are kept.

    On a GPU the weights are NF4, layer by layer, so that the 16-bit model need not fit, with gradient
    checkpointing; without bitsandbytes they are bfloat16. On a CPU they are float32.

    Args:
        nf4: whether the weights are NF4; None: where it is useful and possible.

    Returns:
        peft's model in training mode, and "nf4", "bfloat16" or "float32" with the kind of attention.
    """
    from peft import LoraConfig, get_peft_model

    base, kept = random_base(shape, device, nf4)
    if device == "cuda":
        with warnings.catch_warnings():  # transformers 5.23 renames it
            warnings.simplefilter("ignore", FutureWarning)
            base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    try:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base)  # before peft; without `fused_lm_head=True` it changes nothing
    except (ImportError, AttributeError):
        pass
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
    return get_peft_model(base, lora).train(), kept


def random_base(shape: str, device: str, nf4: bool | None = None):
    """A model of a shape with random weights, and how they are kept: see `random_policy`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes, tied = SHAPES[shape]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    options = dict(zip([*names, "num_key_value_heads", "head_dim"], sizes))
    options |= dict(tie_word_embeddings=tied, max_position_embeddings=8192, use_cache=False)
    options |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "qwen2":
        options.pop("head_dim")  # it has no such setting
    whole = AutoConfig.for_model(kind, **options)
    first = AutoConfig.for_model(kind, **{**options, "num_hidden_layers": 1})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    nf4 = device == "cuda" and _has("bitsandbytes") if nf4 is None else nf4
    torch.manual_seed(0)
    with _defaults(device, dtype):
        base = AutoModelForCausalLM.from_config(first, dtype=dtype)
    # All parts of the model share one configuration object, so it changes in place.
    for key in ("num_hidden_layers", "layer_types"):
        if hasattr(whole, key):
            vars(base.config)[key] = getattr(whole, key)
    layers, layer = base.model.layers, type(base.model.layers[0])
    del layers[0]
    for index in range(whole.num_hidden_layers):
        with _defaults(device, dtype):
            new = layer(base.config, index)
        layers.append(_in_nf4(new, dtype) if nf4 else new)
    base.is_loaded_in_4bit = nf4  # peft asks
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_(std=sizes[1] ** -0.5)
        base.get_output_embeddings().weight.normal_(std=sizes[1] ** -0.5)
    kept = "nf4" if nf4 else str(dtype).split(".")[-1]
    return base, f"{kept}, attention {base.config._attn_implementation}"


@contextmanager
def _defaults(device: str, dtype):
    """New tensors are made on this device and in this dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _in_nf4(module, dtype):
    """A layer with its linear maps in NF4 with double quantisation, as in training."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            options = dict(compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
            shape = (child.in_features, child.out_features, child.bias is not None)
            linear = Linear4bit(*shape, **options, device="meta")
            linear.bias = child.bias
            options = dict(compress_statistics=True, quant_type="nf4", requires_grad=False)
            weight = Params4bit(child.weight.data.cpu(), **options)
            linear.weight = weight.to(child.weight.device)  # the move quantises
            setattr(parent, name, linear)
    return module


def random_pairs(sizes: list[tuple[int, int, int]], vocabulary: int, seed: int = 0) -> list[dict]:
    """Pairs of these lengths with random tokens, as `training.pair_trainer` takes them."""
    import numpy as np

    draw = np.random.default_rng(seed).integers
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {"id": str(k), **{key: draw(3, vocabulary, n).tolist() for key, n in zip(keys, size)}}
        for k, size in enumerate(sizes)
    ]


def _ours(policy, pairs, share: bool, budget: int, device: str, folder: str):
    """A function that does one step with this project's trainer."""
    if not _has("trl"):
        return _ours_by_hand(policy, pairs, share, budget, device)
    from sao_utils.recipe import Training
    from sao_utils.training import pair_trainer

    numbers = dict(learning_rate=1e-5, sft_learning_rate=1e-5, lora_rank=16, lora_alpha=32)
    numbers |= dict(batch_size=len(pairs), token_budget=budget, beta=BETA, gamma=GAMMA)
    settings = Training(**numbers, share_prompt=share, gradient_checkpointing="off")
    arguments = dict(use_cpu=device == "cpu")
    trainer = pair_trainer(policy, None, pairs, settings, "simpo", 0, Path(folder), **arguments)

    def step():
        with _mixed_precision(trainer.model, device):
            loss = trainer.training_step(trainer.model, pairs)
        count = trainer.counts
        return {
            "loss": float(loss),
            "padded_ratio": count["padded_tokens"] / count["real_tokens"],
            "head_ratio": count["head_rows"] / count["completion_tokens"],
            "microbatches": count["microbatches"],
        }

    return step


def _ours_by_hand(policy, pairs, share: bool, budget: int, device: str):
    """The same microbatches, attention and loss in a plain loop, where the trainer lacks trl."""
    import torch

    from sao_utils import packing
    from sao_utils.losses import token_logps

    base = policy.get_base_model()
    softcap = getattr(base.config, "final_logit_softcapping", None)
    plan = packing.plan([packing.cost(pair, share) for pair in pairs], budget)
    half = policy.dtype == torch.bfloat16

    def step():
        total, fed, rows = 0.0, 0, 0
        for made in (packing.pack([pairs[i] for i in some], share) for some in plan):
            inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in made.inputs.items()}
            places, targets, owner = (x.to(device) for x in (made.rows, made.targets, made.owner))
            with packing.packed(base):
                with torch.autocast(device, torch.bfloat16) if half else nullcontext():
                    hidden = base.model(**inputs, use_cache=False).last_hidden_state
                    head = base.get_output_embeddings().weight
                    logps = token_logps(hidden[0, places], head, targets, None, softcap)
                sums = torch.zeros(2 * made.pairs, device=device).index_add(0, owner, logps)
                means = sums / torch.bincount(owner, minlength=2 * made.pairs)
                loss = _simpo(torch.cat([means[0::2], means[1::2]])) * made.pairs / len(pairs)
                loss.backward()
            total, fed, rows = total + loss.item(), fed + made.fed, rows + len(targets)
        real = sum(packing.cost(pair, False) for pair in pairs)
        ratios = {"padded_ratio": fed / real, "head_ratio": 1.0, "microbatches": len(plan)}
        return {"loss": total, **ratios, "note": "plain loop: the trainer needs trl"}

    return step


@contextmanager
def _mixed_precision(model, device: str):
    """What accelerate does to a model's forward in `train()` with bf16: autocast, outputs in float32.

    By hand, since accelerators of several precisions cannot live in one process.
    """
    import torch

    if model.dtype == torch.bfloat16:
        from accelerate.utils import convert_outputs_to_fp32

        cast = torch.autocast(device, torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(cast)
    try:
        yield
    finally:
        vars(model).pop("forward", None)


def _padded(pairs: list[dict], device: str) -> list:
    """Ids, attention mask and labels [2 * pairs, longest], the chosen ones first, as CPOTrainer pads."""
    import torch

    from sao_utils.packing import pad

    made = pad(pairs)
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"]
    labels = torch.full_like(ids, -100)
    labels.view(-1)[made.rows + 1] = made.targets
    return [torch.cat([x[0::2], x[1::2]]).to(device) for x in (ids, mask, labels)]


def _stock(policy, pairs, batch: int, device: str, folder: str, fused: bool):
    """A function that does one step with trl's CPOTrainer, microbatches of `batch` pairs."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import
    import datasets
    import torch
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    names = ("input_ids", "attention_mask", "labels")

    class Stock(CPOTrainer):
        """CPOTrainer as shipped, on data that is tokenised already."""

        @staticmethod
        def tokenize_row(feature):
            return feature

    class Fused(Stock):
        def concatenated_forward(self, model, batch):
            ids, mask, labels = (
                torch.cat([batch[f"{side}_{name}"] for side in ("chosen", "rejected")])
                for name in names
            )
            output = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            means = output.log_probs.sum(-1) / (labels[:, 1:] != -100).sum(-1)
            chosen, rejected = means.chunk(2)
            none = means.new_zeros(1)  # the logits, of which only the mean is logged
            return chosen, rejected, none, none, none[0]

    config = CPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=BETA,
        simpo_gamma=GAMMA,
        max_length=LONGEST,
        use_cpu=device == "cpu",
        bf16=False,  # see _mixed_precision
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
    )
    # Only the padding token of a tokenizer is asked for.
    tokens = SimpleNamespace(pad_token_id=0, pad_token="<pad>", eos_token_id=2, bos_token_id=1)
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"input_ids": [0]}])
    kind = Fused if fused else Stock
    trainer = kind(policy, config, lambda x: x, data, processing_class=tokens)
    trainer.current_gradient_accumulation_steps = 1  # else set by `train()`

    def step():
        total = 0.0
        with _mixed_precision(trainer.model, device):
            for some in (pairs[i : i + batch] for i in range(0, len(pairs), batch)):
                tensors = _padded(some, device)
                if not fused:
                    _need(tensors[0].numel(), policy.config.vocab_size, device)
                inputs = {}
                for name, tensor in zip(names, tensors):
                    inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = tensor.chunk(2)
                total += len(some) * float(trainer.training_step(trainer.model, inputs))
        return {"loss": total / len(pairs)}

    return step


def _by_hand(policy, pairs, batch: int, device: str, liger: bool):
    """A function that does one step of padded microbatches: Liger's loss, or CPOTrainer's stand-in."""
    import torch

    if liger:
        import liger_kernel.chunked_loss  # noqa: F401
    base = policy.get_base_model()
    half = policy.dtype == torch.bfloat16

    def step():
        total = 0.0
        for some in (pairs[i : i + batch] for i in range(0, len(pairs), batch)):
            ids, mask, labels = _padded(some, device)
            _need(ids.numel() // (len(some) if liger else 1), policy.config.vocab_size, device)
            with torch.autocast(device, torch.bfloat16) if half else nullcontext():
                if liger:
                    hidden = base.model(ids, attention_mask=mask).last_hidden_state
                    loss = _loss_liger(hidden, base.get_output_embeddings().weight, labels)
                else:
                    logits = policy(ids, attention_mask=mask, use_cache=False).logits.float()
                    loss = _simpo(_full_means(logits, labels, trl=False))
            (loss * len(some) / len(pairs)).backward()
            total += len(some) * loss.item()
        return {"loss": total / len(pairs)}

    return step


def whole_step(
    name: str, policy, sizes, device: str, repeats: int, budget: int, batches=(1, 2, 4, 8)
) -> list[dict]:
    """Forward and backward pass of one step of pairs, all contenders and batch sizes in turn.

    Args:
        name: what the measurement is called.
        sizes: tokens of (prompt, chosen, rejected) of the step's pairs.
        budget: tokens of a packed microbatch.
    """
    vocabulary = policy.config.vocab_size
    pairs = random_pairs(sizes, vocabulary)
    batches = [batch for batch in batches if batch <= len(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            (PACKED, len(pairs)): lambda: _ours(policy, pairs, False, budget, device, folder),
            (SHARED, len(pairs)): lambda: _ours(policy, pairs, True, budget, device, folder),
        }
        for b in batches:
            makers[CPO, b] = lambda b=b: _stock(policy, pairs, b, device, folder, False)
            makers[FUSED, b] = lambda b=b: _stock(policy, pairs, b, device, folder, True)
            if policy.config.model_type != "gemma2":  # it has no softcap: another loss
                makers[LIGER, b] = lambda b=b: _by_hand(policy, pairs, b, device, True)
            if not _has("trl"):
                makers[STAND_IN, b] = lambda b=b: _by_hand(policy, pairs, b, device, False)
        found, steps = {}, {}
        for key, make in makers.items():
            try:
                with warnings.catch_warnings():  # of renamed arguments
                    warnings.simplefilter("ignore", FutureWarning)
                    steps[key] = _clean(policy, make())
            except Exception as error:
                found[key] = {"status": failure(error)}
        for step in steps.values() if repeats > 1 and len(pairs) == 1 else ():
            measure(step, device)  # the first call of anything is slow
        found |= interleaved(steps, device, repeats, whole=True)
        policy.zero_grad(set_to_none=True)
    base = {"measurement": name, "vocabulary": vocabulary, "tokens": real_tokens(sizes)}
    rows = []
    for (contender, batch), one in ((key, found[key]) for key in makers):
        counted = {} if contender in (PACKED, SHARED) else padded_counts(sizes, batch)
        if contender in (FUSED,):
            counted.pop("head_ratio")  # on a CPU it scores every position, on a GPU the answers'
        rows.append({**base, "contender": contender, "batch": batch, **counted, **one})
    return with_ratios(rows, device)


def _clean(policy, step):
    """The same step without gradients of another contender."""

    def once():
        policy.zero_grad(set_to_none=True)
        return step()

    return once


# ---------------------------------------------------------------------------- runs


def on_cpu(repeats: int, quick: bool) -> Iterator[list[dict]]:
    """The measurements on a CPU, a group of rows at a time."""
    yield counts(lengths(128), BUDGET)
    if quick:
        yield loss_stage("quick-gemma2", "cpu", 2048, 1, (PACKED, CPO))
        for tokens in (512, 4096):
            yield loss_stage("quick-gemma2", "cpu", tokens, 1, (PACKED,))
        yield from of_shape("quick-llama", "cpu", [None], 1, 4, (1, 2), one_pair=False)
        return
    for shape in ON_CPU:
        yield loss_stage(shape, "cpu", 2048, repeats)
    for tokens in (512, 1024, 4096):
        yield loss_stage(ON_CPU[-1], "cpu", tokens, repeats, (PACKED,))
    for shape in ON_CPU:
        yield from of_shape(shape, "cpu", [None], repeats, 8, batches=(1, 2, 4))


def of_shape(
    shape: str,
    device: str,
    caps: list,
    repeats: int,
    pairs: int,
    batches=(1, 2, 4, 8),
    one_pair: bool = True,
) -> Iterator[list[dict]]:
    """One pair of the longest sequences, and one step of pairs, under each cap of memory.

    Args:
        caps: GiB of GPU memory that may be used, None for all; a step is measured under the last ones.
        pairs: of the step.
    """
    shrink = 1 if device == "cuda" else 4
    base = {"shapes": shape, "vocabulary": SHAPES[shape][1][0]}
    gc.collect()  # the model before this one
    try:
        policy, weights = random_policy(shape, device)
    except Exception as error:
        yield [{"measurement": "one pair", **base, "contender": "all", "status": failure(error)}]
        return
    longest = [tuple(n // shrink for n in (PROMPT, LONGEST - PROMPT, LONGEST - PROMPT))]
    step = [tuple(max(1, n // shrink) for n in size) for size in lengths(pairs)]
    jobs = [("one pair", longest, cap, (1,)) for cap in caps if one_pair]
    jobs += [("step", step, cap, batches) for cap in caps if cap or caps == [None]]
    for name, sizes, cap, tried in jobs:
        try:
            _cap(cap, device)
            rows = whole_step(name, policy, sizes, device, repeats, BUDGET // shrink, tried)
        except Exception as error:
            rows = [{"measurement": name, "contender": "all", "status": failure(error)}]
        yield [{**base, **row, "weights": weights, "cap_gib": cap} for row in rows]
    _cap(None, device)


def _cap(gib: float | None, device: str) -> None:
    """Let this process use only so much GPU memory. On a CPU (a trial) nothing is limited."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole) if gib else 1.0)


def on_gpu(shapes, caps: list, repeats: int, pairs: int, device: str) -> Iterator[list[dict]]:
    """The measurements on a GPU, a group of rows at a time."""
    yield counts(lengths(128), BUDGET)
    for shape in shapes:
        try:
            yield loss_stage(shape, device, 2048, repeats)
        except Exception as error:
            base = {"measurement": "loss stage", "shapes": shape, "contender": "all"}
            yield [{**base, "status": failure(error)}]
        yield from of_shape(shape, device, [None, *caps], repeats, pairs)


def not_measured() -> list[dict]:
    """The rows that only a GPU can show, where none has shown them."""
    return [
        {"measurement": name, "shapes": shape, "vocabulary": SHAPES[shape][1][0], "cap_gib": cap}
        | {"contender": contender, "status": "not measured: no GPU"}
        for shape in ON_GPU
        for name, cap in (("loss stage", None), ("one pair", None), ("one pair", 23), ("step", 23))
        for contender in (PACKED, SHARED, CPO, FUSED)
        if (name, contender) != ("loss stage", SHARED)
    ]


# ---------------------------------------------------------------------------- bars


def bars(rows: list[dict], device: str) -> list[dict]:
    """What was promised, as dicts of "bar", "limit", "value" and "met" (None: not measured)."""
    found = []

    def bar(name, value, limit, most=True):
        met = None if value is None else (value <= limit if most else value >= limit)
        sign = "at most" if most else "at least"
        found.append({"bar": name, "limit": f"{sign} {limit}", "value": value, "met": met})

    def pick(measurement, contender=None, **wanted):
        return [
            row
            for row in rows
            if row["measurement"] == measurement
            and contender in (None, row["contender"])
            and all(row.get(key) == value for key, value in wanted.items())
            and row["status"] == "ok"
        ]

    def first(several, key):
        return next((row[key] for row in several if row.get(key) is not None), None)

    if device == "cuda":
        gemma = {"shapes": "gemma-2-9b"}
        tried = [r for r in rows if r["measurement"] == "one pair" and r["shapes"] == "gemma-2-9b"]
        tried = [r for r in tried if r.get("cap_gib") == 23 and "measured" not in r["status"]]

        def runs(*names):
            there = [r["status"] for r in tried if r["contender"] in names]
            there = [status for status in there if status in ("ok", "out of memory")]
            return float("ok" in there) if there else None

        bar("gemma-2-9b, one pair at 2,048, 23 GiB: ours runs (1)", runs(PACKED, SHARED), 1, False)
        stock = STAND_IN if best(rows, STAND_IN) else CPO  # without trl
        bar(f"the same: {stock} does not (0)", runs(stock), 0)
        peak = first(pick("one pair", PACKED, cap_gib=None, **gemma), "peak_ratio")
        bar(f"the same without a cap: peak, ratio to {stock}", peak, 0.5)
        step = pick("step", cap_gib=23, **gemma)
        for name, limit in ((stock, 1.3), (FUSED, 1.15)):
            value = _faster(best(step, PACKED, SHARED), best(step, name))
            bar(f"gemma-2-9b, 23 GiB: tokens/s over {name}, each at its best", value, limit, False)
    else:
        stage = [r for r in pick("loss stage") if r["vocabulary"] == 256_000]
        ours = [row for row in stage if row["contender"] == PACKED]
        at_2048 = [row for row in ours if row["tokens"] == 2048]
        name = "loss stage, V = 256,000"
        bar(f"{name}, 2,048 tokens: peak, ratio to CPOTrainer", first(at_2048, "peak_ratio"), 0.15)
        peaks = [row["peak_bytes"] for row in ours if row["peak_bytes"]]
        flat = max(peaks) / min(peaks) if len({r["tokens"] for r in ours}) > 1 and peaks else None
        bar(f"{name}: largest over smallest peak, 512 to 4,096 tokens", flat, 1.25)
        # The step's loss has also been through the model, in another order of summation.
        for part, limit in (("loss stage", 1e-5), ("step", 1e-4)):
            equal = [r["loss_difference"] for r in pick(part) if "loss_difference" in r]
            bar(f"{part}: loss, largest relative difference", max(equal, default=None), limit)
        for shape in dict.fromkeys(r["shapes"] for r in pick("step")):
            step = pick("step", shapes=shape)
            value = _faster(best(step, PACKED, SHARED), best(step, CPO))
            name = f"V = {step[0]['vocabulary']:,}: tokens/s over CPOTrainer, each at its best"
            bar(name, value, 1.2, False)
    fed = pick("step", PACKED) + pick("one pair", PACKED)
    bar("padded over real tokens", max((r["padded_ratio"] for r in fed), default=None), 1.0)
    head = [r["head_ratio"] for r in fed + pick("step", SHARED)]
    bar("head rows over answer tokens", max(head, default=None), 1.0)
    planned = [r["microbatches"] for c in (PACKED, SHARED) for r in pick("counts", c)]
    bar("microbatches, 128 pairs at 4,096 tokens", max(planned, default=None), 35)
    return found


def _faster(ours: dict | None, other: dict | None) -> float | None:
    return ours["tokens_per_second"] / other["tokens_per_second"] if ours and other else None


# ---------------------------------------------------------------------------- results


def report(rows: list[dict], device: str) -> dict:
    """Bars, versions, hardware and date of these rows."""
    return {**about(rows, device), "bars": bars(rows, device)}


def about(rows: list[dict], device: str) -> dict:
    """Device, whether anything was measured, date, machine and versions."""
    more = {}
    for package in ("bitsandbytes", "liger-kernel"):
        more[package] = version(package) if _has(package) else "not installed"
    measured = any(row["status"] == "ok" for row in rows if row["measurement"] != "counts")
    status = "measured" if measured else "not measured: no GPU"
    when = {"device": device, "status": status, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    return {**when, "hardware": hardware(), "versions": versions() | more}


def as_csv(rows: list[dict], columns: Iterable[str] = COLUMNS) -> str:
    """The rows as CSV with all columns; numbers to six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    for row in rows:
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(short)
    return out.getvalue()


def picture(rows: list[dict]):
    """Peak memory of the loss stage and speed of the step, a matplotlib figure."""
    from sao_utils import figures

    return figures._styled(_draw)(rows, figures)


def _draw(rows: list[dict], figures):
    stage = [r for r in rows if r["measurement"] == "loss stage" and r.get("tokens") == 2048]
    step = [r for r in rows if r["measurement"] == "step"]
    parts = (
        (
            stage,
            "peak_bytes",
            "Loss stage of one pair, 2,048 tokens: the less the better",
            "peak, GiB",
        ),
        (step, "speed_ratio", "One step of pairs: the more the better", "tokens/s, 1 = CPOTrainer"),
    )
    names = {PACKED: figures.BLUE, SHARED: figures.SKY, CPO: figures.RED, FUSED: figures.ORANGE}
    names |= {LIGER: figures.PURPLE, STAND_IN: figures.GREY}
    drawn = []
    for some, key, *_ in parts:
        lines = [(s, c) for s in dict.fromkeys(r["shapes"] for r in some) for c in names]
        found = [best([r for r in some if r["shapes"] == s], c) for s, c in lines]
        drawn.append([row for row in found if row and row.get(key)])
    heights = [max(2, len(lines)) for lines in drawn]
    figure, axes = figures._new(1.6 + 0.2 * sum(heights), 2, height_ratios=heights)
    for place, lines, (_, key, title, x) in zip(axes, drawn, parts):
        figures._titles(place, title, x)
        if not lines:
            figures._nothing(place, "not measured")
            continue
        for k, row in enumerate(lines):
            value = row[key] / (GIB if key == "peak_bytes" else 1)
            place.barh(k, value, color=names[row["contender"]])
            place.annotate(f" {value:.2f}", (value, k), va="center", fontsize=8)
        labels = [f"V = {row['vocabulary'] / 1000:.0f}k: {row['contender']}" for row in lines]
        figures._rows_down(place, labels)
        place.tick_params(axis="y", labelsize=8)
        place.margins(x=0.1)
    return figure


def as_svg(figure) -> str:
    """The same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def keep(folder: Path, name: str, rows: list[dict]) -> dict:
    """Write name.csv, name.json and name.svg; returns what the JSON holds."""
    found = report(rows, "cuda" if name.startswith("cuda") else "cpu")
    write_whole(folder / f"{name}.csv", as_csv(rows))
    write_whole(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    if found["status"] == "measured":
        try:
            write_whole(folder / f"{name}.svg", as_svg(picture(rows)))
        except Exception as error:  # numbers do not depend on a drawing
            print(f"No picture: {failure(error)}", file=sys.stderr)
    return found


def kept(name: str) -> dict | None:
    """The report of results/benchmarks, wherever this runs; None when there is none."""
    for results in (results_folder(), Path(__file__).resolve().parents[1] / "results"):
        path = results / "benchmarks" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def table(rows: list[dict], found: dict) -> str:
    """What a reader wants to see first: ratios, then bars."""
    lines = []
    for row in rows:
        ratios = [
            f"{label} {row[key]:.3g}"
            for key, label in (("peak_ratio", "memory"), ("speed_ratio", "speed"))
            + (("padded_ratio", "padded/real"), ("head_ratio", "head/answer"))
            + (("microbatches", "microbatches"),)
            if row.get(key) is not None
        ]
        cap = f", {row['cap_gib']:g} GiB" if row.get("cap_gib") else ""
        where = f"{row['measurement']} {row.get('shapes') or ''}{cap}"
        said = ", ".join(ratios) if row["status"] == "ok" else row["status"]
        size = f"{row.get('tokens') or 0:6d} tokens x{row.get('batch') or 0}"
        lines.append(f"{where:32} {size:20} {row['contender']:28} {said}")
    return "\n".join([*lines, bar_lines(found)])


def bar_lines(found: dict) -> str:
    """The bars of a report, one a line."""
    lines = []
    for bar in found["bars"]:
        met = {True: "met", False: "NOT met", None: found["status"]}[bar["met"]]
        value = "" if bar["value"] is None else f": {bar['value']:.4g}"
        lines.append(f"{met:8} {bar['bar']}{value} ({bar['limit']})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    ask = argparse.ArgumentParser(prog="python -m sao_utils.benchmarks", description=__doc__)
    ask.add_argument("--quick", action="store_true", help="the CPU ratios in under a minute")
    ask.add_argument("--json", action="store_true", help="print the results as JSON")
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ask.add_argument("--cap-gib", type=float, nargs="*", default=[23.0], help="of a GPU's memory")
    ask.add_argument("--shapes", nargs="*", choices=SHAPES, help="of the models, on a GPU")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--pairs", type=int, default=16, help="of the step, on a GPU")
    ask.add_argument("--folder", type=Path, help="of the results")
    options = ask.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    folder = options.folder or results_folder() / "benchmarks"
    rows: list[dict] = []
    name = f"{options.device}-quick" if options.quick else options.device
    with contextlib.redirect_stdout(sys.stderr):  # the JSON shall stand alone
        import torch

        more = options.shapes or ON_GPU, options.cap_gib, options.repeats, options.pairs
        if options.device == "cpu" and not options.shapes:
            groups = on_cpu(options.repeats, options.quick)
        elif options.device == "cuda" and not torch.cuda.is_available():
            if (folder / "cuda.svg").exists():
                sys.exit(
                    f"There is no GPU here; {folder.name}/cuda.csv of another machine is kept."
                )
            groups = [counts(lengths(128), BUDGET) + not_measured()]
        else:
            groups = on_gpu(*more, options.device)
            name = f"{name}-{'-'.join(options.shapes)}" if options.shapes else name
        for group in groups:
            rows += group
            found = keep(folder, name, rows)  # at once: a kill leaves what there is
    print(json.dumps({**found, "rows": rows}) if options.json else table(rows, found))


if __name__ == "__main__":
    main()
