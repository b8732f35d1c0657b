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

_ORDER = ("all", "consistent", "inconsistent", "tie", "invalid", "identical", "right", "wrong")
_SHOWN = "prompt responses lengths quality outcome margin margin_12 margin_21 mass".split()
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # the others json escapes


def pair_viewer(rows: list[dict], limit: int = 40) -> str:
    """A viewer for pairs: side by side, with the verdict of both orders; filtered, sorted, paged.

    Args:
        rows: rows of `stages.judging.judge_pairs`; lengths (tokens) and quality are shown if they are there.
        limit: the most pairs of each outcome, and of right and of wrong verdicts, to put into the page.

    Returns:
        HTML for `IPython.display.HTML`, or to be put into a page.
    """
    counts, picked = Counter(all=0), []
    for row in rows:
        names = _groups(row)
        counts.update(["all", *names])
        if any(counts[name] <= limit for name in names):
            values = {key: _finite(row.get(key)) for key in _SHOWN}
            picked.append({**values, "groups": names})
    shown = [(name, counts[name]) for name in _ORDER if name in counts]
    page = (files("sao_utils.report") / "viewer.html").read_text(encoding="utf-8")
    data = json.dumps({"rows": picked, "counts": shown}).translate(_UNSAFE)
    # No same origin: nothing in the frame could reach the page around it, or a notebook's server.
    return (
        '<div><iframe title="Pairs" sandbox="allow-scripts" style="width:100%;height:560px;border:0" '
        f'srcdoc="{html.escape(page.replace("DATA", data))}"></iframe></div>'
    )


def _groups(row: dict) -> list[str]:
    """What a row is counted as: its outcome, and "right" or "wrong" where that is known."""
    names, quality = [row["outcome"]], row.get("quality")
    if row["margin"] and quality and quality[0] != quality[1]:
        names.append("right" if (row["margin"] > 0) == (quality[0] > quality[1]) else "wrong")
    return names


def _finite(value):
    """A value as JSON has it: numbers that are not finite are none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
