"""Is the improver any good? What it fixes and breaks, measured before its rewrites become pairs.

SynPO's paper trains an improver each round and trusts it. An improver that has learned too little breaks
more answers than it fixes, and a model trained on its rewrites ends up below its base. This check is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from sao_utils import oracles
from sao_utils.recipe import Model
from sao_utils.stages.improving import improve
from sao_utils.stages.judging import side_by_side
from sao_utils.stages.prompts import StageFailed
from sao_utils.stages.scoring import Scorer, score_gaps
from sao_utils.statistics.intervals import Interval, clustered_mean
from sao_utils.store import Run


@dataclass(frozen=True)
class ImproverCheck:
    """Shares of answers that an improver made better and worse, and the difference between the two."""

    fixed: Interval
    broken: Interval
    net: Interval
    rows: list[dict]  # of `score_gaps`: the rewritten answer first, the draft second


def check_improver(
    run: Run, drafts: list[dict], improver: Model, scorer: Scorer, resamples: int
) -> ImproverCheck:
    """What the improver does to answers to questions that neither it nor the policy was trained on.

    Args:
        drafts: rows of `write_responses` on such questions.
        scorer: decides which answer is better unless an oracle knows all of the prompts.
    """
    rewritten = improve(run, drafts, improver, "checked")
    pairs = side_by_side(zip(rewritten, drafts))
    known = all(pair["quality"] is not None for pair in pairs)
    rows = score_gaps(run, pairs, Scorer("oracle") if known else scorer, "check_scores")
    rows = [row for row in rows if row["gap"] is not None]
    clusters = [oracles.cluster(row["prompt"]) for row in rows]
    share = lambda values: clustered_mean(values, clusters, resamples=resamples)  # noqa: E731
    fixed, broken = ([sign * row["gap"] > 0 for row in rows] for sign in (1, -1))
    net = [float(a) - b for a, b in zip(fixed, broken)]
    return ImproverCheck(share(fixed), share(broken), share(net), rows)


def refuse_if_harmful(check: ImproverCheck, number: int) -> None:
    """Raise StageFailed if the improver breaks more answers than it fixes, or could not be checked."""
    n = len(check.rows)
    if not n:
        raise StageFailed(
            f"Round {number + 1}: the scorer says nothing of any rewritten answer, so the improver cannot "
            "be checked. Lower judging.min_mass, or take another synpo.scorer."
        )
    if check.net.value >= 0:
        return
    raise StageFailed(
        f"Round {number + 1}: the improver breaks more answers ({check.broken.value:.0%} of {n}) than it "
        f"fixes ({check.fixed.value:.0%}), so pairs of what it writes would teach the wrong thing. Train "
        "it longer or at a lower rate (synpo.improver), give more seed items, or lower synpo.threshold."
    )
