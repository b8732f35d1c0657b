"""The token budget by free memory, and the memory that it is chosen by."""

import pytest
from training_cases import settings
from transformers import Gemma2Config, LlamaConfig

from sao_utils.training.memory import GIB, choose, training_memory_bytes
from sao_utils.training.shapes import shape_of

SMOLLM2 = LlamaConfig(  # SmolLM2-135M
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def cpu_choice(free, longest=300, **changes):
    shape = shape_of(SMOLLM2)
    return choose(shape, settings(**changes), longest, free * GIB, "float32", "cpu")


def test_the_budget_follows_the_free_memory_of_a_machine_without_a_gpu():
    found = [cpu_choice(free).budget for free in (30, 12, 6, 2)]
    assert found[0] == 4096 and found[-1] == 512
    assert found == sorted(found, reverse=True) and len(set(found)) >= 3
    assert not any(cpu_choice(free).twice for free in (30, 12, 6, 2))
    assert cpu_choice(0.5).twice, "nothing fits: at least compute the activations twice"
    # Never below the longest pair; a number stays.
    assert cpu_choice(0.5, longest=1900).budget == 1900
    assert cpu_choice(0.5, longest=1900, token_budget=700).budget == 700
    assert cpu_choice(30, token_budget=700).budget == 700


def test_activations_are_computed_twice_only_where_they_do_not_fit():
    shape = shape_of(Gemma2Config())  # Gemma-2-2B
    found = {
        free: choose(shape, settings(token_budget=4096), 4000, free * GIB) for free in (8, 130)
    }
    assert found[8].twice and not found[130].twice
    assert not choose(shape, settings(gradient_checkpointing="off"), 4000, 8 * GIB).twice
    assert choose(shape, settings(gradient_checkpointing="on"), 4000, 130 * GIB).twice


def test_the_plan_is_what_a_model_of_135_million_parameters_took():
    """Measured, SmolLM2-135M on a CPU in float32: 4.3 GB at 1,024 tokens, 9.9 GB at 4,096.

    Beside the training the process held the libraries and an engine of the same model.
    """
    shape, beside = shape_of(SMOLLM2), 1.4e9
    for tokens, measured in ((1024, 4.3e9), (4096, 9.9e9)):
        parts = training_memory_bytes(
            shape, settings(lora_rank=16), tokens, False, dtype="float32", device="cpu"
        )
        assert sum(parts.values()) + beside == pytest.approx(measured, rel=0.12)
