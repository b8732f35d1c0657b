"""SAO (arXiv 2510.06652), Algorithm 1: a model aligns itself on data that it makes itself.

`steps` is the algorithm. The other functions give access to its results by name, so that a notebook that
is run by itself makes whatever is missing: `rows` of a stage, `pairs` of an arm, `train`, and
`candidates` to evaluate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from sao_utils.disk import write_whole
from sao_utils.evaluation.answers import Candidate
from sao_utils.evaluation.questions import evaluated_prompts
from sao_utils.machine import versions
from sao_utils.methods.rounds import Round
from sao_utils.recipe import Arm, Model, Recipe, RecipeError
from sao_utils.stages.judging import judge_pairs, response_pairs, weaken
from sao_utils.stages.pairs import build_pairs
from sao_utils.stages.personas import draw_personas
from sao_utils.stages.prompts import select_prompts, write_prompts
from sao_utils.stages.responses import write_responses
from sao_utils.store import Run, input_files, record
from sao_utils.training import TrainingFailed
from sao_utils.training.fit import fit, read_done
from sao_utils.training.processes import is_main

Stage = Literal["personas", "prompts", "responses", "verdicts", "pairs"]


def steps(
    run: Run, policy: Model, judge: Model, round: int = 0, seeds: Sequence[int] | None = None
) -> Iterator[tuple[Stage, list[dict]]]:
    """One round of SAO, step by step; each step runs only when the iterator reaches it.

    Args:
        policy: the model that writes prompts and responses, and is to be trained.
        judge: the model that ranks the responses; in the paper, the policy itself.
        round: 0 for the first; each round has its own personas.
        seeds: by default, all seeds of the run, which share the same models in the first round.
    """
    personas = draw_personas(run, round)
    personas = [row for row in personas if seeds is None or row["seed"] in seeds]
    yield "personas", personas
    prompts = write_prompts(run, personas, policy, round)
    prompts = [row for row in prompts if seeds is None or row["seed"] in seeds]
    prompts = select_prompts(run, prompts, avoid=evaluated_prompts(run.recipe.evaluation))
    yield "prompts", prompts
    responses = write_responses(run, prompts, policy)
    yield "responses", responses
    verdicts = judge_pairs(run, response_pairs(responses), judge)
    verdicts = weaken(verdicts, run.recipe.judging)
    yield "verdicts", verdicts
    yield "pairs", build_pairs(run, verdicts, policy)


def sao_round(run: Run, this: Round) -> list[dict]:
    """The pairs of one round of one seed."""
    *_, (_, pairs_) = steps(run, this.policy, this.judge, this.number, [this.seed])
    return pairs_


def rows(run: Run, stage: Stage) -> list[dict]:
    """The rows of a stage; whatever is missing of it and of the stages before it is made."""
    key = (str(run.folder), run.recipe.model_dump_json(), stage)
    if key not in _MADE or _MADE[key][0] != _state(run):
        made = steps(run, run.recipe.model, run.recipe.judging_model)
        found = next(rows_ for name, rows_ in made if name == stage)
        _MADE[key] = _state(run), found
    return _MADE[key][1]


def trial_size(recipe: Recipe, most: int) -> int:
    """How many prompts or pairs a notebook uses for a side experiment.

    A sixth of `prompts.count`, but at least 10 (or all, if there are fewer) and at most `most`.
    """
    count = recipe.prompts.count
    return min(count, most, max(10, count // 6))


def pairs(run: Run, arm: Arm = "self") -> list[dict]:
    """The pairs of an arm over all seeds, including discarded ones (`stages.pairs.build_pairs`)."""
    return build_pairs(run, rows(run, "verdicts"), run.recipe.model, arm)


def train(run: Run, arm: Arm, seed: int, watch: Callable[[list[dict]], None] | None = None) -> Path:
    """SAO's last step: train the policy on the pairs of one arm and seed, unless this is already done.

    The arms "self", "random" and "oracle" use training.algorithm; "sft_random" imitates one of the
    policy's own answers per prompt, drawn at random.

    Args:
        watch: called after every step with all rows of the log.

    Returns:
        The folder with the weights (safetensors), log.jsonl, probe.jsonl and done.json.

    Raises:
        TrainingFailed: there are no pairs, or the training failed; the message says what to do.
    """
    folder = run.folder / "adapters" / f"{arm}-{seed}"
    key = (str(run.folder), run.recipe.model_dump_json(), arm, seed)
    if _TRAINED.get(key) == _state(run, folder):
        return folder
    used = [row for row in pairs(run, arm) if row["seed"] == seed and row["discarded"] is None]
    if not used:
        raise TrainingFailed(_no_pairs(run, arm))
    settings = run.recipe.training
    algorithm = "sft" if arm == "sft_random" else settings.algorithm
    before = read_done(folder)
    fit(run.recipe.model, used, settings, algorithm, seed, folder, watch)
    done = read_done(folder)
    if done != before and is_main():
        counts = {name: done[name] for name in ("steps", "pairs", "tokens")}
        record(run, f"training {arm}-{seed}", done["seconds"], adds=False, **counts)
        # The recipe may change later; the model card reports the one that this model was trained with.
        made_with = {"fingerprint": done["fingerprint"], "versions": versions()}
        made_with["recipe"] = run.recipe.model_dump(mode="json")
        write_whole(folder / "made_with.json", json.dumps(made_with, indent=1))
    _TRAINED[key] = _state(run, folder)
    return folder


# Caches of this process: to check that nothing is left to do, all rows must be read.
_MADE: dict[tuple, tuple[list, list[dict]]] = {}
_TRAINED: dict[tuple, list] = {}


def _state(run: Run, folder: Path | None = None) -> list[tuple[int, int] | None]:
    """Times and sizes of files: they show whether rows, a trained model or their inputs have changed."""
    files = [run.rows(stage) for stage in ("personas", "prompts", "responses", "verdicts")]
    files += [*input_files(run.recipe), *([folder / "done.json"] if folder else [])]
    there = [path.stat() if path.is_file() else None for path in files]
    return [found and (found.st_mtime_ns, found.st_size) for found in there]


def _no_pairs(run: Run, arm: Arm) -> str:
    lost = ", ".join(f"{-count} {reason}" for reason, count in funnel(run, arm) if count < 0)
    return (
        f"There are no pairs to train the arm '{arm}' on. Discarded, over all seeds: {lost or 'none'}. If "
        "there is no oracle for your prompts, leave the arm 'oracle' out of arms. Else raise "
        "prompts.count, lower pairs.min_margin, or set pairs.require_consistent=false (notebook 03 shows "
        "how the judge decides)."
    )


def candidates(run: Run, names: Sequence[str] | None = None) -> list[Candidate]:
    """What evaluation compares: "base", every arm and seed, and the recipe's `others`.

    Args:
        names: return only these; models that are not trained yet are trained.

    Raises:
        RecipeError: a name is none of the above.
    """
    recipe, found = run.recipe, []
    every = ["base", *recipe.arms, *recipe.others]
    for name in names or every:
        if name not in every:
            raise RecipeError(
                f"There is no model '{name}' to compare. Models: {', '.join(every)}. Add models under "
                "the recipe key `others`."
            )
        if name not in recipe.arms:
            found.append(Candidate(name, None, recipe.others.get(name, recipe.model)))
            continue
        for seed in recipe.seeds:
            adapter = {"adapter": str(train(run, name, seed))}
            found.append(Candidate(name, seed, recipe.model.model_copy(update=adapter)))
    return found


def funnel(run: Run, arm: Arm = "self") -> list[tuple[str, int]]:
    """What became of every requested prompt, over all seeds, on the way to a training pair.

    Returns:
        (label, count) rows: "asked for", each reason for discarding, "prompts", each reason, "pairs".
        The counts of the reasons are negative, so that the rows add up: nothing is lost without a
        reason.
    """
    return funnel_of(rows(run, "prompts"), pairs(run, arm))


def funnel_of(prompts: list[dict], made: list[dict]) -> list[tuple[str, int]]:
    """The `funnel` of existing rows: prompts and pairs, including discarded ones."""
    kept = [row for row in prompts if row["discarded"] is None]
    used = [row for row in made if row["discarded"] is None]
    return [
        ("asked for", len(prompts)),
        *_reasons(prompts),
        ("prompts", len(kept)),
        *_reasons(made),
        ("pairs", len(used)),
    ]


def _reasons(found: list[dict]) -> list[tuple[str, int]]:
    counts = Counter(row["discarded"] for row in found if row["discarded"] is not None)
    return [(reason, -count) for reason, count in counts.most_common()]
