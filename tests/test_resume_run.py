"""A run of real stages that is killed at random moments ends in the same rows as an unbroken one."""

import multiprocessing
import os
import random
import subprocess
import sys
import time

import pytest

from sao_utils import oracles
from sao_utils.engines.base import NO_REPLY
from sao_utils.methods import sao, synpo
from sao_utils.methods.iterate import first_round
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


SYNPO = {
    "prompts.count": 24,
    "prompts.min_usable": 0,
    "synpo.seed_count": 24,
    "synpo.generator": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8},
    "synpo.improver": {"learning_rate": 1e-8, "epochs": 1, "batch_size": 8},
    "synpo.threshold": 0,
    "synpo.check": None,
    "model.batch_tokens": 1500,
}
SYNPO_FILES = (
    "adapters/generator-0/log.jsonl",
    "rows/prompts.jsonl",
    "rows/responses.jsonl",
    "rows/seed_scores.jsonl",
    "adapters/improver-round1-0/log.jsonl",
    "rows/checked.jsonl",
    "rows/check_scores.jsonl",
    "rows/improved.jsonl",
    "rows/scores.jsonl",
)


def synpo_loop(folder, name):
    """One round of SynPO, whose models have seen 24 seeds: what they write is no question, and improves
    nothing. So questions stand in for the prompts once they are written, and the check's word is not asked.
    """
    os.environ["SAO_RESULTS"] = folder
    questions = list(oracles.tiny_paragraphs(24))
    synpo.select_prompts = lambda run, prompts, avoid: [
        {**row, "prompt": text, "discarded": None} for row, text in zip(prompts, questions)
    ]
    synpo.refuse_if_harmful = lambda *_: None
    run = open_run("tiny-synpo", name, SYNPO)
    synpo.synpo_round(run, first_round(run, 0))


def test_a_round_of_synpo_killed_in_each_stage_ends_in_the_same_rows(results):
    processes = multiprocessing.get_context("forkserver")  # forks have no imports to wait for
    processes.set_forkserver_preload(["torch", "sao_utils.methods.iterate", "trl", "peft"])

    def start(name):
        process = processes.Process(target=synpo_loop, args=(str(results), name))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    files = [file for file in SYNPO_FILES if (results / "whole" / file).exists()]
    assert len(files) >= 7
    rng = random.Random(2)
    for file in files:
        process = start("killed")
        while process.is_alive() and not (results / "killed" / file).exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9, f"it had ended before it was killed in {file}"
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    for file in (*files, "rows/discarded_pairs_synpo.jsonl"):
        got, wanted = (made_of(results / name / file) for name in ("killed", "whole"))
        assert got == wanted, file


def made_of(path):
    """What a stage's file says, by id (of a training's log, by step), but for last digits of scores."""
    rows = read_rows(path)
    return {row.get("id", row.get("step")): {k: row[k] for k in row if k in SAID} for row in rows}


SAID = ("text", "reply", "prompt", "chosen", "rejected", "loss", "discarded")
