"""The transformers engine: runs a model in this process, in batches of so many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from sao_utils.engines import Completion, Sampling, encode, load_model, load_tokenizer, parting
from sao_utils.recipe import Model


class TransformersEngine:
    """Runs a model with transformers: in left-padded batches of rows of like length."""

    def __init__(self, model: Model, adapter: Path | None, name: str):
        import torch
        from transformers import GenerationConfig

        self.batch_tokens = model.batch_tokens
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
        prompts = encode(chats, self.tokenizer)
        too_long = self._too_long(prompts)
        if too_long:  # one over-long text must not end the run: an empty reply counts as discarded
            yield [(i, Completion("", 0, False)) for i in too_long]
        for rows in self._batches(prompts, too_long, sampling.max_new_tokens):
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

        shared, firsts = parting(chats[0], prefix, choices, self.tokenizer) if chats else ([], [])
        prompts = [prompt + shared for prompt in encode(chats, self.tokenizer)]
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

    def _batches(
        self, prompts: list[list[int]], skipped: list[int], new_tokens: int = 0
    ) -> Iterator[list[int]]:
        """Indices of the prompts, longest first: memory trouble shows at once, not after hours."""
        left = set(range(len(prompts))).difference(skipped)
        order = sorted(left, key=lambda i: (-len(prompts[i]), i))
        batch: list[int] = []
        for i in order:
            longest = len(prompts[batch[0]] if batch else prompts[i]) + new_tokens
            if batch and (len(batch) + 1) * longest > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

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
