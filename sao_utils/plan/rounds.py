"""What a run in rounds asks of each model: SAO's iterations, and SynPO.

As in `workload`, counts follow the method, while lengths and what filters keep are assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sao_utils import templates
from sao_utils.engines.requests import estimated_tokens
from sao_utils.methods.iterate import IMITATING
from sao_utils.plan.workload import (
    Lengths,
    Rates,
    Work,
    answer_work,
    own_judge,
    prompt_limit,
    rates_of,
    round_work,
    trainings,
    verdicts_work,
    workload,
)
from sao_utils.recipe import Recipe
from sao_utils.stages.diversity import SAMPLE
from sao_utils.stages.topics import TOKENS

#: Shares assumed for SynPO, which no run has measured: seeds whose gold answer is better, pairs kept.
BETTER, KEPT = 0.6, 0.5
KEYWORDS = 8  # tokens of three keywords
JUSTIFIED = 100  # tokens of a judge's reply that gives points; its prompt asks for up to 100 words
LABELS = 12  # tokens of a topic and an intention


def work_of(recipe: Recipe) -> list[Work]:
    """What a run of a recipe asks of its models, in one round (`workload`) or in several.

    Raises:
        RecipeError: a file that the recipe names is missing or cannot be read.
    """
    if recipe.iterated:
        return [work for work in rounds_work(recipe, rates_of(recipe)) if work.rows]
    return workload(recipe)


def rounds_work(recipe: Recipe, rates: Rates) -> list[Work]:
    """What all rounds of all seeds ask of the recipe's models, in order, and then their evaluation."""
    of_method = _synpo_round if recipe.method == "synpo" else _sao_round
    works = list(_generator(recipe, rates)) if recipe.method == "synpo" else []
    pairs = 0
    for number in range(recipe.rounds):
        made, new = of_method(recipe, rates, number)
        pairs = pairs + new if recipe.iterations.grow else new
        works += [replace(work, part=f"round {number + 1}") for work in made]
        imitates, epochs = recipe.method in IMITATING, recipe.training.epochs
        if recipe.method == "self_rewarding" and not number:
            imitates, epochs = True, recipe.self_rewarding.first.epochs
        read = rates.pair * (0.5 if imitates else 1.0) * epochs  # SFT: one answer per pair
        works += trainings(recipe, f"{recipe.method}-round{number + 1}", pairs, read)
    return [*works, *_topics(recipe, rates), *answer_work(recipe, rates)]


def _sao_round(recipe: Recipe, rates: Rates, number: int) -> tuple[list[Work], int]:
    """The work of a round of SAO, or of a method that makes its pairs from the same prompts; new pairs."""
    if recipe.method == "sft_seeds":  # it generates nothing
        return [], recipe.synpo.seed_count
    if recipe.method == "self_rewarding" and not number:
        return [], recipe.synpo.seed_count + recipe.self_rewarding.judged_count
    pairs = round(recipe.prompts.count * rates.prompts_kept * rates.pairs_kept)
    works, several = list(round_work(recipe, rates)), {}
    if recipe.method in ("sampling_ranking", "self_rewarding"):
        n = recipe.ranking.samples
        scorer = "points" if recipe.method == "self_rewarding" else recipe.ranking.scorer
        pairs_of_n = n * (n - 1) / 2 if scorer == "self" else 0  # every two responses are compared
        several = {"responses": n / 2, "verdicts": pairs_of_n}
        if scorer == "points":
            works.append(_points(recipe, rates, works[1].rows * n / 2, works[1].most_rows * n / 2))
    times = [(work, several.get(work.stage, 1)) for work in works]
    return [
        replace(w, rows=round(w.rows * by), most_rows=round(w.most_rows * by)) for w, by in times
    ], pairs


def _points(recipe: Recipe, rates: Rates, responses: float, most: float) -> Work:
    """The judge's replies that give points to single responses; `responses` of them, `most` at most."""
    settings, judge = recipe.points, recipe.judging_model
    around = estimated_tokens(templates.source(settings.template))
    limit = prompt_limit(recipe) + recipe.responses.max_new_tokens
    written = min(JUSTIFIED, settings.max_new_tokens)
    read = around + rates.prompt + rates.response
    lengths = Lengths(read, written, around + limit, settings.max_new_tokens)
    rows, most_rows = (round(settings.samples * count) for count in (responses, most))
    who = own_judge(recipe)
    return Work("ranks", who, judge, rows, lengths, most_rows=most_rows)


def _synpo_round(recipe: Recipe, rates: Rates, number: int) -> tuple[list[Work], int]:
    settings, seeds, model = recipe.synpo, len(recipe.seeds), recipe.model
    limit, most = recipe.prompts.max_new_tokens, recipe.responses.max_new_tokens
    asked = recipe.prompts.count * seeds
    kept, seeded = round(asked * rates.prompts_kept), settings.seed_count * seeds
    read = estimated_tokens(templates.source("keywords")) + KEYWORDS
    rewritten = estimated_tokens(templates.source("improver")) + rates.prompt + rates.response
    of_prompt = Lengths(read, min(rates.prompt + rates.response, limit), read + KEYWORDS, limit)
    of_answer = Lengths(rates.prompt, rates.response, limit, most)
    of_rewriting = Lengths(rewritten, rates.response, rewritten + limit + most, most)
    each = 2 if settings.rejected == "base" and number else 1
    answers, most_answers = (count * each + seeded for count in (kept, asked))
    works = [
        Work("prompts", "model", model, asked, of_prompt),
        Work("responses", "model", model, answers, of_answer, most_rows=most_answers),
        Work("improved", "model", model, kept, of_rewriting, most_rows=asked),
    ]
    if settings.scorer == "self":
        rows, most_rows = (2 * (count + seeded) for count in (kept, asked))
        works.append(verdicts_work(recipe, rates, "scores", rows, most_rows))
    examples = round(settings.seed_count * BETTER)
    name = f"improver-round{number + 1}"
    read = (rewritten + rates.response) * settings.improver.epochs
    works += trainings(recipe, name, examples, read)
    pairs = round(recipe.prompts.count * rates.prompts_kept * KEPT)
    return works, min(pairs, settings.max_pairs or pairs)


def _topics(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """What notebook 09 asks the judge about a sample of the first round's prompts."""
    judge = recipe.judging_model
    if recipe.method != "synpo" or judge.path == "tiny":
        return
    around = estimated_tokens(templates.source("topics"))
    limit = max(TOKENS, recipe.judging.max_new_tokens)
    longest = around + recipe.prompts.max_new_tokens
    lengths = Lengths(around + rates.prompt, LABELS, longest, limit)
    most = min(SAMPLE, recipe.prompts.count)
    rows = min(SAMPLE, round(recipe.prompts.count * rates.prompts_kept))
    yield Work("topics", own_judge(recipe), judge, rows, lengths, most_rows=most)


def _generator(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """The trainings on the seeds alone, which happen once."""
    settings, answered = recipe.synpo, rates.prompt + rates.response
    read = estimated_tokens(templates.source("keywords")) + KEYWORDS + answered
    yield from trainings(recipe, "generator", settings.seed_count, read * settings.generator.epochs)
    yield from trainings(
        recipe, "sft_seeds", settings.seed_count, answered * settings.improver.epochs
    )
