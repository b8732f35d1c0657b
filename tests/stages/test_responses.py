"""Stage 2: responses."""

import dataclasses

from sao_utils.methods import sao
from sao_utils.stages.responses import write_responses
from sao_utils.store import read_rows


def responses(run):
    return sao.rows(run, "responses")


def test_each_prompt_has_two_responses_and_a_second_call_makes_none(small_run):
    kept = [r for r in sao.rows(small_run, "prompts") if r["discarded"] is None]
    made = responses(small_run)
    assert [(r["prompt_id"], r["sample"]) for r in made] == [
        (p["id"], s) for p in kept for s in (0, 1)
    ]
    before = small_run.rows("responses").read_bytes()
    assert responses(small_run) == made
    assert small_run.rows("responses").read_bytes() == before


def test_a_run_with_the_same_seed_makes_the_same_rows_elsewhere(small_run, tmp_path):
    other = dataclasses.replace(small_run, folder=tmp_path)
    assert responses(other) == responses(small_run)


def test_rows_lost_in_a_crash_come_back_the_same(small_run, tmp_path):
    other = dataclasses.replace(small_run, folder=tmp_path)
    whole = responses(other)
    path = other.rows("responses")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 3]) + lines[-1][:20])
    assert responses(other) == whole


def test_another_setting_makes_new_rows_and_leaves_the_old_ones(small_run, tmp_path):
    other = dataclasses.replace(small_run, folder=tmp_path)
    responses(other)
    count = len(read_rows(other.rows("responses")))
    hotter = other.recipe.model_copy(
        update={"responses": other.recipe.responses.model_copy(update={"temperature": 1.0})}
    )
    responses(dataclasses.replace(other, recipe=hotter))
    assert len(read_rows(other.rows("responses"))) == 2 * count


def test_more_samples_than_two_keep_the_first_two_as_they_are(small_run, tmp_path):
    run = dataclasses.replace(small_run, folder=tmp_path)
    prompts = sao.rows(small_run, "prompts")[:12]
    two = write_responses(run, prompts, run.recipe.model)
    four = write_responses(run, prompts, run.recipe.model, samples=4)
    assert len(four) == 2 * len(two) > 0
    assert [row for row in four if row["sample"] < 2] == two


def test_each_row_says_what_it_is_of(small_run):
    row = responses(small_run)[0]
    facts = {"prompt_id", "seed", "round", "sample", "model", "temperature", "prompt", "text"}
    assert facts <= row.keys() and row["model"] == "tiny" and row["temperature"] == 0.6
