"""The oracle of the tiny world: it reads any answer and counts its flaws, exactly."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from sao_utils.oracles.tiny_world import (
    CLOSERS,
    DAMAGES,
    FLAWS,
    NEIGHBOUR,
    OPENERS,
    SENTENCES,
    TRUTH,
    VALUES,
    Question,
    draw_answer,
    pattern_of,
)

_SENTENCE_PATTERNS = [(a, pattern_of(s)) for a, variants in SENTENCES.items() for s in variants]
_OPENER_PATTERNS = [pattern_of(s) for s in OPENERS if s]
_CLOSER_PATTERNS = [pattern_of(s) for s in CLOSERS]


@dataclass(frozen=True)
class Inspection:
    """What the oracle found: the number of flaws of each kind (`FLAWS`), and a verdict per sentence."""

    flaws: dict[str, int]
    sentences: tuple[tuple[int, str], ...]  # (end position in the text, verdict on the sentence)

    @property
    def quality(self) -> int:
        """Minus the number of flaws: 0 is perfect."""
        return -sum(self.flaws.values())

    @property
    def good(self) -> bool:
        """No flaw at all."""
        return self.quality == 0


def inspect_answer(question: Question, text: str) -> Inspection:
    """Count the flaws of an answer exactly.

    Args:
        question: what was asked.
        text: the answer, any string (an empty one misses everything and is unfinished).

    Returns:
        An `Inspection`. Each of these counts as one flaw: an aspect that was asked for and is missing,
        a wrong value, a repeated statement, a statement about another hobby, one about an aspect that
        was not asked for, and no closing sentence at the end. Sentences outside the grammar count as
        one flaw together.
    """
    flaws = dict.fromkeys(FLAWS, 0)
    stated: set[tuple[str, str]] = set()
    covered: set[str] = set()
    verdicts = []
    pieces = [m for m in re.finditer(r"[^.!?]+[.!?]*", text) if m.group().strip()]
    finished = False
    for i, piece in enumerate(pieces):
        sentence, last = piece.group().strip(), i == len(pieces) - 1
        statement = _parse_statement(sentence)
        if statement is None:
            kind = "frame"
            opener = i == 0 and _matches(_OPENER_PATTERNS, sentence, question.hobby)
            finished = last and _matches(_CLOSER_PATTERNS, sentence, question.hobby)
            broken_off = last and sentence[-1] not in ".!?"
            if not (opener or finished or broken_off):
                flaws["garbled"] = 1
        else:
            hobby, aspect, value = statement
            hobby = hobby or question.hobby
            if (hobby, aspect) in stated:
                kind = "repeated"
            elif hobby != question.hobby:
                kind = "off_topic"
            elif aspect not in question.aspects:
                kind = "extra"
            else:
                kind = "right" if value == TRUTH[hobby, aspect] else "wrong"
                covered.add(aspect)
            stated.add((hobby, aspect))
            if kind != "right":
                flaws[kind] += 1
        verdicts.append((piece.end(), kind))
    flaws["missing"] = len(set(question.aspects) - covered)
    flaws["unfinished"] = int(not finished)
    return Inspection(flaws, tuple(verdicts))


def answer_pair(rng: random.Random, question: Question) -> tuple[str, str]:
    """Two answers of different quality: two free draws, or one answer and its damaged copy."""
    while True:
        if rng.random() < 0.5:
            pair = (
                draw_answer(rng, question, flawed=rng.random() < 0.7),
                draw_answer(rng, question),
            )
        else:
            answer = draw_answer(rng, question, flawed=rng.random() < 0.5)
            kind = rng.choice(("missing", "missing", "wrong", "wrong", "wrong", *DAMAGES))
            pair = (answer, DAMAGES[kind](rng, question, answer))
        texts = [str(answer) for answer in pair]
        quality = [inspect_answer(question, text).quality for text in texts]
        if pair[1] is not None and quality[0] != quality[1]:
            rng.shuffle(texts)
            return texts[0], texts[1]


def _matches(patterns: list[re.Pattern], sentence: str, hobby: str) -> bool:
    found = (pattern.fullmatch(sentence) for pattern in patterns)
    return any(m and m.groupdict().get("hobby", hobby) == hobby for m in found)


def _parse_statement(sentence: str) -> tuple[str | None, str, str] | None:
    """(hobby or None, aspect, value) of a sentence; None if it states no fact."""
    for aspect, pattern in _SENTENCE_PATTERNS:
        match = pattern.fullmatch(sentence)
        if match and match["value"] in VALUES[aspect]:
            hobby = match.groupdict().get("hobby")
            if hobby is None or hobby in NEIGHBOUR:
                return hobby, aspect, match["value"]
    return None
