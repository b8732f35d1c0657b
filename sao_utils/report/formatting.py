"""How numbers are told: their units by the key of a result, and a value with its interval."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

from sao_utils.statistics.intervals import Interval

NOT_COMPARABLE = (
    "Numbers of the recipe tiny are measured on a toy of 1.2 M parameters in a world of its own; "
    "they are not comparable with the paper's."
)
#: metric of a contest, league or benchmark -> its unit, where it is no share
UNITS = {
    "length_difference": "characters",
    "avg_length": "characters",
    "avg_tokens": "tokens",
    "prompts_needed": "prompts",
    "elo": "Elo",
}
DECIMALS = {"": 2, "of 10": 2, "prompts": 0, "pairs": 0}  # of a unit; others have one
GRADED = ("mt_bench", "tiny_mt")  # benchmarks whose score is a grade from 1 to 10


def unit(key: str) -> str:
    """What a value is counted in: shares in percent, their differences in points; "" for kappa."""
    # The names of models, judges and tasks say nothing of the metric.
    kind, *names = key.split(".")
    if names and re.fullmatch(r"seed\d+", names[-1]):
        names.pop()  # of one training alone
    metric = key
    if kind in ("contest", "league", "harness", "leakage"):
        metric = names[-1]
    elif kind == "benchmark":
        metric = names[3]
    elif kind == "labelled_pairs":
        return "pairs"
    elif kind == "judge":
        metric = names[2]
    elif kind == "self_judge" and "accuracy" in names:  # what follows names a subset
        metric = "accuracy"
    if names and names[0] in GRADED and metric.startswith("score"):
        return "of 10"
    if metric in UNITS:
        return UNITS[metric]
    if metric.startswith("kappa"):
        return ""
    if metric.startswith("answer_length"):
        return "tokens"
    return "points" if "gain" in metric or metric.endswith("bias") else "%"


def is_share(key: str) -> bool:
    """Whether a key's value is a share or a difference of shares (shown in percent)."""
    return unit(key) in ("%", "points")


def number(key: str, value: float | None) -> str:
    """One value of a result as it is shown: shares in percent, kappa with two decimals.

    JSON knows neither infinity nor NaN: None is the former where prompts are counted, else the latter.
    """
    if value is None:
        value = math.inf if unit(key) == "prompts" else math.nan
    factor, digits = (100 if is_share(key) else 1), DECIMALS.get(unit(key), 1)
    return "no end" if math.isinf(value) else f"{factor * value:.{digits}f}"


def in_words(key: str, interval: Interval | dict) -> str:
    """`71.2 [68.0, 74.1]`, or the value alone where there is no interval."""
    value = asdict(interval) if isinstance(interval, Interval) else interval
    shown = [number(key, value[k]) for k in ("value", "low", "high")]
    return f"{shown[0]} (no interval)" if shown[1] == "nan" else "{} [{}, {}]".format(*shown)
