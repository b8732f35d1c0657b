"""Evaluation and the tables, on a small run of the whole loop with the embedded model."""

import json

import pytest

from sao_utils import store as rows
from sao_utils.evaluation import answers as evaluation
from sao_utils.evaluation import comparisons as contests
from sao_utils.report import results

QUICK = {
    "personas.count": 40,
    "evaluation.questions": "dev",
    "evaluation.per_combination": 1,
    "evaluation.bootstrap": 200,
    "evaluation.benchmarks": [],  # see tests/test_results.py
    "evaluation.harness": [],
    "arms": ["self", "sft_random"],
    "others": {"twin": {"path": "tiny", "dtype": "auto"}},  # the base model under another name
}


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAO_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield rows.open_run("tiny", "loop", QUICK)


def test_test_questions_are_enough_and_apart_from_the_dev_questions():
    test, dev = (
        evaluation.questions(rows.Run(_recipe(questions=name), None)) for name in ("test", "dev")
    )
    assert len(test) >= 800 and len({q["combination"] for q in test}) >= 200
    assert not {q["combination"] for q in test} & {q["combination"] for q in dev}
    assert len({q["id"] for q in test}) == len(test)


def _recipe(**changes):
    from sao_utils.recipes import load_recipe

    return load_recipe("tiny", {f"evaluation.{key}": value for key, value in changes.items()})


def test_every_model_answers_every_question_at_every_temperature(loop):
    answers = evaluation.answer(loop)
    asked = evaluation.questions(loop)
    assert len(answers) == 4 * 2 * len(asked) and len({a["id"] for a in answers}) == len(answers)
    for row in answers:
        assert row["good"] == (row["quality"] == 0)


def test_duels_pair_the_answers_to_the_same_question_and_count_identical_ones_as_ties(loop):
    for row in contests.duel(loop):
        if row["responses"][0] == row["responses"][1]:
            assert row["outcome"] == "identical" and row["win"] == 0.5
        if row["outcome"] == "consistent":
            assert row["win"] == (1.0 if row["margin"] > 0 else 0.0)


def test_a_second_evaluation_makes_nothing_anew_and_gives_the_same_numbers(loop):
    first = results.scores(loop)
    before = {path: path.read_bytes() for path in loop.folder.rglob("*.jsonl")}
    assert results.scores(loop) == first
    assert before == {path: path.read_bytes() for path in loop.folder.rglob("*.jsonl")}


def test_tables_hold_each_score_with_interval_and_n(loop):
    found = results.write_tables(loop)
    stored = json.loads((loop.folder / "tables" / "results.json").read_text())
    assert set(stored) == set(found)
    for key in ("oracle_good_rate.base", "oracle_good_rate.tuned", "oracle_good_rate.gain",
                "oracle_good_rate.gain_over_sft_random", "self_judge.first_position_rate",
                "self_win_rate", "self_win_rate_lc"):  # fmt: skip
        assert set(stored[key]) == {"value", "low", "high", "n"}
        assert (
            stored[key]["low"] <= stored[key]["value"] <= stored[key]["high"] and stored[key]["n"]
        )
    for metric in ("win_rate", "win_rate_lc"):  # one contest, one figure, under two names
        assert found[f"self_{metric}"] == found[f"contest.self_vs_base.self.{metric}"]
    gain = found["oracle_good_rate.tuned"].value - found["oracle_good_rate.base"].value
    assert found["oracle_good_rate.gain"].value == pytest.approx(gain)
    assert found["oracle_good_rate.twin"] == found["oracle_good_rate.base"]
    assert found["oracle_good_rate.twin_gain"].value == 0
    assert results.NOT_COMPARABLE in (loop.folder / "tables" / "results.md").read_text()


def test_a_file_of_prompts_without_an_oracle_still_gives_win_rates(loop, tmp_path, monkeypatch):
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Say something about {w}."}) + "\n" for w in "abc")
    )
    run = rows.open_run(
        "tiny", "file", {**QUICK, "arms": ["self"], "evaluation.questions": str(path)}
    )
    found = results.scores(run)
    assert "self_win_rate" in found and "oracle_good_rate.base" not in found


def test_check_says_what_to_do_when_something_is_not_healthy(capsys):
    assert results.check("a", True, "b") and not results.check("c", False, "do d")
    shown = capsys.readouterr().out
    assert "ok    a" in shown and "do d" in shown
