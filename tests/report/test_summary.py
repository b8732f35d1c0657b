"""The table of results as it is read again, and its words: data frames, and one screen."""

import subprocess
import sys

import pandas as pd
import pytest

from sao_utils.report import summary
from sao_utils.report.table import (
    as_csv,
    as_json,
    make_row,
    make_table,
    read_table,
    select,
    value_of,
)
from sao_utils.report.words import compare, in_words, markdown, model_in_words, show
from sao_utils.statistics.intervals import Interval

NAN, RECIPE = float("nan"), "name: tiny\nseeds: [0]\nmodel: {path: tiny}\nprompts: {count: 9}\n"
RECIPE += "training: {algorithm: simpo}\n"


def row(section, metric, value, unit="%", n=880, **names):
    return make_row(section, metric, Interval(value, value - 0.05, value + 0.05, n), unit, **names)


def good(model, value, against=None, temperature=0.0, seed=None):
    names = {"model": model, "against": against, "temperature": temperature, "judge": "oracle"}
    unit = "points" if against else "%"
    return row("quality", "good answers", value, unit, seed=seed, **names)


ARMS = ("self", "sft_random", "random", "oracle")
OF_JUDGE = {"model": None, "judge": "self", "questions": "training pairs"}
ROWS = [
    *(row("judge", m, 0.9, **OF_JUDGE) for m in ("accuracy", "flip rate", "first position")),
    *(good(m, 0.6, temperature=t) for t in (0.0, 0.6) for m in ("base", *ARMS)),
    *(good("self", 0.3, m, t) for t in (0.0, 0.6) for m in ("base", *ARMS[1:])),
    *(good("self", 0.2, "base", seed=s) for s in (0, 1)),
    *(row("flaws", f, 0.1, model=m) for f in ("repeated", "wrong") for m in ("base", "self")),
    *(row("win rate", "win rate", 0.7, model=m, against="base", judge="self") for m in ARMS),
    row("win rate", "difference in win rate", 0.1, "points", model="self", against="random"),
    *(row("length", "answer length", 22, "tokens", model=m) for m in ("base", "self")),
    *(row("task", "acc", 0.6, n=138, model=m, questions="tiny_facts") for m in ("base", "self")),
    row("task", "acc", -0.1, "points", 138, model="self", against="base", questions="tiny_facts"),
    make_row("comparison", "kappa", Interval(NAN, NAN, NAN, 0, "one verdict"), ""),
    row("benchmark", "score", 6.075, "of 10", model="self", questions="tiny_mt", judge="oracle"),
]


@pytest.fixture
def folder(tmp_path):
    """A run's folder with nothing but its tables."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "results.json").write_text(as_json(make_table(ROWS)))
    (tmp_path / "tables" / "recipe.yaml").write_text(RECIPE)
    funnel = "arm,step,count\nself,asked for,2400\nself,malformed,-783\nself,pairs,1617\n"
    (tmp_path / "tables" / "funnel.csv").write_text(funnel + "random,asked for,1\n")
    return tmp_path


def test_a_table_is_read_as_it_was_written(folder):
    table = make_table(ROWS)
    pd.testing.assert_frame_equal(read_table(folder), table)
    assert as_csv(table).count("\n") == len(ROWS) + 1


def test_a_missing_or_damaged_table_or_one_of_an_older_kit_is_named(folder):
    path = folder / "tables" / "results.json"
    for text in ('{"torn', '{"oracle_good_rate.base": {"value": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError):
            summary.summary(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        summary.summary(folder)


def test_rows_are_selected_by_columns_and_a_value_is_over_all_seeds_unless_named():
    table = make_table(ROWS)
    assert len(select(table, section=["flaws", "length"], model="self")) == 3
    assert select(table, seed=None, against="random")["seed"].tolist() == [None] * 3
    assert value_of(table, section="quality", model="self").value == 0.6
    assert value_of(table, section="quality", model="self", against="base").value == 0.3
    assert value_of(table, section="quality", against="base", seed=1).value == 0.2
    assert value_of(table, section="quality", model="nobody") is None
    with pytest.raises(KeyError):
        select(table, colour="red")


def test_numbers_are_shown_in_their_units_with_interval_or_the_reason_for_none():
    def shown(found, unit):
        return in_words(value_of(make_table([make_row("comparison", "x", found, unit)])))

    assert shown(Interval(0.712, 0.68, 0.741, 9), "%") == "71.2 [68.0, 74.1] %"
    assert shown(Interval(-0.01, -0.02, 0.0, 9), "points") == "-1.0 [-2.0, 0.0] points"
    assert shown(Interval(6.0751, 5.7, 6.41, 80), "of 10") == "6.08 [5.70, 6.41] of 10"
    assert shown(Interval(0.5, 0.4, 0.6, 9), "") == "0.50 [0.40, 0.60]"
    assert shown(Interval(0.5, NAN, NAN, 9), "%") == "50.0 (no interval) %"
    assert shown(Interval(NAN, NAN, NAN, 1, "one cluster"), "%") == "not estimated: one cluster"


def test_frames_have_words_and_no_keys():
    table = make_table(ROWS)
    shown = show(table)
    assert markdown(shown).count("\n") == len(ROWS) + 1
    words = " ".join(shown["what"] + " " + shown["model"])
    assert "_" not in words.replace("tiny_", "")
    assert "remarks" in shown and "remarks" not in show(select(table, section="length"))
    assert {"answer repeats itself", "good answers, greedy, seed 1"} <= set(shown["what"])
    assert "6.08 [6.03, 6.12] of 10" in shown["value [95 % interval]"].tolist()


def test_base_tuned_and_difference_stand_side_by_side():
    frame = compare(select(make_table(ROWS), section=["task", "quality"], temperature=None))
    (line,) = frame.to_dict(orient="records")
    assert line == {
        "what": "tiny_facts: acc",
        "model": "self-judged pairs",
        "base": "60.0 [55.0, 65.0] %",
        "tuned": "60.0 [55.0, 65.0] %",
        "difference [95 % interval]": "-10.0 [-15.0, -5.0] points",
        "n": "138",
    }
    good = compare(select(make_table(ROWS), section="quality", temperature=0.0, seed=None))
    assert good["model"].tolist() == [model_in_words(model) for model in ARMS]


def test_the_summary_is_one_screen_a_stranger_can_read(folder):
    text = summary.summary(folder)
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= summary.WIDTH
    for part in (
        "recipe tiny, model tiny, seeds [0], 9 prompts a seed, simpo",
        "2,400 asked for - 783 malformed = 1,617 pairs",
        "it prefers the answer that is shown first",
        "good answers, greedy",
        "good answers, T = 0.6",
        "SFT on random own answers",
        "Self-judged ahead, in points, of",
        "answer repeats itself",
        "task tiny_facts",
        "not comparable with the paper's",
    ):
        assert part in text, part
    assert "nan" not in text and "None" not in text and "_rate" not in text
    assert "states something wrong" not in text  # no more of it than before


def test_the_summary_of_a_run_that_measured_little_leaves_the_rest_out(folder):
    unknown, names = Interval(NAN, NAN, NAN, 0, "no"), {"model": "self", "against": "base"}
    few = [good("base", 0.5), make_row("win rate", "win rate", unknown, **names)]
    (folder / "tables" / "results.json").write_text(as_json(make_table(few)))
    (folder / "tables" / "funnel.csv").unlink()
    text = summary.summary(folder)
    assert "base model" in text and "not estimated" in text
    assert "The judge" not in text and "Price" not in text


def test_a_run_is_shown_without_loading_torch(folder):
    code = "import sys; from sao_utils.report.summary import summary; summary(sys.argv[1]); "
    code += "print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("low", "says"), [(0.52, "can teach"), (0.45, "cannot be expected"), (None, "is not known")]
)
def test_advice_on_a_judge_follows_the_interval_of_its_accuracy(low, says):
    known = [] if low is None else [Interval(0.56, low, 0.6, 300)]
    rows = [make_row("judge", "accuracy", one, **OF_JUDGE) for one in known]
    rows.append(row("judge", "flip rate", 0.9, **OF_JUDGE))
    assert says in summary.advice_on_judge(make_table(rows))
