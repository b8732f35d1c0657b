"""Pictures of a training: losses, curves with what is healthy beneath them, and curves as they grow."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.words import MODELS, decoding
from sao_utils.store import results_folder

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


@style.styled
def simpo_loss(beta: float, gamma: float):
    """SimPO's loss of one pair against the margin between its two rewards."""
    figure, axes = style.new()
    x = [gamma + k / 20 for k in range(-160, 161)]
    title = "SimPO asks for a lead, not just for the right order"
    style.titles(axes, title, "reward of chosen - reward of rejected", "loss (nats)")
    axes.plot(x, [math.log1p(math.exp(gamma - d)) for d in x], color=style.BLUE, lw=2)
    axes.axvline(0, color=style.GREY, ls=":", label="equal rewards")
    axes.axvline(
        gamma, color=style.RED, ls="--", label=f"gamma = {gamma:g}: the lead that is asked for"
    )
    axes.set_ylim(bottom=0)
    scale = axes.secondary_xaxis("top", functions=(lambda d: d / beta, lambda d: d * beta))
    scale.set_xlabel(f"difference in mean log-probability a token (beta = {beta:g})", fontsize=9)
    axes.legend()
    return figure


@style.styled
def sums_and_means(pairs: list[dict], beta: float, gamma: float):
    """What dividing by the length changes, on real pairs: their difference by length difference.

    Args:
        pairs: rows {logp_chosen, len_chosen, logp_rejected, len_rejected} of `training.logps.pair_logps`;
            logp summed over the answer, nats.
    """
    figure, (left, right) = style.new(3.8, 1, 2, sharex=True)
    x = [row["len_chosen"] - row["len_rejected"] for row in pairs]
    if not x:
        style.nothing(left, "no pairs")
        right.set_axis_off()
        return figure
    sums = [row["logp_chosen"] - row["logp_rejected"] for row in pairs]
    means = [
        row["logp_chosen"] / row["len_chosen"] - row["logp_rejected"] / row["len_rejected"]
        for row in pairs
    ]
    across = "tokens of chosen - of rejected"
    for axes, values, title in (
        (left, sums, "summed log-probability"),
        (right, means, "mean log-probability a token"),
    ):
        style.titles(axes, f"{title}\n{_slope(x, values)}", across, "chosen - rejected (nats)")
        ahead = f"chosen ahead: {sum(v > 0 for v in values) / len(x):.0%} of n = {len(x)}"
        looks = dict(color=style.BLUE, alpha=0.4, lw=0, label=ahead)
        axes.scatter(x, values, s=14, rasterized=len(x) > style.DRAWN, **looks)
        axes.axhline(0, color="black", lw=0.8)
    beyond = sum(v > gamma / beta for v in means) / len(x)
    label = f"gamma / beta = {gamma / beta:g}; beyond: {beyond:.0%}"
    right.axhline(gamma / beta, color=style.RED, ls="--", label=label)
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


@style.styled
def learning_rates(table: pd.DataFrame):
    """Good rate of the arm self against its learning rate (`search_table`), with 95 % intervals."""
    figure, axes = style.new(3.2)
    title, x = "How the tiny recipe's learning rate was chosen", "learning rate of the adapter"
    style.titles(axes, title, x, "good answers (%)")
    if table.empty:
        return style.nothing(axes, "the table of the search is not in this checkout")
    # Only the rows that change nothing but the rate.
    rates = table["setting"].str.extract(r"^training\.learning_rate=([\d.e-]+)$")[0].astype(float)
    table = table.assign(rate=rates, value=table["good rate"]).sort_values("rate")
    base = table[table["arm"] == "base"]
    tuned = table[table["rate"].notna() & (table["arm"] == "self")]
    looks = zip(tuned.groupby("temperature"), (style.BLUE, style.ORANGE), ("o-", "s--"))
    for (temperature, of), colour, line in looks:
        how = decoding(temperature)
        style.points(axes, of["rate"], list(of.itertuples()), line, color=colour, label=how)
        for value in base[base["temperature"] == temperature]["value"]:
            axes.axhline(100 * value, color=colour, ls=":", label=f"base model, {how}")
    axes.set_title(f"{title} (n = {tuned['n'].min()} questions a point)")
    axes.set_xscale("log")
    axes.set_xticks(tuned["rate"], [f"{rate:g}" for rate in tuned["rate"]])
    axes.minorticks_off()
    axes.legend(ncols=2, fontsize=8)
    return figure


def search_table() -> pd.DataFrame:
    """The rows of results/reference/search.csv; empty where the kit came without it."""
    for folder in (results_folder(), Path(__file__).resolve().parents[3] / "results"):
        if (folder / "reference" / "search.csv").is_file():
            return pd.read_csv(folder / "reference" / "search.csv", keep_default_na=False)
    return pd.DataFrame()


@style.styled
def training_curves(logs: dict[str, list[dict]], window: int = 5, guidance: bool = True):
    """Every curve of `CURVES` over the steps, and beneath each what is healthy and what is not.

    Args:
        logs: name (an arm, or any other) -> rows of `<adapter>/log.jsonl`. SFT has no rewards.
        window: a line shows the mean of this many steps.
        guidance: whether the lines of `GUIDANCE` are written beneath the curves.
    """
    if not any(logs.values()):
        figure, axes = style.new()
        return style.nothing(axes, "no training log")
    figure, grid = style.new(9.6, 3, 2) if guidance else style.new(4.6, 2, 3)
    for axes, (curve, (title, unit, keys)) in zip(grid.flat, CURVES.items(), strict=True):
        both = ": chosen (line), rejected (dots)" if guidance else ""
        style.titles(axes, title + (both if curve == "rewards" else ""), "", unit)
        for name, rows, colour in style.coloured(logs, style.COLOURS):
            words = MODELS.get(name, style.plain(name))
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
    legend = f"across: optimiser steps; a point is the mean of {window}"
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title=legend)
    return figure


@style.styled
def probe(probes: dict[str, list[dict]]):
    """How the replies to a few prompts change while a model is trained: signs of degeneration.

    Args:
        probes: name (an arm, or any other) -> rows of `<adapter>/probe.jsonl`; step 0 is the model
            before training.
    """
    if not any(probes.values()):
        figure, axes = style.new(1.6)
        return style.nothing(axes, "training.probe_steps is 0, so nothing was probed")
    figure, grid = style.new(6.4, 2, 2)
    for axes, (curve, (title, unit)) in zip(grid.flat, PROBES.items(), strict=True):
        style.titles(axes, title, "", unit)
        for name, rows, colour in style.coloured(probes, style.COLOURS):
            words = MODELS.get(name, style.plain(name))
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
    legend = "across: optimiser steps; 0 is the model before training"
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title=legend)
    return figure


def _guide(axes, curve: str) -> None:
    healthy, problem = GUIDANCE[curve]
    text = f"healthy: {healthy}\nproblem: {problem}"
    axes.set_xlabel(text, loc="left", fontsize=8.5, color="#444444", linespacing=1.3)


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
    """A `watch` for `methods.sao.train` that redraws the curves in the cell's output as they grow.

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
