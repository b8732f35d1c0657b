"""Sentence embeddings: one vector per text, from the encoder of a sentence-embedding model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sao_utils.engines.base import EngineError, context_limit
from sao_utils.engines.loading import load_encoder, model_folder
from sao_utils.engines.registry import free_gpu
from sao_utils.recipe import Model

if TYPE_CHECKING:
    import numpy as np

BATCH = 32  # texts; the models are small


def embeddings(path: str, texts: list[str]) -> np.ndarray:
    """The mean of each text's last hidden states, scaled to length 1. Longer texts are cut to the context.

    Args:
        path: folder or hub name of a model in safetensors and without code of its own.

    Returns:
        [n, d], in the order of the texts.

    Raises:
        EngineError: the model is missing or of another kind; the message says which models work.
    """
    import torch

    encoder, tokenizer = _load(path)
    limit = min(tokenizer.model_max_length, context_limit(encoder.config))
    found = torch.empty(len(texts), encoder.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda k: len(texts[k]))  # so that little is padded
    for start in range(0, len(texts), BATCH):
        batch = by_length[start : start + BATCH]
        inputs = tokenizer(
            [texts[k] for k in batch],
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(encoder.device)
        with torch.inference_mode():
            states = encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None]
        found[batch] = ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu()
    return torch.nn.functional.normalize(found).numpy()


def _load(path: str):
    from transformers import AutoModel, AutoTokenizer

    advice = (
        "prompts.diversity_model is the folder or hub name of a small sentence-embedding model in "
        "safetensors and without code of its own, such as sentence-transformers/all-MiniLM-L6-v2; "
        "null takes TF-IDF vectors, which need no model."
    )
    free_gpu()
    encoder, about = load_encoder(AutoModel, Model(path=path, dtype="float32"), advice)
    # The pooler comes after the last hidden states and is not used; other missing weights would be random.
    if any(not key.startswith("pooler.") for key in about["missing_keys"]):
        raise EngineError(f"{path} lacks weights of its own architecture. {advice}")
    return encoder, AutoTokenizer.from_pretrained(model_folder(path), trust_remote_code=False)
