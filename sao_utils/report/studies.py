"""The table of a study: what each member gained, what it was given, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.methods.studies import Entry, Study, run_study
from sao_utils.report import figures
from sao_utils.report.rounds import answers_of, pair_rows, quality_rows
from sao_utils.report.stopping import decisions, stopping_rows
from sao_utils.report.table import as_csv, as_json, make_row, make_table, select
from sao_utils.report.words import NOT_COMPARABLE, in_words, markdown
from sao_utils.statistics.intervals import exact
from sao_utils.store import Run
from sao_utils.training.fit import read_done

EVALUATION = ("answers", "comparisons", "tasks")  # stages that are the same for all members


def study_table(study: Study, home: Run) -> pd.DataFrame:
    """Run what is missing of a study, and write its tables and figure into home's `tables`, `figures`.

    Returns:
        The rows of the table of results, with section "study" and a member's label as `model`.
    """
    entries, rows, decided = [], [], []
    for entry in run_study(study, home):
        entries.append(entry)
        rows += list(_rows(entry, with_base=len(entries) == 1))
        if study.stopping:
            first = entry.run.recipe.evaluation.temperatures[0]
            answers = [r for r in answers_of(entry.run, entry.trained) if r["temperature"] == first]
            made = decisions(entry.run, entry.trained, answers)
            decided += [{**row, "member": entry.label} for row in made]
        table = make_table([*rows, *stopping_rows(decided)])
        _write(study, home, entries, table)  # of what is there so far
    return table


def _rows(entry: Entry, with_base: bool) -> Iterator[dict]:
    """The rows of one member; the base's own only once, since it is the same for all."""
    run, name = entry.run, entry.run.recipe.method
    found = quality_rows(run, entry.trained)
    for row in [*found, *pair_rows(run, entry.trained)]:
        if row["model"] == "base" and not with_base:
            continue
        label = entry.label if row["model"] == name else row["model"]
        yield {**row, "section": "study", "model": label}
    written, read, seconds = _price(run)
    names = {"model": entry.label, "round": run.recipe.rounds}
    price = {"tokens written": written, "tokens trained on": read, "minutes": seconds / 60}
    for metric, value in price.items():
        yield make_row("study", metric, exact(value, 1), **names)


def _price(run: Run) -> tuple[int, int, float]:
    """Tokens that were written, tokens that were trained on, and seconds; without evaluation."""
    stages = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))["stages"]
    made = [of for stage, of in stages.items() if stage not in EVALUATION]
    trained = map(read_done, (run.folder / "adapters").iterdir())
    trained = [done for done in trained if done]
    written = sum(of.get("tokens", 0) for of in made)
    read = sum(done.get("tokens", 0) for done in trained)  # a reward model notes neither
    return written, read, sum(of.get("seconds", 0) for of in [*made, *trained])


def _write(study: Study, home: Run, entries: list[Entry], table: pd.DataFrame) -> None:
    folder = home.folder / "tables"
    write_whole(folder / "results.csv", as_csv(table))
    write_whole(folder / "results.json", as_json(table))
    parts = [f"# {study.about}", markdown(members(entries, table).reset_index())]
    parts += [f"The paper: {study.paper}"] if study.paper else []
    parts += [searches(entries)] if any(entry.chosen for entry in entries) else []
    if study.stopping:
        parts += [
            "Rules that need no oracle, and how often they were right:",
            markdown(rules(table)),
        ]
        figures.save(home, "stopping", figures.stopping(table))
    parts += [NOT_COMPARABLE] if home.recipe.model.path == "tiny" else []
    write_whole(folder / "results.md", "\n\n".join(parts) + "\n")
    figures.save(home, study.name, figures.study(table, study.about))


def members(entries: list[Entry], table: pd.DataFrame) -> pd.DataFrame:
    """One line a member: good answers and gain over the base by topic, outside help, tokens, minutes.

    Of the last round, at the first temperature.
    """
    lines: dict[str, dict] = {}
    first = table["temperature"].dropna().min()
    quality = select(table, metric="good answers", temperature=first)
    for row in quality.itertuples(index=False):
        line = lines.setdefault(row.model, {})
        what = f"{row.questions}: " + ("gain" if row.against else "good answers")
        line[what] = f"{in_words(row)} (n = {row.n:,})"  # later rounds overwrite earlier ones
    for entry in entries:
        line = lines[entry.label]
        line["outside help"] = entry.member.help or "none"
        for metric in ("tokens written", "tokens trained on", "minutes"):
            [row] = select(table, model=entry.label, metric=metric).itertuples(index=False)
            line[metric] = f"{row.value:,.0f}" if row.unit == "tokens" else f"{row.value:.1f}"
    return pd.DataFrame.from_dict(lines, orient="index").fillna("").rename_axis("member")


def rules(table: pd.DataFrame) -> pd.DataFrame:
    """One line a stopping rule: how often it was right, and how often it stopped."""
    found = select(table, metric="right to stop or go on").itertuples(index=False)
    lines = [(row.model, in_words(row), row.n, row.note) for row in found]
    return pd.DataFrame(lines, columns=["rule", "right", "decisions", "remark"])


def searches(entries: list[Entry]) -> str:
    """What was searched for each member, and what was chosen, in a sentence each."""
    lines = [
        f"{entry.label}: {key} = {entry.chosen[key]}, of {', '.join(map(str, values))}."
        for entry in entries
        for key, values in entry.member.search.items()
    ]
    return "Searched on dev questions, with a seed of its own: " + " ".join(lines)
