"""Pictures of the data that a model makes: the funnel, repeated prompts, lengths."""

from __future__ import annotations

import math

from sao_utils.report.figures import style


@style.styled
def funnel(counts: list[tuple[str, int]]):
    """What became of every prompt: `methods.sao.funnel(run)`; negative counts are what was left out."""
    figure, axes = style.new(0.32 * len(counts) + 1.2)
    style.titles(axes, "From prompts to training pairs: nothing is lost unseen", "rows")
    if not counts:
        return style.nothing(axes, "no rows")
    left = 0
    for row, (_, count) in enumerate(counts):
        start = left if count < 0 else 0
        left = left + count if count < 0 else count
        axes.barh(row, count, left=start, color=style.RED if count < 0 else style.BLUE)
        place = dict(xytext=(4, 0), textcoords="offset points", va="center")
        axes.annotate(f"{count:,}", (max(start, left), row), **place)
    style.name_rows(axes, [label if count >= 0 else f"- {label}" for label, count in counts])
    axes.margins(x=0.1)
    return figure


@style.styled
def distinct_prompts(prompts: dict[str, list[str]]):
    """How many different prompts there are as more are drawn, one line for each name.

    Different up to case and white space, as in `stages.prompts.repetition_rate`.
    """
    figure, axes = style.new()
    style.titles(axes, "Do prompts repeat?", "prompts drawn", "different prompts among them")
    longest = max(map(len, prompts.values()), default=0)
    if not longest:
        return style.nothing(axes, "no prompts")
    axes.plot([0, longest], [0, longest], "--", color=style.GREY, label="all different")
    for name, texts, colour in style.coloured(prompts):
        seen, height = set(), [0]
        for text in texts:
            seen.add(" ".join(text.lower().split()))
            height.append(len(seen))
        axes.plot(
            height, color=colour, label=f"{style.plain(name)}: {len(seen)} of n = {len(texts)}"
        )
    axes.legend()
    return figure


@style.styled
def near_duplicates(rates: dict[str, dict[float, float]], n: int):
    """Share of prompts that repeat an earlier one, by how alike two must be; one line a name.

    Args:
        rates: name -> {similarity: `stages.prompts.near_duplicate_rate` at it}, of n prompts each.
    """
    figure, axes = style.new()
    x, y = "similarity that counts as a repetition", "prompts that repeat another (%)"
    style.titles(axes, f"Do prompts nearly repeat? (n = {n} each)", x, y)
    if not n:
        return style.nothing(axes, "no prompts")
    for name, found, colour in style.coloured(rates):
        shares = [100 * share for share in found.values()]
        axes.plot(list(found), shares, "o-", color=colour, label=style.plain(name))
    axes.legend()
    return figure


@style.styled
def lengths(groups: dict[str, list[int]]):
    """Histograms of lengths in tokens, one for each name, with the mean as a dashed line."""
    figure, axes = style.new()
    style.titles(axes, "How long the answers are (dashed: mean)", "tokens", "share of answers (%)")
    every = [value for values in groups.values() for value in values]
    if not every:
        return style.nothing(axes, "no answers")
    low, high = min(every), max(every)
    step = max(1, math.ceil((high - low) / 30))
    bins = [low - 0.5 + step * k for k in range((high - low) // step + 2)]
    for name, values, colour in style.coloured(groups):
        if values:
            mean, share = sum(values) / len(values), [100 / len(values)] * len(values)
            label = f"{style.plain(name)}: mean {mean:.1f}, n = {len(values)}"
            axes.hist(values, bins, weights=share, histtype="step", lw=2, color=colour, label=label)
            axes.axvline(mean, ls="--", lw=1, color=colour)
    axes.legend()
    return figure
