"""What the training benchmarks compare: this trainer, trl's CPOTrainer and Liger's SimPO loss.

They are compared as a loss on hidden states (the loss stage) and as one step on pairs; trl's trainer
runs both as shipped and with trl's own fused head.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when trl is imported
BETA, GAMMA, LONGEST = 10.0, 3.0, 2048
PACKED, SHARED = "ours, packed", "ours, packed, prompt shared"
CPO, FUSED, LIGER = "CPOTrainer", "CPOTrainer + fused head", "Liger"


# ---------------------------------------------------------------------------- the loss stage


def _simpo(means):
    """SimPO's loss from mean log-probabilities [2 * pairs], all chosen ones first."""
    from sao_utils.training.losses import simpo_loss

    chosen, rejected = means.chunk(2)
    return simpo_loss(chosen, 1, rejected, 1, BETA, GAMMA).mean()


def _loss_ours(hidden, weight, labels):
    from sao_utils.training.losses import token_logps

    mask = labels[:, 1:] != -100
    logps = token_logps(hidden[:, :-1][mask], weight, labels[:, 1:][mask])
    sums = logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)
    return _simpo(sums / mask.sum(-1))


def _loss_of_cpo(hidden, weight, labels):
    import psutil
    from trl.experimental.cpo import CPOTrainer

    needed = 3.5 * 4 * labels.numel() * len(weight)  # bytes: several copies of the float32 logits
    if not hidden.is_cuda and needed > 0.9 * psutil.virtual_memory().available:
        raise MemoryError  # else the system would kill the process, and with it a notebook's kernel
    logits = (hidden @ weight.T).float()  # with mixed precision, accelerate makes outputs float32
    return _simpo(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))


def _loss_of_liger(hidden, weight, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    options = dict(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=hidden.is_cuda)
    loss = LigerFusedLinearSimPOLoss(**options)
    return loss(weight, hidden[:, :-1].contiguous(), labels[:, 1:].contiguous())[0]


#: contender -> its loss as a function of hidden states [2, tokens, width], the head's weight
#: [vocabulary, width] and labels [2, tokens], -100 where nothing is learned; the chosen sequence is first
LOSSES = {PACKED: _loss_ours, CPO: _loss_of_cpo, LIGER: _loss_of_liger}


# ---------------------------------------------------------------------------- one step of pairs


def ours(policy, pairs: list[dict], share: bool, budget: int, device: str, folder: Path):
    """A function that runs one step on the pairs with this project's trainer.

    The function returns a dict of "loss" and the trainer's counts.

    Args:
        budget: tokens of a packed microbatch.
        folder: where the trainer may write.
    """
    from sao_utils.recipe import Training
    from sao_utils.training.setup import pair_trainer

    settings = Training(
        learning_rate=1e-5,
        sft_learning_rate=1e-5,
        batch_size=len(pairs),
        token_budget=budget,
        beta=BETA,
        gamma=GAMMA,
        share_prompt=share,
        gradient_checkpointing="off",
    )
    on_cpu = device == "cpu"
    trainer = pair_trainer(policy, None, pairs, settings, "simpo", 0, folder, use_cpu=on_cpu)

    def step():
        policy.zero_grad(set_to_none=True)
        with _mixed_precision(trainer.model, device):
            loss = trainer.training_step(trainer.model, pairs)
        count = trainer.row
        return {
            "loss": float(loss),
            "padded_ratio": count["padded_tokens"] / count["real_tokens"],
            "head_ratio": count["head_rows"] / count["completion_tokens"],
            "microbatches": count["microbatches"],
        }

    return step


@contextmanager
def _mixed_precision(model, device: str):
    """What accelerate does to a model's forward in `train()` with bf16: autocast, outputs in float32.

    Done by hand, since accelerators of different precisions cannot coexist in one process.
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


def stock(policy, pairs: list[dict], fused: bool, batch: int, device: str, folder: Path):
    """A function that runs one step with trl's CPOTrainer, in microbatches of `batch` pairs."""
    import datasets
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Stock(CPOTrainer):
        """CPOTrainer as shipped, on data that is already tokenised."""

        @staticmethod
        def tokenize_row(feature):
            return feature

    class Fused(Stock):
        def concatenated_forward(self, model, batch):
            batch = self.concatenated_inputs(batch, device=self.accelerator.device)
            names = ("input_ids", "attention_mask", "labels")
            ids, mask, labels = (batch[f"concatenated_{name}"] for name in names)
            output = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            means = output.log_probs.sum(-1) / (labels[:, 1:] != -100).sum(-1)
            none = means.new_zeros(1)  # in place of the logits, of which only the mean is logged
            return *means.chunk(2), none, none, none[0]

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
    # The trainer uses nothing of a tokenizer but its padding token.
    tokens = SimpleNamespace(pad_token_id=0, pad_token="<pad>", eos_token_id=2, bos_token_id=1)
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"input_ids": [0]}])
    kind = Fused if fused else Stock
    trainer = kind(policy, config, train_dataset=data, processing_class=tokens)
    trainer.current_gradient_accumulation_steps = 1  # normally set by `train()`

    def step():
        policy.zero_grad(set_to_none=True)
        total = 0.0
        with _mixed_precision(trainer.model, device):
            for some in (pairs[i : i + batch] for i in range(0, len(pairs), batch)):
                padded = trainer.data_collator([_tokenised(pair) for pair in some])
                loss = trainer.training_step(trainer.model, padded)
                total += len(some) * float(loss)
        return {"loss": total / len(pairs)}

    return step


def _tokenised(pair: dict) -> dict:
    """A pair with the columns that CPOTrainer's own `tokenize_row` makes."""
    made = {}
    for side in ("chosen", "rejected"):
        prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
        made[f"{side}_input_ids"] = prompt + answer
        made[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        made[f"{side}_labels"] = [-100] * len(prompt) + answer
    return made
