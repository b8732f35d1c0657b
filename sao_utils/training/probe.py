"""Probes for degeneration during training: the model answers a few prompts greedily."""

from __future__ import annotations

import re

from sao_utils.engines.base import Sampling
from sao_utils.engines.transformers import TransformersEngine

TOKENS = 128  # of an answer, at most
SHARE = 0.05  # of the training time that all probes may take, roughly
#: Tokens that training processes in the time a probe takes to write one: on a CPU measured with models
#: of 1 and 135 million parameters, on a GPU assumed.
COST = {"cpu": 4, "cuda": 25}


def plan_probes(
    every: int, prompts: int, steps: int, tokens: float, answer: int, device: str
) -> tuple[int, frozenset[int]]:
    """How many prompts to probe, and after which steps (0: before training), within SHARE of its time.

    Every `every` steps if that fits; else only before the first and after the last step, if need be
    with fewer prompts, but at least two; else no probes.

    Args:
        every: training.probe_steps. prompts: training.probe_prompts, or fewer if there are fewer.
        steps, tokens: of the whole training. answer: tokens of the longest answer in the pairs.
    """
    room = int(SHARE * tokens / (COST[device] * min(TOKENS, answer)))  # answers, at most
    all_steps = frozenset({*range(0, steps + 1, every or 1), steps})
    few = min(prompts, room // 2)
    if not every or few < min(prompts, 2):
        return 0, frozenset()
    if prompts * len(all_steps) <= room:
        return prompts, all_steps
    return few, frozenset({0, steps})


def probe(model, tokenizer, chats: list[list[dict]]) -> list[dict]:
    """Let the model in training answer a few prompts greedily.

    Returns:
        One row per prompt: {prompt, text, tokens, finished, empty, repetition}; repetition is the share
        of the answer's sentences that repeat an earlier one, 0 to 1.
    """
    training, own = model.training, model.generation_config
    engine = TransformersEngine(model, tokenizer, batch_tokens=16_384)
    try:
        batches = list(engine.generate(chats, Sampling(0.0, TOKENS), [0] * len(chats)))
    finally:
        model.generation_config = own
        model.train(training)
    replies = dict(item for batch in batches for item in batch)
    return [
        {
            "prompt": chat[0]["content"],
            "text": replies[i].text,
            "tokens": replies[i].tokens,
            "finished": replies[i].finished,
            "empty": not replies[i].text,
            "repetition": repetition(replies[i].text),
        }
        for i, chat in enumerate(chats)
    ]


def repetition(text: str) -> float:
    """The share of a text's sentences that repeat an earlier one, 0 to 1."""
    sentences = [part.strip().lower() for part in re.split(r"[.!?\n]+", text) if part.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
