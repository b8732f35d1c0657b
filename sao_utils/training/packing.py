"""Microbatches without padding: pairs packed into one row up to a budget of tokens.

The sequences of a packed row do not see each other: positions restart, and attention is computed
sequence by sequence. If both answers of a pair share one copy of their prompt, it is computed only
once. A model whose attention cannot be replaced gets padded batches of similar lengths instead.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

ATTENTION = "sao_packed"  # the name under which transformers knows `packed_attention`


@dataclass(frozen=True)
class Microbatch:
    """The model's inputs for some pairs, and where their answers are.

    inputs: keyword arguments of the model's forward ([1, tokens] packed, [sequences, longest] padded).
    rows: [N] positions in the flattened batch whose hidden states predict the answers' tokens.
    targets: [N] those tokens. owner: [N] the answer each belongs to: 2 * pair, + 1 if rejected.
    pairs: number of pairs. fed: tokens fed to the model, padding included.
    """

    inputs: dict
    rows: object
    targets: object
    owner: object
    pairs: int
    fed: int


def cost(row: dict, share_prompt: bool) -> int:
    """Tokens that a pair {prompt_ids, chosen_ids, rejected_ids} takes in a packed row."""
    prompts = len(row["prompt_ids"]) * (1 if share_prompt else 2)
    return prompts + len(row["chosen_ids"]) + len(row["rejected_ids"])


def longest(row: dict) -> int:
    """Tokens of the longer sequence of a pair {prompt_ids, chosen_ids, rejected_ids}."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def plan(sizes: list[int], budget: int, at_least: int = 1, padded: bool = False) -> list[list[int]]:
    """Indices of the pairs of each microbatch, by first fit, largest first.

    A pair over the budget gets a microbatch of its own.

    Args:
        sizes: tokens of each pair (`cost`); with `padded`, of its longer sequence (`longest`).
        budget: tokens of a microbatch, padding included.
        at_least: the least number of microbatches, but no more than there are pairs: processes that
            share a model must all have the same number.
    """
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for group in bins:
            if padded:
                tokens = 2 * sizes[group[0]] * (len(group) + 1)
            else:
                tokens = sum(sizes[i] for i in group) + sizes[index]
            if tokens <= budget:
                group.append(index)
                break
        else:
            bins.append([index])
    while len(bins) < min(at_least, len(sizes)):
        bins.append([max(bins, key=len).pop()])
    return bins


def pack(pairs: list[dict], share_prompt: bool) -> Microbatch:
    """Pairs packed into one row [1, tokens], whose sequences do not see each other."""
    import torch

    ids, positions, segments, rows, targets, owner = [], [], [], [], [], []
    for k, pair in enumerate(pairs):
        prompt, start = pair["prompt_ids"], len(ids)
        prefix = (start, start + len(prompt))
        if share_prompt and prompt:
            ids += prompt
            positions += range(len(prompt))
            segments.append((*prefix, 0, 0))
        for side, key in enumerate(("chosen_ids", "rejected_ids")):
            answer, begin = pair[key], len(ids)
            if not answer:  # SFT has no rejected answer
                continue
            whole = answer if share_prompt else prompt + answer
            first = len(ids) + len(whole) - len(answer)  # where the answer begins
            before = prefix[1] - 1 if share_prompt else first - 1
            ids += whole
            positions += range(len(prompt) + len(answer))[-len(whole) :]
            segments.append((begin, len(ids), *(prefix if share_prompt else (0, 0))))
            rows += [before, *range(first, len(ids) - 1)]
            targets += answer
            owner += [2 * k + side] * len(answer)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "packed_segments": segments,
    }
    tensors = (torch.tensor(x) for x in (rows, targets, owner))
    return Microbatch(inputs, *tensors, pairs=len(pairs), fed=len(ids))


def pad(pairs: list[dict]) -> Microbatch:
    """Pairs as right-padded sequences, [sequences, longest]; of pairs, chosen and rejected alternate."""
    import torch

    sequences = [
        (2 * k + side, pair["prompt_ids"], pair[key])
        for k, pair in enumerate(pairs)
        for side, key in enumerate(("chosen_ids", "rejected_ids"))
        if pair[key]
    ]
    whole = [prompt + answer for _, prompt, answer in sequences]
    longest = max(map(len, whole))
    rows, targets, owner = [], [], []
    for k, (whose, prompt, answer) in enumerate(sequences):
        start = k * longest + len(prompt) - 1
        rows += range(start, start + len(answer))
        targets += answer
        owner += [whose] * len(answer)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in whole]),
    }
    tensors = (torch.tensor(x) for x in (rows, targets, owner))
    return Microbatch(inputs, *tensors, pairs=len(pairs), fed=len(whole) * longest)


# ---------------------------------------------------------------------------- attention


@contextmanager
def packed(model):
    """Let a model attend within packed sequences only. Use it around both forward AND backward.

    (Gradient checkpointing repeats the forward pass during the backward pass.)
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    packed_segments: list[tuple[int, int, int, int]] = (),
    **_,
):
    """Causal attention within each segment of a packed row, in transformers' calling convention.

    Args:
        query, key, value: [1, heads, tokens, head size] (key and value may have fewer heads).
        packed_segments: (start, end, prefix start, prefix end) of each segment; its tokens also see
            the prefix, which is an earlier segment (a shared prompt). Segments together cover the
            row, in order.
        softcap: c of Gemma-2's c * tanh(scores / c), which torch's fused attention lacks.
        sliding_window: how many tokens back a token sees, itself included.

    Returns:
        (output [1, tokens, heads, head size], None)
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Split once, do not slice: the backward pass of each slice would write zeros for the whole row.
    lengths = [end - start for start, end, *_ in packed_segments]
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    at = {start: k for k, (start, *_) in enumerate(packed_segments)}
    parts = []
    for k, (_, _, prefix_start, prefix_end) in enumerate(packed_segments):
        q, seen = queries[k], [keys[k], values[k]]
        if prefix_end > prefix_start:
            prefix = at[prefix_start]
            seen = [torch.cat(both, 2) for both in zip((keys[prefix], values[prefix]), seen)]
        columns = seen[0].shape[2]
        window = sliding_window if sliding_window and sliding_window < columns else None
        drop = dropout if module.training else 0.0
        plain = window is None and columns == lengths[k] and not softcap
        allowed = None if plain else _causal(lengths[k], columns, window, query.device)
        if softcap:  # its scores are large: they are recomputed instead of kept
            part = checkpoint(
                _capped, q, *seen, allowed, scaling, softcap, drop, use_reentrant=False
            )
        else:
            part = torch.nn.functional.scaled_dot_product_attention(
                q, *seen, attn_mask=allowed, dropout_p=drop, scale=scaling, is_causal=plain
            )
        parts.append(part)
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _causal(rows: int, columns: int, window: int | None, device):
    """Mask [rows, columns], True where a token may attend; the last row sees the last column."""
    import torch

    row = torch.arange(columns - rows, columns, device=device)[:, None]
    column = torch.arange(columns, device=device)
    allowed = column <= row
    return allowed if window is None else allowed & (column > row - window)


def _capped(query, key, value, allowed, scaling, softcap, dropout):
    import torch

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value
