"""What the base model gives the answers of pairs: for notebooks that look into a loss."""

from __future__ import annotations

from functools import partial

from sao_utils.engines.base import Engine
from sao_utils.engines.registry import load_engine
from sao_utils.store import Run
from sao_utils.training import packing
from sao_utils.training.encoding import token_rows


def own_engine(run: Run) -> Engine:
    """The base model in this process, with a `model` and `device` to look into.

    Where the recipe generates by another engine (vLLM), in 4 bit if training is.
    """
    model = run.recipe.model
    if model.engine != "transformers":
        quantisation = run.recipe.training.quantisation
        changes = {"engine": "transformers", "url": None, "quantisation": quantisation}
        model = model.model_copy(update=changes)
    return load_engine(model)


def pair_logps(run: Run, pairs: list[dict]) -> list[dict]:
    """The log-probabilities of the answers of pairs: SimPO's and DPO's raw material.

    Returns:
        A row a pair: {logp_chosen, len_chosen, logp_rejected, len_rejected}; sums in nats, tokens.
    """
    import torch

    from sao_utils.training.trainer import answer_logps, summed_logps

    engine = own_engine(run)
    found = []
    for row in token_rows(pairs, engine.tokenizer, run.recipe.training.algorithm):
        with torch.inference_mode():
            score = partial(answer_logps, engine.model)
            sums, lengths = summed_logps(score, packing.pad([row]), engine.device)
        (chosen, rejected), (of_chosen, of_rejected) = sums.tolist(), lengths.tolist()
        made = {"logp_chosen": chosen, "len_chosen": of_chosen}
        found.append({**made, "logp_rejected": rejected, "len_rejected": of_rejected})
    return found
