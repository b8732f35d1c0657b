"""Reasoning models: what they write between <think> and </think> is separated from the reply.

The reasoning is kept in the reply's row, but never enters a prompt, verdict or training pair. Whether a
model reasons depends on its chat template (`model.template_options: {enable_thinking: false}`).
"""

from __future__ import annotations

import re

from sao_utils.engines.base import Completion

OPEN, CLOSE = "<think>", "</think>"
_MARKER = re.compile(f"{OPEN}|{CLOSE}")


def split_reasoning(text: str, opened: bool = False) -> tuple[str, str]:
    """The reasoning at the beginning of a reply, and the reply itself, both stripped.

    Markers may be nested. If the reasoning is never closed, the reply is empty. A reply that does not
    begin with reasoning is left unchanged, even if markers follow later.

    Args:
        opened: whether the chat template has already opened the reasoning, so that the text begins
            within it. A closing marker without an opening one implies this, too.
    """
    text = text.strip()
    first = _MARKER.search(text)
    if not opened and not text.startswith(OPEN) and (first is None or first[0] == OPEN):
        return "", text
    inside = text.removeprefix(OPEN)
    depth = 1
    for marker in _MARKER.finditer(inside):
        depth += 1 if marker[0] == OPEN else -1
        if depth == 0:
            reply = re.sub(rf"^(\s*{CLOSE})+", "", inside[marker.end() :])  # surplus markers
            return inside[: marker.start()].strip(), reply.strip()
    return inside.strip(), ""


def opens_reasoning(tokenizer) -> bool:
    """Whether the chat template ends the prompt with reasoning already opened."""
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text.rstrip().endswith(OPEN)


def read_reply(tokenizer, ids: list[int], finished: bool, opened: bool) -> Completion:
    """The completion for a reply's token ids, which exclude the token that ended it.

    A reply that is nothing but reasoning counts as no reply (`base.unanswered`).

    Args:
        opened: see `opens_reasoning`.
    """
    if OPEN in tokenizer.all_special_tokens:  # else the markers would be lost, the reasoning kept
        text = tokenizer.decode(ids)
        for token in {*tokenizer.all_special_tokens} - {OPEN, CLOSE}:
            text = text.replace(token, "")
    else:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    return parted(text, len(ids), finished, opened, tokenizer)


def parted(
    text: str, tokens: int, finished: bool, opened: bool = False, tokenizer=None
) -> Completion:
    """A completion with reasoning and text separated; without a tokenizer its tokens are estimated."""
    reasoning, reply = split_reasoning(text, opened)
    if not reasoning and not opened:
        return Completion(reply, tokens, finished)
    if not reply:
        return Completion("", 0, False, reasoning)
    if tokenizer is None:
        tokens = max(1, round(tokens * len(reply) / (len(reply) + len(reasoning))))
    else:
        tokens = len(tokenizer(reply, add_special_tokens=False)["input_ids"])
    return Completion(reply, tokens, finished, reasoning)
