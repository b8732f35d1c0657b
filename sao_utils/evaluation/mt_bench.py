"""MT-Bench: two-turn questions in eight categories, each answer graded from 1 to 10 by a judge.

The protocol is FastChat's single-answer grading (github.com/lm-sys/FastChat, fastchat/llm_judge;
Zheng and others, 2023, arXiv 2306.05685): the model answers turn 1, then turn 2 after its own first
answer, at a temperature that goes with the category. The judge (temperature 0) grades turn 1, and
turn 2 with the whole conversation before it; in mathematics, reasoning and coding it sees reference
answers. The first [[grade]] counts, else the first [grade]. Ours: a grade that is not within 1..10
is invalid (FastChat takes any number); the mean has an interval, clustered by question: that of a
win rate (`intervals.win_rate`), the grades 1 to 10 being laid on 0 to 1. Like a win rate, a mean
grade has ends that it cannot go beyond, and many judges give hardly anything but tens.

The 80 questions (question.jsonl), reference answers (reference_answer/gpt-4.jsonl) and judge's
prompts (judge_prompts.jsonl) are other people's: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from statistics import fmean

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.evaluation.benchmark_files import official_questions, official_rows
from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.statistics.intervals import Interval, win_rate

PROMPTS = 80
JUDGES = ("gpt-4",)
MAX_TOKENS = 1024  # of an answer
VERDICT_TOKENS = 2048
#: category -> temperature of the answers; 0.7 for any other (FastChat, common.py).
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
#: (with reference, turn 2) -> name of FastChat's judge prompt
JUDGE_PROMPTS = {
    (False, False): "single-v1",
    (True, False): "single-math-v1",
    (False, True): "single-v1-multi-turn",
    (True, True): "single-math-v1-multi-turn",
}
LOWEST, HIGHEST = 1, 10  # grades
NO_GRADE = "invalid verdict: no grade"
OUTSIDE = "invalid verdict: grade outside 1..10"
#: what was counted -> how that differs from FastChat's protocol
DIFFERENCES = {OUTSIDE: "{} grades outside 1..10 left out, which count there"}
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def load(settings: Evaluation) -> dict:
    """The benchmark as `run_benchmark` takes it: {items, show, notes, counts}.

    An item has `reference`, a text a turn, in the categories that need it, else None. `show(item,
    texts)` gives the chat for the judge, and the name of its prompt.

    Raises:
        RecipeError: the questions are not there, or the judge's prompts cannot be read.
    """
    given = official_rows(settings, "mt_bench", "reference_answer/gpt-4.jsonl") or ()
    references = {row.get("question_id"): _turns_of(row) for row in given}
    counts, items, seen = Counter(), [], set()
    for row in official_questions(settings, "mt_bench"):
        if row["id"] in seen:
            counts["repeated id"] += 1
            continue
        seen.add(row["id"])
        reference = None
        if row["category"] in WITH_REFERENCE:
            reference = references.get(row["id"]) or row.get("reference")
            if not reference or len(reference) < len(row["turns"]):
                counts["no reference answer"] += 1
                reference = None
        items.append({**row, "reference": reference})
    prompts = official_rows(settings, "mt_bench", "judge_prompts.jsonl")
    notes = ("the judge's prompt is the kit's own",) if prompts is None else ()
    if counts["no reference answer"]:
        notes += (f"{counts['no reference answer']} questions without their reference answer",)
    return {
        "items": items,
        "show": _own_chat if prompts is None else _official_chat(prompts),
        "notes": notes,
        "counts": counts,
    }


def _turns_of(row: dict) -> list[str] | None:
    try:
        return row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        return None


def _official_chat(rows: list[dict]) -> Callable[[dict, list[str]], tuple[list[dict], str]]:
    prompts = {row.get("name"): row for row in rows}
    missing = [name for name in JUDGE_PROMPTS.values() if name not in prompts]
    if missing:
        raise RecipeError(f"judge_prompts.jsonl of mt_bench has no prompt {', '.join(missing)}.")

    def chat(item: dict, texts: list[str]) -> tuple[list[dict], str]:
        name = JUDGE_PROMPTS[item["reference"] is not None, len(texts) > 1]
        values = _values(item, texts) | {"question": item["turns"][0], "answer": texts[0]}
        text = templates.fill(prompts[name]["prompt_template"], **values)
        system = {"role": "system", "content": prompts[name]["system_prompt"]}
        return [system, {"role": "user", "content": text}], name

    return chat


def _own_chat(item: dict, texts: list[str]) -> tuple[list[dict], str]:
    every = ("question_1", "answer_1", "ref_answer_1", "question_2", "answer_2", "ref_answer_2")
    values = dict.fromkeys(every, "") | templates.escaped(_values(item, texts))
    text = templates.render("mt_judge", **values)
    return [{"role": "user", "content": text}], "ours"


def _values(item: dict, texts: list[str]) -> dict[str, str]:
    values = {}
    for k, text in enumerate(texts, 1):
        values |= {f"question_{k}": item["turns"][k - 1], f"answer_{k}": text}
        if item["reference"] is not None:
            values[f"ref_answer_{k}"] = item["reference"][k - 1]
    return values


def temperature(item: dict) -> float:
    """The temperature at which a question is answered."""
    return TEMPERATURES.get(item["category"], 0.7)


def read_grade(text: str) -> float | None:
    """The grade in a verdict; None where there is none within 1..10."""
    grade = _stated(text)
    return grade if grade is not None and LOWEST <= grade <= HIGHEST else None


def _stated(text: str) -> float | None:
    """The number that a verdict gives as its grade, whatever it is."""
    found = next((m for m in (grade.search(text) for grade in _GRADES) if m), None)
    return float(found[1]) if found else None


def argue(ask: Callable[[list[dict]], list[dict]], chats: list[list[dict]]) -> list[str]:
    """The judge's verdicts in its own words."""
    sampling = Sampling(0.0, VERDICT_TOKENS)
    return [reply["text"] for reply in ask([{"chat": c, "sampling": sampling} for c in chats])]


def judge(
    ask: Callable[[list[dict]], list[dict]],
    benchmark: dict,
    answers: dict[str, dict],
    name: str,
) -> tuple[dict[str, list[dict]], dict[str, Counter]]:
    """Judgments of every model, in FastChat's format, and what was counted.

    Args:
        ask, answers, name: as in `alpaca_eval.judge`. `benchmark["grade"](item, texts)` may give
            the verdict's text instead of the judge.

    Returns:
        model -> judgments {question_id, model, judge [name, prompt], user_prompt, judgment, score (-1:
        invalid), turn, category}, model -> counts.
    """
    jobs, chats = [], []
    for model, given in answers.items():
        for item in benchmark["items"]:
            for turn in range(1, len(item["turns"]) + 1):
                texts = given[item["id"]]["turns"][:turn]
                chat, prompt = benchmark["show"](item, texts)
                chats.append(chat)
                jobs.append((model, item, turn, prompt, texts))
    if "grade" in benchmark:
        verdicts = [benchmark["grade"](item, texts) for _, item, _, _, texts in jobs]
    else:
        verdicts = argue(ask, chats)
    judgments: dict[str, list[dict]] = {model: [] for model in answers}
    counts = {model: Counter() for model in answers}
    for (model, item, turn, prompt, _), chat, text in zip(jobs, chats, verdicts):
        grade = read_grade(text)
        if grade is None:
            counts[model][NO_GRADE if _stated(text) is None else OUTSIDE] += 1
        judgments[model].append(
            {
                "question_id": item["id"],
                "model": model,
                "judge": [name, prompt],
                "user_prompt": chat[-1]["content"],
                "judgment": text,
                "score": -1 if grade is None else grade,
                "turn": turn,
                "category": item["category"],
                "tstamp": 0.0,
            }
        )
    return judgments, counts


def figures(judgments: list[dict]) -> dict[str, Interval]:
    """One model's mean grade with its interval: score, score.turn_1, ..., score.<category>, ...

    Invalid grades are left out, as in FastChat's show_result.py. Where all grades are one and the
    same, each question counts as one trial of a win rate: a wide interval, never one without width.
    """
    return {key: _mean_grade(rows) for key, rows in _by_metric(judgments).items()}


def _by_metric(judgments: list[dict]) -> dict[str, list[dict]]:
    """The judgments with a valid grade that belong to each figure."""
    groups: dict[str, list[dict]] = {}
    for row in judgments:
        if row["score"] != -1:
            for key in ("score", f"score.turn_{row['turn']}", f"score.{row['category']}"):
                groups.setdefault(key, []).append(row)
    return groups


def _mean_grade(rows: list[dict]) -> Interval:
    grades, width = [row["score"] for row in rows], HIGHEST - LOWEST
    shares = [(grade - LOWEST) / width for grade in grades]
    bounds = win_rate(shares, [row["question_id"] for row in rows]).rate
    low, high = (LOWEST + width * bound for bound in (bounds.low, bounds.high))
    return Interval(fmean(grades), low, high, len(grades), bounds.note)


def remarks(judgments: list[dict]) -> dict[str, list[str]]:
    """What makes each of the `figures` doubtful: metric -> sentences."""
    return {
        metric: ["The judge gave one and the same grade to all."]
        for metric, rows in _by_metric(judgments).items()
        if len(rows) > 1 and len({row["score"] for row in rows}) == 1
    }


def labels(judgments: list[dict]) -> dict[tuple, float | None]:
    """(question id, turn) -> grade; None for an invalid one."""
    return {
        (row["question_id"], row["turn"]): None if row["score"] == -1 else row["score"]
        for row in judgments
    }


def files(answers: dict[str, dict], benchmark: dict, judgments: dict, judge: str) -> dict:
    """What FastChat's program reads, as {path: rows}: model_answer and model_judgment."""
    written = {
        f"model_answer/{model}.jsonl": [
            {
                "question_id": item["id"],
                "answer_id": given[item["id"]]["id"],
                "model_id": model,
                "choices": [{"index": 0, "turns": given[item["id"]]["turns"]}],
                "tstamp": 0.0,
            }
            for item in benchmark["items"]
        ]
        for model, given in answers.items()
    }
    written[f"model_judgment/{judge}_single.jsonl"] = [r for of in judgments.values() for r in of]
    return written
