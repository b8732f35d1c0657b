"""Instructions that a program can check: they read back, and their checks agree with lm-eval's."""

import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sao_utils import oracles
from sao_utils.oracles import checkable
from sao_utils.oracles.checkable import KINDS

#: kind -> an answer that follows it, and one that does not
ANSWERS = {
    "25 words": ("word " * 25, "word " * 26),
    "no commas": ("Sun and rain.", "Sun, and rain."),
    "three bullets": ("* one\n* two\n* three", "* one\n* two or three"),
    "however": ("It rains. However, it is warm.", "It rains but it is warm."),
    "without and": ("Sand is a band of grains.", "Salt AND pepper."),
    "question": ("It is warm. Is it not? ", "Is it warm? It is."),
    "two paragraphs": ("One is here.\n\nTwo is there.\n", "One is here.\nTwo is there."),
    "highlights": ("A *big* and a **small** cat", "A *big* cat and * one"),
    "five items": ("1. a\n2. b\n3. c\n4. d\n5. e", "1. a\n2. b\n3. c\n4. d"),
    "without you": ("Young and old are your friends", "I see You there"),
    "postscript": ("It is so.\nP.S. It was so.", "It is so.\nPS: It was so."),
    "two sentences": ("It is 3.5 m long. Is it?", "It is long."),
    "important": ("Water is important. So important!", "Water is important."),
    "80 words": ("word " * 80, "word " * 79),
}
#: kind -> the same in IFEval: name of the checker, and what it is told
IFEVAL = {
    "25 words": ("NumberOfWords", {"num_words": 26, "relation": "less than"}),
    "no commas": ("CommaChecker", {}),
    "three bullets": ("BulletListChecker", {"num_bullets": 3}),
    "however": ("KeywordChecker", {"keywords": ["however"]}),
    "without and": ("ForbiddenWords", {"forbidden_words": ["and"]}),
    "highlights": ("HighlightSectionChecker", {"num_highlights": 2}),
    "without you": ("ForbiddenWords", {"forbidden_words": ["you"]}),
    "postscript": ("PostscriptChecker", {"postscript_marker": "P.S."}),
    "important": (
        "KeywordFrequencyChecker",
        {"keyword": "important", "frequency": 2, "relation": "at least"},
    ),
    "80 words": ("NumberOfWords", {"num_words": 80, "relation": "at least"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_check_tells_a_following_answer_from_another(kind):
    prompt = f"Tell me more. {KINDS[kind].sentence}"
    good, bad = ANSWERS[kind]
    assert oracles.quality(prompt, good, bad) == [0, -1]
    assert oracles.flaws(prompt, bad) == {f"not followed: {kind}": 1, "too short": 0}


def test_an_answer_that_says_nothing_is_not_good():
    assert oracles.quality("Why? Do not use any commas.", "", "No.", "It is so.") == [-1, -1, 0]


def test_repeating_the_instruction_is_not_following_it():
    told = KINDS["however"].sentence
    prompt = f"Tell me more. {told}"
    assert oracles.quality(prompt, f"It is so. {told}", f"However, it is so. {told}") == [-1, 0]


@pytest.fixture(scope="module")
def ifeval():
    """lm-eval's checkers; of what they import, language detection and a tokenizer's data are not here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("langdetect", "immutabledict"):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["immutabledict"].immutabledict = dict
        patch.setattr("nltk.data.find", lambda name: name)
        from lm_eval.tasks.ifeval import instructions

        yield instructions


@pytest.mark.parametrize("kind", IFEVAL)
def test_checks_agree_with_those_of_lm_eval(kind, ifeval):
    name, told = IFEVAL[kind]
    theirs = getattr(ifeval, name)(name)
    theirs.build_description(**told)
    lot, texts = random.Random(kind), [text for pair in ANSWERS.values() for text in pair]
    parts = ["*", "**", "- ", "\n", " ", " ", ", ", "a", "and", "you", "However", "P.S.", "p. s."]
    parts += ["important", "word " * 12, "word " * 40, "\n* item", "\n* item", "**so** ", "*so* "]
    texts += ["".join(lot.choices(parts, k=lot.randrange(1, 12))) for _ in range(3000)]
    ours = [KINDS[kind].follows(text) for text in texts]
    assert ours == [bool(theirs.check_following(text)) for text in texts]
    assert 0.02 < sum(ours) / len(ours) < 0.98


@pytest.mark.parametrize("split", ["dev", "test"])
def test_questions_read_back_and_are_held_out(split):
    texts = oracles.checkable_questions(split, 2)
    asked = [checkable.parse(text) for text in texts]
    assert {one.topic for one in asked} == set(checkable.TOPICS[split])
    assert {one.kind for one in asked} >= {k for k, of in KINDS.items() if of.split == "train"}
    assert {KINDS[one.kind].split for one in asked} == {"train", split}
    assert len(set(texts)) == len(texts) == 2 * len({*map(oracles.cluster, texts)})
    assert all(map(oracles.is_held_out, texts))


def test_training_asks_neither_the_kinds_nor_the_topics_of_evaluation():
    lot = random.Random(0)
    made = [oracles.instructed("How do I bake a cake?", 1.0, lot) for _ in range(200)]
    assert {checkable.parse(text).kind for text in made} == {
        name for name, kind in KINDS.items() if kind.split == "train"
    }
    assert not any(map(oracles.is_held_out, made))
    assert oracles.is_held_out(oracles.instructed("Why do Honey Bees dance?", 1.0, lot))
    assert oracles.is_held_out("Why do Honey Bees dance?", by_topic=True)
    assert not oracles.is_held_out("Why do Honey Bees dance?")
    assert oracles.quality("How do I bake a cake?", "So.") is None
    topics = [topic for of in checkable.TOPICS.values() for topic in of]
    assert len(set(topics)) == len(topics)


def test_the_kept_samples_of_the_real_model_have_the_flaws_that_the_oracle_finds_today():
    kept = Path(__file__).parents[2] / "results/reference-laptop/samples.jsonl"
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert len(rows) == 50 and all(row["weights"].startswith("smollm2-135m") for row in rows)
    for row in rows:
        found = [oracles.flaws(row["prompt"], text) for text in row["responses"]]
        assert row["flaws"] == [flaws and [k for k, n in flaws.items() if n] for flaws in found]
    assert {len(flaws) for row in rows for flaws in row["flaws"] if flaws is not None} >= {0, 1}
