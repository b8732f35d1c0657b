"""Engines run a model. Two verbs: `generate` completions, and `choose` between given answers.

An engine gets all its work at once and hands results back a batch at a time. Sampling is seeded
row by row, so what a row says does not depend on which rows stand beside it.
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

    A reply ends behind the text `stop`, if one is given: what would follow is read by nobody. Engines that
    see no text while they write (vLLM's child, a server) go on; then the reply is only longer.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    stop: str = ""

    def named(self) -> dict:
        """What ids of rows are made of: all but `stop`, which changes nothing of what is read."""
        return {key: value for key, value in vars(self).items() if key != "stop"}


@dataclass(frozen=True)
class Completion:
    """A reply: its text, its length in tokens, and whether it ended by itself (not at the limit).

    `reasoning` is what a model that thinks wrote before it; it is no part of text and tokens.
    """

    text: str
    tokens: int
    finished: bool
    reasoning: str = ""


#: What a prompt gets that no model answers: see `unanswered`.
NOTHING = Completion("", 0, False)
#: Why a row is discarded that no model answered.
NO_REPLY = "no reply: too long, refused, or NaN"


def unanswered(tokens: int, finished: bool) -> bool:
    """Whether a model gave no reply: the prompt fills its context, a server refused it, or the model
    computed NaN. Which, and for how many, the engine has printed.

    A reply that a model did give has a token, or has ended by itself.
    """
    return tokens == 0 and not finished


class Engine(Protocol):
    """What a stage asks of an engine."""

    tokenizer: object

    def generate(
        self, chats: list[Chat], sampling: Sampling, seeds: list[int]
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Complete each chat; yields batches of (index of the chat, completion).

        A prompt that cannot be answered gets an empty completion: see `unanswered`.
        """
        ...

    def choose(
        self, chats: list[Chat], prefix: str, choices: tuple[str, ...]
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """Log-probability of each choice after the assistant has begun with `prefix`.

        Yields batches of (index of the chat, log-probabilities in nats, one a choice). Only the
        first token in which the choices part is scored. A prompt that cannot be answered gets
        minus infinity for all.
        """
        ...


def escape_special_tokens(chat: Chat, tokenizer) -> Chat:
    """Break up special tokens (ends of turns, ...) inside of a chat's texts.

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
    """Token ids of each chat up to where the reply begins; special tokens escaped.

    A chat whose last message is `"open": True` ends inside of that message instead: the model goes on
    with it (`prompts.source: pre_query`).

    Raises:
        EngineError: the chat template refuses a chat, as some do with a system turn.
    """
    ids = []
    for start in range(0, len(chats), ENCODED):
        texts = [_rendered(chat, tokenizer) for chat in chats[start : start + ENCODED]]
        ids += tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


ENCODED = 1000  # chats at a time: a tokenizer notes a hundred bytes more for each token
_HERE = "SAO-THE-TURN-IS-OPEN-HERE"  # marks the end of an open message, and is cut off again


def _rendered(chat: Chat, tokenizer) -> str:
    chat = escape_special_tokens(chat, tokenizer)
    goes_on = bool(chat[-1].get("open"))
    if goes_on:  # transformers' continue_final_message would cut line breaks of a turn still empty
        chat = [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + _HERE}]
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=not goes_on
        )
    except Exception as error:  # jinja's, of a template that knows no system turn
        raise EngineError(
            f"The chat template of this model refuses the chat ({error}). If it has no system turn, set "
            "prompts.personas=null."
        ) from None
    return text[: text.rindex(_HERE)] if goes_on else text


def first_divergent_token(
    chat: Chat, prefix: str, choices: tuple[str, ...], tokenizer
) -> tuple[list[int], list[int]]:
    """The token ids that all choices share after the chat, and the first of each in which they part.

    Tokenising prefix + choice as a whole matters: some tokenizers split " 1" into " " and "1",
    and then the token after the prefix is the same for every choice.

    Raises:
        EngineError: one token does not tell the choices apart.
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
    """All tokens of a tokenizer that open or close something.

    Not all of them have a role name there (Llama-3's header tokens have none).
    """
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return special.union(tokenizer.all_special_tokens)


def turn_ends(chats: list[Chat], tokenizer) -> list[int]:
    """The tokens that end an open message, beside a model's own stops: all that open or close something.

    Not every template closes a user's turn: in some the assistant's header ends it. [] of other chats.
    """
    if not chats or not chats[0][-1].get("open"):
        return []
    return tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer)))


def context_limit(config) -> float:
    """The tokens that a model takes, prompt and reply; infinite if its configuration names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def over_long(prompts: list[list[int]], limit: float) -> list[int]:
    """Indices of the prompts, as token ids, that fill a context; says so if there are any."""
    found = [i for i, prompt in enumerate(prompts) if len(prompt) >= limit]
    if found:
        print(
            f"{len(found)} of {len(prompts)} prompts are longer than the context of {limit} tokens; "
            "they get no reply and count as discarded. If the model takes more, a larger max_context "
            "of it asks them again.",
            flush=True,
        )
    return found
