"""Engines run a model. Two verbs: `generate` completions, and `choose` between given answers.

An engine gets all its work at once and hands results back a batch at a time. Sampling is seeded
row by row, so what a row says does not depend on which rows stand beside it.
"""

from __future__ import annotations

import hashlib
import math
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
    return TransformersEngine(model, adapter, name)


def unload_engines() -> None:
    """Let go of the loaded models, so that their memory is free for training."""
    _loaded.cache_clear()


class TransformersEngine:
    """Runs a model with transformers: in left-padded batches of rows of like length."""

    def __init__(self, model: Model, adapter: Path | None, name: str):
        import torch
        from transformers import GenerationConfig

        self.batch_size = model.batch_size
        self.name = name
        self.tokenizer = load_tokenizer(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        whole = adapter is not None and not (adapter / "adapter_config.json").exists()
        weights = model.model_copy(update={"path": str(adapter), "revision": None})
        self.model = load_model(weights if whole else model, self.device)
        if adapter is not None and not whole:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(adapter))
            if self.model.dtype == torch.float32:  # in fewer bits, merging would round the adapter
                self.model = self.model.merge_and_unload()
        self.model.eval()
        # Some models bring a temperature or a repetition penalty along, which `generate` would
        # take up unasked. Only their stops are kept.
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        own = self.tokenizer.eos_token_id
        self.stops = sorted({stop for stop in (*stops, own) if stop is not None})
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id
        )

    def generate(self, chats, sampling, seeds):
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the draw is made by _SeededDraw
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.stops,
        )
        prompts = self._encode(chats)
        too_long = self._too_long(prompts)
        if too_long:  # one over-long text must not end the run: an empty reply counts as discarded
            yield [(i, Completion("", 0, False)) for i in too_long]
        for rows in self._batches(prompts, too_long):
            ids, mask = self._pad([prompts[i] for i in rows])
            processors = LogitsProcessorList()
            if sampling.temperature > 0:
                processors.append(_SeededDraw([seeds[i] for i in rows], sampling, ids.shape[1]))
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=processors,
                )
            replies = out[:, ids.shape[1] :].tolist()
            yield [(i, self._completion(reply)) for i, reply in zip(rows, replies)]

    def choose(self, chats, prefix, choices):
        import torch

        shared, firsts = self._parting(chats[0], prefix, choices) if chats else ([], [])
        prompts = [prompt + shared for prompt in self._encode(chats)]
        too_long = self._too_long(prompts)
        if too_long:  # no probability on any choice: an invalid verdict
            yield [(i, [-math.inf] * len(choices)) for i in too_long]
        for rows in self._batches(prompts, too_long):
            ids, mask = self._pad([prompts[i] for i in rows])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                ).logits[:, -1]
            picked = logits.float().log_softmax(-1)[:, firsts].tolist()
            yield list(zip(rows, picked))

    def _encode(self, chats: list[Chat]) -> list[list[int]]:
        safe = [disarm(chat, self.tokenizer) for chat in chats]
        texts = self.tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _too_long(self, prompts: list[list[int]]) -> list[int]:
        """Indices of the prompts that fill the model's context; says so if there are any."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        found = [i for i, prompt in enumerate(prompts) if len(prompt) >= limit]
        if found:
            print(
                f"{len(found)} of {len(prompts)} prompts are longer than the model's context of "
                f"{limit} tokens; they get no reply and count as discarded.",
                flush=True,
            )
        return found

    def _batches(self, prompts: list[list[int]], skipped: list[int]) -> Iterator[list[int]]:
        """Indices of the prompts, longest first: memory trouble shows at once, not after hours."""
        left = set(range(len(prompts))).difference(skipped)
        order = sorted(left, key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _pad(self, prompts: list[list[int]]):
        """Left-padded ids and mask, each [rows, longest prompt] on the engine's device."""
        import torch

        longest = max(len(p) for p in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self.device), mask.to(self.device)

    def _completion(self, reply: list[int]) -> Completion:
        end = next((k for k, token in enumerate(reply) if token in self.stops), None)
        kept = reply if end is None else reply[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Completion(text, len(kept), end is not None)

    def _parting(self, chat: Chat, prefix: str, choices: tuple[str, ...]):
        """The token ids that all choices share after the chat, and the first of each in which they part.

        Tokenising prefix + choice as a whole matters: some tokenizers split " 1" into " " and "1",
        and then the token after the prefix is the same for every choice.
        """
        start = self._encode([chat])[0]
        text = self.tokenizer.decode(start)
        full = [
            self.tokenizer(text + prefix + c, add_special_tokens=False)["input_ids"]
            for c in choices
        ]
        shared = next(k for k in range(len(full[0])) if len({tuple(f[: k + 1]) for f in full}) > 1)
        firsts = [f[shared] for f in full]
        if full[0][: len(start)] != start or len(set(firsts)) != len(choices):
            raise EngineError(
                f"The tokenizer does not tell the choices {choices} apart by one token after "
                f"'{prefix}'. Use judging.method=sampled with this model."
            )
        return full[0][len(start) : shared], firsts


class _SeededDraw:
    """A logits processor that draws each row's next token with the row's own random numbers.

    It leaves only the drawn token, so that greedy decoding takes it. Inverse transform sampling: one
    uniform number a row and step, from a generator seeded by the row.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int):
        import numpy as np
        import torch

        self.sampling, self.prompt_length = sampling, prompt_length
        draws = [np.random.default_rng(s).random(sampling.max_new_tokens) for s in seeds]
        self.uniform = torch.from_numpy(np.stack(draws))

    def __call__(self, input_ids, scores):
        import torch

        p = (scores.float() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            ordered, index = p.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.sampling.top_p] = 0
            p = torch.zeros_like(p).scatter(-1, index, ordered)
        cumulative = p.double().cumsum(-1)
        step = input_ids.shape[1] - self.prompt_length
        u = self.uniform[:, step, None].to(p.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, u, right=True).clamp(max=p.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


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
