"""Pictures of a judge: how sure, how right, and what it prefers besides the better answer."""

from __future__ import annotations

import math

import pandas as pd

from sao_utils.report.figures.style import (
    BLUE,
    DRAWN,
    GREY,
    LIGHT,
    ORANGE,
    RED,
    interval_chart,
    new,
    nothing,
    plain,
    points,
    sizes,
    styled,
    titles,
)
from sao_utils.report.table import value_of

#: metric of the section "judge" -> what it is in the picture, and whether more of it is better
SHOWN = {
    "accuracy": ("right, both orders together", True),
    "accuracy, one order": ("right, one order alone", True),
    "accuracy, better answer first": ("right, better answer first", True),
    "accuracy, better answer second": ("right, better answer second", True),
    "accuracy, better answer longer": ("right, better answer longer", True),
    "accuracy, about equally long": ("right, about equally long", True),
    "accuracy, better answer shorter": ("right, better answer shorter", True),
    "flip rate": ("the orders disagree", False),
    "flip rate, one answer better": ("... where one answer is better", False),
    "first position": ("the first answer wins", False),
    "longer answer preferred, one answer better": ("the longer answer wins", False),
    "longer answer better": ("the longer answer is better", False),
}


def _by_agreement(verdicts: list[dict]) -> dict[str, tuple[list[dict], str, str]]:
    """Judged rows by what the oracle says of them: label -> (rows, colour, marker)."""
    groups = {
        "oracle agrees": ([], BLUE, "o"),
        "oracle disagrees": ([], RED, "X"),
        "no difference, or no oracle": ([], LIGHT, "."),
    }
    for row in verdicts:
        if row["margin"] is not None:
            a, b = row["quality"] or (0, 0)
            agrees = "oracle agrees" if (a > b) == (row["margin"] > 0) else "oracle disagrees"
            groups["no difference, or no oracle" if a == b else agrees][0].append(row)
    return {f"{label}, n = {len(g[0])}": g for label, g in groups.items() if g[0]}


@styled
def margins(verdicts: list[dict]):
    """How sure the judge is (size of the mean margin, rows of `judge_pairs`), and how right."""
    figure, axes = new()
    titles(axes, "How sure is the judge, and is it right?", "size of the margin (nats)", "pairs")
    groups = _by_agreement(verdicts)
    if not groups:
        nothing(axes, "no pair was judged")
        return figure
    values = [[abs(row["margin"]) for row in rows] for rows, _, _ in groups.values()]
    colours = [colour for _, colour, _ in groups.values()]
    looks = dict(color=colours, label=list(groups), edgecolor="white", lw=0.5)
    axes.hist(values, 30, stacked=True, **looks)
    axes.legend()
    return figure


@styled
def orders(verdicts: list[dict]):
    """Each pair's margin in both orders: where the two agree, and where the position decides."""
    figure, axes = new(5)
    x, y = "margin for a, when a is shown first (nats)", "when b is shown first (nats)"
    titles(axes, "Does the verdict depend on which answer is shown first?", x, y)
    groups = _by_agreement(verdicts)
    if not groups:
        nothing(axes, "no pair was judged")
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


@styled
def judge_matrix(counts: list[list[int]], columns: list[str]):
    """Verdicts against the oracle as a heat map: `results.judge_matrix(verdicts)`."""
    figure, axes = new(2.8)
    rows = ["oracle: a better", "oracle: b better", "oracle: a tie"]
    total = sum(map(sum, counts))
    titles(axes, f"What the judge says, and what is true (n = {total} pairs)")
    if not total:
        nothing(axes, "no pair with a known quality was judged")
        return figure
    axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto")
    highest = max(map(max, counts))
    for i, line in enumerate(counts):
        for j, count in enumerate(line):
            colour, share = "white" if count > 0.6 * highest else "black", count / max(1, sum(line))
            place = dict(ha="center", va="center")
            axes.text(j, i, f"{count}\n{share:.0%} of row", color=colour, **place)
    axes.set_xticks(range(len(columns)), [plain(column) for column in columns])
    axes.set_yticks(range(len(counts)), rows[: len(counts)])
    axes.grid(False)
    return figure


@styled
def calibration(groups: list[tuple]):
    """How right the judge is where it is how sure: `judge_quality.calibration(verdicts)`."""
    figure, axes = new()
    title = "Is the judge more often right where it is surer?"
    titles(axes, title, "size of the margin (nats)", "verdicts that are right (%)")
    if not groups:
        nothing(axes, "no pair with a known better answer has a margin in nats")
        return figure
    x, found = zip(*groups)
    axes.set_title(f"{title} (n = {sum(one.n for one in found)} pairs)")
    line = [1.05 * max(*x, 0.1) * k / 100 for k in range(101)]
    expected = [100 / (1 + math.exp(-size)) for size in line]
    axes.plot(line, expected, "--", color=GREY, label="as sure as it says: 1 / (1 + exp(-size))")
    points(axes, x, found, color=BLUE, label=f"groups by margin, {sizes(found)} pairs each")
    lowest = [100 * one.low for one in found if math.isfinite(one.low)]
    axes.set_ylim(min(40, *lowest, 40) - 2, 102)
    axes.legend(loc="lower right")
    return figure


@styled
def judge_shares(table: pd.DataFrame):
    """A judge's hits and habits (`SHOWN`) with their intervals.

    Args:
        table: rows of `results.results`, of one judge and one set of pairs in the section "judge";
            what is not among them is left out.
    """
    rows = {
        words: value_of(table, section="judge", metric=metric) for metric, words in SHOWN.items()
    }
    lines = {
        f"{words} (n = {row.n})": [(row, BLUE if hit else ORANGE, "o" if hit else "s", True)]
        for (words, hit), row in rows.items()
        if row is not None
    }
    title = "The judge's hits (blue) and habits (orange)"
    x = "share (%), with 95 % interval"
    figure = interval_chart(lines, title, x, "no pair was judged", at=50)
    if lines:
        figure.axes[0].set_xlim(-3, 103)
    return figure
