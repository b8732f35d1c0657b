"""Self-Rewarding: SFT on seeds and a judge's replies, then DPO on the model's own points."""

import json

import pytest
from scripted_server import reply, settings

from sao_utils import oracles, templates
from sao_utils.methods.iterate import iterate
from sao_utils.methods.self_rewarding import judging_examples
from sao_utils.recipe import RecipeError
from sao_utils.store import open_run, read_rows

SMALL = {
    "method": "self_rewarding",
    "rounds": 2,
    "prompts.source": "persona",
    "prompts.data": None,
    "prompts.count": 12,
    "prompts.min_usable": 0,
    "synpo.seed_count": 16,
    "self_rewarding.judged_count": 16,
    "self_rewarding.first": {"learning_rate": 1e-4, "epochs": 1, "batch_size": 8},
    "points.template": "points_short",
    "points.samples": 2,
    "training.algorithm": "dpo",
    "iterations.start": "previous",
    "iterations.grow": False,
}


class Points(dict):
    """A judge's replies: the more words a response has, the more points; none for the longest."""

    def get(self, asked, _):
        words = len(asked.split("<response>")[1].split("</response>")[0].split())
        text = f"Score: {min(words // 6, 5)}" if words < 30 else "A long one."
        return [(200, reply(text), {})]


def test_the_first_round_imitates_and_the_second_prefers_what_was_given_more_points(
    results, server
):
    server.answers = Points()
    judge = settings(server).model_dump(exclude_unset=True)
    changes = {f"judge.{key}": value for key, value in judge.items()}
    run = open_run("tiny-synpo", "rewarding", {**SMALL, **changes})
    first, second = iterate(run, 0)
    assert done(run, 1)["algorithm"] == "sft" and done(run, 1)["pairs"] == 16 + 16
    assert done(run, 2)["algorithm"] == "dpo"
    used = [row for row in second.pairs if row["discarded"] is None]
    assert used and done(run, 2)["pairs"] == len(used)

    given = {}
    for row in read_rows(run.rows("ranks")):
        points = templates.parse_points(row["text"])
        given.setdefault(row["response_id"], []).append(points)
    assert {len(points) for points in given.values()} == {2}
    for row in used:
        best, worst = (given[i] for i in row["response_ids"])
        assert sum(best) > sum(worst)
    assert first.candidate.model.adapter != second.candidate.model.adapter


def done(run, number):
    folder = run.folder / "adapters" / f"self_rewarding-round{number}-0"
    return json.loads((folder / "done.json").read_text())


def test_the_judges_replies_of_the_tiny_world_give_a_point_less_for_each_flaw():
    for prompt, response, written in oracles.tiny_judged(50, seed=1):
        assert templates.parse_points(written) == max(0, 5 + oracles.quality(prompt, response)[0])
        assert not oracles.is_held_out(prompt)


def test_a_file_of_judged_responses_is_asked_in_the_papers_words(results, tmp_path):
    file = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"Why {k}?", "response": "So.", "reply": f"Score: {k}"} for k in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    changes = {**SMALL, "self_rewarding.judged": str(file), "points.template": "points"}
    run = open_run("tiny-synpo", "own", {**changes, "self_rewarding.judged_count": 3})
    examples = judging_examples(run, 0)
    assert len(examples) == 3
    for row in examples:
        points = row["chosen"][0]["content"][-1]
        asked = templates.points_prompt("points", f"Why {points}?", "So.")
        assert row["prompt"] == [{"role": "user", "content": asked}]
    run = open_run("tiny-synpo", "own", {**changes, "self_rewarding.judged_count": 5})
    with pytest.raises(RecipeError, match="has 4 rows, self_rewarding.judged_count asks for 5"):
        judging_examples(run, 0)


@pytest.mark.parametrize("section", ["synpo", "self_rewarding"])
def test_without_its_sections_the_method_says_which_one_is_missing(results, section):
    changes = {key: value for key, value in SMALL.items() if not key.startswith(f"{section}.")}
    recipe = "tiny-synpo" if section == "self_rewarding" else "tiny"
    with pytest.raises(RecipeError, match=f"needs a section {section}"):
        open_run(recipe, "lacking", changes)


def test_rounds_that_could_not_go_on_from_the_first_are_refused(results):
    with pytest.raises(RecipeError, match="set both to full, or both to lora"):
        open_run("tiny-synpo", "mixed", {**SMALL, "training.method": "full"})
