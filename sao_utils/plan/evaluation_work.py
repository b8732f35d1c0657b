"""What the evaluation asks of which model: its own questions, lm-eval's tasks, published benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from statistics import fmean

import yaml

from sao_utils.engines.requests import BYTES
from sao_utils.evaluation.questions import SETS
from sao_utils.files import read_column, read_table
from sao_utils.plan.work import Rates, Work, ranked, tokens, verdict_tokens
from sao_utils.recipe import Evaluation, Model, Recipe, RecipeError

# ---------------------------------------------------------------------------- own questions


def _competitors(recipe: Recipe, controls: bool = True) -> list[tuple[str, Model, int]]:
    """(key of the recipe, model, how many): base and tuned models, and each of `others`.

    Args:
        controls: with those of the arm "self"; as in `report.sections.compared` without.
    """
    arms = 1 if "self" in recipe.arms and not controls else len(recipe.arms)
    own = 1 + arms * len(recipe.seeds)
    return [
        ("model", recipe.model, own),
        *((f"others.{name}", model, 1) for name, model in recipe.others.items()),
    ]


def answer_work(recipe: Recipe, rates: Rates, notes: list[str]) -> Iterator[Work]:
    """Answers to the run's own questions, and the comparisons that the notebooks make of them."""
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

    def compared(models: int, **more) -> Work:
        rows = 2 * len(texts) * models
        return ranked(
            recipe, rates, "comparisons", rows * rates.differing, rows, limit, known, **more
        )

    yield compared(tuned)
    if "self" not in recipe.arms:
        return
    if not recipe.judges:  # the tuned model judges, too
        yield compared(seeds, who="model", model=recipe.model, part="judged by the tuned model")
    for name, model in recipe.judges.items():
        yield compared(seeds, who=f"judges.{name}", model=model, part=f"judges.{name}")


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


def task_work(recipe: Recipe, notes: list[str]) -> Iterator[Work]:
    """What lm-eval asks the base, the tuned models and others; with the weights, by transformers."""
    from sao_utils.evaluation.tasks import TaskError, tasks_of

    settings = recipe.evaluation
    if not settings.tasks:
        return
    takers = []
    for who, model, count in _competitors(recipe, controls=False):
        if model.engine == "api":
            notes.append(f"A server cannot do evaluation.tasks: {who} has none.")
            continue
        if model.engine != "transformers":
            changes = {"engine": "transformers", "quantisation": "none", "workers": 0}
            model = model.model_copy(update=changes)
        takers.append((who, model, count))
    unknown = []
    try:
        chosen = tasks_of(settings.tasks)
    except TaskError as error:
        notes.append(f"evaluation.tasks is not planned: {error}")
        return
    for task in chosen:
        size = _task_size(task)
        if size is None:
            unknown.append(task.name)
            continue
        items, part = size["items"], 1.0
        if settings.task_limit:
            asked = min(items, settings.task_limit * size.get("subjects", 1))
            part = asked / items
        passes = round(size.get("passes", size["requests"]) * part)
        read, written = size["read"], size.get("written", 0)
        for who, model, count in takers:
            label = "" if who == "model" else f", {who}"
            yield Work(
                "tasks",
                who,
                model,
                "task",
                count,
                read,
                written,
                read,
                size.get("most", 0),
                2 * read,  # ours: the longest is twice the mean
                f"{task.name}: {round(size['requests'] * part):,} requests{label}",
                requests=count * passes,
            )
    if unknown:
        notes.append(f"Not planned: the tasks {', '.join(unknown)}, whose size is not known here.")


@lru_cache(maxsize=1)
def _known_tasks() -> dict[str, dict]:
    return yaml.safe_load((files("sao_utils") / "plan" / "tasks.yaml").read_text(encoding="utf-8"))


def _task_size(task) -> dict | None:
    """Items, requests and lengths as in tasks.yaml; of a local task from its files."""
    if not task.file:
        return _known_tasks().get(task.name)
    config = yaml.safe_load(task.file.read_text(encoding="utf-8"))
    try:
        data = config["dataset_kwargs"]["data_files"][config["test_split"]]
        rows = read_table(str(task.file.parent / data))
    except (KeyError, TypeError, RecipeError):
        return None
    choices = str(config.get("doc_to_choice", "")).strip("{} ")
    each = [len(row[choices]) if isinstance(row.get(choices), list) else 1 for row in rows]
    writes = config.get("output_type") == "generate_until"
    most = config.get("generation_kwargs", {}).get("max_gen_toks", 256)
    text = fmean(tokens(json.dumps(row)) for row in rows)
    size = {"items": len(rows), "requests": sum(each)}
    size["read"] = text * (1 + (task.shots or 0))
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


def benchmark_work(recipe: Recipe, rates: Rates, notes: list[str]) -> Iterator[Work]:
    """Answers to the benchmarks by every competitor, and verdicts by every judge."""
    from sao_utils.evaluation import arena_hard, mt_bench

    settings = recipe.evaluation
    limit, usual = settings.max_new_tokens, min(rates.response, settings.max_new_tokens)
    own = "judge" if recipe.judge else "model"
    judges = [("", own, recipe.judging_model)]
    judges += [(f"judges.{name}", f"judges.{name}", m) for name, m in recipe.judges.items()]
    most = {"arena_hard": arena_hard.MAX_TOKENS, "mt_bench": mt_bench.VERDICT_TOKENS}
    compared, seen = _competitors(recipe, controls=False), set()
    for name in settings.benchmarks:
        asked = _asked(settings, name, seen, notes)
        for who, model, count in compared:
            yield Work(
                "benchmark_answers",
                who,
                model,
                "write",
                count * len(asked.answers),
                *_mean(asked.answers, usual, limit, (usual, limit)),
                name if who == "model" else f"{name}, {who}",
            )
        judged = sum(count for _, _, count in compared) - (not asked.base_too)
        for label, who, model in judges if asked.verdicts else ():
            written = (
                (ARGUED[name], most[name]) if asked.argues else verdict_tokens(model, 0, False)
            )
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
            text = "\n".join(turns[: turn + 1])
            if greedy and name.startswith("tiny_"):
                if text in seen:
                    continue
                seen.add(text)
            answers.append((sum(map(tokens, turns[: turn + 1])), turn))
        if "by_oracle" in loaded:
            continue
        if name == "mt_bench":
            shown = [(show(item, [""] * n)["chat"], n) for n in range(1, len(turns) + 1)]
        elif name in ("arena_hard", "tiny_arena"):
            other = baseline(item["id"])
            shown = [(show(turns[0], other or "", "")["chat"], 1 if other else 2)] * 2
        else:
            shown = [(show(turns[0], baseline(item["id"]), "")["chat"], 1)]
        verdicts += [(sum(tokens(m["content"]) for m in chat), n) for chat, n in shown]
    return _Asked(answers, verdicts, name in ARGUED, base_too=name != "tiny_arena")
