"""MT-Bench: two-turn questions in eight categories, each answer graded from 1 to 10 by a judge.

The protocol is FastChat's single-answer grading (github.com/lm-sys/FastChat, fastchat/llm_judge;
Zheng and others, 2023, arXiv 2306.05685): the model answers turn 1, then turn 2 after its own first
answer, at a temperature that depends on the category. The judge (temperature 0) grades turn 1, and
turn 2 with the whole conversation before it; in mathematics, reasoning and coding it sees reference
answers. The first [[grade]] counts, else the first [grade]. Ours: a grade that is not within 1..10
is invalid (FastChat accepts any number), and the mean has an interval, clustered by question: that of
a win rate (`intervals.win_rate`), with the grades 1 to 10 mapped to 0 to 1. Like a win rate, a mean
grade is bounded on both sides, and many judges give hardly anything but tens.

The 80 questions (question.jsonl), the reference answers (reference_answer/gpt-4.jsonl) and the judge's
prompts (judge_prompts.jsonl) are third-party files: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import re
from functools import partial
from statistics import fmean

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.evaluation.benchmark_files import answer_files, official_questions, official_rows
from sao_utils.recipe import Evaluation
from sao_utils.statistics.intervals import Interval, win_rate

VERDICT_TOKENS = 2048
WITH_REFERENCE = ("math", "reasoning", "coding")
LOWEST, HIGHEST = 1, 10  # grades
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def load(settings: Evaluation) -> dict:
    """The benchmark as `benchmarks.load` describes it.

    An item's `reference` is one text per turn in the categories that need it, else None.

    Raises:
        RecipeError: the questions, the references or the judge's prompts are missing.
    """
    items = official_questions(settings, "mt_bench")
    given = official_rows(settings, "mt_bench", "reference_answer/gpt-4.jsonl")
    references = {row["question_id"]: row["choices"][0]["turns"] for row in given}
    for item in items:
        needed = item["category"] in WITH_REFERENCE
        item["reference"] = references[item["id"]] if needed else None
    prompts = {
        row["name"]: row for row in official_rows(settings, "mt_bench", "judge_prompts.jsonl")
    }
    return {"items": items, "show": partial(_show, prompts)}


def _show(prompts: dict[str, dict], item: dict, answers: list[str]) -> dict:
    kind = "single-math-v1" if item["reference"] is not None else "single-v1"
    prompt = prompts[f"{kind}-multi-turn" if len(answers) > 1 else kind]
    texts = {"question": item["turns"][0], "answer": answers[0]}
    for k, answer in enumerate(answers, 1):
        texts |= {f"question_{k}": item["turns"][k - 1], f"answer_{k}": answer}
        if item["reference"] is not None:
            texts[f"ref_answer_{k}"] = item["reference"][k - 1]
    text = templates.fill(prompt["prompt_template"], **texts)
    system = {"role": "system", "content": prompt["system_prompt"]}
    return {
        "chat": [system, {"role": "user", "content": text}],
        "sampling": Sampling(0.0, VERDICT_TOKENS),
        "prompt": prompt["name"],
    }


def read_grade(text: str) -> float | None:
    """The grade in a verdict; None if there is none, or it is not within 1..10."""
    found = next((m for m in (grade.search(text) for grade in _GRADES) if m), None)
    return float(found[1]) if found and LOWEST <= float(found[1]) <= HIGHEST else None


def requests(benchmark: dict, item: dict, turns: list[str]) -> list[dict]:
    """One request per turn, each with the conversation before it."""
    return [benchmark["show"](item, turns[:k]) for k in range(1, len(turns) + 1)]


def judgments(benchmark: dict, item: dict, turns: list[str], judged, model, judge) -> list[dict]:
    """One judgment per turn in FastChat's format; a score of -1 marks an invalid grade."""
    rows = []
    for turn, (request, reply) in enumerate(judged, 1):
        grade = read_grade(reply["text"])
        rows.append(
            {
                "question_id": item["id"],
                "model": model,
                "judge": [judge, request["prompt"]],
                "user_prompt": request["chat"][-1]["content"],
                "judgment": reply["text"],
                "score": -1 if grade is None else grade,
                "turn": turn,
                "category": item["category"],
                "tstamp": 0.0,  # so that the same verdicts give the same file
            }
        )
    return rows


def verdicts(judgments: list[dict]) -> list[tuple]:
    """(question id, grade or None) for each turn."""
    return [(row["question_id"], None if row["score"] == -1 else row["score"]) for row in judgments]


def figures(judgments: list[dict], benchmark: dict) -> dict[str, Interval]:
    """One model's mean grades with intervals: score over all turns, and score.turn_1, score.turn_2.

    Invalid grades are left out, as in FastChat's show_result.py. If all grades are the same, each
    question counts as one trial of a win rate, so the interval is wide rather than of zero width.
    """
    valid: dict[str, list[dict]] = {}
    for row in judgments:
        if row["score"] != -1:
            for metric in ("score", f"score.turn_{row['turn']}"):
                valid.setdefault(metric, []).append(row)
    return {metric: _mean_grade(rows) for metric, rows in valid.items()}


def _mean_grade(rows: list[dict]) -> Interval:
    grades, width = [row["score"] for row in rows], HIGHEST - LOWEST
    shares = [(grade - LOWEST) / width for grade in grades]
    bounds = win_rate(shares, [row["question_id"] for row in rows])
    low, high = (LOWEST + width * bound for bound in (bounds.low, bounds.high))
    return Interval(fmean(grades), low, high, len(grades), bounds.note)


def files(benchmark: dict, answers: dict[str, dict], judgments: dict, judge: str) -> dict:
    """The files that FastChat's program reads, as {path: rows}: model_answer and model_judgment."""
    rows = [row for of_model in judgments.values() for row in of_model]
    written = answer_files(benchmark, answers, lambda text, _: text)
    return written | {f"model_judgment/{judge}_single.jsonl": rows}
