"""Known answers: the Open LLM Leaderboard's six tasks, and the tiny world's, through lm-eval.

Alignment can unlearn what a model knew. lm-eval (EleutherAI's harness) asks base and tuned models the
same questions, and the differences are taken question by question: that is far sharper than two
scores side by side, because most questions fare alike under both.

No chat template is applied, as on the leaderboard. The leaderboard ran a harness of 2023; the prompts
and metrics here are those of the installed lm-eval, so that before and after compare with each
other, but not to the decimal with numbers published there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sys
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
from sao_utils.recipe import Model, is_task_file
from sao_utils.store import Run, make_rows, read_rows, row_id

SHOTS_SEED = 1234  # which solved examples stand before a question; lm-eval's own default
LONGEST = 2048  # tokens of a long prompt, to size a batch on a CPU


class TaskError(RuntimeError):
    """lm-eval, a task or its data is not there; the message says what to do."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, and how it is set.

    `shots` solved examples come before each question; `metric` is a metric of lm-eval, with its filter
    after a comma where there is one. None: as the task itself says (its first metric). `file` is the
    YAML file of a local task.
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


def tasks_of(names: tuple[str, ...] | list[str]) -> list[Task]:
    """The tasks behind names: "leaderboard" (six), "tiny" (the tiny world's), a task, a YAML file.

    Raises:
        TaskError: no names, a file that is not there or is no task, or a task named twice.
    """
    found = []
    for name in names:
        if name == "leaderboard":
            found += LEADERBOARD
        elif name == "tiny":
            found += [_local(file) for file in sorted(_tiny_folder().glob("*.yaml"))]
        elif is_task_file(name):
            found.append(_local(Path(name)))
        else:
            known = {task.name: task for task in LEADERBOARD}
            found.append(known.get(name, Task(name)))
    twice = {task.name for task in found if [t.name for t in found].count(task.name) > 1}
    if twice or not found:
        raise TaskError(
            f"These tasks are named twice: {', '.join(sorted(twice))}."
            if twice
            else 'No tasks: set evaluation.tasks, to ["leaderboard"] or ["tiny"] say.'
        )
    return found


def _tiny_folder() -> Path:
    return Path(str(files("sao_utils") / "tiny" / "tasks"))


def _local(file: Path) -> Task:
    if not file.is_file():
        raise TaskError(f"There is no task file {file}.")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise TaskError(f"{file} is no task of lm-eval: it needs a key 'task' with its name.")
    return Task(config["task"], config.get("num_fewshot"), file=file.resolve())


def _config(task: Task) -> tuple[dict, list[Path]]:
    """A local task's settings, its data files (given beside the YAML file) by their whole paths."""
    config = yaml.safe_load(task.file.read_text(encoding="utf-8"))
    data = config.get("dataset_kwargs", {}).get("data_files", {})
    data.update({split: str(task.file.parent / name) for split, name in data.items()})
    return config, [Path(path) for path in data.values()]


def local_files(task: Task) -> list[Path]:
    """The YAML file of a local task and its data; none of a task that lm-eval brings along."""
    return [task.file, *_config(task)[1]] if task.file else []


def _edition(task: Task) -> str:
    """What a score belongs to: lm-eval's version, and of a local task a hash of its files.

    Raises:
        TaskError: lm-eval is not installed.
    """
    try:
        edition = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError:
        raise TaskError(
            "lm-eval is not installed. From a checkout of the kit: "
            "pip install -c constraints.txt -e '.[eval]'"
        ) from None
    if task.file:
        contents = [path.read_bytes() for path in local_files(task) if path.is_file()]
        edition += ":" + hashlib.sha256(b"".join(contents)).hexdigest()[:16]
    return edition


# ---------------------------------------------------------------------- scoring


def score_tasks(
    run: Run,
    candidates: Sequence[Candidate],
    names: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[dict]:
    """Let models do tasks, each once.

    Args:
        candidates: the models.
        names: of tasks, as `tasks_of` takes them; by default the recipe's `evaluation.tasks`.
        limit: the first so many items of each task (of each subject of MMLU), for a quick look; by
            default the recipe's `evaluation.task_limit`.

    Returns:
        Rows {id, model, seed, weights, task, edition, shots, limit, metric, value, error, n,
        truncated, scores, items}: the score with its standard error, the number of items, how many
        of them did not fit into the model's context, the score of each item by subject, and a hash
        of the items. The base's rows also have {asked: what each item asks, by subject}. Where a task
        could not be run, or a model is behind a server, {..., value: None, problem: what to do}; such
        rows are not kept, and tried again by the next call.

    Raises:
        TaskError: lm-eval is missing, or no such task.
    """
    settings = run.recipe.evaluation
    chosen = {task.name: task for task in tasks_of(settings.tasks if names is None else names)}
    editions = {name: _edition(task) for name, task in chosen.items()}
    limit = settings.task_limit if limit is None else limit
    loaded, jobs, refused = {}, [], {}
    for candidate in candidates:
        model = candidate.model
        try:
            model = _scorable(model)
        except TaskError as error:
            refused[candidate.name] = str(error)
        weights = model_name(model)
        loaded[weights] = model
        for name, task in chosen.items():
            how = (editions[name], task.shots, task.metric, limit)
            identity = row_id("task", name, how, weights, candidate.name, candidate.seed)
            jobs.append(
                {
                    "id": identity,
                    "model": candidate.name,
                    "seed": candidate.seed,
                    "weights": weights,
                    "task": name,
                    "edition": editions[name],
                    "limit": limit,
                }
            )
    done = {row["id"] for row in read_rows(run.rows("tasks"))}
    opened, lacking = {}, {}
    for task in dict.fromkeys(job["task"] for job in jobs if job["id"] not in done):
        try:
            opened[task] = _open(chosen[task])
        except TaskError as error:
            lacking[task] = str(error)
    models = {job["model"] for job in jobs}
    for what, problems, of in (("tasks", lacking, chosen), ("models", refused, models)):
        if problems:
            print(f"{len(problems)} of {len(of)} {what} could not be run:", flush=True)
            print(*(f"  {name}: {text}" for name, text in problems.items()), sep="\n", flush=True)

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        for weights, group in groupby(outstanding, key=lambda job: job["weights"]):
            engine = load_engine(loaded[weights])
            for job in group:
                name = job["task"]
                row = {**job, **_evaluate(engine, opened[name], chosen[name], limit)}
                if job["model"] != "base":  # all do the same items (`items`): kept once
                    del row["asked"]
                yield [row]

    problems = {
        job["id"]: refused.get(job["model"]) or lacking[job["task"]]
        for job in jobs
        if job["id"] not in done and (job["model"] in refused or job["task"] in lacking)
    }
    possible = [job for job in jobs if job["id"] not in problems]
    rows = {row["id"]: row for row in make_rows(run, "tasks", possible, work)}
    return [
        rows.get(job["id"]) or {**job, "value": None, "problem": problems[job["id"]]}
        for job in jobs
    ]


def _scorable(model: Model) -> Model:
    """The model as transformers loads it: lm-eval needs log-probabilities of given answers."""
    if model.engine == "api":
        raise TaskError(
            "A model behind a server cannot be scored: lm-eval needs the probabilities of given "
            "answers, which servers in general do not give. Name it by a folder or as on the hub."
        )
    if model.engine == "transformers":
        return model
    return model.model_copy(update={"engine": "transformers", "quantisation": "none", "workers": 0})


@lru_cache(maxsize=2)
def _manager(every_task: bool):
    """lm-eval's index of tasks; of the leaderboard's only, unless all of its 15,000 are wanted."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent
    some = ("arc", "gsm8k", "hellaswag", "mmlu", "truthfulqa", "winogrande")  # 20 s quicker
    return tasks.TaskManager(
        include_path=[folder / name for name in some], include_defaults=every_task
    )


def _open(task: Task) -> dict:
    """A task with its data, or a group with its subjects, as lm-eval's `TaskManager.load` gives them.

    Raises:
        TaskError: there is no such task, or its data could not be loaded.
    """
    spec = _config(task)[0] if task.file else task.name
    manager = _manager(not task.file and task not in LEADERBOARD)
    if not task.file and task.name not in manager.all_tasks:
        raise TaskError(
            f"lm-eval has no task '{task.name}'. `lm-eval ls tasks` lists all; a local one is given "
            "as the path of its .yaml file."
        )
    try:
        with _quiet():
            return manager.load([spec])
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        advice = (
            "Put its data files beside the task file."
            if task.file
            else "Run it once with the hub in reach and HF_HUB_OFFLINE unset: the data then stays in "
            "the cache of Hugging Face's datasets."
        )
        raise TaskError(f"its data could not be loaded ({first}). {advice}") from error


def _evaluate(engine, opened: dict, of: Task, limit: int | None) -> dict:
    """Let a loaded model do a task; returns the part of its row that is measured."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = opened["tasks"]
    for task in tasks.values():
        shots = task.config.num_fewshot if of.shots is None else of.shots
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SHOTS_SEED)
    on_gpu = engine.device != "cpu"  # there lm-eval tries what fits; a CPU would swap, not refuse
    batch = "auto" if on_gpu else max(1, engine.batch_tokens // LONGEST)
    with _quiet():
        lm = HFLM(engine.model, tokenizer=engine.tokenizer, batch_size=batch)
        found = evaluate(lm, opened, limit=limit, bootstrap_iters=0)["samples"]
    config = next(iter(tasks.values())).config
    metric, _, kind = (of.metric or _first_metric(config)).partition(",")
    samples = {
        name: sorted(
            (s for s in found[name] if s["filter"] == (kind or "none")), key=lambda s: s["doc_id"]
        )
        for name in tasks
    }
    scores = {name: [float(s[metric]) for s in of_it] for name, of_it in samples.items()}
    asked = {
        name: [asked_by(tasks[name], sample["doc"]) for sample in of_it]
        for name, of_it in samples.items()
    }
    value, error = mean(scores)
    every = [s for of_it in samples.values() for s in of_it]
    return {
        "shots": config.num_fewshot,
        "metric": metric + (f",{kind}" if kind else ""),
        "value": value,
        "error": error,
        "n": len(every),
        "truncated": sum(_too_long(sample["arguments"], lm) for sample in every),
        "scores": scores,
        "asked": asked,
        "items": row_id(*(sample["doc_hash"] for sample in every)),
    }


def asked_by(task, doc: dict) -> str:
    """What an item asks, to compare with other texts: without solved examples and instructions.

    The field that lm-eval's task names for that (`doc_to_decontamination_query`), else its
    "question", else the prompt, else (where the choices are all there is) these.
    """
    for field in (task.config.doc_to_decontamination_query, "question"):
        if isinstance(doc.get(field), str):
            return doc[field]
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else "\n".join(map(str, task.doc_to_choice(doc)))


def _first_metric(config) -> str:
    filters = [f["name"] for f in config.filter_list or ()]
    return ",".join([config.metric_list[0]["metric"], *filters[:1]])


def _too_long(requests: list[tuple], lm) -> bool:
    """Whether any request of an item had to be cut on the left to fit into the model's context."""
    for context, rest in requests:
        is_answer = isinstance(rest, str)
        text = context + rest if is_answer else context
        room = lm.max_length - (0 if is_answer else rest.get("max_gen_toks", lm.max_gen_toks))
        # A token has at least one character, so short texts need not be tokenised.
        if len(text) > room and len(lm.tok_encode(text)) > room:
            return True
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hush lm-eval's notes, and its progress bars (several a task) where nobody watches."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if os.environ.get("SAO_BATCH") or not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield
