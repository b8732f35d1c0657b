"""Keyword lists: where SynPO's prompts come from."""

import pytest

from sao_utils.recipe import RecipeError
from sao_utils.stages.keywords import content_words, has_name, keyword_lists, seed_keywords
from sao_utils.store import open_run


def synpo_run(name, **overrides):
    return open_run("tiny-synpo", name, {"prompts.count": 30, **overrides})


def test_a_list_is_three_different_words_of_one_paragraph(results, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Kites fly above windy beaches.\n\nRusty hinges squeak loudly tonight.\n")
    run = synpo_run("file", **{"prompts.data": str(corpus), "prompts.count": 4})
    paragraphs = [content_words(text) for text in corpus.read_text().split("\n\n")]
    for row in keyword_lists(run, 0):
        words = set(row["keywords"])
        assert len(words) == 3
        assert any(words <= paragraph for paragraph in paragraphs)


def test_stop_words_and_lists_with_a_personal_name_are_dropped(results, tmp_path):
    assert content_words("And then the kettle is yours") == {"kettle"}
    assert has_name(["kettle", "Jennifer"]) and not has_name(["kettle", "jennifer"])
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Jennifer mends kettles.\n\nCarpenters mend wooden kettles.")
    run = synpo_run("names", **{"prompts.data": str(corpus), "prompts.count": 3})
    assert all("Jennifer" not in row["keywords"] for row in keyword_lists(run, 0))


def test_no_list_comes_twice_in_the_rounds_of_a_seed_and_each_call_gives_the_same(results):
    run = synpo_run("rounds")
    rounds = [keyword_lists(run, 0, number) for number in range(3)]
    lists = [tuple(row["keywords"]) for rows in rounds for row in rows]
    assert len(set(lists)) == len(lists) == 90
    assert keyword_lists(run, 0, 1) == rounds[1]
    assert keyword_lists(run, 1, 1) != rounds[1]


def test_a_corpus_that_is_too_small_says_what_to_do(results, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Kites fly above beaches.")
    run = synpo_run("few", **{"prompts.data": str(corpus)})
    with pytest.raises(RecipeError, match="larger corpus, or lower the count"):
        keyword_lists(run, 0)


def test_a_seed_prompt_gets_two_words_of_its_own_and_one_of_another():
    prompts = ["wooden kettles whistle", "rusty hinges squeak"]
    for own, words in zip((0, 1), seed_keywords(prompts, 0)):
        inside = [word for word in words if word in prompts[own].split()]
        assert len(inside) == 2 and len(words) == 3
        assert set(words) - set(inside) <= set(prompts[1 - own].split())
