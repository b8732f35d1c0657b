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
MAX_BYTES = 1_000_000
MAX_TEXT = 20_000  # characters of a text that are shown
_SHOWN = "prompt responses lengths quality outcome margin margin_12 margin_21 mass".split()
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # the others json escapes


def pair_viewer(rows: list[dict], limit: int = 200, unit: str = "tokens") -> str:
    """A viewer for pairs: side by side, with the verdict of both orders; filtered, sorted, paged.

    Args:
        rows: rows of `stages.judging.judge_pairs`; lengths and quality are shown where they are there.
        limit: the most pairs to put into the page. Of each outcome, and of the wrong verdicts, about
            equally many are taken, the first ones; fewer where the page would exceed `MAX_BYTES`.
        unit: what lengths are counted in.

    Returns:
        HTML for `IPython.display.HTML`, or to be put into a page.
    """
    groups = [_groups(row) for row in rows]
    counts = Counter(group for names in groups for group in names)
    order = ("all", *OUTCOMES, "right", "wrong")
    shown = [(name, counts[name]) for name in order if counts[name] or name == "all"]
    most = min(limit, len(rows))
    while True:
        picked = [
            {**{key: _plain(rows[k].get(key)) for key in _SHOWN}, "groups": groups[k]}
            for k in _pick(groups, most)
        ]
        page = _page({"rows": picked, "counts": shown, "unit": unit})
        if not most or len(page.encode()) <= MAX_BYTES:
            return page
        most //= 2


def _groups(row: dict) -> list[str]:
    """What a row is counted as: "all", its outcome, and "right" or "wrong" where that is known."""
    names, quality = ["all", row["outcome"]], row.get("quality")
    if row["margin"] and quality and quality[0] != quality[1]:
        names.append("right" if (row["margin"] > 0) == (quality[0] > quality[1]) else "wrong")
    return names


def _pick(groups: list[list[str]], most: int) -> list[int]:
    """Indices of at most `most` rows, in order: of each kind in turn, so that rare ones are there."""
    kinds: dict[tuple, int] = {}
    turns = []
    for k, names in enumerate(groups):
        turn = kinds[tuple(names)] = kinds.get(tuple(names), 0) + 1
        turns.append((turn, k))
    return sorted(k for _, k in sorted(turns)[:most])


def _plain(value):
    """A value as JSON has it, long texts cut: numbers that are not finite are none."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]} [... {len(value) - MAX_TEXT:,} more characters]"
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(data: dict) -> str:
    page = (files("sao_utils.report") / "viewer.html").read_text(encoding="utf-8")
    page = page.replace("DATA", json.dumps(data, separators=(",", ":")).translate(_UNSAFE))
    # No same origin: nothing in the frame could reach the page around it, or a notebook's server.
    return (
        '<div><iframe title="Pairs" sandbox="allow-scripts" style="width:100%;height:560px;border:0" '
        f'srcdoc="{html.escape(page)}"></iframe></div>'
    )
