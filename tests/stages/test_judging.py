"""Labelled pairs, what can be said of a judge from its verdicts, and judges that go wrong."""

import csv
import dataclasses
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sao_utils import store as rows
from sao_utils.engines import requests as asking
from sao_utils.engines.base import Completion
from sao_utils.oracles import tiny_world as world
from sao_utils.recipe import RecipeError, load_recipe
from sao_utils.report import formatting as wording
from sao_utils.report import results
from sao_utils.stages import judging
from sao_utils.stages.judging import judge_labelled, labelled_pairs

QUESTION = "Can you explain the right tool and where to go for chess?"


def written(path, lines):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
    return str(path)


def gold(pair):
    """The better answer of a pair, None for a tie."""
    a, b = pair["quality"]
    return None if a == b else pair["responses"][0 if a > b else 1]


# ---------------------------------------------------------------------- reading labelled pairs


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
    assert [gold(pair) for pair in pairs] == [line["chosen"] for line in lines]
    assert {pair["subset"] for pair in pairs} == {"s"}
    assert pairs[0]["lengths"] == [len(text.split()) for text in pairs[0]["responses"]]
    first = sum(pair["quality"][0] > pair["quality"][1] for pair in pairs)
    assert 160 < first < 240
    again = labelled_pairs(written(tmp_path / f"again-{name}", lines[::-1]))[::-1]
    assert again == pairs, "the order of the file decides nothing"


@pytest.mark.parametrize(
    "label, better",
    [("a", "x"), ("b", "y"), ("TIE", None), (1, "x"), (2, "y"), ("2", "y"), (" B ", "y")],
)
def test_labels_name_the_first_or_the_second_answer_or_a_tie(tmp_path, label, better):
    line = {"prompt": "P", "response_a": "x", "response_b": "y", "label": label}
    (pair,) = labelled_pairs(written(tmp_path / "a.jsonl", [line]))
    assert gold(pair) == better and pair["discarded"] is None
    swapped = {**line, "response_a": "y", "response_b": "x"}
    (other,) = labelled_pairs(written(tmp_path / "b.jsonl", [swapped]))
    assert other["responses"] == pair["responses"], "which is a does not depend on the label"


def test_messages_as_trl_has_them_are_read(tmp_path):
    def said(role, text):
        return {"role": role, "content": text}

    user, more = said("user", "P"), said("user", "And then?")
    good, bad = said("assistant", "x"), said("assistant", "y")
    lines = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},  # prompt apart
        {"chosen": [said("user", "Q"), good], "rejected": [said("user", "Q"), bad]},  # in front
        {"prompt": "R", "chosen": [said("user", "R"), good], "rejected": [said("user", "R"), bad]},
        {"prompt": [user, said("assistant", "h"), more], "chosen": [good], "rejected": [bad]},
    ]
    pairs = labelled_pairs(written(tmp_path / "a.jsonl", lines))
    talk = "user: P\n\nassistant: h\n\nuser: And then?"
    assert [pair["prompt"] for pair in pairs] == ["P", "Q", "R", talk]
    assert all(gold(pair) == "x" for pair in pairs)


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
LABELLED = {"prompt": "P", "response_a": "x", "response_b": "y", "label": "a"}
OTHER = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    "line, fault",
    [
        ({"prompt": "P", "chosen": "x"}, "column 'rejected' is missing"),
        ({"chosen": "x", "rejected": "y"}, "column 'prompt' is missing"),
        ({**FINE, "prompt": " "}, "column 'prompt' is empty"),
        ({**FINE, "chosen": 7}, "column 'chosen' is neither a text nor"),
        ({**FINE, "chosen": []}, "column 'chosen' is neither a text nor"),
        ({**FINE, "chosen": [{"role": "user"}]}, "column 'chosen' is neither a text nor"),
        ({**FINE, "chosen": [{"role": "user", "content": "x"}]}, "'chosen' is not the assistant's"),
        ({**FINE, "rejected": OTHER}, "answer different messages"),
        ({**LABELLED, "label": "A > B"}, "column 'label' is 'A > B', not one of a, 1, b"),
        ({**LABELLED, "label": 0}, "column 'label' is 0, not one of a, 1, b, 2, tie (a 0 is"),
        ({**LABELLED, "label": None}, "column 'label' is None"),
        ({**LABELLED, "response_b": None}, "column 'response_b' is missing"),
        ({"question": "P"}, "columns prompt, chosen, rejected"),
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
    with pytest.raises(RecipeError, match="row 2: column 'rejected' is missing"):
        labelled_pairs(str(tmp_path / "short.csv"))
    with pytest.raises(RecipeError, match="no .jsonl or .csv"):
        labelled_pairs(str(tmp_path / "nowhere.jsonl"))


# ---------------------------------------------------------------------- judging them, really


@pytest.fixture(scope="module")
def file_of_pairs(tmp_path_factory):
    """Right and flawed answers to 60 questions of the tiny world, as a user would label them."""
    lines = []
    for k, text in enumerate(world.held_out_questions("dev", 1, seed=3)[:60]):
        question, rng = world.parse_question(text), random.Random(k)
        good = bad = str(world.draw_answer(rng, question, flawed=False))
        while world.inspect_answer(question, bad).good:  # not every draw has a flaw
            bad = str(world.draw_answer(rng, question, flawed=True))
        subset = ("long", "short, odd")[k % 2]
        lines.append({"prompt": text, "chosen": good, "rejected": bad, "subset": subset})
    return written(tmp_path_factory.mktemp("gold") / "gold.jsonl", lines)


def test_the_judge_is_scored_on_a_users_file_and_going_on_makes_no_rows(
    small_run, tmp_path, file_of_pairs
):
    run = dataclasses.replace(small_run, folder=tmp_path)
    judged = judge_labelled(run, labelled_pairs(file_of_pairs))
    kept = run.rows("labelled").read_bytes()
    assert kept.count(b"\n") == 120
    assert judge_labelled(run, labelled_pairs(file_of_pairs)) == judged
    assert run.rows("labelled").read_bytes() == kept
    found = results.judge_quality(judged, 500, "self_judge.labelled")
    accuracy = found["self_judge.labelled.accuracy"]
    assert accuracy.n == 60 and accuracy.low > 0.8
    parts = [found[f"self_judge.labelled.accuracy.{name}"] for name in ("long", "short_odd")]
    assert [part.n for part in parts] == [30, 30]
    assert sum(part.value for part in parts) / 2 == pytest.approx(accuracy.value)


def test_the_recipes_gold_file_adds_scores_and_makes_no_verdict_anew(
    small_run, tmp_path, file_of_pairs
):
    judging.judge(small_run)
    kept = small_run.rows("verdicts").read_bytes()
    told = load_recipe("tiny", {"judging.gold": file_of_pairs, "personas.count": 40})
    run = dataclasses.replace(small_run, recipe=told)
    found = results.judge_scores(run)
    assert small_run.rows("verdicts").read_bytes() == kept
    assert found["self_judge.labelled.accuracy"].n == 60
    assert found["self_judge.valid_rate"].n == len(judging.judge(small_run))
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert len(manifest["inputs"]["gold.jsonl"]) == 64


def test_every_judge_of_the_recipe_is_examined_on_the_users_pairs_and_what_is_left_out_is_counted(
    small_run, tmp_path, file_of_pairs
):
    lines = Path(file_of_pairs).read_text(encoding="utf-8").splitlines()[:20]
    empty = json.dumps({"prompt": "Greet me.", "chosen": "Hello!", "rejected": " "})
    gold = tmp_path / "some.jsonl"
    gold.write_text("\n".join([*lines, lines[0], empty]) + "\n", encoding="utf-8")
    rounded = {"path": "tiny", "dtype": "bfloat16"}
    changes = {"judging.gold": str(gold), "judges": {"again": rounded}, "personas.count": 40}
    run = dataclasses.replace(small_run, recipe=load_recipe("tiny", changes))
    found = results.judge_scores(run)
    own, other = (f"{who}.labelled.accuracy" for who in ("self_judge", "judge.again"))
    assert found[own].n == found[other].n == 20
    assert found["judge.again.labelled.mass"] != found["self_judge.labelled.mass"]
    assert not [key for key in found if key.startswith("judge.") and "labelled" not in key]
    counts = {key: got for key, got in found.items() if key.startswith("labelled_pairs.")}
    assert {key.split(".")[1]: got.value for key, got in counts.items()} == {
        "usable": 20, "repeated_pair": 1, "empty_answer": 1,
    }  # fmt: skip
    assert all(got.n == 22 for got in counts.values())
    assert wording.unit("judge.again.labelled.length_bias") == "points"
    assert wording.unit("judge.again.labelled.accuracy.gain") == "%"
    assert wording.in_words("labelled_pairs.usable", counts["labelled_pairs.usable"])[:3] == "20 "


def test_another_judge_has_verdicts_of_its_own_beside_the_first(small_run, tmp_path, file_of_pairs):
    run = dataclasses.replace(small_run, folder=tmp_path)
    pairs = labelled_pairs(file_of_pairs)
    own = judge_labelled(run, pairs)
    rounded = run.recipe.model.model_copy(update={"dtype": "bfloat16"})
    other = judge_labelled(run, pairs, rounded)
    assert run.rows("labelled").read_bytes().count(b"\n") == 240
    assert [row["margin"] for row in own] != [row["margin"] for row in other]
    found = judging.judges_agree(own, other, 300)
    assert found["agreement"].n == 60 and found["agreement_one_order"].n == 120
    assert found["kappa"].low > 0.7 and found["kappa_one_order"].low > 0.7


# ---------------------------------------------------------------------- judges that go wrong


class Faulty:
    """An engine that answers what it is told: faults that no healthy model shows on demand."""

    name, tokenizer = "faulty", None

    def __init__(self, text="", log_probabilities=(0.0, 0.0)):
        self.text, self.log_probabilities = text, log_probabilities

    def generate(self, chats, sampling, seeds):
        yield [(k, Completion(self.text, 0, True)) for k in range(len(chats))]

    def choose(self, chats, prefix, choices):
        yield [(k, list(self.log_probabilities)) for k in range(len(chats))]


PAIRS = [{"id": f"p{k}", "prompt": f"P{k}", "responses": ["x", "y"], "lengths": [1, 2]}
         | {"quality": [1, 0]} for k in range(5)]  # fmt: skip


@pytest.mark.parametrize(
    "log_probabilities",
    [(-0.1, -math.inf), (-math.inf, -math.inf), (math.nan, math.nan), (-9.0, -9.5)],
)
def test_a_verdict_without_two_finite_log_probabilities_or_mass_is_invalid(
    monkeypatch, small_run, tmp_path, log_probabilities
):
    """A server tells the likeliest tokens only: what is not among them is minus infinity."""
    engine = Faulty(log_probabilities=log_probabilities)
    monkeypatch.setattr(asking, "load_engine", lambda model: engine)
    run = dataclasses.replace(small_run, folder=tmp_path)
    judged = judging.verdict_rows(run, "v", PAIRS)
    assert [row["outcome"] for row in judged] == ["invalid"] * 5
    text = run.rows("v").read_text()
    assert text.count("\n") == 10 and "NaN" not in text and "Infinity" not in text
    found = results.judge_quality(judged, 200)
    assert found["self_judge.valid_rate"].value == 0 and "self_judge.accuracy" not in found


@pytest.mark.parametrize("text", ["", "I like both.", "ranking: 1 > 2 or ranking: 2 > 1", "1"])
def test_a_sampled_verdict_that_is_empty_or_nonsense_is_counted_and_kept(
    monkeypatch, small_run, tmp_path, text
):
    monkeypatch.setattr(asking, "load_engine", lambda model: Faulty(text))
    sampled = load_recipe("tiny", {"judging.method": "sampled", "pairs.min_margin": 1})
    run = rows.Run(sampled, tmp_path)
    judged = judging.verdict_rows(run, "v", PAIRS)
    assert [row["outcome"] for row in judged] == ["invalid"] * 5
    assert {row["text"] for row in rows.read_rows(run.rows("v"))} == {text}
    assert results.calibration(judged) == [] and judging.judges_agree(judged, judged) == {}


def test_a_real_judge_at_a_wild_temperature_talks_nonsense_and_every_pair_is_counted(tmp_path):
    wild = {"judging.method": "sampled", "pairs.min_margin": 1, "judging.temperature": 50.0}
    run = rows.Run(load_recipe("tiny", wild), tmp_path)
    judged = judging.verdict_rows(run, "v", PAIRS)
    counted = Counter(row["outcome"] for row in judged)
    assert sum(counted.values()) == 5 and counted["invalid"] >= 4
    assert all(row["margin"] is None for row in judged if row["outcome"] == "invalid")


# ---------------------------------------------------------------------- diagnostics, known truth


def verdict(k, m12, m21, quality=(1, 0), lengths=(10, 10), prompt=None):
    if m12 * m21 > 0:
        outcome = "consistent"
    else:
        outcome = "inconsistent" if m12 * m21 < 0 else "tie"
    return {
        "id": str(k),
        "prompt": prompt or f"P{k}",
        "responses": ["x", "y"],
        "quality": list(quality),
        "lengths": list(lengths),
        "outcome": outcome,
        "margin": (m12 + m21) / 2,
        "margin_12": m12,
        "margin_21": m21,
        "mass": 0.9,
        "first_wins": [m12 > 0, m21 < 0],
    }


def short(found):
    return {key.removeprefix("self_judge."): interval for key, interval in found.items()}


def test_a_judge_that_always_says_1_is_seen_through():
    found = short(results.judge_quality([verdict(k, 3.0, -3.0) for k in range(80)], 200))
    assert found["first_position_rate"].value == found["flip_rate"].value == 1
    assert 0.9 < found["first_position_rate"].low < 1, "80 pairs do not make it certain"
    assert found["accuracy_gold_first"].value == 1 and found["accuracy_gold_second"].value == 0
    assert found["accuracy"].value == found["accuracy_one_order"].value == 0.5
    assert found["consistent_rate"].value == 0 and found["valid_rate"].value == 1


def test_a_judge_that_is_always_right_is_not_called_certain():
    draw = random.Random(0)
    truth = [draw.choice(((1, 0), (0, 1))) for _ in range(80)]
    judged = [verdict(k, 4.0 * (a - b), 4.0 * (a - b), (a, b)) for k, (a, b) in enumerate(truth)]
    found = short(results.judge_quality(judged, 200))
    assert (
        found["accuracy"].value == found["accuracy"].high == 1 and 0.9 < found["accuracy"].low < 1
    )
    assert found["flip_rate"].value == 0 and 0.3 < found["first_position_rate"].value < 0.7


def test_a_judge_that_only_counts_words_shows_its_bias_and_a_fair_one_does_not():
    draw, by_length, fair = random.Random(1), [], []
    for k in range(400):
        lengths = draw.choice(((30, 10), (10, 30)))
        longer = 1 if lengths[0] > lengths[1] else -1
        better = longer if draw.random() < 0.7 else -longer  # longer answers ARE better, mostly
        quality = (1, 0) if better > 0 else (0, 1)
        by_length.append(verdict(k, 2.0 * longer, 2.0 * longer, quality, lengths))
        fair.append(verdict(k, 2.0 * better, 2.0 * better, quality, lengths))
    found, other = short(results.judge_quality(by_length)), short(results.judge_quality(fair))
    assert found["longer_chosen"].value == found["longer_chosen_all"].value == 1
    assert found["longer_better"].low < 0.7 < found["longer_better"].high
    assert found["length_bias"].low < 0.3 < found["length_bias"].high
    assert found["length_bias"].low > 0.2
    assert found["accuracy_better_longer"].value == 1
    assert found["accuracy_better_shorter"].value == 0
    assert other["longer_chosen"].value > 0.6, "which alone would look like a bias"
    bias = other["length_bias"]
    assert bias.value == 0 and -0.02 < bias.low < 0 < bias.high < 0.02  # in 400 pairs
    one = results.judge_quality(fair[:1])["self_judge.length_bias"]
    assert (one.low, one.value, one.high) == (-1, 0, 1)


def test_length_groups_are_by_share_of_the_longer_answer():
    judged = [
        verdict(0, 1, 1, lengths=(100, 91)),
        verdict(1, 1, 1, lengths=(100, 89)),
        verdict(2, 1, 1, lengths=(89, 100)),
    ]
    assert judging.agreement(judged)["better_is"] == ["about equal", "longer", "shorter"]


def drawn_judge(seed, n=80, right=0.8, first=1.0):
    """Verdicts of a judge with known habits: right with probability `right` when position is left
    out, and a bonus for the first position, in nats, against a strength of 2 with noise of 1."""
    draw = random.Random(seed)
    judged = []
    for k in range(n):
        quality = draw.choice(((1, 0), (0, 1)))
        better = quality[0] - quality[1]
        told = better if draw.random() < right else -better
        strength = told * max(0.1, draw.gauss(2, 1))
        judged.append(verdict(k, strength + first, strength - first, quality))
    return judged


def test_the_intervals_of_the_diagnostics_cover_the_truth():
    from statistics import NormalDist

    weaker = NormalDist(2, 1).cdf(1.0)  # how often the bonus of position exceeds the strength
    truth = {
        "accuracy": 0.8,
        "flip_rate": weaker,
        "flip_rate_unequal": weaker,
        "consistent_rate": 1 - weaker,
        "first_position_rate": 0.5 + weaker / 2,
        "accuracy_gold_first": 0.8 + 0.2 * weaker,
        "accuracy_gold_second": 0.8 * (1 - weaker),
        "accuracy_one_order": 0.8 + (0.2 - 0.8) * weaker / 2,
    }
    hits, rounds = Counter(), 150
    for seed in range(rounds):
        found = short(results.judge_quality(drawn_judge(seed), 200))
        hits.update(
            key for key, value in truth.items() if found[key].low <= value <= found[key].high
        )
    for key in truth:  # 95 % of 150, within three of its standard deviations
        assert hits[key] >= 0.95 * rounds - 3 * math.sqrt(rounds * 0.95 * 0.05), key


def test_no_diagnostic_depends_on_which_answer_is_called_a():
    judged = [
        {**row, "lengths": random.Random(k).choices((10, 12, 30), k=2)}
        for k, row in enumerate(drawn_judge(5))
    ]
    mirrored = [
        {
            **row,
            "quality": row["quality"][::-1],
            "lengths": row["lengths"][::-1],
            "margin": -row["margin"],
            "margin_12": -row["margin_21"],
            "margin_21": -row["margin_12"],
            "first_wins": row["first_wins"][::-1],
        }
        for row in judged
    ]
    found, other = (results.judge_quality(each, 300) for each in (judged, mirrored))
    for key in found:
        assert dataclasses.astuple(found[key]) == pytest.approx(dataclasses.astuple(other[key])), (
            key
        )


def test_intervals_follow_the_number_of_questions_and_not_of_pairs():
    base = drawn_judge(7, 40)
    repeated = [{**row, "id": f"{row['id']}-{k}"} for row in base for k in range(10)]
    one, ten = (short(results.judge_quality(each, 2000))["accuracy"] for each in (base, repeated))
    assert ten.n == 10 * one.n
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.15)


def test_a_calibrated_judge_lies_on_the_line_and_a_boastful_one_below():
    draw = random.Random(3)

    def judged(boast):
        made = []
        for k in range(1600):
            size = draw.expovariate(0.7)
            sign = 1 if draw.random() < 1 / (1 + math.exp(-size)) else -1
            made.append(verdict(k, sign * size * boast, sign * size * boast))
        return made

    def line(size):
        return 1 / (1 + math.exp(-size))

    honest = results.calibration(judged(1.0), bins=8)
    assert [found.n for _, found in honest] == [200] * 8
    sizes = [size for size, _ in honest]
    assert sizes == sorted(sizes)
    # A group's mean of the curve is not the curve at its mean: 0.02 leaves room for that.
    inside = [found.low - 0.02 <= line(size) <= found.high + 0.02 for size, found in honest]
    assert sum(inside) >= 7
    boastful = results.calibration(judged(4.0), bins=8)
    assert sum(found.high < line(size) for size, found in boastful) >= 4


def test_a_few_pairs_make_one_group_of_calibration():
    assert [found.n for _, found in results.calibration(drawn_judge(0, 7))] == [7]


def test_the_agreement_of_two_judges_with_independent_errors_has_the_known_kappa():
    """Right with probability p and q on balanced labels: kappa = (2p - 1)(2q - 1)."""
    draw = random.Random(11)
    truth = [draw.choice((1, -1)) for _ in range(900)]

    def judged(right):
        said = [t if draw.random() < right else -t for t in truth]
        return [verdict(k, s, s) for k, s in enumerate(said)]

    found = judging.judges_agree(judged(0.9), judged(0.8)[::-1], 1000)
    assert found["kappa"].n == 900 and found["kappa_one_order"].n == 1800
    assert found["kappa"].low < 0.8 * 0.6 < found["kappa"].high
    assert found["agreement"].low < 0.9 * 0.8 + 0.1 * 0.2 < found["agreement"].high
    assert found["kappa"].high - found["kappa"].low < 0.15


def test_agreement_leaves_out_what_one_judge_did_not_say_and_tells_neither_from_a_verdict():
    invalid = {**verdict(0, 1, 1), "outcome": "invalid", "margin": None, "first_wins": None}
    one = [invalid, verdict(1, 1, 1), verdict(2, 2, -1), verdict(3, -1, -1), verdict(9, 1, 1)]
    two = [verdict(k, 1, 1) for k in range(3)] + [verdict(3, -1, -1)]
    found = judging.judges_agree(one, two, 200)
    assert found["agreement"].n == 3 and found["agreement"].value == pytest.approx(2 / 3)
    assert found["agreement_one_order"].value == pytest.approx(5 / 6)
    assert np.isfinite(found["kappa"].value)


def test_scores_are_printed_in_their_units(capsys):
    found = judging.judges_agree(drawn_judge(0), drawn_judge(0), 200)
    results.print_scores(found | results.judge_quality(drawn_judge(0), 200))
    told = capsys.readouterr().out
    assert re.search(r"^kappa +1\.00 \[0\.\d\d, 1\.00\], n = 80$", told, re.MULTILINE)
    assert re.search(r"^flip_rate +\d+\.\d \[\d+\.\d, \d+\.\d\] %, n = 80$", told, re.MULTILINE)
