"""Task scores before and after training, compared item by item."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import compress

import numpy as np

from sao_utils.statistics.errors import add_trainings, students_t
from sao_utils.statistics.intervals import Interval, unvaried_difference
from sao_utils.statistics.power import outside_the_noise


def mean(scores: dict[str, list[float]]) -> tuple[float, float]:
    """The mean of the subjects' means, each with equal weight, and its standard error.

    Args:
        scores: subject -> [n] the score of each item. With one subject, the result is the plain mean.

    Returns:
        The mean, and sqrt(sum of s^2/n over subjects) / number of subjects; the error is NaN if a
        subject has only one item.
    """
    parts = [np.asarray(values, dtype=float) for values in scores.values()]
    squared = [p.var(ddof=1) / len(p) if len(p) > 1 else math.nan for p in parts]
    value = float(np.mean([p.mean() for p in parts]))
    return value, math.sqrt(math.fsum(squared)) / len(parts)


def leave_out(rows: list[dict], asked: Collection[str]) -> list[dict]:
    """The rows of `tasks.score_tasks` without the items that ask one of `asked`, for `differences`.

    A subject that loses all of its items is left out; a row that loses all gets value None and a problem.
    Rows of tasks whose items are unknown (because of an earlier problem) stay as they are.
    """
    kept = {
        row["task"]: {s: [text not in asked for text in of] for s, of in row["asked"].items()}
        for row in rows
        if row.get("asked")
    }
    found = []
    for row in rows:
        if row["value"] is not None and row["task"] in kept:
            scores = {s: [*compress(of, kept[row["task"]][s])] for s, of in row["scores"].items()}
            scores = {subject: of for subject, of in scores.items() if of}
            if scores:
                row = {**row, "scores": scores, "value": mean(scores)[0]}
            else:
                row = {**row, "value": None, "problem": "no item is left"}
        found.append(row)
    return found


def paired_difference(
    base: dict[str, list[float]], tuned: list[dict[str, list[float]]]
) -> tuple[Interval, float, float]:
    """The paired difference, tuned minus base, with its interval.

    With several trainings (seeds), each item counts with its mean over them, and the variance between
    trainings, which is what another seed would have changed, is added (`errors.add_trainings`).

    Args:
        base: subject -> [n] scores.
        tuned: the same for each training, items in the same order.

    Returns:
        The mean difference (with the subject weights of `mean`) with its 95 % interval, its standard
        error, and the degrees of freedom. If all items moved alike, the error is 0, but the interval
        still has a width (`unvaried_difference`); if a subject has only one item, the error is NaN.
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
    if error == 0:
        every = np.concatenate([np.ravel(of[s]) for of in (base, *tuned) for s in base])
        return unvaried_difference(value, every, n, n), 0.0, math.inf
    if math.isnan(error):
        return Interval(value, math.nan, math.nan, n, "one item: no interval"), error, math.inf
    half = students_t(freedom) * error
    return Interval(value, value - half, value + half, n), error, freedom


def differences(rows: list[dict]) -> list[dict]:
    """Every tuned arm against the base, task by task.

    Args:
        rows: as `tasks.score_tasks` returns them.

    Returns:
        Rows {task, limit, metric, model, base, tuned, difference, outside, p, problem}; base, tuned and
        difference are each an `Interval`. `p` is corrected for the number of tasks that the arm was tried
        on; `outside` says whether it is below 0.05, so that noise does not explain the difference
        (`power.outside_the_noise`). A row with a problem has only task, limit and model besides it.
    """
    found = []
    for arm in dict.fromkeys(row["model"] for row in rows if row["model"] != "base"):
        compared, tests = [], []
        for task in dict.fromkeys(row["task"] for row in rows):
            base = next(r for r in rows if r["task"] == task and r["model"] == "base")
            tuned = [row for row in rows if row["task"] == task and row["model"] == arm]
            entry = {"task": task, "limit": base["limit"], "model": arm}
            entry["problem"] = _problem(base, tuned)
            if entry["problem"] is None:
                gap, *test = paired_difference(base["scores"], [row["scores"] for row in tuned])
                entry |= {"metric": base["metric"], "base": _score([base]), "tuned": _score(tuned)}
                entry["difference"] = gap
                compared.append(entry)
                tests.append((gap.value, *test, gap.n))
            found.append(entry)
        for entry, outside, p in zip(compared, *outside_the_noise(*zip(*tests)) if tests else ()):
            entry.update(outside=outside, p=p)
    return found


def _problem(base: dict, tuned: list[dict]) -> str | None:
    """Why the base and tuned models cannot be compared on a task; None if they can."""
    for row in (base, *tuned):
        if row["value"] is None:
            return row["problem"]
        if row["items"] != base["items"]:
            return (
                "base and tuned model did other items: the data has changed in between. "
                f"Remove the rows of {row['task']} from rows/tasks.jsonl and run again."
            )
    return None


def _score(rows: list[dict]) -> Interval:
    """The score of one model over its trainings, as a difference from 0 for every item."""
    nothing = {subject: [0.0] * len(scores) for subject, scores in rows[0]["scores"].items()}
    return paired_difference(nothing, [row["scores"] for row in rows])[0]
