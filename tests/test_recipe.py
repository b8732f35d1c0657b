from typing import get_args

import pytest

from sao_utils.methods.iterate import METHODS
from sao_utils.recipe import Method, RecipeError
from sao_utils.recipes import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_each_shipped_recipe_loads_under_its_own_name(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name, method", [("tiny", "lora"), ("paper", "full")])
def test_the_papers_settings_are_kept(name, method):
    recipe = load_recipe(name)
    training = recipe.training
    assert (training.algorithm, training.method, training.quantisation) == ("simpo", method, "none")
    assert (training.beta, training.gamma) == (10, 3)
    assert (training.epochs, training.warmup_ratio, training.schedule) == (1, 0.1, "cosine")
    assert (recipe.prompts.temperature, recipe.responses.temperature) == (0.6, 0.6)
    if name == "paper":
        assert (training.learning_rate, training.batch_size) == (1e-6, 128)
        assert recipe.prompts.count == 60_000 and recipe.judging.method == "sampled"


SERVER = {"path": "m", "engine": "api", "url": "http://localhost:1/v1"}


@pytest.mark.parametrize(
    "overrides, fault",
    [
        ({"training.betta": 3}, "'training.betta'. Did you mean training.beta"),
        ({"gamma": 3}, "'gamma'. Did you mean training.gamma"),
        ({"xyzzy": 3}, "'xyzzy'. Keys: name, .*training.beta, "),
        ({"evaluation.harness": []}, "evaluation.harness is now evaluation.tasks"),
        ({"judge.workers": 2}, "judge.workers is now a server's.*data-parallel-size.*engine=api"),
        ({"training.beta": "much"}, "training.beta: "),
        ({"arms": ["selfish"]}, "arms"),
        ({"arms": "[self"}, "arms"),
        ({"arms": ["self", "self"]}, "arms names a value twice"),
        ({"seeds": [0, 0]}, "seeds names a value twice"),
        ({"seeds": []}, "seeds"),
        ({"evaluation.temperatures": [0.0, -1.0]}, "temperatures"),
        ({"training.method": "full", "training.quantisation": "nf4"}, "cannot be quantisation=nf4"),
        ({"judging.method": "sampled"}, "min_margin=2 would drop every pair"),
        ({"prompts.source": "file"}, "prompts.*data"),
        ({"prompts.data": "x.csv"}, "prompts.*source"),
        ({"prompts.personas": None}, "needs personas"),
        ({"model.engine": "api"}, "url"),
        ({"model.engine": "api", "model.url": "http://me:secret@host/v1"}, "key_variable"),
        ({"model.engine": "api", "model.url": "http://host/v1?api-key=secret"}, "key_variable"),
        ({"judge.path": "x", "judge.key_variable": "gsk_secret"}, "NAME"),
        ({"model.quantisation": "fp8"}, "quantisation"),
        ({"model.adapter": "somewhere"}, "merge"),
        ({"others": {"x": {**SERVER, "adapter": "a"}}}, "serve the tuned model"),
        ({"others": {"../x": SERVER}}, "others"),
        ({"judges": {"self": SERVER}}, "'self' is taken"),
        ({"evaluation.max_cost": 5, "judges": {"x": SERVER}}, "price of judges.x is not known"),
    ],
)
def test_what_does_not_fit_is_refused_and_its_key_named(overrides, fault):
    with pytest.raises(RecipeError, match=fault) as error:
        load_recipe("tiny", overrides)
    assert "secret" not in str(error.value) and "Value error" not in str(error.value)


def test_overrides_may_be_text_for_each_value_and_for_the_whole():
    recipe = load_recipe("tiny", {"training.learning_rate": "1e-5", "seeds": "[0, 1, 2]"})
    assert recipe.training.learning_rate == 1e-5 and recipe.seeds == (0, 1, 2)
    assert load_recipe("tiny", {"prompts.personas": "a #b.csv"}).prompts.personas == "a #b.csv"
    assert load_recipe("tiny", '{"prompts.count": 5}').prompts.count == 5
    assert load_recipe("tiny", "prompts.count: 5").prompts.count == 5
    assert load_recipe("tiny", "") == load_recipe("tiny", "{}") == load_recipe("tiny")
    with pytest.raises(RecipeError, match='write a mapping, such as {"prompts.count": 5}'):
        load_recipe("tiny", "prompts.count=5")


# ---------------------------------------------------------------------- recipes in files


def test_a_recipe_extends_a_shipped_one_or_a_file_beside_it_or_by_path(tmp_path):
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text("extends: tiny\nname: below\ntraining: {beta: 5}\n")
    for name in ("below.yaml", str(below)):
        above.write_text(f"extends: {name}\nname: above\ntraining: {{gamma: 1}}\n")
        mine, tiny = load_recipe(str(above)), load_recipe("tiny")
        changed = tiny.training.model_copy(update={"beta": 5.0, "gamma": 1.0})
        assert mine == tiny.model_copy(update={"name": "above", "training": changed})


@pytest.mark.parametrize(
    "text, fault",
    [
        ("extends: mine.yaml\n", "circle: mine.yaml extends mine.yaml"),
        ("extends: gone.yaml\n", "no recipe file gone.yaml"),
        ("extends: tinny\n", "Did you mean tiny.*Recipes: colab-t4, "),
        ("extends: tiny\nmodle: {path: tiny}\n", "modle.path"),
        ("extends: tiny\npersonas: {count: 5}\n", "personas.count is now prompts.count"),
        ("name: a\nseeds: [0]\nname: b\n", "mine.yaml.*'name' stands in line 1 .* line 3"),
        ("name: a\ntraining:\n  beta: 1\n  beta: 2\n", "'beta' stands in line 3 .* line 4"),
        ("[", "mine.yaml"),
    ],
)
def test_a_faulty_file_is_refused_with_the_place(tmp_path, text, fault):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=fault):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "name, key, value", [("tiny", "prompts.source", "keywords"), ("tiny-synpo", "method", "sao")]
)
def test_keywords_and_synpo_are_set_together(name, key, value):
    with pytest.raises(RecipeError, match="belong together"):
        load_recipe(name, {key: value, "prompts.data": "tiny"})


def test_every_method_that_a_recipe_may_name_is_there():
    assert set(get_args(Method)) == set(METHODS)


def test_the_tiny_worlds_reward_model_scores_for_the_tiny_model_only():
    load_recipe("tiny-synpo", {"synpo.scorer": "tiny"})
    with pytest.raises(RecipeError, match="scorer=tiny knows the tiny world only"):
        load_recipe("tiny-synpo", {"synpo.scorer": "tiny", "model.path": "some/model"})
