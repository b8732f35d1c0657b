"""Iterations of any method: M0 makes the data that M1 is trained on, M1 the data for M2, and so on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sao_utils.evaluation.answers import Candidate
from sao_utils.methods.controls import sft_random_round, sft_seeds_round
from sao_utils.methods.rounds import Round, with_adapter
from sao_utils.methods.sampling_ranking import sampling_ranking_round
from sao_utils.methods.sao import sao_round
from sao_utils.methods.self_rewarding import self_rewarding_round
from sao_utils.methods.synpo import synpo_round
from sao_utils.recipe import Model, Recipe, Training
from sao_utils.store import Run
from sao_utils.training import TrainingFailed
from sao_utils.training.fit import Algorithm, fit, sft_settings

#: method -> its round: (run, Round) -> the pairs it makes. To add a method, also add it to `recipe.Method`.
METHODS: dict[str, Callable[[Run, Round], list[dict]]] = {
    "sao": sao_round,
    "synpo": synpo_round,
    "self_rewarding": self_rewarding_round,
    "sampling_ranking": sampling_ranking_round,
    "sft_random": sft_random_round,
    "sft_seeds": sft_seeds_round,
}
#: methods whose rows are imitated (SFT), not used as preferences
IMITATING = ("sft_random", "sft_seeds")


@dataclass(frozen=True)
class Trained:
    """The result of one round: its model, its judge, and all pairs it made, discarded ones included."""

    candidate: Candidate
    judge: Model
    pairs: list[dict]


def iterate(
    run: Run,
    seed: int,
    name: str | None = None,
    round_: Callable[[Run, Round], list[dict]] | None = None,
) -> Iterator[Trained]:
    """Yield the models M1, M2, ... of one seed, each as soon as it is trained.

    Args:
        name: the method's name in tables and folders; by default the recipe's method.
        round_: the round function of your own method; by default that of the method `name`.

    Raises:
        TrainingFailed: a round has no pairs, or its training failed.
    """
    recipe = run.recipe
    name = name or recipe.method
    make_pairs = round_ or METHODS[name]
    base = policy = recipe.model
    pool: list[dict] = []
    for number in range(recipe.rounds):
        judge = judge_of(run, policy)
        made = make_pairs(run, Round(number, seed, policy, base, judge))
        new = [row for row in made if row["discarded"] is None]
        pool = pool + new if recipe.iterations.grow else new
        folder = run.folder / "adapters" / f"{name}-round{number + 1}-{seed}"
        start = policy if recipe.iterations.start == "previous" else base
        algorithm, settings = _training_of(recipe, name, number)
        if not pool:
            lost = Counter(row["discarded"] for row in made).most_common()
            reasons = ", ".join(f"{count} {reason}" for reason, count in lost) or "none"
            raise TrainingFailed(
                f"Round {number + 1} of {name}, seed {seed}: there are no pairs to train on. Discarded: "
                f"{reasons}. Raise prompts.count, or loosen what discards them (pairs.*, *.threshold)."
            )
        fit(start, pool, settings, algorithm, seed, folder)
        policy = with_adapter(base, folder)
        yield Trained(Candidate(name, seed, policy, number + 1), judge, made)


def _training_of(recipe: Recipe, name: str, number: int) -> tuple[Algorithm, Training]:
    """The algorithm and settings for a round: some rounds make rows without a rejected answer."""
    if name == "self_rewarding" and number == 0:
        return "sft", sft_settings(recipe.training, recipe.self_rewarding.first)
    return "sft" if name in IMITATING else recipe.training.algorithm, recipe.training


def first_round(run: Run, seed: int) -> Round:
    """The models of the first round: the base is the policy, and the judge unless the recipe names one."""
    base = run.recipe.model
    return Round(0, seed, base, base, judge_of(run, base))


def all_rounds(run: Run) -> list[Trained]:
    """Every round of every seed; rounds that are missing are run."""
    return [trained for seed in run.recipe.seeds for trained in iterate(run, seed)]


def judge_of(run: Run, policy: Model) -> Model:
    """The judge of a round: the recipe's if it names one, else the current policy or the base."""
    recipe = run.recipe
    if recipe.judge is not None:
        return recipe.judge
    return policy if recipe.iterations.judge == "current" else recipe.model
