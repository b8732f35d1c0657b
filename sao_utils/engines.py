"""Engines run a model. Two verbs: `generate` completions, and `choose` between given answers.

An engine gets all its work at once and hands results back a batch at a time. Sampling is seeded
row by row, so what a row says does not depend on which rows stand beside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from sao_utils.recipe import Model

Chat = list[dict[str, str]]  # messages: {"role": "user" | "assistant" | "system", "content": ...}


class EngineError(RuntimeError):
    """A model could not be loaded or used; the message says what to do."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens: temperature 0 is greedy decoding."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """A reply: its text, its length in tokens, and whether it ended by itself (not at the limit)."""

    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    """What a stage asks of an engine."""

    name: str  # which weights: part of the id of every row
    tokenizer: object

    def generate(
        self, chats: list[Chat], sampling: Sampling, seeds: list[int]
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Complete each chat; yields batches of (index of the chat, completion)."""
        ...

    def choose(
        self, chats: list[Chat], prefix: str, choices: tuple[str, ...]
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """Log-probability of each choice after the assistant has begun with `prefix`.

        Yields batches of (index of the chat, log-probabilities in nats, one a choice). Only the
        first token in which the choices part is scored.
        """
        ...


def model_folder(path: str) -> str:
    """The folder of the embedded model for "tiny", else the path as it is, absolute if local."""
    if path == "tiny":
        return str(files("sao_utils") / "tiny" / "model")
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def model_name(model: Model, adapter: Path | None = None) -> str:
    """A name that changes when the model does: part of the id of every row made with it.

    `adapter` is the folder of a trained adapter, or of a whole model that was trained. For a local
    model the name is a hash of its files (weights, tokenizer, template), with the dtype.
    """
    folder = Path(model_folder(model.path))
    files_of_it = [
        path
        for path in sorted(folder.glob("*"))
        if folder.is_dir()
        if path.suffix in (".safetensors", ".json", ".jinja")
    ]
    base = (
        _digest(tuple(files_of_it)) if files_of_it else f"{model.path}@{model.revision or 'main'}"
    )
    name = f"{base}:{model.dtype}"
    if model.quantisation != "none":
        name += f":{model.quantisation}"
    if model.engine != "transformers":  # another engine, other random numbers
        name += f":{model.engine}" + (f":{model.url}" if model.url else "")
    return f"{name}+{_digest(tuple(sorted(adapter.glob('*.safetensors'))))}" if adapter else name


def _digest(paths: tuple[Path, ...]) -> str:
    return _digest_of_state(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths))


@lru_cache(maxsize=64)
def _digest_of_state(state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in state:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_engine(model: Model, adapter: Path | None = None) -> Engine:
    """Load a model, and an adapter on it; the last two stay loaded.

    Raises:
        EngineError: the model is not there; the message says what to do.
    """
    # By name and not by path: an adapter trained anew in the same folder is another one.
    return _loaded(model, adapter, model_name(model, adapter))


@lru_cache(maxsize=2)
def _loaded(model: Model, adapter: Path | None, name: str) -> Engine:
    if model.workers:
        from sao_utils.engine_ray import RayEngine as Kind
    elif model.engine == "vllm":
        from sao_utils.engine_vllm import VllmEngine as Kind
    elif model.engine == "api":
        from sao_utils.engine_api import ApiEngine as Kind
    else:
        from sao_utils.engine_transformers import TransformersEngine as Kind
    return Kind(model, adapter, name)


def unload_engines() -> None:
    """Let go of the loaded models, so that their memory is free for training."""
    _loaded.cache_clear()


def disarm(chat: Chat, tokenizer) -> Chat:
    """Break up special tokens (ends of turns, ...) inside of a chat's texts.

    What a model or a user wrote is data; it must not open or close a turn. Not all such tokens have
    a role name in the tokenizer (Llama-3's header tokens have none), so the whole table is searched.
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
    """Token ids of each chat up to where the assistant's reply begins; special tokens disarmed."""
    safe = [disarm(chat, tokenizer) for chat in chats]
    texts = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def parting(
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
    """All tokens of a tokenizer that open or close something, with or without a role name."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return special.union(tokenizer.all_special_tokens)


def load_tokenizer(model: Model):
    """The tokenizer of a model, left-padding. Raises EngineError when it is not there."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model, padding_side="left")
    if tokenizer.chat_template is None:
        raise EngineError(f"{model.path} has no chat template; take an instruction-tuned model.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: Model, device: str = "cpu"):
    """The weights of a model (safetensors only). Raises EngineError when they are not there."""
    from transformers import AutoModelForCausalLM

    return _from_pretrained(
        AutoModelForCausalLM, model, dtype=model.dtype, use_safetensors=True
    ).to(device)


def _from_pretrained(kind, model: Model, **options):
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a tensor floods a log
    path = model_folder(model.path)
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise EngineError(
            f"There is no model folder '{model.path}'. Set model.path to a folder with the weights, "
            'to a name on the hub such as "Qwen/Qwen2.5-1.5B-Instruct", or to "tiny".'
        )
    try:
        return kind.from_pretrained(
            path, revision=model.revision, trust_remote_code=False, **options
        )
    except OSError as error:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        advice = (
            "HF_HUB_OFFLINE=1 is set: unset it to let the hub be asked, or download the model before."
            if offline
            else "Check the name, log in with `hf auth login` if the model is gated, or give a folder."
        )
        raise EngineError(f"Could not load '{model.path}': {error}\n{advice}") from error
