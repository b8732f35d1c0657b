"""A viewer to browse judged pairs: one piece of HTML for a notebook or a page, without network access.

The page is `viewer.html`. What a model wrote is data there: kept as JSON in which no character can end a
script, and shown only as plain text. An iframe of its own keeps its styles separate.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from importlib.resources import files

_ORDER = ("all", "consistent", "inconsistent", "tie", "invalid", "identical", "right", "wrong")
_SHOWN = "prompt responses lengths quality outcome margin margin_12 margin_21 mass".split()
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # json escapes the others


def pair_viewer(rows: list[dict], limit: int = 40) -> str:
    """A viewer for pairs, side by side, with the verdicts of both orders; with filters, sorting and pages.

    Args:
        rows: rows of `stages.judging.judge_pairs`; lengths (tokens) and quality are shown if present.
        limit: the most pairs of each outcome, and of right and of wrong verdicts, to put into the page.

    Returns:
        HTML for `IPython.display.HTML`, or for embedding in a page.
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
    # Without allow-same-origin, nothing in the frame can reach the page around it, or a notebook's server.
    return (
        '<div><iframe title="Pairs" sandbox="allow-scripts" style="width:100%;height:560px;border:0" '
        f'srcdoc="{html.escape(page.replace("DATA", data))}"></iframe></div>'
    )


def _groups(row: dict) -> list[str]:
    """The groups that a row is counted in: its outcome, and "right" or "wrong" if that is known."""
    names, quality = [row["outcome"]], row.get("quality")
    if row["margin"] and quality and quality[0] != quality[1]:
        names.append("right" if (row["margin"] > 0) == (quality[0] > quality[1]) else "wrong")
    return names


def _finite(value):
    """A value that JSON can hold: None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
