"""The project's style for pictures, and the parts that several of them share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np

from sao_utils.disk import write_whole
from sao_utils.report.words import sizes
from sao_utils.store import Run

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, LIGHT = "#CC79A7", "#56B4E9", "#777777", "#BBBBBB"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
#: colours of the models whose curves share a chart
COLOURS = {"base": GREY, "self": BLUE, "sft_random": ORANGE, "random": RED, "oracle": GREEN}
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
    "svg.hashsalt": "sao",  # fixes the ids inside the SVG, which are new each time by default
}


def styled(draw: Callable) -> Callable:
    """Draw in the project's style, whatever the user's own settings are, and leave these unchanged."""

    @wraps(draw)
    def in_style(*args, **options):
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **options)

    return in_style


@styled
def as_svg(figure) -> str:
    """A figure as the text of an SVG; the same figure always gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def save(run: Run, name: str, figure):
    """Write a figure to the run's `figures/<name>.svg`: the same bytes for the same data.

    Returns:
        The figure, so that a notebook shows it.
    """
    write_whole(run.folder / "figures" / f"{name}.svg", as_svg(figure))
    return figure


def grid(height: float, rows: int = 1, columns: int = 1, **options):
    """A figure 8 inches (800 pixels) wide and its axes, off pyplot's list so that it is shown only once."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(8, height), **options)
    pyplot.close(figure)
    return figure, axes


def new(title: str, x: str = "", y: str = "", height: float = 3.6):
    """A figure with one chart, and its axes."""
    figure, axes = grid(height)
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def nothing(why: str):
    """A figure that says why it is empty."""
    figure, axes = grid(1.6)
    axes.text(0.5, 0.5, f"Nothing to show: {why}.", ha="center", transform=axes.transAxes)
    axes.set_axis_off()
    return figure


def colour(k: int, name: str = "") -> str:
    """The colour of the k-th of several groups: the model's own, or else the next in the cycle."""
    return COLOURS.get(name, CYCLE[k % len(CYCLE)])


def name_rows(axes, labels: Sequence[str]) -> None:
    """Name the rows of a chart that is read from top to bottom."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def percent(found: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] of estimates, and how far their intervals reach [2, n], as errorbar takes it; in percent."""
    ends = [[one.value, one.low, one.high] for one in found]
    value, low, high = 100 * np.array(ends, dtype=float).T
    return value, np.maximum(0, [value - low, high - value])


def intervals(
    series: dict[str, dict],
    title: str,
    x: str,
    why: str,
    at: float | None = None,
    reported: dict[str, float] | None = None,
    measure: str = "",
):
    """Shares with their 95 % intervals: a row for each label, with a dot for each way of measuring.

    Args:
        series: way of measuring -> {label: estimate, with value, low, high and n}.
        why: what the picture says if there is nothing to draw.
        at: the percentage at which to draw the line of "no difference".
        reported: label -> what a paper reports, in percent; drawn as open dots on separate axes below.
        measure: what the paper's numbers measure, for the label of those axes.
    """
    labels = list(dict.fromkeys(label for found in series.values() for label in found))
    if not labels:
        return nothing(why)
    every = [one for found in series.values() for one in found.values()]
    height = (0.3 + 0.16 * len(series)) * len(labels) + 1.5
    heights = [height, 0.3 * len(reported) + 1] if reported else [height]
    parts = dict(rows=len(heights), height_ratios=heights, squeeze=False)
    figure, ((axes,), *below) = grid(sum(heights), **parts)
    axes.set(title=title, xlabel=f"{x}, with 95 % interval (n = {sizes(every)})")
    for (theirs,) in below:
        theirs.plot(reported.values(), range(len(reported)), "o", mfc="none", color=GREY)
        for row, value in enumerate(reported.values()):
            place = dict(xytext=(0, 6), textcoords="offset points", ha="center")
            theirs.annotate(f"{value:g}", (value, row), fontsize=8, **place)
        name_rows(theirs, list(reported))
        theirs.set(title="What the paper reports, of another model", xlim=(0, 100))
        theirs.set_xlabel(measure or "as it is reported (%)")
    if at is not None:
        axes.axvline(at, color="black", lw=0.8)
    for k, (way, found) in enumerate(series.items()):
        offset = 0.32 * (k - (len(series) - 1) / 2)
        rows = [labels.index(label) + offset for label in found]
        value, reach = percent(found.values())
        looks = dict(fmt="osD^"[k % 4], color=colour(k), capsize=3, label=way)
        axes.errorbar(value, rows, xerr=reach, **looks)
        for one, row in zip(value[np.isfinite(value)], np.array(rows)[np.isfinite(value)]):
            place = dict(xytext=(0, 5), textcoords="offset points", ha="center")
            axes.annotate(f"{one:.1f}", (one, row), fontsize=8, **place)
    name_rows(axes, labels)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series))
    return figure


def histograms(
    groups: dict[str, Sequence[float]], bins, title: str, x: str, y: str, decimals: int = 1
):
    """Outlined histograms in percent, one for each name, with its mean as a dashed line."""
    figure, axes = new(f"{title} (dashed: mean)", x, y)
    for k, (name, values) in enumerate(groups.items()):
        mean, share = np.mean(values), [100 / len(values)] * len(values)
        label = f"{name}: mean {mean:.{decimals}f}, n = {len(values)}"
        axes.hist(values, bins, weights=share, histtype="step", lw=2, color=colour(k), label=label)
        axes.axvline(mean, ls="--", lw=1, color=colour(k))
    axes.legend()
    return figure
