"""The base model's log-probabilities of the answers in pairs, for notebooks that examine a loss."""

from __future__ import annotations

from functools import partial

from sao_utils.engines.base import Engine
from sao_utils.engines.registry import load_engine
from sao_utils.store import Run
from sao_utils.training import packing
from sao_utils.training.encoding import token_rows


def own_engine(run: Run) -> Engine:
    """An engine with the base model in this process, whose `model` and `device` can be inspected.

    If the recipe generates with another engine (vLLM), the model is quantised as in training.
    """
    model = run.recipe.model
    if model.engine != "transformers":
        quantisation = run.recipe.training.quantisation
        changes = {"engine": "transformers", "url": None, "quantisation": quantisation}
        model = model.model_copy(update=changes)
    return load_engine(model)


def pair_logps(run: Run, pairs: list[dict]) -> list[dict]:
    """The log-probabilities of the answers in pairs, from which SimPO and DPO compute their losses.

    Returns:
        One row per pair: {logp_chosen, len_chosen, logp_rejected, len_rejected}; sums in nats, lengths
        in tokens.
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
