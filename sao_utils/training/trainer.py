"""The trainer: transformers' loop, with packed batches and chunked log-probabilities.

Kept from transformers: optimiser, schedule, checkpoints, mixed precision, FSDP.
Replaced: a batch is a whole optimiser step, packed up to a budget of tokens instead of padded, and
log-probabilities are computed for the answers' tokens only, in chunks. The tests compare losses and
gradients with trl's trainers.

Importing this module takes seconds, so `fit` does it only when it trains.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer

from sao_utils.training import TrainingFailed, packing
from sao_utils.training.losses import dpo_loss, orpo_loss, simpo_loss, token_logps
from sao_utils.training.watch import COUNTS, MEASURES


class _Steps:
    """Batch sampler: for every optimiser step, the indices of this process's pairs.

    The order depends only on seed and epoch, not on the number of processes. A process that gets no
    pair in the last step gets index `pairs`, the row with weight 0, since it must take part in the
    communication.
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
            yield step[self.rank :: self.world] or [self.pairs]


def answer_logps(model, rows, targets, **inputs):
    """Log-probabilities of the targets, [N] float32, under a causal language model of transformers.

    Args:
        rows: [N], positions in the flattened batch that predict the targets [N].
        inputs: keyword arguments of the model's backbone.
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings().weight
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    picked = hidden.reshape(-1, hidden.shape[-1])[rows].to(head.device)
    return token_logps(picked, head, targets, softcap)


def _full_logps(model, rows, targets, **inputs):
    """The same as `answer_logps`, from the model's own full logits."""
    logits = model(**inputs).logits.flatten(0, 1)[rows]
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def summed_logps(score, microbatch: packing.Microbatch, device):
    """Summed log-probability and length of each answer, [2 * pairs], chosen and rejected alternating.

    Args:
        score: takes rows, targets and the inputs of a microbatch, as `answer_logps` does.
    """
    inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in microbatch.inputs.items()}
    rows, targets = microbatch.rows.to(device), microbatch.targets.to(device)
    owner, count = microbatch.owner.to(device), 2 * microbatch.pairs
    logps = score(**inputs, rows=rows, targets=targets)
    sums = torch.zeros(count, device=device).index_add(0, owner, logps)
    return sums, torch.bincount(owner, minlength=count)


def _inner(policy):
    return policy.get_base_model() if hasattr(policy, "peft_config") else policy


def add_scoring(policy) -> None:
    """Let `policy(rows=..., targets=..., **inputs)` return `answer_logps`.

    A forward pass must go through the outermost module, to which FSDP and DDP attach their hooks.
    """
    model = _inner(policy)
    original = model.forward

    @wraps(original)
    def forward(*args, rows=None, targets=None, **inputs):
        if rows is None:
            return original(*args, **inputs)
        given = {key: value for key, value in inputs.items() if value is not None}
        return answer_logps(model, rows, targets, **given)

    model.forward = forward


class PairTrainer(Trainer):
    """Trains on pairs {prompt_ids, chosen_ids, rejected_ids}; rejected_ids are empty for SFT.

    A batch is all pairs of an optimiser step; `training_step` splits it into microbatches. `row` holds
    what is logged of the last step: see `watch.MEASURES` and `watch.COUNTS`.
    """

    def __init__(self, policy, tokenizer, rows, settings, algorithm, arguments, callbacks=()):
        self.settings, self.algorithm = settings, algorithm
        self.row = {}
        add_scoring(policy)
        super().__init__(
            model=policy,
            args=arguments,
            train_dataset=[*rows, {**rows[0], "weight": 0.0}],  # see `_Steps`
            processing_class=tokenizer,
            data_collator=list,
            callbacks=list(callbacks),
        )
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.packed, self.packing_reason = True, ""
        self._keep_full_precision()
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
        if policy is not None and plugin.fsdp_version == 2:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32
            )

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self):
        steps = _Steps(
            len(self.train_dataset) - 1,
            self.settings.batch_size,
            self.args.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=list)

    def _microbatches(self, batch: list[dict]):
        """Yields (microbatch, its pairs) for a step."""
        budget, sharing = self.settings.token_budget, self.settings.share_prompt

        def split(at_least=1):
            if self.packed:
                return packing.plan([packing.cost(r, sharing) for r in batch], budget, at_least)
            return packing.plan(list(map(packing.longest, batch)), budget, at_least, padded=True)

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
        return summed_logps(model, microbatch, self.accelerator.device)

    def _attention(self):
        if not self.packed:
            return nullcontext()
        return packing.packed(_inner(self.accelerator.unwrap_model(self.model)))

    # ------------------------------------------------------------------ a step

    def training_step(self, model, batch, num_items_in_batch=None):
        """Forward and backward pass of all microbatches of a step; returns the mean loss, detached.

        The gradient is that of the mean over the step's pairs (SFT: over their tokens) in all
        processes, however they are packed.
        """
        model.train()
        sft = self.algorithm == "sft"
        microbatches = list(self._microbatches(list(batch)))
        real = [p for _, group in microbatches for p in group if p.get("weight", 1.0)]
        answers = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in real)
        total = self._over_processes([answers if sft else len(real)]).item()
        share = self.accelerator.num_processes / total  # gradients are averaged over processes
        summed = torch.zeros(7, device=self.accelerator.device)
        with self._attention():
            for k, (microbatch, group) in enumerate(microbatches):
                last = k == len(microbatches) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)
                plain = last or self.sharded  # FSDP's no_sync keeps whole gradients on each GPU
                with nullcontext() if plain else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss, metrics = self._loss(model, microbatch, group)
                    self.accelerator.backward(loss * share)
                summed += metrics
        prompts = (1 if sft else 2) * sum(len(p["prompt_ids"]) for p in real)
        fed = sum(microbatch.fed for microbatch, _ in microbatches)
        rows = sum(len(microbatch.rows) for microbatch, _ in microbatches)
        counts = [len(real), prompts + answers, fed, rows, answers, len(microbatches)]
        pairs, *counts = self._over_processes(counts).tolist()
        summed = self._over_processes(summed)
        measures = [*(summed[1:5] / total).tolist(), *(summed[5:] / pairs).tolist()]
        self.row = dict(zip(MEASURES, measures)) | dict(zip(COUNTS, map(int, counts)))
        if sft:
            for name in set(MEASURES) - {"chosen_tokens"}:
                del self.row[name]
        return summed[0] / total

    def _loss(self, model, microbatch, group):
        """Summed loss of a microbatch, and [loss, chosen reward, rejected reward, margin, accuracy,
        chosen tokens, rejected tokens], each summed over its pairs."""
        settings = self.settings
        sums, lengths = self._logps(model, microbatch)
        weight = sums.new_tensor([pair.get("weight", 1.0) for pair in group])
        chosen, rejected = sums[0::2], sums[1::2]
        of_chosen, of_rejected = lengths[0::2], lengths[1::2]
        answers = chosen, of_chosen, rejected, of_rejected
        if self.algorithm == "sft":
            losses, better, worse = -chosen, chosen, chosen
        elif self.algorithm == "dpo":
            ref_chosen, ref_rejected = sums.new_tensor([p["reference"] for p in group]).T
            losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, settings.dpo_beta)
            better = settings.dpo_beta * (chosen - ref_chosen)
            worse = settings.dpo_beta * (rejected - ref_rejected)
        elif self.algorithm in ("simpo", "orpo"):
            if self.algorithm == "simpo":
                scale = settings.beta
                losses = simpo_loss(*answers, scale, settings.gamma)
            else:
                scale = settings.orpo_lambda
                losses = orpo_loss(*answers, scale)
            better, worse = scale * (chosen / of_chosen), scale * (rejected / of_rejected)
        else:
            raise ValueError(f"no loss for algorithm={self.algorithm}")
        each = (losses, better, worse, better - worse, better > worse, of_chosen, of_rejected)
        kept = [(value.detach() * weight).sum().float() for value in each]
        return (losses * weight).sum(), torch.stack(kept)

    def _over_processes(self, values):
        """Each value summed over all processes, float32."""
        tensor = torch.as_tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum")

    def log(self, logs, start_time=None):
        super().log(logs | self.row if "loss" in logs else logs, start_time)

    # ------------------------------------------------------------------ before the first step

    @contextmanager
    def _quiet(self):
        """The model in evaluation mode and without gradients; its mode is restored afterwards."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(training)

    def _check_scoring(self) -> None:
        """Compare `_logps` with the model's own logits on a few tokens: an architecture may do more to
        its attention or logits than this trainer knows. Falls back to padding, or else refuses."""
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{key: row[key][:12] for key in keys} for row in self.train_dataset[:2]]
        padded = packing.pad(rows)
        model, error = _inner(self.model), ""
        close = 1e-3 if model.dtype == torch.float32 else 0.1
        with self._quiet():
            device = self.accelerator.device
            truth, lengths = summed_logps(partial(_full_logps, self.model), padded, device)
            if not truth.isfinite().all():  # broken weights: the first step will report it
                return
            for self.packed in (True, False):
                made = packing.pack(rows, self.settings.share_prompt) if self.packed else padded
                self.packing_reason = error
                try:
                    with self._attention():
                        sums, _ = self._logps(self.model, made)
                except (TypeError, ValueError, RuntimeError) as raised:
                    error = f"{type(raised).__name__}: {raised}"
                    continue
                off = ((sums - truth).abs().sum() / lengths.sum()).item()
                if off < close:
                    return
                error = f"off by {off:.2g} a token"
        raise TrainingFailed(
            f"{type(model).__name__} computes its logits in a way that is not known here ({error}). "
            "Take another base model."
        )

    def _add_reference(self) -> None:
        """Add DPO's reference to all pairs, once: log-probabilities under the model before training."""
        if self.sharded:
            raise TrainingFailed(
                "training.algorithm=dpo does not run under FSDP here: its reference is "
                "computed before the model is spread. Take simpo or orpo, or one GPU."
            )
        rows, size = self.train_dataset, self.settings.batch_size
        with self._quiet(), self._attention(), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                for microbatch, group in self._microbatches(rows[start : start + size]):
                    sums, _ = self._logps(self.model, microbatch)
                    for pair, reference in zip(group, sums.view(-1, 2).tolist()):
                        pair["reference"] = reference

    # ------------------------------------------------------------------ the loop's loose ends

    def floating_point_ops(self, inputs) -> int:
        return 0  # an estimate that is not used here, and that needs padded tensors

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / "complete").touch()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingFailed(
                f"Step {step} could not be written to disk ({error}). The last good checkpoint is "
                "kept: free some disk and run the same again, it goes on from there."
            ) from error
