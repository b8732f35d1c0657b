"""The one adapter around trl's CPOTrainer, which knows SimPO but lives in `trl.experimental`.

What is trl's stays trl's: the loss of SimPO and DPO (`cpo_loss`), the metrics, the loop with its
optimiser, checkpoints, FSDP and DeepSpeed. What is replaced: batches are
packed by a budget of tokens instead of padded, and log-probabilities are computed in chunks on the
answers' tokens only, instead of full logits of everything.

Importing this module costs seconds: `fit` does so when it trains.
"""

from __future__ import annotations

import functools
import os
import shutil
from contextlib import contextmanager, nullcontext
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

from sao_utils.training import packing
from sao_utils.training.losses import TrainingFailed, orpo_loss, token_logps
from sao_utils.training.watch import COUNTS

__all__ = ["Config", "PairTrainer", "answer_logps"]
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

    A batch is all pairs of an optimiser step; `training_step` makes its microbatches. `counts` are
    those of the last step: see `watch.COUNTS`.
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
            return packing.plan_padded(list(map(packing.longest, batch)), budget, at_least)

        bins = split()
        if self.sharded:  # all processes must take part in the same number of forward passes
            count = torch.tensor([len(bins)], device=self.accelerator.device)
            wanted = int(self.accelerator.gather(count).max())
            batch = batch + [{**batch[0], "weight": 0.0}] * (wanted - len(batch))
            bins = split(wanted)
        for indices in bins:
            pairs = [batch[i] for i in indices]
            yield packing.pack(pairs, sharing) if self.packed else packing.pad(pairs), pairs

    def _logps(self, model, microbatch: packing.Microbatch):
        """Summed log-probabilities and lengths, [2 * pairs]: chosen and rejected in turn."""
        device, count = self.accelerator.device, 2 * microbatch.pairs
        inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in microbatch.inputs.items()}
        rows, targets = microbatch.rows.to(device), microbatch.targets.to(device)
        owner = microbatch.owner.to(device)
        logps = model(**inputs, rows=rows, targets=targets)
        sums = torch.zeros(count, device=device).index_add(0, owner, logps)
        return sums, torch.bincount(owner, minlength=count)

    def _attention(self):
        if not self.packed:
            return nullcontext()
        return packing.packed(_inner(self.accelerator.unwrap_model(self.model)))

    # ------------------------------------------------------------------ a step

    def training_step(self, model, batch, num_items_in_batch=None):
        """Forward and backward of all microbatches of a step; returns the mean loss, detached.

        The gradient is that of the mean over the pairs of the step (SFT: over their tokens), over
        all processes, however they are packed.
        """
        model.train()
        microbatches = list(self._microbatches(list(batch)))
        real = [p for _, group in microbatches for p in group if p.get("weight", 1.0)]
        tokens = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in real)
        count = tokens if self.algorithm == "sft" else len(real)
        total = self._over_processes([count])[0]
        share = self.accelerator.num_processes / total  # gradients are averaged over processes
        summed = torch.zeros(7, device=self.accelerator.device)
        with self._attention():
            for k, (microbatch, group) in enumerate(microbatches):
                last = k == len(microbatches) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)
                plain = last or self.sharded  # else whole gradients would stand on every GPU
                with nullcontext() if plain else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss, metrics = self._loss(model, microbatch, group)
                    self.accelerator.backward(loss * share)
                summed += metrics
        prompts = (1 if self.algorithm == "sft" else 2) * sum(len(p["prompt_ids"]) for p in real)
        fed, rows = (
            sum(values) for values in zip(*((m.fed, len(m.rows)) for m, _ in microbatches))
        )
        counts = [prompts + tokens, fed, rows, tokens, len(microbatches)]
        seen = self._over_processes([*summed.tolist(), len(real), *counts])
        self._note(seen[:7], seen[7], total, seen[8:])
        return torch.tensor(seen[0] / total, device=self.args.device)

    def _note(self, summed: list[float], pairs: float, total: float, counts: list[float]) -> None:
        """Store what the log shows of a step: see `_loss` and COUNTS. `total` of SFT counts tokens."""
        _, *rewards, of_chosen, of_rejected = summed
        shown = {"tokens/chosen": of_chosen / pairs}
        if self.algorithm != "sft":
            names = ("chosen", "rejected", "margins", "accuracies")
            shown |= {f"rewards/{name}": value / total for name, value in zip(names, rewards)}
            shown["tokens/rejected"] = of_rejected / pairs
        self.counts = dict(zip(COUNTS, map(int, counts)))
        self.store_metrics(shown | {key: float(value) for key, value in self.counts.items()})

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
            weight_of_odds = self.settings.orpo_lambda
            losses = orpo_loss(chosen, of_chosen, rejected, of_rejected, weight_of_odds)
            better = weight_of_odds * chosen.detach() / of_chosen
            worse = weight_of_odds * rejected.detach() / of_rejected
        else:
            losses, better, worse = self.cpo_loss(chosen / of_chosen, rejected / of_rejected)
        each = (losses.detach(), better, worse, better - worse, better > worse)
        kept = [(value * weight).sum() for value in (*each, of_chosen, of_rejected)]
        return (losses * weight).sum(), torch.stack([value.float() for value in kept])

    def _over_processes(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    # ------------------------------------------------------------------ before the first step

    @contextmanager
    def _quiet(self):
        """The model in evaluation mode and without gradients, then as it was."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(training)

    def _check_scoring(self) -> None:
        """Compare with the model's own logits on a few tokens: an architecture may do more to its
        attention or its logits than is known here. Falls back to padding, or refuses."""
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        few = [{key: row[key][:12] for key in keys} for row in self.train_dataset[:2]]
        model = _inner(self.model)
        with self._quiet():
            truth = self._answers_by_logits(few)
            if not truth.isfinite().all():  # broken weights: the first step will say so
                return
            self.packed, reason = True, self._error(few, truth)
            if reason is None:
                return
            self.packed, self.packing_reason = False, f"packed: off by {reason}"
            reason = self._error(few, truth)
        if reason is not None:
            raise TrainingFailed(
                f"{type(model).__name__} computes its logits in a way that is not known here "
                f"(off by {reason} a token). Take another base model."
            )

    def _answers_by_logits(self, rows: list[dict]):
        """Summed log-probability of each answer by the model's own logits, one at a time."""
        found = []
        for row in rows:
            for answer in filter(None, (row["chosen_ids"], row["rejected_ids"])):
                ids = torch.tensor([row["prompt_ids"] + answer], device=_inner(self.model).device)
                logits = self.model(input_ids=ids).logits[0].float()
                scores = logits[-len(answer) - 1 : -1].log_softmax(-1)
                found.append(scores.gather(1, ids[0, -len(answer) :, None]).sum())
        return torch.stack(found)

    def _error(self, rows: list[dict], truth) -> str | None:
        """How far off `_logps` is a token, or its error; None if it is right up to rounding."""
        model = _inner(self.model)
        close = 1e-3 if model.dtype == torch.float32 else 0.1
        try:
            made = (
                packing.pack(rows, self.settings.share_prompt) if self.packed else packing.pad(rows)
            )
            with self._attention():
                sums, lengths = self._logps(self.model, made)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        off = ((sums[lengths > 0] - truth).abs().sum() / lengths.sum()).item()
        return None if off < close else str(off)

    def _add_reference(self) -> None:
        """DPO compares with the model before training: its log-probabilities, once for all pairs."""
        if self.sharded:
            raise TrainingFailed(
                "training.algorithm=dpo does not run under FSDP or ZeRO-3 here: its reference is "
                "computed before the model is spread. Take simpo or orpo, or one GPU."
            )
        rows = list(self.train_dataset)
        with self._quiet(), self._attention(), self.accelerator.autocast():
            for start in range(0, len(rows), self.settings.batch_size):
                batch = rows[start : start + self.settings.batch_size]
                for microbatch, group in self._microbatches(batch):
                    sums, _ = self._logps(self.model, microbatch)
                    for pair, reference in zip(group, sums.view(-1, 2).tolist()):
                        pair["reference"] = reference

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
