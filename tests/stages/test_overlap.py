"""Near-duplicates and shared word sequences, against brute force."""

import random
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_utils.stages import overlap
from sao_utils.stages.overlap import (
    near_duplicates,
    pieces,
    shared_ngrams,
    similarity_of,
    words,
)

FEW_WORDS = st.lists(st.sampled_from("a b c d e f".split()), max_size=9).map(" ".join)
ANY_TEXTS = st.lists(st.one_of(FEW_WORDS, st.text(max_size=30)), max_size=12)


def prompts(count, rng, length=30, vocabulary=5000):
    return [" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(length)) for _ in range(count)]


# ---------------------------------------------------------------------- words


def test_words_are_lower_case_and_free_of_punctuation():
    assert words("  Don't STOP -- it's\n3.5 km, (really)! ") == "dont stop its 35 km really".split()
    assert words("snake_case") == ["snakecase"]


def test_words_of_other_scripts_and_of_compatibility_forms_are_read():
    assert words("ＡＢＣ ﬁne Ünïcode ŒUVRE") == ["abc", "fine", "ünïcode", "œuvre"]
    assert words("Что? 好的。 مرحبا") == ["что", "好的", "مرحبا"]
    assert words("\ud800 🙂 \x00") == []  # a broken surrogate, a picture and a control character


def test_vowel_signs_and_accents_stay_on_their_letters():
    assert words("राम की और का!") == ["राम", "की", "और", "का"]
    assert words("เที่ยว") == ["เที่ยว"] and words("x\u030c, y") == ["x\u030c", "y"]
    assert words("İzmir 1\ufe0f") == ["izmir", "1"] and words("\u2764\ufe0f") == []
    assert near_duplicates(["राम की", "राम का"], 0.9) == [None, None]


# ---------------------------------------------------------------------- near-duplicates


def brute_force(texts, similarity):
    found = []
    for k, text in enumerate(texts):
        kept = [e for e in range(k) if found[e] is None]
        near = (e for e in kept if similarity_of(pieces(text), pieces(texts[e])) >= similarity)
        found.append(next(near, None))
    return found


@settings(deadline=None)  # the first call imports
@given(ANY_TEXTS, st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_near_duplicates_are_those_of_brute_force(texts, similarity):
    assert near_duplicates(texts, similarity) == brute_force(texts, similarity)


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_hardly_any_pair_above_the_threshold_is_missed(similarity):
    rng = random.Random(0)
    texts = []
    for text in prompts(700, rng):
        changed = text.split()
        for _ in range(rng.randint(0, 6)):
            changed[rng.randrange(len(changed))] = "new"
        texts += [text, " ".join(changed)]
    truth = [
        similarity_of(pieces(a), pieces(b)) >= similarity for a, b in zip(texts[::2], texts[1::2])
    ]
    found = [earlier is not None for earlier in near_duplicates(texts, similarity)[1::2]]
    assert 100 < sum(truth) < 700
    assert not [1 for true, was in zip(truth, found) if was and not true]
    assert sum(found) >= 0.995 * sum(truth)


def test_a_chain_of_near_duplicates_loses_only_what_is_near_a_kept_text():
    letters = [chr(97 + k) for k in range(20)]
    chain = [
        " ".join(letters[k : k + 12]) for k in range(3)
    ]  # each neighbour shares 10 of 12 pairs
    assert similarity_of(pieces(chain[0]), pieces(chain[1])) > 0.8
    assert similarity_of(pieces(chain[0]), pieces(chain[2])) < 0.7
    assert near_duplicates(chain, 0.7) == [None, 0, None]
    assert near_duplicates([chain[0], chain[2], chain[1]], 0.7) == [None, None, 0]  # the first


def test_order_of_words_counts_and_punctuation_does_not():
    texts = ["Is the dog bigger than the cat?", "cat the than bigger dog the is", "is, the DOG... "
             "bigger than the cat"]  # fmt: skip
    assert near_duplicates(texts, 0.9) == [None, None, 0]


def test_empty_and_huge_texts_are_compared_like_others():
    huge = " ".join(f"w{k}" for k in range(100_000))
    texts = ["", huge, "?!", huge + " end", "word", "Word."]
    assert near_duplicates(texts, 0.7) == [None, None, 0, 1, None, 4]
    assert near_duplicates([], 0.7) == []


def test_the_same_text_ten_thousand_times_takes_no_quadratic_time():
    started = time.process_time()
    found = near_duplicates(["Which tool is right for chess in winter?"] * 10_000, 0.7)
    assert found == [None] + [0] * 9_999
    assert time.process_time() - started < 20


def test_texts_that_share_a_phrase_are_cut_into_pieces_once(monkeypatch):
    """All are candidates of each other: a second look at each must be cheap."""
    cut = []
    monkeypatch.setattr(overlap, "pieces", lambda text: cut.append(text) or pieces(text))
    phrase = "could you please tell me in a few simple words how i can"
    texts = [f"{phrase} {rest}" for rest in prompts(150, random.Random(3), length=6)]
    assert overlap.near_duplicates(texts, 0.7) == brute_force(texts, 0.7)
    assert cut == texts


def test_memory_grows_with_the_number_of_texts_and_not_with_its_square():
    def peak(count):
        texts = prompts(count, random.Random(count))
        tracemalloc.start()
        near_duplicates(texts, 0.7)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(1_200) < 5 * peak(300)


# ---------------------------------------------------------------------- shared word sequences


def sequences(text, n):
    found = words(text)
    return {tuple(found[k : k + n]) for k in range(len(found) - n + 1)}


def touches(text, other, n):
    length = min(n, len(words(other)))
    return length > 0 and bool(sequences(text, length) & sequences(other, length))


@settings(deadline=None)
@given(ANY_TEXTS, ANY_TEXTS, st.integers(1, 5))
def test_shared_ngrams_are_those_of_brute_force(texts, against, n):
    for text, hit in zip(texts, shared_ngrams(texts, against, n), strict=True):
        assert (hit is not None) == any(touches(text, other, n) for other in against)
        if hit is not None:
            k, shared = hit
            length = len(shared.split())
            assert length >= min(n, len(words(against[k])))
            shared = tuple(shared.split())
            assert shared in sequences(text, length) & sequences(against[k], length)


def test_the_words_in_common_are_shown_as_far_as_both_texts_agree():
    text = "Please tell me: how do I bake bread at home, without yeast?"
    against = ["Where to fish", "How do I bake bread at home for a wedding?"]
    assert shared_ngrams([text], against, 4) == [(1, "how do i bake bread at home")]
    assert shared_ngrams([text], against, 8) == [None]


def test_a_short_item_counts_only_when_all_of_it_occurs():
    against = ["Name three primes."]
    texts = ["Can you name three primes above ten?", "Name three rivers", "primes three name", ""]
    assert shared_ngrams(texts, against, 8) == [(0, "name three primes"), None, None, None]


def test_empty_items_match_nothing_and_no_items_match_nothing():
    assert shared_ngrams(["", "a b", "!"], ["", "..."], 1) == [None] * 3
    assert shared_ngrams(["a b"], [], 1) == [None]


def test_a_text_of_a_million_words_is_searched_in_seconds():
    huge = " ".join(f"w{k % 977}" for k in range(1_000_000)) + " the hidden question is here now"
    started = time.process_time()
    assert shared_ngrams([huge], ["The hidden question is here"], 5)[0][0] == 0
    assert time.process_time() - started < 20
