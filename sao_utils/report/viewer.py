"""Judged pairs to leaf through: one piece of HTML for a notebook or a page, without network.

The page is `viewer.html`. What a model wrote is data in it: kept as JSON in which no character can
end a script, and shown as plain text only. An iframe of its own keeps styles apart.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from importlib.resources import files

OUTCOMES = ("consistent", "inconsistent", "tie", "invalid", "identical")
_SHOWN = "prompt responses lengths quality outcome margin margin_12 margin_21 mass".split()
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # the others json escapes


def pair_viewer(rows: list[dict], limit: int = 200, unit: str = "tokens") -> str:
    """A viewer for pairs: side by side, with the verdict of both orders; filtered, sorted, paged.

    Args:
        rows: rows of `stages.judging.judge_pairs`; lengths and quality are shown where they are there.
        limit: the most pairs to put into the page. Of each outcome, and of the wrong verdicts, about
            equally many are taken, the first ones.
        unit: what lengths are counted in.

    Returns:
        HTML for `IPython.display.HTML`, or to be put into a page.
    """
    groups = [_groups(row) for row in rows]
    counts = Counter(group for names in groups for group in names)
    order = ("all", *OUTCOMES, "right", "wrong")
    shown = [(name, counts[name]) for name in order if counts[name] or name == "all"]
    turns, seen = [], Counter()  # the first of each kind, then the second of each, ...
    for k, names in enumerate(groups):
        seen[tuple(names)] += 1
        turns.append((seen[tuple(names)], k))
    picked = [
        {**{key: _finite(rows[k].get(key)) for key in _SHOWN}, "groups": groups[k]}
        for k in sorted(k for _, k in sorted(turns)[:limit])
    ]
    page = (files("sao_utils.report") / "viewer.html").read_text(encoding="utf-8")
    data = json.dumps({"rows": picked, "counts": shown, "unit": unit}).translate(_UNSAFE)
    # No same origin: nothing in the frame could reach the page around it, or a notebook's server.
    return (
        '<div><iframe title="Pairs" sandbox="allow-scripts" style="width:100%;height:560px;border:0" '
        f'srcdoc="{html.escape(page.replace("DATA", data))}"></iframe></div>'
    )


def _groups(row: dict) -> list[str]:
    """What a row is counted as: "all", its outcome, and "right" or "wrong" where that is known."""
    names, quality = ["all", row["outcome"]], row.get("quality")
    if row["margin"] and quality and quality[0] != quality[1]:
        names.append("right" if (row["margin"] > 0) == (quality[0] > quality[1]) else "wrong")
    return names


def _finite(value):
    """A value as JSON has it: numbers that are not finite are none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
