"""Sampling and ranking: the best of several own responses against the worst."""

import pytest

from sao_utils import oracles
from sao_utils.methods import sao
from sao_utils.methods.iterate import first_round
from sao_utils.methods.sampling_ranking import sampling_ranking_round
from sao_utils.store import open_run, read_rows

SMALL = {"prompts.count": 30, "ranking.scorer": "oracle"}


@pytest.fixture
def run(results):
    return open_run("tiny", "ranking", SMALL)


def test_best_and_worst_of_four_are_paired_and_two_of_the_four_are_those_of_sao(run):
    of_sao = {row["id"] for row in sao.rows(run, "responses")}
    pairs = sampling_ranking_round(run, first_round(run, 0))
    by_prompt = {}
    for row in read_rows(run.rows("responses")):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    assert pairs and len(pairs) == len(by_prompt)
    used = [row for row in pairs if row["discarded"] is None]
    assert used
    for row in used:
        four = by_prompt[row["prompt_id"]]
        assert len(four) == 4 and len(of_sao & {one["id"] for one in four}) == 2
        flaws = [oracles.quality(one["prompt"], one["text"])[0] for one in four]
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        assert oracles.quality(four[0]["prompt"], *texts) == [max(flaws), min(flaws)]
    reasons = {row["discarded"] for row in pairs if row not in used}
    assert reasons <= {"gap too small", "identical answers", "cut off", "repetitive"}
