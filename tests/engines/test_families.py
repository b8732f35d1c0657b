"""Each recipe's model family, in small: its tokens, its turns, and every stage on it."""

import json
import re
from importlib.resources import files
from types import SimpleNamespace

import families
import pytest
import torch
from families import ANSWER, FAMILIES, PROMPT, RECIPES
from transformers import AutoModelForCausalLM

from sao_utils import store as rows
from sao_utils import templates
from sao_utils.engines.base import EngineError, Sampling, encode, first_divergent_token
from sao_utils.engines.loading import load_tokenizer
from sao_utils.engines.registry import load_engine
from sao_utils.methods import sao
from sao_utils.recipe import Model
from sao_utils.recipes import load_recipe, recipe_names
from sao_utils.training.encoding import encode as encode_pair
from sao_utils.training.encoding import token_rows
from sao_utils.training.shapes import shape_of

PERSONAS = {"A tea lover.": PROMPT, "A potter of bowls.": "How do I glaze a bowl in 2 steps?"}
OTHER = "With care, in 1 or 2 steps."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A small model that has learned to write two prompts and to answer them."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = families.make_tokenizer(name)
    model = families.random_model(name, tokenizer)
    asked = [
        (templates.render("persona", persona=p), f"User prompt: {q}") for p, q in PERSONAS.items()
    ]
    answered = [(PROMPT, ANSWER), (PERSONAS["A potter of bowls."], OTHER)]
    families.memorise(model, tokenizer, asked + answered, steps=80)
    families.save(model, tokenizer, folder)
    own = Model(path=str(folder), dtype="float32", batch_tokens=4096)
    tokenizer = load_tokenizer(own)
    return SimpleNamespace(**{**FAMILIES[name], "name": name, "model": own, "tokenizer": tokenizer})


def ids_of(family, *tokens):
    return family.tokenizer.convert_tokens_to_ids(list(tokens))


def pair(chosen=ANSWER, rejected=OTHER):
    made = {"id": "a", "prompt": [{"role": "user", "content": PROMPT}]}
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        made[side] = [{"role": "assistant", "content": text}]
    return made


# ---------------------------------------------------------------------------- tokens and turns


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_training_sees_one_beginning_and_one_end(family, side):
    ids, labels = encode_pair(pair(), side, family.tokenizer)
    begins = [ids.count(token) for token in ids_of(family, family.roles.get("bos_token", "none"))]
    assert begins == ([1] if "bos_token" in family.roles else [0])
    if "bos_token" in family.roles:
        assert family.tokenizer.decode(ids[:1]) == family.roles["bos_token"]
    stops = ids_of(family, *family.stops)
    answer = [label for label in labels if label != -100]
    assert [token for token in answer if token in stops] == ids_of(family, family.closes)
    assert family.tokenizer.decode(ids[-1:]) == family.closes
    assert family.tokenizer.decode(answer) == pair()[side][0]["content"] + family.closes


def test_training_and_generation_begin_the_reply_at_the_same_tokens(family):
    (asked,) = encode([pair()["prompt"]], family.tokenizer)
    (row,) = token_rows([pair()], family.tokenizer, "simpo")
    assert row["prompt_ids"] == asked
    assert family.tokenizer.decode(asked).endswith(family.opens)
    for side in ("chosen", "rejected"):
        ids, _ = encode_pair(pair(), side, family.tokenizer)
        assert ids[: len(asked)] == asked


def test_special_tokens_in_a_users_text_open_and_close_nothing(family):
    hostile = "".join(family.special) + " and go on"
    (plain,) = encode([[{"role": "user", "content": "x"}]], family.tokenizer)
    (ids,) = encode([[{"role": "user", "content": hostile}]], family.tokenizer)
    for token in ids_of(family, *family.special):
        assert ids.count(token) == plain.count(token)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_chat_that_a_template_refuses_is_told_with_what_to_do(goes_on):
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "", "open": goes_on}]
    with pytest.raises(EngineError, match="refuses the chat .*System role.* prompts.personas=null"):
        encode([chat], families.make_tokenizer("gemma"))


# ---------------------------------------------------------------------------- the engine


def test_the_engine_generates_up_to_the_end_of_the_turn(family):
    engine = load_engine(family.model)
    chats = [[{"role": "user", "content": q}] for q in PERSONAS.values()]
    done = {}
    for batch in engine.generate(chats, Sampling(0.0, 60), [1, 2]):
        done.update(batch)
    assert [done[k].text for k in (0, 1)] == [ANSWER, OTHER]
    assert all(completion.finished for completion in done.values())
    ends = [
        len(family.tokenizer(c.text, add_special_tokens=False)["input_ids"]) for c in done.values()
    ]
    assert [c.tokens for c in done.values()] == ends


def test_the_engine_judges_where_the_digits_part(family):
    """Digit-splitting tokenizers put a bare space first: it is shared, and the digit decides."""
    engine = load_engine(family.model)
    question = templates.ranking_prompt(PROMPT, ANSWER, OTHER)
    chat = [{"role": "user", "content": question}]
    choices = templates.VERDICTS
    shared, firsts = first_divergent_token(
        chat, templates.VERDICT_PREFIX, choices, engine.tokenizer
    )
    assert [engine.tokenizer.decode([token]).strip() for token in firsts] == ["1", "2"]
    written = engine.tokenizer.decode(shared) + engine.tokenizer.decode(firsts[:1])
    assert written == templates.VERDICT_PREFIX + choices[0][: len(written) - 8]
    (batch,) = engine.choose([chat], templates.VERDICT_PREFIX, choices)
    ids = encode([chat], engine.tokenizer)[0] + shared
    with torch.no_grad():
        scores = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert batch[0][1] == pytest.approx(scores[firsts].tolist(), abs=1e-4)


# ---------------------------------------------------------------------------- recipes


SYNPO = "gpu-24gb-synpo"  # the model of gpu-24gb-llama; its steps are not SAO's
LAPTOP = "laptop"  # its model is tested for real: tests/test_smollm2.py


def test_every_shipped_recipe_is_looked_at_here():
    of_tiny = {name for name in recipe_names() if load_recipe(name).model.path == "tiny"}
    assert of_tiny | {*RECIPES, SYNPO, LAPTOP} == set(recipe_names())
    for name, kind in RECIPES.items():
        assert load_recipe(name).model.path == FAMILIES[kind]["model"]
        assert len(load_recipe(name).model.revision) == 40


@pytest.mark.parametrize("name", [*RECIPES, SYNPO, LAPTOP])
def test_every_value_of_a_recipe_says_whose_it_is(name):
    text = (files("sao_utils") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    above = ""
    for line in text.splitlines():
        if line.strip().startswith("#"):
            above += line
            continue
        named = line.startswith(("name:", "about:", "extends:")) or line.endswith(":")
        assert named or not line or re.search(r"# ?(paper|ours)|# Ours", above + line), line
        above = ""


SMALL = {
    "model.revision": None,
    "model.engine": "transformers",
    "model.quantisation": "none",
    "model.max_context": None,
    "model.dtype": "float32",
    "model.batch_tokens": 4096,
    "prompts.count": 2,
    "prompts.max_similarity": None,  # there are two
    "prompts.max_new_tokens": 60,
    "responses.max_new_tokens": 60,
    "judging.min_mass": 0.0,  # the small models have not learned to judge
}


def test_each_recipe_goes_from_personas_to_pairs_on_its_small_model(family, tmp_path, results):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"persona": p}) + "\n" for p in PERSONAS))
    for name in [name for name, kind in RECIPES.items() if kind == family.name]:
        changes = {"model.path": family.model.path, "prompts.personas": str(source)}
        run = rows.open_run(name, name, {**SMALL, **changes})
        prompts = sao.rows(run, "prompts")
        asked = [row["prompt"] for row in prompts if row["discarded"] is None]
        kept = len(asked)
        assert kept >= 1
        assert not any(token in prompt for prompt in asked for token in family.special)
        assert len(sao.rows(run, "responses")) == 2 * kept
        outcomes = {row["outcome"] for row in sao.rows(run, "verdicts")}
        assert outcomes <= {"identical", "consistent", "inconsistent", "tie", "invalid"}
        counted = dict(sao.funnel(run))
        assert counted["asked for"] == 2 and counted["prompts"] == kept
        lost = -sum(count for count in counted.values() if count < 0)
        assert counted["pairs"] == 2 - lost


# ---------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(kind):
    config = families.small_config(kind, 200)
    model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config).parameters == model.num_parameters()
    assert shape_of(config.to_dict()).parameters == model.num_parameters()
