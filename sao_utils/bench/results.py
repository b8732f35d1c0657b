"""What a benchmark of training came to: the bars, a picture, and its files in results/benchmarks/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sao_utils.bench.contenders import CPO, FUSED, LIGER, PACKED, SHARED, STAND_IN
from sao_utils.bench.measuring import GIB, about, as_csv, bar, bar_lines, failure
from sao_utils.disk import write_whole
from sao_utils.report.figures import style as looks
from sao_utils.store import results_folder

COLUMNS = (
    "measurement shapes vocabulary weights cap_gib contender batch tokens peak_bytes peak_ratio "
    "seconds cpu_seconds tokens_per_second speed_ratio loss loss_difference padded_ratio head_ratio "
    "microbatches repeats status note"
).split()


def best(rows: list[dict], *contenders: str) -> dict | None:
    """The fastest row of these contenders, None when none ran."""
    ran = [r for r in rows if r["contender"] in contenders and r["status"] == "ok"]
    return max(ran, key=lambda row: row.get("tokens_per_second") or 0, default=None)


def bars(rows: list[dict], device: str) -> list[dict]:
    """What was promised, as dicts of "bar", "limit", "value" and "met" (None: not measured)."""
    found = []

    def promise(*told) -> None:
        found.append(bar(*told))

    def pick(measurement, contender=None, **wanted):
        return [
            row
            for row in rows
            if row["measurement"] == measurement
            and contender in (None, row["contender"])
            and all(row.get(key) == value for key, value in wanted.items())
            and row["status"] == "ok"
        ]

    def first(several, key):
        return next((row[key] for row in several if row.get(key) is not None), None)

    if device == "cuda":
        gemma = {"shapes": "gemma-2-9b"}
        tried = [r for r in rows if r["measurement"] == "one pair" and r["shapes"] == "gemma-2-9b"]
        tried = [r for r in tried if r.get("cap_gib") == 23 and "measured" not in r["status"]]

        def runs(*names):
            there = [r["status"] for r in tried if r["contender"] in names]
            there = [status for status in there if status in ("ok", "out of memory")]
            return float("ok" in there) if there else None

        promise(
            "gemma-2-9b, one pair at 2,048, 23 GiB: ours runs (1)", runs(PACKED, SHARED), 1, False
        )
        stock = STAND_IN if best(rows, STAND_IN) else CPO  # without trl
        promise(f"the same: {stock} does not (0)", runs(stock), 0)
        peak = first(pick("one pair", PACKED, cap_gib=None, **gemma), "peak_ratio")
        promise(f"the same without a cap: peak, ratio to {stock}", peak, 0.5)
        step = pick("step", cap_gib=23, **gemma)
        for name, limit in ((stock, 1.3), (FUSED, 1.15)):
            value = _faster(best(step, PACKED, SHARED), best(step, name))
            promise(
                f"gemma-2-9b, 23 GiB: tokens/s over {name}, each at its best", value, limit, False
            )
    else:
        stage = [r for r in pick("loss stage") if r["vocabulary"] == 256_000]
        ours = [row for row in stage if row["contender"] == PACKED]
        at_2048 = [row for row in ours if row["tokens"] == 2048]
        name = "loss stage, V = 256,000"
        promise(
            f"{name}, 2,048 tokens: peak, ratio to CPOTrainer", first(at_2048, "peak_ratio"), 0.15
        )
        peaks = [row["peak_bytes"] for row in ours if row["peak_bytes"]]
        flat = max(peaks) / min(peaks) if len({r["tokens"] for r in ours}) > 1 and peaks else None
        promise(f"{name}: largest over smallest peak, 512 to 4,096 tokens", flat, 1.25)
        # The step's loss has also been through the model, in another order of summation.
        for part, limit in (("loss stage", 1e-5), ("step", 1e-4)):
            equal = [r["loss_difference"] for r in pick(part) if "loss_difference" in r]
            promise(f"{part}: loss, largest relative difference", max(equal, default=None), limit)
        for shape in dict.fromkeys(r["shapes"] for r in pick("step")):
            step = pick("step", shapes=shape)
            value = _faster(best(step, PACKED, SHARED), best(step, CPO))
            name = f"V = {step[0]['vocabulary']:,}: tokens/s over CPOTrainer, each at its best"
            promise(name, value, 1.2, False)
    fed = pick("step", PACKED) + pick("one pair", PACKED)
    promise("padded over real tokens", max((r["padded_ratio"] for r in fed), default=None), 1.0)
    head = [r["head_ratio"] for r in fed + pick("step", SHARED)]
    promise("head rows over answer tokens", max(head, default=None), 1.0)
    planned = [r["microbatches"] for c in (PACKED, SHARED) for r in pick("counts", c)]
    promise("microbatches, 128 pairs at 4,096 tokens", max(planned, default=None), 35)
    return found


def _faster(ours: dict | None, other: dict | None) -> float | None:
    return ours["tokens_per_second"] / other["tokens_per_second"] if ours and other else None


def report(rows: list[dict], device: str) -> dict:
    """Bars, versions, hardware and date of these rows."""
    return {**about(rows, device), "bars": bars(rows, device)}


def picture(rows: list[dict]):
    """Peak memory of the loss stage and speed of the step, a matplotlib figure."""
    from matplotlib import pyplot, style

    stage = [r for r in rows if r["measurement"] == "loss stage" and r.get("tokens") == 2048]
    step = [r for r in rows if r["measurement"] == "step"]
    title = "Loss stage of one pair, 2,048 tokens: the less the better"
    parts = (
        (stage, "peak_bytes", GIB, title, "peak, GiB"),
        (step, "speed_ratio", 1, "One step of pairs: the more the better", f"tokens/s, 1 = {CPO}"),
    )
    names = {PACKED: looks.BLUE, SHARED: looks.SKY, CPO: looks.RED, FUSED: looks.ORANGE}
    names |= {LIGER: looks.PURPLE, STAND_IN: looks.GREY}
    drawn = []
    for some, key, *_ in parts:
        lines = [(s, c) for s in dict.fromkeys(r["shapes"] for r in some) for c in names]
        found = [best([r for r in some if r["shapes"] == s], c) for s, c in lines]
        drawn.append([row for row in found if row and row.get(key)])
    heights = [max(2, len(lines)) for lines in drawn]
    with style.context(["default", looks.STYLE]):
        size = (8, 1.6 + 0.2 * sum(heights))
        figure, axes = pyplot.subplots(2, figsize=size, height_ratios=heights)
        pyplot.close(figure)  # a notebook shall show it once
        for place, lines, (_, key, unit, title, x) in zip(axes, drawn, parts):
            place.set_title(title)
            place.set_xlabel(x)
            values = [row[key] / unit for row in lines]
            names_of = [f"V = {r['vocabulary'] / 1000:.0f}k: {r['contender']}" for r in lines]
            colours = [names[row["contender"]] for row in lines]
            bars_of = place.barh(range(len(lines)), values, color=colours)
            place.bar_label(bars_of, [f" {value:.2f}" for value in values], fontsize=8)
            place.set_yticks(range(len(lines)), names_of, fontsize=8)
            place.set_ylim(max(1, len(lines)) - 0.4, -0.6)  # read from top to bottom
            place.grid(axis="y", visible=False)
            place.margins(x=0.1)
            if not lines:
                place.text(0, 0.5, "Not measured.", transform=place.transAxes)
                place.set_axis_off()
    return figure


def keep(folder: Path, name: str, rows: list[dict]) -> dict:
    """Write name.csv, name.json and name.svg; returns what the JSON holds."""
    found = report(rows, "cuda" if name.startswith("cuda") else "cpu")
    write_whole(folder / f"{name}.csv", as_csv(rows, COLUMNS))
    write_whole(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    if found["status"] == "measured":
        try:
            write_whole(folder / f"{name}.svg", looks.as_svg(picture(rows)))
        except Exception as error:  # numbers do not depend on a drawing
            print(f"No picture: {failure(error)}", file=sys.stderr)
    return found


def kept(name: str) -> dict | None:
    """The report of results/benchmarks, wherever this runs; None when there is none."""
    for results in (results_folder(), Path(__file__).resolve().parents[2] / "results"):
        path = results / "benchmarks" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def table(rows: list[dict], found: dict) -> str:
    """What a reader wants to see first: ratios, then bars."""
    lines = []
    for row in rows:
        ratios = [
            f"{label} {row[key]:.3g}"
            for key, label in (("peak_ratio", "memory"), ("speed_ratio", "speed"))
            + (("padded_ratio", "padded/real"), ("head_ratio", "head/answer"))
            + (("microbatches", "microbatches"),)
            if row.get(key) is not None
        ]
        cap = f", {row['cap_gib']:g} GiB" if row.get("cap_gib") else ""
        where = f"{row['measurement']} {row.get('shapes') or ''}{cap}"
        said = ", ".join(ratios) if row["status"] == "ok" else row["status"]
        size = f"{row.get('tokens') or 0:6d} tokens x{row.get('batch') or 0}"
        lines.append(f"{where:32} {size:20} {row['contender']:28} {said}")
    return "\n".join([*lines, bar_lines(found)])
