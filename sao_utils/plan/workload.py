"""What a run will ask of each model: requests, their tokens, and what servers charge for them.

The counts follow notebooks 01 to 06. Lengths and what filters keep are assumed (`Rates`); those of
benchmarks are in evaluation/benchmarks.yaml, those of tasks in sizes.yaml. A price has two numbers: the
cost at these lengths, and the most it can be, with every reply as long as it may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from sao_utils import templates
from sao_utils.engines.api import VERDICT_TOKENS
from sao_utils.engines.requests import dollars, estimated_tokens
from sao_utils.evaluation.benchmark_files import BENCHMARKS
from sao_utils.evaluation.questions import SETS
from sao_utils.files import is_table, read_column
from sao_utils.methods.sao import trial_size
from sao_utils.plan.hardware import data
from sao_utils.recipe import Model, Recipe
from sao_utils.stages.labelled import labelled_pairs
from sao_utils.stages.responses import PER_PROMPT

#: Tokens that a server puts around the messages of a request; assumed, and more than most take.
AROUND = 10
#: Tokens of a written verdict: "ranking: 1 > 2" and the end token.
SHORT_VERDICT = 8
#: What notebooks 01 to 03 try beside the run, in its folder variants/: prompts without a persona, prompts
#: from a file of two, other temperatures, prompts for each of these, and pairs judged by sampling. WITHOUT,
#: TRIED and SAMPLED are upper limits (`sao.trial_size`).
WITHOUT, OWN, TEMPERATURES, TRIED, SAMPLED = 400, 2, 2, 100, 150
LABELLED = 2  # pairs that notebook 03 labels itself if the recipe names no file
_UNKNOWN = {"items": 1, "passes": 0, "read": 0}  # a task that is not in sizes.yaml


@dataclass(frozen=True)
class Rates:
    """Assumed lengths (tokens), and assumed shares that the filters keep."""

    source: str = "assumed"
    instruction: float = 90  # the persona template with its persona
    prompt: float = 60
    response: float = 375
    prompts_kept: float = 0.95
    judged: float = 1.0  # of the prompts: those whose two responses differ
    pairs_kept: float = 0.6
    differing: float = 1.0  # of the answers to evaluation questions: those that differ
    compared: float = 1.0  # the same for benchmarks

    @property
    def verdict(self) -> float:
        """Tokens of the ranking prompt with a prompt and both responses."""
        return 120 + self.prompt + PER_PROMPT * self.response

    @property
    def pair(self) -> float:
        """Tokens of a pair in training."""
        return PER_PROMPT * (self.prompt + self.response)


class Lengths(NamedTuple):
    """Tokens read and written for a request, on average and at most."""

    read: float
    written: float
    most_read: float
    most_written: float


@dataclass(frozen=True)
class Work:
    """Requests of one kind to one model, or one training.

    Attributes:
        stage: as named in a run's manifest; `part` is a part of it: a benchmark, a task.
        who: the recipe's key for the model.
        rows: as counted in a run's manifest; `most_rows` if nothing is dropped on the way.
        lengths: of a request; for a training, of a pair in all epochs, and at most of one of its answers.
        requests: how many a row stands for: a task of lm-eval has one row per model.
    """

    stage: str
    who: str
    model: Model
    rows: int
    lengths: Lengths
    part: str = ""
    most_rows: int = 0
    requests: int = 1

    @property
    def label(self) -> str:
        """The part, and the model's key unless it is the run's own model or judge."""
        who = "" if self.who in ("model", "judge") else self.who
        return ", ".join(filter(None, (self.part, who)))

    @property
    def trains(self) -> bool:
        return self.stage.startswith("training")

    @property
    def tokens(self) -> int:
        """Tokens written or, if the model writes nothing, read."""
        return round(self.rows * self.requests * (self.lengths.written or self.lengths.read))

    @property
    def dollars(self) -> tuple[float, float] | None:
        """US$ at these lengths, and at most; None if the model has no price."""
        if not self.model.priced:
            return None
        read, written, most_read, most_written = self.lengths
        rows = max(self.rows, self.most_rows)
        usual = dollars(self.model, self.rows * read, self.rows * written)
        most = dollars(self.model, rows * (most_read + AROUND), rows * most_written)
        return usual, max(usual, most)


def workload(recipe: Recipe) -> list[Work]:
    """What a run of a recipe asks of its models, in order.

    Raises:
        RecipeError: a file that the recipe names is missing or cannot be read.
    """
    rates = rates_of(recipe)
    parts = [round_work, notebook_work]
    if recipe.model.engine != "api":  # else nothing is trained: only notebooks 01 to 03
        parts += [training_work, answer_work, task_work, benchmark_work]
    return [work for part in parts for work in part(recipe, rates) if work.rows]


def bill(works: list[Work]) -> dict[str, tuple[float, float]]:
    """The recipe's key for each server with a price -> US$ at the assumed lengths, and at most."""
    owed: dict[str, tuple[float, float]] = {}
    for work in works:
        if work.dollars:
            usual, most = owed.get(work.who, (0.0, 0.0))
            owed[work.who] = usual + work.dollars[0], most + work.dollars[1]
    return owed


def rates_of(recipe: Recipe) -> Rates:
    """Measured rates for a model listed in sizes.yaml, assumed ones for others."""
    measured = data("sizes")["rates"]
    if recipe.model.path in measured:
        return Rates(**measured[recipe.model.path])
    response = min(Rates.response, recipe.responses.max_new_tokens)
    kept = Rates.pairs_kept if recipe.pairs.require_consistent else 0.9
    return Rates(response=response, pairs_kept=kept)


def prompt_limit(recipe: Recipe) -> float:
    """Most tokens of a prompt: as many as may be generated, or as the longest in the recipe's file."""
    settings, texts = recipe.prompts, []
    if settings.source == "file" and is_table(settings.data):
        texts = read_column(settings.data, settings.column)
    return max(settings.max_new_tokens, *map(estimated_tokens, texts), 0)


# ---------------------------------------------------------------------------- a round, and beside it


def round_work(recipe: Recipe, rates: Rates) -> tuple[Work, Work, Work]:
    """Prompts, responses and verdicts of one round."""
    asked, model = recipe.prompts.count * len(recipe.seeds), recipe.model
    written = 0 if recipe.prompts.source == "file" else asked
    limit, read = recipe.prompts.max_new_tokens, rates.instruction
    of_prompt = Lengths(read, min(rates.prompt, limit), 2 * read, limit)
    longest, most_written = prompt_limit(recipe), recipe.responses.max_new_tokens
    of_response = Lengths(rates.prompt, rates.response, longest, most_written)
    kept, most = rates.prompts_kept, PER_PROMPT * asked
    return (
        Work("prompts", "model", model, written, of_prompt),
        Work("responses", "model", model, round(most * kept), of_response, most_rows=most),
        verdicts_work(recipe, rates, "verdicts", 2 * asked * kept * rates.judged, 2 * asked),
    )


def notebook_work(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """What notebooks 01 to 03 try beside the run, and verdicts on pairs with known labels."""
    rows, most = 2 * LABELLED, {}
    if recipe.judging.labelled:
        pairs = labelled_pairs(recipe.judging.labelled)
        rows, texts = 2 * len(pairs), [text for pair in pairs for text in pair["responses"]]
        most["limit"] = max(map(estimated_tokens, texts))
        most["prompt"] = max(estimated_tokens(pair["prompt"]) for pair in pairs)
        for name in recipe.judges:
            yield verdicts_work(recipe, rates, "labelled", rows, rows, f"judges.{name}", **most)
    yield verdicts_work(recipe, rates, "labelled", rows, rows, **most)
    prompts, responses, _ = round_work(recipe, rates)
    written = len(recipe.seeds) * (trial_size(recipe, WITHOUT) + OWN)
    yield replace(prompts, stage="variants", part="prompts", rows=written)
    rows = PER_PROMPT * TEMPERATURES * trial_size(recipe, TRIED)
    yield replace(responses, stage="variants", part="responses", rows=rows, most_rows=rows)
    if recipe.judging.method == "logprob":
        rows, judging = 2 * trial_size(recipe, SAMPLED), {"method": "sampled"}
        again = recipe.model_copy(update={"judging": recipe.judging.model_copy(update=judging)})
        yield verdicts_work(again, rates, "variants", rows, rows, part="verdicts, sampled")


def training_work(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """One training per arm and seed."""
    pairs = round(recipe.prompts.count * rates.prompts_kept * rates.pairs_kept)
    for arm in recipe.arms:
        share = 0.5 if arm == "sft_random" else 1.0  # one answer of each pair
        yield from trainings(recipe, arm, pairs, rates.pair * share * recipe.training.epochs)


def trainings(recipe: Recipe, name: str, rows: int, read: float) -> Iterator[Work]:
    """One training per seed, on `rows` rows; `read`: tokens per row, over all epochs."""
    for seed in recipe.seeds:
        lengths = Lengths(read, 0, recipe.pairs.max_tokens, 0)
        yield Work(f"training {name}-{seed}", "model", recipe.model, rows, lengths)


def verdicts_work(
    recipe: Recipe,
    rates: Rates,
    stage: str,
    rows: float,
    most_rows: int,
    who: str = "",
    part: str = "",
    limit: int | None = None,
    prompt: float | None = None,
) -> Work:
    """Verdicts with the ranking prompt; each order of a pair is a row.

    Args:
        who: the recipe's key for the judge; by default the run's own.
        limit, prompt: most tokens of a response and of a prompt; by default the run's.
    """
    who = who or own_judge(recipe)
    written = _short_verdict(recipe.models[who])
    if recipe.judging.method == "sampled":
        most = recipe.judging.max_new_tokens
        written = (min(SHORT_VERDICT, most), most)
    most_read = estimated_tokens(templates.ranking_prompt("", "", ""))
    most_read += prompt or prompt_limit(recipe)
    most_read += PER_PROMPT * (limit or recipe.responses.max_new_tokens)
    lengths = Lengths(rates.verdict, written[0], max(most_read, rates.verdict), written[1])
    return Work(stage, who, recipe.models[who], round(rows), lengths, part, most_rows)


def own_judge(recipe: Recipe) -> str:
    """The recipe's key for the judge of its pairs."""
    return "judge" if recipe.judge else "model"


def _short_verdict(model: Model) -> tuple[int, int]:
    """Tokens that a judge writes to choose, on average and at most; only servers write any."""
    return (SHORT_VERDICT, VERDICT_TOKENS) if model.engine == "api" else (0, 0)


# ---------------------------------------------------------------------------- evaluation


def _compared(recipe: Recipe, controls: bool = False) -> list[tuple[str, Model, int]]:
    """(recipe's key, model, how many): the base with its tuned models, and each of `others`."""
    if recipe.iterated:  # the base and each round's model; SynPO also trains on the seeds alone
        rounds = recipe.rounds + (recipe.method == "synpo")
        return [("model", recipe.model, 1 + rounds * len(recipe.seeds))]
    arms = len(recipe.arms) if controls or "self" not in recipe.arms else 1
    others = [(f"others.{name}", model, 1) for name, model in recipe.others.items()]
    return [("model", recipe.model, 1 + arms * len(recipe.seeds)), *others]


def answer_work(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """Answers to the run's own questions, and the comparisons of them that the notebooks make."""
    settings, limit = recipe.evaluation, recipe.evaluation.max_new_tokens
    count, question = questions_of(recipe)
    compared = _compared(recipe, controls=True)
    for who, model, models in compared:
        rows = count * len(settings.temperatures) * models
        lengths = Lengths(question, min(rates.response, limit), question, limit)
        yield Work("answers", who, model, rows, lengths)
    seeds, tuned = len(recipe.seeds), compared[0][2] - 1
    comparisons = [("", tuned, "")]
    if "self" in recipe.arms and not recipe.iterated:
        comparisons += [(f"judges.{name}", seeds, "") for name in recipe.judges]
        if not recipe.judges:
            comparisons.append(("model", seeds, "judged by the tuned model"))
    for who, models, part in comparisons:
        most = 2 * count * models
        rows = most * rates.differing
        # The mean will do: all questions are asked equally often.
        yield verdicts_work(recipe, rates, "comparisons", rows, most, who, part, limit, question)


def questions_of(recipe: Recipe) -> tuple[int, float]:
    """How many questions the evaluation has, and their mean number of tokens."""
    source = recipe.evaluation.questions
    if source in BENCHMARKS:
        return BENCHMARKS[source]["prompts"], BENCHMARKS[source]["question"]
    if source in SETS:
        texts = SETS[source](recipe.evaluation)
    else:
        texts = read_column(source, "prompt")
    return len(texts), fmean(map(estimated_tokens, texts))


def task_work(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """What lm-eval asks the base, the tuned models and others with weights, using transformers.

    A task of unknown size gets no requests.
    """
    known, limit = data("sizes")["tasks"], recipe.evaluation.task_limit
    in_16_bit = {"engine": "transformers", "quantisation": "none"}
    for name in recipe.evaluation.tasks:
        chosen = {task: size for task, size in known.items() if name in (task, size["group"])}
        for task, size in (chosen or {f"{name}, size not known": _UNKNOWN}).items():
            asked = min(size["items"], (limit or size["items"]) * size.get("subjects", 1))
            passes = round(size["passes"] * asked / size["items"])
            read, written, most = size["read"], size.get("written", 0), size.get("most", 0)
            lengths = Lengths(read, written, 2 * read, most)  # ours: the longest is twice the mean
            for who, model, count in _compared(recipe):
                if model.engine != "api":  # a server cannot do them
                    model = model.model_copy(update=in_16_bit if model.engine == "vllm" else {})
                    yield Work("tasks", who, model, count, lengths, task, requests=passes)


def benchmark_work(recipe: Recipe, rates: Rates) -> Iterator[Work]:
    """Answers to the benchmarks by every model compared, and verdicts on them by every judge."""
    settings, limit = recipe.evaluation, recipe.evaluation.max_new_tokens
    usual, models = min(rates.response, limit), sum(n for _, _, n in _compared(recipe))
    judges = [own_judge(recipe), *(f"judges.{name}" for name in recipe.judges)]
    for name in settings.benchmarks:
        size = BENCHMARKS[name]
        prompts, turns = size["prompts"], size["turns"]
        prompts = min(prompts, settings.benchmark_limit or prompts)
        asked, answers = size["question"] * (turns + 1) / 2, (turns - 1) / 2  # and earlier turns
        lengths = Lengths(asked + answers * usual, usual, asked + answers * limit, limit)
        for who, model, count in _compared(recipe):
            rows = count * prompts * turns
            yield Work("benchmark_answers", who, model, rows, lengths, name)
        shown, answers = size["shown"], size["answers"]
        most = size["verdicts"] * prompts * (models - size.get("without", 0))
        rows, retries = round(most * rates.compared), size.get("retries", 0)
        for who in judges:
            model = recipe.models[who]
            written = (size["argued"], size["most"]) if "argued" in size else _short_verdict(model)
            # A retry's prompt contains the first reply.
            most_read = shown + answers * limit + retries * written[1] / 2
            lengths = Lengths(shown + answers * usual, written[0], most_read, written[1])
            most_rows = most * (1 + retries)
            yield Work("benchmark_verdicts", who, model, rows, lengths, name, most_rows)
