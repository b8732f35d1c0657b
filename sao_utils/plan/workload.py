"""What a run asks of which model, before it asks: requests, their tokens, and what servers get for them.

The counts follow the notebooks 01 to 06. Lengths are the questions' own where their texts are on this
machine, else assumed (`Rates`), and so are those of all that a model will write. A price has two
numbers: what such lengths cost, and the most that can be bought, with every reply as long as it may
be. A token is `requests.BYTES` bytes, as `requests` counts before a server has counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from sao_utils import templates
from sao_utils.files import read_column
from sao_utils.plan.evaluation_work import answer_work, benchmark_work, task_work
from sao_utils.plan.work import (
    LABELLED,
    OWN,
    REFERENCE,
    SAMPLED,
    TEMPERATURES,
    TRIED,
    WITHOUT,
    Rates,
    Work,
    ranked,
    tokens,
)
from sao_utils.recipe import Recipe, RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.stages.responses import PER_PROMPT


@dataclass(frozen=True)
class Workload:
    """All `works` of a run in order; `pairs` that a training of one seed has; what could not be counted,
    or was assumed, in `notes`; `measured`, the stages of the reference run where its rates hold;
    `problems`, for which the run would stop."""

    works: list[Work]
    rates: Rates
    pairs: int
    notes: list[str]
    measured: dict[str, dict]
    problems: list[str]

    @property
    def bill(self) -> dict[str, tuple[float, float]]:
        """Key of the recipe -> US$ for who has a price: at the assumed lengths, and at most."""
        owed: dict[str, tuple[float, float]] = {}
        for work in self.works:
            if work.dollars:
                before = owed.get(work.who, (0.0, 0.0))
                owed[work.who] = tuple(map(sum, zip(before, work.dollars)))
        return owed


def workload(recipe: Recipe) -> Workload:
    """What a run of a recipe asks of its models."""
    rates, measured = _rates(recipe)
    notes: list[str] = []
    problems: list[str] = []
    works = [*_loop(recipe, rates, _personas(recipe, problems, notes))]
    if recipe.model.engine == "api":
        notes.append("Notebooks 01 to 03 only: a model behind a server cannot be trained.")
    else:
        works += [
            *answer_work(recipe, rates, notes),
            *task_work(recipe, notes),
            *benchmark_work(recipe, rates, notes),
        ]
    pairs = round(recipe.prompts.count * rates.prompts_kept * rates.pairs_kept)
    return Workload([work for work in works if work.rows], rates, pairs, notes, measured, problems)


def actual(folder: Path) -> dict[str, dict]:
    """What the manifest in the folder of a run says of each stage; {} if nothing has run.

    What notebooks tried beside the run is added up as "variants".
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    stages = json.loads(path.read_text(encoding="utf-8")).get("stages", {})
    beside = [
        stage
        for other in sorted((folder / "variants").glob("*/manifest.json"))
        for stage in json.loads(other.read_text(encoding="utf-8")).get("stages", {}).values()
    ]
    if beside:
        total = {key: sum(s.get(key, 0) for s in beside) for key in ("seconds", "made", "tokens")}
        stages["variants"] = total
    return stages


# ---------------------------------------------------------------------------- rates


def _rates(recipe: Recipe) -> tuple[Rates, dict]:
    """Assumed rates, or for the tiny model those of the reference run, with its manifest's stages."""
    kept = 0.6 if recipe.pairs.require_consistent else 0.9
    cut = PER_PROMPT * max(0, Rates.response - recipe.responses.max_new_tokens)
    assumed = Rates("assumed", verdict=Rates.verdict - cut, pair=Rates.pair - cut, pairs_kept=kept)
    stages = actual(REFERENCE) if recipe.model.path == "tiny" else {}
    trained = [stages[name] for name in stages if name.startswith("training self")]
    if not trained or not {"prompts", "responses", "verdicts"} <= stages.keys():
        return assumed, {}
    prompts, responses, verdicts = (stages[k] for k in ("prompts", "responses", "verdicts"))
    asked = responses["made"] / PER_PROMPT
    pairs = sum(stage["pairs"] for stage in trained)
    prompt = prompts["tokens"] / prompts["made"]
    response = responses["tokens"] / responses["made"]
    return Rates(
        "of the reference run",
        prompt=prompt,
        response=response,
        verdict=Rates.verdict + (prompt - Rates.prompt) + PER_PROMPT * (response - Rates.response),
        pair=sum(stage["tokens"] for stage in trained) / pairs,
        prompts_kept=asked / prompts["made"],
        judged=verdicts["made"] / 2 / asked,
        pairs_kept=pairs / asked,
        **_differing(stages),
    ), stages


def _differing(stages: dict) -> dict[str, float]:
    """How many of the possible verdicts the reference run asked for: equal answers need none."""
    try:
        recipe = load_recipe(str(REFERENCE / "recipe.yaml"))
    except RecipeError:  # of another version
        return {}
    works = [*answer_work(recipe, Rates(""), []), *benchmark_work(recipe, Rates(""), [])]
    found = {}
    for rate, stage in (("differing", "comparisons"), ("compared", "benchmark_verdicts")):
        possible = sum(work.rows for work in works if work.stage == stage)
        if possible and stage in stages:
            found[rate] = stages[stage]["made"] / possible
    return found


# ---------------------------------------------------------------------------- the loop


def _loop(recipe: Recipe, rates: Rates, personas: list[str]) -> Iterator[Work]:
    """Stages 1 to 3, and what notebooks 01 to 03 try beside them."""
    seeds, count = len(recipe.seeds), recipe.prompts.count
    asked, tried = count * seeds, TEMPERATURES * min(TRIED, count) * seeds
    beside = seeds * (min(WITHOUT, count) + OWN) + tried
    kept, judged = rates.prompts_kept, rates.prompts_kept * rates.judged
    instruction, most_instruction = _instruction(recipe, rates, personas)

    def prompts(stage: str, rows: int, part: str = "") -> Work:
        limit = recipe.prompts.max_new_tokens
        new = min(rates.prompt, limit)
        mean = (instruction, new, most_instruction, limit, instruction)
        return Work(stage, "model", recipe.model, "write", rows, *mean, part)

    def responses(stage: str, most: int, part: str = "") -> Work:
        limit = recipe.responses.max_new_tokens
        new = min(rates.response, limit)
        mean = (rates.prompt, new, recipe.prompts.max_new_tokens, limit, rates.prompt)
        shared = rates.prompt / 2  # each prompt is answered twice
        rows = round(most * kept)
        arguments = (stage, "model", recipe.model, "write", rows, *mean, part, shared)
        return Work(*arguments, most_rows=most)

    def verdicts(stage: str, rows: float, most: int, **more) -> Work:
        return ranked(recipe, rates, stage, rows, most, recipe.responses.max_new_tokens, **more)

    yield prompts("prompts", asked)
    yield responses("responses", PER_PROMPT * asked)
    yield verdicts("verdicts", 2 * asked * judged, 2 * asked)
    labelled = _labelled(recipe)
    rows = 2 * (LABELLED if labelled is None else len(labelled))
    judges = recipe.judges if labelled else {}  # the others look at the user's pairs only
    more = [{"part": f"judges.{k}", "who": f"judges.{k}", "model": m} for k, m in judges.items()]
    for other in ({}, *more):
        work = verdicts("labelled", rows, rows, **other)
        if labelled:
            mean = fmean(labelled)
            work = replace(work, read=mean, most_read=mean, longest=max(labelled))
        yield work
    yield prompts("variants", beside, "prompts")
    yield responses("variants", PER_PROMPT * tried, "responses")
    if recipe.judging.method == "logprob":
        some = 2 * min(SAMPLED, asked * judged), 2 * min(SAMPLED, asked)
        yield verdicts("variants", *some, part="verdicts, sampled", sampled=True)


def _personas(recipe: Recipe, problems: list[str], notes: list[str]) -> list[str]:
    """Those of the user's own file, if it is here; and whether it has enough for each seed."""
    source, count = recipe.prompts.personas, recipe.prompts.count
    if source in (None, "tiny", "hub"):
        return []
    if not Path(source).is_file():
        notes.append(f"Not looked into: the personas in {source} are not on this machine.")
        return []
    try:
        personas = read_column(source, "persona")
    except RecipeError as error:  # with which the run would stop, too
        problems.append(str(error))
        return []
    if (different := len(set(personas))) < count:
        problems.append(
            f"{source} has {different} different personas, the run needs {count} of each seed: "
            f"prompts.count={different}, or a longer file."
        )
    return personas


def _instruction(recipe: Recipe, rates: Rates, personas: list[str]) -> tuple[float, float]:
    """Tokens of the persona template with a persona: in the mean, and the most that the mean may be."""
    if not personas:
        return rates.instruction, 2 * rates.instruction
    longest = sorted(map(tokens, personas), reverse=True)[: recipe.prompts.count]
    template = tokens(templates.source("persona"))
    return template + fmean(map(tokens, personas)), template + fmean(longest)


def _labelled(recipe: Recipe) -> list[float] | None:
    """Tokens of the ranking prompt of each pair in `judging.labelled`; None where it names no file."""
    from sao_utils.stages.labelled import labelled_pairs

    if recipe.judging.labelled is None:
        return None
    try:
        pairs = labelled_pairs(recipe.judging.labelled)
    except RecipeError:  # told when it runs
        return []
    return [
        tokens(templates.ranking_prompt(pair["prompt"], *pair["responses"]))
        for pair in pairs
        if pair["discarded"] is None
    ]
