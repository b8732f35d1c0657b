"""AlpacaEval 2.0: one answer a prompt against GPT-4-Turbo's, judged by log-probability.

The protocol is that of the annotator `weighted_alpaca_eval_gpt4_turbo` of the program alpaca_eval
0.6 (github.com/tatsu-lab/alpaca_eval; length control: Dubois and others, 2024, arXiv 2404.04475).
The two answers are shown in one order, drawn by a seed from the instruction. The judge names the
better model, m (shown first) or M; with p = p(m) / (p(m) + p(M)) its preference is 2 - p, from 1
(the reference, when that is shown first) to 2. The win rate is the mean preference - 1.

The 805 prompts with the reference answers (alpaca_eval_gpt4_baseline.json), the judge's template
(alpaca_eval_clf.txt, also part of the installed program) and the prompts' difficulties
(instruction_difficulty.csv) are other people's: `benchmark_files.official_file` finds them.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sao_utils import templates
from sao_utils.evaluation.benchmark_files import official_file, official_questions
from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.statistics.intervals import Interval, clustered_mean, from_preferences, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate

REFERENCE = "gpt4_1106_preview"  # who wrote the reference answers
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
PROMPTS = 805
JUDGES = ("gpt-4-1106-preview",)
CHOICES = ("m", "M")
UNPENALISED = "length control by an unpenalised fit without alpaca_eval's gamed baselines"
LOW_MASS = 0.5  # probability on m and M below which a preference is counted as doubtful (ours)


def load(settings: Evaluation) -> dict:
    """The benchmark as `run_benchmark` takes it: {items, baseline, baseline_name, show, notes, about,
    difficulty, gamed, counts}.

    `show(instruction, first, second)` gives the request to the judge; `about`: metric -> notes on
    it alone; `difficulty` is None or the difficulty of each item, by id; `gamed` the file of gamed
    baselines that `published_fit` takes.

    Raises:
        RecipeError: the prompts are not there.
    """
    counts, items, seen = Counter(), [], set()
    for row in official_questions(settings, "alpaca_eval"):
        if not row["turns"][0].strip():
            counts["empty prompt"] += 1
        elif row["turns"][0] in seen:
            counts["repeated prompt"] += 1
        elif not isinstance(row.get("output"), str):
            counts["no reference answer"] += 1
        else:
            seen.add(row["turns"][0])
            items.append(row)
    template = _template(settings)
    about = [UNPENALISED]
    difficulty = _difficulty(settings)
    if difficulty is None or any(row["id"] not in difficulty for row in items):
        difficulty = None
        about.append("length control without the prompts' difficulties")
    gamed = official_file(settings, "alpaca_eval", "df_gamed.csv")
    if gamed is None or find_spec("sklearn") is None:
        about.append("the program's own length control takes its df_gamed.csv and scikit-learn")
    return {
        "items": items,
        "baseline": {row["id"]: row["output"] for row in items},
        "baseline_name": items[0].get("generator", REFERENCE) if items else REFERENCE,
        "show": _own_request if template is None else _official_request(template),
        "difficulty": difficulty,
        "gamed": gamed,
        "notes": ("the judge's prompt is the kit's own",) if template is None else (),
        "about": {"lc_win_rate": tuple(about)},
        "counts": counts,
    }


def _template(settings: Evaluation) -> str | None:
    """The official template, of the user's files or of the installed program."""
    path = official_file(settings, "alpaca_eval", "alpaca_eval_clf.txt")
    program = find_spec("alpaca_eval")
    if path is None and program is not None and program.submodule_search_locations:
        folder = Path(program.submodule_search_locations[0]) / "evaluators_configs"
        path = folder / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _difficulty(settings: Evaluation) -> dict[int, float] | None:
    path = official_file(settings, "alpaca_eval", "instruction_difficulty.csv")
    if path is None:
        return None
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    try:
        return {int(row[0]): float(row[-1]) for row in rows if row[0].isdigit()}
    except ValueError:
        raise RecipeError(f"{path} has something else than numbers for difficulties.") from None


def _official_request(template: str) -> Callable[[str, str, str], dict]:
    """Requests by a template in ChatML, which is taken apart before texts are put in."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", template, re.DOTALL)
    turns = turns or [("user", template)]

    def request(instruction: str, first: str, second: str) -> dict:
        texts = {"instruction": instruction, "output_1": first, "output_2": second}
        chat = [{"role": r, "content": templates.fill(t, **texts).strip()} for r, t in turns]
        return {"chat": chat, "prefix": "", "choices": CHOICES}

    return request


def _own_request(instruction: str, first: str, second: str) -> dict:
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    text = templates.render("alpaca_judge", **templates.escaped(texts))
    return {"chat": [{"role": "user", "content": text}], "prefix": "", "choices": CHOICES}


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the model's answer is shown first: alpaca_eval's draw, by its seed."""
    rng = random.Random(f"is_switched_outputs{instruction}{seed}")
    return rng.choices([False, True], k=1)[0]


def preference(logps: Sequence[float | None], switched: bool) -> float | None:
    """The preference from 1 (reference) to 2 (model); None where the judge names neither.

    Args:
        logps: log-probabilities of m (shown first) and M; None for one that is missing.
    """
    first, second = (-math.inf if p is None else p for p in logps)
    top = max(first, second)
    if top == -math.inf:
        return None
    p = math.exp(first - top) / (math.exp(first - top) + math.exp(second - top))
    return 1 + p if switched else 2 - p


def judge(
    ask: Callable[[list[dict]], list[dict]],
    benchmark: dict,
    answers: dict[str, dict],
    name: str,
) -> tuple[dict[str, list[dict]], dict[str, Counter]]:
    """Annotations of every model, in alpaca_eval's format, and what was counted.

    Args:
        ask: sends requests to the judge; see `engines.requests.replies`.
        answers: model -> id -> {turns [text], ...}.
        name: of the judge.

    Returns:
        model -> annotations {instruction, dataset, output_1 (reference), generator_1, output_2
        (model), generator_2, annotator, preference (None: failed), index, is_switched_outputs},
        model -> counts. Equal answers are a tie (1.5) and cost nothing, as there.
    """
    jobs, requests = [], []
    for model, given in answers.items():
        for item in benchmark["items"]:
            instruction = item["turns"][0]
            output, reference = given[item["id"]]["turns"][0], benchmark["baseline"][item["id"]]
            switched = is_switched(instruction)
            shown = (output, reference) if switched else (reference, output)
            jobs.append((model, item, output, reference, switched))
            if output != reference:
                requests.append(benchmark["show"](instruction, *shown))
    replies = iter(ask(requests))
    annotations: dict[str, list[dict]] = {model: [] for model in answers}
    counts = {model: Counter() for model in answers}
    for model, item, output, reference, switched in jobs:
        value = 1.5
        if output == reference:
            counts[model]["identical answers"] += 1
        else:
            logps = next(replies)["logps"]
            value = preference(logps, switched)
            mass = sum(math.exp(p) for p in logps if p is not None)
            counts[model]["invalid verdict"] += value is None
            counts[model]["doubtful verdict"] += value is not None and mass < LOW_MASS
        annotations[model].append(
            {
                "instruction": item["turns"][0],
                "dataset": item["category"],
                "output_1": reference,
                "generator_1": benchmark["baseline_name"],
                "output_2": output,
                "generator_2": model,
                "annotator": f"{ANNOTATOR}_{name}",
                "preference": value,
                "index": item["id"],
                "is_switched_outputs": switched,
            }
        )
    return annotations, counts


def figures(
    annotations: list[dict],
    difficulty: dict[int, float] | None = None,
    gamed: Path | None = None,
) -> dict[str, Interval]:
    """The figures of AlpacaEval's leaderboard from one model's annotations, with intervals.

    Args:
        difficulty: of each prompt, by index.
        gamed: the file that `published_fit` takes.

    Returns:
        win_rate; discrete_win_rate (a preference above 1.5 is a win); with `gamed`
        lc_win_rate_published (`published_fit`; it has no interval: NaN); lc_win_rate (see
        `length_control.length_controlled_win_rate`; lengths in characters); first_rate, how
        often the answer shown first was preferred; avg_length, characters of the model's answers.
        Rates as shares. Without a valid preference avg_length alone.
    """
    outcomes = from_preferences([row["preference"] for row in annotations])
    index = [row["index"] for row in annotations]
    lengths = [len(row["output_2"]) for row in annotations]
    found = {"avg_length": clustered_mean(lengths, index)} if lengths else {}
    valid = [k for k, y in enumerate(outcomes) if y is not None]
    if not valid:
        return found
    wins = [outcomes[k] for k in valid]
    found["win_rate"] = win_rate(outcomes, index).rate
    found["discrete_win_rate"] = win_rate([(y > 0.5) + 0.5 * (y == 0.5) for y in wins]).rate
    fit = None if gamed is None else published_fit(annotations, gamed)
    if fit is not None:
        found["lc_win_rate_published"] = Interval(fit, math.nan, math.nan, len(valid))
    found["lc_win_rate"] = length_controlled_win_rate(
        wins,
        [lengths[k] - len(annotations[k]["output_1"]) for k in valid],
        [index[k] for k in valid],
        None if difficulty is None else [difficulty[index[k]] for k in valid],
    )
    decided = [
        float((outcomes[k] > 0.5) == annotations[k]["is_switched_outputs"])
        for k in valid
        if outcomes[k] != 0.5
    ]
    if decided:
        found["first_rate"] = win_rate(decided).rate
    return found


def standard_error(annotations: list[dict]) -> float | None:
    """AlpacaEval's standard error of the win rate: standard deviation / sqrt(n), as a share."""
    values = [y for y in from_preferences([a["preference"] for a in annotations]) if y is not None]
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((y - mean) ** 2 for y in values) / (len(values) - 1) / len(values))


def labels(annotations: list[dict]) -> dict[tuple, int | None]:
    """(index of a prompt,) -> 1 the model won, -1 the reference, 0 a tie; None for a failed verdict.

    Without the prompts whose two answers are the same: no judge was asked.
    """
    outcomes = from_preferences([row["preference"] for row in annotations])
    return {
        (row["index"],): None if y is None else (y > 0.5) - (y < 0.5)
        for row, y in zip(annotations, outcomes)
        if row["output_1"] != row["output_2"]
    }


def remarks(annotations: list[dict]) -> dict[str, list[str]]:
    """What makes single figures doubtful: metric -> sentences."""
    same = sum(row["output_1"] == row["output_2"] for row in annotations)
    if same <= len(annotations) / 20:
        return {}
    remark = f"{same} of {len(annotations)} answers are the reference's own: ties without a judge."
    return {metric: [remark] for metric in ("win_rate", "lc_win_rate", "lc_win_rate_published")}


def published_fit(annotations: list[dict], gamed: Path) -> float | None:
    r"""The length-controlled win rate as alpaca_eval's program fits it: a share, without interval.

    The model of `length_control.length_controlled_win_rate` with difficulties, fitted together with
    annotations of two gamed baselines that have no intercept and a weight of 0.1 each, with an L1
    penalty; its strength is chosen among ten by five-fold cross-validation (`length_controlled_v1`;
    Dubois and others, 2024, section 3.2).

    Args:
        annotations: of one model, `index` being the prompt's place among the 805.
        gamed: the program's file df_gamed.csv.

    Returns:
        None without scikit-learn (it comes with the extras eval and alpaca), or where the file
        does not know a prompt.
    """
    if find_spec("sklearn") is None:
        return None
    import numpy as np
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    longer = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], float)
    longer /= np.std(longer, ddof=1) if np.ptp(longer) > 0 else 1.0
    others, mine = pd.read_csv(gamed), pd.DataFrame(annotations)
    difficulty = others.drop_duplicates("index").set_index("index")["instruction_difficulty"]
    if not mine["index"].isin(difficulty.index).all():
        return None
    at_zero = np.column_stack([np.zeros(len(mine)), difficulty[mine["index"]], np.ones(len(mine))])
    own = at_zero + np.column_stack([np.tanh(longer), *2 * [0 * longer]])
    theirs = np.column_stack(
        [np.tanh(others["std_delta_len"]), others["instruction_difficulty"], 0 * others["index"]]
    )
    outcomes = from_preferences(mine["preference"])
    y = np.concatenate([others["preference"], np.array(outcomes, float)])
    weight = np.concatenate([np.full(len(others), 0.1), np.ones(len(mine))])
    valid = ~np.isnan(y)
    x, y, weight = np.concatenate([theirs, own])[valid], y[valid], weight[valid]
    # A share as two weighted labels, both in the same fold.
    n = len(y)
    x, group, label = np.concatenate([x, x]), np.tile(np.arange(n), 2), np.repeat([1, 0], n)
    share, weight = np.tile(y, 2), np.tile(weight, 2)
    counts_as = weight * np.where(label == 1, share, 1 - share)

    named = getattr(LogisticRegression(), "penalty", None) == "l2"  # before scikit-learn 1.8
    l1 = {"penalty": "l1"} if named else {"l1_ratio": 1}

    def fit(strength: float, rows, draws) -> LogisticRegression:
        model = LogisticRegression(
            C=strength, solver="liblinear", fit_intercept=False, random_state=draws, **l1
        )
        return model.fit(x[rows], label[rows], counts_as[rows])

    def score(model: LogisticRegression, rows) -> float:
        p = np.clip(model.predict_proba(x[rows])[:, 1], 1e-15, 1 - 1e-15)
        logs = share[rows] * np.log(p) + (1 - share[rows]) * np.log(1 - p)
        return float(np.mean(logs * weight[rows]))

    strengths, scores = np.logspace(-4, 4, 10), []
    for train, test in GroupKFold(5).split(x, label, group):
        draws = np.random.RandomState(123)  # of a fold's ten fits: scores may be all but equal
        scores.append([score(fit(c, train, draws), test) for c in strengths])
    best = fit(strengths[int(np.argmax(np.mean(scores, axis=0)))], slice(None), 123)
    return float(best.predict_proba(at_zero)[:, 1].mean())


def files(answers: dict[str, dict], benchmark: dict, annotations: dict, judge: str) -> dict:
    """What alpaca_eval reads, as {path: rows}: model_outputs.json and annotations.json a model."""
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
