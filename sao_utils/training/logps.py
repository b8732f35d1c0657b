"""What the base model gives the answers of pairs: for notebooks that look into a loss."""

from __future__ import annotations

from functools import partial

from sao_utils.engines.base import Engine
from sao_utils.engines.registry import load_engine
from sao_utils.store import Run
from sao_utils.training import packing
from sao_utils.training.encoding import token_rows

PAIRS = 4  # of a forward pass


def own_engine(run: Run) -> Engine:
    """The base model in this process, with a `model` and `device` to look into.

    Where the recipe generates by another engine (vLLM, Ray), in 4 bit if training is.
    """
    model, changes = run.recipe.model, {"workers": 0}
    if model.engine != "transformers":
        quantisation = run.recipe.training.quantisation
        changes |= {"engine": "transformers", "url": None, "quantisation": quantisation}
    return load_engine(model.model_copy(update=changes))


def pair_logps(run: Run, pairs: list[dict]) -> list[dict]:
    """The log-probabilities of the answers of pairs: SimPO's and DPO's raw material.

    Returns:
        A row a pair: {logp_chosen, len_chosen, logp_rejected, len_rejected}; sums in nats, tokens.
    """
    import torch

    from sao_utils.training.trainer import answer_logps, summed_logps

    engine = own_engine(run)
    rows = token_rows(pairs, engine.tokenizer, run.recipe.training.algorithm)
    order = sorted(range(len(rows)), key=lambda i: packing.longest(rows[i]))
    found: list[dict] = [{} for _ in rows]
    for start in range(0, len(order), PAIRS):
        indices = order[start : start + PAIRS]
        batch = packing.pad([rows[i] for i in indices])
        with torch.inference_mode():
            sums, _ = summed_logps(partial(answer_logps, engine.model), batch, engine.device)
        for i, (chosen, rejected) in zip(indices, sums.view(-1, 2).tolist()):
            found[i] = {"logp_chosen": chosen, "len_chosen": len(rows[i]["chosen_ids"])}
            found[i] |= {"logp_rejected": rejected, "len_rejected": len(rows[i]["rejected_ids"])}
    return found
