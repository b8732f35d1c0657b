"""Controls: what SFT does by itself, on the answers that are given or on random own ones.

As methods they stand in a race beside the methods that they control for: a function of a run and a round
that gives rows to train on, here by SFT.
"""

from __future__ import annotations

from sao_utils.methods.rounds import Round
from sao_utils.methods.sao import steps
from sao_utils.methods.synpo import seed_examples
from sao_utils.stages.pairs import build_pairs
from sao_utils.store import Run


def sft_random_round(run: Run, this: Round) -> list[dict]:
    """The pairs of a round of SAO, with one of both answers drawn at random as the one to imitate."""
    made = dict(steps(run, this.policy, this.judge, this.number, [this.seed]))
    return build_pairs(run, made["verdicts"], this.policy, "sft_random")


def sft_seeds_round(run: Run, this: Round) -> list[dict]:
    """The seed items with their gold answers."""
    return seed_examples(run, this.seed)
