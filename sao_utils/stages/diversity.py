"""How alike prompts are (SynPO, arXiv 2410.06961, section 4: the diversity of synthetic prompts)."""

from __future__ import annotations

import random

from sao_utils.recipe import Model

SAMPLE = 1000  # the paper's


def mean_similarity(
    prompts: list[str], sample: int = SAMPLE, seed: int = 0, model: str | None = None
) -> list[float]:
    """The mean cosine similarity of each prompt in a random sample to the others in the sample.

    Args:
        model: the sentence-embedding model whose vectors are compared, as in the paper
            (`engines.embedding`). None: TF-IDF vectors of words, which need no model; their numbers
            compare sources of prompts with each other, but not with the paper.

    Returns:
        [n] numbers, where n is the number of prompts but at most `sample`; [] for fewer than two
        prompts. From 0 to 1 with TF-IDF, from -1 to 1 with a model.
    """
    if len(prompts) > sample:
        prompts = random.Random(seed).sample(prompts, sample)
    if len(prompts) < 2:
        return []
    similar = _cosines(prompts, model)
    return [float(total - 1) / (len(prompts) - 1) for total in similar.sum(axis=1)]


def vectors_in_words(model: str | None) -> str:
    """A phrase naming the vectors behind a similarity; a model appears without its local folder."""
    return f"embeddings of {Model(path=model).label}" if model else "TF-IDF vectors of words"


def _cosines(prompts: list[str], model: str | None):
    """[n, n] cosine similarities."""
    if model:
        from sao_utils.engines.embedding import embeddings

        vectors = embeddings(model, prompts)
        return vectors @ vectors.T
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(token_pattern=r"\w+").fit_transform(prompts)
    return (vectors @ vectors.T).toarray()
