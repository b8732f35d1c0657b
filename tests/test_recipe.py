import pytest

from sao_utils.recipe import Recipe, RecipeError
from sao_utils.recipes import load_recipe, recipe_names, valid_keys


@pytest.mark.parametrize("name", recipe_names())
def test_each_shipped_recipe_loads_under_its_own_name(name):
    assert load_recipe(name).name == name


def test_the_tiny_recipe_keeps_the_papers_settings():
    recipe = load_recipe("tiny")
    assert (recipe.training.beta, recipe.training.gamma) == (10, 3)
    assert (recipe.prompts.temperature, recipe.responses.temperature) == (0.6, 0.6)
    assert (recipe.training.epochs, recipe.training.warmup_ratio) == (1, 0.1)
    assert recipe.training.schedule == "cosine"


def test_the_paper_recipe_keeps_the_papers_settings():
    recipe = load_recipe("paper")
    training = recipe.training
    assert (training.algorithm, training.method, training.quantisation) == ("simpo", "full", "none")
    assert (training.beta, training.gamma, training.learning_rate) == (10, 3, 1e-6)
    assert (training.batch_size, training.epochs, training.warmup_ratio) == (128, 1, 0.1)
    assert training.schedule == "cosine"
    assert (recipe.prompts.temperature, recipe.responses.temperature) == (0.6, 0.6)
    assert recipe.prompts.count == 60_000 and recipe.judging.method == "sampled"


def test_all_weights_cannot_be_trained_in_4_bit():
    with pytest.raises(RecipeError, match="quantisation=nf4"):
        load_recipe("paper", {"training.quantisation": "nf4"})


def test_an_unknown_recipe_names_the_recipes_there_are():
    with pytest.raises(RecipeError, match="Did you mean tiny.*Recipes: colab-t4, "):
        load_recipe("tinny")


def test_an_unknown_key_names_its_likes_or_lists_the_valid_keys():
    with pytest.raises(RecipeError, match="'training.betta'. Did you mean training.beta"):
        load_recipe("tiny", {"training.betta": 3})
    with pytest.raises(RecipeError, match="'gamma'. Did you mean training.gamma"):
        load_recipe("tiny", {"gamma": 3})
    with pytest.raises(RecipeError, match="'xyzzy'. Keys: name, .*training.beta, "):
        load_recipe("tiny", {"xyzzy": 3})


def test_a_bad_value_names_its_key():
    with pytest.raises(RecipeError, match="training.beta"):
        load_recipe("tiny", {"training.beta": "much"})
    with pytest.raises(RecipeError, match="arms"):
        load_recipe("tiny", {"arms": ["selfish"]})


@pytest.mark.parametrize(
    "key, value",
    [("seeds", [0, 0]), ("arms", ["self", "self"]), ("evaluation.temperatures", []),
     ("evaluation.temperatures", [0.0, -1.0]), ("arms", "[self"), ("seeds", [])],
)  # fmt: skip
def test_values_that_would_break_a_run_later_are_refused_at_once(key, value):
    with pytest.raises(RecipeError, match=key.split(".")[-1]):
        load_recipe("tiny", {key: value})


def test_a_margin_that_no_sampled_verdict_has_is_refused():
    with pytest.raises(RecipeError, match="min_margin=2 would drop every pair"):
        load_recipe("tiny", {"judging.method": "sampled"})
    kept = load_recipe("tiny", {"judging.method": "sampled", "pairs.min_margin": 1})
    assert kept.pairs.min_margin == 1 and load_recipe("tiny").pairs.min_margin == 2


@pytest.mark.parametrize(
    "key, section",
    [("model", None), ("judge", None), ("others.x", "others"), ("judges.x", "judges")],
)
def test_a_cap_is_refused_while_a_price_is_not_known(key, section):
    def capped(**prices):
        model = {"path": "m", "engine": "api", "url": "http://localhost:1/v1", **prices}
        changes = (
            {section: {"x": model}} if section else {f"{key}.{k}": v for k, v in model.items()}
        )
        return load_recipe("tiny", {**changes, "evaluation.max_cost": 5})

    for known in ({}, {"price_in": 1.0}, {"price_out": 1.0}):
        with pytest.raises(RecipeError, match=f"the price of {key} is not known"):
            capped(**known)
    assert capped(price_in=0, price_out=0).evaluation.max_cost == 5  # a server that is free


def test_a_path_with_a_hash_mark_stays_whole():
    assert load_recipe("tiny", {"prompts.personas": "a #b.csv"}).prompts.personas == "a #b.csv"


def test_an_empty_section_can_still_be_overridden_or_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntraining:\n")
    with pytest.raises(RecipeError, match="training"):
        load_recipe(str(path), {"training.beta": 3})


def test_text_overrides_become_numbers_and_lists_also_in_scientific_notation():
    recipe = load_recipe("tiny", {"training.learning_rate": "1e-5", "seeds": "[0, 1, 2]"})
    assert recipe.training.learning_rate == 1e-5
    assert recipe.seeds == (0, 1, 2)


def test_a_recipe_file_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodle: {path: tiny}\n")
    with pytest.raises(RecipeError, match="modle"):
        load_recipe(str(path))


def test_a_recipe_cannot_be_changed_after_loading():
    with pytest.raises(ValueError):
        load_recipe("tiny").training.beta = 1


def test_every_key_of_every_section_can_be_overridden():
    recipe = load_recipe("tiny")
    plain = recipe.model_dump(mode="json")
    for key in valid_keys():
        value = plain
        for part in key.split("."):
            value = value and value[part]  # there may be no judge
        assert isinstance(load_recipe("tiny", {key: value}), Recipe)


def test_a_recipe_extends_a_shipped_one_key_by_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nname: mine\ntraining: {beta: 5}\n")
    mine, tiny = load_recipe(str(path)), load_recipe("tiny")
    changed = tiny.training.model_copy(update={"beta": 5.0})
    assert mine == tiny.model_copy(update={"name": "mine", "training": changed})
    path.write_text("extends: nothing\nname: mine\n")
    with pytest.raises(RecipeError, match="nothing"):
        load_recipe(str(path))


def test_a_recipe_extends_a_users_file_beside_it_or_by_path_and_circles_are_named(tmp_path):
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text("extends: tiny\nname: below\ntraining: {beta: 5}\n")
    for name in ("below.yaml", str(below)):
        above.write_text(f"extends: {name}\nname: above\ntraining: {{gamma: 1}}\n")
        training = load_recipe(str(above)).training
        assert (training.beta, training.gamma, training.epochs) == (5, 1, 1)
    below.write_text("extends: above.yaml\n")
    with pytest.raises(RecipeError, match="circle: above.yaml extends below.yaml extends above"):
        load_recipe(str(above))
    above.write_text("extends: gone.yaml\n")
    with pytest.raises(RecipeError, match="no recipe file gone.yaml. Looked for"):
        load_recipe(str(above))


@pytest.mark.parametrize(
    "text, lines",
    [("name: a\nseeds: [0]\nname: b\n", "'name' stands in line 1 and again in line 3"),
     ("name: a\ntraining:\n  beta: 1\n  beta: 2\n", "'beta' stands in line 3 .* line 4")],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, text, lines):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"twice.yaml.*{lines}"):
        load_recipe(str(path))


def test_a_key_of_an_earlier_version_names_the_one_of_today(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("extends: tiny\npersonas: {count: 5, with_persona: false}\n")
    with pytest.raises(RecipeError) as told:
        load_recipe(str(path))
    assert "personas.count is now prompts.count" in str(told.value)
    assert "personas.with_persona is now prompts.source" in str(told.value)
    with pytest.raises(RecipeError, match="evaluation.harness is now evaluation.tasks"):
        load_recipe("tiny", {"evaluation.harness": []})


def test_overrides_may_come_as_text_as_papermill_gives_them():
    assert load_recipe("tiny", '{"prompts.count": 5}').prompts.count == 5
    assert load_recipe("tiny", "prompts.count: 5").prompts.count == 5
    assert load_recipe("tiny", "") == load_recipe("tiny", "{}") == load_recipe("tiny")
    with pytest.raises(RecipeError, match='write a mapping, such as {"prompts.count": 5}'):
        load_recipe("tiny", "prompts.count=5")


@pytest.mark.parametrize(
    "changes, fault",
    [({"prompts.source": "file"}, "prompts.*data"), ({"prompts.data": "x.csv"}, "prompts.*source"),
     ({"prompts.personas": None}, "needs personas")],
)  # fmt: skip
def test_a_source_of_prompts_without_what_it_reads_is_refused(changes, fault):
    with pytest.raises(RecipeError, match=fault):
        load_recipe("tiny", changes)


def test_another_judge_may_be_named_and_is_the_model_itself_otherwise():
    tiny = load_recipe("tiny")
    assert tiny.judge is None and tiny.judging_model == tiny.model
    other = load_recipe(
        "tiny", {"judge.path": "gpt", "judge.engine": "api", "judge.url": "http://x/v1"}
    )
    assert other.judging_model.path == "gpt" and other.model == tiny.model


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model.engine": "api"}, "url"),
        ({"model.engine": "api", "model.url": "http://me:secret@host/v1"}, "key_variable"),
        ({"model.engine": "api", "model.url": "http://host/v1?api-key=secret"}, "key_variable"),
        (
            {"model.engine": "api", "model.url": "http://x", "model.key_variable": "sk-secret"},
            "NAME",
        ),
        ({"judge.path": "x", "judge.key_variable": "gsk_secret"}, "NAME"),
        ({"model.quantisation": "fp8"}, "quantisation"),
        ({"model.engine": "vllm", "model.quantisation": "nf4"}, "quantisation"),
        ({"model.price_in": 1.0}, "engine=api"),
        (
            {"judge.path": "x", "judge.engine": "api", "judge.url": "http://x", "judge.workers": 2},
            "concurrency",
        ),
        ({"model.adapter": "somewhere"}, "merge"),
        (
            {"others": {"x": {"path": "m", "engine": "api", "url": "http://x", "adapter": "a"}}},
            "serve",
        ),
    ],
)
def test_engine_settings_that_do_not_fit_together_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe("tiny", changes)
    assert "secret" not in str(error.value) and "Value error" not in str(error.value)
