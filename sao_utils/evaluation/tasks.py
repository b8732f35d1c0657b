"""Tasks with known answers, through lm-eval: the Open LLM Leaderboard's six, and those of the kit.

Alignment can make a model forget what it knew. lm-eval (EleutherAI's harness) asks base and tuned models
the same questions, and the differences are taken question by question. This is far more sensitive than
comparing two scores, because most questions come out the same under both models.

No chat template is applied, as on the leaderboard. The leaderboard ran a harness of 2023, whereas the
prompts and metrics here are those of the installed lm-eval: scores before and after training are
comparable with each other, but do not agree to the decimal with numbers published there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import yaml

from sao_utils.engines.loading import model_name
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.answers import Candidate
from sao_utils.evaluation.task_differences import mean
from sao_utils.recipe import Model, RecipeError, is_task_file
from sao_utils.store import Run, make_rows, read_rows, row_id

SHOTS_SEED = 1234  # chooses the solved examples before a question; lm-eval's own default
LONGEST = 2048  # tokens of a long prompt, to size a batch on a CPU
SERVER = (
    "A model behind a server cannot be scored: lm-eval needs the probabilities of given answers, which "
    "servers in general do not give. Name it by a folder or as on the hub."
)


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, and its settings.

    `shots` solved examples come before each question; `metric` is a metric of lm-eval, followed by a comma
    and its filter if it has one. If they are None, the task's own settings are used (and its first metric).
    `file` is the YAML file of a local task.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    file: Path | None = None


#: Shots and metrics of the leaderboard's first version, which the paper uses:
#: https://huggingface.co/docs/leaderboards/open_llm_leaderboard/archive, "Reproducibility". Its
#: GSM8K read the number after "####", which is lm-eval's strict-match (flexible-extract also takes
#: a number elsewhere, and scores higher); its MMLU is the plain mean of 57 subjects (`mean`).
LEADERBOARD = (
    Task("arc_challenge", 25, "acc_norm"),
    Task("hellaswag", 10, "acc_norm"),
    Task("mmlu", 5, "acc"),
    Task("truthfulqa_mc2", 0, "acc"),  # mc2: the share of probability on true answers
    Task("winogrande", 5, "acc"),
    Task("gsm8k", 5, "exact_match,strict-match"),
)
#: name of a group of tasks in the kit -> its folder: the tiny world's, and three from BIG-bench
LOCAL = {"tiny": "tiny/tasks", "bigbench": "evaluation/bigbench"}


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks behind names: "leaderboard" (six), one of LOCAL, a task, a YAML file.

    Raises:
        RecipeError: a file is missing or is not a task.
    """
    found = []
    for name in names:
        if name == "leaderboard":
            found += LEADERBOARD
        elif name in LOCAL:
            folder = Path(str(files("sao_utils") / LOCAL[name]))
            found += [_local(file) for file in sorted(folder.glob("*.yaml"))]
        elif is_task_file(name):
            found.append(_local(Path(name)))
        else:
            known = {task.name: task for task in LEADERBOARD}
            found.append(known.get(name, Task(name)))
    return found


def _local(file: Path) -> Task:
    if not file.is_file():
        raise RecipeError(f"There is no task file {file}.")
    config = _read(file)
    if not isinstance(config, dict) or "task" not in config:
        raise RecipeError(f"{file} is no task of lm-eval: it needs a key 'task' with its name.")
    return Task(config["task"], config.get("num_fewshot"), file=file.resolve())


def _read(file: Path) -> object:
    """The content of a YAML file. Raises RecipeError if it is not valid YAML."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        words = "tags such as !function are not run here"
        raise RecipeError(f"{file} cannot be read ({words}): {error}") from None


def _config(task: Task) -> tuple[dict, list[Path]]:
    """A local task's settings, and the full paths of its data files, which are relative to the YAML file.

    The settings hold the full paths, too.
    """
    config, paths = _read(task.file), []

    def whole(names: str | list | dict) -> str | list | dict:
        if isinstance(names, dict):
            return {split: whole(of) for split, of in names.items()}
        if isinstance(names, list):
            return [whole(name) for name in names]
        paths.append(task.file.parent / names)
        return str(paths[-1])

    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        options["data_files"] = whole(options["data_files"])
    return config, paths


def check_tasks(names: Sequence[str]) -> None:
    """Check that tasks can be scored on this machine, before hours of other work.

    Raises:
        RecipeError: a file is missing or is not a task, or lm-eval is not installed.
    """
    for task in tasks_of(names):
        _edition(task)


def _edition(task: Task) -> str:
    """What a score belongs to: lm-eval's version and, for a local task, a hash of its files.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    try:
        edition = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError:
        raise RecipeError(
            "lm-eval is not installed. From a checkout of the kit: "
            "pip install -c constraints.txt -e '.[eval]'"
        ) from None
    if task.file is None:
        return edition
    paths = [task.file, *_config(task)[1]]
    contents = b"".join(path.read_bytes() for path in paths if path.is_file())
    return f"{edition}:{hashlib.sha256(contents).hexdigest()[:16]}"


# ---------------------------------------------------------------------- scoring


def score_tasks(run: Run, candidates: Sequence[Candidate]) -> list[dict]:
    """Let models do the recipe's `evaluation.tasks`, each once.

    If `evaluation.task_limit` is set, only that many items of each task (of each subject of MMLU) are
    done, the first ones.

    Returns:
        Rows {id, model, seed, weights, task, edition, shots, limit, metric, value, error, n, scores,
        items}: the score (value) with its standard error, the number of items, the score of each item by
        subject, and a hash of the items. The base's rows also have {asked: what each item asks, by
        subject}. If a task could not be run, or a model is behind a server, the row is {..., value: None,
        problem: what to do}; such rows are not kept, and the next call tries again.

    Raises:
        RecipeError: lm-eval is not installed, or a task file is missing or is not a task.
    """
    settings = run.recipe.evaluation
    chosen = {task.name: task for task in tasks_of(settings.tasks)}
    models, jobs = {}, []
    for candidate in candidates:
        model = _with_transformers(candidate.model)
        weights = model_name(model)
        models[weights] = model
        jobs += [_job(candidate, weights, task, settings.task_limit) for task in chosen.values()]
    problems = {job["id"]: SERVER for job in jobs if models[job["weights"]].engine == "api"}
    done = {row["id"] for row in read_rows(run.rows("tasks"))} | problems.keys()
    opened, lacking = {}, {}
    for name in dict.fromkeys(job["task"] for job in jobs if job["id"] not in done):
        try:
            opened[name] = _open(chosen[name])
        except RecipeError as error:
            lacking[name] = str(error)
    for job in jobs:
        if job["id"] not in done and job["task"] in lacking:
            problems[job["id"]] = lacking[job["task"]]
    for problem in dict.fromkeys(problems.values()):
        print(f"Not measured: {problem}", flush=True)

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        for weights, group in groupby(outstanding, key=lambda job: job["weights"]):
            engine = load_engine(models[weights])
            for job in group:
                name = job["task"]
                row = {**job, **_evaluate(engine, opened[name], chosen[name], job["limit"])}
                if job["model"] != "base":  # the same for all models (see `items`), so kept once
                    del row["asked"]
                yield [row]

    possible = [job for job in jobs if job["id"] not in problems]
    rows = {row["id"]: row for row in make_rows(run, "tasks", possible, work)}
    return [
        rows.get(job["id"]) or {**job, "value": None, "problem": problems[job["id"]]}
        for job in jobs
    ]


def _job(candidate: Candidate, weights: str, task: Task, limit: int | None) -> dict:
    """The part of a row that is known before the task is run."""
    edition = _edition(task)
    how = (edition, task.shots, task.metric, limit)
    return {
        "id": row_id("task", task.name, how, weights, candidate.name, candidate.seed),
        "model": candidate.name,
        "seed": candidate.seed,
        "weights": weights,
        "task": task.name,
        "edition": edition,
        "limit": limit,
    }


def _with_transformers(model: Model) -> Model:
    """The model, to be loaded with transformers: lm-eval needs the log-probabilities of given answers."""
    if model.engine in ("api", "transformers"):
        return model
    return model.model_copy(update={"engine": "transformers", "quantisation": "none"})


@lru_cache(maxsize=2)
def _manager(every_task: bool):
    """lm-eval's index: of all its tasks (20 s), or, for tasks given as files, of none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=every_task)


def _open(task: Task) -> dict:
    """A task with its data, or a group with its subjects, as lm-eval's `TaskManager.load` returns them.

    Raises:
        RecipeError: there is no such task, its data could not be loaded, or its score is not a mean.
    """
    manager = _manager(task.file is None)
    if task.file is None and task.name not in manager.all_tasks:
        raise RecipeError(
            f"lm-eval has no task '{task.name}'. `lm-eval ls tasks` lists all; a local one is given "
            "as the path of its .yaml file."
        )
    try:
        with _quiet():
            opened = manager.load([_config(task)[0] if task.file else task.name])
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"The data of {task.name} could not be loaded ({first}). A local task's lies beside its "
            "file; other data needs the hub once, with HF_HUB_OFFLINE unset."
        ) from error
    for subject in opened["tasks"].values():
        metric = (task.metric or _first_metric(subject)).partition(",")[0]
        if getattr(subject.aggregation().get(metric), "__name__", None) != "mean":
            raise RecipeError(
                f"{task.name} is scored by {metric}, which is no mean of items' scores; only such "
                "scores are compared here."
            )
    return opened


def _evaluate(engine, opened: dict, of: Task, limit: int | None) -> dict:
    """Let a loaded model do a task; returns the measured part of its row."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = opened["tasks"]
    for task in tasks.values():
        shots = task.config.num_fewshot if of.shots is None else of.shots
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SHOTS_SEED)
    on_gpu = engine.device != "cpu"  # lm-eval tries what fits; a CPU would swap, not fail
    batch = "auto" if on_gpu else max(1, engine.batch_tokens // LONGEST)
    with _quiet():
        lm = HFLM(engine.model, tokenizer=engine.tokenizer, batch_size=batch)
        found = evaluate(lm, opened, limit=limit, bootstrap_iters=0)["samples"]
    first = next(iter(tasks.values()))
    metric, _, kind = (of.metric or _first_metric(first)).partition(",")
    scores, asked, hashes = {}, {}, []
    for name, task in tasks.items():
        samples = [sample for sample in found[name] if sample["filter"] == (kind or "none")]
        samples.sort(key=lambda sample: sample["doc_id"])
        scores[name] = [float(sample[metric]) for sample in samples]
        asked[name] = [asked_by(task, sample["doc"]) for sample in samples]
        hashes += [sample["doc_hash"] for sample in samples]
    value, error = mean(scores)
    return {
        "shots": first.config.num_fewshot,
        "metric": metric + (f",{kind}" if kind else ""),
        "value": value,
        "error": error,
        "n": len(hashes),
        "scores": scores,
        "asked": asked,
        "items": row_id(*hashes),
    }


def asked_by(task, doc: dict) -> str:
    """What an item asks, without solved examples and instructions, for comparison with other texts.

    This is the field that the lm-eval task names for the purpose (`doc_to_decontamination_query`), else
    the item's "question", else the prompt.
    """
    for field in (task.config.doc_to_decontamination_query, "question"):
        if isinstance(doc.get(field), str):
            return doc[field]
    return str(task.doc_to_text(doc))


def _first_metric(task) -> str:
    filters = [f["name"] for f in task.config.filter_list or ()]
    return ",".join([next(iter(task.aggregation())), *filters[:1]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars (several per task) and, from now on, its log messages below ERROR."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
