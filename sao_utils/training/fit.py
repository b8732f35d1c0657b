"""Training (SAO, Algorithm 1, step 6): pairs in, a folder with an adapter or a model out.

SimPO, DPO, ORPO or SFT; LoRA on plain or 4-bit weights (QLoRA), or full fine-tuning; in one process or
under `accelerate launch`. A training that is killed resumes from its last checkpoint.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

from sao_utils.disk import json_lines, turn, write_whole
from sao_utils.engines.loading import model_folder, model_name
from sao_utils.engines.registry import free_gpu
from sao_utils.recipe import SFT, Model, Training
from sao_utils.store import read_rows, row_id
from sao_utils.training import TrainingFailed
from sao_utils.training.processes import is_main, wait_for_all

Algorithm = Literal["simpo", "dpo", "orpo", "sft"]
#: Settings that only one algorithm reads.
OF_ALGORITHM = {
    "simpo": {"beta", "gamma", "learning_rate"},
    "dpo": {"dpo_beta", "learning_rate"},
    "orpo": {"orpo_lambda", "learning_rate"},
    "sft": {"sft_learning_rate"},
}
#: Settings of time, memory and reporting: they change the weights by rounding at most.
NEUTRAL = {
    "algorithm",
    "checkpoint_minutes",
    "gradient_checkpointing",
    "probe_prompts",
    "probe_steps",
    "report_to",
    "share_prompt",
    "token_budget",
}


def fit(
    model: Model,
    pairs: list[dict],
    settings: Training,
    algorithm: Algorithm,
    seed: int,
    folder: Path,
    watch: Callable[[list[dict]], None] | None = None,
) -> Path:
    """Train on pairs and save the result, unless the same training is already there.

    done.json is written last and holds a hash of everything that determines the weights. A training that
    was killed resumes from its last complete checkpoint if that hash is the same; otherwise it starts over.

    Args:
        pairs: rows with "id", "prompt", "chosen", "rejected" (messages; SFT does not need the last).
        watch: called with all rows of the log after every step.

    Returns:
        `folder`, with the weights (an adapter, or a whole model), log.jsonl (one row per step),
        probe.jsonl and done.json.

    Raises:
        ValueError: a pair cannot be trained on; the message names it.
        TrainingFailed: there are no pairs, the loss or the gradient is no longer finite, or a
            checkpoint could not be written.
        Busy: another process is training into the folder.
    """
    if not pairs:
        raise TrainingFailed(f"There is nothing to train {folder.name} on: no row is left.")
    # All that determines the weights, apart from rounding: NEUTRAL settings may change.
    ids, used = [row["id"] for row in pairs], settings_used(settings, algorithm)
    fingerprint = row_id(ids, used, model_name(model), model.dtype, algorithm, seed)
    if (read_done(folder) or {}).get("fingerprint") == fingerprint:
        return folder
    with alone(folder) if is_main() else nullcontext():
        checkpoint = _checkpoint(folder, fingerprint)
        started = time.time()
        from sao_utils.training.setup import make_trainer

        trainer = make_trainer(model, pairs, settings, algorithm, seed, folder, watch)
        if checkpoint:
            print(f"Training {folder.name}: going on from {checkpoint.name}", flush=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        _save(trainer, model, settings, folder)
        steps = trainer.state.global_step
        del trainer
        gc.collect()  # a trainer and its callbacks refer to each other
        free_gpu()
        if is_main():
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
        wait_for_all()
    return folder


def alone(folder: Path) -> AbstractContextManager:
    """Keeps other processes from training into a folder, with a lock file beside it. Raises `Busy`."""
    return turn(folder.with_name(f".{folder.name}.lock"), folder, wait=False)


def sft_settings(settings: Training, how: SFT) -> Training:
    """A run's training settings, overridden for a separate SFT (`how`), and without probes."""
    changes = {
        "method": how.method,
        "sft_learning_rate": how.learning_rate,
        "epochs": how.epochs,
        "batch_size": how.batch_size,
        "probe_steps": 0,
    }
    return settings.model_copy(update=changes)


def read_done(folder: Path) -> dict | None:
    """The record of a finished training: {fingerprint, algorithm, seed, seconds, pairs, steps, tokens}.

    None if there is no finished training in the folder.
    """
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def settings_used(settings: Training, algorithm: Algorithm) -> dict:
    """The settings that affect a training: not those of other algorithms, nor LoRA's with method=full."""
    others = set().union(*OF_ALGORITHM.values()) - OF_ALGORITHM[algorithm] | NEUTRAL
    if settings.method == "full":
        others |= {"lora_rank", "lora_alpha", "lora_dropout"}
    return settings.model_dump(mode="json", exclude=others)


def _checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The last complete checkpoint of the same training; deletes what belongs to a different one."""
    place = folder / "checkpoints"
    mark = place / "fingerprint"
    found = None
    if mark.exists() and mark.read_text(encoding="utf-8") == fingerprint:
        whole = [path.parent for path in place.glob("checkpoint-*/complete")]
        found = max(whole, key=_step, default=None)
    wait_for_all()
    if is_main():
        for left in folder.glob("*"):  # an earlier result: an adapter's files differ from a model's
            if left.is_file() and left.suffix != ".jsonl":
                left.unlink()
        if found is None:
            shutil.rmtree(place, ignore_errors=True)
        write_whole(mark, fingerprint)
        for name in ("log.jsonl", "probe.jsonl"):  # steps after the checkpoint are repeated
            rows = read_rows(folder / name) if found else []
            kept = [row for row in rows if row["step"] <= _step(found)]
            write_whole(folder / name, json_lines(kept))
    wait_for_all()
    return found


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _save(trainer, model: Model, settings: Training, folder: Path) -> None:
    """Save the adapter, or with method=full the whole model, as safetensors."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if settings.method == "lora":
        policy.peft_config["default"].base_model_name_or_path = model_folder(model.path)
    if trainer.sharded:  # gathers the weights from the processes
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
    elif is_main() and settings.method == "lora":
        # Embeddings are not trained; with "auto", peft would ask the hub whether they were resized.
        policy.save_pretrained(str(folder), save_embedding_layers=False)
    elif is_main():
        policy.save_pretrained(str(folder))
        trainer.processing_class.save_pretrained(str(folder))
    wait_for_all()
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty template
