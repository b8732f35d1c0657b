"""Pictures of a training: losses, curves with a note on what is healthy, and curves that update live."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.words import model_in_words

#: key of a log row -> the title of its curve, and the unit
CURVES = {
    "loss": ("loss", "nats"),
    "rewards_chosen": ("rewards: chosen (line), rejected (dots)", "reward"),
    "margin": ("margin between the rewards", "chosen - rejected"),
    "accuracy": ("pairs in the right order", "share"),
    "grad_norm": ("gradient norm before clipping", "norm"),
    "chosen_tokens": ("length: chosen (line), rejected (dots)", "tokens"),
}
DOTS = {"rewards_chosen": "rewards_rejected", "chosen_tokens": "rejected_tokens"}
#: key of a probe -> the same two
PROBES = {
    "repetition": ("sentences said before", "share of sentences"),
    "tokens": ("length of the replies", "tokens, mean"),
    "empty": ("empty replies", "share of replies"),
    "unfinished": ("replies cut off at the limit", "share of replies"),
}
#: key -> (what is healthy, what is a problem), each on one line beneath the curve
GUIDANCE = {
    "loss": ("noisy, and lower at the end.", "rises for long, or falls to 0 at once."),
    "rewards_chosen": (
        "line and dots part; both may fall.",
        "both fall steeply: read the replies.",
    ),
    "margin": ("rises, slower towards the end.", "flat, or beyond gamma at once."),
    "accuracy": (
        "above one half; it need not reach 1.",
        "stays at a half: the labels say nothing.",
    ),
    "grad_norm": ("of one size, or changing slowly.", "single steps ten times as high, or 0."),
    "chosen_tokens": ("line and dots about equal.", "always apart: length is what is learned."),
    "repetition": ("as before training.", "climbs: stop earlier, or lower the rate."),
    "tokens": ("within a quarter of step 0.", "doubles or halves: read the replies."),
    "empty": ("none.", "any."),
    "unfinished": ("as before training, or fewer.", "climbs: the end token gets lost."),
}
WINDOW = 5  # optimiser steps; each point of a curve is the mean over them
PAUSE = 4.0  # least number of seconds between two drawings of live curves


@style.styled
def simpo_loss(beta: float, gamma: float):
    """SimPO's loss of one pair against the margin between its two rewards."""
    title = f"SimPO asks for a lead, not just for the right order (beta = {beta:g})"
    figure, axes = style.new(title, "reward of chosen - reward of rejected", "loss (nats)")
    x = np.linspace(gamma - 8, gamma + 8, 321)
    axes.plot(x, np.logaddexp(0, gamma - x), color=style.BLUE, lw=2)
    axes.axvline(0, color=style.GREY, ls=":", label="equal rewards")
    label = f"gamma = {gamma:g}: the lead that is asked for"
    axes.axvline(gamma, color=style.RED, ls="--", label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@style.styled
def sums_and_means(pairs: list[dict], beta: float, gamma: float):
    """What dividing by length changes on real pairs: log-probability difference against length difference.

    Args:
        pairs: rows {logp_chosen, len_chosen, logp_rejected, len_rejected} of `training.logps.pair_logps`;
            each logp is summed over the answer, in nats.
    """
    if not pairs:
        return style.nothing("no pairs")
    figure, (left, right) = style.grid(3.8, 1, 2, sharex=True)
    rows = pd.DataFrame(pairs)
    longer = rows["len_chosen"] - rows["len_rejected"]
    sums = rows["logp_chosen"] - rows["logp_rejected"]
    means = rows["logp_chosen"] / rows["len_chosen"] - rows["logp_rejected"] / rows["len_rejected"]
    for axes, values, title in (
        (left, sums, "summed log-probability"),
        (right, means, "mean log-probability a token"),
    ):
        x, y = "tokens of chosen - of rejected", "chosen - rejected (nats)"
        axes.set(title=title, xlabel=x, ylabel=y)
        label = f"chosen ahead: {(values > 0).mean():.0%} of n = {len(values)}"
        looks = dict(color=style.BLUE, alpha=0.4, lw=0, rasterized=True)
        axes.scatter(longer, values, s=14, label=label, **looks)
        axes.axhline(0, color="black", lw=0.8)
        axes.margins(y=0.2)  # room for the legend
    label = f"gamma / beta = {gamma / beta:g}; beyond: {(means > gamma / beta).mean():.0%}"
    right.axhline(gamma / beta, color=style.RED, ls="--", label=label)
    for axes in (left, right):
        axes.legend(loc="upper right", fontsize=8)
    return figure


@style.styled
def training_curves(logs: dict[str, list[dict]]):
    """Every curve of `CURVES` over the steps, and beneath each what is healthy and what is a problem.

    Args:
        logs: name (an arm, or any other) -> rows of `<adapter>/log.jsonl`. SFT has no rewards.
    """
    columns, frames = ["step", *CURVES, *DOTS.values()], {}
    for name, rows in logs.items():
        values = pd.DataFrame(rows, columns=columns, dtype=float).set_index("step")
        means = values.replace([np.inf, -np.inf], np.nan).rolling(WINDOW, min_periods=1).mean()
        frames[name] = f"{model_in_words(name)}, {len(rows)} steps", means
    note = f"across: optimiser steps; a point is the mean of {WINDOW}"
    return _panels(CURVES, frames, note, "no training log")


@style.styled
def probe(probes: dict[str, list[dict]]):
    """How the replies to a few prompts change during training: signs of degeneration.

    Args:
        probes: name (an arm, or any other) -> rows of `<adapter>/probe.jsonl`; step 0 is the model
            before training.
    """
    frames = {}
    for name, rows in probes.items():
        columns = ["step", "repetition", "tokens", "empty", "finished"]
        steps = pd.DataFrame(rows, columns=columns, dtype=float).groupby("step")
        means = steps.mean().eval("unfinished = 1 - finished")
        prompts = steps.size().max() if rows else 0
        frames[name] = f"{model_in_words(name)}, {prompts} prompts", means
    note = "across: optimiser steps; 0 is the model before training"
    return _panels(PROBES, frames, note, "training.probe_steps is 0, so nothing was probed")


def _panels(panels: dict, frames: dict[str, tuple[str, pd.DataFrame]], note: str, why: str):
    """A chart for each key of `panels`, in two columns.

    Args:
        frames: name -> its label, and values by step.
        note: the legend's title.
        why: what the picture says if there are no values.
    """
    if all(frame.empty for _, frame in frames.values()):
        return style.nothing(why)
    height = len(panels) // 2
    figure, charts = style.grid(3.2 * height, height, 2)
    for axes, (key, (title, unit)) in zip(charts.flat, panels.items()):
        axes.set(title=title, ylabel=unit)
        guide = "healthy: {}\nproblem: {}".format(*GUIDANCE[key])
        axes.set_xlabel(guide, loc="left", fontsize=8.5, color="#444444")
        for k, (name, (label, frame)) in enumerate(frames.items()):
            axes.plot(frame[key], color=style.colour(k, name), label=label)
            if key in DOTS:
                axes.plot(frame[DOTS[key]], ":", color=style.colour(k, name))
        if all(frame[key].isna().all() for _, frame in frames.values()):
            axes.text(0.5, 0.5, "SFT has none", ha="center", transform=axes.transAxes)
    handles = charts.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9, title=note)
    return figure


def live_curves() -> Callable[[list[dict]], None]:
    """A `watch` for `methods.sao.train` that redraws the curves in the cell's output as they grow.

    All trainings that it watches share one picture, which shows the one that is running. Outside a
    notebook, and in batch runs (SAO_BATCH), it does nothing.
    """
    from IPython import get_ipython
    from IPython.display import display

    if os.environ.get("SAO_BATCH") or not hasattr(get_ipython(), "kernel"):
        return lambda rows: None
    handle, due = None, 0.0

    def watch(rows: list[dict]) -> None:
        nonlocal handle, due
        if len(rows) < 2 or time.monotonic() < due:  # one step does not make a line
            return
        figure = training_curves({"so far": rows})
        if handle is None:
            handle = display(figure, display_id=True)
        else:
            handle.update(figure)
        due = time.monotonic() + PAUSE

    return watch
