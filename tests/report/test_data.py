"""A run's data for others: the data set with its card, and the files for other trainers."""

# ruff: noqa: F401, F811 - `hub` is a fixture of another file

import json
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard
from small import SMALL
from test_publish import ROOT, TOKEN, hub

from sao_utils.methods import sao
from sao_utils.report.card import PublishError
from sao_utils.report.data import dataset_info, export, stages, write_data_set
from sao_utils.report.publish import publish_data
from sao_utils.report.table import as_json, make_row, make_table
from sao_utils.stages.improving import improve
from sao_utils.stages.judging import side_by_side
from sao_utils.stages.pairs import build_scored_pairs
from sao_utils.stages.scoring import Scorer, score_gaps
from sao_utils.statistics.intervals import Interval
from sao_utils.store import Run, open_run, read_rows

ARMS = ("self", "random", "sft_random")


@pytest.fixture
def run(small_run, tmp_path):
    """A copy of the small run, of which nothing is trained, to be spoilt."""
    for arm in ARMS:
        sao.pairs(small_run, arm)
    shutil.copytree(small_run.folder / "rows", tmp_path / "small" / "rows")
    return Run(small_run.recipe, tmp_path / "small")


@pytest.fixture
def of_rounds(results):
    """A run of rounds: drafts, better than what the untaught base rewrote, filtered as SynPO does."""
    run = open_run("tiny", "rounds", {**SMALL, "prompts.count": 24})
    made, base = dict(sao.steps(run, run.recipe.model, run.recipe.model)), run.recipe.model
    drafts = [row for row in made["responses"] if row["sample"] == 0]
    scored = score_gaps(
        run, side_by_side(zip(drafts, improve(run, drafts, base))), Scorer("judge", base)
    )
    run = Run(run.recipe.model_copy(update={"method": "synpo"}), run.folder)
    build_scored_pairs(run, scored, base, "synpo", run.recipe.ranking)
    return run


def load(folder, cache):
    """{configuration: {split: rows}} of a data set, by `load_dataset` alone."""
    names = get_dataset_config_names(str(folder))
    sets = {name: load_dataset(str(folder), name, cache_dir=str(cache)) for name in names}
    return {n: {split: rows.to_list() for split, rows in of.items()} for n, of in sets.items()}


def change(run, section, **changes):
    """The run by a recipe of which a section was another."""
    changed = getattr(run.recipe, section).model_copy(update=changes)
    return Run(run.recipe.model_copy(update={section: changed}), run.folder)


# ---------------------------------------------------------------------- the data set


def test_every_configuration_loads_and_holds_what_the_run_made(run, tmp_path):
    found = load(write_data_set(run), tmp_path / "cache")
    assert set(found) == {
        *("prompts", "responses", "verdicts", "pairs", "pairs_random", "pairs_sft_random")
    }
    for name in ("prompts", "pairs"):
        assert all(row["discarded"] is None for row in found[name]["train"])
        assert all(row["discarded"] for row in found[name]["discarded"])
    made = read_rows(run.rows("pairs"))
    assert made == [
        {key: row[key] for key in made[0]} for row in found["pairs"]["train"]
    ]  # nothing is lost, nor rounded
    rest = read_rows(run.rows("discarded_pairs"))
    assert [r["discarded"] for r in found["pairs"]["discarded"]] == [r["discarded"] for r in rest]
    prompts, answers = found["prompts"], {r["id"]: r["text"] for r in found["responses"]["train"]}
    assert sum(map(len, prompts.values())) == run.recipe.prompts.count
    assert {row["prompt_id"] for row in made + rest} == {row["id"] for row in prompts["train"]}
    for row in made:
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        assert [answers[i] for i in row["response_ids"]] == texts
    assert {i for row in found["verdicts"]["train"] for i in row["response_ids"]} <= set(answers)


def test_what_an_earlier_recipe_left_and_what_things_cost_is_not_published(run):
    before = {stage: len(rows) for stage, rows in stages(run).items()}
    for stage in ("prompts", "responses", "verdicts"):
        row = read_rows(run.rows(stage))[0] | {"id": "old", "temperature": 0.9, "dollars": 1.5}
        row |= {"discarded": "malformed"} if stage == "prompts" else {}
        row |= {"response_ids": ["old", "older"]} if stage == "verdicts" else {}
        with open(run.rows(stage), "a") as file:
            file.write(json.dumps(row) + "\n")
    assert {stage: len(rows) for stage, rows in stages(run).items()} == before
    row = read_rows(run.rows("responses"))[0] | {"dollars": 1.5, "run": "secret"}
    with open(run.rows("responses"), "a") as file:
        file.write(json.dumps(row) + "\n")
    columns = load_dataset(str(write_data_set(run)), "responses", split="train").column_names
    assert "text" in columns and not {"dollars", "run"} & set(columns)


def test_a_run_of_rounds_has_configurations_of_its_own(of_rounds, tmp_path):
    found = load(write_data_set(of_rounds), tmp_path / "cache")
    assert {"prompts", "responses", "improved", "scores", "pairs_synpo"} <= set(found)
    texts = {row["id"] for name in ("responses", "improved") for row in found[name]["train"]}
    pairs = [row for split in found["pairs_synpo"].values() for row in split]
    assert {i for row in pairs for i in row["response_ids"]} <= texts
    assert any(row["gap"] is not None for row in pairs)
    default = load_dataset(str(of_rounds.folder / "dataset"), cache_dir=str(tmp_path / "default"))
    assert default["train"].to_list() == found["pairs_synpo"]["train"]


# ---------------------------------------------------------------------- its card


def test_the_card_has_recipe_funnel_judge_quality_and_licences(run):
    tables = run.folder / "tables"
    tables.mkdir()
    (tables / "recipe.yaml").write_text(yaml.safe_dump(run.recipe.model_dump(mode="json")))
    accuracy = Interval(0.8125, 0.7, 0.9, 33)
    names = {"model": None, "judge": "self", "questions": "training pairs"}
    rows = [make_row("judge", "accuracy", accuracy, **names)]
    (tables / "results.json").write_text(as_json(make_table(rows)))
    text = (write_data_set(run) / "README.md").read_text()
    used, rest = read_rows(run.rows("pairs")), read_rows(run.rows("discarded_pairs"))
    prompts = len(used) + len(rest)
    assert f"| pairs | 1 | {run.recipe.prompts.count} asked for - " in text
    assert f" = {prompts} prompts - " in text and f" = {len(used)} pairs |" in text
    assert f"| `pairs` | {len(used)} | {len(rest)} |" in text
    assert f"| pairs kept | {100 * len(used) / prompts:.1f} [" in text
    assert "| judge: accuracy | 81.2 [70.0, 90.0] % | 33 |" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["prompts"]["count"] == 40 and "evaluation" not in settings
    assert DatasetCard(text).data.license == "mit"

    text = (write_data_set(change(run, "judging", min_mass=0.4)) / "README.md").read_text()
    assert "judge: accuracy" not in text, "these results are of another judge"


def test_licences_of_personas_and_of_the_models_are_named(run):
    text = (write_data_set(change(run, "prompts", personas="hub")) / "README.md").read_text()
    assert DatasetCard(text).data.license == "cc-by-nc-sa-4.0" and "PersonaHub" in text
    other = change(run, "model", path="some/model-1B", revision="abc123")
    text = (write_data_set(other) / "README.md").read_text()
    assert DatasetCard(text).data.license == "unknown"
    assert "huggingface.co/some/model-1B), revision `abc123`" in text and "terms of use" in text


def test_neither_paths_nor_servers_nor_keys_of_this_machine_are_published(run, hub, tmp_path):
    people = tmp_path / "people.csv"
    spoilt = change(run, "model", path=str(tmp_path / "gemma"))
    spoilt = change(spoilt, "prompts", personas=str(people), data="~/own/prompts.jsonl")
    judge = {"path": "gpt", "engine": "api", "url": "http://10.1.2.3:80/v1", "key_variable": "K_1"}
    judge = run.recipe.model.model_copy(update=judge)
    spoilt = Run(spoilt.recipe.model_copy(update={"judge": judge}), run.folder)
    url = publish_data(spoilt, "anna/data", log=lambda _: None)
    assert url == "https://huggingface.co/anna/data" and hub.type == "dataset"
    assert hub.calls[0] == ("create_repo", "anna/data", True, True)
    files = [path for path in hub.place.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".md", ".parquet"} and len(files) > 6
    for path in files:
        for secret in (TOKEN, str(ROOT), str(Path.home()) + "/", str(tmp_path), "10.1.2", "K_1"):
            assert secret.encode() not in path.read_bytes(), f"{secret} in {path.name}"
    text = (hub.place / "README.md").read_text()
    assert "personas: people.csv" in text and "path: gemma" in text
    assert load_dataset(str(hub.place), "pairs", split="train").num_rows == len(
        read_rows(run.rows("pairs"))
    )


def test_a_public_data_set_is_not_taken_for_a_private_one(run, hub):
    hub.private = False
    with pytest.raises(PublishError, match="exists already and is public"):
        publish_data(run, "anna/data")
    assert [call[0] for call in hub.calls] == ["create_repo"]


# ---------------------------------------------------------------------- other trainers


def texts_of(row):
    return [row[side][0]["content"] for side in ("prompt", "chosen", "rejected")]


def test_trl_takes_exported_pairs_and_answers_as_they_are(run, tmp_path):
    from trl.data_utils import is_conversational

    made = read_rows(run.rows("pairs"))
    for answers, columns in (
        (False, ["prompt", "chosen", "rejected"]),
        (True, ["prompt", "completion"]),
    ):
        path = tmp_path / f"{answers}.jsonl"
        assert len(export(run, "trl", path, "self", answers=answers)) == len(made)
        rows = load_dataset("json", data_files=str(path), split="train")
        assert rows.column_names == columns and is_conversational(rows[0])
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in made]
        last = columns[-1]
        wanted = "chosen" if answers else "rejected"
        assert [row[last] for row in rows] == [row[wanted] for row in made]


def llama_factory(path, info):
    """Question, then answer or chosen and rejected of each row, as LLaMA-Factory's converters read them."""
    [(_, entry)] = info.items()
    assert entry["file_name"] == path.name
    columns, found = entry["columns"], []
    for row in json.loads(path.read_text()):
        sides = [columns["chosen"], columns["rejected"]] if entry["ranking"] else []
        if entry["formatting"] == "alpaca":
            asked = "\n".join(filter(None, (row[columns["prompt"]], row[columns["query"]])))
            found.append([asked, *(row[key] for key in sides or [columns["response"]])])
        else:
            turns = [*row[columns["messages"]], *(row[key] for key in sides)]
            assert [turn["from"] for turn in turns] == ["human", "gpt", "gpt"][: len(turns)]
            found.append([turn["value"] for turn in turns])
    return found


@pytest.mark.parametrize("form", ["alpaca", "sharegpt"])
def test_llama_factory_reads_exported_pairs_and_answers(run, of_rounds, tmp_path, form):
    for number, (of, stage, arm) in enumerate(
        [
            (run, "pairs", "self"),
            (run, "pairs_random", "random"),
            (of_rounds, "pairs_synpo", "synpo"),
        ]
    ):
        made = list(map(texts_of, read_rows(of.rows(stage))))
        for answers in (False, True):
            path = tmp_path / f"{number}{answers}.json"
            rows = export(of, form, path, arm, answers=answers)
            found = llama_factory(path, dataset_info(path, form, rows))
            assert made and found == [row[:2] if answers else row for row in made]


def test_what_has_no_pairs_is_refused_with_what_there_is(run, tmp_path):
    with pytest.raises(
        PublishError, match="no pairs of 'oracle'. It has: self, random, sft_random"
    ):
        export(run, "trl", tmp_path / "a", "oracle")
    with pytest.raises(PublishError, match="no usable pairs of 'self' of seed 3"):
        export(run, "trl", tmp_path / "a", "self", seed=3)
    shutil.rmtree(run.folder / "rows")
    with pytest.raises(PublishError, match="no pairs of 'self'. It has: none yet"):
        write_data_set(run)
    assert not (tmp_path / "a").exists()
