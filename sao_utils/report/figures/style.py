"""The project's style of pictures, and the parts that several of them are made of."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import wraps

from sao_utils.disk import write_whole
from sao_utils.store import Run

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
LIGHT = "#BBBBBB"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
#: colour of a model, in the order in which models are drawn
COLOURS = {"base": GREY, "self": BLUE, "sft_random": ORANGE, "random": RED, "oracle": GREEN}
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


def styled(draw: Callable) -> Callable:
    """Draw in the project's style, whatever the user's own settings are, and leave those alone."""

    @wraps(draw)
    def in_style(*args, **options):
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **options)

    return in_style


@styled
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


def new(height: float = 3.6, rows: int = 1, columns: int = 1, **options):
    """A figure of 8 inches (800 pixels) and its axes, taken from pyplot's list: shown only once."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(8, height), **options)
    pyplot.close(figure)
    return figure, axes


def plain(text: object, limit: int = 60) -> str:
    """A text as one line that any XML file may hold: no control characters, not too long."""
    line = " ".join(re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]", " ", str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def titles(axes, title: str, x: str = "", y: str = "") -> None:
    """Title and labels of a chart."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def nothing(axes, why: str):
    """Say in an empty chart why it is empty. Returns its figure."""
    axes.text(0.5, 0.5, f"Nothing to show: {why}.", ha="center", transform=axes.transAxes)
    axes.set_axis_off()
    return axes.figure


def name_rows(axes, labels: Sequence[str]) -> None:
    """Name the rows of a chart that is read from top to bottom."""
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def coloured(groups: dict, colours: dict | None = None) -> list[tuple]:
    """(name, its value, a colour) of each group: the model's own colour, or the next of the cycle."""
    spare = CYCLE * (1 + len(groups) // len(CYCLE))
    return [
        (name, value, (colours or {}).get(name, colour))
        for (name, value), colour in zip(groups.items(), spare)
    ]


def sizes(rows: Sequence) -> str:
    """`n = 880`, or `n = 860 to 880`, of several estimates."""
    found = sorted({row.n for row in rows})
    return f"n = {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "")


def percent(found) -> tuple[float, list[list[float]]]:
    """A share's value and the reach of its interval to both sides, in percent, as errorbar has it."""
    value, low, high = (100 * part for part in (found.value, found.low, found.high))
    return value, [[max(0.0, value - low)], [max(0.0, high - value)]]


def is_drawn(found) -> bool:
    """Whether an estimate has a value and an interval to draw."""
    return all(map(math.isfinite, (found.value, found.low, found.high)))


def points(axes, x: Sequence[float], found: Sequence, marker: str = "o", **looks) -> None:
    """Shares with their intervals in percent, standing over x."""
    drawn = [(at, *percent(one)) for at, one in zip(x, found) if is_drawn(one)]
    if drawn:
        where, values, reach = zip(*drawn)
        sides = [[side[k][0] for side in reach] for k in (0, 1)]
        axes.errorbar(where, values, sides, fmt=marker, capsize=3, **looks)


def interval_chart(
    lines: dict[str, list[tuple]],
    title: str,
    x: str,
    why: str,
    at: float | None = None,
    legend: Sequence[tuple[str, bool, str]] = (),
):
    """Shares with their intervals in percent, lying: a row for each label, in it one or more dots.

    Args:
        lines: label -> [(estimate, colour, marker, whether it is filled)].
        why: what the picture says if there is nothing to draw.
        at: where a line stands for "no difference".
        legend: (marker, whether it is filled, label) of each kind of dot.
    """
    several = max(map(len, lines.values()), default=1)
    figure, axes = new((0.3 + 0.16 * several) * len(lines) + 1.2 + 0.3 * bool(legend))
    titles(axes, title, x)
    every = [dot[0] for dots in lines.values() for dot in dots]
    if not every:
        return nothing(axes, why)
    axes.set_title(f"{title} ({sizes(every)})")
    if at is not None:
        axes.axvline(at, color="black", lw=0.8)
    for row, dots in enumerate(lines.values()):
        for k, (found, colour, marker, filled) in enumerate(dots):
            if not is_drawn(found):
                continue
            y = row + (0.32 * (k - (len(dots) - 1) / 2))
            value, reach = percent(found)
            looks = dict(color=colour, mfc=colour if filled else "white", capsize=3)
            axes.errorbar([value], [y], xerr=reach, fmt=marker, **looks)
            place = dict(xytext=(0, 5), textcoords="offset points", ha="center")
            axes.annotate(f"{value:.1f}", (value, y), fontsize=8, **place)
    for marker, filled, label in legend:
        axes.plot([], [], marker, color="black", mfc="black" if filled else "white", label=label)
    name_rows(axes, list(lines))
    if legend:
        figure.legend(loc="outside lower center", ncols=len(legend))
    return figure
