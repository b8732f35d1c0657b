"""The benchmarks of training: noise-free counts, honest statuses, bars that can fail, a small run."""

import csv
import io
import json
import sys
import time
import xml.etree.ElementTree as ET

import pytest
import torch

from sao_utils.bench import __main__ as command
from sao_utils.bench import measuring, training
from sao_utils.bench.contenders import CPO, FUSED, PACKED, SHARED
from sao_utils.bench.results import bars, kept


def row(measurement, contender, status="ok", **more):
    return {"measurement": measurement, "contender": contender, "status": status, **more}


# ---------------------------------------------------------------------- lengths and counts


def test_the_lengths_are_seeded_and_as_promised():
    many = training.lengths(20_000, seed=3)
    assert many == training.lengths(20_000, seed=3) != training.lengths(20_000, seed=4)
    answers = [n for _, *two in many for n in two]
    mean = sum(answers) / len(answers)
    spread = (sum((n - mean) ** 2 for n in answers) / len(answers)) ** 0.5
    assert abs(mean - 375) < 8 and abs(spread / mean - 0.7) < 0.04
    assert {prompt for prompt, *_ in many} == {60}
    assert min(answers) >= 1 and max(60 + n for n in answers) == 2048


def test_padding_is_counted_as_it_is_fed():
    sizes = [(2, 3, 5), (2, 1, 1)]
    assert training.real_tokens(sizes) == 18
    alone = training.padded_counts(sizes, 1)
    assert alone == {"padded_ratio": 20 / 18, "head_ratio": 20 / 10, "microbatches": 2}
    both = training.padded_counts(sizes, 2)
    assert both == {"padded_ratio": 28 / 18, "head_ratio": 28 / 10, "microbatches": 1}


def test_a_step_of_128_pairs_needs_few_microbatches():
    rows = training.counts(training.lengths(128), 4096)
    ours = {r["contender"]: r["microbatches"] for r in rows if r["contender"] in (PACKED, SHARED)}
    least = -(-training.real_tokens(training.lengths(128)) // 4096)
    assert least <= ours[PACKED] <= 35 and ours[SHARED] <= ours[PACKED]
    assert [r["microbatches"] for r in rows if r["contender"] == CPO] == [128, 64, 32, 16]


# ---------------------------------------------------------------------- measuring


def test_a_failure_is_a_status_and_the_rest_goes_on():
    tries = []

    def full():
        raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB\nmore")

    def wrong():
        tries.append(1)
        raise ValueError("no\nsecond line")

    def prepare(name):
        if name == "absent":
            raise ModuleNotFoundError("No module named 'x'", name="liger_kernel")
        return {"full": full, "wrong": wrong, "good": lambda: {"loss": 1.0}}[name]

    found = measuring.interleaved(("absent", "full", "wrong", "good"), prepare, "cpu", repeats=3)
    assert found["absent"]["status"] == "not available: liger_kernel"
    assert found["full"]["status"] == "out of memory"
    assert found["wrong"]["status"] == "failed: ValueError: no" and len(tries) == 1
    assert found["good"]["status"] == "ok" and found["good"]["repeats"] == 3
    assert found["good"]["loss"] == 1.0 and found["good"]["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_the_peak_is_what_was_held_at_once_and_no_longer_is():
    def work():
        block = bytearray(60_000_000)
        del block
        time.sleep(0.01)
        return {}

    peaks = [measuring.measure(work, "cpu")["peak_bytes"] for _ in range(2)]
    assert all(55e6 < peak < 75e6 for peak in peaks)
    assert measuring.measure(dict, "cpu")["peak_bytes"] < 5e6


# ---------------------------------------------------------------------- bars


GOOD = [
    *(
        row("loss stage", PACKED, vocabulary=256_000, tokens=n, peak_bytes=100 + n / 1000)
        | {"peak_ratio": 0.1, "loss_difference": 0.0}
        for n in (512, 2048, 4096)
    ),
    row("counts", PACKED, microbatches=28),
    row("counts", SHARED, microbatches=26),
    *(
        row("step", name, vocabulary=v, tokens_per_second=speed, padded_ratio=padded)
        | {"head_ratio": 1.0, "loss_difference": 1e-6}
        for v in (32_000, 151_936, 256_000)
        for name, speed, padded in ((PACKED, 12.0, 1.0), (SHARED, 13.0, 0.9), (CPO, 10.0, 1.2))
    ),
]


def test_the_bars_are_met_when_the_numbers_are_good():
    found = bars(GOOD, "training-cpu")
    assert len(found) == 10 and all(bar["met"] is True for bar in found), found
    assert [bar["value"] for bar in found if "tokens/s" in bar["bar"]] == pytest.approx([1.3] * 3)


@pytest.mark.parametrize(
    "index, key, value, bar",
    [
        (1, "peak_ratio", 0.16, "ratio to CPOTrainer"),
        (2, "peak_bytes", 200.0, "smallest peak"),
        (5, "padded_ratio", 1.01, "padded"),
        (7, "tokens_per_second", 11.0, "V = 32,000: tokens/s"),
    ],
)
def test_a_bar_that_is_missed_says_so(index, key, value, bar):
    spoilt = [{**r, key: value} if k == index else r for k, r in enumerate(GOOD)]
    missed = [found["bar"] for found in bars(spoilt, "training-cpu") if not found["met"]]
    assert len(missed) == 1 and bar in missed[0]


def test_a_bar_on_who_runs_counts_only_what_ran_or_ran_out_of_memory():
    gemma = {"shapes": "gemma-2-9b", "cap_gib": 23.0}
    for status, met in (("out of memory", True), ("ok", False), ("not available: trl", None)):
        found = bars([row("one pair", CPO, status, **gemma)], "training-cuda")
        assert found[1]["met"] is met


def test_the_results_in_the_repository_are_read_with_their_bars():
    cpu, cuda = (
        {bar["bar"]: bar["met"] for bar in bars(kept(name)[1], f"training-{name}")}
        for name in ("cpu", "cuda")
    )
    assert len(cpu) == 10 and all(cpu.values())
    assert cuda["gemma-2-9b, one pair at 2,048, 23 GiB: ours runs (1)"] is True
    assert cuda["the same: CPOTrainer does not (0)"] is False
    assert [met for name, met in cuda.items() if "tokens/s" in name] == [None, None]


# ---------------------------------------------------------------------- a small run


def test_a_small_run_measures_every_contender_and_is_kept(results, monkeypatch):
    """The command with a model of 2,000 tokens."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command.main(["training", "--shapes", "trial-gemma2", "--repeats", "1"])
    file = results / "benchmarks" / "cpu-trial-gemma2.csv"
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    ran = [r for r in rows if r["measurement"] in ("one pair", "step")]
    assert {r["status"] for r in ran} == {"ok"}, [r["status"] for r in ran]
    tried = {(r["measurement"], r["contender"], int(r["batch"])) for r in ran}
    stock = {("step", name, batch) for name in (CPO, FUSED) for batch in (1, 2, 4)}
    ours = {("step", name, 8) for name in (PACKED, SHARED)}
    assert tried == stock | ours | {("one pair", n, 1) for n in (PACKED, SHARED, CPO, FUSED)}
    for r in ran:
        assert float(r["loss_difference"]) < 1e-4 and float(r["tokens_per_second"]) > 0
    stage = {
        r["contender"]: r for r in rows if r["measurement"] == "loss stage" and r["loss_difference"]
    }
    assert float(stage[PACKED]["loss_difference"]) < 1e-5 and stage[CPO]["speed_ratio"] == "1"
    packed = [r for r in ran if r["contender"] == PACKED]
    assert {(r["padded_ratio"], r["head_ratio"]) for r in packed} == {("1", "1")}
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["versions"]["torch"][0].isdigit() and about["hardware"]["cpus"] >= 1
    ET.parse(file.with_suffix(".svg"))
