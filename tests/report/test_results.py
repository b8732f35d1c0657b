"""The tidy table of a small run of the whole loop, the files made of it, and runs that are too small."""

import csv
import json
import math
from pathlib import Path

import pytest

from sao_utils.evaluation import task_differences
from sao_utils.evaluation.leakage import OVERLAPS, question_sets
from sao_utils.evaluation.tasks import score_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.report import leakage, tables
from sao_utils.report.results import SECTIONS, judge_matrix, results, write_tables
from sao_utils.report.sections import compared
from sao_utils.report.table import COLUMNS, make_row, make_table, read_table, select, value_of
from sao_utils.report.words import NOT_COMPARABLE, in_words
from sao_utils.stages.overlap import words
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run, open_run

QUICK = {
    "prompts.count": 60,
    "training.token_budget": 4096,
    "evaluation.questions": "dev",
    "evaluation.per_combination": 1,
    "evaluation.bootstrap": 200,
    "evaluation.temperatures": [0.0],
    "evaluation.max_new_tokens": 48,
    "evaluation.benchmarks": ["tiny_alpaca", "tiny_mt"],
    "evaluation.benchmark_limit": 12,
    "evaluation.tasks": [],
    "arms": ["self"],
}


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAO_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield open_run("tiny", "loop", QUICK)


@pytest.fixture(scope="module")
def written(loop):
    return write_tables(loop)


def changed(run, section="evaluation", **values):
    """The same run with another recipe, as if it had been opened anew."""
    part = getattr(run.recipe, section).model_copy(update=values)
    return Run(run.recipe.model_copy(update={section: part}), run.folder)


@pytest.fixture
def with_tasks(loop):
    """The same run, whose recipe also names two tasks of 14 items."""
    folder = Path(tables.__file__).parents[1] / "tiny" / "tasks"
    files = tuple(str(folder / f"tiny_{name}.yaml") for name in ("facts", "myths"))
    return changed(loop, tasks=files, task_limit=14, benchmarks=("tiny_mt",))


# ---------------------------------------------------------------------- the table


def test_each_number_of_the_table_says_what_it_is_of_and_is_there_once(written):
    assert list(written.columns) == COLUMNS
    assert set(written["section"]) == set(SECTIONS) - {"task"}
    names = COLUMNS[: COLUMNS.index("value")]
    assert not written[names].astype(str).duplicated().any()
    for row in written.itertuples(index=False):
        assert row.n > 0 and math.isfinite(row.value), row
        assert math.isnan(row.low) or row.low <= row.value <= row.high, row
        if row.unit == "%":
            assert -1e-9 <= row.value <= 1 + 1e-9
        if row.section in ("quality", "flaws", "win rate", "comparison", "benchmark"):
            assert row.judge, row


def test_values_are_those_of_the_answers_and_verdicts(loop, written):
    answers = evaluate.answers(loop)
    for model in ("base", "self"):
        good = [row["good"] for row in answers if row["model"] == model]
        found = value_of(written, section="quality", model=model)
        assert (found.value, found.n) == (pytest.approx(sum(good) / len(good)), len(good))
    gain = value_of(written, section="quality", model="self", against="base")
    of = {m: value_of(written, section="quality", model=m).value for m in ("base", "self")}
    assert gain.value == pytest.approx(of["self"] - of["base"]) and gain.unit == "points"
    wins = [row["win"] for row in evaluate.comparison(loop, "self", "base")]
    rate = value_of(written, section="win rate", metric="win rate", model="self", against="base")
    assert rate.value == pytest.approx(sum(wins) / len(wins))


def test_several_seeds_have_a_difference_each_and_one_over_all(loop):
    answers = [
        {"model": m, "seed": s, "temperature": 0.0, "question_id": q, "combination": q}
        | {"good": int(q) % (3 if m == "base" else 5 + s) > 0}
        for m, s in (("base", None), ("self", 0), ("self", 1))
        for q in map(str, range(40))
    ]
    run = Run(loop.recipe.model_copy(update={"seeds": (0, 1)}), loop.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "answers", lambda run, models, temperatures: answers)
        table = make_table(SECTIONS["quality"](run))
    gains = select(table, model="self", against="base")
    assert gains["seed"].tolist() == [None, 0, 1] and gains["n"].tolist() == [80, 40, 40]
    mean = gains["value"].tolist()
    assert mean[0] == pytest.approx((mean[1] + mean[2]) / 2)


def test_a_run_without_the_arm_self_shows_its_arms_and_compares_no_judges(with_tasks):
    run = Run(with_tasks.recipe.model_copy(update={"arms": ("random",)}), with_tasks.folder)
    found = results(run, "comparison", "win rate", "task", "benchmark")
    assert select(found, section="comparison").empty
    assert set(select(found, section=["task", "benchmark"])["model"]) == {"base", "random"}


def test_benchmarks_and_tasks_leave_the_controls_out_and_take_other_models(loop):
    update = {"arms": ("self", "random"), "others": {"self-like": loop.recipe.model}}
    run = Run(loop.recipe.model_copy(update=update), loop.folder)
    assert [candidate.name for candidate in compared(run)] == ["base", "self", "self-like"]


# ---------------------------------------------------------------------- leakage


def trained_on(monkeypatch, prompts):
    monkeypatch.setattr(leakage, "training_prompts", lambda run: prompts)


def test_a_question_that_was_trained_on_is_found_and_left_out(loop, monkeypatch):
    run = changed(loop, benchmarks=())
    asked = question_sets(run)["dev"]
    trained_on(monkeypatch, ["What is this?", *asked[:30]])
    table = make_table(SECTIONS["leakage"](run))
    share = value_of(table, metric="overlap (same words)")
    assert (share.value, share.n) == (30 / len(asked), len(asked))
    without = select(table, questions="dev without overlap (same words)")
    assert without["metric"].tolist() == ["good answers", "win rate"]
    assert set(without["n"]) == {len(asked) - 30}
    (found,) = leakage.overlaps(run)[:1]
    assert [match["question"] for match in found["matches"]] == asked[:30]
    trained_on(monkeypatch, asked[3:])
    few = make_table(SECTIONS["leakage"](run))
    assert few["metric"].str.startswith("overlap").all()  # too few are left for any result


def test_a_task_counts_with_and_without_the_items_that_were_trained_on(with_tasks, monkeypatch):
    base = sao.candidates(with_tasks, ["base"])
    asked = question_sets(with_tasks, score_tasks(with_tasks, base))
    assert list(asked) == ["dev", "tiny_mt", "tiny_facts", "tiny_myths"]
    trained_on(monkeypatch, ["What is this?", *asked["tiny_facts"][:3]])
    table = make_table(SECTIONS["leakage"](with_tasks))
    assert value_of(table, metric="overlap (same words)", questions="tiny_facts").value == 3 / 14
    names = {"model": "self", "against": "base"}
    facts, myths = (
        value_of(table, questions=f"tiny_{name} without overlap (same words)", **names)
        for name in ("facts", "myths")
    )
    assert (facts.n, myths.n) == (11, 14)
    scores = score_tasks(with_tasks, sao.candidates(with_tasks, ["base", "self"]))
    changes = {row["task"]: row["difference"] for row in task_differences.differences(scores)}
    assert myths.value == changes["tiny_myths"].value  # nothing of it was left out
    grade = value_of(table, questions="tiny_mt without overlap (same words)", metric="score")
    assert grade.unit == "of 10" and grade.judge == "oracle"


# ---------------------------------------------------------------------- files, and the paper's tables


def test_no_nan_leaks_into_a_file_and_all_of_them_hold_the_same_numbers(loop, written):
    folder = loop.folder / "tables"

    def refuse(constant):
        raise AssertionError(f"{constant} in results.json")

    stored = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    read = list(csv.DictReader((folder / "results.csv").open(newline="")))
    assert len(stored) == len(read) == len(written) == len(read_table(loop.folder))
    assert select(read_table(loop.folder), section="leakage")["low"].isna().any()
    for name in ("results.md", "benchmarks.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "nan" not in text.split() and NOT_COMPARABLE in text
        for table in text.split("\n\n"):
            columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
            assert len(columns) <= 1, "a cell breaks a table"
    assert (folder / "recipe.yaml").read_text() == (loop.folder / "recipe.yaml").read_text()
    leaks = list(csv.DictReader((folder / "leakage.csv").open(newline="")))
    assert {row["by"] for row in leaks} == set(OVERLAPS)
    for row in leaks:
        assert int(row["overlapping"]) <= int(row["items"]) and row["set"]
        assert not row["shared"] or row["shared"] in " ".join(words(row["question"]))


def test_every_trained_model_has_its_results_in_its_card(loop, written):
    text = (loop.folder / "adapters" / "self-0" / "README.md").read_text()
    assert "| good answers, greedy | self-judged pairs |" in text


def test_the_papers_tables_have_a_row_a_model_reported_and_ours_and_say_what_is_missing(
    loop, written
):
    made = {name: tables.paper_table(loop, written, name) for name in tables.TABLES}
    by = "AlpacaEval 2.0: length-controlled win rate, by GPT-4-Turbo-1106 (%)"
    reported = made["Table 1"].reported
    assert sorted(reported.index) == sorted(tables.MODELS)
    assert reported[by].loc["Gemma-2-9B-it"].to_dict() == {"base": "51.1", "SAO 60k": "69.2"}
    assert made["Table 2"].ours.empty and tables.HOW in made["Table 2"]._repr_markdown_()
    # What is ours has its judge and n in the heading, an interval in each cell, and a mark where it was
    # measured otherwise, which the footnotes explain.
    for name in ("Table 1", "Figure 2", "Figure 3f judge"):
        ours, notes = made[name].ours, made[name].notes
        assert ours.index.tolist() == ["tiny, self-judged pairs"]
        for (what, which), cells in ours.items():
            assert which in ("base", "tuned") and ", by " in what and ", n = " in what
            assert what.split("\u00a0")[1] in {note.split()[0] for note in notes}
            assert cells.str.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]").all()
    base = value_of(written, section="benchmark", metric="win rate", model="base")
    assert made["Table 1"].ours.iloc[0, 0] == in_words(base).removesuffix(" %")


def test_a_remark_that_not_all_models_have_names_those_that_do(loop):
    rows = [
        make_row("task", "acc", Interval(0.5, 0.4, 0.6, 9), model=name, questions="arc", note=note)
        for name, note in (("base", ""), ("self", "one remark; doubtful: another"))
    ]
    made = tables.paper_table(loop, make_table(rows), "Table 2")
    whose = "(self-judged pairs)"
    assert made.notes == [f"¹ one remark {whose}", f"² doubtful: another {whose}"]
    assert made.ours.columns.tolist() == [
        ("arc: acc (%, n = 9)\u00a0¹\u00a0²", which) for which in ("base", "tuned")
    ]


def test_verdicts_fall_into_a_matrix_of_truth_and_judge():
    def verdict(quality, outcome, margin):
        return {"quality": quality, "outcome": outcome, "margin": margin}

    found = judge_matrix(
        [
            verdict([0, -1], "consistent", 2.0),
            verdict([0, -1], "consistent", -2.0),
            verdict([-1, 0], "inconsistent", 0.5),
            verdict([0, 0], "tie", 0.0),
            verdict(None, "consistent", 1.0),
            verdict([0, 0], "identical", None),
        ]
    )
    assert found.values.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


# ---------------------------------------------------------------------- too small to estimate


@pytest.mark.parametrize("outcome", ["tie", "identical", "invalid"])
def test_verdicts_that_decide_nothing_leave_a_table(loop, monkeypatch, outcome):
    margin, win = (0.0, 0.5) if outcome == "tie" else (None, None if outcome == "invalid" else 0.5)
    even = {"outcome": outcome, "win": win, "mass": 1.0}
    even |= dict.fromkeys(("margin", "margin_12", "margin_21"), margin)
    made = {name: evaluate.comparison(loop, "self", "base", name) for name in ("self", "tuned")}
    monkeypatch.setattr(
        evaluate, "comparison", lambda run, a, b, judge="self": [r | even for r in made[judge]]
    )
    verdicts = [row | even for row in sao.rows(loop, "verdicts")]
    monkeypatch.setattr(sao, "rows", lambda run, stage: verdicts)
    for section in ("judge", "win rate", "comparison"):
        for row in make_table(SECTIONS[section](loop)).itertuples():
            assert math.isfinite(row.value) or row.note, row
