"""Arena-Hard v0.1: two games a prompt against a baseline, verdicts with five labels, Bradley-Terry.

The protocol is that of github.com/lmarena/arena-hard-auto at v0.1 (Li and others, 2024, arXiv
2406.11939): in game 1 the baseline's answer is A, in game 2 the model's. The judge argues at
temperature 0 and ends with a label. All labels that it writes must be one and the same, else the
game does not count; without any label it is asked once to go on. A>>B and B>>A count as three
games. The score is the win rate against the baseline that the Bradley-Terry fit expects. Here each
model meets the baseline alone, and that is its share of the votes, a tie giving half of one. The
interval is ours, that of any win rate (`intervals.win_rate`), over prompts. The program resamples
single games, and a strong verdict as if it were three of them (`bootstrap`): too narrow (by a third
where all labels are as frequent), and without any width where one side wins all.

The 500 prompts (question.jsonl), the baseline's answers (model_answer/gpt-4-0314.jsonl) and the
judge's prompt (judge_config.yaml) are other people's: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import yaml

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.evaluation.benchmark_files import official_file, official_questions, official_rows
from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.statistics.intervals import Interval, clustered_mean, win_rate

BASELINE = "gpt-4-0314"
PROMPTS = 500
JUDGES = ("gpt-4-1106-preview",)
MAX_TOKENS = 4096  # of an answer and of a verdict, at temperature 0
#: label -> (outcome for A, how many games it counts as)
LABELS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
GO_ON = "Please go on, and end with your verdict as one of the labels."  # ours
ASKED_ON = "asked once more for a label"
#: what was counted -> how that differs from Arena-Hard's protocol
DIFFERENCES = {ASKED_ON: "{} verdicts asked once more for a label, in other words than there"}
ROUNDS = 100  # of the program's bootstrap
_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")


def load(settings: Evaluation) -> dict:
    """The benchmark as `run_benchmark` takes it: {items, baseline, baseline_name, show, notes, counts}.

    `show(question, a, b)` gives the chat for the judge.

    Raises:
        RecipeError: the prompts or the baseline's answers are not there, or cannot be read.
    """
    given = official_rows(settings, "arena_hard", f"model_answer/{BASELINE}.jsonl")
    asked = official_questions(settings, "arena_hard")
    if given is None:
        raise RecipeError(
            f"arena_hard needs the baseline's answers: put model_answer/{BASELINE}.jsonl beside its "
            "question.jsonl."
        )
    baseline = {row.get("question_id", row.get("uid")): _answer_of(row) for row in given}
    counts, items, seen = Counter(), [], set()
    for row in asked:
        if row["id"] in seen:
            counts["repeated id"] += 1
        elif baseline.get(row["id"]) is None:
            counts["no baseline answer"] += 1
        else:
            items.append(row)
        seen.add(row["id"])
    config = official_file(settings, "arena_hard", "judge_config.yaml")
    return {
        "items": items,
        "baseline": baseline,
        "baseline_name": BASELINE,
        "show": _own_chat if config is None else _official_chat(config),
        "notes": ("the judge's prompt is the kit's own",) if config is None else (),
        "counts": counts,
    }


def _answer_of(row: dict) -> str | None:
    """The text of an answer file's row, in the form of v0.1 or of later versions."""
    try:
        if "messages" in row:
            content = row["messages"][-1]["content"]
            return content["answer"] if isinstance(content, dict) else content
        turn = row["choices"][0]["turns"][0]
        return turn["content"] if isinstance(turn, dict) else turn
    except (KeyError, IndexError, TypeError):
        return None


def _official_chat(path) -> Callable[[str, str, str], list[dict]]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        system, template = config["system_prompt"], config["prompt_template"]
    except (KeyError, TypeError):
        raise RecipeError(f"{path} has no system_prompt and prompt_template.") from None
    template = template if isinstance(template, str) else template[0]

    def chat(question: str, a: str, b: str) -> list[dict]:
        text = templates.fill(template, question_1=question, answer_1=a, answer_2=b)
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    return chat


def _own_chat(question: str, a: str, b: str) -> list[dict]:
    texts = {"question_1": question, "answer_1": a, "answer_2": b}
    text = templates.render("arena_judge", **templates.escaped(texts))
    return [{"role": "user", "content": text}]


def read_label(text: str) -> tuple[str | None, bool]:
    """The label of a verdict (None: none, or several that differ), and whether to ask on."""
    found = set(_LABEL.findall(text))
    return next(iter(found)) if len(found) == 1 else None, not found


def argue(
    ask: Callable[[list[dict]], list[dict]], chats: list[list[dict]]
) -> tuple[list[str], list[int]]:
    """The judge's verdicts in its own words, and the places of those asked on for want of a label."""
    sampling = Sampling(0.0, MAX_TOKENS)
    texts = [reply["text"] for reply in ask([{"chat": c, "sampling": sampling} for c in chats])]
    silent = [k for k, text in enumerate(texts) if text and read_label(text)[1]]
    more = [
        [*chats[k], {"role": "assistant", "content": texts[k]}, {"role": "user", "content": GO_ON}]
        for k in silent
    ]
    for k, reply in zip(silent, ask([{"chat": c, "sampling": sampling} for c in more])):
        texts[k] += "\n" + reply["text"]
    return texts, silent


def judge(
    ask: Callable[[list[dict]], list[dict]],
    benchmark: dict,
    answers: dict[str, dict],
    name: str,
) -> tuple[dict[str, list[dict]], dict[str, Counter]]:
    """Judgments of every model, in Arena-Hard's format, and what was counted.

    Args:
        ask, answers, name: as in `alpaca_eval.judge`. `benchmark["argue"]` may judge otherwise.

    Returns:
        model -> judgments {question_id, model, judge, games: two of {user_prompt, judgment, score}},
        model -> counts. The baseline itself is not judged: its win rate is one half.
    """
    jobs, chats = [], []
    counts = {model: Counter() for model in answers}
    for model, given in answers.items():
        for item in benchmark["items"] if model != benchmark["baseline_name"] else ():
            mine, base = given[item["id"]]["turns"][0], benchmark["baseline"][item["id"]]
            counts[model]["identical answers"] += mine == base  # judged all the same, as there
            for a, b in ((base, mine), (mine, base)):
                chats.append(benchmark["show"](item["turns"][0], a, b))
            jobs.append((model, item["id"]))
    texts, asked_on = benchmark.get("argue", argue)(ask, chats)
    asked_on, shown = set(asked_on), iter(enumerate(zip(texts, chats)))
    judgments: dict[str, list[dict]] = {model: [] for model in answers}
    for model, identity in jobs:
        games = []
        for _ in range(2):
            place, (text, chat) = next(shown)
            counts[model][ASKED_ON] += place in asked_on
            label, without = read_label(text)
            if label not in LABELS:
                why = "no label" if without else "label unknown" if label else "labels differ"
                counts[model][f"invalid verdict: {why}"] += 1
            games.append({"user_prompt": chat[-1]["content"], "judgment": text, "score": label})
        judgments[model].append(
            {"question_id": identity, "model": model, "judge": name, "games": games}
        )
    return judgments, counts


def games_of(judgments: list[dict], baseline: str) -> list[tuple[str, str, float, int, str]]:
    """The valid games (model, baseline, outcome for the model, weight, question id)."""
    games = []
    for row in judgments:
        for k, game in enumerate(row["games"]):
            if game["score"] in LABELS:
                a_wins, weight = LABELS[game["score"]]
                outcome = a_wins if k else 1 - a_wins  # in game 1 the baseline is A
                games.append((row["model"], baseline, outcome, weight, row["question_id"]))
    return games


def figures(judgments: list[dict], baseline: str, lengths: dict) -> dict[str, Interval]:
    """The figures of one model, with intervals; without a valid game avg_tokens alone.

    Args:
        lengths: tokens of the model's answer, by question id.

    Returns:
        score: the win rate against the baseline (a share; n counts games); agreement: the share of
        prompts whose two games name the same winner or both a tie; first_rate: how often A won of
        decided games; avg_tokens.
    """
    found = {"avg_tokens": clustered_mean(list(lengths.values()), list(lengths))} if lengths else {}
    games = games_of(judgments, baseline)
    if not games:
        return found
    rate = win_rate(*_votes(games)).rate
    found["score"] = replace(rate, n=len(games))
    labels = [
        (row["question_id"], [LABELS[g["score"]][0] for g in row["games"]])
        for row in judgments
        if all(g["score"] in LABELS for g in row["games"])
    ]
    if labels:
        found["agreement"] = win_rate([float(one == 1 - two) for _, (one, two) in labels]).rate
    decided = [
        (LABELS[g["score"]][0], row["question_id"])
        for row in judgments
        for g in row["games"]
        if LABELS.get(g["score"], (0.5,))[0] != 0.5
    ]
    if decided:
        found["first_rate"] = win_rate(*(list(column) for column in zip(*decided))).rate
    return found


def _votes(games: list[tuple]) -> tuple[list[float], list[str]]:
    """The outcomes of games, each as often as it counts, and the question of each."""
    votes = [(outcome, question) for *_, outcome, weight, question in games for _ in range(weight)]
    return [outcome for outcome, _ in votes], [question for _, question in votes]


def bootstrap(judgments: list[dict], baseline: str, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the score as Arena-Hard's program takes it: shares; None without a game.

    `ROUNDS` resamples of single votes, as many as there are: what the leaderboard shows.
    """
    games = games_of(judgments, baseline)
    if not games:
        return None
    import numpy as np

    votes, rng = np.array(_votes(games)[0]), np.random.default_rng(seed)
    scores = rng.choice(votes, (ROUNDS, len(votes))).mean(axis=1)
    low, high = np.quantile(scores, (0.025, 0.975))
    return float(low), float(high)


def remarks(judgments: list[dict]) -> dict[str, list[str]]:
    """What makes the score doubtful, as {"score": sentences}: games of one order that do not count."""
    first, second = (sum(row["games"][k]["score"] in LABELS for row in judgments) for k in range(2))
    if abs(first - second) <= len(judgments) / 20:
        return {}
    return {
        "score": [
            f"{first} games count with the baseline's answer shown first, and {second} with the "
            "model's: what position does to the judge does not cancel."
        ]
    }


def labels(judgments: list[dict]) -> dict[tuple, float | None]:
    """(question id, game) -> 1 where A won, 0.5 a tie, 0 where B did; None for an invalid verdict."""
    return {
        (row["question_id"], k): LABELS.get(game["score"], (None,))[0]
        for row in judgments
        for k, game in enumerate(row["games"], 1)
    }


def files(answers: dict[str, dict], benchmark: dict, judgments: dict, judge: str) -> dict:
    """What Arena-Hard's program reads, as {path: rows}: model_answer and model_judgment."""
    written = {}
    for model, given in answers.items():
        written[f"model_answer/{model}.jsonl"] = [
            {
                "question_id": item["id"],
                "answer_id": given[item["id"]]["id"],
                "model_id": model,
                "choices": [{"index": 0, "turns": [{"content": text, "token_len": tokens}]}],
                "tstamp": 0.0,  # the same answers, the same file
            }
            for item in benchmark["items"]
            for text, tokens in [(given[item["id"]]["turns"][0], given[item["id"]]["tokens"][0])]
        ]
        if judgments[model]:
            written[f"model_judgment/{judge}/{model}.jsonl"] = judgments[model]
    return written
