"""A run of real stages that is killed at random moments ends in the same rows as an unbroken one."""

import os
import random
import subprocess
import sys
import time

import pytest

from sao_utils.engines.base import NO_REPLY
from sao_utils.methods import sao
from sao_utils.store import open_run, read_rows, standing

OVERRIDES = {"prompts.count": 100, "model.batch_tokens": 1000}
LOOP = f"""
from sao_utils.methods import sao
from sao_utils.store import open_run
sao.rows(open_run("tiny", "killed", {OVERRIDES}), "verdicts")
"""
FEW = {"prompts.count": 20, "prompts.min_usable": 0}
STAGES = ("prompts", "responses", "verdicts")


def made(run):
    return {stage: read_rows(run.rows(stage)) for stage in STAGES}


def test_three_kills_lose_nothing_and_make_nothing_twice(results):
    whole = open_run("tiny", "whole", OVERRIDES)
    sao.rows(whole, "verdicts")
    rng = random.Random(1)
    killed = open_run("tiny", "killed", OVERRIDES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    size = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=environment, stderr=subprocess.DEVNULL
        )
        while child.poll() is None and _bytes(killed) <= size:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.7))
        child.kill()
        child.wait()
        size = _bytes(killed)
    assert 0 < size
    subprocess.run(
        [sys.executable, "-c", LOOP], env=environment, check=True, stderr=subprocess.DEVNULL
    )
    for stage in STAGES:
        got, wanted = made(killed)[stage], made(whole)[stage]
        assert len({row["id"] for row in got}) == len(got)
        by_id = {row["id"]: row for row in wanted}
        assert sorted(by_id) == sorted(row["id"] for row in got)
        for row in got:
            if stage == "verdicts":  # a sum over other neighbours differs in the last digits
                assert row["logps"] == pytest.approx(by_id[row["id"]]["logps"], abs=1e-3)
            else:
                assert row == by_id[row["id"]]


def _bytes(run):
    return sum(run.rows(stage).stat().st_size for stage in STAGES if run.rows(stage).exists())


def test_what_a_small_context_ended_is_made_again_under_a_larger_one_and_nothing_else(results):
    def run_with(name, limit):
        run = open_run("tiny", name, {**FEW, "model.max_context": limit})
        return run, sao.rows(run, "verdicts")

    whole, verdicts = run_with("whole", None)
    small, none = run_with("small", 18)  # of 16 to 20 tokens are the prompts
    refused = [row["discarded"] == NO_REPLY for row in made(small)["prompts"]]
    assert none == [] and len(refused) == 20 and sum(refused) >= 5
    for limit in (50, 90, None):  # then of responses, then of verdicts
        before = made(small)
        run_with("small", limit)
        for stage, rows in made(small).items():
            assert rows[: len(before[stage])] == before[stage]
            known = {row["id"] for row in before[stage]}
            again = {r["id"] for r in before[stage] if r.get("max_context", limit) != limit}
            new = [row["id"] for row in rows[len(before[stage]) :]]
            assert len(new) == len(set(new)) and {i for i in new if i in known} <= again
    for stage in ("prompts", "responses"):
        wanted = {row["id"]: row for row in made(whole)[stage]}
        assert standing(small.rows(stage)) == wanted
    outcomes = {row["id"]: row["outcome"] for row in verdicts}
    assert {row["id"]: row["outcome"] for row in run_with("small", None)[1]} == outcomes
