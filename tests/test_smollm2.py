"""SmolLM2-135M-Instruct, the real one: fetched, it writes prompts and answers. `make test-smollm2`."""

import os

import pytest

from sao_utils.engines.base import Sampling
from sao_utils.engines.registry import load_engine
from sao_utils.fetch import fetch
from sao_utils.methods import sao
from sao_utils.recipe import Model
from sao_utils.store import open_run

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif("SAO_SMOLLM2" not in os.environ, reason="make test-smollm2 runs it"),
]


@pytest.fixture(scope="module")
def model():
    """The folder of the model, in the checkout's results/cache: it is downloaded once."""
    try:
        return str(fetch("smollm2"))
    except RuntimeError as error:  # nothing answers
        pytest.skip(str(error))


def test_the_model_knows_the_capital_of_france(model):
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    (batch,) = load_engine(Model(path=model)).generate([chat], Sampling(0.0, 30), [0])
    assert "Paris" in batch[0][1].text and batch[0][1].finished


def test_personas_lead_to_prompts_and_answers_in_plain_text(model, results):
    run = open_run("laptop", "look", {"model.path": model, "prompts.count": 10})
    prompts, answers = sao.rows(run, "prompts"), sao.rows(run, "responses")
    usable = [row for row in prompts if row["discarded"] is None]
    assert len(prompts) == 10 and len(usable) >= 5
    assert len(answers) == 2 * len(usable)
    assert sum(row["tokens"] for row in answers) / len(answers) > 10
    assert all(row["model"].startswith("smollm2-135m-instruct") for row in answers)
