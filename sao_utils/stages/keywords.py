"""Keyword lists, from which SynPO's self-prompt generator writes prompts (arXiv 2410.06961, section 2.1).

A list is three words from one paragraph. The generator is trained on lists of two words from a prompt and
a third, the noise keyword, from another prompt. The paper does not say how a word becomes a keyword. Ours:
words of at least three letters that are not among scikit-learn's stop words; a list that contains a
personal name, according to Faker's list of given names, is dropped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from sao_utils import oracles
from sao_utils.files import is_table, read_column
from sao_utils.recipe import RecipeError
from sao_utils.stages.prompts import hub_column
from sao_utils.store import Run, row_id

WORDS = 3  # in a list: the paper's number
_WORD = re.compile(r"[^\W\d_]{3,}")


def keyword_lists(run: Run, seed: int, round: int = 0) -> list[dict]:
    """The `prompts.count` lists of a seed and a round; no list occurs twice over a seed's rounds.

    Returns:
        Rows {id, seed, round, keywords: three words from one paragraph of `prompts.data`}.

    Raises:
        RecipeError: the corpus cannot be read, or has too few lists.
    """
    count = run.recipe.prompts.count
    lots = random.Random(f"keywords {seed}")
    paragraphs = list(_corpus(run))
    lots.shuffle(paragraphs)
    found: dict[tuple[str, ...], None] = {}
    for paragraph in paragraphs * 10:  # each visit draws another list from the paragraph's words
        words = sorted(content_words(paragraph))
        drawn = tuple(lots.sample(words, WORDS)) if len(words) >= WORDS else ()
        if drawn and not has_name(drawn):
            found.setdefault(drawn)
        if len(found) == count * (round + 1):
            break
    lists = list(found)[count * round : count * (round + 1)]
    if len(lists) < count:
        raise RecipeError(
            f"prompts.data has {len(found):,} different keyword lists; {round + 1} rounds of "
            f"prompts.count={count:,} need more. Give a larger corpus, or lower the count."
        )
    return [
        {"id": row_id("keywords", seed, round, drawn), "seed": seed, "round": round}
        | {"keywords": list(drawn)}
        for drawn in lists
    ]


def seed_keywords(prompts: list[str], seed: int) -> list[list[str]]:
    """For each prompt, two words of its own and a noise keyword from another prompt, in random order."""
    lots = random.Random(f"seed keywords {seed}")
    words = [sorted(content_words(prompt)) for prompt in prompts]
    lists = []
    for k, own in enumerate(words):
        other = words[lots.choice([j for j in range(len(words)) if j != k])]
        noise = [word for word in other if word not in own]
        drawn = lots.sample(own, min(2, len(own))) + lots.sample(noise, min(1, len(noise)))
        lists.append(lots.sample(drawn, len(drawn)))
    return lists


def content_words(text: str) -> set[str]:
    """The words of a text that may be keywords, in their original case."""
    return {word for word in _WORD.findall(text) if word.lower() not in _stop_words()}


def has_name(words: Iterable[str]) -> bool:
    """Whether one of these words is a capitalised given name (from Faker's English list)."""
    return any(word in _given_names() for word in words)


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


@cache
def _given_names() -> frozenset[str]:
    from faker.providers.person.en_US import Provider

    return frozenset(Provider.first_names)


def _corpus(run: Run) -> Iterable[str]:
    """The paragraphs that keywords come from, as `prompts.data` says."""
    settings = run.recipe.prompts
    if settings.data == "tiny":
        return oracles.tiny_paragraphs()
    if Path(settings.data).suffix == ".txt":
        if not Path(settings.data).is_file():
            raise RecipeError(f"prompts.data: there is no file '{settings.data}'.")
        text = Path(settings.data).read_text(encoding="utf-8")
        return [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if is_table(settings.data):
        return read_column(settings.data, settings.column)
    return hub_column(settings)
