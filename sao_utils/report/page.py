"""The report of a run or a study: one HTML page that opens from disk, for a reader with five minutes.

Nothing is computed here and no model is loaded: the page shows what the run's folder holds so far (tables,
figures, judged pairs, manifest), and says what is missing. It fetches nothing, and can be read without
scripts; only the viewer of pairs has one, in a frame of its own. What a model wrote is escaped.
"""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.recipes import load_recipe
from sao_utils.report.stopping import as_pair
from sao_utils.report.summary import blocks, cautions, sentence
from sao_utils.report.table import read_table
from sao_utils.report.tables import HOW, TABLES, PaperTable, paper_table, synpo_table
from sao_utils.report.viewer import pair_viewer
from sao_utils.report.words import model_in_words
from sao_utils.stages.judging import judged_pairs
from sao_utils.stages.pairs import kept_pairs
from sao_utils.store import Run

#: section of the page -> the figures that it shows, by the names of their files; others come last
FIGURES = {
    "result": ("good_answers", "rounds", "differences", "win_rates", "length_control"),
    "data": ("funnel", "distinct_prompts", "response_lengths", "lengths", "similarity"),
    "judge": ("margins", "orders"),
    "training": ("training_curves", "probe", "sums_and_means", "simpo_loss"),
}
FIGURES_SIZE, VIEWER_SIZE = 3_000_000, 1_200_000  # the most characters that each may take up
LONGEST = 3000  # the most characters of a text that is shown outside the viewer


def write_page(folder: Path) -> Path:
    """Write report.html into the folder of a run or study, from what the folder holds.

    Returns:
        The path of the page, which has less than 5 MB.

    Raises:
        FileNotFoundError: the folder has no results yet.
        ValueError: its results are damaged, or from an older version of the kit.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    folder, table = Path(folder), read_table(folder)
    kept = folder / "tables" / "recipe.yaml"  # the recipe of the results; a study has none
    study = [] if kept.is_file() else _study(folder)
    used = folder / "recipe.yaml" if study else kept
    run = Run(load_recipe(str(used)), folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures, left_out = _figures(folder)
    pairs = [] if study else judged_pairs(run) or _scored_pairs(run)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["table"] = _html
    page = environment.from_string(
        (files("sao_utils.report") / "page.jinja").read_text(encoding="utf-8")
    )
    text = page.render(
        run=run,
        recipe=run.recipe,
        recipe_text=used.read_text(encoding="utf-8"),
        study=study,
        sentence=sentence(table, run.recipe),
        blocks={name: _html(_frame(lines)) for name, lines in blocks(table).items()},
        paper=[] if study else _paper(run, table),
        how=HOW,
        funnel=_funnel(folder),
        figures=figures,
        left_out=left_out,
        pairs=_examples(pairs),
        viewer=Markup(_viewer(pairs)),
        cautions=cautions(table, run.recipe),
        manifest=manifest,
        stages=_stages(manifest),
    )
    # JSON may hold a lone surrogate, which UTF-8 cannot encode.
    write_whole(folder / "report.html", text.encode("utf-8", "replace").decode())
    return folder / "report.html"


def _frame(lines: list[list[str]]) -> pd.DataFrame:
    """A data frame from lines of cells: the first line has the headings, the first cells name the rows."""
    (corner, *columns), *rest = lines
    frame = pd.DataFrame(
        [cells for _, *cells in rest], [name.strip() for name, *_ in rest], columns
    )
    return frame.rename_axis(corner, axis=1)


def _html(frame: pd.DataFrame):
    """A table of texts as escaped HTML."""
    from markupsafe import Markup

    return Markup(f'<div class="wide">{frame.to_html(border=0, justify="left")}</div>')


def _paper(run: Run, table: pd.DataFrame) -> dict[str, PaperTable]:
    """The tables of the method's paper, as reported and as measured here."""
    if run.recipe.method == "synpo":
        return {"Table 2": synpo_table()}
    return {} if run.recipe.iterated else {name: paper_table(run, table, name) for name in TABLES}


def _study(folder: Path) -> list:
    """The parts of a study's results.md: (kind, text), kind "h2", "p" or "table"."""
    parts = []
    for part in (folder / "tables" / "results.md").read_text("utf-8").strip().split("\n\n"):
        if part.startswith("|"):
            lines = [line[2:-2].split(" | ") for line in part.split("\n")]
            parts.append(("table", _html(_frame([lines[0], *lines[2:]]))))
        else:
            parts.append(("h2", part[2:]) if part.startswith("# ") else ("p", part))
    return parts


def _funnel(folder: Path) -> str:
    """What became of the prompts: one row per step, one column per arm, or per round and seed."""
    path = folder / "tables" / "funnel.csv"
    if not path.is_file():
        return ""
    steps = pd.read_csv(path)
    if "arm" in steps:
        steps["arm"] = steps["arm"].map(model_in_words)
    names = [column for column in steps if column not in ("step", "count")]
    # Prompts and pairs may be discarded for the same reason.
    steps["part"] = (steps["step"] == "prompts").groupby([steps[name] for name in names]).cumsum()
    wide = steps.pivot_table("count", ["part", "step"], names, sort=False, aggfunc="sum")
    order = sorted(wide.index, key=lambda at: (at[0], at[1] == "pairs"))
    wide = wide.loc[order].droplevel("part").rename_axis(None)
    return _html(wide.map(_plain))


def _figures(folder: Path) -> tuple[dict[str, list], list[str]]:
    """{section: [(name, data URI)]} for the existing figures, and the names of those left out."""
    there = {path.stem: path for path in sorted((folder / "figures").glob("*.svg"))}
    named = [name for names in FIGURES.values() for name in names]
    places = {**FIGURES, "other": [name for name in there if name not in named]}
    found, left_out, size = {}, [], 0
    for section, names in places.items():
        for name in names:
            if name not in there:
                continue
            # As separate images, so that the ids in two figures cannot clash.
            data = base64.b64encode(there[name].read_bytes()).decode()
            if size + len(data) > FIGURES_SIZE:
                left_out.append(name)
                continue
            size += len(data)
            uri = f"data:image/svg+xml;base64,{data}"
            found.setdefault(section, []).append((name.replace("_", " "), uri))
    return found, left_out


def _scored_pairs(run: Run) -> list[dict]:
    """The pairs of a method that scores responses, in the viewer's form, kept ones first."""
    files = sorted((run.folder / "rows").glob("pairs_*.jsonl"))
    arms = [path.stem.removeprefix("pairs_") for path in files]
    return [
        {**as_pair(row), "lengths": row["lengths"], "margin": None}
        | {"outcome": row["discarded"] or "kept: answer a, the chosen one, has the better score"}
        for arm in arms
        for row in kept_pairs(run, arm)
        if "rejected" in row
    ]


def _viewer(pairs: list[dict]) -> str:
    """The viewer of as many pairs as the page has room for."""
    for limit in (40, 10, 3) if pairs else ():
        if len(made := pair_viewer(pairs, limit)) < VIEWER_SIZE:
            return made
    return ""


def _examples(pairs: list[dict]) -> list[dict]:
    """The first two pairs of each outcome, with texts cut to a readable length."""
    shown: dict[str, list[dict]] = {}
    for row in pairs:
        if len(of := shown.setdefault(row["outcome"], [])) < 2:
            texts = [text[:LONGEST] for text in (row["prompt"], *row["responses"])]
            of.append({**row, "prompt": texts[0], "responses": texts[1:]})
    return [row for of in shown.values() for row in of]


def _stages(manifest: dict) -> str:
    """What each stage made, and how long it took, from the manifest."""
    stages = pd.DataFrame.from_dict(manifest.get("stages", {}), orient="index")
    return "" if stages.empty else _html(stages.map(_plain))


def _plain(value) -> str:
    return value if isinstance(value, str) else "" if value != value else f"{value:,.10g}"
