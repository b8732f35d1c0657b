"""Results of the benchmarks: the bars, a table, a figure, and files in results/benchmarks/."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import yaml

from sao_utils.bench.contenders import CPO, FUSED, LIGER, PACKED, SHARED
from sao_utils.disk import write_whole
from sao_utils.machine import hardware, versions
from sao_utils.training.shapes import GIB

COLUMNS = (
    "measurement shapes vocabulary weights cap_gib contender batch rows tokens peak_bytes "
    "planned_bytes peak_ratio seconds cpu_seconds tokens_per_second rows_per_second speed_ratio "
    "ratio cpu_ratio loss loss_difference gradient_difference padded_ratio head_ratio microbatches "
    "repeats status"
).split()
#: column -> its name in the table for readers
FACTS = {
    "peak_ratio": "memory",
    "speed_ratio": "speed",
    "ratio": "of the raw call",
    "cpu_ratio": "of its CPU time",
    "rows_per_second": "rows/s",
    "tokens_per_second": "tokens/s",
    "peak_bytes": "peak GiB",
    "planned_bytes": "planned GiB",
    "gradient_difference": "gradient off by",
    "padded_ratio": "padded/real",
    "head_ratio": "head/answer",
    "microbatches": "microbatches",
}


# ---------------------------------------------------------------------------- bars


def bars(rows: list[dict], benchmark: str) -> list[dict]:
    """What bars.yaml promises of a benchmark's rows: "bar", "limit", "value" and "met".

    "value" and "met" are None where the rows needed were not measured.
    """
    promises = yaml.safe_load(Path(__file__).with_name("bars.yaml").read_text("utf-8"))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["runs"] = frame["status"].map({"ok": 1.0, "out of memory": 0.0})

    def numbers(query: str, column: str) -> pd.Series:
        ours = {"ours": [PACKED, SHARED]}
        return frame.query(query, local_dict=ours, engine="python")[column].dropna()

    found = []
    for promise in promises[benchmark]:
        column, at, sign, limit = promise["must"].split()
        ours, over = numbers(promise["rows"], column), promise.get("over")
        value, met = ours.max(), None
        if over == "smallest":
            value = value / ours.min() if len(ours) > 1 else None
        elif over:
            value = value / numbers(over, column).max()
        value = None if pd.isna(value) else float(value)
        if value is not None:
            met = value <= float(limit) if sign == "most" else value >= float(limit)
        limit = f"{at} {sign} {limit}"
        found.append({"bar": promise["bar"], "limit": limit, "value": value, "met": met})
    return found


def bar_lines(found: list[dict]) -> str:
    """The bars as text, one per line."""
    words = {True: "met", False: "NOT met", None: "not measured"}
    lines = []
    for one in found:
        value = "" if one["value"] is None else f": {one['value']:.4g}"
        lines.append(f"{words[one['met']]:12} {one['bar']}{value} ({one['limit']})")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- files


def keep(folder: Path, name: str, rows: list[dict]) -> None:
    """Write the rows to name.csv, and date, hardware and versions to name.json."""
    about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "hardware": hardware()}
    about["versions"] = versions()
    frame = pd.DataFrame(rows)
    frame = frame[[column for column in COLUMNS if column in frame]]
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_whole(folder / f"{name}.csv", text)
    write_whole(folder / f"{name}.json", json.dumps(about, indent=1) + "\n")


def kept(name: str) -> tuple[dict, list[dict]] | None:
    """What `keep` wrote to this checkout's results: the JSON and the rows. None if there is nothing."""
    folder = Path(__file__).resolve().parents[2] / "results" / "benchmarks"
    path = folder / f"{name}.csv"
    if not path.exists():
        return None
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return about, pd.read_csv(path).to_dict("records")


# ---------------------------------------------------------------------------- for readers


def table(rows: list[dict]):
    """The rows as a data frame for readers: values as text, readable column names."""
    frame = pd.DataFrame(rows)
    for key in (key for key in FACTS if key in frame):
        values = frame.pop(key) / (GIB if key.endswith("bytes") else 1)
        texts = [f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in values]
        frame[FACTS[key]] = [text.replace("nan", "") for text in texts]
    words = "measurement shapes cap_gib contender batch".split() + [*FACTS.values(), "status"]
    frame = frame[[word for word in words if word in frame]]
    return frame.astype(object).where(frame.notna(), "")


def picture(rows: list[dict]):
    """A matplotlib figure: peak memory of the loss stage, and each contender's best speed of the step."""
    from matplotlib import pyplot
    from matplotlib import style as styles

    from sao_utils.report.figures import style

    contenders = (PACKED, SHARED, CPO, FUSED, LIGER)
    named = (style.BLUE, style.SKY, style.RED, style.ORANGE, style.PURPLE)
    colour_of = dict(zip(contenders, named))
    ran = pd.DataFrame(rows, columns=COLUMNS).query("status == 'ok'")
    ran["peak_gib"] = ran["peak_bytes"] / GIB
    pair = ran.query("measurement == 'loss stage' and tokens == 2048")
    step = ran.query("measurement == 'step'")
    title = "Loss stage of one pair, 2,048 tokens: lower is better"
    parts = (
        (pair, "peak_gib", title, "peak, GiB"),
        (step, "speed_ratio", "One step of pairs: higher is better", f"tokens/s, 1 = {CPO}"),
    )
    with styles.context(["default", style.STYLE]):
        figure, axes = pyplot.subplots(2, figsize=(8, 1.6 + 0.2 * len(pair) + 0.2 * len(step)))
        pyplot.close(figure)  # so that a notebook shows it only once
        for place, (some, key, title, label) in zip(axes, parts):
            of_each = some.groupby(["vocabulary", "contender"], sort=False)
            values = of_each[key].max().dropna()
            names = [f"V = {size / 1000:.0f}k: {contender}" for size, contender in values.index]
            colours = [colour_of[contender] for _, contender in values.index]
            drawn = place.barh(names, values, color=colours)
            place.bar_label(drawn, [f" {value:.2f}" for value in values], fontsize=8)
            place.set(title=title, xlabel=label)
            place.tick_params(axis="y", labelsize=8)
            place.invert_yaxis()  # read from top to bottom
            place.grid(axis="y", visible=False)
            place.margins(x=0.1)
    return figure
