"""From preference pairs to token ids and labels."""

from __future__ import annotations

import math
import os
from typing import Literal

from sao_utils.engines.base import escape_special_tokens, special_tokens


def encode(
    pair: dict, side: Literal["chosen", "rejected"], tokenizer, limit: float = math.inf
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a prompt with one of its answers.

    The prompt is templated as in generation. The answer ends in exactly one end token, the one that
    closes the turn: what a template puts after it ("<|im_end|>\\n") is cut off, and where a template
    puts none the tokenizer's eos is added.

    Args:
        tokenizer: of `engines.loading.load_tokenizer`, which passes model.template_options on.
        limit: the most tokens that the model takes.

    Returns:
        ids, labels: lists of the same length; labels are -100 on the prompt.

    Raises:
        ValueError: an empty or over-long answer, or not one end token; the message names the pair.
    """
    where = f"Pair {pair['id']}, {side} answer"
    if not all(message["content"].strip() for message in pair[side]):
        raise ValueError(f"{where}: it is empty. Discard such pairs before training.")
    chat = escape_special_tokens(pair["prompt"] + pair[side], tokenizer)
    question = chat[: len(pair["prompt"])]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    if not text.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template writes the prompt differently once there is an answer, so "
            "training would not see what generation sees. Use a model with a plain chat template."
        )
    text, end = _closed(text, len(prompt), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A token may span the seam; it then belongs to the answer.
    start = len(os.path.commonprefix([prompt_ids, ids]))
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


def _closed(text: str, start: int, tokenizer) -> tuple[str, str]:
    """A templated chat up to the token that closes its last turn, and that token."""
    eos = tokenizer.eos_token
    head, found, tail = text.rpartition(eos)
    if found and not tail.strip():
        return head + eos, eos
    if found:  # text after the last eos: the check for one end token refuses it
        return text + eos, eos
    # Gemma closes a turn with a token that is not its eos; generation stops there, too.
    places = {text.find(token, start): token for token in special_tokens(tokenizer)}
    places.pop(-1, None)
    place = min(places, default=len(text))
    end = places.get(place, eos)
    return text[:place] + end, end


def token_rows(pairs: list[dict], tokenizer, algorithm: str, limit: float = math.inf) -> list[dict]:
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
