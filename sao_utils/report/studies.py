"""The table of a study: what each member gained, what outside help it had, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pandas as pd

from sao_utils.disk import write_whole
from sao_utils.methods.studies import Entry, Study, run_study
from sao_utils.report import figures
from sao_utils.report.break_even import break_even_rows
from sao_utils.report.rounds import answers_of, pair_rows, quality_rows, rows_by_seed
from sao_utils.report.stopping import decisions, stopping_rows
from sao_utils.report.table import as_csv, as_json, make_row, make_table, select
from sao_utils.report.words import NOT_COMPARABLE, decoding, in_words, markdown, show
from sao_utils.statistics.intervals import clustered_difference, exact
from sao_utils.store import Run
from sao_utils.training.fit import read_done

BREAK_EVEN = (
    "How often a judge must be right for a round to gain: where the least-squares line through gain over "
    "accuracy, a point a member and seed, crosses zero. The interval is a bootstrap over the points; the "
    "questions are held fixed."
)
PRICE = ("tokens written", "tokens trained on", "minutes")
EVALUATION = (
    "answers",
    "comparisons",
    "tasks",
    "base_verdicts",
)  # stages that are the same for all members


def study_table(study: Study, home: Run) -> pd.DataFrame:
    """Run what is missing of a study, and write its tables and figures into the folders of `home`.

    Returns:
        The table of results, with section "study" and each member's label as `model`.
    """
    entries, rows, decided, answered = [], [], [], {}
    for entry in run_study(study, home):
        entries.append(entry)
        answers = answers_of(entry.run, entry.trained)
        rows += list(_rows(study, entry, answers, with_base=len(entries) == 1))
        if study.claims:
            last = entry.run.recipe.rounds
            answered[entry.label] = [row for row in answers if row["round"] == last]
            rows += list(_differences(study, entry, answered))
        if study.stopping:
            first = entry.run.recipe.evaluation.temperatures[0]
            greedy = [row for row in answers if row["temperature"] == first]
            made = decisions(entry.run, entry.trained, greedy)
            decided += [{**row, "member": entry.label} for row in made]
        table = make_table([*rows, *stopping_rows(decided)])
        if study.break_even:
            table = make_table([*table.to_dict("records"), *break_even_rows(table)])
        _write(study, home, entries, table)  # what there is so far
    return table


def _rows(study: Study, entry: Entry, answers: list[dict], with_base: bool) -> Iterator[dict]:
    """The rows of one member; those of the base only `with_base`, since they are the same for all."""
    run, name = entry.run, entry.run.recipe.method
    found = [*quality_rows(run, answers), *pair_rows(run, entry.trained)]
    if study.break_even:
        how = "orders must agree" if run.recipe.pairs.require_consistent else "all pairs"
        by_seed = (rows_by_seed(run, one, answers) for one in entry.trained)
        found += [{**row, "note": how} for rows in by_seed for row in rows]
    for row in found:
        if row["model"] == "base" and not with_base:
            continue
        label = entry.label if row["model"] == name else row["model"]
        yield {**row, "section": "study", "model": label}
    written, read, seconds = _price(run)
    names = {"model": entry.label, "round": run.recipe.rounds}
    for metric, value in zip(PRICE, (written, read, seconds / 60)):
        if study.share and metric != "tokens trained on":
            continue  # otherwise the member that made the rows first would pay for all
        yield make_row("study", metric, exact(value, 1), **names)


def _differences(study: Study, entry: Entry, answered: dict[str, list]) -> Iterator[dict]:
    """Differences between the two members of each claim, paired by seed, once both have been run."""
    pairs = [(of.model, of.against) for of in study.claims if entry.label in (of.model, of.against)]
    settings = entry.run.recipe.evaluation
    for model, against in dict.fromkeys(pairs):
        if not answered.keys() >= {model, against}:
            continue
        for temperature in settings.temperatures:
            of, other = (
                {
                    (row["seed"], row["question_id"]): row
                    for row in answered[name]
                    if row["good"] is not None and row["temperature"] == temperature
                }
                for name in (model, against)
            )
            keys = [key for key in of if key in other]
            if not keys:
                continue
            found = clustered_difference(
                [of[key]["good"] for key in keys],
                [other[key]["good"] for key in keys],
                [of[key]["combination"] for key in keys],
                settings.bootstrap,
                runs=[of[key]["seed"] for key in keys],
            )
            where = {"questions": "all", "temperature": temperature, "judge": "oracle"}
            names = {"model": model, "against": against, "round": entry.run.recipe.rounds}
            yield make_row("study", "good answers", found, "points", **names, **where)


def _price(run: Run) -> tuple[int, int, float]:
    """The tokens written, the tokens trained on, and the seconds; all without evaluation."""
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
    write_whole(folder / "results.md", _in_text(study, home, table, entries))
    drawn = {study.name: figures.study(table, study.about, reported(study), study.measure)}
    if study.stopping:
        drawn["stopping"] = figures.stopping(table)
    if study.break_even:
        drawn["accuracy"] = figures.break_even(table)
    for name, figure in drawn.items():
        figures.save(home, name, figure)


def _in_text(study: Study, home: Run, table: pd.DataFrame, entries: list[Entry]) -> str:
    """The results of a study so far, in Markdown."""
    parts = [f"# {study.about}", markdown(members(study, table).reset_index())]
    parts += [answer(table)]
    parts += [f"The paper: {study.paper}"] if study.paper else []
    parts += [markdown(agreement(study, table))] if study.claims else []
    parts += [searches(entries)] if any(entry.chosen for entry in entries) else []
    if study.stopping:
        parts += [
            "Rules that need no oracle, and how often they were right:",
            markdown(rules(table)),
        ]
    if study.break_even:
        parts += [BREAK_EVEN, markdown(show(select(table, metric="break-even accuracy")))]
    parts += [NOT_COMPARABLE] if home.recipe.model.path == "tiny" else []
    return "\n\n".join(parts) + "\n"


def reported(study: Study) -> dict[str, float]:
    """The paper's numbers that a study's claims are about, in percent, by the paper's own names."""
    return {
        name: value
        for claim in study.claims
        for name, value in zip(claim.theirs or (claim.model, claim.against), claim.reported)
    }


def members(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """One row per member: good answers and gain over the base by topic, pairs, outside help, the price.

    All are of the last round; good answers and win rate at the first temperature, gains at all of them. The
    win rate is judged by the base, unless its cell names another judge.
    """
    lines: dict[str, dict] = {}
    first = table["temperature"].dropna().min()
    quality = select(table, metric="good answers", against=(None, "base"), seed=None)
    for row in quality.itertuples(index=False):
        line = lines.setdefault(row.model, {})
        if row.against or row.temperature == first:
            what = f"{row.questions}: " + ("gain" if row.against else "good answers")
            what += "" if row.temperature == first else f", {decoding(row.temperature)}"
            line[what] = f"{in_words(row)} (n = {row.n:,})"  # later rounds overwrite earlier ones
    signs = select(table, metric=("win rate", "chosen is better", "repeated prompts"))
    for row in signs.itertuples(index=False):
        judge = study.members[row.model].set.get("judge.path") if row.judge == "self" else None
        by = f" ({judge} judges)" if judge and row.metric == "win rate" else ""
        lines.setdefault(row.model, {})[row.metric] = in_words(row) + by
    there = [(label, of) for label, of in study.members.items() if label in lines]
    for label, member in there:
        lines[label]["outside help"] = member.help or "none"
        for row in select(table, model=label, metric=PRICE).itertuples(index=False):
            text = f"{row.value:,.0f}" if row.unit == "tokens" else f"{row.value:.1f}"
            lines[label][row.metric] = text
    return pd.DataFrame.from_dict(lines, orient="index").fillna("").rename_axis("member")


def answer(table: pd.DataFrame) -> str:
    """A sentence that says, for each temperature, which member gained most and which least."""
    gains = select(table, metric="good answers", against="base", questions="all", seed=None)
    gains = gains.drop_duplicates(["model", "temperature"], keep="last")  # of the last round
    found = []
    for temperature in gains["temperature"].unique():
        rows = select(gains, temperature=temperature).sort_values("value")
        named = [f"{row.model} ({in_words(row)})" for row in rows.itertuples(index=False)]
        found.append(f"{decoding(temperature)}: most by {named[-1]}, least by {named[0]}")
    return "Gained over the base, " + "; ".join(found) + "." if found else "Nothing is known yet."


def agreement(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and temperature: our difference, the paper's two numbers, whether the signs agree.

    "open" means that our interval contains 0 at this temperature.
    """
    lines = []
    for claim in study.claims:
        both = {"model": claim.model, "against": claim.against, "questions": "all", "seed": None}
        found = select(table, metric="good answers", **both)
        high, low = claim.reported
        names = f"{claim.theirs[0]} - {claim.theirs[1]}, " if claim.theirs else ""
        for row in found.itertuples(index=False):
            same = "yes" if row.value * (high - low) > 0 else "no"
            open_ = not (row.low > 0 or row.high < 0)
            lines.append(
                {
                    "what": f"{claim.model} - {claim.against}",
                    "decoding": decoding(row.temperature),
                    "here": in_words(row),
                    "paper": f"{high:g} - {low:g} ({names}{claim.source})",
                    "same direction": "open" if open_ else same,
                }
            )
    columns = ["what", "decoding", "here", "paper", "same direction"]
    return pd.DataFrame(lines, columns=columns)


def rules(table: pd.DataFrame) -> pd.DataFrame:
    """One row per stopping rule: how often it was right, and how often it stopped."""
    found = select(table, metric="right to stop or go on").itertuples(index=False)
    lines = [(row.model, in_words(row), row.n, row.note) for row in found]
    return pd.DataFrame(lines, columns=["rule", "right", "decisions", "remark"])


def searches(entries: list[Entry]) -> str:
    """What was searched for each member, and which value was chosen, in one sentence each."""
    lines = [
        f"{entry.label}: {key} = {entry.chosen[key]}, of {', '.join(map(str, values))}."
        for entry in entries
        for key, values in entry.member.search.items()
    ]
    return "Searched on dev questions, with a seed of its own: " + " ".join(lines)
