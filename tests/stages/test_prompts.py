"""Stage 1b: prompts from every source, what is discarded, and what all prompts together decide."""

import dataclasses
import json

import pytest

from sao_utils import oracles
from sao_utils.engines.base import Completion
from sao_utils.methods import sao
from sao_utils.oracles import tiny_world as world
from sao_utils.recipe import RecipeError
from sao_utils.stages import prompts as stage
from sao_utils.stages.overlap import pieces, similarity_of, words
from sao_utils.stages.personas import draw_personas
from sao_utils.store import open_run, read_rows

SOURCE = {"prompts.count": 12}


def prompts(run):
    return sao.rows(run, "prompts")


def selected(run, avoid=(), **changes):
    """The prompts of a run, selected by other settings; in a folder of its own."""
    settings = run.recipe.prompts.model_copy(update=changes)
    other = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"prompts": settings}))
    rows = stage.write_prompts(other, draw_personas(other), other.recipe.model)
    return stage.select_prompts(other, rows, list(avoid))


@pytest.fixture
def copy(small_run, tmp_path):
    """The small run with its prompts, in another folder."""
    prompts(small_run)
    (tmp_path / "rows").mkdir()
    run = dataclasses.replace(small_run, folder=tmp_path)
    run.rows("prompts").write_bytes(small_run.rows("prompts").read_bytes())
    return run


def test_every_persona_leads_to_a_prompt_or_to_a_counted_discard(small_run):
    made = prompts(small_run)
    assert len(made) == 40
    for row in made:
        assert (row["discarded"] is None) <= bool(row["prompt"])
        assert row["discarded"] in (None, "malformed", "cut off", "evaluation question")
        assert (row["source"], row["model"], row["round"]) == ("persona", "tiny", 0)


def test_prompts_never_ask_for_a_held_out_combination(small_run):
    for row in prompts(small_run):
        question = row["prompt"] and world.parse_question(row["prompt"])
        if row["discarded"] is None and question:
            assert world.SPLIT[question.combination] == "train"


def test_repetition_is_counted_exactly_and_nearly():
    texts = ["a b c d e f g", "A  b c d e f g", "a b c d e f h", "x y"]
    assert stage.repetition_rate(texts) == 0.25
    assert stage.near_duplicate_rate(texts, 0.7) == 0.5
    assert stage.repetition_rate([]) == stage.near_duplicate_rate([]) == 0.0


# ------------------------------------------------------------------ decided by all prompts together


def test_near_duplicates_of_an_earlier_prompt_are_discarded_and_the_rows_on_disk_say_so(copy):
    before = prompts(copy)
    after = selected(copy, max_similarity=0.3, min_usable=0)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    gone = [row for row in after if row["discarded"] == "near-duplicate"]
    kept = [row for row in after if row["discarded"] is None]
    assert gone and kept
    for row in gone:
        ahead = [other for other in kept if after.index(other) < after.index(row)]
        mine = pieces(row["prompt"])
        assert any(similarity_of(mine, pieces(other["prompt"])) >= 0.3 for other in ahead)
    assert read_rows(copy.rows("prompts")) == after
    assert prompts(copy) == before, "without the filter they come back"


def test_what_was_decided_once_is_not_looked_for_again(copy, monkeypatch):
    first = selected(copy, max_similarity=0.3, min_usable=0)
    monkeypatch.setattr(stage, "near_duplicates", None)  # would raise
    assert selected(copy, max_similarity=0.3, min_usable=0) == first


def test_near_duplicates_are_sought_within_a_seed_only(results):
    run = open_run("tiny", "two", {"seeds": [0, 1], "prompts.max_similarity": 0.9})
    row = {"prompt": "How do I learn chess?", "discarded": None}
    made = [{**row, "id": f"{seed}{k}", "seed": seed} for seed in (0, 1) for k in (0, 1)]
    marked = stage.select_prompts(run, made, [])
    assert [r["discarded"] for r in marked] == [None, "near-duplicate"] * 2


def test_a_count_that_is_lowered_loses_no_row(copy):
    everything = {row["id"] for row in selected(copy, max_similarity=0.3, min_usable=0)}
    few = selected(copy, max_similarity=0.3, min_usable=0, count=10)
    assert len(few) == 10
    assert {row["id"] for row in read_rows(copy.rows("prompts"))} == everything


def test_prompts_that_share_words_with_an_evaluation_question_are_shown_and_discarded(copy):
    usual = prompts(copy)
    kept = [row for row in usual if row["discarded"] is None]
    avoid = [f"Well: {kept[3]['prompt'].upper()} Thanks!"]
    n = len(kept[3]["prompt"].split())
    found = stage.evaluation_overlap(usual, avoid, n)
    assert found["prompts"] == len(kept) and found["questions"] == 1
    match = next(match for match in found["matches"] if match["id"] == kept[3]["id"])
    assert match["shared"].split() == words(kept[3]["prompt"]) and match["question"].startswith("W")
    after = selected(copy, avoid, max_shared_words=n, min_usable=0)
    gone = [row["id"] for row in after if row["discarded"] == "in an evaluation set"]
    assert gone == [match["id"] for match in found["matches"]]
    assert stage.evaluation_overlap(after, avoid, n) == found
    assert stage.evaluation_overlap(usual, avoid, n + 1)["matches"] == []


def test_prompts_of_published_benchmarks_in_use_are_kept_out_of_training(small_run, tmp_path):
    taken = next(row for row in prompts(small_run) if row["discarded"] is None)["prompt"]
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"question_id": 81, "turns": ["Write a poem.", taken]}) + "\n")
    changes = {"benchmarks": ("mt_bench",), "data": str(tmp_path), "questions": "everyday"}
    evaluation = small_run.recipe.evaluation.model_copy(update=changes)
    settings = small_run.recipe.prompts.model_copy(
        update={"max_shared_words": len(taken.split()), "min_usable": 0}
    )
    recipe = small_run.recipe.model_copy(update={"evaluation": evaluation, "prompts": settings})
    run = dataclasses.replace(small_run, recipe=recipe, folder=tmp_path)
    gone = {r["prompt"] for r in prompts(run) if r["discarded"] == "in an evaluation set"}
    assert taken in gone
    path.unlink()
    with pytest.raises(RecipeError, match="mt_bench needs its question.jsonl"):
        prompts(dataclasses.replace(run, folder=tmp_path / "new"))


def test_discarded_prompts_go_no_further_and_the_funnel_counts_them(results):
    changes = {"prompts.max_similarity": 0.3, "prompts.min_usable": 0, "prompts.count": 40}
    run = open_run("tiny", "close", changes)
    made = prompts(run)
    gone = {row["id"] for row in made if row["discarded"] == "near-duplicate"}
    answered = {row["prompt_id"] for row in sao.rows(run, "responses")}
    assert gone and answered == {row["id"] for row in made if row["discarded"] is None}
    counts = dict(sao.funnel(run))
    assert counts["near-duplicate"] == -len(gone)
    assert counts["prompts"] == len(answered)


# ------------------------------------------------------------------ too few are usable


def engine_that_says(text):
    class Engine:
        name, tokenizer = "fixed", None

        def generate(self, chats, sampling, seeds):
            yield [(k, Completion(text, 5, True)) for k in range(len(chats))]

    return lambda *_: Engine()


def test_a_stage_with_hardly_a_usable_prompt_stops_with_reasons_examples_and_advice(
    results, monkeypatch
):
    monkeypatch.setattr("sao_utils.engines.requests.load_engine", engine_that_says("I am a baker."))
    run = open_run("tiny", "malformed", {"prompts.count": 40})
    with pytest.raises(stage.StageFailed) as stopped:
        sao.rows(run, "responses")
    for words_ in ("0 of 40", "40 malformed", "I am a baker.", "prompts.source=pre_query"):
        assert words_ in str(stopped.value)
    assert len(read_rows(run.rows("prompts"))) == 40, "what was made is kept"
    on = open_run("tiny", "malformed", {"prompts.count": 40, "prompts.min_usable": 0})
    assert sao.rows(on, "responses") == []


# ------------------------------------------------------------------ other sources


def test_without_a_persona_the_model_reads_the_ablations_template(results):
    run = open_run("tiny", "plain", {**SOURCE, "prompts.source": "no_persona"})
    made = prompts(run)
    assert len(made) == 12 and {row["source"] for row in made} == {"no_persona"}
    assert any(row["discarded"] is None for row in made)


def test_before_a_query_the_model_writes_the_users_turn_and_not_its_answer(results):
    """Nothing closes a user's turn in the tiny model's template: the assistant's header ends it."""
    changes = {**SOURCE, "prompts.source": "pre_query", "prompts.personas": "null"}
    run = open_run("tiny", "magpie", changes)
    made = prompts(run)
    assert len({row["id"] for row in made}) == 12
    for row in made:
        assert row["persona"] is None and row["source"] == "pre_query"
        assert (row["discarded"] is None) <= bool(row["prompt"])
        assert row["prompt"] is None or row["prompt"] == row["reply"].strip()
    assert sum(oracles.quality(row["prompt"], "") is not None for row in made) > 6


def test_a_share_of_the_prompts_gets_an_instruction_that_an_oracle_can_check(results):
    changes = {**SOURCE, "prompts.source": "pre_query", "prompts.personas": "null"}
    for share in (0.5, 1.0):
        made = prompts(open_run("tiny", "told", {**changes, "prompts.instructions": share}))
        known = [row["prompt"] != row["reply"].strip() for row in made if row["prompt"]]
        assert any(known) and all(known) == (share == 1)
        for row in made:
            if row["prompt"] and row["prompt"] != row["reply"].strip():
                assert row["prompt"].startswith(row["reply"].strip())
                assert oracles.quality(row["prompt"], "yes") is not None


@pytest.mark.parametrize(
    "name", ["mine.jsonl", "mine.json", "mine.csv", "mine.tsv", "mine.parquet"]
)
def test_a_users_own_prompts_take_the_place_of_written_ones(results, tmp_path, name):
    import pandas as pd

    table = pd.DataFrame({"ask": [f"How do I bake bread number {k}?" for k in range(9)]})
    writers = {
        "jsonl": lambda path: table.to_json(path, orient="records", lines=True),
        "json": lambda path: table.to_json(path, orient="records"),
        "csv": lambda path: table.to_csv(path, index=False),
        "tsv": lambda path: table.to_csv(path, index=False, sep="\t"),
        "parquet": table.to_parquet,
    }
    path = tmp_path / name
    writers[name.split(".")[1]](path)
    own = {"prompts.source": "file", "prompts.data": str(path), "prompts.column": "ask"}
    run = open_run("tiny", "own", {**own, "prompts.count": 5, "seeds": [0, 1]})
    made = prompts(run)
    assert [row["seed"] for row in made] == [0] * 5 + [1] * 5
    texts = [{row["prompt"] for row in made if row["seed"] == seed} for seed in (0, 1)]
    assert len(texts[0]) == 5 and texts[0] != texts[1] and texts[0] <= set(table["ask"])
    assert prompts(run) == made
    assert {row["prompt_id"] for row in sao.rows(run, "responses")} == {row["id"] for row in made}


def test_a_file_of_prompts_without_the_column_names_those_that_it_has(results, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("ask;answer\nHow?;So.\n")
    own = {"prompts.source": "file", "prompts.data": str(path), "prompts.count": 5}
    with pytest.raises(RecipeError, match="no column 'prompt'.*'ask;answer'"):
        prompts(open_run("tiny", "own", own))


def test_a_data_set_on_the_hub_is_read_by_name_split_and_column(results, tmp_path, monkeypatch):
    """A folder is laid out, and read, like a data set on the hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"question": f"Why is {k} odd?"}) for k in range(6)]
    (folder / "test.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    own = {"prompts.source": "file", "prompts.data": str(folder), "prompts.split": "test"}
    own |= {"prompts.column": "question", "prompts.count": 4}
    made = prompts(open_run("tiny", "hub", own))
    assert len(made) == 4 and all(row["prompt"].startswith("Why is") for row in made)
    with pytest.raises(RecipeError, match="no column 'prompt'. It has: question"):
        prompts(open_run("tiny", "hub2", {**own, "prompts.column": "prompt"}))
    with pytest.raises(RecipeError, match="could not be loaded from the hub.*prompts.split"):
        prompts(open_run("tiny", "hub3", {**own, "prompts.data": "nobody/nothing"}))
