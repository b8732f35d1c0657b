"""How right and how biased a judge is, from its verdicts in both orders."""

from __future__ import annotations

from itertools import compress

import numpy as np

from sao_utils.oracles import cluster
from sao_utils.stages.judging import ORDERS, first_shown
from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean, win_rate
from sao_utils.statistics.ratings import kappa

ABOUT_EQUAL = 0.1  # lengths that differ by less than this share of the longer (ours)
LENGTHS = ("longer", "about equal", "shorter")


def judge_quality(verdicts: list[dict], resamples: int = 10_000) -> dict[str, Interval]:
    """How right and how biased a judge is on pairs (rows of `stages.judging.judge_pairs`), by metric.

    Of all judged pairs: "valid verdicts"; "consistent verdicts", whose orders agree; "probability on the
    verdicts", the mean (of the smaller of both orders). Of the valid ones: "flip rate", share whose
    orders name different answers; "first position", how often the answer shown first wins; "longer
    answer chosen, all pairs".

    Of pairs whose better answer is known: "flip rate, unequal quality"; "accuracy", share where the mean
    of both orders names it; "accuracy, one order"; "accuracy, better answer first" and "second": of the
    order that shows it there; "accuracy, better answer longer", "about equal", "shorter"; "accuracy:
    <subset>" of each subset of labelled pairs; "longer answer chosen" and "longer answer better": how
    often the judge prefers it, and how often it is the better one; "length bias": the first minus the
    second, paired.

    Clustered by question combination, or by prompt where no oracle knows it. What has no pairs has no key.
    """
    judged = [row for row in verdicts if row["outcome"] != "identical"]
    valid = [row for row in judged if row["outcome"] != "invalid"]
    uneven = [row for row in valid if len(set(row.get("lengths", "="))) == 2]
    first_wins = [prefers for row in valid for prefers in first_shown(row)]
    longer_wins = [_agrees(row["lengths"][0] > row["lengths"][1], row["margin"]) for row in uneven]
    of_rows = {
        "valid verdicts": ([row["outcome"] != "invalid" for row in judged], judged),
        "consistent verdicts": ([row["outcome"] == "consistent" for row in judged], judged),
        "probability on the verdicts": ([row["mass"] for row in judged], judged),
        "flip rate": ([row["outcome"] == "inconsistent" for row in valid], valid),
        "first position": (first_wins, [row for row in valid for _ in ORDERS]),
        "longer answer chosen, all pairs": (longer_wins, uneven),
    }
    found = {
        key: (values, [cluster(r["prompt"]) for r in rows])
        for key, (values, rows) in of_rows.items()
    }
    known = agreement(judged)
    clusters = known["combination"]
    flips = [a != b for a, b in zip(known["right_12"], known["right_21"])]
    found["flip rate, unequal quality"] = (flips, clusters)
    found["accuracy"] = (known["right"], clusters)
    found["accuracy, one order"] = (known["right_12"] + known["right_21"], clusters * 2)
    found["accuracy, better answer first"] = (known["better_first"], clusters)
    found["accuracy, better answer second"] = (known["better_second"], clusters)
    for name in LENGTHS:
        group = _where(known["right"], clusters, [name == is_ for is_ in known["better_is"]])
        found[f"accuracy, better answer {name}"] = group
    for key in ("chosen", "better"):
        values = known[f"longer_{key}"]
        found[f"longer answer {key}"] = _where(values, clusters, [v is not None for v in values])
    for name in sorted(set(known["subset"]) - {None}):
        group = _where(known["right"], clusters, [name == subset for subset in known["subset"]])
        found[f"accuracy: {name}"] = group
    # A margin of 0 counts half: shares, but not all booleans. The mass may be a hair above 1.
    scored = {
        key: clustered_mean(values, by, resamples, bounds=(0, 1))
        if key == "probability on the verdicts"
        else win_rate(values, by).rate
        for key, (values, by) in found.items()
        if values
    }
    chosen, by = found["longer answer chosen"]
    if chosen:
        better, _ = found["longer answer better"]
        scored["length bias"] = clustered_difference(chosen, better, by, resamples, bounds=(0, 1))
    return scored


def _where(values: list, clusters: list, there: list[bool]) -> tuple[list, list]:
    """The values, and the clusters, of the places that are `there`."""
    return list(compress(values, there)), list(compress(clusters, there))


def agreement(verdicts: list[dict]) -> dict[str, list]:
    """What is known of a judge's errors, as parallel lists over the pairs with a known better answer.

    Only judged pairs of different quality count. A margin of 0 is half right.

    Returns:
        right: whether the mean margin names the better answer; right_12, right_21: the same for
        each order alone; better_first, better_second: for the order in which the better answer is shown
        first, second; size: of the mean margin (nats); longer_better, longer_chosen: whether the
        longer answer is the better, the preferred one (None for equal lengths); better_is: "longer",
        "about equal" (`ABOUT_EQUAL`) or "shorter"; subset: of a labelled pair, else None;
        combination: the cluster.
    """
    keys = "right right_12 right_21 better_first better_second size longer_better longer_chosen better_is"
    found: dict[str, list] = {key: [] for key in (*keys.split(), "subset", "combination")}
    for row in verdicts:
        if row["margin"] is None or row["quality"] is None or len(set(row["quality"])) == 1:
            continue
        first_better = row["quality"][0] > row["quality"][1]
        right_12 = _agrees(first_better, row["margin_12"])
        right_21 = _agrees(first_better, row["margin_21"])
        longer, longest = row["lengths"][0] - row["lengths"][1], max(row["lengths"])
        if abs(longer) <= ABOUT_EQUAL * longest:
            better_is = "about equal"
        else:
            better_is = "longer" if (longer > 0) == first_better else "shorter"
        facts = {
            "right": _agrees(first_better, row["margin"]),
            "right_12": right_12,
            "right_21": right_21,
            "better_first": right_12 if first_better else right_21,
            "better_second": right_21 if first_better else right_12,
            "size": abs(row["margin"]),
            "longer_better": (longer > 0) == first_better if longer else None,
            "longer_chosen": _agrees(longer > 0, row["margin"]) if longer else None,
            "better_is": better_is,
            "subset": row.get("subset"),
            "combination": cluster(row["prompt"]),
        }
        for key, fact in facts.items():
            found[key].append(fact)
    return found


def _agrees(first: bool, margin: float) -> bool | float:
    """Whether a margin prefers the first answer if `first`, else the second; 0.5 for a margin of 0."""
    return 0.5 if margin == 0 else (margin > 0) == first


def calibration(
    verdicts: list[dict], bins: int = 8, resamples: int = 10_000
) -> list[tuple[float, Interval]]:
    """Whether a judge that is surer is more often right.

    Returns:
        For each of at most `bins` groups of pairs with a known better answer, as large as each
        other and in order of the size of the mean margin: (mean size in nats, accuracy). A judge
        that knows how sure it is has accuracy sigmoid(size). No group is smaller than 20 pairs,
        unless there are fewer.
    """
    known = agreement(verdicts)
    order = np.argsort(known["size"], kind="stable")
    groups = np.array_split(order, max(1, min(bins, len(order) // 20))) if len(order) else []
    return [
        (
            float(np.mean([known["size"][k] for k in group])),
            win_rate(
                [known["right"][k] for k in group], [known["combination"][k] for k in group]
            ).rate,
        )
        for group in groups
    ]


def judges_agree(
    rows_a: list[dict], rows_b: list[dict], resamples: int = 10_000
) -> dict[str, Interval]:
    """How far two judges, or two ways to query one judge, agree on the same pairs.

    Args:
        rows_a, rows_b: rows of `judge_pairs`; matched by id. Pairs that one of them did not judge, or
            not validly, are left out: n says how many are compared.

    Returns:
        "agreement", "kappa" (Cohen's): of the verdict on a pair, which is a, b, or neither (a tie, or
        orders that disagree); "agreement, one order", "kappa, one order": of the two verdicts that each
        judge gave, one an order. {} when nothing can be compared.
    """
    other = {row["id"]: row for row in rows_b if row["margin"] is not None}
    both = [
        (row, other[row["id"]])
        for row in rows_a
        if row["margin"] is not None and row["id"] in other
    ]
    if not both:
        return {}
    clusters = [cluster(row["prompt"]) for row, _ in both]
    verdicts = [[_verdict(row) for row in rows] for rows in zip(*both)]
    single = [[first for row in rows for first in row["first_wins"]] for rows in zip(*both)]
    found = {}
    for suffix, (a, b), by in (
        ("", verdicts, clusters),
        (", one order", single, [name for name in clusters for _ in ORDERS]),
    ):
        same = [x == y for x, y in zip(a, b)]
        found[f"agreement{suffix}"] = clustered_mean(same, by, resamples)
        found[f"kappa{suffix}"] = kappa(a, b, by, resamples)
    return found


def _verdict(row: dict) -> str:
    if row["outcome"] != "consistent":
        return "neither"
    return "a" if row["margin"] > 0 else "b"
