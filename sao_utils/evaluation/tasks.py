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
import math
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import compress, groupby
from pathlib import Path

import numpy as np
import yaml

from sao_utils.engines.loading import model_name
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation.answers import competitors
from sao_utils.recipe import Model, is_task_file
from sao_utils.statistics.intervals import (
    Interval,
    add_trainings,
    outside_the_noise,
    students_t,
    unvaried,
)
from sao_utils.store import Run, make_rows, read_rows, row_id

SHOTS_SEED = 1234  # which solved examples stand before a question; lm-eval's own default
LONGEST = 2048  # tokens of a long prompt, to size a batch on a CPU


class HarnessError(RuntimeError):
    """lm-eval, a task or its data is not there; the message says what to do."""


@dataclass(frozen=True)
class Exam:
    """A task of lm-eval, and how it is set.

    `shots` solved examples come before each question; `metric` is a metric of lm-eval, with its filter
    after a comma where there is one. None: as the task itself says (its first metric). `file` is the
    YAML file of a local task.
    """

    task: str
    shots: int | None = None
    metric: str | None = None
    file: Path | None = None


#: Shots and metrics of the leaderboard's first version, which the paper uses:
#: https://huggingface.co/docs/leaderboards/open_llm_leaderboard/archive, "Reproducibility". Its
#: GSM8K read the number after "####", which is lm-eval's strict-match (flexible-extract also takes
#: a number elsewhere, and scores higher); its MMLU is the plain mean of 57 subjects (`mean`).
LEADERBOARD = (
    Exam("arc_challenge", 25, "acc_norm"),
    Exam("hellaswag", 10, "acc_norm"),
    Exam("mmlu", 5, "acc"),
    Exam("truthfulqa_mc2", 0, "acc"),  # mc2: the share of probability on true answers
    Exam("winogrande", 5, "acc"),
    Exam("gsm8k", 5, "exact_match,strict-match"),
)


def exams(names: tuple[str, ...] | list[str]) -> list[Exam]:
    """The exams behind names: "leaderboard" (six), "tiny" (the tiny world's), a task, a YAML file.

    Raises:
        HarnessError: no names, a file that is not there or is no task, or an exam named twice.
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
            known = {exam.task: exam for exam in LEADERBOARD}
            found.append(known.get(name, Exam(name)))
    twice = {exam.task for exam in found if [e.task for e in found].count(exam.task) > 1}
    if twice or not found:
        raise HarnessError(
            f"These tasks are named twice: {', '.join(sorted(twice))}."
            if twice
            else 'No tasks: set evaluation.harness, to ["leaderboard"] or ["tiny"] say.'
        )
    return found


def _tiny_folder() -> Path:
    return Path(str(files("sao_utils") / "tiny" / "tasks"))


def _local(file: Path) -> Exam:
    if not file.is_file():
        raise HarnessError(f"There is no task file {file}.")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise HarnessError(f"{file} is no task of lm-eval: it needs a key 'task' with its name.")
    return Exam(config["task"], config.get("num_fewshot"), file=file.resolve())


def _config(exam: Exam) -> tuple[dict, list[Path]]:
    """A local task's settings, its data files (given beside the YAML file) by their whole paths."""
    config = yaml.safe_load(exam.file.read_text(encoding="utf-8"))
    data = config.get("dataset_kwargs", {}).get("data_files", {})
    data.update({split: str(exam.file.parent / name) for split, name in data.items()})
    return config, [Path(path) for path in data.values()]


def local_files(exam: Exam) -> list[Path]:
    """The YAML file of a local task and its data; none of a task that lm-eval brings along."""
    return [exam.file, *_config(exam)[1]] if exam.file else []


def _edition(exam: Exam) -> str:
    """What a score belongs to: lm-eval's version, and of a local task a hash of its files.

    Raises:
        HarnessError: lm-eval is not installed.
    """
    try:
        edition = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError:
        raise HarnessError(
            "lm-eval is not installed. From a checkout of the kit: "
            "pip install -c constraints.txt -e '.[eval]'"
        ) from None
    if exam.file:
        contents = [path.read_bytes() for path in local_files(exam) if path.is_file()]
        edition += ":" + hashlib.sha256(b"".join(contents)).hexdigest()[:16]
    return edition


# ---------------------------------------------------------------------- scoring


def score(
    run: Run,
    tasks: tuple[str, ...] | list[str] | None = None,
    limit: int | None = None,
    names: tuple[str, ...] | None = None,
) -> list[dict]:
    """Let the base, every tuned model and the recipe's `others` sit the exams, each task once.

    Args:
        tasks: names as `exams` takes them; by default the recipe's `evaluation.harness`.
        limit: the first so many items of each task (of each subject of MMLU), for a quick look; by
            default the recipe's `evaluation.harness_limit`.
        names: only these models ("base", arms, names of `others`); by default all.

    Returns:
        Rows {id, model, seed, weights, task, edition, shots, limit, metric, value, error, n,
        truncated, scores, items}: the score with its standard error, the number of items, how many
        of them did not fit into the model's context, the score of each item by subject, and a hash
        of the items. The base's rows also have {asked: what each item asks, by subject}. Where a task
        could not be run, or one of `others` is behind a server, {..., value: None, problem: what to
        do}; such rows are not kept, and tried again by the next call.

    Raises:
        HarnessError: lm-eval is missing, no such exam, or a model that cannot be scored.
    """
    settings = run.recipe.evaluation
    chosen = {exam.task: exam for exam in exams(settings.harness if tasks is None else tasks)}
    editions = {task: _edition(exam) for task, exam in chosen.items()}
    limit = settings.harness_limit if limit is None else limit
    _scorable(run.recipe.model)
    every = ("base", *run.recipe.arms, *run.recipe.others)
    loaded, jobs, refused = {}, [], {}
    for name, seed, model in competitors(run, [n for n in every if names is None or n in names]):
        try:
            model = _scorable(model)
        except HarnessError as error:
            refused[name] = str(error)
        weights = model_name(model)
        loaded[weights] = model
        for task, exam in chosen.items():
            how = (editions[task], exam.shots, exam.metric, limit)
            jobs.append(
                {
                    "id": row_id("harness, asked", task, how, weights, name, seed),
                    "model": name,
                    "seed": seed,
                    "weights": weights,
                    "task": task,
                    "edition": editions[task],
                    "limit": limit,
                }
            )
    done = {row["id"] for row in read_rows(run.rows("harness"))}
    opened, lacking = {}, {}
    for task in dict.fromkeys(job["task"] for job in jobs if job["id"] not in done):
        try:
            opened[task] = _open(chosen[task])
        except HarnessError as error:
            lacking[task] = str(error)
    sitting = {job["model"] for job in jobs}
    for what, problems, of in (("tasks", lacking, chosen), ("models", refused, sitting)):
        if problems:
            print(f"{len(problems)} of {len(of)} {what} could not be run:", flush=True)
            print(*(f"  {name}: {text}" for name, text in problems.items()), sep="\n", flush=True)

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        for weights, group in groupby(outstanding, key=lambda job: job["weights"]):
            engine = load_engine(loaded[weights])
            for job in group:
                task = job["task"]
                row = {**job, **_sit(engine, opened[task], chosen[task], limit)}
                if job["model"] != "base":  # all are asked the same (`items`): kept once
                    del row["asked"]
                yield [row]

    problems = {
        job["id"]: refused.get(job["model"]) or lacking[job["task"]]
        for job in jobs
        if job["id"] not in done and (job["model"] in refused or job["task"] in lacking)
    }
    possible = [job for job in jobs if job["id"] not in problems]
    rows = {row["id"]: row for row in make_rows(run, "harness", possible, work)}
    return [
        rows.get(job["id"]) or {**job, "value": None, "problem": problems[job["id"]]}
        for job in jobs
    ]


def _scorable(model: Model) -> Model:
    """The model as transformers loads it: the harness needs log-probabilities of given answers."""
    if model.engine == "api":
        raise HarnessError(
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


def _open(exam: Exam) -> dict:
    """A task with its data, or a group with its subjects, as lm-eval's `TaskManager.load` gives them.

    Raises:
        HarnessError: there is no such task, or its data could not be loaded.
    """
    spec = _config(exam)[0] if exam.file else exam.task
    manager = _manager(not exam.file and exam not in LEADERBOARD)
    if not exam.file and exam.task not in manager.all_tasks:
        raise HarnessError(
            f"lm-eval has no task '{exam.task}'. `lm-eval ls tasks` lists all; a local one is given "
            "as the path of its .yaml file."
        )
    try:
        with _quiet():
            return manager.load([spec])
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        advice = (
            "Put its data files beside the task file."
            if exam.file
            else "Run it once with the hub in reach and HF_HUB_OFFLINE unset: the data then stays in "
            "the cache of Hugging Face's datasets."
        )
        raise HarnessError(f"its data could not be loaded ({first}). {advice}") from error


def _sit(engine, opened: dict, exam: Exam, limit: int | None) -> dict:
    """Let a loaded model sit an exam; returns the part of its row that is measured."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = opened["tasks"]
    for task in tasks.values():
        shots = task.config.num_fewshot if exam.shots is None else exam.shots
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SHOTS_SEED)
    on_gpu = engine.device != "cpu"  # there lm-eval tries what fits; a CPU would swap, not refuse
    batch = "auto" if on_gpu else max(1, engine.batch_tokens // LONGEST)
    with _quiet():
        lm = HFLM(engine.model, tokenizer=engine.tokenizer, batch_size=batch)
        found = evaluate(lm, opened, limit=limit, bootstrap_iters=0)["samples"]
    config = next(iter(tasks.values())).config
    metric, _, kind = (exam.metric or _first_metric(config)).partition(",")
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


def leave_out(rows: list[dict], asked: Collection[str]) -> list[dict]:
    """The rows of `score` without the items that ask one of these; for `differences`.

    A subject that loses all of its items is left out; a row that does has value None and a problem.
    Of tasks whose items are not known (a problem before) the rows stay.
    """
    kept = {
        row["task"]: {s: [text not in asked for text in of] for s, of in row["asked"].items()}
        for row in rows
        if row.get("asked")
    }
    found = []
    for row in rows:
        if row["value"] is None or row["task"] not in kept:
            found.append(row)
            continue
        scores = {s: [*compress(of, kept[row["task"]][s])] for s, of in row["scores"].items()}
        scores = {subject: of for subject, of in scores.items() if of}
        value, error = mean(scores) if scores else (None, None)
        n = sum(map(len, scores.values()))
        found.append({**row, "scores": scores, "value": value, "error": error, "n": n})
        if not scores:
            found[-1]["problem"] = "no item is left"
    return found


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


# ---------------------------------------------------------------------- before and after


def mean(scores: dict[str, list[float]]) -> tuple[float, float]:
    """The mean of the subjects' means, each with equal weight, and its standard error.

    Args:
        scores: subject -> [n] score of each item. One subject: the plain mean.

    Returns:
        The mean, and sqrt(sum of s^2/n over subjects) / number of subjects; the error is NaN where a
        subject has one item.
    """
    parts = [np.asarray(values, dtype=float) for values in scores.values()]
    squared = [p.var(ddof=1) / len(p) if len(p) > 1 else math.nan for p in parts]
    value = float(np.mean([p.mean() for p in parts]))
    return value, math.sqrt(math.fsum(squared)) / len(parts)


def paired_difference(
    base: dict[str, list[float]], tuned: list[dict[str, list[float]]]
) -> tuple[Interval, float, float]:
    """Tuned minus base, item by item, with its interval.

    With several trainings (seeds) each item counts with its mean over them, and the variance between
    trainings is added: what another seed would have changed (`intervals.add_trainings`).

    Args:
        base: subject -> [n] scores.
        tuned: the same for each training, items in the same order.

    Returns:
        The mean difference (as `mean` weighs subjects) with its 95 % interval, its standard error,
        and the degrees of freedom. NaN where one item leaves nothing to estimate an error from. Where
        all items moved alike the error is 0, but the interval is not: see `intervals.unvaried`.
    """
    gaps = {s: np.asarray([t[s] for t in tuned], float) - base[s] for s in base}  # [seeds, n]
    value, error = mean({s: list(gap.mean(0)) for s, gap in gaps.items()})
    n = sum(gap.shape[1] for gap in gaps.values())
    freedom = float(n - len(gaps))
    if len(tuned) > 1 and not math.isnan(error):
        by_training = np.mean([gap.mean(1) for gap in gaps.values()], axis=0)
        between = float(by_training.var(ddof=1)) / len(tuned)
        shared = mean({s: gap.ravel() for s, gap in gaps.items()})[1] ** 2
        error, freedom = add_trainings(error**2, freedom, between, len(tuned), shared)
    if error == 0:  # every item moved alike, as a rule not at all
        every = np.concatenate([np.ravel(of[s]) for of in (base, *tuned) for s in base])
        within = (-1.0, 1.0) if 0 <= every.min() and every.max() <= 1 else None
        return Interval(value, *unvaried(value, n, within), n), 0.0, math.inf
    if math.isnan(error):
        return Interval(value, math.nan, math.nan, n), math.nan, math.nan
    half = students_t(freedom) * error
    return Interval(value, value - half, value + half, n), error, freedom


def differences(rows: list[dict]) -> list[dict]:
    """Every tuned arm against the base, task by task.

    Args:
        rows: as `score` returns them.

    Returns:
        Rows {task, shots, limit, metric, model, seeds, base, base_error, tuned, tuned_error,
        difference, error, freedom, outside, p, truncated, problem}; base, tuned and difference are an
        `Interval`, with standard errors. `p` is corrected for the number of tasks that the arm was
        tried on; `outside`: below 0.05, not explained by noise (`intervals.outside_the_noise`; the
        sign test where all items moved alike). Where there is a problem, only task, limit and model are
        there beside it.
    """
    found = []
    for arm in dict.fromkeys(row["model"] for row in rows if row["model"] != "base"):
        compared = []
        for task in dict.fromkeys(row["task"] for row in rows):
            base = next(r for r in rows if r["task"] == task and r["model"] == "base")
            tuned = [row for row in rows if row["task"] == task and row["model"] == arm]
            entry = {"task": task, "limit": base["limit"], "model": arm, "problem": None}
            found.append(entry)
            if any(row["value"] is None for row in (base, *tuned)):
                entry["problem"] = next(r["problem"] for r in (base, *tuned) if r["value"] is None)
            elif any(row["items"] != base["items"] for row in tuned):
                entry["problem"] = (
                    "base and tuned model were asked other items: the data has changed in between. "
                    f"Remove the rows of {task} from rows/harness.jsonl and run again."
                )
            else:
                compared.append(entry | _compare(base, tuned))
                found[-1] = compared[-1]
        gaps = [entry["difference"].value for entry in compared]
        errors = [entry["error"] for entry in compared]
        freedoms = [entry["freedom"] for entry in compared]
        items = [entry["difference"].n for entry in compared]
        told = outside_the_noise(gaps, errors, freedoms=freedoms, trials=items)
        for entry, outside, p in zip(compared, *told, strict=True):
            entry.update(outside=outside, p=p)
    return found


def _compare(base: dict, tuned: list[dict]) -> dict:
    gap, gap_error, freedom = paired_difference(base["scores"], [r["scores"] for r in tuned])
    nothing = {subject: [0.0] * len(scores) for subject, scores in base["scores"].items()}
    before, base_error, _ = paired_difference(nothing, [base["scores"]])
    after, error, _ = paired_difference(nothing, [row["scores"] for row in tuned])
    return {
        "shots": base["shots"],
        "metric": base["metric"],
        "seeds": len(tuned),
        "base": before,
        "base_error": base_error,
        "tuned": after,
        "tuned_error": error,
        "difference": gap,
        "error": gap_error,
        "freedom": freedom,
        "truncated": base["truncated"],
    }


def before_after(
    run: Run,
    tasks: tuple[str, ...] | list[str] | None = None,
    limit: int | None = None,
    names: tuple[str, ...] | None = None,
):
    """What the tuned models know against what the base knew, as a pandas data frame in words.

    In percent, with standard errors over the items; differences in points with 95 % intervals, paired
    by item. "inside the noise": not told from no change, after Holm's correction for the number of
    tasks. Arguments and errors as of `score`.
    """
    import pandas as pd

    lines = []
    for found in differences(score(run, tasks, limit, names)):
        line = {"task": found["task"], "model": found["model"]}
        if found["problem"]:
            lines.append({**line, "verdict": f"not measured: {found['problem']}"})
            continue
        gap, seeds = found["difference"], found["seeds"]
        verdict = "outside the noise" if found["outside"] else "inside the noise"
        if math.isnan(found["p"]):
            verdict = "too few items to tell"
        if found["truncated"]:
            verdict += f"; {found['truncated']} prompts cut to the model's context"
        lines.append(
            {
                **line,
                "shots": found["shots"],
                "metric": found["metric"],
                "items": f"{gap.n}" + (" (limited)" if found["limit"] else ""),
                "base": f"{100 * found['base'].value:.1f} ± {100 * found['base_error']:.1f}",
                "tuned": f"{100 * found['tuned'].value:.1f} ± {100 * found['tuned_error']:.1f}"
                + (f" ({seeds} seeds)" if seeds > 1 else ""),
                "difference": f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
                "p (Holm)": f"{found['p']:.3g}",
                "verdict": verdict,
            }
        )
    return pd.DataFrame(lines, dtype=object).fillna("")
