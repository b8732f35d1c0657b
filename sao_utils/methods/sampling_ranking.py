"""Sampling and ranking: the best of the policy's own responses against the worst, ranked by a scorer.

SynPO's paper (arXiv 2410.06961, section 4) compares SynPO with this way of making pairs. The prompts and
the first two responses are those of SAO.
"""

from __future__ import annotations

from sao_utils.methods.rounds import Round
from sao_utils.methods.sao import steps
from sao_utils.methods.scorers import scorer_of
from sao_utils.recipe import Model
from sao_utils.stages.pairs import build_scored_pairs
from sao_utils.stages.responses import write_responses
from sao_utils.stages.scoring import best_and_worst
from sao_utils.store import Run


def sampling_ranking_round(run: Run, this: Round) -> list[dict]:
    """The pairs of one round of one seed (`stages.pairs.build_scored_pairs`)."""
    return ranked_pairs(run, this, this.policy, run.recipe.ranking.scorer, "sampling_ranking")


def ranked_pairs(run: Run, this: Round, prompter: Model, scorer: str, name: str) -> list[dict]:
    """The pairs of one round, with the model that writes the prompts and the scorer given.

    Args:
        scorer: the name of a scorer (`methods.scorers`).
        name: the name of the method, under which the pairs are kept.
    """
    settings = run.recipe.ranking
    of_sao = steps(run, prompter, this.judge, this.number, [this.seed])
    prompts = next(rows for stage, rows in of_sao if stage == "prompts")
    responses = write_responses(run, prompts, this.policy, settings.samples)
    ranked = best_and_worst(run, responses, scorer_of(run, this, scorer))
    return build_scored_pairs(run, ranked, this.base, name, settings)
