"""Studies: members differ in what the study says, a search takes the best value, work is done once."""

import pytest
import yaml
from typer.testing import CliRunner

from sao_utils.cli import app
from sao_utils.methods import studies
from sao_utils.methods.studies import Study, load_study, open_study, study_names
from sao_utils.recipe import RecipeError
from sao_utils.report import studies as report
from sao_utils.report.page import write_page
from sao_utils.report.studies import agreement, answer, study_table
from sao_utils.report.table import as_json, make_row, make_table, read_table, select
from sao_utils.report.tables import reported
from sao_utils.statistics.intervals import Interval
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


def test_members_that_share_rows_make_them_once_and_train_on_the_same_pairs_as_alone(results):
    names = {"against": "base", "reported": [8.82, 39.25], "source": "Figure 3f"}
    claims = [{"model": "noisy", **names}, {"model": "noisy", **names, "against": "clean"}]
    members = {"clean": {"set": SAO}, "noisy": {"set": {**SAO, "judging.label_noise": 0.5}}}
    plain = STUDY.model_dump() | {"members": members, "claims": claims, "break_even": True}
    plain["set"] = {**STUDY.set, "evaluation.temperatures": [0.0, 0.6]}
    table, texts = {}, {}
    for name, share in (("alone", False), ("together", True)):
        study = Study.model_validate({**plain, "name": name, "share": share})
        home = open_study(study)
        table[name] = study_table(study, home)
        pairs = sorted(home.folder.glob("variants/*/rows/pairs.jsonl"))
        texts[name] = [path.read_text() for path in pairs]
    assert len(texts["alone"]) == 2 and texts["alone"] == texts["together"]
    assert len(set(texts["alone"])) == 2
    for metric in ("good answers", "judge is right", "break-even accuracy"):
        alone, together = (select(table[name], metric=metric) for name in table)
        assert len(alone)
        assert alone.reset_index(drop=True).equals(together.reset_index(drop=True))
    noisy = home.folder / "variants" / "noisy"
    assert (
        len(read_rows(home.rows("prompts"))) == 30 and not (noisy / "rows/prompts.jsonl").exists()
    )
    prices = {name: set(table[name]["metric"]) & set(report.PRICE) for name in table}
    assert prices == {"alone": set(report.PRICE), "together": {"tokens trained on"}}

    text = (home.folder / "tables" / "results.md").read_text()
    assert "minutes" not in text and "| noisy - clean | greedy |" in text
    found = agreement(study, table["together"])
    assert list(found["what"]) == ["noisy - base"] * 2 + ["noisy - clean"] * 2
    assert list(found["decoding"]) == ["greedy", "T = 0.6"] * 2
    assert as_json(read_table(home.folder)) == as_json(table["together"])


def test_a_claim_agrees_only_where_the_interval_leaves_out_zero():
    names = {"against": "base", "source": "", "reported": [50, 40]}
    claims = [{"model": model, **names} for model in ("up", "down", "unsure")]
    study = Study.model_validate({**STUDY.model_dump(), "claims": claims})
    ends = {"up": (0.1, 0.3), "down": (-0.3, -0.1), "unsure": (-0.1, 0.3)}
    where = {"against": "base", "questions": "all", "temperature": 0.0}
    table = make_table(
        make_row(
            "study", "good answers", Interval((low + high) / 2, low, high, 9), "points", model=m
        )
        | where
        for m, (low, high) in ends.items()
    )
    assert list(agreement(study, table)["same direction"]) == ["yes", "no", "open"]
    assert "most by up (20.0" in answer(table) and "least by down" in answer(table)


def test_what_a_shipped_study_says_of_the_paper_stands_in_its_numbers():
    studies_ = [load_study(name) for name in study_names()]
    claims = [(study, claim) for study in studies_ for claim in study.claims]
    for study, claim in claims:
        assert {claim.model, claim.against} <= {"base", *study.members}
        rows = reported("sao").query("metric == 'win_rate' and judge == 'Qwen2-72B-Instruct'")
        theirs = rows[rows["table"].str.startswith((claim.source, "Figure 3a"))]["value"]
        assert set(claim.reported) <= set(theirs), claim
    assert len(claims) >= 10


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
    for words in (["study"], ["study", "--list"]):
        listed = CliRunner().invoke(app, words).output
        assert all(name in listed for name in study_names()) and "minutes" in listed
    with pytest.raises(RecipeError, match="no study 'rase'. Studies: .*race"):
        load_study("rase")
