"""Reward models: one number per prompt and response (sequence classification in transformers)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sao_utils.engines.base import Chat, EngineError, escape_special_tokens
from sao_utils.engines.loading import load_encoder, load_tokenizer
from sao_utils.engines.registry import free_gpu
from sao_utils.recipe import Model


def rewards(model: Model, chats: list[Chat]) -> Iterator[list[tuple[int, float | None]]]:
    """The reward of each chat's last message; yields batches of (index of the chat, reward).

    The reward is None where it is not finite, for example where float16 overflows.

    Args:
        model: a sequence classifier with one output, in safetensors and without code of its own.

    Raises:
        EngineError: the model is of another kind; the message says which models work.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    classifier, tokenizer = _load(model), load_tokenizer(model)
    ids = token_ids(chats, tokenizer)
    waiting = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    while waiting:
        # Rows of similar length share a batch, so that little is padded; the longest sets its size.
        longest, batch = len(ids[waiting[-1]]), []
        while waiting and (len(batch) + 1) * longest <= max(model.batch_tokens, longest):
            batch.append(waiting.pop())
        rows = [torch.tensor(ids[k]) for k in batch]
        padded = pad_sequence(rows, True, classifier.config.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        with torch.inference_mode():
            place = classifier.device
            out = classifier(input_ids=padded.to(place), attention_mask=mask.to(place))
        values = out.logits[:, 0].float().tolist()
        yield [(k, value if math.isfinite(value) else None) for k, value in zip(batch, values)]


def token_ids(chats: list[Chat], tokenizer) -> list[list[int]]:
    """Token ids that a reward model reads for each chat, in training and in scoring; special tokens escaped.

    Args:
        tokenizer: from `engines.loading.load_tokenizer`, which passes model.template_options on.
    """
    texts = [
        tokenizer.apply_chat_template(escape_special_tokens(chat, tokenizer), tokenize=False)
        for chat in chats
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _load(model: Model):
    from transformers import AutoModelForSequenceClassification

    advice = (
        "A reward model is a sequence classifier with one output, in safetensors and without code of "
        "its own, such as Skywork/Skywork-Reward-V2-Llama-3.1-8B. ArmoRM and PairRM need code of "
        "their own, which the kit does not run."
    )
    free_gpu()
    classifier, about = load_encoder(AutoModelForSequenceClassification, model, advice)
    if classifier.config.num_labels != 1 or about["missing_keys"] or about["unexpected_keys"]:
        raise EngineError(f"{model.path} is no reward model of the kind that is needed. {advice}")
    if classifier.config.pad_token_id is None:  # for finding the last token before the padding
        classifier.config.pad_token_id = load_tokenizer(model).pad_token_id or 0
    return classifier
