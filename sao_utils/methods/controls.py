"""Controls: what SFT achieves by itself, on the gold answers or on random answers of the model's own.

They are written as methods, so that they can be compared with the methods they control for: each is a
function of a run and a round that returns rows to train on, here by SFT.
"""

from __future__ import annotations

from sao_utils.methods.rounds import Round
from sao_utils.methods.sao import steps
from sao_utils.methods.synpo import seed_examples
from sao_utils.stages.pairs import build_pairs
from sao_utils.store import Run


def sft_random_round(run: Run, this: Round) -> list[dict]:
    """The pairs of a round of SAO, with one of the two answers drawn at random to be imitated."""
    made = dict(steps(run, this.policy, this.judge, this.number, [this.seed]))
    return build_pairs(run, made["verdicts"], this.policy, "sft_random")


def sft_seeds_round(run: Run, this: Round) -> list[dict]:
    """The seed items with their gold answers."""
    return seed_examples(run, this.seed)
