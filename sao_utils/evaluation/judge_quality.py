"""Accuracy and biases of a judge, from its verdicts in both orders."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from sao_utils.oracles import cluster
from sao_utils.stages.judging import ORDERS, first_shown
from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean, win_rate
from sao_utils.statistics.ratings import kappa

ABOUT_EQUAL = 0.1  # lengths that differ by at most this share of the longer one (ours)
LENGTHS = ("longer", "about equal", "shorter")


def judge_quality(verdicts: list[dict], resamples: int = 10_000) -> dict[str, Interval]:
    """How accurate and how biased a judge is on pairs (rows of `stages.judging.judge_pairs`), by metric.

    Over all judged pairs: "valid verdicts"; "consistent verdicts": those whose orders agree; "probability
    on the verdicts": the mean over pairs of the smaller of the two orders' masses. Over pairs with a valid
    verdict: "flip rate": the share whose orders name different answers; "first position": how often the
    answer shown first wins; "longer answer chosen, all pairs".

    Over pairs whose better answer is known: "flip rate, unequal quality"; "accuracy": the share in which
    the mean of both orders names the better answer; "accuracy, one order"; "accuracy, better answer first"
    and "accuracy, better answer second": that of the order which shows it there; "accuracy, better answer
    longer", "... about equal", "... shorter"; "accuracy: <subset>" for each subset of labelled pairs;
    "longer answer chosen" and "longer answer better": how often the judge prefers the longer answer, and
    how often it is the better one; "length bias": the former minus the latter, paired. A margin of 0
    counts as half right.

    Clusters are question combinations, or prompts that no oracle knows. Metrics without pairs are absent.
    """
    judged = [
        {**row, "combination": cluster(row["prompt"])}
        for row in verdicts
        if row["outcome"] != "identical"
    ]
    valid = [row for row in judged if row["outcome"] != "invalid"]
    uneven = [row for row in valid if len(set(row.get("lengths", "="))) == 2]
    known = known_pairs(judged)
    unequal = [row for row in known if row["longer_better"] is not None]
    found: dict[str, Interval] = {}

    def add(metric: str, rows: list[dict], value: Callable[[dict], float]) -> None:
        if rows:
            found[metric] = win_rate([value(row) for row in rows], _combinations(rows))

    right = itemgetter("right")
    add("valid verdicts", judged, lambda row: row["outcome"] != "invalid")
    add("consistent verdicts", judged, lambda row: row["outcome"] == "consistent")
    if judged:  # not `win_rate`: rounding may put a mass slightly above 1
        masses = [row["mass"] for row in judged]
        mean = clustered_mean(masses, _combinations(judged), resamples)
        found["probability on the verdicts"] = mean
    add("flip rate", valid, lambda row: row["outcome"] == "inconsistent")
    shown = [{**row, "prefers": prefers} for row in valid for prefers in first_shown(row)]
    add("first position", shown, itemgetter("prefers"))
    add("longer answer chosen, all pairs", uneven, _chooses_longer)
    add("flip rate, unequal quality", known, lambda row: row["right_12"] != row["right_21"])
    add("accuracy", known, right)
    each = [{**row, "right": row[f"right_{order}"]} for order in ORDERS for row in known]
    add("accuracy, one order", each, right)
    add("accuracy, better answer first", known, itemgetter("better_first"))
    add("accuracy, better answer second", known, itemgetter("better_second"))
    for name in LENGTHS:
        add(f"accuracy, better answer {name}", [r for r in known if r["better_is"] == name], right)
    add("longer answer chosen", unequal, itemgetter("longer_chosen"))
    add("longer answer better", unequal, itemgetter("longer_better"))
    for name in sorted({row["subset"] for row in known} - {None}):
        add(f"accuracy: {name}", [row for row in known if row["subset"] == name], right)
    if unequal:
        chosen, better = ([row[f"longer_{key}"] for row in unequal] for key in ("chosen", "better"))
        bias = clustered_difference(chosen, better, _combinations(unequal), resamples)
        found["length bias"] = bias
    return found


def _combinations(rows: list[dict]) -> list[str]:
    return [row["combination"] for row in rows]


def known_pairs(verdicts: list[dict]) -> list[dict]:
    """What is known about a judge's errors: one row for each pair whose better answer is known.

    Only pairs of different quality with a valid verdict count. A margin of 0 is half right.

    Returns:
        Rows {combination: the cluster; right: whether the mean margin names the better answer;
        right_12, right_21: the same for each order alone; better_first, better_second: the same for the
        order in which the better answer is shown first or second; longer_better, longer_chosen: whether
        the longer answer is the better one, or the preferred one (None for equal lengths); better_is:
        "longer", "about equal" (`ABOUT_EQUAL`) or "shorter", the length of the better answer compared
        with the other's; subset: that of a labelled pair, else None}.
    """
    found = []
    for row in verdicts:
        if row["margin"] is None or row["quality"] is None or len(set(row["quality"])) == 1:
            continue
        first_better = row["quality"][0] > row["quality"][1]
        right_12 = _agrees(first_better, row["margin_12"])
        right_21 = _agrees(first_better, row["margin_21"])
        longer, longest = row["lengths"][0] - row["lengths"][1], max(row["lengths"])
        better_is = "longer" if (longer > 0) == first_better else "shorter"
        found.append(
            {
                "combination": cluster(row["prompt"]),
                "right": _agrees(first_better, row["margin"]),
                "right_12": right_12,
                "right_21": right_21,
                "better_first": right_12 if first_better else right_21,
                "better_second": right_21 if first_better else right_12,
                "longer_better": (longer > 0) == first_better if longer else None,
                "longer_chosen": _chooses_longer(row) if longer else None,
                "better_is": "about equal" if abs(longer) <= ABOUT_EQUAL * longest else better_is,
                "subset": row.get("subset"),
            }
        )
    return found


def _chooses_longer(row: dict) -> bool | float:
    return _agrees(row["lengths"][0] > row["lengths"][1], row["margin"])


def _agrees(first: bool, margin: float) -> bool | float:
    """Whether a margin prefers the first answer (if `first`) or the second (if not); 0.5 if it is 0."""
    return 0.5 if margin == 0 else (margin > 0) == first


def judges_agree(
    rows_a: list[dict], rows_b: list[dict], resamples: int = 10_000
) -> dict[str, Interval]:
    """How far two judges, or two ways to query one judge, agree on the same pairs.

    Args:
        rows_a, rows_b: rows of `judge_pairs`, matched by id. Pairs without a valid verdict from both are
            left out: n says how many are compared.

    Returns:
        "agreement" and "kappa" (Cohen's) of the verdicts on pairs, each of which is a, b, or neither (a
        tie, or orders that disagree); "agreement, one order" and "kappa, one order" of the single
        verdicts, of which each judge gave two per pair, one for each order. {} if nothing can be
        compared.
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
    single = [[first for row in rows for first in first_shown(row)] for rows in zip(*both)]
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
