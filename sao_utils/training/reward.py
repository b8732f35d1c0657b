"""A small reward model, trained by trl's RewardTrainer on pairs whose better answer is known.

SynPO's scorers, PairRM and ArmoRM, are reward models trained by others on human preferences (arXiv
2410.06961, section 3.1). In the tiny world the oracle stands in for the humans. The settings are ours.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from sao_utils.disk import write_whole
from sao_utils.engines.loading import load_tokenizer, model_folder, model_name
from sao_utils.recipe import Model
from sao_utils.store import row_id
from sao_utils.training.fit import alone, read_done

SETTINGS = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 32}


def fit_reward(base: Model, pairs: list[dict], seed: int, folder: Path) -> Path:
    """Train a reward model from a language model, unless the same one is already there.

    The loss is Bradley and Terry's, so the difference of two rewards is the log-odds, in nats, that the
    first answer is better. Training runs on the CPU, and the same seed gives the same weights. done.json
    is written last; a training that was killed starts over.

    Args:
        base: a small model on this machine, such as the tiny one; all its weights are trained.
        pairs: rows with "prompt", "chosen", "rejected" (messages).

    Returns:
        `folder`, with a sequence classifier of one output (safetensors) and its tokenizer.

    Raises:
        Busy: another process is training into the folder.
    """
    fingerprint = row_id("reward model", pairs, SETTINGS, model_name(base), seed)
    if (read_done(folder) or {}).get("fingerprint") == fingerprint:
        return folder
    started = time.time()
    with alone(folder):
        (folder / "done.json").unlink(missing_ok=True)
        trainer = _trainer(base, pairs, seed, folder)
        trainer.train()
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        # No seconds: the model's name, and so its scores' ids, hash every .json beside its weights.
        done = {"fingerprint": fingerprint, "seed": seed, "pairs": len(pairs)}
        write_whole(folder / "done.json", json.dumps(done | {"steps": trainer.state.global_step}))
    print(f"Trained {folder.name} in {time.time() - started:.0f} s", flush=True)
    return folder


def _trainer(base: Model, pairs: list[dict], seed: int, folder: Path):
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    from sao_utils.engines.reward import token_ids

    tokenizer = load_tokenizer(base)
    rows = {
        f"{side}_ids": token_ids([row["prompt"] + row[side] for row in pairs], tokenizer)
        for side in ("chosen", "rejected")
    }
    arguments = RewardConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a number below 1 is a share of the steps
        max_length=None,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        model_init_kwargs={"device_map": None, "dtype": "float32", "use_safetensors": True},
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **SETTINGS,
    )
    path, data = model_folder(base.path), Dataset.from_dict(rows)
    trainer = RewardTrainer(path, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer
