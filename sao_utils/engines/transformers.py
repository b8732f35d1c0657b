"""The transformers engine: runs a model in this process, in batches limited by their tokens."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from sao_utils.engines.base import (
    NOTHING,
    Completion,
    EngineError,
    Sampling,
    context_limit,
    encode,
    first_divergent_token,
    over_long,
    turn_ends,
)
from sao_utils.engines.loading import load_model, load_tokenizer, out_of_memory, precision, say_once
from sao_utils.engines.reasoning import opens_reasoning, read_reply
from sao_utils.recipe import Model

FEW = 8  # for fewer rows, do not thin out a batch or give up on a model that computes NaN


def transformers_engine(model: Model, adapter: Path | None) -> TransformersEngine:
    """Load a model with the adapter in a folder, or the fully fine-tuned model in that folder."""
    import torch

    tokenizer = load_tokenizer(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = precision(model)
    bits = "" if model.quantisation == "none" else f", weights in {model.quantisation}"
    say_once(f"{model.path}: {dtype}{bits} ({why})")
    whole = adapter is not None and not (adapter / "adapter_config.json").exists()
    weights = model.model_copy(update={"path": str(adapter), "revision": None})
    loaded = load_model(weights if whole else model, device)
    if adapter is not None and not whole:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter))
        # With lower-precision weights, merging would round the adapter.
        if dtype == "float32" and model.quantisation == "none":
            loaded = loaded.merge_and_unload()
    return TransformersEngine(loaded, tokenizer, model.batch_tokens, model.max_context)


class TransformersEngine:
    """Runs a model with transformers, in left-padded batches of rows of similar length."""

    def __init__(self, loaded, tokenizer, batch_tokens: int, max_context: int | None = None):
        """Args: loaded: a transformers model, or peft's wrapper around one."""
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.batch_tokens = loaded.eval(), tokenizer, batch_tokens
        self.opened = opens_reasoning(tokenizer)
        self.device = loaded.device.type
        self.limit = min(context_limit(loaded.config), max_context or math.inf)
        # Some models come with a temperature or a repetition penalty, which `generate` would apply by
        # default. Only their stop tokens are kept.
        stops = loaded.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self.stops = sorted({*stops, tokenizer.eos_token_id}.difference([None]))
        self.closing: dict[str, object] = {}  # stop text -> tokens that may complete it
        loaded.generation_config = GenerationConfig(
            eos_token_id=self.stops, pad_token_id=tokenizer.pad_token_id
        )

    def generate(self, chats, sampling, seeds):
        prompts, seen = encode(chats, self.tokenizer), []
        stops = sorted({*self.stops, *turn_ends(chats, self.tokenizer)})

        def reply(rows: list[int], new_tokens: int):
            some = [prompts[i] for i in rows], [seeds[i] for i in rows]
            made = self._replies(*some, sampling, new_tokens, stops)
            _check([one is not NOTHING for one in made], seen)
            return list(zip(rows, made))

        yield from self.in_batches(prompts, reply, NOTHING, sampling.max_new_tokens)

    def choose(self, chats, prefix, choices):
        import torch

        if not chats:
            return
        shared, firsts = first_divergent_token(chats[0], prefix, choices, self.tokenizer)
        prompts = [prompt + shared for prompt in encode(chats, self.tokenizer)]
        nothing, seen = [-math.inf] * len(choices), []

        def score(rows: list[int], _: int):
            ids, mask = self._pad([prompts[i] for i in rows])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode(), _in_float32(self.model, firsts):
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                ).logits[:, -1]
            logps = logits.float().log_softmax(-1)[:, firsts].tolist()
            finite = _finite(logits).tolist()
            _check(finite, seen)
            return [(i, of if fine else nothing) for i, of, fine in zip(rows, logps, finite)]

        yield from self.in_batches(prompts, score, nothing)

    def _replies(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        sampling: Sampling,
        new_tokens: int,
        stops: list[int],
    ) -> list[Completion]:
        """Replies to one batch. Whenever half of the rows have ended, only the others continue.

        A row for which the model computes NaN at any step gets no reply.
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids, mask = self._pad(prompts)
        start, cache = ids.shape[1], None
        going, found = list(range(len(prompts))), {}
        while going:
            config = GenerationConfig(
                max_new_tokens=start + new_tokens - ids.shape[1],
                do_sample=False,  # the draw is made by _SeededDraw
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=stops,
                return_dict_in_generate=True,
            )
            draw = _SeededDraw([seeds[i] for i in going], sampling, start)
            draws = [draw]
            if sampling.stop and self.stops:
                draws.append(self._end_after(sampling.stop, start))
            halt = [_half_ended(stops, start)] if len(going) >= FEW else []
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=config,
                    logits_processor=LogitsProcessorList(draws),
                    stopping_criteria=StoppingCriteriaList(halt),
                )
            replies = out.sequences[:, start:].tolist()
            for i, tokens, fine in zip(going, replies, draw.finite.tolist()):
                if not fine:
                    found[i] = NOTHING
                elif len(tokens) == new_tokens or not set(stops).isdisjoint(tokens):
                    found[i] = self._completion(tokens, stops)
            stay = [k for k, i in enumerate(going) if i not in found]
            going = [going[k] for k in stay]
            ids, mask = out.sequences[stay], mask[stay]
            mask = torch.cat([mask, mask.new_ones(len(stay), ids.shape[1] - mask.shape[1])], 1)
            cache = _rows_of(out.past_key_values, stay) if stay else None
        return [found[i] for i in range(len(prompts))]

    def in_batches(
        self,
        prompts: list[list[int]],
        work: Callable[[list[int], int], list],
        nothing: object,
        new_tokens: int = 0,
    ) -> Iterator[list]:
        """Yield `work(rows, new tokens)` for batches of the prompts; rows are indices.

        The longest come first, so that memory problems show at once and not after hours. A batch that
        does not fit into memory is halved, and later ones are no larger. Rows that fill the context
        are yielded first, as (row, nothing).

        Raises:
            EngineError: not even a single row fits into memory.
        """
        skipped = over_long(prompts, self.limit)
        if skipped:
            yield [(i, nothing) for i in skipped]
        # Prompts that nearly fill the context get fewer new tokens. They do not share a batch with
        # others, since a reply must not depend on its batch.
        room = [min(new_tokens, self.limit - len(prompt)) for prompt in prompts]
        left = set(range(len(prompts))).difference(skipped)
        waiting = sorted(left, key=lambda i: (-len(prompts[i]), i))
        while waiting:
            longest = len(prompts[waiting[0]]) + room[waiting[0]]
            most = max(1, self.batch_tokens // longest)
            rows = [i for i in waiting[:most] if room[i] == room[waiting[0]]]
            try:
                done = work(rows, room[rows[0]])
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                done = None
            if done is not None:
                yield done
                del waiting[: len(rows)]
            else:
                self._halve(len(rows), longest)  # outside `except`: its tensors are freed

    def _halve(self, rows: int, longest: int) -> None:
        """Lower the token budget to half of a batch that did not fit, and free the memory it held."""
        import torch

        if rows == 1:
            raise EngineError(
                f"The memory does not hold even one row of {longest} tokens. Rows made so far are kept. Set "
                "model.quantisation=nf4, lower max_new_tokens of the stage, take a smaller model, or "
                "leave out long prompts by a smaller model.max_context."
            )
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = rows // 2 * longest
        print(
            f"Out of memory with {rows} rows of up to {longest} tokens; going on with batches of "
            f"{self.batch_tokens} tokens. model.batch_tokens={self.batch_tokens} avoids this.",
            flush=True,
        )

    def _pad(self, prompts: list[list[int]]):
        """Left-padded ids and mask, each [rows, longest prompt], on the engine's device."""
        import torch

        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self.device), mask.to(self.device)

    def _end_after(self, text: str, start: int):
        """A logits processor that ends a row once its reply, after `start` prompt tokens, contains `text`."""
        import torch

        if text not in self.closing:  # once per engine: decoding a vocabulary takes a second
            every = [[i] for i in range(len(self.tokenizer))]
            said = self.tokenizer.batch_decode(every, skip_special_tokens=True)
            found = [i for i, token in enumerate(said) if text[-1] in token]
            self.closing[text] = torch.tensor(found, device=self.device)

        def end(ids, scores):
            for row in torch.isin(ids[:, -1], self.closing[text]).nonzero()[:, 0].tolist():
                if text in self.tokenizer.decode(ids[row, start:]):
                    scores[row] = -torch.inf
                    scores[row, self.stops[0]] = 0.0
            return scores

        return end

    def _completion(self, reply: list[int], stops: list[int]) -> Completion:
        end = next((k for k, token in enumerate(reply) if token in stops), None)
        kept = reply if end is None else reply[:end]
        return read_reply(self.tokenizer, kept, end is not None, self.opened)


def _in_float32(model, tokens: list[int]):
    """A context in which the model's head computes the logits of these tokens in float32.

    Near 20, logits in bfloat16 come in steps of 1/8: for a third of SmolLM2's pairs the two orders of a
    verdict would cancel to exactly 0. The other logits are unchanged, so no second head is needed.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()

    def refine(_, inputs, logits):
        weight, bias = head.weight[tokens].float(), getattr(head, "bias", None)
        bias = None if bias is None else bias[tokens].float()
        logits = logits.float()
        logits[..., tokens] = torch.nn.functional.linear(inputs[0].float(), weight, bias)
        return logits

    return head.register_forward_hook(refine)


def _finite(logits):
    """Whether the largest logit of each row is finite, so that none is NaN: [rows, vocabulary] -> [rows]."""
    return logits.amax(-1).isfinite()


def _check(finite: list[bool], seen: list[bool]) -> None:
    """Report the rows of a batch for which the model computed NaN.

    Args:
        finite: for each row of the batch, whether its logits were numbers.
        seen: the same for earlier batches of the call; `finite` is appended, since a single batch may
            have only one row.

    Raises:
        EngineError: the model computed NaN for most rows of the call so far.
    """
    seen += finite
    if all(finite):
        return
    broken = seen.count(False)
    words = f"The model computes NaN for {broken} of {len(seen)} rows"
    advice = "Set model.dtype=bfloat16 on a GPU of compute capability 8.0 or more, else float32."
    if len(seen) >= FEW and 2 * broken > len(seen):
        raise EngineError(f"{words}. {advice} Rows made so far are kept.")
    print(f"{words}; they get no reply and count as discarded. {advice}", flush=True)


def _half_ended(stops: list[int], start: int):
    """A stopping criterion: half of the rows have a stop token after their `start` prompt tokens."""
    import torch

    def halt(ids, scores, **_):
        ended = torch.isin(ids[:, start:], torch.tensor(stops, device=ids.device)).any(1)
        return (2 * ended.sum() >= len(ids)).expand(len(ids))

    return halt


def _rows_of(cache, rows: list[int]):
    """These rows of a KV cache; None for another kind of cache, which is then recomputed."""
    import torch
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", [None])
    if not all(isinstance(layer, DynamicLayer) for layer in layers):
        return None
    cache.batch_select_indices(torch.tensor(rows, device=layers[0].keys.device))
    return cache


class _SeededDraw:
    """A logits processor that draws each row's next token with the row's own random numbers.

    It masks all but the drawn token, so that greedy decoding takes it. Inverse transform sampling: one
    uniform number per row and step, from a generator with the row's seed. At temperature 0 it changes
    nothing. `finite` says for each row whether its logits were numbers at every step.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int):
        import numpy as np
        import torch

        self.sampling, self.prompt_length, self.finite = sampling, prompt_length, True
        draws = [np.random.default_rng(s).random(sampling.max_new_tokens) for s in seeds]
        self.uniform = torch.from_numpy(np.stack(draws))

    def __call__(self, input_ids, scores):
        import torch

        self.finite = _finite(scores) & self.finite
        if not self.sampling.temperature:
            return scores
        p = (scores.float() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            p = _nucleus(p, self.sampling.top_p)
        cumulative = p.double().cumsum(-1)
        step = input_ids.shape[1] - self.prompt_length
        u = self.uniform[:, step, None].to(p.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, u, right=True).clamp(max=p.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def _nucleus(p, top_p: float, first: int = 1024):
    """Set all probabilities to zero outside the smallest set that holds `top_p` (Holtzman 2020).

    Args:
        p: probabilities [rows, vocabulary].
        first: how many of the likeliest tokens are sorted; all are sorted only if these do not hold
            enough, since sorting 256,000 tokens takes longer than a small model's step.

    Returns:
        [rows, vocabulary], not normalised. Tokens as likely as the last one in the set stay, too, so
        that nothing depends on how ties are sorted.
    """
    ordered = p.topk(min(first, p.shape[-1])).values
    if (ordered.sum(-1) < top_p).any():
        ordered = p.sort(-1, descending=True).values
    inside = ordered.cumsum(-1) - ordered < top_p
    last = ordered.masked_fill(~inside, 1.0).amin(-1, keepdim=True)
    return p.masked_fill(p < last, 0.0)
