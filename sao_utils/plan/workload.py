"""What a run asks of which model, before it asks: requests, their tokens, and what servers get for them.

The counts follow the notebooks 01 to 06. Lengths are the questions' own where their texts are on this
machine, else assumed (`Rates`), and so are those of all that a model will write. A price has two
numbers: what such lengths cost, and the most that can be bought, with every reply as long as it may
be. A token is `asking.BYTES` bytes, as `asking` counts before a server tells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import yaml

from sao_utils import templates
from sao_utils.engines.api import VERDICT_TOKENS
from sao_utils.engines.requests import BYTES, dollars
from sao_utils.evaluation.questions import SETS
from sao_utils.files import read_column, read_table
from sao_utils.recipe import Evaluation, Model, Recipe, RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.stages.responses import PER_PROMPT

#: The committed run of a checkout, whose rates hold for the tiny model.
REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
#: Tokens that a server puts around the messages of a request; assumed, and more than most take.
AROUND = 10
#: Tokens of a verdict that is written: "ranking: 1 > 2" and its end.
FEW = 8
#: A run's stages whose tokens are read, not written.
READ = ("verdicts", "labelled", "duels", "harness", "benchmark_verdicts")
#: What notebooks 01 to 03 try beside the run, in its folder variants/: prompts without a persona and of
#: a file of two, temperatures, prompts of each, and pairs that are judged by sampling.
WITHOUT, OWN, TEMPERATURES, TRIED, SAMPLED = 400, 2, 3, 100, 150
LABELLED = 2  # pairs that notebook 03 labels itself where the recipe names no file


@dataclass(frozen=True)
class Rates:
    """What is assumed of lengths (tokens) and of what the filters keep (shares)."""

    source: str
    instruction: float = 90  # the persona template with its persona
    prompt: float = 60
    response: float = 375
    spread: float = 0.7  # of response lengths: standard deviation over mean, lognormal
    verdict: float = 930  # the ranking prompt with both responses
    # Of it, in the mean of both orders: what vLLM's prefix cache holds, in blocks of 16 tokens. The
    # first order begins like all others (16), the second like the first up to its response 1 (96).
    shared: float = 56
    pair: float = 900  # trained on: prompt and response twice
    prompts_kept: float = 0.95
    judged: float = 1.0  # of the prompts: those whose two answers differ
    pairs_kept: float = 0.6
    duelled: float = 1.0  # of the answers to evaluation questions: those that differ
    compared: float = 1.0  # the same of benchmarks


@dataclass(frozen=True)
class Work:
    """Requests of one kind to one model.

    Attributes: `stage` as a run's manifest names it; `part` of it, "" if it is the run's own model or
    judge; `who`, the key of the recipe with the model. `verb`: "write" a reply; "judge" by choosing, or
    in a few words; sit an "exam" of lm-eval. Of a request in the mean: tokens `read` and `written`, and
    at most (`most_read`, `most_written`); `longest`, the tokens of the longest prompt. `shared`: those,
    in the mean, that vLLM has read for an earlier row. `requests` of an exam, whose rows are models.
    `asked_on`: a reply may be followed by one more request, which holds it. `most_rows`, if nothing is
    dropped on the way; 0: `rows`.
    """

    stage: str
    who: str
    model: Model
    verb: str
    rows: int
    read: float
    written: float
    most_read: float
    most_written: float
    longest: float
    part: str = ""
    shared: float = 0
    asked_on: bool = False
    most_rows: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """Written, or in stages of `READ` read."""
        if self.stage == "harness":
            return round(self.requests * self.read)
        return round(self.rows * (self.read if self.stage in READ else self.written))

    @property
    def dollars(self) -> tuple[float, float] | None:
        """US$ at these lengths, and at most; None without a price."""
        if not self.model.priced:
            return None
        usual = dollars(self.model, self.rows * self.read, self.rows * self.written)
        read, written = self.most_read + AROUND, self.most_written
        if self.asked_on:
            read, written = 2 * read + written, 2 * written
        rows = max(self.rows, self.most_rows)
        return usual, max(usual, dollars(self.model, rows * read, rows * written))


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
            *_answers(recipe, rates, notes),
            *_exams(recipe, notes),
            *_benchmarks(recipe, rates, notes),
        ]
    pairs = round(recipe.personas.count * rates.prompts_kept * rates.pairs_kept)
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


def tokens(text: str) -> float:
    """Of a text, about."""
    return len(text.encode(errors="replace")) / BYTES


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
    works = [*_answers(recipe, Rates(""), []), *_benchmarks(recipe, Rates(""), [])]
    found = {}
    for rate, stage in (("duelled", "duels"), ("compared", "benchmark_verdicts")):
        possible = sum(work.rows for work in works if work.stage == stage)
        if possible and stage in stages:
            found[rate] = stages[stage]["made"] / possible
    return found


# ---------------------------------------------------------------------------- the loop


def _loop(recipe: Recipe, rates: Rates, personas: list[str]) -> Iterator[Work]:
    """Stages 1 to 3, and what notebooks 01 to 03 try beside them."""
    seeds, count = len(recipe.seeds), recipe.personas.count
    asked, tried = count * seeds, TEMPERATURES * min(TRIED, count) * seeds
    beside = seeds * (min(WITHOUT, count) + OWN) + tried
    kept, judged = rates.prompts_kept, rates.prompts_kept * rates.judged
    instruction, most_instruction = _instruction(recipe, rates, personas)

    def prompts(stage: str, rows: int, part: str = "") -> Work:
        limit = recipe.personas.max_new_tokens
        new = min(rates.prompt, limit)
        mean = (instruction, new, most_instruction, limit, instruction)
        return Work(stage, "model", recipe.model, "write", rows, *mean, part)

    def responses(stage: str, most: int, part: str = "") -> Work:
        limit = recipe.responses.max_new_tokens
        new = min(rates.response, limit)
        mean = (rates.prompt, new, recipe.personas.max_new_tokens, limit, rates.prompt)
        shared = rates.prompt / 2  # each prompt is answered twice
        rows = round(most * kept)
        told = (stage, "model", recipe.model, "write", rows, *mean, part, shared)
        return Work(*told, most_rows=most)

    def verdicts(stage: str, rows: float, most: int, **more) -> Work:
        return _ranked(recipe, rates, stage, rows, most, recipe.responses.max_new_tokens, **more)

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
    source, count = recipe.personas.source, recipe.personas.count
    if source in ("tiny", "hub"):
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
            f"{source} has {different} different personas, the run asks for {count} of each seed: "
            f"personas.count={different}, or a longer file."
        )
    return personas


def _instruction(recipe: Recipe, rates: Rates, personas: list[str]) -> tuple[float, float]:
    """Tokens of the persona template with a persona: in the mean, and the most that the mean may be."""
    if not personas:
        return rates.instruction, 2 * rates.instruction
    longest = sorted(map(tokens, personas), reverse=True)[: recipe.personas.count]
    template = tokens(templates.source("persona"))
    return template + fmean(map(tokens, personas)), template + fmean(longest)


def _labelled(recipe: Recipe) -> list[float] | None:
    """Tokens of the ranking prompt of each pair in `judging.gold`; None where it names no file."""
    from sao_utils.stages.judging import labelled_pairs

    if recipe.judging.gold is None:
        return None
    try:
        pairs = labelled_pairs(recipe.judging.gold)
    except RecipeError:  # told when it runs
        return []
    return [
        tokens(templates.ranking_prompt(pair["prompt"], *pair["responses"]))
        for pair in pairs
        if pair["discarded"] is None
    ]


def _ranked(
    recipe: Recipe,
    rates: Rates,
    stage: str,
    rows: float,
    most_rows: int,
    limit: int,
    question: float | None = None,
    part: str = "",
    who: str = "",
    model: Model | None = None,
    sampled: bool = False,
) -> Work:
    """Verdicts with the paper's ranking prompt on two responses of at most `limit` tokens.

    Args:
        question: tokens of the prompt that was answered, if known; else one of the run's own.
        who, model: another judge than the run's own.
    """
    model, settings = model or recipe.judging_model, recipe.judging
    most = recipe.personas.max_new_tokens if question is None else question
    most += tokens(templates.ranking_prompt("", "", "")) + PER_PROMPT * limit
    written, most_written = _verdict(model, settings.max_new_tokens, settings.method == "sampled")
    if sampled:
        written, most_written = _verdict(model, settings.max_new_tokens, True)
    return Work(
        stage,
        who or ("judge" if recipe.judge else "model"),
        model,
        "judge",
        round(rows),
        rates.verdict,
        written,
        max(most, rates.verdict),
        most_written,
        longest_ranking(limit),
        part,
        rates.shared,
        most_rows=most_rows,
    )


def longest_ranking(max_new_tokens: int) -> float:
    """Tokens of a ranking prompt with two responses at their limit."""
    return Rates.verdict + PER_PROMPT * (max_new_tokens - Rates.response)


def _verdict(model: Model, limit: int, sampled: bool) -> tuple[float, float]:
    """Tokens that a judge writes for a verdict, in the mean and at most: none if it only chooses."""
    if sampled:
        return min(FEW, limit), limit
    return (FEW, VERDICT_TOKENS) if model.engine == "api" else (0, 0)


# ---------------------------------------------------------------------------- own questions


def _competitors(recipe: Recipe) -> list[tuple[str, Model, int]]:
    """(key of the recipe, model, how many): base and tuned models, and each of `others`."""
    own = 1 + len(recipe.arms) * len(recipe.seeds)
    return [
        ("model", recipe.model, own),
        *((f"others.{name}", model, 1) for name, model in recipe.others.items()),
    ]


def _answers(recipe: Recipe, rates: Rates, notes: list[str]) -> Iterator[Work]:
    """Answers to the run's own questions, and the contests that the notebooks hold with them."""
    settings = recipe.evaluation
    texts = _questions(settings)
    if texts is None:
        notes.append("The evaluation is not planned: its questions are not on this machine.")
        return
    limit, known = settings.max_new_tokens, fmean(map(tokens, texts))
    new = min(rates.response, limit)
    for who, model, count in _competitors(recipe):
        rows = len(texts) * len(settings.temperatures) * count
        mean = (rates.prompt, new, max(rates.prompt, known), limit, rates.prompt)
        yield Work("answers", who, model, "write", rows, *mean, "" if who == "model" else who)
    seeds, tuned = len(recipe.seeds), len(recipe.arms) * len(recipe.seeds)

    def duels(models: int, **more) -> Work:
        rows = 2 * len(texts) * models
        return _ranked(recipe, rates, "duels", rows * rates.duelled, rows, limit, known, **more)

    yield duels(tuned)
    if "self" not in recipe.arms:
        return
    if not recipe.judges:  # the tuned model judges, too
        yield duels(seeds, who="model", model=recipe.model, part="judged by the tuned model")
    for name, model in recipe.judges.items():
        yield duels(seeds, who=f"judges.{name}", model=model, part=f"judges.{name}")


def _questions(settings: Evaluation) -> list[str] | None:
    """The evaluation questions, if they can be had without a network."""
    source = settings.questions
    if source in SETS and settings.data == "hub" and source in PUBLISHED:
        return None
    try:
        return SETS[source](settings) if source in SETS else read_column(source, "prompt")
    except RecipeError:
        return None


# ---------------------------------------------------------------------------- exams


def _exams(recipe: Recipe, notes: list[str]) -> Iterator[Work]:
    """What lm-eval asks the base, the tuned models and others; with the weights, by transformers."""
    from sao_utils.evaluation.tasks import HarnessError, exams

    settings = recipe.evaluation
    if not settings.harness:
        return
    tuned = 1 if "self" in recipe.arms else len(recipe.arms)  # `results.examined`
    takers = []
    for who, model, count in _competitors(recipe):
        if model.engine == "api":
            notes.append(f"A server cannot sit the exams of evaluation.harness: {who} has none.")
            continue
        if model.engine != "transformers":
            changes = {"engine": "transformers", "quantisation": "none", "workers": 0}
            model = model.model_copy(update=changes)
        count = 1 + tuned * len(recipe.seeds) if who == "model" else count
        takers.append((who, model, count))
    unknown = []
    try:
        chosen = exams(settings.harness)
    except HarnessError as error:
        notes.append(f"evaluation.harness is not planned: {error}")
        return
    for exam in chosen:
        size = _exam_size(exam)
        if size is None:
            unknown.append(exam.task)
            continue
        items, part = size["items"], 1.0
        if settings.harness_limit:
            asked = min(items, settings.harness_limit * size.get("subjects", 1))
            part = asked / items
        passes = round(size.get("passes", size["requests"]) * part)
        read, written = size["read"], size.get("written", 0)
        for who, model, count in takers:
            told = "" if who == "model" else f", {who}"
            yield Work(
                "harness",
                who,
                model,
                "exam",
                count,
                read,
                written,
                read,
                size.get("most", 0),
                2 * read,  # ours: the longest is twice the mean
                f"{exam.task}: {round(size['requests'] * part):,} requests{told}",
                requests=count * passes,
            )
    if unknown:
        notes.append(f"Not planned: the tasks {', '.join(unknown)}, whose size is not known here.")


@lru_cache(maxsize=1)
def _known_exams() -> dict[str, dict]:
    return yaml.safe_load((files("sao_utils") / "exams.yaml").read_text(encoding="utf-8"))


def _exam_size(exam) -> dict | None:
    """Items, requests and lengths as in exams.yaml; of a local task from its files."""
    if not exam.file:
        return _known_exams().get(exam.task)
    config = yaml.safe_load(exam.file.read_text(encoding="utf-8"))
    try:
        data = config["dataset_kwargs"]["data_files"][config["test_split"]]
        rows = read_table(str(exam.file.parent / data))
    except (KeyError, TypeError, RecipeError):
        return None
    choices = str(config.get("doc_to_choice", "")).strip("{} ")
    each = [len(row[choices]) if isinstance(row.get(choices), list) else 1 for row in rows]
    writes = config.get("output_type") == "generate_until"
    most = config.get("generation_kwargs", {}).get("max_gen_toks", 256)
    text = fmean(tokens(json.dumps(row)) for row in rows)
    size = {"items": len(rows), "requests": sum(each)}
    size["read"] = text * (1 + (exam.shots or 0))
    return size | ({"written": most / 2, "most": most} if writes else {})


# ---------------------------------------------------------------------------- benchmarks

#: benchmark -> prompts, turns, and tokens of a turn, of the answer that it is compared with, and of what
#: the judge's prompt says around them. Where the texts are on this machine they are counted instead.
#: AlpacaEval's answers have 2,049 characters (its leaderboard), Arena-Hard's baseline 423 tokens (its
#: README); the rest is ours, and rough.
PUBLISHED = {
    "alpaca_eval": (805, 1, 40, 2049 / BYTES, 350),
    "arena_hard": (500, 1, 100, 423, 450),
    "mt_bench": (80, 2, 60, 0, 250),
}
#: benchmark -> tokens of a verdict that argues, in the mean; ours, and rough.
ARGUED = {"arena_hard": 500, "mt_bench": 200}


@dataclass(frozen=True)
class _Asked:
    """What a benchmark asks, as (tokens of given texts, answers in it): `answers`, once a competitor, and
    `verdicts`, once a competitor and judge (`base_too`: also of the base model)."""

    answers: list[tuple[float, int]]
    verdicts: list[tuple[float, int]]
    argues: bool
    base_too: bool = True


def _benchmarks(recipe: Recipe, rates: Rates, notes: list[str]) -> Iterator[Work]:
    """Answers to the benchmarks by every competitor, and verdicts by every judge."""
    from sao_utils.evaluation import arena_hard, mt_bench

    settings = recipe.evaluation
    limit, usual = settings.max_new_tokens, min(rates.response, settings.max_new_tokens)
    own = "judge" if recipe.judge else "model"
    judges = [("", own, recipe.judging_model)]
    judges += [(f"judges.{name}", f"judges.{name}", m) for name, m in recipe.judges.items()]
    most = {"arena_hard": arena_hard.MAX_TOKENS, "mt_bench": mt_bench.VERDICT_TOKENS}
    seen: set[str] = set()
    for name in settings.benchmarks:
        asked = _asked(settings, name, seen, notes)
        for who, model, count in _competitors(recipe):
            yield Work(
                "benchmark_answers",
                who,
                model,
                "write",
                count * len(asked.answers),
                *_mean(asked.answers, usual, limit, (usual, limit)),
                name if who == "model" else f"{name}, {who}",
            )
        judged = sum(count for _, _, count in _competitors(recipe)) - (not asked.base_too)
        for label, who, model in judges if asked.verdicts else ():
            written = (ARGUED[name], most[name]) if asked.argues else _verdict(model, 0, False)
            rows = judged * len(asked.verdicts)
            yield Work(
                "benchmark_verdicts",
                who,
                model,
                "write" if asked.argues else "judge",
                round(rows * rates.compared),
                *_mean(asked.verdicts, usual, limit, written),
                f"{name}, {label}" if label else name,
                asked_on=name == "arena_hard",  # if it has no label
                most_rows=rows,
            )


def _mean(texts: list, usual: float, limit: float, written: tuple[float, float]) -> tuple:
    """`Work.read` to `Work.longest` of requests with answers in them."""
    if not texts:
        return (0, 0, 0, 0, 0)
    read = fmean(given + answers * usual for given, answers in texts)
    most = [given + answers * limit for given, answers in texts]
    return read, written[0], fmean(most), written[1], max(most)


def _asked(settings: Evaluation, name: str, seen: set[str], notes: list[str]) -> _Asked:
    """What a benchmark asks, by its texts if they are here.

    Args:
        seen: questions of the tiny counterparts that were asked before; they are asked once.
    """
    from sao_utils.evaluation.benchmarks import load

    if name.startswith("tiny_") or settings.data not in (None, "hub"):
        try:
            return _asked_of(load(settings, name), name, seen, settings.temperatures[0] == 0)
        except RecipeError as error:
            notes.append(f"{name} is planned by its published size: {error}")
    else:
        notes.append(f"{name} is planned by its published size, and assumed lengths of its texts.")
    prompts, turns, text, baseline, around = PUBLISHED[name]
    prompts = min(prompts, settings.benchmark_limit or prompts)
    asks = [((turn + 1) * text, turn) for turn in range(turns)] * prompts
    if name == "mt_bench":
        shown = [(around + (turn + 1) * text, turn + 1) for turn in range(turns)] * prompts
    else:
        shown = [(around + text + baseline, 1)] * prompts * (2 if name == "arena_hard" else 1)
    return _Asked(asks, shown, name in ARGUED)


def _asked_of(loaded: dict, name: str, seen: set[str], greedy: bool) -> _Asked:
    """The same, of a benchmark that `published.load` has loaded."""
    answers, verdicts, show = [], [], loaded["show"]
    baseline: Callable = loaded.get("baseline", {}).get
    for item in loaded["items"]:
        turns = item["turns"]
        for turn in range(len(turns)):
            said = "\n".join(turns[: turn + 1])
            if greedy and name.startswith("tiny_"):
                if said in seen:
                    continue
                seen.add(said)
            answers.append((sum(map(tokens, turns[: turn + 1])), turn))
        if "grade" in loaded:  # by the oracle
            continue
        if name == "mt_bench":
            shown = [(show(item, [""] * n)[0], n) for n in range(1, len(turns) + 1)]
        elif name in ("arena_hard", "tiny_arena"):
            other = baseline(item["id"])
            shown = [(show(turns[0], other or "", ""), 1 if other else 2)] * 2
        else:
            shown = [(show(turns[0], baseline(item["id"]), "")["chat"], 1)]
        verdicts += [(sum(tokens(m["content"]) for m in chat), n) for chat, n in shown]
    return _Asked(answers, verdicts, name in ARGUED, base_too=name != "tiny_arena")
