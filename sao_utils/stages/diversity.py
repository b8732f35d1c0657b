"""How alike prompts are (SynPO, arXiv 2410.06961, section 4: the diversity of synthetic prompts)."""

from __future__ import annotations

import random

SAMPLE = 1000  # the paper's


def mean_similarity(prompts: list[str], sample: int = SAMPLE, seed: int = 0) -> list[float]:
    """For each of a sample of prompts the mean cosine similarity to the others.

    The paper takes sentence embeddings. Ours are TF-IDF vectors of words, which need no model: they
    compare sources of prompts with each other, not with the paper.

    Returns:
        [n] numbers from 0 to 1, n the number of prompts but at most `sample`; [] for fewer than two.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(prompts) > sample:
        prompts = random.Random(seed).sample(prompts, sample)
    if len(prompts) < 2:
        return []
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit_transform(prompts)
    totals = (vectors @ vectors.T).sum(axis=1)
    return [float(total - 1) / (len(prompts) - 1) for total in totals.A1]
