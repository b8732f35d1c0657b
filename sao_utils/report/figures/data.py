"""Pictures of the data that a model makes: the funnel, repeated prompts, lengths."""

from __future__ import annotations

import numpy as np

from sao_utils.report.figures import style
from sao_utils.stages.prompts import normalised


@style.styled
def funnel(counts: list[tuple[str, int]]):
    """What became of every prompt, from `methods.sao.funnel(run)`; negative counts are discarded rows."""
    if not counts:
        return style.nothing("no rows")
    title = "From prompts to training pairs: nothing is lost unseen"
    figure, axes = style.new(title, "rows", height=0.32 * len(counts) + 1.2)
    left = 0
    for row, (_, count) in enumerate(counts):
        start, left = (left, left + count) if count < 0 else (0, count)
        axes.barh(row, count, left=start, color=style.RED if count < 0 else style.BLUE)
        place = dict(xytext=(4, 0), textcoords="offset points", va="center")
        axes.annotate(f"{count:,}", (max(start, left), row), **place)
    style.name_rows(axes, [label if count >= 0 else f"- {label}" for label, count in counts])
    axes.margins(x=0.1)
    return figure


@style.styled
def distinct_prompts(prompts: dict[str, list[str]]):
    """How many distinct prompts there are as more are drawn, one line for each name.

    Case and white space are ignored, as in `stages.prompts.repetition_rate`.
    """
    longest = max(map(len, prompts.values()), default=0)
    if not longest:
        return style.nothing("no prompts")
    figure, axes = style.new("Do prompts repeat?", "prompts drawn", "different prompts among them")
    axes.plot([0, longest], [0, longest], "--", color=style.GREY, label="all different")
    for k, (name, texts) in enumerate(prompts.items()):
        seen, height = set(), [0]
        for text in texts:
            seen.add(normalised(text))
            height.append(len(seen))
        label = f"{name}: {len(seen)} of n = {len(texts)}"
        axes.plot(height, color=style.colour(k), label=label)
    axes.legend()
    return figure


@style.styled
def lengths(groups: dict[str, list[int]]):
    """Histograms of lengths in tokens, one for each name, with the mean as a dashed line."""
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        return style.nothing("no answers")
    every = np.concatenate(list(groups.values()))
    step = max(1, int(np.ceil(np.ptp(every) / 30)))
    bins = np.arange(every.min(), every.max() + step + 1, step) - 0.5
    x, y = "tokens", "share of answers (%)"
    return style.histograms(groups, bins, "How long the answers are", x, y)
