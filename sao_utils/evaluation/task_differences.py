"""Before and after: scores of tasks, compared item by item."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import compress

import numpy as np

from sao_utils.statistics.errors import add_trainings, students_t
from sao_utils.statistics.intervals import Interval, unvaried
from sao_utils.statistics.power import outside_the_noise


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


def leave_out(rows: list[dict], asked: Collection[str]) -> list[dict]:
    """The rows of `tasks.score_tasks` without the items that ask one of these; for `differences`.

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
        rows: as `tasks.score_tasks` returns them.

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
                    "base and tuned model did other items: the data has changed in between. "
                    f"Remove the rows of {task} from rows/tasks.jsonl and run again."
                )
            else:
                compared.append(entry | _compare(base, tuned))
                found[-1] = compared[-1]
        gaps = [entry["difference"].value for entry in compared]
        errors = [entry["error"] for entry in compared]
        freedoms = [entry["freedom"] for entry in compared]
        items = [entry["difference"].n for entry in compared]
        tested = outside_the_noise(gaps, errors, freedoms=freedoms, trials=items)
        for entry, outside, p in zip(compared, *tested, strict=True):
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


def before_after(rows: list[dict]):
    """What the tuned models know against what the base knew, as a pandas data frame in words.

    In percent, with standard errors over the items; differences in points with 95 % intervals, paired
    by item. "inside the noise": not to be separated from no change, after Holm's correction for the
    number of tasks.

    Args:
        rows: as `tasks.score_tasks` returns them.
    """
    import pandas as pd

    lines = []
    for found in differences(rows):
        line = {"task": found["task"], "model": found["model"]}
        if found["problem"]:
            lines.append({**line, "verdict": f"not measured: {found['problem']}"})
            continue
        gap, seeds = found["difference"], found["seeds"]
        verdict = "outside the noise" if found["outside"] else "inside the noise"
        if math.isnan(found["p"]):
            verdict = "too few items to say"
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
