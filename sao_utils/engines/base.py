"""Engines run a model. They do two things: `generate` completions and `choose` between given answers.

An engine gets all its work at once and hands results back a batch at a time. Each row is sampled with
its own seed, so a reply does not depend on which rows share its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Chat = list[dict[str, str]]  # messages: {"role": "user" | "assistant" | "system", "content": ...}


class EngineError(RuntimeError):
    """A model could not be loaded or used; the message says what to do."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens: temperature 0 is greedy decoding.

    If `stop` is given, a reply ends after that text, since nothing reads what would follow. Engines that
    do not see the text while they generate (vLLM's child, a server) ignore it; the reply is just longer.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    stop: str = ""

    def named(self) -> dict:
        """The settings that enter row ids: all but `stop`, which does not change what is read of a reply."""
        return {key: value for key, value in vars(self).items() if key != "stop"}


@dataclass(frozen=True)
class Completion:
    """A reply: its text, its length in tokens, and whether it ended by itself (not at the limit).

    `reasoning` is what a reasoning model wrote before the reply; text and tokens do not include it.
    """

    text: str
    tokens: int
    finished: bool
    reasoning: str = ""


#: The completion of a prompt that gets no answer: see `unanswered`.
NOTHING = Completion("", 0, False)
#: Why an unanswered row is discarded.
NO_REPLY = "no reply: too long, refused, or NaN"


def unanswered(tokens: int, finished: bool) -> bool:
    """Whether a model gave no reply: the prompt fills its context, a server refused it, or the model
    computed NaN (the engine has printed which of these, and for how many rows); or nothing but reasoning.

    A reply that a model did give has at least one token, or ended by itself.
    """
    return tokens == 0 and not finished


class Engine(Protocol):
    """What a stage asks of an engine."""

    tokenizer: object

    def generate(
        self, chats: list[Chat], sampling: Sampling, seeds: list[int]
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Complete each chat; yield batches of (index of the chat, completion).

        A prompt that cannot be answered gets an empty completion: see `unanswered`.
        """
        ...

    def choose(
        self, chats: list[Chat], prefix: str, choices: tuple[str, ...]
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """Log-probability of each choice, given that the assistant's reply begins with `prefix`.

        Yields batches of (index of the chat, log-probabilities in nats, one per choice). Only the
        first token at which the choices differ is scored. A prompt that cannot be answered gets
        minus infinity for every choice.
        """
        ...


def escape_special_tokens(chat: Chat, tokenizer) -> Chat:
    """Break up special tokens (end of turn, ...) within a chat's texts.

    What a model or a user wrote is data; it must not open or close a turn.
    """
    special = special_tokens(tokenizer)
    safe = []
    for message in chat:
        text = message["content"]
        for token in special:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        safe.append({**message, "content": text})
    return safe


def encode(chats: list[Chat], tokenizer) -> list[list[int]]:
    """Token ids of each chat up to where the reply begins, with special tokens escaped.

    A chat whose last message has `"open": True` ends within that message instead, and the model
    continues it (`prompts.source: pre_query`).

    Raises:
        EngineError: the chat template refuses a chat, as some do with a system turn.
    """
    ids = []
    for start in range(0, len(chats), ENCODED):
        texts = [_rendered(chat, tokenizer) for chat in chats[start : start + ENCODED]]
        ids += tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


ENCODED = 1000  # chats at a time: a tokenizer stores a hundred extra bytes for each token
_HERE = "SAO-THE-TURN-IS-OPEN-HERE"  # marks the end of an open message; removed afterwards


def _rendered(chat: Chat, tokenizer) -> str:
    chat = escape_special_tokens(chat, tokenizer)
    goes_on = bool(chat[-1].get("open"))
    if goes_on:  # continue_final_message of transformers would strip line breaks from an empty turn
        chat = [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + _HERE}]
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=not goes_on
        )
    except Exception as error:  # from jinja, if the template does not support a system turn
        raise EngineError(
            f"The chat template of this model refuses the chat ({error}). If it has no system turn, set "
            "prompts.personas=null."
        ) from None
    return text[: text.rindex(_HERE)] if goes_on else text


def first_divergent_token(
    chat: Chat, prefix: str, choices: tuple[str, ...], tokenizer
) -> tuple[list[int], list[int]]:
    """The token ids that all choices share after the chat, and each choice's first differing token id.

    Prefix and choice must be tokenised together: some tokenizers split " 1" into " " and "1", so that
    the token after the prefix is the same for every choice.

    Raises:
        EngineError: a single token does not tell the choices apart.
    """
    start = encode([chat], tokenizer)[0]
    text = tokenizer.decode(start)
    full = [tokenizer(text + prefix + c, add_special_tokens=False)["input_ids"] for c in choices]
    shared = next(k for k in range(len(full[0])) if len({tuple(f[: k + 1]) for f in full}) > 1)
    firsts = [f[shared] for f in full]
    if full[0][: len(start)] != start or len(set(firsts)) != len(choices):
        raise EngineError(
            f"The tokenizer does not tell the choices {choices} apart by one token after "
            f"'{prefix}'. Use judging.method=sampled with this model."
        )
    return full[0][len(start) : shared], firsts


def special_tokens(tokenizer) -> set[str]:
    """All special tokens of a tokenizer, those that open or close something.

    Not all of them have a named role such as eos (Llama-3's header tokens have none).
    """
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return special.union(tokenizer.all_special_tokens)


def turn_ends(chats: list[Chat], tokenizer) -> list[int]:
    """The ids of all special tokens, which end an open message in addition to a model's own stop tokens.

    Not every template closes a user's turn: in some, the assistant's header ends it. Returns [] if the
    chats have no open message.
    """
    if not chats or not chats[0][-1].get("open"):
        return []
    return tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer)))


def context_limit(config) -> float:
    """Most tokens of prompt and reply that a model takes; infinite if its configuration gives no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def over_long(prompts: list[list[int]], limit: float) -> list[int]:
    """Indices of the prompts (token ids) that fill a context of `limit` tokens; prints how many, if any."""
    found = [i for i, prompt in enumerate(prompts) if len(prompt) >= limit]
    if found:
        print(
            f"{len(found)} of {len(prompts)} prompts are longer than the context of {limit} tokens; "
            "they get no reply and count as discarded. If the model takes more, raise its "
            "max_context, and they are asked again.",
            flush=True,
        )
    return found
