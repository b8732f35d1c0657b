"""Instructions that a program can check, in the manner of IFEval (Zhou et al. 2023, arXiv 2311.07911).

This oracle knows every prompt that ends in a sentence of `KINDS`, whatever comes before it. An answer has a
flaw if it does not do what the sentence says; whether it is true or useful is not checked. The prompts and
sentences are ours. Where IFEval has the same kind, the check agrees with lm-eval's
(tests/oracles/test_checkable.py); lm-eval's own module cannot be imported without a download.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of instruction: its sentence, whether an answer follows it, and the split that may ask it."""

    sentence: str
    follows: Callable[[str], bool]
    split: str = "train"


def _times(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE | re.MULTILINE))


def _words(text: str) -> int:
    return _times(r"\w+", text)


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _list_items(text: str) -> int:
    return _times(r"^\s*\*[^\*].*$", text) + _times(r"^\s*-.*$", text)


def _highlights(text: str) -> int:
    marked = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in marked)


#: Most were chosen because SmolLM2-135M-Instruct follows them in 10 to 80 % of its answers, so that a pair
#: often has a good and a bad one. Evaluation also asks the training kinds, but about other topics.
KINDS = {
    "25 words": Kind("Answer in at most 25 words.", lambda t: _words(t) <= 25),
    "no commas": Kind("Do not use any commas.", lambda t: "," not in t),
    "three bullets": Kind(
        'Answer with exactly three bullet points that begin with "* ".',
        lambda t: _list_items(t) == 3,
    ),
    "however": Kind('Use the word "however" in your answer.', lambda t: _times("however", t) > 0),
    "without and": Kind('Do not use the word "and".', lambda t: _times(r"\band\b", t) == 0),
    "question": Kind("End your answer with a question.", lambda t: t.rstrip().endswith("?")),
    "two paragraphs": Kind(
        "Write exactly two paragraphs, separated by a blank line.", lambda t: _paragraphs(t) == 2
    ),
    "highlights": Kind(
        "Highlight at least two words with asterisks, like *this*.",
        lambda t: _highlights(t) >= 2,
    ),
    "five items": Kind(
        "Answer with a numbered list of exactly five items.",
        lambda t: _times(r"^\s*\d+[.)] ", t) == 5,
        "dev",
    ),
    "without you": Kind('Do not use the word "you".', lambda t: _times(r"\byou\b", t) == 0, "dev"),
    "postscript": Kind(
        'Add a postscript at the end that starts with "P.S."',
        lambda t: _times(r"\s*p\.\s?s\..*$", t) > 0,
        "test",
    ),
    "two sentences": Kind(
        "Answer in exactly two sentences.", lambda t: _times(r"[.!?]+(?=\s|\Z)", t) == 2, "test"
    ),
    "important": Kind(
        'Use the word "important" at least twice.', lambda t: _times("important", t) >= 2, "test"
    ),
    # The base nearly always does this; a model that has merely learned to be short no longer does.
    "80 words": Kind("Write at least 80 words.", lambda t: _words(t) >= 80, "test"),
}
#: What evaluation asks about. A training prompt that names one of these topics is left out.
TOPICS = {
    "dev": ("volcanoes", "growing tomatoes", "bicycle gears", "the violin", "night trains"),
    "test": (
        *("solar eclipses", "honey bees", "sourdough bread", "chess openings", "coral reefs"),
        *("learning to swim", "the Silk Road", "vaccination", "solar panels", "stage fright"),
    ),
}
FORMS = (
    "Tell me about {topic}.",
    "What should a beginner know about {topic}?",
    "Explain {topic} to a friend.",
)
LEAST_WORDS = 3  # an answer of fewer words says nothing, whatever the instruction (ours)


class Asked(NamedTuple):
    """A prompt that ends in a known instruction."""

    kind: str
    topic: str  # one of `TOPICS`, or else everything before the instruction
    held_out: bool

    @property
    def cluster(self) -> str:
        return f"{self.topic} ({self.kind})"

    def flaws(self, answer: str) -> dict[str, int]:
        """For each of two flaws, 1 or 0: the instruction is not followed, or the answer is too short.

        An instruction repeated in the answer is removed first, so that quoting its words gains nothing.
        """
        kind = KINDS[self.kind]
        own = answer.replace(kind.sentence, "")
        fails, short = not kind.follows(own), _words(own) < LEAST_WORDS
        return {f"not followed: {self.kind}": int(fails), "too short": int(short)}


def parse(prompt: str) -> Asked | None:
    """Read a prompt; None if it does not end in a known instruction."""
    text = prompt.rstrip()
    kind = next((name for name, of in KINDS.items() if text.endswith(of.sentence)), None)
    if kind is None:
        return None
    before = text.removesuffix(KINDS[kind].sentence).strip()
    topic = named_topic(before)
    return Asked(kind, topic or before, topic is not None or KINDS[kind].split != "train")


def named_topic(text: str) -> str | None:
    """The evaluation topic that a text names; None if it names none."""
    every = (topic for of in TOPICS.values() for topic in of)
    return next((topic for topic in every if topic.lower() in text.lower()), None)


def instruct(prompt: str, lot: random.Random) -> str:
    """A prompt followed by one of the training instructions, drawn at random."""
    sentences = [kind.sentence for kind in KINDS.values() if kind.split == "train"]
    return f"{prompt} {lot.choice(sentences)}"


def questions(split: str, wordings: int) -> list[str]:
    """Each topic of a split ("dev" or "test") with each instruction of "train" and of that split.

    Args:
        wordings: how many of `FORMS` are used for each.
    """
    return [
        f"{form.format(topic=topic)} {kind.sentence}"
        for topic in TOPICS[split]
        for kind in KINDS.values()
        if kind.split in ("train", split)
        for form in FORMS[:wordings]
    ]
