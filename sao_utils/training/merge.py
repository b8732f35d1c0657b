"""Merges base and adapter into one 16-bit model, on request."""

from __future__ import annotations

from pathlib import Path

from sao_utils.engines.loading import load_model, load_tokenizer
from sao_utils.recipe import Arm
from sao_utils.store import Run
from sao_utils.training.fit import read_done


def merge(run: Run, arm: Arm, seed: int, folder: Path) -> Path:
    """Write base + adapter as one model in 16 bit: float16 if model.dtype says so, else bfloat16.

    Nothing in the kit uses the merged model: evaluation uses base + adapter. Merging into 4-bit weights
    would be off by a tenth, so it is never done.

    Raises:
        ValueError: the adapter is not trained, or all weights were (then there is nothing to merge).
    """
    import torch
    from peft import PeftModel

    adapter = run.folder / "adapters" / f"{arm}-{seed}"
    if not read_done(adapter):
        raise ValueError(f"{arm}-{seed} of the run '{run.folder.name}' is not trained yet.")
    if not (adapter / "adapter_model.safetensors").exists():
        raise ValueError(f"{arm}-{seed} is a whole model already: {adapter}")
    model = run.recipe.model
    dtype = torch.float16 if model.dtype == "float16" else torch.bfloat16
    # Merged in float32, and rounded only once.
    base = load_model(model.model_copy(update={"dtype": "float32", "quantisation": "none"}))
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.to(dtype).save_pretrained(str(folder))
    load_tokenizer(model).save_pretrained(str(folder))
    return folder
