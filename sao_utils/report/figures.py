"""The pictures of a run, as matplotlib figures; `save` keeps one as an SVG file.

Each function takes plain rows or scores, and returns a figure that a notebook shows as a cell's
last value. Where there is nothing to draw, the picture says so: a small run is no error. Colours
can be told apart by colour-blind readers (Okabe and Ito), and never carry a meaning alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from sao_utils.statistics.intervals import Interval, win_rate
from sao_utils.statistics.length_control import length_curve
from sao_utils.store import Run, results_folder, write_whole

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
#: curve -> (its title, unit, keys of a log row: the first is drawn as a line, the second as dots).
CURVES = {
    "loss": ("loss", "nats", ("loss",)),
    "rewards": ("rewards", "reward", ("rewards_chosen", "rewards_rejected")),
    "margin": ("margin between the rewards", "chosen - rejected", ("margin",)),
    "accuracy": ("pairs in the right order", "share", ("accuracy",)),
    "grad_norm": ("gradient norm before clipping", "norm", ("grad_norm",)),
    "lengths": ("length, chosen and rejected", "tokens", ("chosen_tokens", "rejected_tokens")),
}
#: probe curve -> (its title, unit).
PROBES = {
    "repetition": ("sentences said before", "share of sentences"),
    "tokens": ("length of the replies", "tokens, mean"),
    "empty": ("empty replies", "share of replies"),
    "unfinished": ("replies cut off at the limit", "share of replies"),
}
#: curve -> (what is healthy, what is a problem); one line each beneath the curve.
GUIDANCE = {
    "loss": ("noisy, and lower at the end.", "rises for long, or falls to 0 at once."),
    "rewards": ("line and dots part; both may fall.", "both fall steeply: read the replies."),
    "margin": ("rises, slower towards the end.", "flat, or beyond gamma at once."),
    "accuracy": ("above a half; 1 is no aim.", "stays at a half: the labels say nothing."),
    "grad_norm": ("of one size, or changing slowly.", "single steps ten times as high, or 0."),
    "lengths": ("line and dots about equal.", "always apart: length is what is learned."),
    "repetition": ("as before training.", "climbs: stop earlier, or lower the rate."),
    "tokens": ("within a quarter of step 0.", "doubles or halves: read the replies."),
    "empty": ("none.", "any."),
    "unfinished": ("as before training, or fewer.", "climbs: the end token gets lost."),
}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
#: score of `results.judge_quality` -> what it is in words.
JUDGE = {
    "accuracy": "right, both orders together",
    "accuracy_one_order": "right, one order alone",
    "accuracy_gold_first": "right, better answer first",
    "accuracy_gold_second": "right, better answer second",
    "accuracy_better_longer": "right, better answer longer",
    "accuracy_better_about_equal": "right, about equally long",
    "accuracy_better_shorter": "right, better answer shorter",
    "flip_rate": "the orders disagree",
    "flip_rate_unequal": "... where one answer is better",
    "first_position_rate": "the first answer wins",
    "longer_chosen": "the longer answer wins",
    "longer_better": "the longer answer is better",
}
#: model or arm -> (its name in words, colour), in the order in which they are drawn.
MODELS = {
    "base": ("base model", GREY),
    "self": ("self-judged pairs", BLUE),
    "tuned": ("self-judged pairs", BLUE),
    "sft_random": ("SFT on random own answers", ORANGE),
    "random": ("the same pairs, random labels", RED),
    "oracle": ("pairs with oracle labels", GREEN),
}
#: outcome of a duel in both orders -> its colour and pattern, from the best to the worst.
OUTCOMES = (
    ("wins in both orders", BLUE, ""),
    ("the one shown first wins", "#BBBBBB", "//"),
    ("tie, identical or invalid", "#E5E5E5", ""),
    ("the one shown second wins", "#BBBBBB", "\\\\"),
    ("loses in both orders", ORANGE, ""),
)
DRAWN = 2000  # points of a cloud, above which an SVG holds its picture and not each of them
STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a text is a dollar
    "svg.hashsalt": "sao",  # names inside the SVG: by default new ones each time
}


def _styled(draw: Callable) -> Callable:
    """Draw in the project's style, whatever the user's own settings are, and leave those alone."""

    @wraps(draw)
    def styled(*args, **options):
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **options)

    return styled


def _new(height: float = 3.6, rows: int = 1, columns: int = 1, **options):
    """A figure of 8 inches (800 pixels) and its axes, taken from pyplot's list: shown only once."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(8, height), **options)
    pyplot.close(figure)
    return figure, axes


def _plain(text: object, limit: int = 60) -> str:
    """A text as one line that any XML file may hold: no control characters, not too long."""
    line = " ".join(re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]", " ", str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _titles(axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _nothing(axes, why: str) -> None:
    """Say in an empty chart why it is empty."""
    axes.text(0.5, 0.5, f"Nothing to show: {why}.", ha="center", transform=axes.transAxes)
    axes.set_axis_off()


def _rows_down(axes, labels: list[str]) -> None:
    """Name the rows of a chart that is read from top to bottom."""
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _interval(axes, row: float, found: Interval, colour: str, marker: str = "o", **options) -> None:
    """A share with its interval in percent, its value written above."""
    value, low, high = (100 * part for part in (found.value, found.low, found.high))
    if not all(map(math.isfinite, (value, low, high))):
        return
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar([value], [row], xerr=reach, fmt=marker, color=colour, capsize=3, **options)
    place = dict(xytext=(0, 5), textcoords="offset points", ha="center")
    axes.annotate(f"{value:.1f}", (value, row), fontsize=8, **place)


def _counts(intervals) -> str:
    """`n = 880`, or `n = 860 to 880`, of several intervals."""
    sizes = sorted({found.n for found in intervals})
    return f"n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")


@_styled
def as_svg(figure) -> str:
    """The same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def save(run: Run, name: str, figure):
    """Write a figure to the run's `figures/<name>.svg`: the same bytes for the same data.

    Returns the figure, so that a notebook shows it.
    """
    write_whole(run.folder / "figures" / f"{name}.svg", as_svg(figure))
    return figure


# ---------------------------------------------------------------------- making the data


@_styled
def funnel(counts: list[tuple[str, int]]):
    """What became of every persona: `pairs.funnel(run)`; negative counts are what was left out."""
    figure, axes = _new(0.32 * len(counts) + 1.2)
    _titles(axes, "From personas to training pairs: nothing is lost unseen", "rows")
    if not counts:
        _nothing(axes, "no rows")
        return figure
    left = 0
    for row, (_, count) in enumerate(counts):
        start = left if count < 0 else 0
        left = left + count if count < 0 else count
        axes.barh(row, count, left=start, color=RED if count < 0 else BLUE)
        place = dict(xytext=(4, 0), textcoords="offset points", va="center")
        axes.annotate(f"{count:,}", (max(start, left), row), **place)
    _rows_down(axes, [label if count >= 0 else f"- {label}" for label, count in counts])
    axes.margins(x=0.1)
    return figure


@_styled
def distinct_prompts(prompts: dict[str, list[str]]):
    """How many different prompts there are as more are drawn, one line for each name.

    Different up to case and white space, as in `personas.repetition_rate`.
    """
    figure, axes = _new()
    _titles(axes, "Do prompts repeat?", "prompts drawn", "different prompts among them")
    longest = max(map(len, prompts.values()), default=0)
    if not longest:
        _nothing(axes, "no prompts")
        return figure
    axes.plot([0, longest], [0, longest], "--", color=GREY, label="all different")
    for (name, texts), colour in zip(prompts.items(), CYCLE * len(prompts), strict=False):
        seen, height = set(), [0]
        for text in texts:
            seen.add(" ".join(text.lower().split()))
            height.append(len(seen))
        axes.plot(height, color=colour, label=f"{_plain(name)}: {len(seen)} of n = {len(texts)}")
    axes.legend()
    return figure


@_styled
def near_duplicates(rates: dict[str, dict[float, float]], n: int):
    """Share of prompts that repeat an earlier one, by how alike two must be; one line a name.

    Args:
        rates: name -> {similarity: `personas.near_duplicate_rate` at it}, of n prompts each.
    """
    figure, axes = _new()
    x, y = "similarity that counts as a repetition", "prompts that repeat another (%)"
    _titles(axes, f"Do prompts nearly repeat? (n = {n} each)", x, y)
    if not n:
        _nothing(axes, "no prompts")
        return figure
    for (name, found), colour in zip(rates.items(), CYCLE * len(rates), strict=False):
        shares = [100 * share for share in found.values()]
        axes.plot(list(found), shares, "o-", color=colour, label=_plain(name))
    axes.legend()
    return figure


@_styled
def lengths(groups: dict[str, list[int]]):
    """Histograms of lengths in tokens, one for each name, with the mean as a dashed line."""
    figure, axes = _new()
    _titles(axes, "How long the answers are (dashed: mean)", "tokens", "share of answers (%)")
    every = [value for values in groups.values() for value in values]
    if not every:
        _nothing(axes, "no answers")
        return figure
    low, high = min(every), max(every)
    step = max(1, math.ceil((high - low) / 30))
    bins = [low - 0.5 + step * k for k in range((high - low) // step + 2)]
    for (name, values), colour in zip(groups.items(), CYCLE * len(groups), strict=False):
        if values:
            mean, share = sum(values) / len(values), [100 / len(values)] * len(values)
            label = f"{_plain(name)}: mean {mean:.1f}, n = {len(values)}"
            axes.hist(values, bins, weights=share, histtype="step", lw=2, color=colour, label=label)
            axes.axvline(mean, ls="--", lw=1, color=colour)
    axes.legend()
    return figure


# ---------------------------------------------------------------------- the judge


def _by_agreement(verdicts: list[dict]) -> dict[str, tuple[list[dict], str, str]]:
    """Judged rows by what the oracle says of them: label -> (rows, colour, marker)."""
    groups = {
        "oracle agrees": ([], BLUE, "o"),
        "oracle disagrees": ([], RED, "X"),
        "no difference, or no oracle": ([], "#BBBBBB", "."),
    }
    for row in verdicts:
        if row["margin"] is not None:
            a, b = row["quality"] or (0, 0)
            agrees = "oracle agrees" if (a > b) == (row["margin"] > 0) else "oracle disagrees"
            groups["no difference, or no oracle" if a == b else agrees][0].append(row)
    return {f"{label}, n = {len(g[0])}": g for label, g in groups.items() if g[0]}


@_styled
def margins(verdicts: list[dict]):
    """How sure the judge is (size of the mean margin, rows of `judging.judge`), and how right."""
    figure, axes = _new()
    _titles(axes, "How sure is the judge, and is it right?", "size of the margin (nats)", "pairs")
    groups = _by_agreement(verdicts)
    if not groups:
        _nothing(axes, "no pair was judged")
        return figure
    values = [[abs(row["margin"]) for row in rows] for rows, _, _ in groups.values()]
    colours = [colour for _, colour, _ in groups.values()]
    looks = dict(color=colours, label=list(groups), edgecolor="white", lw=0.5)
    axes.hist(values, 30, stacked=True, **looks)
    axes.legend()
    return figure


@_styled
def orders(verdicts: list[dict]):
    """Each pair's margin in both orders: where the two agree, and where the position decides."""
    figure, axes = _new(5)
    x, y = "margin for a, when a is shown first (nats)", "when b is shown first (nats)"
    _titles(axes, "Does the verdict depend on which answer is shown first?", x, y)
    groups = _by_agreement(verdicts)
    if not groups:
        _nothing(axes, "no pair was judged")
        return figure
    reach = 1e-9
    for label, (rows, colour, marker) in groups.items():
        x, y = ([row[key] for row in rows] for key in ("margin_12", "margin_21"))
        looks = dict(color=colour, marker=marker, alpha=0.6, lw=0, label=label)
        axes.scatter(x, y, s=24, rasterized=len(x) > DRAWN, **looks)
        reach = max(reach, *(1.15 * abs(value) for value in x + y))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    corners = {(1, 1): "a in both orders", (-1, -1): "b in both orders"}
    corners |= {(1, -1): "the first shown wins", (-1, 1): "the second shown wins"}
    for (x, y), text in corners.items():
        place = dict(ha="right" if x > 0 else "left", va="top" if y > 0 else "bottom")
        axes.text(0.97 * x * reach, 0.97 * y * reach, text, style="italic", **place)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


@_styled
def judge_matrix(counts: list[list[int]], columns: list[str]):
    """Verdicts against the oracle as a heat map: `results.judge_matrix(run)`."""
    figure, axes = _new(2.8)
    rows = ["oracle: a better", "oracle: b better", "oracle: a tie"]
    total = sum(map(sum, counts))
    _titles(axes, f"What the judge says, and what is true (n = {total} pairs)")
    if not total:
        _nothing(axes, "no pair with a known quality was judged")
        return figure
    axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto")
    highest = max(map(max, counts))
    for i, line in enumerate(counts):
        for j, count in enumerate(line):
            colour, share = "white" if count > 0.6 * highest else "black", count / max(1, sum(line))
            place = dict(ha="center", va="center")
            axes.text(j, i, f"{count}\n{share:.0%} of row", color=colour, **place)
    axes.set_xticks(range(len(columns)), [_plain(column) for column in columns])
    axes.set_yticks(range(len(counts)), rows[: len(counts)])
    axes.grid(False)
    return figure


@_styled
def calibration(groups: list[tuple[float, Interval]]):
    """How right the judge is where it is how sure: `results.calibration(verdicts)`."""
    figure, axes = _new()
    title = "Is the judge more often right where it is surer?"
    _titles(axes, title, "size of the margin (nats)", "verdicts that are right (%)")
    if not groups:
        _nothing(axes, "no pair with a known better answer has a margin in nats")
        return figure
    axes.set_title(f"{title} (n = {sum(found.n for _, found in groups)} pairs)")
    x = [size for size, _ in groups]
    line = [1.05 * max(*x, 0.1) * k / 100 for k in range(101)]
    expected = [100 / (1 + math.exp(-size)) for size in line]
    axes.plot(line, expected, "--", color=GREY, label="as sure as it says: 1 / (1 + exp(-size))")
    value, low, high = (
        [100 * getattr(found, part) for _, found in groups] for part in ("value", "low", "high")
    )
    reach = [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]]
    label = f"groups by margin, {_counts(found for _, found in groups)} pairs each"
    axes.errorbar(x, value, reach, fmt="o", color=BLUE, capsize=3, label=label)
    axes.set_ylim(min(40, *low) - 2, 102)
    axes.legend(loc="lower right")
    return figure


@_styled
def judge_shares(scores: dict[str, Interval], prefix: str = "self_judge"):
    """A judge's hits and habits (`JUDGE`) with their intervals, from `results.judge_quality`.

    What is not among the scores is left out.
    """
    there = {
        words: scores[f"{prefix}.{k}"] for k, words in JUDGE.items() if f"{prefix}.{k}" in scores
    }
    figure, axes = _new(0.45 * len(there) + 1.2)
    _titles(axes, "The judge's hits (blue) and habits (orange)", "share (%), with 95 % interval")
    if not there:
        _nothing(axes, "no pair was judged")
        return figure
    axes.axvline(50, color="black", lw=0.8)
    for row, (words, found) in enumerate(there.items()):
        hit = words.startswith("right")
        _interval(axes, row, found, BLUE if hit else ORANGE, marker="o" if hit else "s")
    _rows_down(axes, [f"{words} ({_counts([found])})" for words, found in there.items()])
    axes.set_xlim(-3, 103)
    return figure


# ---------------------------------------------------------------------- training


@_styled
def simpo_loss(beta: float, gamma: float):
    """SimPO's loss of one pair against the margin between its two rewards."""
    figure, axes = _new()
    x = [gamma + k / 20 for k in range(-160, 161)]
    title = "SimPO asks for a lead, not just for the right order"
    _titles(axes, title, "reward of chosen - reward of rejected", "loss (nats)")
    axes.plot(x, [math.log1p(math.exp(gamma - d)) for d in x], color=BLUE, lw=2)
    axes.axvline(0, color=GREY, ls=":", label="equal rewards")
    axes.axvline(gamma, color=RED, ls="--", label=f"gamma = {gamma:g}: the lead that is asked for")
    axes.set_ylim(bottom=0)
    scale = axes.secondary_xaxis("top", functions=(lambda d: d / beta, lambda d: d * beta))
    scale.set_xlabel(f"difference in mean log-probability a token (beta = {beta:g})", fontsize=9)
    axes.legend()
    return figure


@_styled
def sums_and_means(pairs: list[dict], beta: float, gamma: float):
    """What dividing by the length changes, on real pairs: their difference by length difference.

    Args:
        pairs: rows {logp_chosen, len_chosen, logp_rejected, len_rejected} of `training.pair_logps`;
            logp summed over the answer, nats.
    """
    figure, (left, right) = _new(3.8, 1, 2, sharex=True)
    x = [row["len_chosen"] - row["len_rejected"] for row in pairs]
    if not x:
        _nothing(left, "no pairs")
        right.set_axis_off()
        return figure
    sums = [row["logp_chosen"] - row["logp_rejected"] for row in pairs]
    means = [
        row["logp_chosen"] / row["len_chosen"] - row["logp_rejected"] / row["len_rejected"]
        for row in pairs
    ]
    told = "tokens of chosen - of rejected"
    for axes, values, title in (
        (left, sums, "summed log-probability"),
        (right, means, "mean log-probability a token"),
    ):
        _titles(axes, f"{title}\n{_slope(x, values)}", told, "chosen - rejected (nats)")
        ahead = f"chosen ahead: {sum(v > 0 for v in values) / len(x):.0%} of n = {len(x)}"
        looks = dict(color=BLUE, alpha=0.4, lw=0, label=ahead)
        axes.scatter(x, values, s=14, rasterized=len(x) > DRAWN, **looks)
        axes.axhline(0, color="black", lw=0.8)
    beyond = sum(v > gamma / beta for v in means) / len(x)
    label = f"gamma / beta = {gamma / beta:g}; beyond: {beyond:.0%}"
    right.axhline(gamma / beta, color=RED, ls="--", label=label)
    for axes in (left, right):
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        axes.legend(loc="upper right", fontsize=8)
    return figure


def _slope(x: list[float], y: list[float]) -> str:
    """How strongly y goes with x, in words."""
    from numpy import corrcoef

    if len(set(x)) < 2 or len(set(y)) < 2:
        return "correlation with length: none to be had"
    return f"correlation with length: {corrcoef(x, y)[0, 1]:+.2f}"


@_styled
def learning_rates(rows: list[dict]):
    """Good rate of the arm self against its learning rate (`search_table`), with 95 % intervals."""
    figure, axes = _new(3.2)
    x = "learning rate of the adapter"
    _titles(axes, "How the tiny recipe's learning rate was chosen", x, "good answers (%)")
    plain = re.compile(r"training\.learning_rate=([\d.e-]+)")
    # Only the rows that change nothing but the rate.
    found = [(plain.fullmatch(row["setting"]), row) for row in rows if row["arm"] == "self"]
    found = [(float(match[1]), row) for match, row in found if match]
    if not found:
        _nothing(axes, "the table of the search is not in this checkout")
        return figure
    for temperature, colour, marker in ((0.0, BLUE, "o-"), (0.6, ORANGE, "s--")):
        how = f"T = {temperature:g}" if temperature else "greedy"
        line = sorted((k, row) for k, row in found if float(row["temperature"]) == temperature)
        rates = [rate for rate, _ in line]
        value, low, high = (
            [100 * float(row[key]) for _, row in line] for key in ("good rate", "low", "high")
        )
        reach = [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]]
        axes.errorbar(rates, value, reach, fmt=marker, color=colour, capsize=3, label=how)
        for row in rows:
            if row["arm"] == "base" and float(row["temperature"]) == temperature:
                at = 100 * float(row["good rate"])
                axes.axhline(at, color=colour, ls=":", label=f"base model, {how}")
    n = sorted({int(row["n"]) for _, row in found})
    axes.set_title(f"How the tiny recipe's learning rate was chosen (n = {n[0]} questions a point)")
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend(ncols=2, fontsize=8)
    return figure


def search_table() -> list[dict]:
    """Rows of results/reference/search.csv, [] where the kit came without it."""
    for folder in (results_folder(), Path(__file__).resolve().parents[2] / "results"):
        path = folder / "reference" / "search.csv"
        if path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
    return []


@_styled
def training_curves(logs: dict[str, list[dict]], window: int = 5, guidance: bool = True):
    """Every curve of `CURVES` over the steps, and beneath each what is healthy and what is not.

    Args:
        logs: name (an arm, or any other) -> rows of `<adapter>/log.jsonl`. SFT has no rewards.
        window: a line shows the mean of this many steps.
        guidance: whether the lines of `GUIDANCE` are written beneath the curves.
    """
    if not any(logs.values()):
        figure, axes = _new()
        _nothing(axes, "no training log")
        return figure
    figure, grid = _new(9.6, 3, 2) if guidance else _new(4.6, 2, 3)
    for axes, (curve, (title, unit, keys)) in zip(grid.flat, CURVES.items(), strict=True):
        both = ": chosen (line), rejected (dots)" if guidance else ""
        _titles(axes, title + (both if curve == "rewards" else ""), "", unit)
        for (name, rows), spare in zip(logs.items(), CYCLE * len(logs), strict=False):
            words, colour = MODELS.get(name, (_plain(name), spare))
            for key, dash in zip(keys, "-:", strict=False):
                points = [(row["step"], row[key]) for row in rows if _number(row.get(key))]
                label = f"{words}, {len(rows)} steps" if key == "loss" else None
                axes.plot(*_smooth(points, window), dash, color=colour, label=label)
        if not any(line.get_xdata().size for line in axes.lines):
            axes.text(0.5, 0.5, "SFT has none", ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
        elif curve == "accuracy":
            axes.axhline(0.5, color="black", lw=0.8)
        if guidance:
            _guide(axes, curve)
        else:
            axes.set_title(title, fontsize=9)
    told = f"across: optimiser steps; a point is the mean of {window}"
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title=told)
    return figure


@_styled
def probe(probes: dict[str, list[dict]]):
    """How the replies to a few prompts change while a model is trained: signs of degeneration.

    Args:
        probes: name (an arm, or any other) -> rows of `<adapter>/probe.jsonl`; step 0 is the model
            before training.
    """
    if not any(probes.values()):
        figure, axes = _new(1.6)
        _nothing(axes, "training.probe_steps is 0, so nothing was probed")
        return figure
    figure, grid = _new(6.4, 2, 2)
    for axes, (curve, (title, unit)) in zip(grid.flat, PROBES.items(), strict=True):
        _titles(axes, title, "", unit)
        for (name, rows), spare in zip(probes.items(), CYCLE * len(probes), strict=False):
            words, colour = MODELS.get(name, (_plain(name), spare))
            steps: dict[int, list[float]] = {}
            for row in rows:
                value = not row["finished"] if curve == "unfinished" else row[curve]
                steps.setdefault(row["step"], []).append(float(value))
            means = [sum(steps[k]) / len(steps[k]) for k in sorted(steps)]
            prompts = max(map(len, steps.values()), default=0)
            label = f"{words}, {prompts} prompts" if curve == "repetition" else None
            axes.plot(sorted(steps), means, "o-", ms=4, color=colour, alpha=0.8, label=label)
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 0.1))
        _guide(axes, curve)
    told = "across: optimiser steps; 0 is the model before training"
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title=told)
    return figure


def _guide(axes, curve: str) -> None:
    healthy, problem = GUIDANCE[curve]
    told = f"healthy: {healthy}\nproblem: {problem}"
    axes.set_xlabel(told, loc="left", fontsize=8.5, color="#444444", linespacing=1.3)


def _number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _smooth(points: list[tuple[int, float]], window: int) -> tuple[list[int], list[float]]:
    """Steps, and the mean of each value with those just before it."""
    steps, means = [], []
    for k, (step, _) in enumerate(points):
        recent = [value for _, value in points[max(0, k - window + 1) : k + 1]]
        steps.append(step)
        means.append(sum(recent) / len(recent))
    return steps, means


def live_curves(pause: float = 2.0) -> Callable[[list[dict]], None]:
    """A `watch` for `training.train` that redraws the curves in the cell's output as they grow.

    One picture for all trainings that it watches: the one that runs. Outside of a notebook, and in
    batch runs (SAO_BATCH), it does nothing.

    Args:
        pause: seconds from one drawing to the next, at the least; on a slow machine longer, so that
            drawing takes no more than about a fifth of the time.
    """
    if os.environ.get("SAO_BATCH") or not _in_notebook():
        return lambda rows: None
    from IPython.display import display

    handle, due, cost = None, 0.0, math.inf

    def watch(rows: list[dict]) -> None:
        nonlocal handle, due, cost
        began = time.monotonic()
        if len(rows) < 2 or began < due:  # one step is no line yet
            return
        try:
            figure = training_curves({"so far": rows}, guidance=False)
            if handle is None:
                handle = display(figure, display_id=True)
            else:
                handle.update(figure)
        except Exception as error:  # hours of training must not end for a picture
            print(f"The live curves stopped ({error}); training goes on.", flush=True)
            due = math.inf
            return
        now = time.monotonic()
        cost = min(cost, now - began)  # the first drawing loads fonts, too
        due = now + max(pause, 4 * cost)

    return watch


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return hasattr(shell, "kernel")


# ---------------------------------------------------------------------- evaluation


@_styled
def good_rates(scores: dict[str, Interval]):
    """The oracle's good rate of every model, greedy and sampled side by side (`results.scores`)."""
    found: dict[str, dict[str, Interval]] = {}
    for key, interval in scores.items():
        match = re.fullmatch(r"oracle_good_rate(?:_t([\d.]+))?\.(\w+)", key)
        if match and match[2] in MODELS:
            how = f"T = {match[1]}" if match[1] else "greedy"
            found.setdefault(how, {})[match[2]] = interval
    return _grouped(
        found,
        "Answers without a flaw, on held-out questions",
        "share of questions (%), with 95 % interval",
        "no oracle for these questions",
    )


@_styled
def win_rates(scores: dict[str, Interval]):
    """The self-judged win rate against the base of every arm, raw and at equal length."""
    found: dict[str, dict[str, Interval]] = {}
    for key, interval in scores.items():
        match = re.fullmatch(r"self_win_rate(_lc)?(?:\.(\w+))?", key)
        if match and (match[2] or "self") in MODELS:
            how = "at equal length" if match[1] else "raw"
            found.setdefault(how, {})[match[2] or "self"] = interval
    return _grouped(
        found,
        "Does the base model prefer the tuned answer to its own?",
        "win rate (%), with 95 % interval; 50: no preference",
        "no duels",
        line=50,
    )


def _grouped(found, title: str, x: str, why: str, line: float | None = None):
    """Intervals by model: one row a model, in it one point for each way of measuring."""
    models = [name for name in MODELS if any(name in group for group in found.values())]
    figure, axes = _new(0.62 * len(models) + 1.5)
    every = [interval for group in found.values() for interval in group.values()]
    _titles(axes, title, x)
    if not every:
        _nothing(axes, why)
        return figure
    axes.set_title(f"{title} ({_counts(every)})")
    if line is not None:
        axes.axvline(line, color="black", lw=0.8)
    for k, ((how, group), marker) in enumerate(zip(found.items(), "osD^v" * 9, strict=False)):
        shift = 0.32 * (k - (len(found) - 1) / 2)
        for name, interval in group.items():
            looks = dict(marker=marker, mfc=MODELS[name][1] if k == 0 else "white")
            _interval(axes, models.index(name) + shift, interval, MODELS[name][1], **looks)
        axes.plot([], [], marker, color="black", mfc="black" if k == 0 else "white", label=how)
    _rows_down(axes, [MODELS[name][0] for name in models])
    figure.legend(loc="outside lower center", ncols=len(found))
    return figure


@_styled
def differences(scores: dict[str, Interval], keys: dict[str, str]):
    """Differences between models with their intervals (a forest plot).

    Args:
        keys: key of `scores` -> what it is in words; keys that are not there are left out.
    """
    there = {key: label for key, label in keys.items() if key in scores}
    figure, axes = _new(0.5 * len(there) + 1.2)
    title = "Differences; an interval that crosses zero may be none"
    _titles(axes, title, "percentage points, with 95 % interval")
    if not there:
        _nothing(axes, "none of these was measured")
        return figure
    axes.set_title(f"{title} ({_counts(scores[key] for key in there)})")
    axes.axvline(0, color="black", lw=0.8)
    for row, key in enumerate(there):
        clear = scores[key].low > 0 or scores[key].high < 0
        _interval(axes, row, scores[key], BLUE if clear else GREY)
    _rows_down(axes, list(there.values()))
    return figure


@_styled
def length_control(rows: list[dict], groups: int = 8):
    """Won against the difference in length, and the curve that length control reads at 0.

    Args:
        rows: of one call of `contests.contest`.
        groups: so many points at most, of as many prompts each (20 or more), in order of the
            difference.
    """
    figure, axes = _new(3.8)
    x, y = "characters of the tuned answer - of the base's", "won by the tuned model (%)"
    _titles(axes, "How much of the win rate is length?", x, y)
    there = sorted(
        (len(row["responses"][0]) - len(row["responses"][1]), row["win"], row["combination"])
        for row in rows
        if row["win"] is not None
    )
    if not there:
        _nothing(axes, "no valid verdict")
        return figure
    size = math.ceil(len(there) / max(1, min(groups, len(there) // 20)))
    for start in range(0, len(there), size):
        longer, wins, by = zip(*there[start : start + size])
        rate = win_rate(wins, by).rate
        value, low, high = (100 * part for part in (rate.value, rate.low, rate.high))
        at, reach = sum(longer) / len(longer), [[value - low], [high - value]]
        label = f"mean of {size} prompts, with 95 % interval" if not start else None
        axes.errorbar([at], [value], reach, fmt="o", color=BLUE, capsize=3, label=label)
    longer, wins, _ = zip(*there)
    low, high = axes.get_xlim()
    at = [low + (high - low) * k / 100 for k in range(101)]
    fitted = length_curve(wins, longer, [0.0, *at])
    if fitted:
        label = f"fitted curve; at equal length: {100 * fitted[0]:.1f}"
        axes.plot(at, [100 * p for p in fitted[1:]], color=ORANGE, lw=2, label=label)
    raw = 100 * sum(wins) / len(wins)
    axes.axhline(raw, color=GREY, ls="--", label=f"all, raw: {raw:.1f} (n = {len(wins)})")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_ylim(-2, 102)
    axes.legend(loc="lower right", fontsize=9)
    return figure


@_styled
def outcomes(rows: list[dict]):
    """What both orders said of each model's contest with the base (rows of `contests.duel`)."""
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row["model"], Counter())[_outcome(row)] += 1
    figure, axes = _new(0.5 * len(counts) + 1.6)
    title = "Both orders: who wins, and where the place decides"
    _titles(axes, title, "share of prompts (%)")
    if not counts:
        _nothing(axes, "no duels")
        return figure
    left = [0.0] * len(counts)
    for kind, colour, hatch in OUTCOMES:
        widths = [100 * of[kind] / of.total() for of in counts.values()]
        looks = dict(color=colour, hatch=hatch, edgecolor="white", lw=0.5, label=kind)
        axes.barh(range(len(counts)), widths, left=left, **looks)
        for k, width in enumerate(widths):
            if width >= 4:
                axes.text(left[k] + width / 2, k, f"{width:.0f}", ha="center", va="center")
        left = [a + b for a, b in zip(left, widths)]
    names = (f"{MODELS.get(m, (m,))[0]} (n = {of.total()})" for m, of in counts.items())
    _rows_down(axes, list(names))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _outcome(row: dict) -> str:
    if row["outcome"] == "consistent":
        return "wins in both orders" if row["margin"] > 0 else "loses in both orders"
    if row["outcome"] == "inconsistent":
        place = "first" if row["first_wins"][0] else "second"
        return f"the one shown {place} wins"
    return "tie, identical or invalid"
