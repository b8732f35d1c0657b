"""What leaks, and the paper's tables with a run's rows beneath, on a small run of the whole loop."""

import csv
import json
import math
from pathlib import Path

import pytest

from sao_utils import store as rows
from sao_utils.evaluation import leakage
from sao_utils.evaluation import tasks as harness
from sao_utils.report import results, tables
from sao_utils.stages import overlap
from sao_utils.statistics.intervals import Interval
from sao_utils.statistics.length_control import length_controlled_win_rate, length_curve

QUICK = {
    "personas.count": 60,
    "evaluation.questions": "dev",
    "evaluation.per_combination": 1,
    "evaluation.bootstrap": 200,
    "evaluation.temperatures": [0.0],
    "evaluation.max_new_tokens": 48,
    "evaluation.benchmarks": ["tiny_alpaca", "tiny_mt"],
    "evaluation.benchmark_limit": 12,
    "evaluation.harness": [],
    "arms": ["self"],
}


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAO_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield rows.open_run("tiny", "leaks", QUICK)


# ---------------------------------------------------------------------- overlap


@pytest.mark.parametrize(
    "question, found",
    [
        ("Where do I go, and whom do I ask, to learn to sail in the bay this year?", 4),
        ("where do i go and whom do i ask to learn to sail in the bay this year", 4),
        ("Where do I go, and whom do I ask, to learn to sail in the bay next spring?", 3),
        ("Tell me: whom do I ask to learn to sail in the bay? I am told it is hard work.", 1),
        ("What may I bake for a guest who eats no eggs?", 0),
    ],
)
def test_definitions_of_overlap_go_from_strict_to_wide(question, found):
    trained = [
        "I like tea.",
        "Where do I go, and whom do I ask, to learn to sail in the bay this year?",
    ]
    hits = {by: find([question], trained)[0] for by, find in leakage.OVERLAPS.items()}
    assert [by for by, hit in hits.items() if hit] == list(leakage.OVERLAPS)[4 - found :]
    for hit in filter(None, hits.values()):
        assert hit[0] == 1 and hit[1] in " ".join(overlap.words(question))


def test_a_question_that_was_trained_on_is_found_and_left_out(loop, monkeypatch):
    asked = leakage.question_sets(loop)["dev"]
    monkeypatch.setattr(leakage, "training_prompts", lambda run: ["What is this?", *asked[:30]])
    of = {row["by"]: row for row in results.leakage_effect(loop, benchmarks=False)}
    same = of["same words"]
    assert [match["question"] for match in same["matches"]] == asked[:30]
    assert same["items"] == len(asked) and same["share"] == 30 / len(asked)
    for on_all, without in same["effect"].values():
        assert on_all.n == len(asked) and without.n == len(asked) - 30
    assert tables.leakage_frame([same])["overlapping"][0].startswith(f"30 of {len(asked)} (")
    monkeypatch.setattr(leakage, "training_prompts", lambda run: asked[3:])
    few = results.leakage_effect(loop, benchmarks=False)[0]
    assert few["effect"] and all(without is None for _, without in few["effect"].values())
    assert set(tables.leakage_frame([few])["without the overlapping"]) == {"too few left"}


@pytest.fixture
def examined(loop):
    """The same run, whose recipe also names two exams of 14 items."""
    tasks = Path(results.__file__).parents[1] / "tiny" / "tasks"
    exams = tuple(str(tasks / f"tiny_{name}.yaml") for name in ("facts", "myths"))
    settings = {"harness": exams, "harness_limit": 14, "benchmarks": ("tiny_mt",)}
    evaluation = loop.recipe.evaluation.model_copy(update=settings)
    return rows.Run(loop.recipe.model_copy(update={"evaluation": evaluation}), loop.folder)


def test_an_exam_counts_with_and_without_the_items_that_were_trained_on(examined, monkeypatch):
    asked = leakage.question_sets(examined)
    assert list(asked) == ["dev", "tiny_mt", "tiny_facts", "tiny_myths"]
    known = asked["tiny_facts"][:3]
    monkeypatch.setattr(leakage, "training_prompts", lambda run: ["What is this?", *known])
    by_set = {
        row["set"]: row for row in results.leakage_effect(examined) if row["by"] == "same words"
    }
    facts = by_set["tiny_facts"]
    assert [match["question"] for match in facts["matches"]] == known and facts["items"] == 14
    on_all, without = facts["effect"]["gain"]
    assert (on_all.n, without.n) == (14, 11)
    (scored,) = (
        of for of in harness.differences(harness.score(examined)) if of["task"] == "tiny_facts"
    )
    assert on_all == scored["difference"]
    for name in ("tiny_myths", "tiny_mt"):
        for whole, same in by_set[name]["effect"].values():
            assert whole == same
    assert "oracle.score" in by_set["tiny_mt"]["effect"]
    told = tables.write(examined, results.scores(examined))
    assert {row["benchmark"] for row in told if row["by"] == "run"} >= {"tiny_facts", "tiny_myths"}
    with open(examined.folder / "tables" / "leakage_effect.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    (line,) = (r for r in kept if (r["set"], r["by"]) == ("tiny_facts", "same words"))
    assert (line["overlapping"], line["result"], line["n"], line["n_without"]) == (
        "3", "gain", "14", "11",
    )  # fmt: skip
    assert float(line["value_without"]) == pytest.approx(without.value)


def test_other_models_stand_beside_base_and_tuned_in_the_table_of_exams(examined):
    twin = {"twin": examined.recipe.model}  # the same weights: what the base knows
    run = rows.Run(examined.recipe.model_copy(update={"others": twin}), examined.folder)
    told = [row for row in tables._of_harness(run, "Table 2") if row["benchmark"] == "tiny_facts"]
    names = [tables._model(run, name) for name in ("base", "self", "twin")]
    assert [row["model"] for row in told] == names
    base, _, twin = told
    for part in ("value", "low", "high", "n"):
        assert base[part] == twin[part]
    assert twin["protocol"].endswith("change inside the noise")
    assert set(results.harness_scores(run)) == set(results.harness_scores(examined))


def test_a_run_without_the_arm_self_shows_its_arms_and_compares_no_judges(examined, monkeypatch):
    monkeypatch.setenv("SAO_RESULTS", str(examined.folder.parent))
    arms = {"arms": ("random", "sft_random")}
    run = rows.Run(examined.recipe.model_copy(update=arms), examined.folder)
    assert results.several_judges(run) == results.contest_scores(run) == {}
    assert not results.is_control(run, "random") and results.is_control(examined, "self") is False
    exams = [row["model"] for row in tables._of_harness(run, "Table 2")]
    assert exams == 2 * ["tiny, base", "tiny, random"] + 2 * ["tiny, sft_random"]
    assert any(".random." in key for key in results.benchmark_scores(run))


def test_rates_at_a_first_temperature_that_is_not_greedy_have_the_keys_that_notebooks_ask_for(loop):
    evaluation = loop.recipe.evaluation.model_copy(update={"temperatures": (0.6,)})
    run = rows.Run(loop.recipe.model_copy(update={"evaluation": evaluation}), loop.folder)
    begin = results.good_rate_key(0.6)
    assert set(results.good_rates(run)) == {f"{begin}.{name}" for name in ("base", "tuned", "gain")}
    assert begin != results.good_rate_key(0.0) == "oracle_good_rate"


def test_training_prompts_are_those_that_came_to_be_pairs(loop):
    from sao_utils.stages.pairs import build_pairs

    kept = {
        row["prompt"][0]["content"]
        for row in build_pairs(loop, "self", 0)
        if row["discarded"] is None
    }
    assert set(leakage.training_prompts(loop)) == kept and kept


def test_without_an_overlap_a_result_stays_what_it_is(loop, monkeypatch):
    monkeypatch.setattr(leakage, "training_prompts", lambda run: ["Nothing of the kind."])
    for row in results.leakage_effect(loop):
        assert row["matches"] == [] and row["effect"]
        assert all(on_all == without for on_all, without in row["effect"].values())


def test_what_leaks_is_looked_for_once_for_all_tables(loop, monkeypatch):
    leaks = results.leakage_effect(loop, benchmarks=False)
    monkeypatch.setattr(results, "leakage", None)  # not called again
    found = results.write_tables(loop, leaks)
    tables.write(loop, found, leaks)
    shares = [key for key in found if key.startswith("leakage.") and key.endswith(".share")]
    assert len(shares) == len(leaks) == len(leakage.OVERLAPS)
    with open(loop.folder / "tables" / "leakage.csv", newline="") as file:
        assert {row["by"] for row in csv.DictReader(file)} == set(leakage.OVERLAPS)


# ---------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def written(loop):
    found = results.write_tables(loop)
    return found, tables.write(loop, found)


def test_every_table_of_the_paper_has_reported_and_live_rows_and_says_what_is_missing(
    loop, written
):
    _, made = written
    for table in tables.TABLES:
        mine = [row for row in made if row["table"] == table]
        assert [row for row in mine if row["by"] == "paper"], table
        ours = [row for row in mine if row["by"] == "run"]
        if table != "Table 2":  # no exams in this run
            assert any(row["value"] is not None for row in ours), table
        assert any(tables.shown(row) == "not measured" for row in ours), table
    missing = {row["benchmark"]: row for row in made if row["value"] is None}
    assert "evaluation.benchmarks" in missing["alpaca_eval"]["protocol"]
    assert "evaluation.harness" in missing["leaderboard"]["protocol"]


def test_what_is_ours_has_judge_interval_n_and_a_mark_where_the_protocol_differs(written):
    found, made = written
    ours = [row for row in made if row["by"] == "run" and row["value"] is not None]
    for row in ours:
        assert row["n"] > 0 and row["differs"] and tables.shown(row).endswith("†")
        if row["metric"] != "repetition_rate":  # a property of the whole set
            assert row["low"] <= row["value"] <= row["high"] and row["judge"]
    rate = next(row for row in ours if row["metric"] == "self_win_rate")
    assert rate["value"] == pytest.approx(100 * found["self_win_rate"].value, abs=1e-3)
    grade = next(row for row in ours if row["benchmark"] == "tiny_mt")
    assert grade["unit"] == "of 10" and 1 <= grade["value"] <= 10 and grade["judge"] == "oracle"


def test_the_papers_figures_are_those_reported_without_a_mark(written):
    _, made = written
    paper = [row for row in made if row["by"] == "paper"]
    told = {(row["table"], row["model"], row["judge"], row["metric"]): row for row in paper}
    sao = told["Table 1", "Gemma-2-9B-it SAO 60k", "GPT-4-Turbo-1106", "lc_win_rate"]
    assert tables.shown(sao) == "69.2 %" and sao["n"] is None and sao["protocol"] == "as reported"
    assert tables.shown(told["Figure 2", "Gemma-2-9B-it base", "GPT-4o-mini", "score"]) == (
        "7.09 of 10"
    )


def test_no_nan_leaks_into_a_file_and_each_number_is_there_once(loop, written):
    found, made = written
    folder = loop.folder / "tables"

    def refuse(constant):
        raise AssertionError(f"{constant} in results.json")

    stored = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    assert set(stored) == set(found)
    for key in ("contest.self_vs_base.self.win_rate", "contest.self_vs_base.self_and_tuned.kappa",
                "benchmark.tiny_alpaca.self.self.win_rate", "leakage.dev.same_words.share"):  # fmt: skip
        assert stored[key]["n"] > 0
    assert stored["leakage.dev.same_words.share"]["low"] is None
    with open(folder / "benchmarks.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(made) and not any("nan" in row.values() for row in read)
    text = (folder / "benchmarks.md").read_text(encoding="utf-8")
    assert "nan" not in text.split() and results.NOT_COMPARABLE in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1, "a cell breaks a table"
    with open(folder / "leakage.csv", newline="", encoding="utf-8") as file:
        leaks = list(csv.DictReader(file))
    for row in leaks:
        assert int(row["overlapping"]) <= int(row["items"]) and row["set"] and row["by"]
        assert not row["shared"] or row["shared"] in " ".join(overlap.words(row["question"]))


def test_units_and_words_of_results():
    assert results.unit("benchmark.tiny_mt.self.oracle.score.turn_1") == "of 10"
    assert results.unit("benchmark.tiny_arena.self.self.score") == "%"
    assert results.unit("benchmark.tiny_mt.self.a~b.kappa") == ""
    assert results.unit("harness.tiny_facts.gain") == "points"
    assert results.unit("leakage.test.13_words_in_a_row.share") == "%"
    grade = Interval(6.0751, 5.7, 6.41, 80)
    assert results.in_words("benchmark.tiny_mt.base.oracle.score", grade) == "6.08 [5.70, 6.41]"
    needed = {"value": 400.2, "low": 90, "high": None, "n": 9}  # as results.json has it
    key = "contest.a_vs_b.self.prompts_needed"
    assert results.in_words(key, needed) == "400 [90, no end]"
    endless = Interval(math.inf, 90, math.inf, 9)
    assert results.in_words(key, endless) == "no end [90, no end]"


def test_reported_numbers_that_are_not_there_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="checkout"):
        tables.reported("unknown")


# ---------------------------------------------------------------------- the curve of length control


def test_the_curve_of_length_control_passes_through_the_length_controlled_win_rate():
    longer = [-9.0, -4, -2, 0, 1, 3, 5, 8, 12, 20] * 6
    wins = [float(k % 3 == 0 or d > 6 and k % 5 > 0) for k, d in enumerate(longer)]
    at_zero, far = length_curve(wins, longer, [0, 30])
    rate = length_controlled_win_rate(wins, longer, list(range(len(wins))))
    assert at_zero == pytest.approx(rate.value) and far > at_zero
    assert length_curve([1.0, 1.0, 1.0], [1, 2, 3], [0]) == []  # nothing but wins
    assert length_curve([0.0, 0.0, 1.0, 1.0], [1, 2, 3, 4], [0]) == []  # length alone decides
    assert length_curve([0.0, 1.0, 1.0], [2, 2, 2], [0]) == []  # all of one length


def test_another_model_is_not_taken_for_a_control_or_for_the_runs_own(results):
    others = {"oracle-large": {"path": "tiny"}}
    run = rows.open_run("tiny", "names", {"others": others})
    names = ("base", "self", "self-1", "oracle", "oracle-1", "sft_random", "oracle-large")
    from sao_utils.report.results import is_control

    assert [name for name in names if is_control(run, name)] == ["oracle", "oracle-1", "sft_random"]
    assert tables._model(run, "oracle-large") == "tiny (oracle-large)"
    assert tables._model(run, "self") == "tiny, self-judged"
