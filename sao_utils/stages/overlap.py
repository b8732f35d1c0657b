"""Overlap between texts: near-duplicates, and word sequences shared with an evaluation set.

Words are defined as in GPT-3's decontamination (Brown et al. 2020, appendix C): lower case, separated
by white space, without punctuation. Ours: Unicode is normalised first (NFKC). A script that puts no
spaces between words has long "words" here, so only whole phrases match.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

PIECE = 2  # number of words in the pieces by which texts are compared


def words(text: str) -> list[str]:
    """The words of a text, with everything removed but letters, their marks, digits and white space."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i")  # Turkish dotted I
    return re.sub(r"[^\w\s]|_", _mark, plain).split()


def _mark(found: re.Match) -> str:
    """A vowel sign or accent unchanged; the empty string for any other character.

    In Hindi, for example, such marks are letters in their own right, but `\\w` does not match them.
    Variation selectors, which choose how an emoji is drawn, share their category and are removed.
    """
    is_mark = unicodedata.category(found[0]) in ("Mn", "Mc")
    return found[0] if is_mark and not "\ufe00" <= found[0] <= "\ufe0f" else ""


def _sequences(found: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n words in a row; nothing if there are fewer than n words."""
    return (tuple(found[k : k + n]) for k in range(len(found) - n + 1))


def pieces(text: str) -> frozenset[tuple[str, ...]]:
    """Every two words in a row of a text; for a text of one word, that word."""
    found = words(text)
    return frozenset(_sequences(found, min(PIECE, len(found)))) if found else frozenset()


def similarity_of(one: frozenset, other: frozenset) -> float:
    """Jaccard similarity: the size of the intersection over that of the union; 1 for two empty sets."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if one or other else 1.0


def near_duplicates(texts: Sequence[str], similarity: float) -> list[int | None]:
    """Which texts repeat an earlier one, nearly or word for word.

    Two texts are near-duplicates when the Jaccard similarity of their `pieces` is at least `similarity`.
    The search is exact. Candidates come from prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo,
    Ma and Srikant 2007): two sets this similar share one of their few rarest pieces, so an index of those
    is enough, even if all texts have a phrase in common.

    Args:
        similarity: above 0, at most 1.

    Returns:
        For each text, the index of the first text that it repeats, among the earlier ones that are
        not themselves repeats; else None. So no two texts with None are near-duplicates, and no text is
        dropped merely because it resembles one that is itself dropped.
    """
    of_text = [pieces(text) for text in texts]
    frequency = Counter(piece for own in of_text for piece in own)
    order = sorted(frequency, key=lambda piece: (frequency[piece], piece))
    number = {piece: k for k, piece in enumerate(order)}  # rare ones first; ints compare faster
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
        # Sets this similar share at least `shared` pieces, hence one of the `rarest`.
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
    """Which texts share n consecutive words with a text of another set.

    This is the overlap of GPT-3's decontamination (Brown et al. 2020, appendix C; their n is 8 to 13).
    A text of `against` with fewer than n words matches if the whole of it occurs consecutively.

    Returns:
        For each text, None or (index in `against`, the shared words), for the first such sequence in
        the text, extended for as long as both texts agree.
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
