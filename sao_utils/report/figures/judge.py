"""Pictures of a judge: how sure it is, how often it is right, and how the order of the answers matters."""

from __future__ import annotations

from sao_utils.report.figures import style

#: what the oracle says about a verdict -> colour, marker
AGREEMENT = {
    "oracle agrees": (style.BLUE, "o"),
    "oracle disagrees": (style.RED, "X"),
    "undecided, or no oracle": (style.LIGHT, "."),
}


def _by_agreement(verdicts: list[dict]) -> dict[str, list[dict]]:
    """Judged rows, grouped by what the oracle says about them; empty groups are left out."""
    groups: dict[str, list[dict]] = {label: [] for label in AGREEMENT}
    agrees, disagrees, unknown = groups.values()
    for row in verdicts:
        if row["margin"] is not None:
            a, b = row["quality"] or (0, 0)
            right = agrees if (a > b) == (row["margin"] > 0) else disagrees
            (unknown if a == b or not row["margin"] else right).append(row)
    return {label: rows for label, rows in groups.items() if rows}


@style.styled
def margins(verdicts: list[dict]):
    """How sure the judge is, and how often it is right: sizes of the mean margins of `judge_pairs` rows."""
    groups = _by_agreement(verdicts)
    if not groups:
        return style.nothing("no pair was judged")
    title = "How sure is the judge, and is it right?"
    figure, axes = style.new(title, "size of the margin (nats)", "pairs")
    sizes = [[abs(row["margin"]) for row in rows] for rows in groups.values()]
    labels = [f"{label}, n = {len(rows)}" for label, rows in groups.items()]
    colours = [AGREEMENT[label][0] for label in groups]
    axes.hist(sizes, 30, stacked=True, color=colours, label=labels, edgecolor="white", lw=0.5)
    axes.legend()
    return figure


@style.styled
def orders(verdicts: list[dict]):
    """Each pair's margins in both orders: where they agree, and where the position decides."""
    groups = _by_agreement(verdicts)
    if not groups:
        return style.nothing("no pair was judged")
    title = "Does the verdict depend on which answer is shown first?"
    x, y = "margin for a, when a is shown first (nats)", "when b is shown first (nats)"
    figure, axes = style.new(title, x, y, height=5)
    for label, rows in groups.items():
        x, y = ([row[key] for row in rows] for key in ("margin_12", "margin_21"))
        colour, marker = AGREEMENT[label]
        looks = dict(color=colour, marker=marker, alpha=0.6, lw=0, rasterized=True)
        axes.scatter(x, y, s=24, label=f"{label}, n = {len(rows)}", **looks)
    reach = max(map(abs, (*axes.get_xlim(), *axes.get_ylim())))
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
