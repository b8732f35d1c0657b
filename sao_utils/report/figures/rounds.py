"""Pictures of iterations, and of how alike the prompts of several sources are."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.table import select
from sao_utils.report.words import decoding, model_in_words, sizes


@style.styled
def rounds(table: pd.DataFrame):
    """Good answers by round, for each set of topics, and how often the judge prefers the new model.

    Models without rounds (SFT on the seeds) are dashed lines. Where the right picture rises and the left
    one falls, something other than better answers pleases the judge.

    Args:
        table: rows of `results.results` for a run of rounds.
    """
    rows = select(table, section="rounds", against=None, metric="good answers")
    if rows.empty:
        return style.nothing("no oracle for these questions")
    rows = select(rows, temperature=rows["temperature"].iloc[0])
    figure, (left, right) = style.grid(4.0, columns=2, width_ratios=(3, 2))
    for k, topic in enumerate(rows["questions"].unique()):
        of = select(rows, questions=topic)
        iterated = of[(of["round"] > 0) | (of["model"] == "base")].sort_values("round")
        value, reach = style.percent(list(iterated.itertuples(index=False)))
        looks = dict(fmt="osD^"[k % 4] + "-", color=style.colour(k), capsize=3, label=topic)
        left.errorbar(iterated["round"], value, reach, **looks)
        for other in of[(of["round"] == 0) & (of["model"] != "base")].itertuples(index=False):
            label = f"{model_in_words(other.model)}, {topic}"
            left.axhline(100 * other.value, ls="--", lw=1, color=style.colour(k), label=label)
    title = f"Answers without a flaw, {decoding(rows['temperature'].iloc[0])}"
    sized = f"share (%), 95 % interval (n = {sizes(rows.itertuples())})"
    left.set(title=title, xlabel="round (0: the base model)", ylabel=sized)
    wins = select(table, section="rounds", metric="win rate")
    wins = wins[wins["round"] > 0].sort_values("round")
    value, reach = style.percent(list(wins.itertuples(index=False)))
    right.errorbar(wins["round"], value, reach, fmt="o-", color=style.BLUE, capsize=3)
    right.axhline(50, color="black", lw=0.8)
    sized = f"win rate (%), 95 % interval (n = {sizes(wins.itertuples())})"
    right.set(title="The judge prefers it to the base", xlabel="round", ylabel=sized)
    for axes in (left, right):
        axes.set_xticks(range(int(rows["round"].max()) + 1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


@style.styled
def similarity(groups: dict[str, list[float]], vectors: str):
    """Histograms of `stages.diversity.mean_similarity`, one for each source of prompts.

    Args:
        vectors: the vectors that were compared, in words (`stages.diversity.vectors_in_words`).
    """
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        return style.nothing("no prompts")
    least = min(0.0, *map(min, groups.values()))  # embeddings may point away from each other
    bins = np.linspace(least, max(map(max, groups.values())), 40)
    title = "How alike are the prompts? Further left: more varied"
    x, y = f"mean cosine similarity to the others ({vectors})", "share of prompts (%)"
    return style.histograms(groups, bins, title, x, y, decimals=3)
