"""A user's labelled pairs: reading them, and judging a judge by them."""

import csv
import dataclasses
import json
import random

import pytest

from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.recipe import RecipeError
from sao_utils.stages.judging import judge_pairs
from sao_utils.stages.labelled import labelled_pairs


def written(path, lines):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
    return str(path)


def better(pair):
    """The better answer of a pair."""
    return pair["responses"][pair["quality"].index(1)]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_rewardbench_columns_keep_the_label_and_hide_it_from_the_position(tmp_path, name):
    lines = [
        {
            "prompt": f"Question {k}?",
            "chosen": f"good, {k}\n",
            "rejected": f"bad {k}",
            "subset": "s",
        }
        for k in range(400)
    ]
    pairs = labelled_pairs(written(tmp_path / name, lines))
    assert [better(pair) for pair in pairs] == [line["chosen"] for line in lines]
    assert {pair["subset"] for pair in pairs} == {"s"}
    assert pairs[0]["lengths"] == [len(text.split()) for text in pairs[0]["responses"]]
    first = sum(pair["quality"][0] > pair["quality"][1] for pair in pairs)
    assert 160 < first < 240
    again = labelled_pairs(written(tmp_path / f"again-{name}", lines[::-1]))[::-1]
    assert again == pairs, "the order of the file decides nothing"


def test_rows_that_cannot_be_used_are_counted_under_a_reason(tmp_path):
    def line(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    lines = [
        line("P", "x", "y"), line("P", "x", "y"), line("P", "x", "z"),
        line("Q", "x", "y"), line("Q", "y", "x"),
        line("R", "x", "x"), line("S", "x", " "), line("S", "", ""),
    ]  # fmt: skip
    pairs = labelled_pairs(written(tmp_path / "a.jsonl", lines))
    assert [pair["discarded"] for pair in pairs] == [
        None, "repeated pair", None, "contradicting labels", "contradicting labels",
        "identical answers", "empty answer", "empty answer",
    ]  # fmt: skip


FINE = {"prompt": "P", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "line, fault",
    [
        ({"prompt": "P", "chosen": "x"}, "column 'rejected' is missing"),
        ({"chosen": "x", "rejected": "y"}, "column 'prompt' is missing"),
        ({**FINE, "prompt": " "}, "column 'prompt' is empty"),
        ({**FINE, "chosen": [{"role": "assistant", "content": "x"}]}, "column 'chosen' is no text"),
        ({"prompt": "P", "response_a": "x", "label": "a"}, "columns prompt, chosen, rejected"),
    ],
)
def test_a_faulty_row_is_named_with_its_column(tmp_path, line, fault):
    source = written(tmp_path / "a.jsonl", [FINE, line])
    with pytest.raises(RecipeError, match="a.jsonl, row 2: ") as error:
        labelled_pairs(source)
    assert fault in str(error.value)


def test_a_file_without_rows_or_with_short_lines_says_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match="has no rows"):
        labelled_pairs(str(tmp_path / "empty.jsonl"))
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\nP,x,y\nQ,x\n")
    pairs = labelled_pairs(str(tmp_path / "short.csv"))
    assert [pair["discarded"] for pair in pairs] == [None, "empty answer"]


@pytest.fixture(scope="module")
def file_of_pairs(tmp_path_factory):
    """Right and flawed answers to 60 questions of the tiny world, as a user would label them."""
    lines = []
    for k, text in enumerate(world.held_out_questions("dev", 1, seed=3)[:60]):
        question, rng = world.parse_question(text), random.Random(k)
        good = bad = str(world.draw_answer(rng, question, flawed=False))
        while inspect_answer(question, bad).good:  # not every draw has a flaw
            bad = str(world.draw_answer(rng, question, flawed=True))
        subset = ("long", "short, odd")[k % 2]
        lines.append({"prompt": text, "chosen": good, "rejected": bad, "subset": subset})
    return written(tmp_path_factory.mktemp("gold") / "gold.jsonl", lines)


def judged(run, path, judge=None):
    pairs = [pair for pair in labelled_pairs(path) if pair["discarded"] is None]
    return judge_pairs(run, pairs, judge or run.recipe.model, "labelled")


def test_the_judge_is_right_on_a_users_file_and_going_on_makes_no_rows(
    small_run, tmp_path, file_of_pairs
):
    run = dataclasses.replace(small_run, folder=tmp_path)
    first = judged(run, file_of_pairs)
    kept = run.rows("labelled").read_bytes()
    assert kept.count(b"\n") == 120
    assert judged(run, file_of_pairs) == first
    assert run.rows("labelled").read_bytes() == kept
    right = [(row["margin"] > 0) == (row["quality"][0] > row["quality"][1]) for row in first]
    assert sum(right) > 50


def test_another_judge_has_verdicts_of_its_own_beside_the_first(small_run, tmp_path, file_of_pairs):
    run = dataclasses.replace(small_run, folder=tmp_path)
    own = judged(run, file_of_pairs)
    rounded = run.recipe.model.model_copy(update={"dtype": "bfloat16"})
    other = judged(run, file_of_pairs, rounded)
    assert run.rows("labelled").read_bytes().count(b"\n") == 240
    assert [row["margin"] for row in own] != [row["margin"] for row in other]
