"""From rows of messages to token ids and labels."""

from __future__ import annotations

import math
import os
from typing import Literal

from sao_utils.engines.base import escape_special_tokens, special_tokens


def encode(
    pair: dict,
    side: Literal["chosen", "rejected"],
    tokenizer,
    limit: float = math.inf,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a prompt with one of its answers.

    The prompt is templated as in generation. The answer ends in exactly one end token, the one that
    closes the turn: what a template puts after it ("<|im_end|>\\n") is cut off, and if the template
    adds none, the tokenizer's eos is added.

    Args:
        tokenizer: from `engines.loading.load_tokenizer`, which passes model.template_options on.
        limit: the most tokens that the model takes.

    Returns:
        ids, labels: lists of the same length; labels are -100 on the prompt.

    Raises:
        ValueError: an empty or over-long answer, or an unsuitable template; the message names the pair.
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
    text = _closed(text, len(prompt), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A token may span the boundary; it then belongs to the answer.
    start = len(os.path.commonprefix([prompt_ids, ids]))
    if len(ids) > limit:
        raise ValueError(
            f"{where}: {len(ids)} tokens with its prompt, but the model takes {limit}. Lower "
            "pairs.max_tokens: truncation would take the end token away."
        )
    return ids, [-100] * start + ids[start:]


def _closed(text: str, start: int, tokenizer) -> str:
    """A templated chat up to the token that closes its last turn, which begins at `start`.

    That is eos or, like Gemma's <end_of_turn>, another special token at which generation also stops.
    The answer itself contains none, since they are escaped.
    """
    eos = tokenizer.eos_token
    ends = [eos] if eos in text[start:] else special_tokens(tokenizer)
    places = {text.find(end, start): end for end in ends}
    places.pop(-1, None)
    place = min(places, default=len(text))
    return text[:place] + places.get(place, eos)


def token_rows(rows: list[dict], tokenizer, algorithm: str, limit: float = math.inf) -> list[dict]:
    """Rows of messages as {id, prompt_ids, chosen_ids, rejected_ids}; SFT has no rejected answer.

    Raises:
        ValueError: a row cannot be trained on: see `encode`.
    """
    found = []
    for row in rows:
        ids, labels = encode(row, "chosen", tokenizer, limit)
        start, rejected = labels.count(-100), []
        if algorithm != "sft":
            rejected, labels = encode(row, "rejected", tokenizer, limit)
            start = min(start, labels.count(-100))
        made = {"id": row["id"], "prompt_ids": ids[:start], "chosen_ids": ids[start:]}
        found.append({**made, "rejected_ids": rejected[start:]})
    return found
