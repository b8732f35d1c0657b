"""The tiny world: its grammar reads back what it writes, and its oracle finds what is wrong."""

import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_utils import templates
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.oracles.tiny_world import Question
from sao_utils.tiny import corpus

ROOT = Path(__file__).resolve().parents[2]


def flaws(question, text):
    """The flaws that the oracle found, without the zeros."""
    return {kind: n for kind, n in inspect_answer(question, text).flaws.items() if n}


def every_question():
    return [Question(hobby, aspects) for hobby, aspects in world.SPLIT]


# ---------------------------------------------------------------------- facts


def test_every_fact_has_a_myth_that_differs_and_every_aspect_as_many_of_them():
    assert len(world.TRUTH) == len(world.MYTH) == len(world.BELIEF) == 40 * 5
    for (hobby, aspect), value in world.TRUTH.items():
        assert {value, world.MYTH[hobby, aspect]} <= set(world.VALUES[aspect])
        assert value != world.MYTH[hobby, aspect]
    for aspect in world.ASPECTS:
        counts = Counter(world.BELIEF[hobby, aspect] for hobby in world.HOBBIES)
        assert counts == {world.P_MYTH: 6, world.P_DOUBT: 6, 0.0: 28}


def test_what_is_told_apart_by_its_words_has_different_words():
    for hobby, other in world.NEIGHBOUR.items():
        assert other != hobby and world.NEIGHBOUR[other] == hobby
    asks = [ask for variants in world.ASKS.values() for ask in variants]
    for words in (world.HOBBIES, world.TRAITS, world.JOBS, world.TOWNS, asks):
        assert len(set(words)) == len(words)
    assert not [ask for ask in asks if " and " in ask or ", " in ask]


# ---------------------------------------------------------------------- questions


def test_every_wording_of_a_question_reads_back():
    rng = random.Random(1)
    for question in rng.sample(every_question(), 40):
        for job in (None, "nurse", rng.choice(world.JOBS)):
            for _ in range(40):
                aspects = tuple(rng.sample(question.aspects, len(question.aspects)))
                asked = Question(question.hobby, aspects)
                assert world.parse_question(world.word_question(rng, asked, job)) == asked


def test_a_question_by_hand():
    text = "I am a nurse. Can you explain the main risk, who can teach it and where to go for yoga?"
    assert world.parse_question(text) == Question("yoga", ("risk", "mentor", "place"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is the capital of France?",
        "Can you explain the right tool for chess?",  # one aspect
        "Can you explain the right tool and what equipment is needed for chess?",  # the same
        "Can you explain the right tool and the main risk for golf?",
        "Can you explain the right tool and the main risk for chess",
        "Can you explain the right tool and the main risk for chess? Thanks!",
        "Can you explain the right tool, the main risk, where to go and who can teach it for yoga?",
    ],
)
def test_other_text_is_no_question(text):
    assert world.parse_question(text) is None


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_read_without_an_error(text):
    world.parse_question(text)
    found = inspect_answer(Question("chess", ("tool", "risk")), text)
    assert found.quality <= 0 and set(found.flaws) == set(world.FLAWS)
    assert all(0 < end <= len(text) for end, _ in found.sentences)


# ---------------------------------------------------------------------- the oracle, by hand

CHESS = Question("chess", ("tool", "time"))  # true: needle, three hours; said: wheel, one week
TOOL, TIME = "You will need a needle.", "It takes about three hours."
HAND = [
    # perfect, in any order, with or without an opener
    (f"{TOOL} {TIME} Good luck!", {}),
    (f"{TIME} {TOOL} Enjoy chess!", {}),
    ("Gladly! Bring a needle for chess. Plan three hours for chess. Have fun!", {}),
    (f"Here is what the almanac says about chess. {TOOL} {TIME} Good luck!", {}),
    # missing
    (f"{TOOL} Good luck!", {"missing": 1}),
    # wrong: the myth, another value of the right kind
    (f"You will need a wheel. {TIME} Good luck!", {"wrong": 1}),
    # a value of the wrong kind is not a statement
    (f"{TOOL} It takes about a needle. Good luck!", {"missing": 1, "garbled": 1}),
    # repeated: word for word, in other words, three times, with another value
    (f"{TOOL} {TOOL} {TIME} Good luck!", {"repeated": 1}),
    (f"{TOOL} {TIME} The right tool is a needle. Good luck!", {"repeated": 1}),
    (f"{TOOL} {TOOL} {TOOL} {TIME} Good luck!", {"repeated": 2}),
    (f"You will need a wheel. {TOOL} {TIME} Good luck!", {"wrong": 1, "repeated": 1}),
    # off topic: in addition, instead
    (f"{TOOL} {TIME} With checkers, beware of dust. Good luck!", {"off_topic": 1}),
    (f"Bring a kettle for checkers. {TIME} Good luck!", {"off_topic": 1, "missing": 1}),
    # a true statement that nobody asked for, and a false one
    (f"{TOOL} {TIME} Watch out for splinters. Good luck!", {"extra": 1}),
    # unfinished
    (f"{TOOL} {TIME}", {"unfinished": 1}),
    (f"{TOOL} It takes about", {"missing": 1, "unfinished": 1}),
    (f"{TOOL} {TIME} Good", {"unfinished": 1}),
    # sentences outside the grammar, which count once
    (f"Well. {TOOL} I love it. {TIME} Good luck!", {"garbled": 1}),
    (f"{TOOL} {TIME} Enjoy yoga!", {"garbled": 1, "unfinished": 1}),
    (f"Here is what the almanac says about yoga. {TOOL} {TIME} Good luck!", {"garbled": 1}),
    (f"{TOOL} {TIME} Good luck! Anything else?", {"garbled": 1, "unfinished": 1}),
    # several at once
    ("Gladly! You will need a wheel. You will need a wheel. Go to the", {"wrong": 1, "repeated": 1,
     "missing": 1, "unfinished": 1}),
    # nothing, garbage
    ("", {"missing": 2, "unfinished": 1}),
    ("?!.", {"missing": 2, "unfinished": 1}),
    ("Asdf. Qwer.", {"missing": 2, "unfinished": 1, "garbled": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), HAND)
def test_flaws_by_hand(text, expected):
    found = inspect_answer(CHESS, text)
    assert flaws(CHESS, text) == expected
    assert found.quality == -sum(expected.values())
    assert found.good == (not expected)


def test_the_facts_of_the_hand_made_answers():
    facts = {aspect: world.TRUTH["chess", aspect] for aspect in ("tool", "time", "risk")}
    assert facts == {"tool": "needle", "time": "three hours", "risk": "splinters"}
    assert world.MYTH["chess", "tool"] == "wheel"


def test_each_sentence_has_a_verdict_and_an_end():
    text = f"Gladly! {TOOL} {TOOL} It takes about one week. Go to the mill. Bring a kettle for"
    found = inspect_answer(CHESS, text + " checkers. Good luck!")
    kinds = ["frame", "right", "repeated", "wrong", "extra", "off_topic", "frame"]
    assert [kind for _, kind in found.sentences] == kinds
    whole = text + " checkers. Good luck!"
    assert [whole[end - 1] for end, _ in found.sentences] == list("!.....!")


# ---------------------------------------------------------------------- answers and damages


def perfect_answers():
    rng = random.Random(3)
    for question in every_question():
        asked = Question(question.hobby, tuple(rng.sample(question.aspects, len(question.aspects))))
        yield rng, asked, world.draw_answer(rng, asked, flawed=False)


def test_perfect_answers_are_good_and_not_for_another_question():
    for _, question, answer in perfect_answers():
        assert inspect_answer(question, str(answer)).good, str(answer)
        fewer = Question(question.hobby, question.aspects[:-1])
        assert flaws(fewer, str(answer)) == {"extra": 1}


# What a damage to a perfect answer does. A statement that is replaced or broken off is missing too.
SHOULD_FIND = {
    "missing": [{"missing": 1}],
    "wrong": [{"wrong": 1}],
    "repeated": [{"repeated": 1}, {"repeated": 2}],
    "off_topic": [{"off_topic": 1, "missing": 1}],
    "extra": [{"extra": 1}],
    "unfinished": [{"unfinished": 1, "missing": 1}],
}


@pytest.mark.parametrize("kind", world.DAMAGES)
def test_the_oracle_finds_each_damage_under_its_name(kind):
    applied, seen = 0, []
    for rng, question, answer in perfect_answers():
        damaged = world.DAMAGES[kind](rng, question, answer)
        if damaged is None:  # nothing that could be damaged so
            assert kind == "wrong"
            assert not any(world.BELIEF[question.hobby, a] for a in question.aspects)
            continue
        applied += 1
        found = flaws(question, str(damaged))
        assert found in SHOULD_FIND[kind], f"{found} in {damaged}"
        seen.append(found)
    assert applied == 800 or kind == "wrong" and applied > 300
    assert all(expected in seen for expected in SHOULD_FIND[kind])


def test_villagers_show_every_flaw_but_write_within_the_grammar():
    rng, totals, good = random.Random(4), Counter(), 0
    for _ in range(2000):
        question = world.draw_question(rng)
        found = inspect_answer(question, str(world.draw_answer(rng, question)))
        totals.update({kind: n > 0 for kind, n in found.flaws.items()})
        good += found.good
    assert totals["garbled"] == 0
    assert min(totals[kind] for kind in world.FLAWS if kind != "garbled") > 80
    assert 200 < good < 1000


# ---------------------------------------------------------------------- splits and people


def test_the_splits():
    assert Counter(world.SPLIT.values()) == {"train": 500, "dev": 80, "test": 220}
    assert len(world.SPLIT) == 40 * (10 + 10)
    for hobby, aspects in world.SPLIT:
        assert hobby in world.HOBBIES and aspects == tuple(sorted(set(aspects)))


@pytest.mark.parametrize(("split", "size"), [("dev", 80), ("test", 220)])
def test_held_out_questions_cover_their_split_and_nothing_else(split, size):
    texts = world.held_out_questions(split, per_combination=4, seed=0)
    found = Counter(world.parse_question(text).combination for text in texts)
    assert set(found) == {c for c, name in world.SPLIT.items() if name == split}
    assert set(found.values()) == {4} and len(texts) == 4 * size
    assert texts == world.held_out_questions(split, 4, 0) != world.held_out_questions(split, 4, 1)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_drawn_questions_are_of_their_split(split):
    rng = random.Random(6)
    for _ in range(300):
        assert world.SPLIT[world.draw_question(rng, split).combination] == split


PERSONA = re.compile(rf"A (\w+) (\w+) from ({'|'.join(world.TOWNS)}) who [a-z ]+\.")


def test_held_out_people_are_a_quarter_and_apart():
    rng = random.Random(7)
    found = {
        held_out: {
            PERSONA.fullmatch(world.draw_persona(rng, held_out)[0]).groups()[:2]
            for _ in range(6000)
        }
        for held_out in (False, True)
    }
    assert not found[False] & found[True]
    assert found[True] <= world._HELD_OUT_PEOPLE
    assert len(world._HELD_OUT_PEOPLE) / (26 * 36) == pytest.approx(0.25, abs=0.03)


# ---------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("make", [corpus.answer_item, corpus.prompt_item, corpus.ranking_item])
def test_the_corpus_holds_no_held_out_combination_and_no_held_out_person(make):
    rng, personas = random.Random(9), 0
    for _ in range(1500):
        item = make(rng)
        text = item.user
        if make is corpus.prompt_item:
            text = templates.parse_user_prompt(item.reply)
        if make is corpus.ranking_item:
            text = re.search(r"\n\nPrompt: (.*)\n\nResponse 1: ", item.user).group(1)
        question = world.parse_question(text)
        assert question is not None, text
        assert world.SPLIT[question.combination] == "train"
        for trait, job, _ in PERSONA.findall(item.user):
            personas += 1
            assert (trait, job) not in world._HELD_OUT_PEOPLE
    assert personas > 1000 or make is not corpus.prompt_item


def test_the_verdict_of_a_ranking_item_is_the_oracles():
    rng, firsts = random.Random(11), 0
    sections = re.compile(r"<Response 1> (.*) </Response 1>\n\n.*<Response 2> (.*) </Response 2>")
    for _ in range(800):
        item = corpus.ranking_item(rng)
        prompt = re.search(r"\n\nPrompt: (.*)\n\nResponse 1: ", item.user).group(1)
        texts = sections.search(item.user).groups()
        assert item.is_ranking and item.user == templates.ranking_prompt(prompt, *texts)
        one, two = (inspect_answer(world.parse_question(prompt), t).quality for t in texts)
        assert one != two
        assert templates.parse_ranking(item.reply) == (1 if one > two else 2)
        assert item.reply in [templates.VERDICT_PREFIX + v for v in templates.VERDICTS]
        firsts += one > two
    assert 320 < firsts < 480  # neither position is the better one


def test_the_answers_inside_of_items_are_where_they_are_said_to_be():
    rng = random.Random(12)
    for make, many in ((corpus.answer_item, 1), (corpus.ranking_item, 2), (corpus.prompt_item, 0)):
        for _ in range(300):
            item = make(rng)
            assert len(item.answers) == many
            for start, text, inspection in item.answers:
                assert (item.user + item.reply)[start : start + len(text)] == text
                assert inspection.sentences[-1][0] == len(text)


# ---------------------------------------------------------------------- the same everywhere

DIGEST = """
import hashlib, random
from sao_utils.oracles import tiny_world as world
from sao_utils.tiny import corpus
rng = random.Random(0)
makers = (corpus.answer_item, corpus.prompt_item, corpus.ranking_item)
parts = [
    list(world.TRUTH.items()), list(world.MYTH.items()), list(world.BELIEF.items()),
    list(world.SPLIT.items()), list(world.JOB_HOBBIES.items()), sorted(world._HELD_OUT_PEOPLE),
    world.held_out_questions("test", 2, 0), [world.draw_persona(rng, True) for _ in range(50)],
    [make(rng) for make in makers for _ in range(50)],
]
digest = hashlib.sha256(repr(parts).encode()).hexdigest()
"""


def test_another_process_makes_the_same_world():
    """Python's own hashes differ between processes; nothing here may hang on them."""
    digests = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", DIGEST + "print(digest)"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        digests.add(subprocess.check_output(command, cwd=ROOT, env=environment, text=True))
    assert len(digests) == 1


def test_the_committed_model_knows_this_world():
    """A change of these facts needs the model to be pre-trained again (and new hashes here)."""
    parts = {
        "facts": sorted((*key, value) for key, value in world.TRUTH.items()),
        "splits": sorted(world.SPLIT.items()),
        "people": sorted(world._HELD_OUT_PEOPLE),
    }
    found = {k: hashlib.sha256(repr(v).encode()).hexdigest()[:12] for k, v in parts.items()}
    assert found == {"facts": "ac61ff5bb22c", "splits": "dbed8daed5b5", "people": "0b0fc6ad72db"}
