"""What texts have in common: near-duplicates among them, and word sequences of an evaluation set.

Words are those of GPT-3's decontamination (Brown et al. 2020, appendix C): lower case, parted by
white space, without punctuation. Ours: Unicode is normalised first (NFKC). A script that puts no
space between words has long "words" here, so only whole phrases of it are found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import takewhile

PIECE = 2  # words of the pieces by which texts are compared
MISSED = 1e-3  # accepted probability to miss a pair that is just as similar as asked
HASHES = 128  # of a signature, at most


def words(text: str) -> list[str]:
    """The words of a text; what is no letter, digit, mark on one or white space is taken out."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i")  # of a Turkish I
    return re.sub(r"[^\w\s]|_", _mark, plain).split()


def _mark(found: re.Match) -> str:
    """A vowel sign or accent as it is, and nothing for any other character.

    They are letters of their own in Hindi, say, but not in `\\w`. Selectors of how a picture is drawn
    are of the same category.
    """
    is_mark = unicodedata.category(found[0]) in ("Mn", "Mc")
    return found[0] if is_mark and not "\ufe00" <= found[0] <= "\ufe0f" else ""


def _sequences(found: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n words in a row; nothing of fewer words."""
    return (tuple(found[k : k + n]) for k in range(len(found) - n + 1))


def pieces(text: str) -> frozenset[tuple[str, ...]]:
    """Every two words in a row of a text; of a text with one word that word."""
    found = words(text)
    return frozenset(_sequences(found, min(PIECE, len(found)))) if found else frozenset()


def similarity_of(one: frozenset, other: frozenset) -> float:
    """Jaccard similarity: what both sets have by what either has; 1 for two empty sets."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if one or other else 1.0


def near_duplicates(texts: Sequence[str], similarity: float) -> list[int | None]:
    """Which texts repeat an earlier one, nearly or word for word.

    Two texts are near-duplicates when the Jaccard similarity of their `pieces` is at least
    `similarity`. Candidates come from MinHash signatures (Broder 1997) in an index of bands
    (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). Each is verified, so
    what is found is true; a pair just at the threshold is missed with a probability of at most
    1 in 1,000, a nearer one more rarely, the same words never. The hashes are fixed: the same
    texts give the same answer.

    Args:
        similarity: above 0, at most 1. Below 0.05 more pairs are missed.

    Returns:
        For each text the index of the first text that it repeats, among the earlier ones that
        repeat none themselves; else None. So the texts with None are apart from each other, and
        none is given up for the sake of one that is given up.
    """
    return list(_near_duplicates(tuple(texts), similarity))


@lru_cache(maxsize=4)  # every later stage asks for the prompts anew
def _near_duplicates(texts: tuple[str, ...], similarity: float) -> tuple[int | None, ...]:
    from datasketch import MinHash, MinHashLSH

    bands, rows = _bands(similarity)
    index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    blank = MinHash(num_perm=bands * rows, seed=1)
    numbers: dict[tuple[str, ...], int] = {}  # of pieces: compared faster, and kept once
    kept: dict[int, frozenset[int]] = {}
    found: list[int | None] = []
    for k, text in enumerate(texts):
        own, signature = pieces(text), blank.copy()
        signature.update_batch([" ".join(piece).encode() for piece in own])
        mine = frozenset(numbers.setdefault(piece, len(numbers)) for piece in own)
        earlier = sorted(index.query(signature))
        near = (e for e in earlier if similarity_of(mine, kept[e]) >= similarity)
        found.append(next(near, None))
        if found[-1] is None:
            index.insert(k, signature)
            kept[k] = mine
    return tuple(found)


def _bands(similarity: float) -> tuple[int, int]:
    """(bands, rows): as many rows a band as can be, and then as few bands, within HASHES and MISSED.

    A pair of similarity s agrees in all r rows of a band with probability s^r, hence in none of b
    bands with (1 - s^r)^b. Rows keep candidates away that are no near-duplicates.
    """
    fits = [
        (-rows, bands)
        for rows in range(1, HASHES // 2 + 1)
        for bands in range(2, HASHES // rows + 1)
        if (1 - similarity**rows) ** bands <= MISSED
    ]
    rows, bands = min(fits, default=(-1, HASHES))
    return bands, -rows


def shared_ngrams(
    texts: Sequence[str], against: Sequence[str], n: int
) -> list[tuple[int, str] | None]:
    """Which texts have n words in a row in common with one of another set.

    The overlap of GPT-3's decontamination (Brown et al. 2020, appendix C; their n is 8 to 13). A
    text of `against` with fewer than n words counts when all of it occurs in a row.

    Returns:
        For each text None, or (index in `against`, the words in common), for the first such
        sequence of the text, made as long as both texts agree.
    """
    others = [words(other) for other in against]
    places: dict[tuple[str, ...], tuple[int, int]] = {}
    for k, other in enumerate(others):
        for start, sequence in enumerate(_sequences(other, min(n, len(other))) if other else ()):
            places.setdefault(sequence, (k, start))
    lengths = sorted({len(sequence) for sequence in places}, reverse=True)

    def match(text: str) -> tuple[int, str] | None:
        mine = words(text)
        for length in lengths:
            for at, sequence in enumerate(_sequences(mine, length)):
                if sequence in places:
                    k, start = places[sequence]
                    rest = zip(mine[at + length :], others[k][start + length :])
                    more = takewhile(lambda pair: pair[0] == pair[1], rest)
                    return k, " ".join([*sequence, *(word for word, _ in more)])
        return None

    return [match(text) for text in texts]


def nearest(texts: Sequence[str], against: Sequence[str]) -> list[tuple[int, float]]:
    """The most similar text of another set, for each text: (index in `against`, similarity).

    Similarity is that of `near_duplicates` (Jaccard of `pieces`), here of every two texts exactly;
    the first of equally near ones counts. Nothing to compare with: (0, 0.0).
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    if not texts or not against:
        return [(0, 0.0)] * len(texts)
    column: dict[tuple[str, ...], int] = {}
    matrices = []
    for group in (texts, against):
        found = [[column.setdefault(p, len(column)) for p in pieces(text)] for text in group]
        starts = np.cumsum([0, *map(len, found)])
        where = [k for one in found for k in one]
        matrices.append((np.ones(len(where)), where, starts))
    mine, others = (
        csr_matrix(parts, shape=(len(parts[2]) - 1, max(1, len(column)))) for parts in matrices
    )
    sizes, turned, result = others.sum(1).A1, others.T.tocsr(), []
    for start in range(0, len(texts), 64):  # a block of rows at a time: 64 times `against`
        block = mine[start : start + 64]
        shared = (block @ turned).toarray()
        union = block.sum(1).A1[:, None] + sizes - shared
        alike = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        best = alike.argmax(1)
        result += [(int(k), float(alike[row, k])) for row, k in enumerate(best)]
    return result
