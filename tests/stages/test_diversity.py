"""How alike prompts are, and of which vectors the number is."""

import numpy as np
import pytest
from encoder import save_encoder

from sao_utils.engines.embedding import embeddings
from sao_utils.evaluation.answers import Candidate
from sao_utils.methods.iterate import Trained
from sao_utils.report import rounds
from sao_utils.stages.diversity import mean_similarity, vectors_in_words
from sao_utils.store import open_run

PROMPTS = ["how do I bake bread", "how is bread baked", "prove that two and two are four"]


def test_without_a_model_prompts_that_share_words_are_alike_and_others_are_not():
    first, second, other = mean_similarity(PROMPTS)
    assert 0 < first == pytest.approx(second) and other == pytest.approx(0)
    assert mean_similarity(["the same"] * 4) == pytest.approx([1] * 4)
    assert mean_similarity(["one"]) == []


def test_with_a_model_each_number_is_the_mean_cosine_of_its_vectors_to_the_others(tmp_path):
    save_encoder(tmp_path)
    vectors = embeddings(str(tmp_path), PROMPTS)
    cosines = [[float(np.dot(a, b)) for b in vectors] for a in vectors]
    expected = [np.mean(row[:k] + row[k + 1 :]) for k, row in enumerate(cosines)]
    assert mean_similarity(PROMPTS, model=str(tmp_path)) == pytest.approx(expected, abs=1e-5)
    assert mean_similarity(PROMPTS) != pytest.approx(expected, abs=1e-2)
    assert len(mean_similarity(PROMPTS * 9, sample=5, model=str(tmp_path))) == 5


def test_the_row_of_a_round_says_of_which_vectors_it_is_and_names_no_folder(results, tmp_path):
    folder = tmp_path / "my-encoder"
    save_encoder(folder)
    pairs = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    found = {}
    for name, model in (("plain", None), ("embedded", str(folder))):
        run = open_run("tiny-synpo", name, {"rounds": 1, "prompts.diversity_model": model})
        base = run.recipe.model
        [found[name]] = rounds._diversity(
            run, [Trained(Candidate("synpo", 0, base, 1), base, pairs)]
        )
    assert found["plain"]["note"] == vectors_in_words(None) == "TF-IDF vectors of words"
    assert found["embedded"]["note"] == "embeddings of my-encoder"
    assert found["embedded"]["value"] != pytest.approx(found["plain"]["value"], abs=1e-2)
