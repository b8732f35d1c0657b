"""A look at degeneration while a model is trained: it answers a few prompts greedily."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sao_utils.engines.base import escape_special_tokens

TOKENS = 128  # at most, of an answer
SHARE = 0.05  # of the training's time that all probes may take, about
#: Tokens that are trained on in the time in which a probe writes one: on a CPU measured with models of
#: 1 and 135 million parameters, on a GPU assumed.
COST = {"cpu": 4, "cuda": 25}


@dataclass(frozen=True)
class ProbePlan:
    """How many prompts are probed after which steps (0: the model before training), and why."""

    prompts: int
    steps: frozenset[int]
    reason: str


def plan_probes(
    every: int, prompts: int, steps: int, tokens: float, answer: int, device: str
) -> ProbePlan:
    """Probes that take no more than about SHARE of the training's time.

    Every `every` steps if that fits; else before the first and after the last step, if need be with
    fewer prompts, but two at least; else none.

    Args:
        every: training.probe_steps. prompts: training.probe_prompts, as many as there are.
        steps, tokens: of the whole training. answer: tokens of the longest answer in the pairs.
    """
    if not every:
        return ProbePlan(0, frozenset(), "training.probe_steps is 0")
    room = int(SHARE * tokens / (COST[device] * min(TOKENS, answer)))  # answers
    all_steps = frozenset({*range(0, steps + 1, every), steps})
    if prompts * len(all_steps) <= room:
        return ProbePlan(prompts, all_steps, f"{prompts} prompts every {every} steps")
    few = min(prompts, room // 2)
    if few < min(prompts, 2):
        return ProbePlan(0, frozenset(), f"none, or it would take over {SHARE:.0%} of the time")
    reason = f"{few} prompts before and after; more would take over {SHARE:.0%} of the time"
    return ProbePlan(few, frozenset({0, steps}), reason)


def probe(model, tokenizer, chats: list[list[dict]]) -> list[dict]:
    """Let the model in training answer a few prompts greedily.

    Returns:
        A row a prompt: {prompt, text, tokens, finished, empty, repetition}; repetition is the share
        of the answer's sentences that stood in it before, 0 to 1.
    """
    import torch
    from transformers import GenerationConfig

    chats = [escape_special_tokens(chat, tokenizer) for chat in chats]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    training, own = model.training, model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = {*stops, tokenizer.eos_token_id} - {None}
    model.eval()
    # A model may bring a repetition penalty along, which would hide what is looked for: `generate`
    # takes what is not set from the model's own configuration.
    model.generation_config = GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(stops),
    )
    try:
        with torch.inference_mode():
            out = model.generate(**batch, generation_config=model.generation_config)
    finally:
        model.generation_config = own
    model.train(training)
    rows = []
    for chat, reply in zip(chats, out[:, batch["input_ids"].shape[1] :].tolist()):
        ends = [k for k, token in enumerate(reply) if token in stops]
        text = tokenizer.decode(reply[: ends[0]] if ends else reply, skip_special_tokens=True)
        row = {"prompt": chat[0]["content"], "text": text.strip()}
        row |= {"tokens": ends[0] if ends else len(reply), "finished": bool(ends)}
        rows.append({**row, "empty": not text.strip(), "repetition": repetition(text)})
    return rows


def repetition(text: str) -> float:
    """The share of a text's sentences that stood in it before, 0 to 1."""
    sentences = [part.strip().lower() for part in re.split(r"[.!?\n]+", text) if part.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
