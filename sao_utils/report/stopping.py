"""Would a rule that needs no oracle have stopped the iterations in time? (Ours: no paper has one.)

Before a round is trained, its pairs exist, and so do those of the previous round. Each sign compares the
two; if the sign shows, the rule stops and keeps the current model. Stopping was right if the next model is
worse by the oracle; going on was right if the next model is at least as good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from sao_utils.methods.iterate import Trained
from sao_utils.recipe import Model
from sao_utils.report.table import make_row
from sao_utils.stages.judging import judge_pairs
from sao_utils.statistics.intervals import clustered_mean
from sao_utils.store import Run


@dataclass(frozen=True)
class Signs:
    """Statistics of one round's pairs: shares of pairs, and the margin in nats."""

    flips: float  # share of judged pairs on which the judge's two orders disagree
    margin: float  # mean absolute value of the judge's margin, in nats
    base_agrees: float  # share of used pairs whose chosen answer the base prefers, too


def signs_of(run: Run, pairs: list[dict], base: Model) -> Signs | None:
    """The signs of a round's pairs (rows of `build_pairs`); None if no pair was judged, or none was used."""
    judged = [row for row in pairs if row["outcome"] in ("consistent", "inconsistent")]
    used = [row for row in pairs if row["discarded"] is None]
    if not judged or not used:
        return None
    again = judge_pairs(run, [as_pair(row) for row in used], base, "base_verdicts")
    return Signs(
        flips=fmean(row["outcome"] == "inconsistent" for row in judged),
        margin=fmean(row["margin"] for row in judged),
        base_agrees=fmean((row["margin"] or 0) > 0 for row in again),
    )


def as_pair(row: dict) -> dict:
    """A row of `build_pairs` in the form that `judge_pairs` takes."""
    texts = [row[side][-1]["content"] for side in ("chosen", "rejected")]
    return {"id": row["id"], "prompt": row["prompt"][-1]["content"], "responses": texts}


def stops(before: Signs, now: Signs) -> dict[str, bool]:
    """Whether each rule stops, by name. The last rule never does; it is the baseline for the others."""
    single = {
        "flip rate rises": now.flips > before.flips,
        "margins shrink": now.margin < before.margin,
        "base agrees less": now.base_agrees < before.base_agrees,
    }
    return {**single, "two of the three": sum(single.values()) >= 2, "never stop": False}


def decisions(run: Run, trained: list[Trained], answers: list[dict]) -> Iterator[dict]:
    """Every decision to stop or go on that a run had to make, from its second round on.

    Args:
        trained: all rounds of all seeds (`methods.iterate.all_rounds`).
        answers: their models' answers to evaluation questions, at one temperature.

    Returns:
        Rows {seed, round, rule, stop, worse}; `worse` says whether this round's model has a smaller share
        of good answers than the previous round's. No rows if no oracle knows the questions.
    """
    for seed in run.recipe.seeds:
        of_seed = [one for one in trained if one.candidate.seed == seed]
        signs = [signs_of(run, one.pairs, run.recipe.model) for one in of_seed]
        good = [_good(answers, one) for one in of_seed]
        for k in range(1, len(of_seed)):
            if None in (signs[k - 1], signs[k], good[k - 1], good[k]):
                continue
            where = {"seed": seed, "round": k + 1, "worse": good[k] < good[k - 1]}
            for rule, stop in stops(signs[k - 1], signs[k]).items():
                yield {**where, "rule": rule, "stop": stop}


def _good(answers: list[dict], one: Trained) -> float | None:
    names = (one.candidate.name, one.candidate.round, one.candidate.seed)
    of = [row for row in answers if (row["model"], row["round"], row["seed"]) == names]
    found = [row["good"] for row in of if row["good"] is not None]
    return fmean(found) if found else None


def stopping_rows(made: list[dict]) -> Iterator[dict]:
    """How often each rule was right, over members, seeds and rounds: rows of the table of results.

    Args:
        made: rows of `decisions` with the label of their member; those of one member and seed are a cluster.
    """
    for rule in dict.fromkeys(row["rule"] for row in made):
        of = [row for row in made if row["rule"] == rule]
        by = [f"{row['member']} {row['seed']}" for row in of]
        right = clustered_mean([row["stop"] == row["worse"] for row in of], by)
        stopped, worse = (sum(row[key] for row in of) for key in ("stop", "worse"))
        note = f"stopped {stopped} times; the next model was worse {worse} times"
        names = {"model": rule, "judge": "oracle"}
        yield make_row("study", "right to stop or go on", right, note=note, **names)
