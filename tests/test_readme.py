"""What the README and docs/ say is what the repository holds."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sao_utils.methods.studies import load_study
from sao_utils.oracles.checkable import KINDS
from sao_utils.recipes import load_recipe, recipe_names, valid_keys
from sao_utils.report.studies import agreement
from sao_utils.report.summary import summary
from sao_utils.report.table import read_table, select, value_of
from sao_utils.report.words import in_words

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
a_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


REFERENCE = ROOT / "results/reference"
LAPTOP = ROOT / "results/reference-laptop"


def test_the_readmes_table_is_that_of_the_reference_run():
    table = README.split("<!-- reference table -->")[1].split("<!-- end of reference table -->")[0]
    assert table.strip() == f"```\n{summary(REFERENCE)}\n```"


@a_page
def test_links_to_files_of_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@a_page
def test_each_key_that_a_page_names_is_one_of_the_recipes(page):
    sections = {key.split(".")[0] for key in valid_keys() if "." in key}
    named = re.findall(r"`(?:--set )?([a-z]+\.[a-z_]+)(?:[=:][^`]*)?`", page.read_text("utf-8"))
    for key in named:
        if key.split(".")[0] in sections and not key.endswith((".md", ".yaml", ".jsonl")):
            assert key in valid_keys(), key


@a_page
def test_each_recipe_and_setting_in_a_pages_commands_loads(page, tmp_path):
    text = page.read_text("utf-8")
    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ):
        (tmp_path / f"{number}.yaml").write_text(block)
        load_recipe(str(tmp_path / f"{number}.yaml"))
    for line in re.findall(r"^\.venv/bin/sao (.*)$", text, re.MULTILINE):
        words = shlex.split(line)
        settings = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
        for k, word in enumerate(words):
            if word == "--recipe" and words[k + 1] in recipe_names():
                load_recipe(words[k + 1], dict(setting.split("=", 1) for setting in settings))
            elif word == "--recipe":
                assert words[k + 1].endswith(".yaml")


def test_the_claim_holds_in_the_reference_run():
    """Training on own verdicts makes answers better, by more than imitating own answers does."""
    table = read_table(REFERENCE)

    def good(model, against, temperature=0.0):
        columns = {"section": "quality", "metric": "good answers", "temperature": temperature}
        return value_of(table, model=model, against=against, **columns)

    gain, over = good("self", "base"), good("self", "sft_random")
    assert gain.value >= 0.10 and gain.low > 0 and gain.n >= 3 * 800
    assert over.value >= 0.05 and over.low > 0
    # Random labels: far less than the model's own; when sampling, no gain that can be seen.
    assert good("self", "random").low >= 0.10
    assert good("random", "base").high < gain.low / 2
    assert good("random", "base", 0.6).low <= 0


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tiny", "reference"),
        ("tiny-synpo", "reference-synpo"),
        ("laptop", "reference-laptop"),
    ],
)
def test_a_reference_run_is_of_the_recipe_that_is_shipped(name, folder):
    shipped = load_recipe(name).model_dump(mode="json")
    kept = load_recipe(str(ROOT / "results" / folder / "recipe.yaml")).model_dump(mode="json")
    if name == "laptop":  # its model's folder says which weights they were
        assert Path(kept["model"]["path"]).name == "smollm2-135m-instruct-q4_1"
        kept["model"]["path"] = shipped["model"]["path"]
    assert {**kept, "seeds": shipped["seeds"]} == shipped


def test_the_table_of_synpo_is_that_of_its_reference_run_and_its_claims_hold():
    table = read_table(ROOT / "results/reference-synpo")

    def good(model, number, topic, against=None, temperature=0.0):
        where = {"metric": "good answers", "questions": topic, "temperature": temperature}
        return value_of(table, model=model, round=number, against=against, **where)

    names = {("base", 0): "base", ("sft_seeds", 0): "SFT on the same 600 seed answers"}
    names |= {("synpo", k): f"SynPO, round {k}" for k in range(1, 5)}
    for (model, number), name in names.items():
        cells = [in_words(good(model, number, topic)) for topic in ("seed topics", "other topics")]
        assert f"| {name} | {' | '.join(cells)} |" in FINDINGS
    gain = good("synpo", 4, "other topics", "base")
    assert gain.value >= 0.10 and gain.low > 0
    control, last = (good(m, k, "other topics") for m, k in (("sft_seeds", 0), ("synpo", 4)))
    assert control.value > last.value


def test_the_table_of_the_race_is_that_of_its_study():
    table = read_table(ROOT / "results/study-race")
    gains = select(table, metric="good answers", against="base", temperature=0.0)
    members = load_study("race").members
    assert set(members) == set(gains["model"])
    for name, member in members.items():
        last = {"model": name, "round": max(select(gains, model=name)["round"]), "seed": None}
        cells = [
            in_words(value_of(gains, against="base", questions=topic, **last)).removesuffix(
                " points"
            )
            for topic in ("seed topics", "other topics")
        ]
        help_ = member.help or "none"
        assert f"| {name} | {help_} | {' | '.join(cells)} |" in FINDINGS


def test_what_is_said_of_judges_and_rules_is_that_of_their_study():
    table = read_table(ROOT / "results/study-judges")
    gains = select(table, metric="good answers", against="base", round=3)
    text = " ".join(FINDINGS.split())
    early = "the model early in its pre-training"
    for member in ("the judge as it is", early, "two fifths turned around"):
        gain = in_words(value_of(gains, against="base", model=member)).removesuffix(" points")
        assert gain in text
    rules = select(table, metric="right to stop or go on").set_index("model")["value"]
    never = in_words(value_of(table, metric="right to stop or go on", model="never stop"))
    assert rules["never stop"] == rules.max() and never in text


def gains(name):
    """The gains of a committed study's members over the base."""
    table = read_table(ROOT / f"results/study-{name}")
    where = {"metric": "good answers", "questions": "all", "against": "base", "seed": None}
    return table, select(table, **where)


ABLATIONS = re.findall(
    r"^\| \[.+\]\(\.\./results/study-(.+)/tables/results.md\) \|", FINDINGS, re.MULTILINE
)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_line_on_a_study_is_that_of_its_table(name):
    table, found = gains(name)
    line = rf"^\| \[.+\]\(\.\./results/study-{name}/tables/results.md\) \| (.+) \| (.+) \|$"
    [(cells, same)] = re.findall(line, FINDINGS, re.MULTILINE)
    for cell in cells.split("; "):
        member, _, words = cell.rpartition(": ")
        assert (
            in_words(value_of(found, model=member, against="base", temperature=0.0))
            == f"{words} points"
        ), cell
    claims = agreement(load_study(name), table).query("decoding == 'greedy'")
    counts = claims["same direction"].value_counts()
    kinds = [f"{counts[kind]} {kind}" for kind in ("yes", "no", "open") if kind in counts]
    assert same == (", ".join(kinds) or "no number of the paper")
    assert load_study(name).members.keys() == set(found["model"]), "the study is not complete"


def test_each_interval_in_the_text_of_notebook_07_is_of_a_committed_study():
    notebook = json.loads((ROOT / "notebooks/07_ablations.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    text = " ".join("".join(cell["source"]) for cell in cells)
    named = re.findall(r"-?\d+\.\d \[[^]]+\]", " ".join(text.split()))
    tables = [read_table(ROOT / f"results/study-{name}") for name in ("break-even", *ABLATIONS)]
    rows = [row for table in tables for row in table[table["seed"].isna()].itertuples()]
    known = {in_words(row).removesuffix(" points").removesuffix(" %") for row in rows}
    assert len(named) > 12 and set(named) <= known, set(named) - known


def test_the_break_even_accuracy_is_that_of_its_study():
    table = read_table(ROOT / "results/study-break-even")
    found = value_of(table, metric="break-even accuracy", model="all pairs")
    assert in_words(found) in " ".join(FINDINGS.split())
    filtered = value_of(table, metric="break-even accuracy", model="orders must agree")
    assert "outside of what was measured" in filtered.note and filtered.high < found.low


def test_what_is_said_of_the_real_models_judge_is_what_its_kept_run_found():
    found = read_table(LAPTOP)
    pages = [" ".join(page.read_text("utf-8").split()) for page in PAGES if page.stem != "README"]
    for metric in ("accuracy", "flip rate", "first position"):
        row = value_of(found, metric=metric, questions="training pairs")
        assert f"{in_words(row)} | {row.n} |" in README, metric
    for metric in ("accuracy, better answer longer", "accuracy, better answer shorter"):
        assert any(in_words(value_of(found, metric=metric)) in page for page in pages), metric
    assert value_of(found, metric="accuracy").low < 0.5 < value_of(found, metric="accuracy").high


def test_what_is_said_of_the_real_models_trainings_is_what_its_kept_run_found():
    found = read_table(LAPTOP)
    small = (ROOT / "docs/small-models.md").read_text("utf-8")
    names = {"base": "base model", "self": "self-judged pairs"}
    names |= {"random": "the same pairs, random labels", "sft_random": "SFT on random own answers"}
    names |= {"oracle": "pairs with checked labels"}
    for model, words in names.items():
        good = in_words(value_of(found, section="quality", model=model))
        tokens = in_words(value_of(found, section="length", model=model)).split()[0]
        assert f"| {words} | {good} | {tokens} |" in README
        if model != "base":
            gain = in_words(value_of(found, section="quality", model=model, against="base"))
            assert gain.removesuffix(" points") in " ".join(small.split())
    for kind, of in KINDS.items():
        if of.split != "dev":
            cells = []
            for model in ("base", "oracle", "self", "random", "sft_random"):
                row = value_of(found, metric=f"not followed: {kind}", model=model)
                cells.append(f"{row.n * (1 - row.value):.0f}")
            learned = "yes" if of.split == "train" else "no"
            assert f"| {of.sentence} | {learned} | {' | '.join(cells)} |" in small


def test_a_committed_run_names_no_folder_of_a_machine():
    kept = [*LAPTOP.glob("*.*"), *LAPTOP.glob("tables/*.*"), *LAPTOP.glob("figures/*.svg")]
    assert len(kept) >= 8
    for path in kept:
        assert not re.search(r"/(?:home|root|work|tmp)/", path.read_text("utf-8")), path.name
