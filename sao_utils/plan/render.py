"""A plan as text."""

from __future__ import annotations

from sao_utils.plan.planning import Plan, Stage


def render(made: Plan, actual: dict | None = None) -> str:
    """A plan as lines of text; beside it what a run's manifest says, if one is given.

    Args:
        actual: the stages of a run (`workload.actual`): name -> {seconds, made or pairs, tokens}.
    """
    columns = ["rows", "tokens", "time", "memory", "US$ about"]
    took = ["rows made", "tokens", "time taken"] if actual is not None else []
    table = [["", *columns, *took]]
    by_name: dict[str, list[Stage]] = {}
    for stage in made.stages:
        by_name.setdefault(stage.name, []).append(stage)
    for name, parts in by_name.items():
        beside = _actual((actual or {}).get(name)) if took else []
        table.append([name, *_cells(parts), *beside])
        if len(parts) > 1 or parts[0].part:
            own = "the run's own"
            table += [[f"  {p.part or own}", *_cells([p]), *[""] * len(took)] for p in parts]
    every = _cells(made.stages)
    total = [_time(sum(s["seconds"] for s in actual.values()) / 3600)] if took else []
    table.append(["all", "", "", *every[2:], *(["", "", *total] if took else [])])
    shown = [k for k in range(len(table[0])) if k < 4 or k > 5 or any(row[k] for row in table[1:])]
    table = [[row[k] for k in shown] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{made.recipe}: {made.model} on {made.machine}", ""]
    for first, *cells in table:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    disk = [f"{name} {_size(size)}" for name, size in made.disk.items()]
    lines += ["", f"Disk: {'; '.join(disk)}."]
    if made.bill:
        lines += ["", *bill_lines(made.bill)]
    if made.problems:
        lines += ["", "What does not fit, and the key to change:"]
        lines += [f"- {problem}" for problem in made.problems]
    elif any(stage.memory for stage in made.stages):
        lines += ["", f"It fits {'into memory' if made.machine == 'CPU' else 'the GPU'}."]
    return "\n".join([*lines, "", *made.notes])


def bill_lines(bill: dict[str, tuple[float, float]]) -> list[str]:
    """Who is paid how much, as lines of text; the most that a run can cost first."""
    about, most = (sum(amounts) for amounts in zip(*bill.values()))
    return [
        f"A whole run pays servers at most US$ {most:,.2f}, with every reply as long as it may be; "
        f"about US$ {about:,.2f} at the assumed lengths:",
        *(
            f"  {who:<30} at most US$ {most:>10,.2f}, about {about:>10,.2f}"
            for who, (about, most) in bill.items()
        ),
    ]


def _cells(stages: list[Stage]) -> list[str]:
    """Rows, tokens, time, memory and price of stages together."""
    hours = [stage.hours for stage in stages]
    known = [time for time in hours if time is not None]
    peak = max((sum(stage.memory.values()) for stage in stages), default=0)
    paid = [stage.dollars[0] for stage in stages if stage.dollars]
    return [
        f"{sum(stage.rows for stage in stages):,}",
        f"{sum(stage.tokens for stage in stages):,}",
        _time(sum(known), len(known) < len(hours)) if known else _time(None),
        f"{peak:.1f} GiB" if peak else "",
        f"{sum(paid):,.2f}" if paid else "",
    ]


def _size(size: float) -> str:
    return f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"


def _time(hours: float | None, more: bool = False) -> str:
    """more: something that takes time is left out, such as a server's."""
    if hours is None:
        return "not planned"
    if hours < 1 / 60:
        words = f"{3600 * hours:.0f} s"
    else:
        words = f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"
    return f"> {words}" if more else words


def _actual(stage: dict | None) -> list[str]:
    if stage is None:
        return ["", "", ""]
    rows = stage.get("made", stage.get("pairs", 0))
    tokens = f"{stage['tokens']:,}" if stage.get("tokens") else ""
    return [f"{rows:,}", tokens, _time(stage["seconds"] / 3600)]
