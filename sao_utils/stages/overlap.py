"""What texts have in common: near-duplicates among them, and word sequences of an evaluation set.

Words are those of GPT-3's decontamination (Brown et al. 2020, appendix C): lower case, parted by
white space, without punctuation. Ours: Unicode is normalised first (NFKC). A script that puts no
space between words has long "words" here, so only whole phrases of it are found.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

PIECE = 2  # words of the pieces by which texts are compared


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

    Two texts are near-duplicates when the Jaccard similarity of their `pieces` is at least `similarity`.
    The search is exact. Candidates come from prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo,
    Ma and Srikant 2007): two sets that are so similar share one of their few rarest pieces, so an index of
    those is enough, also where all texts have a phrase in common.

    Args:
        similarity: above 0, at most 1.

    Returns:
        For each text the index of the first text that it repeats, among the earlier ones that
        repeat none themselves; else None. So the texts with None are apart from each other, and
        none is given up for the sake of one that is given up.
    """
    of_text = [pieces(text) for text in texts]
    frequency = Counter(piece for own in of_text for piece in own)
    order = sorted(frequency, key=lambda piece: (frequency[piece], piece))
    number = {piece: k for k, piece in enumerate(order)}  # rare ones first, and compared faster
    index: dict[int, list[int]] = {}  # piece -> the kept texts that have it among their rarest
    kept: dict[int, frozenset[int]] = {}
    nothing: int | None = None  # the first text without any words
    found: list[int | None] = []
    for k, own in enumerate(of_text):
        mine = sorted(number[piece] for piece in own)
        if not mine:
            found.append(nothing)
            nothing = k if nothing is None else nothing
            continue
        # Sets of this similarity share at least so many pieces, hence one of the first `rarest`.
        shared = max(1, math.ceil(similarity * len(mine) - 1e-9))
        rarest = mine[: len(mine) - shared + 1]
        near, all_mine = None, frozenset(mine)
        for earlier in sorted({e for piece in rarest for e in index.get(piece, ())}):
            theirs = kept[earlier]
            alike_in_size = similarity * len(mine) <= len(theirs) <= len(mine) / similarity
            if alike_in_size and similarity_of(all_mine, theirs) >= similarity:
                near = earlier
                break
        found.append(near)
        if near is None:
            kept[k] = all_mine
            for piece in rarest:
                index.setdefault(piece, []).append(k)
    return found


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
