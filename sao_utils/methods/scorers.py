"""The scorer of a round's pairs, by its name in the recipe."""

from __future__ import annotations

from sao_utils import oracles
from sao_utils.methods.rounds import Round
from sao_utils.recipe import Model
from sao_utils.stages.scoring import Scorer
from sao_utils.store import Run
from sao_utils.training.reward import fit_reward

TINY_PAIRS = 2000  # pairs that the tiny world's reward model is trained on


def scorer_of(run: Run, this: Round, name: str) -> Scorer:
    """The scorer with the given name.

    Args:
        name: "self": the round's judge, pair by pair; "points": the same judge, one response at a time;
            "oracle": the oracle; "tiny": the tiny world's reward model, trained now if it does not exist
            yet. Anything else is the path or hub name of a reward model.
    """
    if name in ("self", "points"):
        return Scorer("judge" if name == "self" else "points", this.judge)
    if name == "oracle":
        return Scorer("oracle")
    return Scorer("reward", train_scorer(run, this.seed) if name == "tiny" else Model(path=name))


def train_scorer(run: Run, seed: int) -> Model:
    """The reward model of the tiny world, trained from the embedded model (`training.reward`)."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for prompt, better, worse in oracles.tiny_pairs(TINY_PAIRS, seed)
    ]
    folder = run.folder / "adapters" / f"reward-{seed}"
    return Model(path=str(fit_reward(Model(path="tiny"), pairs, seed, folder)), dtype="float32")
