"""What the benchmarks of training compare, on random models and pairs.

This trainer, trl's CPOTrainer as shipped, CPOTrainer with trl's own fused head, and Liger's SimPO
loss: each as a loss of hidden states, and as one step of pairs. How they are measured and told is in
`benchmarks`. The models have random weights: only their shapes matter for time and memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

from sao_utils.bench.measuring import GIB, installed, memory

BETA, GAMMA, LONGEST = 10.0, 3.0, 2048
PACKED, SHARED = "ours, packed", "ours, packed, prompt shared"
CPO, FUSED, LIGER = "CPOTrainer", "CPOTrainer + fused head", "Liger"
#: CPOTrainer's computation by hand, for machines without trl (there without its Triton kernel).
STAND_IN = "full logits (stand-in for CPOTrainer)"


def need(rows: int, vocabulary: int, device: str) -> None:
    """Raise MemoryError where full logits would not fit: a process that is killed has no row."""
    free, wanted = memory("MemAvailable", "meminfo"), 3.5 * 4 * rows * vocabulary
    if device == "cpu" and free is not None and wanted > 0.9 * free:
        raise MemoryError(f"not run: needs about {wanted / GIB:.0f} GiB")


# ---------------------------------------------------------------------------- the loss stage


def simpo(means):
    """SimPO's loss of mean log-probabilities [2 * pairs], the chosen ones first."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = means.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def _own_means(logps, mask):
    """Mean of logps [rows where mask] over each row of mask [sequences, tokens]."""
    sums = logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)
    return sums / mask.sum(-1)


def _loss_ours(hidden, weight, labels):
    from sao_utils.training.losses import token_logps

    mask = labels[:, 1:] != -100
    logps = token_logps(hidden[:, :-1][mask], weight, labels[:, 1:][mask])
    return simpo(_own_means(logps, mask))


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
    need(labels.numel(), len(weight), hidden.device.type)
    logits = (hidden @ weight.T).float()  # with mixed precision, accelerate makes outputs float32
    return simpo(_full_means(logits, labels, trl))


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
    return simpo(_own_means(logps[mask[where]], mask))


def _loss_liger(hidden, weight, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    need(labels[:, 1:].numel() // max(1, len(labels) // 2), len(weight), hidden.device.type)
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


def losses() -> dict[str, Callable]:
    """Contender -> its loss of (hidden, weight, labels); the stand-in only where trl is not."""
    return {name: loss for name, loss in LOSSES.items() if name != STAND_IN or not installed("trl")}


# ---------------------------------------------------------------------------- random models and pairs


# ---------------------------------------------------------------------------- one step of pairs


def steps(policy, pairs: list[dict], batches, budget: int, device: str, folder: Path) -> dict:
    """What does one step of the pairs: (contender, pairs a microbatch) -> a maker of a function.

    A maker that raises tells why its contender cannot run here. The function goes forward and
    backward through all pairs, and returns "loss" with what was counted.

    Args:
        batches: pairs a microbatch, for contenders that pad.
        budget: tokens of a packed microbatch.
        folder: for what trainers want to write.
    """
    makers = {
        (PACKED, len(pairs)): lambda: ours(policy, pairs, False, budget, device, folder),
        (SHARED, len(pairs)): lambda: ours(policy, pairs, True, budget, device, folder),
    }
    for b in batches:
        makers[CPO, b] = lambda b=b: stock(policy, pairs, b, device, folder, False)
        makers[FUSED, b] = lambda b=b: stock(policy, pairs, b, device, folder, True)
        if policy.config.model_type != "gemma2":  # it has no softcap: another loss
            makers[LIGER, b] = lambda b=b: by_hand(policy, pairs, b, device, True)
        if not installed("trl"):
            makers[STAND_IN, b] = lambda b=b: by_hand(policy, pairs, b, device, False)
    return makers


def ours(policy, pairs, share: bool, budget: int, device: str, folder: Path):
    """A function that does one step with this project's trainer."""
    if not installed("trl"):
        return ours_by_hand(policy, pairs, share, budget, device)
    from sao_utils.recipe import Training
    from sao_utils.training.setup import pair_trainer

    numbers = dict(learning_rate=1e-5, sft_learning_rate=1e-5, lora_rank=16, lora_alpha=32)
    numbers |= dict(batch_size=len(pairs), token_budget=budget, beta=BETA, gamma=GAMMA)
    settings = Training(**numbers, share_prompt=share, gradient_checkpointing="off")
    arguments = dict(use_cpu=device == "cpu")
    trainer = pair_trainer(policy, None, pairs, settings, "simpo", 0, folder, **arguments)

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


def ours_by_hand(policy, pairs, share: bool, budget: int, device: str):
    """The same microbatches, attention and loss in a plain loop, where the trainer lacks trl."""
    import torch

    from sao_utils.training import packing
    from sao_utils.training.losses import token_logps

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
                    logps = token_logps(hidden[0, places], head, targets, softcap)
                sums = torch.zeros(2 * made.pairs, device=device).index_add(0, owner, logps)
                means = sums / torch.bincount(owner, minlength=2 * made.pairs)
                loss = simpo(torch.cat([means[0::2], means[1::2]])) * made.pairs / len(pairs)
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

    from sao_utils.training.packing import pad

    made = pad(pairs)
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"]
    labels = torch.full_like(ids, -100)
    labels.view(-1)[made.rows + 1] = made.targets
    return [torch.cat([x[0::2], x[1::2]]).to(device) for x in (ids, mask, labels)]


def stock(policy, pairs, batch: int, device: str, folder: Path, fused: bool):
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
        output_dir=str(folder),
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
                    need(tensors[0].numel(), policy.config.vocab_size, device)
                inputs = {}
                for name, tensor in zip(names, tensors):
                    inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = tensor.chunk(2)
                total += len(some) * float(trainer.training_step(trainer.model, inputs))
        return {"loss": total / len(pairs)}

    return step


def by_hand(policy, pairs, batch: int, device: str, liger: bool):
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
            need(ids.numel() // (len(some) if liger else 1), policy.config.vocab_size, device)
            with torch.autocast(device, torch.bfloat16) if half else nullcontext():
                if liger:
                    hidden = base.model(ids, attention_mask=mask).last_hidden_state
                    loss = _loss_liger(hidden, base.get_output_embeddings().weight, labels)
                else:
                    logits = policy(ids, attention_mask=mask, use_cache=False).logits.float()
                    loss = simpo(_full_means(logits, labels, trl=False))
            (loss * len(some) / len(pairs)).backward()
            total += len(some) * loss.item()
        return {"loss": total / len(pairs)}

    return step
