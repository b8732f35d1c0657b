"""A plan as text."""

from __future__ import annotations

from sao_utils.plan.planning import Plan, Stage
from sao_utils.plan.workload import bill


def render(made: Plan, actual: dict | None = None) -> str:
    """A plan as text, with what a run's manifest says beside it, if one is given.

    Args:
        actual: the stages of a run (`planning.actual`): name -> {seconds, made or pairs, tokens}.
    """
    table = [["", "rows", "tokens", "time", "memory", "US$ about"]]
    by_name: dict[str, list[Stage]] = {}
    for stage in made.stages:
        by_name.setdefault(stage.work.stage, []).append(stage)
    for name, parts in by_name.items():
        table.append([name, *_cells(parts)])
        if len(parts) > 1 or parts[0].work.label:
            table += [[f"  {p.work.label or 'the run itself'}", *_cells([p])] for p in parts]
    table.append(["all", "", "", *_cells(made.stages)[2:]])
    owed = bill([stage.work for stage in made.stages])
    if not owed:
        table = [row[:-1] for row in table]
    if actual is not None:
        table = [[*row, *_actual(row[0], actual)] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{made.recipe.name}: {made.recipe.model.path} on {made.machine}", ""]
    for first, *cells in table:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    disk = [f"{name} {_size(size)}" for name, size in made.disk.items()]
    lines += ["", f"Disk: {'; '.join(disk)}."]
    if owed:
        lines += ["", *bill_lines(owed)]
    if made.problems:
        lines += ["", "What does not fit, and keys to try:"]
        lines += [f"- {problem}" for problem in made.problems]
    elif any(stage.memory for stage in made.stages):
        lines += ["", f"It fits {'into memory' if made.machine == 'CPU' else 'the GPU'}."]
    return "\n".join([*lines, "", *made.notes])


def bill_lines(owed: dict[str, tuple[float, float]], of: str = "") -> list[str]:
    """Lines on who is paid how much (`workload.bill`) for a run (`of` says which); the total comes first."""
    about, most = (sum(amounts) for amounts in zip(*owed.values()))
    lines = [
        f"A whole run{of} pays servers at most US$ {most:,.2f}, with every reply as long as it may be; "
        f"about US$ {about:,.2f} at the assumed lengths:"
    ]
    for who, (about, most) in owed.items():
        lines.append(f"  {who:<30} at most US$ {most:>10,.2f}, about {about:>10,.2f}")
    return lines


def _cells(stages: list[Stage]) -> list[str]:
    """Cells for several stages together: rows, tokens, time, memory and price."""
    known = [stage.hours for stage in stages if stage.hours is not None]
    peak = max(sum(stage.memory.values()) for stage in stages)
    paid = [stage.work.dollars[0] for stage in stages if stage.work.dollars]
    partly = "> " if len(known) < len(stages) else ""  # a server's time is not known
    return [
        f"{sum(stage.work.rows for stage in stages):,}",
        f"{sum(stage.work.tokens for stage in stages):,}",
        partly + _time(sum(known)) if known else "not planned",
        f"{peak:.1f} GiB" if peak else "",
        f"{sum(paid):,.2f}" if paid else "",
    ]


def _actual(name: str, actual: dict) -> list[str]:
    """Cells with what a run took: headings, for one stage, or the total for "all"."""
    if not name:
        return ["rows made", "tokens", "time taken"]
    if name == "all":
        return ["", "", _time(sum(stage["seconds"] for stage in actual.values()) / 3600)]
    if name not in actual:
        return ["", "", ""]
    stage = actual[name]
    rows, tokens = stage.get("made", stage.get("pairs", 0)), stage.get("tokens")
    return [f"{rows:,}", f"{tokens:,}" if tokens else "", _time(stage["seconds"] / 3600)]


def _size(size: float) -> str:
    return f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"
