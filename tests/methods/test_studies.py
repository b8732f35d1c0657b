"""Studies: members differ in what the study says, a search takes the best value, work is done once."""

import pytest
import yaml
from typer.testing import CliRunner

from sao_utils.cli import app
from sao_utils.methods import studies
from sao_utils.methods.studies import Study, load_study, open_study, study_names
from sao_utils.recipe import RecipeError
from sao_utils.report.page import write_page
from sao_utils.report.studies import study_table
from sao_utils.report.table import select
from sao_utils.store import read_rows, variant

SAO = {"method": "sao", "prompts.source": "persona", "prompts.data": None, "pairs.min_margin": 0}
RATES = [1e-3, 1e-9]  # the second leaves the model as it is
STUDY = Study(
    name="two",
    about="Two members",
    minutes=1,
    recipe="tiny-synpo",
    set={
        "seeds": [0],
        "rounds": 1,
        "prompts.count": 30,
        "synpo.seed_count": 24,
        "training.epochs": 3,
        "training.probe_steps": 0,
        "evaluation.per_combination": 1,
        "evaluation.temperatures": [0.0],
        "evaluation.tasks": [],
        "evaluation.bootstrap": 200,
    },
    members={
        "own pairs": {"set": SAO},
        "the seeds": {
            "help": "24 gold answers",
            "set": {**SAO, "method": "sft_seeds"},
            "search": {"training.sft_learning_rate": RATES},
        },
    },
)


def test_a_study_compares_its_members_with_the_base_and_does_nothing_twice(results, monkeypatch):
    home = open_study(STUDY)
    table = study_table(STUDY, home)
    gains = select(table, metric="good answers", against="base", questions="all")
    assert list(gains["model"]) == ["own pairs", "the seeds"]
    tried = {row["set"]["training.sft_learning_rate"]: row["good"] for row in searched(home)}
    assert set(tried) == set(RATES)
    best = max(tried, key=tried.get)
    recipe = (home.folder / "variants" / "the-seeds" / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["training"]["sft_learning_rate"] == best
    text = (home.folder / "tables" / "results.md").read_text()
    assert "24 gold answers" in text and f"training.sft_learning_rate = {best:g}" in text
    assert (home.folder / "figures" / "two.svg").is_file()
    page = write_page(home.folder).read_text("utf-8")
    assert "Of 2 members, " in page and "<td>24 gold answers</td>" in page
    assert page.count("data:image/svg+xml") == 1

    monkeypatch.setattr("sao_utils.training.setup.make_trainer", None)  # would raise
    monkeypatch.setattr("sao_utils.engines.requests.load_engine", None)
    again = study_table(STUDY, home)
    assert again.equals(table) and len(searched(home)) == len(RATES)


def searched(home):
    return read_rows(home.rows("search"))


@pytest.mark.parametrize("name", study_names())
def test_every_member_of_a_shipped_study_has_a_recipe_that_fits(results, name):
    study = load_study(name)
    home = open_study(study)
    for label, member in study.members.items():
        variant(home, studies._slug(label), member.set)
        for key, values in member.search.items():
            for value in values:
                variant(home, studies._slug(label), {**member.set, key: value})


def test_what_is_set_anew_holds_for_every_member_and_a_wrong_file_is_told_in_words(tmp_path):
    study = load_study("race", {"prompts.count": "7"})
    assert all(member.set["prompts.count"] == "7" for member in study.members.values())
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nabout: x\nrecipe: tiny\nminutes: 1\nmember: {}\n")
    with pytest.raises(RecipeError, match="(?s)The study mine.yaml does not fit:.*members.*member"):
        load_study(str(file))


def test_studies_are_listed_with_their_minutes_and_an_unknown_name_names_them(results):
    listed = CliRunner().invoke(app, ["study"]).output
    assert "race" in listed and "minutes" in listed
    with pytest.raises(RecipeError, match="no study 'rase'. Studies: .*race"):
        load_study("rase")
