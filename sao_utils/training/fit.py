"""Stage 5: training (SAO, Algorithm 1, step 6): SimPO, DPO or ORPO on pairs, and the SFT control.

With LoRA on plain or 4-bit weights (QLoRA), or of all weights; on one machine or under
`accelerate launch`. What is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sao_utils.engines import loading as engines
from sao_utils.engines.base import context_limit, escape_special_tokens, special_tokens
from sao_utils.engines.loading import load_model, load_tokenizer, model_folder, model_name
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.recipe import Arm, Model, Training
from sao_utils.store import Run, read_rows, row_id, write_whole
from sao_utils.training.losses import TrainingFailed
from sao_utils.training.shapes import CHECKPOINT_ABOVE, shape_of

Algorithm = Literal["simpo", "dpo", "orpo", "sft"]

#: trl's name of a logged value -> the name in a row of log.jsonl.
LOG_KEYS = {
    "loss": "loss",
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens/chosen": "chosen_tokens",
    "tokens/rejected": "rejected_tokens",
    "real_tokens": "real_tokens",
    "padded_tokens": "padded_tokens",
    "head_rows": "head_rows",
    "completion_tokens": "completion_tokens",
    "microbatches": "microbatches",
}
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
PROBE_TOKENS = 128  # at most, of an answer to a probe prompt


# ---------------------------------------------------------------------------- the stage


def fit(
    model: Model,
    pairs: list[dict],
    settings: Training,
    algorithm: Algorithm,
    seed: int,
    folder: Path,
    watch: Callable[[list[dict]], None] | None = None,
) -> Path:
    """Train on pairs and save what was learned, unless the same is there already.

    done.json is written last and holds a hash of all that made the adapter. A training that was
    killed goes on from its last whole checkpoint if that hash is the same, else it begins anew.

    Args:
        pairs: rows with "id", "prompt", "chosen", "rejected" (messages); SFT reads no "rejected".
        watch: called with all rows of the log after every step.

    Returns:
        `folder`, with the weights (an adapter, or a whole model), log.jsonl (a row a step),
        probe.jsonl and done.json.

    Raises:
        ValueError: no pairs, or one that cannot be trained on; the message names it.
        TrainingFailed: the loss or the gradient is no number any more, or the disk is full.
    """
    if not pairs:
        raise ValueError("There are no pairs to train on. The funnel tells why none are left.")
    fingerprint = _fingerprint(model, pairs, settings, algorithm, seed)
    if (_read_done(folder) or {}).get("fingerprint") == fingerprint:
        return folder
    checkpoint = _checkpoint(folder, fingerprint)
    started = time.time()
    with warnings.catch_warnings():  # trl 1.16 uses names that transformers 5.23 renames
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*_checkpointing")
        trainer = make_trainer(model, pairs, settings, algorithm, seed, folder, watch)
        if checkpoint:
            print(f"Training {folder.name}: going on from {checkpoint.name}", flush=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    try:
        _save(trainer, model, settings, folder)
    except OSError as error:
        told = f"The trained weights could not be written ({error}). Free some disk, run again."
        raise TrainingFailed(told) from error
    steps = trainer.state.global_step
    del trainer
    _free_memory()
    if _main_process():
        log = read_rows(folder / "log.jsonl")
        done = {
            "fingerprint": fingerprint,
            "algorithm": algorithm,
            "seed": seed,
            "seconds": round(sum(row["seconds"] for row in log), 1),
            "pairs": len(pairs),
            "steps": steps,
            "tokens": sum(row["real_tokens"] for row in log),
        }
        write_whole(folder / "done.json", json.dumps(done))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"Trained {folder.name} in {time.time() - started:.0f} s", flush=True)
    _wait_for_all()
    return folder


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _wait_for_all() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The last whole checkpoint of the same training; clears away what belongs to another one."""
    place = folder / "checkpoints"
    mark = place / "fingerprint"
    found = None
    if mark.exists() and mark.read_text(encoding="utf-8") == fingerprint:
        whole = [path.parent for path in place.glob("checkpoint-*/complete")]
        found = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    _wait_for_all()
    if _main_process():
        for left in folder.glob("*"):  # of a finished one: an adapter and a whole model differ
            if left.is_file() and left.suffix != ".jsonl":
                left.unlink()
        if found is None:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint, encoding="utf-8")
        step = int(found.name.rpartition("-")[2]) if found else 0
        for name in ("log.jsonl", "probe.jsonl"):  # what came after the checkpoint comes again
            rows = [row for row in read_rows(folder / name) if found and row["step"] <= step]
            write_whole(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    _wait_for_all()
    return found


def _save(trainer, model: Model, settings: Training, folder: Path) -> None:
    """The adapter, or with method=full the whole model, as safetensors."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if settings.method == "lora":
        policy.peft_config["default"].base_model_name_or_path = model_folder(model.path)
    if trainer.sharded:  # gathers what is spread over the processes
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
    elif _main_process() and settings.method == "lora":
        # Embeddings are not trained; left on "auto", peft would ask the hub if they were resized.
        policy.save_pretrained(str(folder), save_embedding_layers=False)
    elif _main_process():
        policy.save_pretrained(str(folder))
        trainer.processing_class.save_pretrained(str(folder))
    _wait_for_all()
    (folder / "README.md").unlink(missing_ok=True)  # peft's card is an empty form


def merge(run: Run, arm: Arm, seed: int, folder: Path) -> Path:
    """Write base + adapter as one model in 16 bit: float16 if model.dtype says so, else bfloat16.

    Nothing else uses it: what is evaluated is base + adapter. Merging into 4-bit weights would be off
    by a tenth, so it is never done.

    Raises:
        ValueError: the adapter is not trained, or all weights were (then there is nothing to merge).
    """
    import torch
    from peft import PeftModel

    adapter = run.folder / "adapters" / f"{arm}-{seed}"
    if not (adapter / "done.json").exists():
        raise ValueError(f"{arm}-{seed} of the run '{run.folder.name}' is not trained yet.")
    if not (adapter / WEIGHTS[0]).exists():
        raise ValueError(f"{arm}-{seed} is a whole model already: {adapter}")
    model = run.recipe.model
    dtype = torch.float16 if model.dtype == "float16" else torch.bfloat16
    # Added up in float32 and rounded once.
    base = load_model(model.model_copy(update={"dtype": "float32", "quantisation": "none"}))
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.to(dtype).save_pretrained(str(folder))
    load_tokenizer(model).save_pretrained(str(folder))
    return folder


def own_engine(run: Run) -> engines.Engine:
    """The base model in this process, with a `model` and `device` to look into.

    Where the recipe generates by another engine (vLLM, Ray), in 4 bit if training is.
    """
    model, quantisation = run.recipe.model, run.recipe.training.quantisation
    changes = {"workers": 0}
    if model.engine != "transformers":
        changes |= {"engine": "transformers", "url": None, "quantisation": quantisation}
    return load_engine(model.model_copy(update=changes))


def pair_logps(run: Run, pairs: list[dict]) -> list[dict]:
    """What the base model gives the answers of pairs: SimPO's and DPO's raw material.

    Returns:
        A row a pair: {logp_chosen, len_chosen, logp_rejected, len_rejected}; sums in nats, tokens.
    """
    import torch

    from sao_utils.training import packing
    from sao_utils.training.trainer import answer_logps

    engine, found = own_engine(run), []
    limit = run.recipe.training.token_budget
    rows = token_rows(pairs, engine.tokenizer, run.recipe.training.algorithm)
    longest = [
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows
    ]
    for indices in packing.plan_padded(longest, limit):
        made = packing.pad([rows[i] for i in indices])
        at, targets, owner = (x.to(engine.device) for x in (made.rows, made.targets, made.owner))
        inputs = {k: v.to(engine.device) for k, v in made.inputs.items()}
        with torch.inference_mode():
            logps = answer_logps(engine.model, at, targets, **inputs)
            sums = torch.zeros(2 * made.pairs, device=logps.device).index_add(0, owner, logps)
        for i, (chosen, rejected) in zip(indices, sums.view(-1, 2).tolist()):
            row = {"logp_chosen": chosen, "len_chosen": len(rows[i]["chosen_ids"])}
            row |= {"logp_rejected": rejected, "len_rejected": len(rows[i]["rejected_ids"])}
            found.append((i, row))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _fingerprint(model: Model, pairs: list[dict], settings: Training, algorithm, seed) -> str:
    """A hash of what determines the weights, but for rounding: settings of other algorithms, of
    memory and of the probe do not count, so they can be changed between a kill and going on."""
    own = {
        "simpo": {"beta", "gamma", "learning_rate"},
        "dpo": {"dpo_beta", "learning_rate"},
        "orpo": {"orpo_lambda", "learning_rate"},
        "sft": {"sft_learning_rate"},
    }
    if settings.method == "full":
        lora = {"lora_rank", "lora_alpha", "lora_dropout"}
    else:
        lora = set()
    others = set().union(*own.values()) - own[algorithm] | lora
    others |= {"algorithm", "checkpoint_minutes", "probe_steps", "probe_prompts"}
    others |= {"token_budget", "share_prompt", "gradient_checkpointing"}  # time and memory only
    kept = settings.model_dump(mode="json", exclude=others)
    ids = [row["id"] for row in pairs]
    return row_id(ids, kept, model_name(model), model.dtype, algorithm, seed)


def _read_done(folder: Path) -> dict | None:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _free_memory() -> None:
    """Give the GPU's memory back: an engine that stays loaded leaves no room for training."""
    import torch

    if torch.cuda.is_available():
        unload_engines()
        gc.collect()
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------- tokens


def encode(pair: dict, side: Literal["chosen", "rejected"], tokenizer, limit: float = math.inf):
    """Token ids and labels of a prompt with one of its answers.

    The prompt is templated as in generation. The answer ends in exactly one end token, the one that
    closes the turn: what a template puts after it ("<|im_end|>\\n") is cut off, and where a template
    puts none the tokenizer's eos is added.

    Args:
        limit: the most tokens that the model takes.

    Returns:
        ids, labels: lists of the same length; labels are -100 on the prompt.

    Raises:
        ValueError: an empty or over-long answer, or not one end token; the message names the pair.
    """
    where = f"Pair {pair['id']}, {side} answer"
    if not all(message["content"].strip() for message in pair[side]):
        raise ValueError(f"{where}: it is empty. Discard such pairs before training.")
    eos = tokenizer.eos_token
    chat = escape_special_tokens(pair["prompt"] + pair[side], tokenizer)
    asked = chat[: len(pair["prompt"])]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    head, found, tail = text.rpartition(eos)
    # Gemma closes a turn with a token that is not its eos; generation stops there, too.
    closers = {} if found else {text.find(t, len(prompt)): t for t in special_tokens(tokenizer)}
    closers.pop(-1, None)
    where_closed = min(closers, default=len(text))
    end = closers.get(where_closed, eos)
    text = head + eos if found and not tail.strip() else text[:where_closed] + end
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A token may span the seam; it then belongs to the answer.
    start = len(os.path.commonprefix([prompt_ids, ids]))
    if not text.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template writes the prompt differently once there is an answer, so "
            "training would not see what generation sees. Use a model with a plain chat template."
        )
    end_id = tokenizer.convert_tokens_to_ids(end)
    ends = [i for i, token in enumerate(ids[start:]) if token == end_id]
    if ends != [len(ids) - start - 1]:
        raise ValueError(
            f"{where}: {len(ends)} end tokens ({end}) in the templated answer; there must be "
            "exactly one, at its end. Look at the model's chat template."
        )
    if len(ids) > limit:
        raise ValueError(
            f"{where}: {len(ids)} tokens with its prompt, but the model takes {limit}. Lower "
            "pairs.max_tokens: truncation would take the end token away."
        )
    return ids, [-100] * start + ids[start:]


def token_rows(pairs: list[dict], tokenizer, algorithm: Algorithm, limit: float = math.inf):
    """Pairs as rows {id, prompt_ids, chosen_ids, rejected_ids}; SFT has no rejected answer.

    Raises:
        ValueError: a pair that cannot be trained on: see `encode`.
    """
    rows = []
    for pair in pairs:
        ids, labels = encode(pair, "chosen", tokenizer, limit)
        start, rejected = labels.count(-100), []
        if algorithm != "sft":
            rejected, labels = encode(pair, "rejected", tokenizer, limit)
            start = min(start, labels.count(-100))
        row = {"id": pair["id"], "prompt_ids": ids[:start], "chosen_ids": ids[start:]}
        rows.append({**row, "rejected_ids": rejected[start:]})
    return rows


# ---------------------------------------------------------------------------- model and trainer


def precision(model: Model) -> tuple[str, str]:
    """The dtype to train in on this machine, and why: the engines', but float32 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return "float32", "there is no GPU"
    return engines.precision(model)


def load_base(model: Model, settings: Training):
    """The base model for training: plain, or in 4 bit (QLoRA).

    With method=full the weights are float32 and only computed with in fewer bits: a step of a
    learning rate of 1e-6 is too small for a 16-bit weight to move at all.
    """
    import torch

    dtype, why = precision(model)
    print(f"Computing in {dtype}: {why}", flush=True)
    kept = "float32" if settings.method == "full" else dtype
    changes = {"dtype": kept, "quantisation": settings.quantisation}
    spread = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    left_to_trainer = spread and settings.quantisation == "none"
    return load_model(model.model_copy(update=changes), None if left_to_trainer else device)


def needs_checkpointing(
    config, tokens: int, free: int | None, full: bool = False
) -> tuple[bool, str]:
    """Whether activations must be computed twice (gradient checkpointing) to fit, and why.

    The same estimate as `sao plan` makes: `Shape.kept_bytes`.

    Args:
        config: of the model (transformers).
        tokens: of the longest microbatch.
        free: bytes of GPU memory that are free with the model loaded; None without a GPU.
        full: all weights are trained.
    """
    if free is None:
        return False, "there is no GPU"
    shape = shape_of(config)
    need = shape.kept_bytes(full) * shape.layers * tokens
    words = f"activations need about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return need > CHECKPOINT_ABOVE * free, words


def make_trainer(model: Model, pairs, settings: Training, algorithm, seed, folder, watch=None):
    """The trainer with model, data and every setting in place; `.train()` runs it."""
    import torch
    from transformers import AutoConfig, set_seed

    tokenizer = load_tokenizer(model)
    config = AutoConfig.from_pretrained(model_folder(model.path), revision=model.revision)
    # Before the weights: faults show at once.
    rows = token_rows(pairs, tokenizer, algorithm, context_limit(config))
    _free_memory()
    policy = load_base(model, settings)
    set_seed(seed)
    if settings.method == "lora":
        policy = add_adapter(policy, settings)
    chats = list({pair["prompt"][0]["content"]: pair["prompt"] for pair in pairs}.values())
    watcher = _watch(folder, settings, tokenizer, chats[: settings.probe_prompts], watch)
    dtype = precision(model)[0]
    arguments = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    trainer = pair_trainer(
        policy, tokenizer, rows, settings, algorithm, seed, folder, callbacks=[watcher], **arguments
    )
    if trainer.accelerator.num_processes > 1 and _main_process():
        kind = trainer.accelerator.distributed_type.value
        print(f"{trainer.accelerator.num_processes} processes, {kind}", flush=True)
    if trainer.packing_reason:
        print(f"Padding instead of packing; {trainer.packing_reason}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trainer


def add_adapter(base, settings: Training):
    """A LoRA adapter in float32 on all linear layers of a model but its output head."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    return get_peft_model(base, lora)


def pair_trainer(
    policy, tokenizer, rows, settings: Training, algorithm, seed, folder, callbacks=(), **arguments
):
    """The trainer of a loaded model on rows of token ids (see `token_rows`).

    Args:
        policy: a causal language model of transformers, or peft's wrapping of one.
        tokenizer: is saved beside whole models; None will do for a benchmark.
        arguments: further ones of transformers' TrainingArguments.
    """
    from dataclasses import fields
    from types import SimpleNamespace

    import torch
    from transformers import PrinterCallback

    from sao_utils.training import packing
    from sao_utils.training.trainer import Config, PairTrainer

    cuda = torch.cuda.is_available() and not arguments.get("use_cpu")
    longest = max(packing.cost(row, settings.share_prompt) for row in rows)
    tokens, free = max(settings.token_budget, longest), None
    if cuda:
        # A trained weight still wants its gradient, Adam's two moments and a 16-bit copy.
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        free = max(0, torch.cuda.mem_get_info()[0] - 14 * trained)
    config = policy.config.get_text_config()
    twice, why = needs_checkpointing(config, tokens, free, settings.method == "full")
    if settings.gradient_checkpointing != "auto":
        twice = settings.gradient_checkpointing == "on"
        why = "training.gradient_checkpointing says so"
    if twice:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cuda:
        print(f"Gradient checkpointing {'on' if twice else 'off'}: {why}", flush=True)
    rate = settings.sft_learning_rate if algorithm == "sft" else settings.learning_rate
    beta = settings.dpo_beta if algorithm == "dpo" else settings.beta
    optimiser = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}
    known = {field.name for field in fields(Config)}
    off = [name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known]
    settings_of_trl = dict(
        output_dir=str(Path(folder) / "checkpoints"),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,  # one batch is a whole step: see PairTrainer
        learning_rate=rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,  # a number below 1 is a share of the steps
        max_grad_norm=settings.max_grad_norm,
        optim=optimiser[settings.optimiser],
        use_cpu=not cuda,
        bf16=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default a NaN is hidden in a mean of earlier losses
        save_strategy="no",  # by time instead: see _watch
        save_total_limit=2,  # while one is written, the one before is whole
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        max_length=longest,
        **{off[0]: False},  # done above: without the reentrant kind, which asks for more
        # None of these three is trl's default: 1.0 (a hidden NLL term), 0.1 and 0.5.
        cpo_alpha=0.0,
        beta=beta,
        simpo_gamma=settings.gamma,
        loss_type="sigmoid" if algorithm == "dpo" else "simpo",
        disable_dropout=False,
    )
    stand_in = SimpleNamespace(pad_token="", pad_token_id=0, save_pretrained=lambda *_, **__: None)
    trainer = PairTrainer(
        policy,
        tokenizer or stand_in,
        rows,
        settings,
        algorithm,
        Config(**settings_of_trl | arguments),
        callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _watch(folder: Path, settings: Training, tokenizer, chats: list[list[dict]], watch=None):
    """A callback that logs, saves by the clock, probes, and stops training that has broken down."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.saved = time.time()
            self.first = state.global_step + 1

        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 0:
                self._probe(state, model)
            self.began = time.time()

        def on_step_end(self, args, state, control, **_):
            self.seconds = time.time() - self.began
            second = min(self.first + 1, state.max_steps)
            if state.global_step == second and _main_process():  # the first is slower than the rest
                left = self.seconds * (state.max_steps - state.global_step)
                guess = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
                print(f"Training {folder.name}: {state.max_steps} steps, about {guess}", flush=True)
            due = time.time() - self.saved > 60 * settings.checkpoint_minutes
            if _agreed(due) and state.global_step < state.max_steps:
                control.should_save = True

        def on_save(self, args, state, control, **_):
            self.saved = time.time()

        def on_log(self, args, state, control, logs=None, model=None, **_):
            if "loss" not in logs:  # the summary at the end
                return
            for key, name in (("loss", "loss"), ("grad_norm", "gradient")):
                value = logs.get(key, 0.0)
                # With float16 a gradient may overflow: the scaler skips that step and goes on.
                if not math.isfinite(value) and not (args.fp16 and key == "grad_norm"):
                    kept = _kept(folder)
                    raise TrainingFailed(
                        f"Training stopped at step {state.global_step} of {state.max_steps}: the "
                        f"{name} is {value}. No adapter was saved.{kept} {advice(args, state)}"
                    )
            if not _main_process():
                return
            row = {"step": state.global_step, **{to: logs.get(of) for of, to in LOG_KEYS.items()}}
            row |= {key: int(row[key]) for key in list(LOG_KEYS.values())[-5:]}
            if not math.isfinite(row["grad_norm"] or 0.0):
                row["grad_norm"] = None  # a step that float16 skipped; Infinity is no JSON
            row["seconds"] = round(self.seconds, 4)
            _append(folder / "log.jsonl", [row])
            self._probe(state, model)
            if watch:
                watch(read_rows(folder / "log.jsonl"))

        def _probe(self, state, model):
            every = settings.probe_steps
            spread = int(os.environ.get("WORLD_SIZE", "1")) > 1
            due = every and (state.global_step % every == 0 or state.global_step == state.max_steps)
            if due and not spread and model is not None:
                rows = [
                    {"step": state.global_step, **row} for row in probe(model, tokenizer, chats)
                ]
                _append(folder / "probe.jsonl", rows)

    def advice(args, state) -> str:
        if state.global_step == 1:  # nothing has been learned yet
            return (
                "This was the first step, so the base model itself gives no numbers: check its "
                "weights, or try another model.dtype (float16 overflows easily)."
            )
        return (
            f"Try a lower learning rate (it is {args.learning_rate:g}), a longer warm-up "
            "(training.warmup_ratio) or a smaller training.max_grad_norm."
        )

    return Watch()


def _kept(folder: Path) -> str:
    steps = [int(p.parent.name[11:]) for p in folder.glob("checkpoints/checkpoint-*/complete")]
    return f" The checkpoint of step {max(steps)} is kept." if steps else ""


def _agreed(flag: bool) -> bool:
    """The first process's word, for all processes: their clocks differ."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return flag
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([flag])[0]


def _append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def probe(model, tokenizer, chats: list[list[dict]]) -> list[dict]:
    """Let the model in training answer a few prompts greedily, to see whether it degenerates.

    Returns:
        A row a prompt: {prompt, text, tokens, finished, empty, repetition}; repetition is the share
        of the answer's sentences that stood in it before, 0 to 1.
    """
    import torch
    from transformers import GenerationConfig

    limit = PROBE_TOKENS
    chats = [escape_special_tokens(chat, tokenizer) for chat in chats]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    # A model may bring a repetition penalty along, which would hide what is looked for.
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(stops),
    )
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config  # `generate` takes up what is not set from there
    try:
        with torch.inference_mode():
            out = model.generate(**batch, generation_config=config)
    finally:
        model.generation_config = own
    model.train(training)
    rows = []
    for chat, reply in zip(chats, out[:, batch["input_ids"].shape[1] :].tolist()):
        ends = [k for k, token in enumerate(reply) if token in stops]
        text = tokenizer.decode(reply[: ends[0]] if ends else reply, skip_special_tokens=True)
        row = {"prompt": chat[0]["content"], "text": text.strip()}
        row |= {"tokens": ends[0] if ends else len(reply), "finished": bool(ends)}
        rows.append({**row, "empty": not text.strip(), "repetition": repetition(text)})
    return rows


def repetition(text: str) -> float:
    """The share of a text's sentences that stood in it before, 0 to 1."""
    sentences = [part.strip().lower() for part in re.split(r"[.!?\n]+", text) if part.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
