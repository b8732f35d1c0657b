"""Scores of responses, by which SynPO filters pairs (arXiv 2410.06961, section 2.2).

Four kinds of scorers answer the same question, how much better one response to a prompt is than another:
a judge of pairs (its margin in nats), a judge of single responses (a difference in points, 0 to 5, as in
Self-Rewarding, arXiv 2401.10020), a reward model (a difference in rewards), and, as the upper bound, the
oracle (a difference in the number of flaws). The paper's scorers, PairRM and ArmoRM, are reward models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import model_name
from sao_utils.recipe import Model
from sao_utils.stages.judging import judge_pairs, side_by_side, weaken
from sao_utils.stages.responses import answer_jobs
from sao_utils.store import Run, make_rows, row_id


@dataclass(frozen=True)
class Scorer:
    """Who scores: a model that judges pairs or gives points, a reward model, or the oracle."""

    kind: Literal["judge", "points", "reward", "oracle"]
    model: Model | None = None


def score_gaps(run: Run, pairs: list[dict], scorer: Scorer, stage: str = "scores") -> list[dict]:
    """By how much the first response of each pair is better than the second.

    Args:
        pairs: rows of `side_by_side`.
        stage: the name under which the scores are kept.

    Returns:
        The pairs with {gap: float, or None if the scorer gives no score; outcome, margin: those of a
        judge, None for other scorers}.
    """
    if scorer.kind == "judge":
        judged = weaken(judge_pairs(run, pairs, scorer.model, stage), run.recipe.judging)
        same = [row["outcome"] == "identical" for row in judged]
        return [{**row, "gap": 0.0 if alike else row["margin"]} for row, alike in zip(judged, same)]
    if scorer.kind == "oracle":
        found = [pair["quality"] or [None] for pair in pairs]
    elif scorer.kind == "points":
        found = _points(run, pairs, scorer.model, stage)
    else:
        found = _rewards(run, pairs, scorer.model, stage)
    gaps = [None if None in scores else float(scores[0] - scores[1]) for scores in found]
    return [{**pair, "gap": gap, "outcome": None, "margin": None} for pair, gap in zip(pairs, gaps)]


def best_and_worst(
    run: Run, responses: list[dict], scorer: Scorer, stage: str = "ranks"
) -> list[dict]:
    """The best and the worst of several responses to each prompt, side by side.

    Every two responses to a prompt are compared; a response's score is the mean of its gaps to the
    others. For points, a reward model or the oracle, this gives the same order as their own scores.

    Args:
        responses: rows of `write_responses`, two or more for each prompt.

    Returns:
        Rows of `side_by_side` with {gap: the difference between the two scores, None if no two
        responses could be compared; outcome and margin: None}.
    """
    by_prompt: dict[str, list[dict]] = {}
    for row in responses:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    couples = [couple for rows in by_prompt.values() for couple in combinations(rows, 2)]
    gaps: dict[str, list[float]] = {}  # only of responses that were scored
    for row in score_gaps(run, side_by_side(couples), scorer, stage):
        if row["gap"] is not None:
            for one, sign in zip(row["response_ids"], (1, -1)):
                gaps.setdefault(one, []).append(sign * row["gap"])
    score = {one: fmean(of) for one, of in gaps.items()}
    found = []
    for rows in by_prompt.values():
        scored = [row for row in rows if row["id"] in score]
        ordered = sorted(scored, key=lambda row: -score[row["id"]]) or rows
        best, worst = ordered[0], ordered[-1]
        gap = score[best["id"]] - score[worst["id"]] if scored else None
        [pair] = side_by_side([(best, worst)])
        found.append({**pair, "gap": gap, "outcome": None, "margin": None})
    return found


def _points(run: Run, pairs: list[dict], judge: Model, stage: str) -> list[list[float | None]]:
    """The points [a, b] of each pair's responses: the mean over several sampled replies, kept as rows.

    None for a response if none of its replies contains a score.
    """
    settings = run.recipe.points
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = (
        "points",
        templates.fingerprint(settings.template),
        sampling.named(),
        model_name(judge),
    )
    asked = {
        i: templates.points_prompt(settings.template, pair["prompt"], text)
        for pair in pairs
        for i, text in zip(pair["response_ids"], pair["responses"])
    }
    jobs = [
        {
            "id": row_id(*made_with, i, sample),
            "response_id": i,
            "sample": sample,
            "judge": judge.label,
            "temperature": settings.temperature,
        }
        for i in asked
        for sample in range(settings.samples)
    ]
    chat_of = lambda job: [{"role": "user", "content": asked[job["response_id"]]}]  # noqa: E731
    given: dict[str, list[int]] = {i: [] for i in asked}
    for row in answer_jobs(run, stage, judge, jobs, chat_of, sampling):
        points = templates.parse_points(row["text"])
        if points is not None:
            given[row["response_id"]].append(points)
    means = {i: fmean(points) if points else None for i, points in given.items()}
    return [[means[i] for i in pair["response_ids"]] for pair in pairs]


def _rewards(run: Run, pairs: list[dict], scorer: Model, stage: str) -> list[list[float | None]]:
    """The rewards [a, b] of each pair's responses, kept in rows/<stage>.jsonl, one row per response."""
    from sao_utils.engines.reward import rewards

    name = model_name(scorer)
    keys = [[row_id("reward", name, i) for i in pair["response_ids"]] for pair in pairs]
    jobs = {
        key: {
            "id": key,
            "response_id": i,
            "model": scorer.label,
            "chat": _chat(pair["prompt"], text),
        }
        for pair, ids in zip(pairs, keys)
        for key, i, text in zip(ids, pair["response_ids"], pair["responses"])
    }

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        for batch in rewards(scorer, [job["chat"] for job in outstanding]):
            yield [
                {k: v for k, v in outstanding[i].items() if k != "chat"} | {"reward": reward}
                for i, reward in batch
            ]

    made = {row["id"]: row["reward"] for row in make_rows(run, stage, list(jobs.values()), work)}
    return [[made[key] for key in ids] for ids in keys]


def _chat(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-word sequences that repeat an earlier one; 0 for fewer than n + 1 words.

    SynPO drops texts with more than 50 % repetition but does not say how it is measured; this measure is
    ours.
    """
    words = text.lower().split()
    runs = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0
