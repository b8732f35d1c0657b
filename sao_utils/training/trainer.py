"""The one adapter around trl's CPOTrainer, which knows SimPO but lives in `trl.experimental`.

What is trl's stays trl's: the loss of SimPO and DPO (`cpo_loss`), of ORPO (`odds_ratio_loss`), the
metrics, the loop with its optimiser, checkpoints, FSDP and DeepSpeed. What is replaced: batches are
packed by a budget of tokens instead of padded, and log-probabilities are computed in chunks on the
answers' tokens only, instead of full logits of everything.

Importing this module costs seconds: `training` does so when it trains.
"""

from __future__ import annotations

import functools
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer
from trl.experimental.cpo import CPOConfig as Config
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from sao_utils.training import packing
from sao_utils.training.losses import TrainingFailed, token_logps

__all__ = ["Config", "PairTrainer", "answer_logps"]
KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
COUNTS = ("real_tokens", "padded_tokens", "head_rows", "completion_tokens", "microbatches")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class _Rows(list):
    """Rows with token ids already: trl would map its own tokenisation over them."""

    def map(self, *_, **__):
        return self

    def __getitem__(self, index):
        if isinstance(index, tuple):  # from _Steps
            return {**list.__getitem__(self, index[0]), "weight": index[1]}
        return list.__getitem__(self, index)


class _Steps:
    """Batch sampler: of every optimiser step the (index, weight) of this process's pairs.

    The order depends on seed and epoch only, not on the number of processes. A process for which the
    last step has no pair gets one of weight 0: it must take part in the communication.
    """

    def __init__(self, pairs: int, size: int, seed: int, rank: int, world: int):
        self.pairs, self.size, self.seed, self.rank, self.world = pairs, size, seed, rank, world
        self.epoch = 0
        self.batch_sampler = self  # where transformers looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.pairs // self.size)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.pairs).tolist()
        for start in range(0, self.pairs, self.size):
            step = order[start : start + self.size]
            mine = step[self.rank :: self.world]
            yield [(i, 1.0) for i in mine] or [(step[0], 0.0)]


def answer_logps(model, rows, targets, **inputs):
    """Log-probabilities of the targets, [N] float32, by a causal language model of transformers.

    Args:
        rows: [N], positions in the flattened batch that predict the targets [N].
        inputs: of the model's backbone.
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    picked = hidden.reshape(-1, hidden.shape[-1])[rows].to(head.weight.device)
    return token_logps(picked, head.weight, targets, head.bias, softcap, scale)


def _inner(policy):
    return policy.get_base_model() if hasattr(policy, "peft_config") else policy


def add_scoring(policy) -> None:
    """Let `policy(rows=..., targets=..., **inputs)` return `answer_logps`.

    A forward pass must go through the outermost module: what FSDP, DeepSpeed and DDP do hangs on it.
    """
    model = _inner(policy)
    original = model.forward

    @functools.wraps(original)
    def forward(*args, rows=None, targets=None, **inputs):
        if rows is None:
            return original(*args, **inputs)
        given = {key: value for key, value in inputs.items() if value is not None}
        return answer_logps(model, rows, targets, **given)

    model.forward = forward


class PairTrainer(CPOTrainer):
    """Trains on pairs {prompt_ids, chosen_ids, rejected_ids}; rejected_ids are empty for SFT.

    A batch is all pairs of an optimiser step; `training_step` makes its microbatches. `counts` tells
    of the last step: see `COUNTS`.
    """

    def __init__(self, policy, tokenizer, rows, settings, algorithm, arguments, callbacks=()):
        self.settings, self.algorithm = settings, algorithm
        add_scoring(policy)
        super().__init__(
            model=policy,
            args=arguments,
            train_dataset=_Rows(rows),
            processing_class=tokenizer,
            data_collator=list,
            callbacks=list(callbacks),
        )
        self._keep_full_precision()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.packed, self.packing_reason = True, ""
        self.sharded = self.accelerator.distributed_type in SHARDED
        if not self.sharded:
            self._check_scoring()
        if algorithm == "orpo":
            self.beta = settings.orpo_lambda
        if algorithm == "dpo":
            self._add_reference()

    def _keep_full_precision(self) -> None:
        """Under FSDP: log-probabilities and summed gradients stay float32.

        accelerate's bf16 would round the log-probabilities to 8 bits, and beta multiplies the error.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if policy is not None and getattr(plugin, "fsdp_version", 1) == 2:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32
            )
        head = self.model.get_output_embeddings().weight
        tied = head is self.model.get_input_embeddings().weight
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and head.requires_grad:
            if not tied:
                raise TrainingFailed(
                    "ZeRO-3 cannot train this model's separate output head here. Launch with "
                    "fsdp.yaml, or set training.method=lora."
                )

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self):
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = _Steps(
            len(self.train_dataset), self.settings.batch_size, self.args.seed, rank, world
        )
        return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=list)

    def _microbatches(self, batch: list[dict]):
        """The microbatches of a step, and their pairs."""
        budget, sharing = self.settings.token_budget, self.settings.share_prompt

        def split(at_least=1):
            if self.packed:
                costs = [packing.cost(row, sharing) for row in batch]
                return packing.plan(costs, budget, at_least)
            answers = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in batch]
            longest = [len(r["prompt_ids"]) + n for r, n in zip(batch, answers)]
            return packing.plan_padded(longest, budget, at_least)

        bins = split()
        if self.sharded:  # all processes must take part in the same number of forward passes
            count = torch.tensor([len(bins)], device=self.accelerator.device)
            wanted = int(self.accelerator.gather(count).max())
            batch = batch + [{**batch[0], "weight": 0.0}] * (wanted - len(batch))
            bins = split(wanted)
        for indices in bins:
            pairs = [batch[i] for i in indices]
            made = packing.pack(pairs, sharing) if self.packed else packing.pad(pairs)
            yield made, pairs

    def _logps(self, model, made: packing.Microbatch):
        """Summed log-probabilities and lengths, [2 * pairs]: chosen and rejected in turn."""
        device = self.accelerator.device
        inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in made.inputs.items()}
        rows, targets, owner = (x.to(device) for x in (made.rows, made.targets, made.owner))
        logps = model(**inputs, rows=rows, targets=targets)
        sums = torch.zeros(2 * made.pairs, device=device).index_add(0, owner, logps)
        return sums, torch.bincount(owner, minlength=2 * made.pairs)

    def _attention(self):
        return packing.packed(_inner(self.accelerator.unwrap_model(self.model)))

    # ------------------------------------------------------------------ a step

    def training_step(self, model, batch, num_items_in_batch=None):
        """Forward and backward of all microbatches of a step; returns the mean loss, detached.

        The gradient is that of the mean over the pairs of the step (SFT: over their tokens), over
        all processes, however they are packed.
        """
        model.train()
        made = list(self._microbatches(list(batch)))
        real = [p for _, group in made for p in group if p.get("weight", 1.0)]
        pairs = len(real)
        tokens = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in real)
        total = self._over_processes([tokens if self.algorithm == "sft" else pairs])[0]
        share = self.accelerator.num_processes / total  # gradients are averaged over processes
        summed = torch.zeros(7, device=self.accelerator.device)
        with self._attention() if self.packed else nullcontext():
            for k, (microbatch, group) in enumerate(made):
                last = k == len(made) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)
                plain = last or self.sharded  # else whole gradients would stand on every GPU
                with nullcontext() if plain else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss, metrics = self._loss(model, microbatch, group)
                    self.accelerator.backward(loss * share)
                summed += metrics
        seen = self._over_processes([*summed.tolist(), pairs])
        loss, *rewards = (value / total for value in seen[:5])
        # `seen` counts pairs; for SFT the loss is a mean over tokens.
        of_pairs = dict(zip(("chosen", "rejected", "margins", "accuracies"), rewards))
        if self.algorithm != "sft":
            self.store_metrics({f"rewards/{k}": v for k, v in of_pairs.items()})
            self.store_metrics({"tokens/rejected": seen[6] / seen[7]})
        self.store_metrics({"tokens/chosen": seen[5] / seen[7]})
        fed, rows = sum(m.fed for m, _ in made), sum(len(m.rows) for m, _ in made)
        prompts = (1 if self.algorithm == "sft" else 2) * sum(len(p["prompt_ids"]) for p in real)
        counted = self._over_processes([prompts + tokens, fed, rows, tokens, len(made)])
        self.counts = dict(zip(COUNTS, map(int, counted)))
        self.store_metrics({key: float(value) for key, value in self.counts.items()})
        return torch.tensor(loss, device=self.args.device)

    def _loss(self, model, microbatch, group):
        """Summed loss of a microbatch, and [loss, rewards chosen, rejected, margin, accuracy, tokens
        of chosen, of rejected], sums over its pairs."""
        sums, lengths = self._logps(model, microbatch)
        weight = sums.new_tensor([pair.get("weight", 1.0) for pair in group])
        chosen, rejected = sums[0::2], sums[1::2]
        of_chosen, of_rejected = lengths[0::2], lengths[1::2]
        if self.algorithm == "sft":
            losses, better, worse = -chosen, chosen.detach(), chosen.detach()
        elif self.algorithm == "dpo":  # cpo_loss is DPO's formula on log-ratios
            reference = sums.new_tensor([pair["reference"] for pair in group])
            losses, better, worse = self.cpo_loss(
                chosen - reference[:, 0], rejected - reference[:, 1]
            )
        elif self.algorithm == "orpo":
            means = chosen / of_chosen, rejected / of_rejected
            ratios, better, worse, *_ = ORPOTrainer.odds_ratio_loss(self, *means)
            losses = -means[0] - ratios
        else:
            losses, better, worse = self.cpo_loss(chosen / of_chosen, rejected / of_rejected)
        loss = (losses * weight).sum()
        each = (losses.detach(), better, worse, better - worse, better > worse)
        kept = [(value * weight).sum() for value in (*each, of_chosen, of_rejected)]
        return loss, torch.stack([value.float() for value in kept])

    def _over_processes(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    # ------------------------------------------------------------------ before the first step

    def _check_scoring(self) -> None:
        """Compare with the model's own logits on a few tokens: an architecture may do more to its
        attention or its logits than is known here. Falls back to padding, or refuses."""
        few = [{key: row[key][:12] for key in KEYS} for row in self.train_dataset[:2]]
        model = _inner(self.model)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            truth = []
            for row in few:
                for key in KEYS[1:]:
                    if row[key]:
                        ids = torch.tensor([row["prompt_ids"] + row[key]], device=model.device)
                        logits = self.model(input_ids=ids).logits[0].float()
                        start = len(row["prompt_ids"])
                        scores = logits[start - 1 : -1].log_softmax(-1)
                        truth.append(scores.gather(1, ids[0, start:, None]).sum())
            truth = torch.stack(truth)
            if not truth.isfinite().all():  # broken weights: the first step will say so
                self.model.train(training)
                return
            off, tokens = [], sum(len(row[key]) for row in few for key in KEYS[1:])
            for way in (lambda: packing.pack(few, self.settings.share_prompt), None):
                try:
                    with packing.packed(model) if way else nullcontext():
                        sums, _ = self._logps(self.model, way() if way else packing.pad(few))
                    found = sums[sums != 0] if few[0]["rejected_ids"] == [] else sums
                    off.append(((found - truth).abs().sum() / tokens).item())
                except (TypeError, ValueError, RuntimeError) as error:
                    off.append(f"{type(error).__name__}: {error}")
                close = 1e-3 if model.dtype == torch.float32 else 0.1
                if not isinstance(off[-1], str) and off[-1] < close:
                    break
            else:
                raise TrainingFailed(
                    f"{type(model).__name__} computes its logits in a way that is not known here "
                    f"(off by {off[1]} a token). Take another base model."
                )
        self.model.train(training)
        if len(off) == 2:
            self.packed, self.packing_reason = False, f"packed: off by {off[0]}"

    def _add_reference(self) -> None:
        """DPO compares with the model before training: its log-probabilities, once for all pairs."""
        if self.sharded:
            raise TrainingFailed(
                "training.algorithm=dpo does not run under FSDP or ZeRO-3 here: its reference is "
                "computed before the model is spread. Take simpo or orpo, or one GPU."
            )
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._attention() if self.packed else nullcontext():
            with self.accelerator.autocast():
                for made, group in self._microbatches(list(self.train_dataset)):
                    sums, _ = self._logps(self.model, made)
                    for pair, reference in zip(group, sums.view(-1, 2).tolist()):
                        pair["reference"] = reference
        self.model.train(training)

    # ------------------------------------------------------------------ the loop's loose ends

    def floating_point_ops(self, inputs) -> int:
        return 0  # an estimate that nobody reads, and that wants padded tensors

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            Trainer._save_checkpoint(self, model, trial)  # trl's own writes a model card, too
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / "complete").touch()
        except Exception as error:  # OSError, SafetensorError, and RuntimeErrors of torch's own
            if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            raise TrainingFailed(
                f"Step {self.state.global_step} could not be written to disk ({error}); {free:,.0f} MiB "
                "are free. The last good checkpoint is kept: free some disk and run the same again, "
                "it goes on from there."
            ) from error
