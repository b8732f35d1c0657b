"""AlpacaEval 2.0: one answer per prompt against GPT-4-Turbo's, judged by log-probability.

The protocol is that of the annotator `weighted_alpaca_eval_gpt4_turbo` of the program alpaca_eval
0.6 (github.com/tatsu-lab/alpaca_eval; length control: Dubois and others, 2024, arXiv 2404.04475).
The two answers are shown in one order, drawn with a seed derived from the instruction. The judge names
the better model, m (shown first) or M. With p = p(m) / (p(m) + p(M)), its preference is 2 - p if the
reference is shown first, else 1 + p: from 1 (the reference is better) to 2 (the model is better). The
win rate is the mean preference - 1.

The 805 prompts with the reference answers (alpaca_eval_gpt4_baseline.json), the judge's template
(alpaca_eval_clf.txt), and the annotations of gamed baselines with the prompts' difficulties
(df_gamed.csv) are third-party files: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from sao_utils import templates
from sao_utils.evaluation.benchmark_files import needed_file, official_file, official_questions
from sao_utils.recipe import Evaluation
from sao_utils.statistics.intervals import Interval, exact, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate

REFERENCE = "gpt4_1106_preview"  # who wrote the reference answers
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
CHOICES = ("m", "M")


def load(settings: Evaluation) -> dict:
    """The benchmark as `benchmarks.load` describes it, with {gamed: df_gamed.csv, or None}.

    Raises:
        RecipeError: the prompts or the judge's template are missing.
    """
    items = official_questions(settings, "alpaca_eval")
    template = needed_file(settings, "alpaca_eval", "alpaca_eval_clf.txt")
    gamed = official_file(settings, "alpaca_eval", "df_gamed.csv")
    return {
        "items": items,
        "baseline": {row["id"]: row.get("output") for row in items},
        "baseline_name": items[0].get("generator", REFERENCE) if items else REFERENCE,
        "show": partial(_show, _messages(template.read_text(encoding="utf-8"))),
        "gamed": None if gamed is None else pd.read_csv(gamed),
    }


def _messages(template: str) -> list[dict]:
    """The chat that a ChatML template describes."""
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", template, re.DOTALL)
    return [{"role": role, "content": text.strip()} for role, text in found]


def _show(messages: list[dict], instruction: str, first: str, second: str) -> dict:
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    chat = [{**m, "content": templates.fill(m["content"], **texts)} for m in messages]
    return {"chat": chat, "prefix": "", "choices": CHOICES}


def is_switched(instruction: str) -> bool:
    """Whether the model's answer is shown first: alpaca_eval's draw, with its seed 0."""
    rng = random.Random(f"is_switched_outputs{instruction}0")
    return rng.choices([False, True], k=1)[0]


def preference(logps: Sequence[float | None], switched: bool) -> float | None:
    """The preference, from 1 (reference) to 2 (model); None if the judge names neither.

    Args:
        logps: log-probabilities of m (shown first) and M; None for a missing one.
        switched: whether the model's answer is shown first.
    """
    first, second = (-math.inf if p is None else p for p in logps)
    top = max(first, second)
    if top == -math.inf:
        return None
    p = math.exp(first - top) / (math.exp(first - top) + math.exp(second - top))
    return 1 + p if switched else 2 - p


def requests(benchmark: dict, item: dict, turns: list[str]) -> list[dict]:
    """One request to the judge; none if answer and reference are identical: a tie, as in alpaca_eval."""
    instruction, reference, output = item["turns"][0], benchmark["baseline"][item["id"]], turns[0]
    if output == reference:
        return []
    shown = (output, reference) if is_switched(instruction) else (reference, output)
    return [benchmark["show"](instruction, *shown)]


def judgments(benchmark: dict, item: dict, turns: list[str], judged, model, judge) -> list[dict]:
    """One annotation in alpaca_eval's format.

    `preference` is None if the judge failed; `mass` is the total probability that it gave to m and M,
    None if it was not asked.
    """
    instruction = item["turns"][0]
    switched, value, mass = is_switched(instruction), 1.5, None
    for _, reply in judged:
        value = preference(reply["logps"], switched)
        mass = math.fsum(math.exp(p) for p in reply["logps"] if p is not None)
    return [
        {
            "instruction": instruction,
            "dataset": item["category"],
            "output_1": benchmark["baseline"][item["id"]],
            "generator_1": benchmark["baseline_name"],
            "output_2": turns[0],
            "generator_2": model,
            "annotator": f"{ANNOTATOR}_{judge}",
            "preference": value,
            "index": item["id"],
            "is_switched_outputs": switched,
            "mass": mass,
        }
    ]


def verdicts(annotations: list[dict]) -> list[tuple]:
    """(prompt, preference or None) for each verdict; identical answers are not judged and left out."""
    asked = [row for row in annotations if row["output_1"] != row["output_2"]]
    return [(row["index"], row["preference"]) for row in asked]


def _difficulties(gamed: pd.DataFrame, index: list[int]) -> np.ndarray:
    """[n] the difficulties of the prompts with these positions among the 805."""
    known = gamed.drop_duplicates("index").set_index("index")["instruction_difficulty"]
    return known[index].to_numpy()


def figures(annotations: list[dict], benchmark: dict) -> dict[str, Interval]:
    """The figures of AlpacaEval's leaderboard from one model's annotations, with intervals.

    Returns:
        Shares, {} without a valid preference:
        win_rate;
        lc_win_rate_published: by `published_fit`, only if df_gamed.csv is there; it has no interval (NaN);
        lc_win_rate: by `length_control.length_controlled_win_rate`, with lengths in characters, and with
            the prompts' difficulties if df_gamed.csv is there;
        first_rate: how often the answer shown first was preferred (even preferences are left out).
    """
    valid = [of for of in zip(annotations, _outcomes(annotations)) if not math.isnan(of[1])]
    if not valid:
        return {}
    index, wins = [row["index"] for row, _ in valid], [y for _, y in valid]
    found = {"win_rate": win_rate(wins, index)}
    gamed, difficulty = benchmark.get("gamed"), None
    if gamed is not None:
        difficulty = _difficulties(gamed, index)
        found["lc_win_rate_published"] = exact(published_fit(annotations, gamed), len(valid))
    longer = [len(row["output_2"]) - len(row["output_1"]) for row, _ in valid]
    found["lc_win_rate"] = length_controlled_win_rate(wins, longer, index, difficulty)
    firsts = [float((y > 0.5) == row["is_switched_outputs"]) for row, y in valid if y != 0.5]
    if firsts:
        found["first_rate"] = win_rate(firsts)
    return found


def _outcomes(annotations: list[dict]) -> list[float]:
    """For each annotation, from 0 (the model lost) to 1 (it won); NaN if the judge failed.

    In older files, a tie (a preference of 1.5) is written as 0.
    """
    preferences = np.array([row["preference"] for row in annotations], float)
    return np.where(preferences == 0, 0.5, preferences - 1).tolist()


def published_fit(annotations: list[dict], gamed: pd.DataFrame) -> float:
    r"""The length-controlled win rate as alpaca_eval's program fits it: a share, without an interval.

    The model of `length_control.length_controlled_win_rate` with difficulties, fitted with an L1 penalty
    to the annotations together with those of two gamed baselines, which have no intercept and a weight of
    0.1 each. The penalty's strength is chosen from ten values by five-fold cross-validation
    (`length_controlled_v1`; Dubois and others, 2024, section 3.2).

    Args:
        annotations: those of one model, `index` being the prompt's position among the 805.
        gamed: the program's file df_gamed.csv.
    """
    n = len(annotations)
    longer = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], float)
    longer /= np.std(longer, ddof=1) if np.ptp(longer) > 0 else 1.0
    difficulty = _difficulties(gamed, [row["index"] for row in annotations])
    own = np.column_stack([np.tanh(longer), difficulty, np.ones(n)])
    theirs = np.column_stack(
        [np.tanh(gamed["std_delta_len"]), gamed["instruction_difficulty"], np.zeros(len(gamed))]
    )
    y = np.concatenate([gamed["preference"], _outcomes(annotations)])
    valid = ~np.isnan(y)
    weight = np.repeat([0.1, 1.0], [len(gamed), n])[valid]
    model = _cross_validated(np.concatenate([theirs, own])[valid], y[valid], weight)
    own[:, 0] = 0  # at equal length
    return float(model.predict_proba(own)[:, 1].mean())


def _cross_validated(x: np.ndarray, y: np.ndarray, weight: np.ndarray):
    """scikit-learn's L1-penalised logistic regression of shares y [n] on x [n, features].

    A share counts as two weighted labels (1 and 0), both in the same fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    n = len(y)
    x, group, label = np.concatenate([x, x]), np.tile(np.arange(n), 2), np.repeat([1, 0], n)
    share, weight = np.concatenate([y, 1 - y]), np.tile(weight, 2)
    named = getattr(LogisticRegression(), "penalty", None) == "l2"  # before scikit-learn 1.8
    options = {"solver": "liblinear", "fit_intercept": False}
    options |= {"penalty": "l1"} if named else {"l1_ratio": 1}

    def fit(strength: float, rows, draws) -> LogisticRegression:
        model = LogisticRegression(C=strength, random_state=draws, **options)
        return model.fit(x[rows], label[rows], (weight * share)[rows])

    def score(model: LogisticRegression, rows) -> float:
        p = np.clip(model.predict_proba(x[rows])[:, 1], 1e-15, 1 - 1e-15)
        won = np.where(label, share, 1 - share)[rows]
        return float(np.mean((won * np.log(p) + (1 - won) * np.log(1 - p)) * weight[rows]))

    strengths, scores = np.logspace(-4, 4, 10), []
    for train, test in GroupKFold(5).split(x, label, group):
        # Shared by a fold's ten fits: scores may be nearly equal.
        draws = np.random.RandomState(123)
        scores.append([score(fit(c, train, draws), test) for c in strengths])
    return fit(strengths[int(np.argmax(np.mean(scores, axis=0)))], slice(None), 123)


def files(benchmark: dict, answers: dict[str, dict], annotations: dict, judge: str) -> dict:
    """The files that alpaca_eval reads, {path: rows}: model_outputs.json, annotations.json per model."""
    written = {}
    for model, given in answers.items():
        written[f"{model}/model_outputs.json"] = [
            {
                "instruction": item["turns"][0],
                "output": given[item["id"]]["turns"][0],
                "generator": model,
                "dataset": item["category"],
            }
            for item in benchmark["items"]
        ]
        written[f"{model}/{ANNOTATOR}_{judge}/annotations.json"] = annotations[model]
    return written
