"""Arena-Hard v0.1: two games per prompt against a baseline, verdicts with five labels, Bradley-Terry.

The protocol is that of github.com/lmarena/arena-hard-auto at v0.1 (Li and others, 2024, arXiv
2406.11939): in game 1 the baseline's answer is A, in game 2 the model's. The judge argues at
temperature 0 and ends with a label. All labels that it writes must be the same, otherwise the game
does not count; if it writes none, it is asked once to go on (in our words, not the program's).
A>>B and B>>A count as three games. The score is the win rate against the baseline that the
Bradley-Terry fit expects. As each model here meets only the baseline, this is its share of the
votes, a tie counting half. The interval is ours: that of any win rate (`intervals.win_rate`), over
prompts, whereas the program resamples single games (docs/evaluation.md).

The 500 prompts (question.jsonl), the baseline's answers (model_answer/gpt-4-0314.jsonl) and the
judge's prompt (judge_config.yaml) are third-party files: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import yaml

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.evaluation.benchmark_files import (
    answer_files,
    needed_file,
    official_questions,
    official_rows,
)
from sao_utils.recipe import Evaluation
from sao_utils.statistics.intervals import Interval, win_rate

BASELINE = "gpt-4-0314"
VERDICT_TOKENS = 4096
#: label -> (outcome for A, how many games it counts as)
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
GO_ON = "Please go on, and end with your verdict as one of the labels."  # ours
_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")


def load(settings: Evaluation) -> dict:
    """The benchmark as `benchmarks.load` describes it.

    Raises:
        RecipeError: the prompts, the baseline's answers or the judge's prompt are missing.
    """
    items = official_questions(settings, "arena_hard")
    given = official_rows(settings, "arena_hard", f"model_answer/{BASELINE}.jsonl")
    path = needed_file(settings, "arena_hard", "judge_config.yaml")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        "items": items,
        "baseline": {row["question_id"]: row["choices"][0]["turns"][0]["content"] for row in given},
        "baseline_name": BASELINE,
        "show": partial(_show, config["system_prompt"], config["prompt_template"][0]),
        "ask": argue,
    }


def _show(system: str, template: str, question: str, a: str, b: str) -> dict:
    text = templates.fill(template, question_1=question, answer_1=a, answer_2=b)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return {"chat": chat, "sampling": Sampling(0.0, VERDICT_TOKENS)}


def read_label(text: str) -> str | None:
    """The label of a verdict; None if there is none, or if there are several that differ."""
    found = set(_LABEL.findall(text))
    return found.pop() if len(found) == 1 else None


def argue(send: Callable[[list[dict]], list[dict]], requests: list[dict]) -> list[dict]:
    """The judge's verdicts {text}; if one has no label, the judge is asked once to continue it."""
    texts = [reply["text"] for reply in send(requests)]
    silent = [k for k, text in enumerate(texts) if text and not _LABEL.search(text)]
    more = []
    for k in silent:
        said = [{"role": "assistant", "content": texts[k]}, {"role": "user", "content": GO_ON}]
        more.append({**requests[k], "chat": [*requests[k]["chat"], *said]})
    for k, reply in zip(silent, send(more)):
        texts[k] += "\n" + reply["text"]
    return [{"text": text} for text in texts]


def requests(benchmark: dict, item: dict, turns: list[str]) -> list[dict]:
    """The two games: first the baseline's answer is A, then the model's."""
    question, base = item["turns"][0], benchmark["baseline"][item["id"]]
    return [benchmark["show"](question, *two) for two in ((base, turns[0]), (turns[0], base))]


def judgments(benchmark: dict, item: dict, turns: list[str], judged, model, judge) -> list[dict]:
    """One judgment of two games in Arena-Hard's format."""
    games = [
        {
            "user_prompt": request["chat"][-1]["content"],
            "judgment": reply["text"],
            "score": read_label(reply["text"]),
        }
        for request, reply in judged
    ]
    return [{"question_id": item["id"], "model": model, "judge": judge, "games": games}]


def verdicts(judgments: list[dict]) -> list[tuple]:
    """(question id, outcome for A or None) for each game."""
    return [
        (row["question_id"], LABELS.get(game["score"], (None,))[0])
        for row in judgments
        for game in row["games"]
    ]


def figures(judgments: list[dict], benchmark: dict) -> dict[str, Interval]:
    """The figures of one model, with intervals, as shares; {} without a valid game.

    Returns:
        score: the win rate against the baseline (n counts games); first_rate: the share of decided
        games that A won.
    """
    games, votes = 0, []
    for row in judgments:
        for k, game in enumerate(row["games"]):
            if game["score"] in LABELS:
                a_wins, weight = LABELS[game["score"]]
                games += 1
                votes += [(row["question_id"], a_wins if k else 1 - a_wins)] * weight
    if not votes:
        return {}
    questions, outcomes = zip(*votes)
    found = {"score": replace(win_rate(outcomes, questions), n=games)}
    decided = [verdict for verdict in verdicts(judgments) if verdict[1] in (0, 1)]
    if decided:
        questions, a_wins = zip(*decided)
        found["first_rate"] = win_rate(a_wins, questions)
    return found


def files(benchmark: dict, answers: dict[str, dict], judgments: dict, judge: str) -> dict:
    """The files that Arena-Hard's program reads, as {path: rows}: model_answer and model_judgment."""
    written = answer_files(
        benchmark, answers, lambda text, tokens: {"content": text, "token_len": tokens}
    )
    return written | {
        f"model_judgment/{judge}/{model}.jsonl": rows for model, rows in judgments.items() if rows
    }
