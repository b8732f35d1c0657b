"""Pictures of a judge: how sure, how right, and what it prefers besides the better answer."""

from __future__ import annotations

import math

import pandas as pd

from sao_utils.report.figures import style
from sao_utils.report.table import select


def _by_agreement(verdicts: list[dict]) -> dict[str, tuple[list[dict], str, str]]:
    """Judged rows by what the oracle says of them: label -> (rows, colour, marker)."""
    groups = {
        "oracle agrees": ([], style.BLUE, "o"),
        "oracle disagrees": ([], style.RED, "X"),
        "no difference, or no oracle": ([], style.LIGHT, "."),
    }
    for row in verdicts:
        if row["margin"] is not None:
            a, b = row["quality"] or (0, 0)
            agrees = "oracle agrees" if (a > b) == (row["margin"] > 0) else "oracle disagrees"
            groups["no difference, or no oracle" if a == b else agrees][0].append(row)
    return {f"{label}, n = {len(g[0])}": g for label, g in groups.items() if g[0]}


@style.styled
def margins(verdicts: list[dict]):
    """How sure the judge is (size of the mean margin, rows of `judge_pairs`), and how right."""
    figure, axes = style.new()
    style.titles(
        axes, "How sure is the judge, and is it right?", "size of the margin (nats)", "pairs"
    )
    groups = _by_agreement(verdicts)
    if not groups:
        return style.nothing(axes, "no pair was judged")
    values = [[abs(row["margin"]) for row in rows] for rows, _, _ in groups.values()]
    colours = [colour for _, colour, _ in groups.values()]
    looks = dict(color=colours, label=list(groups), edgecolor="white", lw=0.5)
    axes.hist(values, 30, stacked=True, **looks)
    axes.legend()
    return figure


@style.styled
def orders(verdicts: list[dict]):
    """Each pair's margin in both orders: where the two agree, and where the position decides."""
    figure, axes = style.new(5)
    x, y = "margin for a, when a is shown first (nats)", "when b is shown first (nats)"
    style.titles(axes, "Does the verdict depend on which answer is shown first?", x, y)
    groups = _by_agreement(verdicts)
    if not groups:
        return style.nothing(axes, "no pair was judged")
    reach = 1e-9
    for label, (rows, colour, marker) in groups.items():
        x, y = ([row[key] for row in rows] for key in ("margin_12", "margin_21"))
        looks = dict(color=colour, marker=marker, alpha=0.6, lw=0, label=label)
        axes.scatter(x, y, s=24, rasterized=len(x) > style.DRAWN, **looks)
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


@style.styled
def judge_matrix(counts: list[list[int]], columns: list[str]):
    """Verdicts against the oracle as a heat map: `results.judge_matrix(verdicts)`."""
    figure, axes = style.new(2.8)
    rows = ["oracle: a better", "oracle: b better", "oracle: a tie"]
    total = sum(map(sum, counts))
    style.titles(axes, f"What the judge says, and what is true (n = {total} pairs)")
    if not total:
        return style.nothing(axes, "no pair with a known quality was judged")
    axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto")
    highest = max(map(max, counts))
    for i, line in enumerate(counts):
        for j, count in enumerate(line):
            colour, share = "white" if count > 0.6 * highest else "black", count / max(1, sum(line))
            place = dict(ha="center", va="center")
            axes.text(j, i, f"{count}\n{share:.0%} of row", color=colour, **place)
    axes.set_xticks(range(len(columns)), [style.plain(column) for column in columns])
    axes.set_yticks(range(len(counts)), rows[: len(counts)])
    axes.grid(False)
    return figure


@style.styled
def calibration(groups: list[tuple]):
    """How right the judge is where it is how sure: `judge_quality.calibration(verdicts)`."""
    figure, axes = style.new()
    title = "Is the judge more often right where it is surer?"
    style.titles(axes, title, "size of the margin (nats)", "verdicts that are right (%)")
    if not groups:
        return style.nothing(axes, "no pair with a known better answer has a margin in nats")
    x, found = zip(*groups)
    axes.set_title(f"{title} (n = {sum(one.n for one in found)} pairs)")
    line = [1.05 * max(*x, 0.1) * k / 100 for k in range(101)]
    expected = [100 / (1 + math.exp(-size)) for size in line]
    axes.plot(
        line, expected, "--", color=style.GREY, label="as sure as it says: 1 / (1 + exp(-size))"
    )
    style.points(
        axes, x, found, color=style.BLUE, label=f"groups by margin, {style.sizes(found)} pairs each"
    )
    lowest = [100 * one.low for one in found if math.isfinite(one.low)]
    axes.set_ylim(min(40, *lowest, 40) - 2, 102)
    axes.legend(loc="lower right")
    return figure


@style.styled
def judge_shares(table: pd.DataFrame):
    """A judge's hits and habits with their intervals, of all that compares it with a known truth.

    Args:
        table: rows of `results.results`; drawn are those of the run's own judge on the training pairs.
    """
    own = select(table, section="judge", judge="self", questions="training pairs", unit="%")
    lines = {}
    for row in own.itertuples(index=False):
        if row.metric.startswith(("accuracy", "flip rate", "first position", "longer answer")):
            hit = row.metric.startswith("accuracy")
            looks = (style.BLUE, "o") if hit else (style.ORANGE, "s")
            lines[f"{row.metric} (n = {row.n})"] = [(row, *looks, True)]
    title = "The judge's hits (blue) and habits (orange)"
    x = "share (%), with 95 % interval"
    return style.interval_chart(lines, title, x, "no pair was judged", at=50)
