"""The embedded model's card: what it does on held-out questions, measured."""

from __future__ import annotations

from pathlib import Path

from sao_utils.disk import write_whole
from sao_utils.engines.loading import model_folder
from sao_utils.evaluation.judge_quality import judge_quality
from sao_utils.evaluation.questions import questions
from sao_utils.recipe import Model
from sao_utils.report.results import results
from sao_utils.report.table import value_of
from sao_utils.report.words import in_words
from sao_utils.stages.judging import judge_pairs, response_pairs
from sao_utils.stages.responses import write_responses
from sao_utils.store import Run, open_run, row_id

#: label in the card -> section and metric in the table of results, and temperature
OF_THE_RUN = {
    "good answers to held-out questions, greedy": ("quality", "good answers", 0.0),
    "good answers to held-out questions, T = 0.6": ("quality", "good answers", 0.6),
    "replies to the persona template that parse": ("prompts", "usable replies", None),
}
#: label in the card -> metric of `judge_quality`
OF_THE_JUDGE = {
    "judge accuracy on its own pairs": "accuracy",
    "judge accuracy, one order alone": "accuracy, one order",
    "both orders agree": "consistent verdicts",
    "the answer shown first wins": "first position",
    "the judge prefers the longer answer": "longer answer chosen",
    "the oracle prefers the longer answer": "longer answer better",
    "valid verdicts": "valid verdicts",
}


def held_out_pairs(run: Run, judge: Model) -> list[dict]:
    """Two sampled answers of the run's model to each held-out question, judged in both orders."""
    prompts = [
        {
            "id": row_id("card", q["id"]),
            "seed": 0,
            "round": 1,
            "prompt": q["question"],
            "discarded": None,
        }
        for q in questions(run.recipe.evaluation)
    ]
    pairs = response_pairs(write_responses(run, prompts, run.recipe.model))
    return judge_pairs(run, pairs, judge, "card_verdicts")


def write_card() -> None:
    """Measure on held-out questions and personas, and replace the table in the model's README.md."""
    changes = {"arms": [], "prompts.count": 2000, "evaluation.per_combination": 8}
    run = open_run("tiny", "tiny-card", changes)
    table = results(run, "quality", "prompts")
    found = {
        label: value_of(
            table, section=section, metric=metric, model="base", temperature=temperature
        )
        for label, (section, metric, temperature) in OF_THE_RUN.items()
    }
    judged = judge_quality(held_out_pairs(run, run.recipe.model))
    found |= {label: judged[metric] for label, metric in OF_THE_JUDGE.items()}
    rows = [f"| {label} | {in_words(one)} | {one.n} |" for label, one in found.items()]
    path = Path(model_folder("tiny")) / "README.md"
    before, after = path.read_text(encoding="utf-8").split("|---|---|---|\n")
    after = after[after.index("\n\n") :]
    write_whole(path, before + "|---|---|---|\n" + "\n".join(rows) + after)
    print("\n".join(rows))
