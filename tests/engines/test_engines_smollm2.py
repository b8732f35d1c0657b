"""A real model on real text says the same through every engine: transformers, vLLM, a server.

`make test-vllm` runs it where `sao fetch smollm2` has brought the model; two minutes on two idle cores.
"""

import pytest
from small import all_of
from vllm_server import CPU_BUILD, needs_vllm, serving, wait_for

from sao_utils import templates
from sao_utils.engines.base import Sampling, encode
from sao_utils.engines.registry import load_engine, unload_engines
from sao_utils.evaluation.questions import evaluated_prompts
from sao_utils.recipe import Model
from sao_utils.recipes import load_recipe
from sao_utils.store import fetched

FOLDER = fetched("smollm2")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.smollm2,
    needs_vllm,
    pytest.mark.skipif(FOLDER is None, reason="the model is not here (sao fetch smollm2)"),
]
PROMPTS, TOKENS, JUDGED = 50, 24, 16
NEAR = 1e-3  # nats between two tokens, or two engines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Transformers, which is the measure; vLLM in a process of this one; and vLLM's server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CPU_BUILD, "SAO_TEST_KEY": "unused"}.items():
            patch.setenv(name, value)
        log = tmp_path_factory.mktemp("server") / "log"
        with serving(FOLDER, "served-smollm2", log) as url:
            here = Model(path=str(FOLDER), dtype="float32", max_context=2048)
            there = Model(path="served-smollm2", engine="api", url=url, key_variable="SAO_TEST_KEY")
            vllm = here.model_copy(update={"engine": "vllm"})
            yield {"transformers": here, "vllm": vllm, "server": there}
        unload_engines()


@pytest.fixture(scope="module")
def found(models):
    """Of each engine the greedy replies to questions of the recipe laptop, and verdicts on them."""
    questions = evaluated_prompts(load_recipe("laptop").evaluation)
    asked = [questions[k * len(questions) // PROMPTS] for k in range(PROMPTS)]
    chats, found = [[{"role": "user", "content": text}] for text in asked], {}
    for name, model in models.items():
        if name == "server":
            wait_for(model.url)
        engine = load_engine(model)
        replies = all_of(engine.generate(chats, Sampling(0.0, TOKENS), [0] * PROMPTS))
        texts = [replies[k].text for k in range(PROMPTS)]
        if name == "transformers":
            rankings = [
                templates.ranking_prompt(asked[k], texts[k], texts[k + JUDGED])
                for k in range(JUDGED)
            ]
        ranked = [[{"role": "user", "content": text}] for text in rankings]
        verdicts = all_of(engine.choose(ranked, templates.VERDICT_PREFIX, templates.VERDICTS))
        found[name] = texts, [verdicts[k] for k in range(JUDGED)]
    return chats, found


def gap(engine, chat, ours, theirs):
    """Nats between the tokens in which two replies to a chat part, as the model has them."""
    import torch

    one, other = (
        engine.tokenizer(text, add_special_tokens=False).input_ids for text in (ours, theirs)
    )
    ends = engine.tokenizer.eos_token_id
    one, other = one + [ends], other + [ends]
    k = next(k for k, pair in enumerate(zip(one, other)) if len(set(pair)) == 2)
    ids = torch.tensor([encode([chat], engine.tokenizer)[0] + one[:k]])
    with torch.inference_mode():
        logps = engine.model(ids).logits[0, -1].log_softmax(-1)
    return float(abs(logps[one[k]] - logps[other[k]]))


@pytest.mark.parametrize("name", ["vllm", "server"])
def test_greedy_replies_are_equal_up_to_the_first_near_tie(models, found, name):
    chats, of = found
    engine = load_engine(models["transformers"])
    differ = [k for k in range(PROMPTS) if of[name][0][k] != of["transformers"][0][k]]
    gaps = [gap(engine, chats[k], of["transformers"][0][k], of[name][0][k]) for k in differ]
    print(f"{name}: {PROMPTS - len(differ)} of {PROMPTS} replies equal; gaps of the others {gaps}")
    assert len(set(of["transformers"][0])) > PROMPTS / 2  # they are replies, and of many kinds
    assert all(between < NEAR for between in gaps)


@pytest.mark.parametrize("name", ["vllm", "server"])
def test_verdicts_have_the_same_log_probabilities(found, name):
    ours, theirs = (found[1][of][1] for of in ("transformers", name))
    apart = [abs(a - b) for pair in zip(ours, theirs) for a, b in zip(*pair)]
    print(f"{name}: largest difference {max(apart):.1e} nats, n = {len(apart)}")
    assert max(apart) < NEAR
    assert max(map(max, ours)) - min(map(min, ours)) > 0.1  # they are of different verdicts
