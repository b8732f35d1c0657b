"""Builds the trainer: base model, adapter, and every setting of trl and transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sao_utils.engines import loading
from sao_utils.engines.base import context_limit
from sao_utils.engines.registry import free_gpu
from sao_utils.recipe import Model, RecipeError, Training
from sao_utils.training import memory, packing, processes
from sao_utils.training.encoding import token_rows
from sao_utils.training.shapes import shape_of


def make_trainer(
    model: Model,
    pairs: list[dict],
    settings: Training,
    algorithm: str,
    seed: int,
    folder: Path,
    watch: Callable[[list[dict]], None] | None = None,
):
    """The trainer with model, data and every setting in place; `.train()` runs it.

    If the model has an adapter (or the folder of a fully fine-tuned model), training continues from it.
    """
    from transformers import AutoConfig, set_seed

    from sao_utils.training.watch import Watch

    if model.adapter and settings.method == "full":
        model = model.model_copy(update={"path": model.adapter, "adapter": None})
    tokenizer = loading.load_tokenizer(model)
    config = AutoConfig.from_pretrained(
        loading.model_folder(model.path), revision=model.revision, trust_remote_code=False
    )
    # Before loading the weights, so that faults show at once.
    rows = token_rows(pairs, tokenizer, algorithm, context_limit(config))
    reports = reporters(settings.report_to, folder)
    start = loading.own_adapter(model)
    if start is not None:
        _check_start(start, settings)
    free_gpu()
    policy = load_base(model, settings)
    set_seed(seed)
    if settings.method == "lora":
        policy = add_adapter(policy, settings, start)
    dtype = training_precision(model)[0]
    trainer = pair_trainer(
        policy,
        tokenizer,
        rows,
        settings,
        algorithm,
        seed,
        folder,
        callbacks=[*reports, Watch(folder, settings, tokenizer, pairs, rows, watch)],
        project="sao",
        run_name=f"{folder.parent.parent.name}-{folder.name}",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
    )
    if trainer.accelerator.num_processes > 1 and processes.is_main():
        kind = trainer.accelerator.distributed_type.value
        print(f"{trainer.accelerator.num_processes} processes, {kind}", flush=True)
    if trainer.packing_reason:
        print(f"Padding instead of packing; {trainer.packing_reason}", flush=True)
    return trainer


def reporters(names: Sequence[str], folder: Path) -> list:
    """transformers' callbacks for the services that a training reports to, as a separate run in each.

    Raises:
        RuntimeError: a service's package is not installed (`open_run` reports this earlier).
    """
    from transformers.integrations import get_reporting_integration_callbacks

    made = [of() for of in get_reporting_integration_callbacks(list(names))]
    if "wandb" in names:
        import wandb

        os.environ.setdefault("WANDB_PROJECT", "sao")
        wandb.finish()  # the previous training's run, which its callback leaves open
    for callback in made:
        if getattr(callback, "logging_dir", "") is None:  # else beside checkpoints, and deleted
            callback.logging_dir = str(folder / "tensorboard")
    return made


def training_precision(model: Model) -> tuple[str, str]:
    """The dtype to train in on this machine, the same as the engines', and why.

    Without a GPU it is float32, unless model.dtype=auto: a recipe's dtype for a GPU is not meant for a CPU.
    """
    import torch

    if not torch.cuda.is_available() and model.dtype != "auto":
        return "float32", "there is no GPU"
    return loading.precision(model)


def load_base(model: Model, settings: Training):
    """The base model for training: plain, or in 4 bit (QLoRA).

    With method=full the weights are kept in float32 and only the computation uses fewer bits: at a
    learning rate of 1e-6, a step is too small to change a 16-bit weight at all.
    """
    import torch

    dtype, why = training_precision(model)
    print(f"Computing in {dtype}: {why}", flush=True)
    kept = "float32" if settings.method == "full" else dtype
    changes = {"dtype": kept, "quantisation": settings.quantisation}
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    left_to_trainer = processes.world_size() > 1 and settings.quantisation == "none"
    return loading.load_model(model.model_copy(update=changes), None if left_to_trainer else device)


def add_adapter(base, settings: Training, start: Path | None = None):
    """The model with a float32 LoRA adapter on all its linear layers except the output head.

    Args:
        start: the folder of a trained adapter to continue from; by default the adapter is new.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if start is not None:
        return PeftModel.from_pretrained(base, str(start), is_trainable=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    return get_peft_model(base, lora)


def _check_start(adapter: Path, settings: Training) -> None:
    """Check that the recipe has the LoRA rank and alpha of the adapter that training continues from.

    Raises:
        RecipeError: they differ; the recipe's values would silently have no effect.
    """
    from peft import PeftConfig

    its = PeftConfig.from_pretrained(str(adapter))
    for key, value in (("lora_rank", its.r), ("lora_alpha", its.lora_alpha)):
        if getattr(settings, key) != value:
            raise RecipeError(
                f"training.{key} is {getattr(settings, key)}, but the adapter that the training goes on "
                f"from has {value}, which cannot change ({adapter}). Set training.{key}={value}, or "
                "train from the base (iterations.start=base)."
            )


def pair_trainer(
    policy,
    tokenizer,
    rows: list[dict],
    settings: Training,
    algorithm: str,
    seed: int,
    folder: Path,
    callbacks: Sequence = (),
    **arguments,
):
    """The trainer for a loaded model and rows of token ids (see `token_rows`).

    Args:
        policy: a causal language model of transformers, or peft's wrapper around one.
        tokenizer: saved beside whole models; a benchmark may pass None.
        arguments: further arguments for transformers' TrainingArguments.
    """
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from sao_utils.training.trainer import PairTrainer

    cuda = torch.cuda.is_available() and not arguments.get("use_cpu")
    arguments |= {"use_cpu": not cuda}
    choice = _choose_memory(policy, rows, settings, cuda)
    if choice.twice:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    all_arguments = TrainingArguments(
        output_dir=str(Path(folder) / "checkpoints"),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,  # one batch is a whole step: see PairTrainer
        learning_rate=settings.sft_learning_rate if algorithm == "sft" else settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,  # below 1, a share of the steps
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch" if settings.optimiser == "adamw" else settings.optimiser,
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default a mean of earlier losses would hide a NaN
        save_strategy="no",  # by time instead: see Watch
        save_total_limit=2,  # while one is being written, the previous one is complete
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    trainer = PairTrainer(
        policy,
        tokenizer,
        rows,
        settings.model_copy(update={"token_budget": choice.budget}),
        algorithm,
        all_arguments,
        callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if cuda:
        torch.cuda.empty_cache()
    return trainer


def _choose_memory(policy, rows: list[dict], settings: Training, cuda: bool) -> memory.Choice:
    """Token budget and gradient checkpointing by what is free now; prints what "auto" chose, and why."""
    import psutil
    import torch

    longest = max(packing.cost(row, settings.share_prompt) for row in rows)
    # Still to be allocated for each trained weight: its gradient, Adam's two moments and a 16-bit copy.
    # Weights that are still on the CPU will be moved to the GPU.
    coming = 0
    for weight in policy.parameters():
        coming += 14 * weight.numel() * weight.requires_grad
        coming += weight.nbytes * (cuda and weight.device.type == "cpu")
    if settings.method == "full":
        coming /= processes.world_size()
    if cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available / processes.world_size()
    dtype = "float32" if policy.dtype == torch.float32 and not cuda else "bfloat16"
    device = "cuda" if cuda else "cpu"
    choice = memory.choose(
        shape_of(policy.config), settings, longest, max(0, free - coming), dtype, device
    )
    if "auto" in (settings.token_budget, settings.gradient_checkpointing) and processes.is_main():
        words = f"Token budget {choice.budget:,}, gradient checkpointing "
        print(f"{words}{'on' if choice.twice else 'off'}: {choice.reason}", flush=True)
    return choice
