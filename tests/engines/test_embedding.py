"""Sentence embeddings: the mean of a text's own states, whatever stands beside it in a batch."""

import json

import numpy as np
import pytest
import torch
from encoder import save_encoder

from sao_utils.engines import embedding
from sao_utils.engines.base import EngineError
from sao_utils.engines.embedding import embeddings

TEXTS = ["how do I bake bread at home", "prove that", "", "bread " * 50, "two and two are four"]


def test_a_text_has_the_mean_of_its_own_states_at_length_1_and_a_long_one_is_cut(
    tmp_path, monkeypatch
):
    encoder, tokenizer = save_encoder(tmp_path)
    monkeypatch.setattr(embedding, "BATCH", 3)  # long and short ones share a batch
    found = embeddings(str(tmp_path), TEXTS)
    assert found.shape == (len(TEXTS), 32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    for text, vector in zip(TEXTS, found):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)["input_ids"]
        with torch.inference_mode():
            mean = encoder(input_ids=ids).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_weights_that_could_run_code_and_weights_that_are_not_there_are_refused(tmp_path):
    encoder, _ = save_encoder(tmp_path)
    config = tmp_path / "config.json"
    deeper = {**json.loads(config.read_text()), "num_hidden_layers": 3}
    config.write_text(json.dumps(deeper))
    with pytest.raises(EngineError, match="lacks weights.*such as sentence-transformers"):
        embeddings(str(tmp_path), TEXTS)
    (tmp_path / "model.safetensors").unlink()
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (str(tmp_path), "no/such-model"):
        with pytest.raises(EngineError, match="prompts.diversity_model .* null takes TF-IDF"):
            embeddings(path, TEXTS)
