"""Stage 4: filters, labels, and the pairs on disk."""

import dataclasses
import math
import random

import pytest

from sao_utils.engines.loading import load_model, load_tokenizer
from sao_utils.oracles import tiny_world as world
from sao_utils.stages import pairs
from sao_utils.store import open_run, read_rows
from sao_utils.training.encoding import encode

QUESTION = "Can you explain the right tool and where to go for chess?"


def perfect(question=QUESTION):
    return str(world.draw_answer(random.Random(0), world.parse_question(question), flawed=False))


@pytest.fixture
def run(results):
    pairs._COUNTED.clear()  # verdicts of these tests share their ids
    return open_run("tiny", "pairs")


def with_filter(run, **changes):
    recipe = run.recipe.model_copy(update={"pairs": run.recipe.pairs.model_copy(update=changes)})
    return dataclasses.replace(run, recipe=recipe)


def built(run, verdicts, arm="self"):
    return pairs.build_pairs(run, verdicts, run.recipe.model, arm)


def verdict(**changes):
    row = {
        "id": "v",
        "seed": 0,
        "round": 0,
        "prompt_id": "p",
        "response_ids": ["a", "b"],
        "prompt": QUESTION,
        "responses": [perfect(), "Go to the barn. Good luck!"],
        "lengths": [20, 8],
        "finished": [True, True],
        "quality": [0, -2],
        "outcome": "consistent",
        "margin": 2.0,
        "margin_12": 2.0,
        "margin_21": 2.0,
        "mass": 1.0,
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"outcome": "identical", "margin": None}, "identical answers"),
        (
            {"outcome": "identical", "lengths": [0, 0], "finished": [False, False]},
            "no reply: too long, refused, or NaN",
        ),
        ({"outcome": "inconsistent"}, "orders disagree"),
        ({"outcome": "invalid", "margin": None}, "invalid verdict"),
        ({"outcome": "tie", "margin": 0.0}, "tie"),
        ({"margin": 0.5}, "margin too small"),
        ({"responses": [" ", "Good luck!"]}, "empty answer"),
        ({"finished": [True, False]}, "cut off"),
        ({"responses": ["word " * 600, "Good luck!"]}, "too long"),
    ],
)
def test_each_filter_names_its_reason(run, changes, reason):
    strict = with_filter(run, require_consistent=True, min_margin=1.0)
    row = built(strict, [verdict(**changes)])[0]
    assert row["discarded"] == reason


def test_orders_that_cancel_name_no_winner_even_where_disagreement_is_allowed(run):
    """The paper's recipe: sampled verdicts, no filter."""
    lenient = with_filter(run, require_consistent=False, min_margin=0.0)
    made = [verdict(outcome="inconsistent", margin=margin) for margin in (0.0, 0.5)]
    assert [row["discarded"] for row in built(lenient, made)] == ["orders disagree", None]


def test_the_length_of_a_pair_is_what_training_will_see(run):
    """Also where a text holds an end token, which counts as text; and for more pairs than go at once."""
    tokenizer = load_tokenizer(run.recipe.model)
    spoken = f"A net. {tokenizer.eos_token} And a bow."
    rows = [verdict(id=f"v{k}", responses=["A net.", spoken if k % 3 else "No."]) for k in range(7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "AT_ONCE", 2)
        counted = list(pairs._count_tokens(run.recipe.model, rows))
    for row, lengths in zip(rows, counted, strict=True):
        message = {"prompt": [{"role": "user", "content": QUESTION}], "id": "p"}
        for text, length in zip(row["responses"], lengths, strict=True):
            ids, _ = encode(message | {"chosen": [{"role": "assistant", "content": text}]}, "chosen",
                            tokenizer)  # fmt: skip
            assert 0 <= length - len(ids) <= 1  # but for what a template puts after the end


def test_chosen_is_the_preferred_answer_in_trls_conversational_form(run):
    for margin, first in ((2.0, 0), (-2.0, 1)):
        row = built(run, [verdict(margin=margin)])[0]
        answers = verdict()["responses"]
        assert row["prompt"] == [{"role": "user", "content": QUESTION}]
        assert row["chosen"] == [{"role": "assistant", "content": answers[first]}]
        assert row["rejected"] == [{"role": "assistant", "content": answers[1 - first]}]
        assert row["response_ids"] == ["a", "b"][:: 1 if first == 0 else -1]


def test_random_labels_use_the_same_pairs_and_swap_about_half(run):
    many = [
        verdict(id=f"v{k}", outcome="inconsistent" if k % 5 == 0 else "consistent")
        for k in range(200)
    ]
    own, lot = (built(run, many, arm) for arm in ("self", "random"))
    assert [r["discarded"] for r in own] == [r["discarded"] for r in lot]
    swapped = sum(a["chosen"] != b["chosen"] for a, b in zip(own, lot))
    assert 60 < swapped < 140
    assert lot == built(run, many, "random")


def test_the_oracles_pairs_follow_the_oracle_and_not_the_judge(run):
    rows = [verdict(margin=-3.0), verdict(id="t", quality=[-1, -1])]
    decided, tied = built(run, rows, "oracle")
    assert decided["chosen"][0]["content"] == verdict()["responses"][0]
    assert tied["discarded"] == "tie"


def test_pairs_lie_on_disk_as_they_are_trained_on_and_the_others_beside_them_with_a_reason(run):
    rows = [verdict(), verdict(id="w", outcome="tie", margin=0.0)]
    kept, dropped = built(run, rows)
    assert read_rows(run.rows("pairs")) == [{k: v for k, v in kept.items() if k != "discarded"}]
    assert read_rows(run.rows("discarded_pairs")) == [dropped] and dropped["discarded"] == "tie"
    before = run.rows("pairs").stat().st_mtime_ns
    built(run, rows)
    assert run.rows("pairs").stat().st_mtime_ns == before, "written anew without need"
    built(run, rows, "random")
    assert len(read_rows(run.rows("pairs"))) == len(read_rows(run.rows("pairs_random"))) == 1


def test_datasets_and_trls_own_trainer_take_the_kept_pairs_as_they_are(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import load_dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    built(run, [verdict(id=f"v{k}") for k in range(4)])
    pairs_of_run = load_dataset("json", data_files=str(run.rows("pairs")), split="train")
    settings = CPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, bf16=False
    )
    settings.use_cpu, settings.report_to, settings.disable_tqdm = True, [], True
    model, tokenizer = load_model(run.recipe.model), load_tokenizer(run.recipe.model)
    trainer = CPOTrainer(
        model=model, args=settings, train_dataset=pairs_of_run, processing_class=tokenizer
    )
    assert math.isfinite(trainer.train().training_loss)
