"""The benchmarks: noise-free counts, honest statuses, bars that can fail, and one small run."""

import csv
import io
import json
import sys
import time
import xml.etree.ElementTree as ET

import pytest

from sao_utils.bench import contenders, measuring, models, results
from sao_utils.bench import training as benchmarks
from sao_utils.bench.contenders import CPO, FUSED, LIGER, PACKED, SHARED, STAND_IN


def row(measurement, contender, status="ok", **more):
    return {"measurement": measurement, "contender": contender, "status": status, **more}


# ---------------------------------------------------------------------- lengths and counts


def test_the_lengths_are_seeded_and_as_promised():
    many = benchmarks.lengths(20_000, seed=3)
    assert many == benchmarks.lengths(20_000, seed=3) != benchmarks.lengths(20_000, seed=4)
    answers = [n for _, *two in many for n in two]
    mean = sum(answers) / len(answers)
    spread = (sum((n - mean) ** 2 for n in answers) / len(answers)) ** 0.5
    assert abs(mean - 375) < 8 and abs(spread / mean - 0.7) < 0.04
    assert {prompt for prompt, *_ in many} == {60}
    assert min(answers) >= 1 and max(60 + n for n in answers) == 2048


def test_padding_is_counted_as_it_is_fed():
    sizes = [(2, 3, 5), (2, 1, 1)]
    assert benchmarks.real_tokens(sizes) == 18
    alone = benchmarks.padded_counts(sizes, 1)
    assert alone == {"padded_ratio": 20 / 18, "head_ratio": 20 / 10, "microbatches": 2}
    both = benchmarks.padded_counts(sizes, 2)
    assert both == {"padded_ratio": 28 / 18, "head_ratio": 28 / 10, "microbatches": 1}


def test_a_step_of_128_pairs_needs_few_microbatches():
    rows = benchmarks.counts(benchmarks.lengths(128), 4096)
    ours = {r["contender"]: r["microbatches"] for r in rows if r["contender"] in (PACKED, SHARED)}
    least = -(-benchmarks.real_tokens(benchmarks.lengths(128)) // 4096)
    assert least <= ours[PACKED] <= 35 and ours[SHARED] <= ours[PACKED]
    assert [r["microbatches"] for r in rows if r["contender"] == CPO] == [128, 64, 32, 16]


# ---------------------------------------------------------------------- measuring


def test_a_failure_is_a_status_and_the_rest_goes_on():
    def absent():
        raise ModuleNotFoundError("No module named 'x'", name="liger_kernel")

    def full():
        raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB\nmore")

    tries = []

    def wrong():
        tries.append(1)
        raise ValueError("no\nsecond line")

    work = {"a": absent, "b": full, "c": wrong, "d": lambda: {"loss": 1.0}}
    found = measuring.interleaved(work, "cpu", repeats=3)
    assert found["a"]["status"] == "not available: liger_kernel"
    assert found["b"]["status"] == "out of memory"
    assert found["c"]["status"] == "failed: ValueError: no" and len(tries) == 1
    assert found["d"]["status"] == "ok" and found["d"]["repeats"] == 3
    assert found["d"]["loss"] == 1.0 and found["d"]["seconds"] > 0


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


def test_full_logits_that_would_not_fit_are_not_tried():
    import torch

    torch.manual_seed(0)
    with pytest.raises(MemoryError, match="not run: needs about"):
        contenders.need(10**7, 256_000, "cpu")
    assert measuring.failure(MemoryError("not run: needs about 9 GiB")).startswith("not run")


def test_a_contender_that_is_not_installed_is_a_row(monkeypatch):
    for package in ("liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, package, None)
    rows = benchmarks.loss_stage("trial-gemma2", "cpu", 128, 1, (LIGER, PACKED, CPO))
    liger, ours, stock = rows
    assert liger["status"].startswith("not available: liger_kernel")
    assert "loss" not in liger and "peak_ratio" not in liger
    assert stock["speed_ratio"] == 1 and ours["loss_difference"] < 1e-5


# ---------------------------------------------------------------------- bars


GOOD = [
    *(
        row("loss stage", PACKED, vocabulary=256_000, tokens=n, peak_bytes=100 + n / 1000)
        | {"shapes": "s", "peak_ratio": 0.1, "loss_difference": 0.0}
        for n in (512, 2048, 4096)
    ),
    row("counts", PACKED, microbatches=28),
    row("counts", SHARED, microbatches=26),
    *(
        row("step", name, shapes="s", vocabulary=9, tokens_per_second=speed, padded_ratio=padded)
        | {"head_ratio": 1.0, "loss_difference": 1e-6}
        for name, speed, padded in ((PACKED, 12.0, 1.0), (SHARED, 13.0, 0.9), (CPO, 10.0, 1.2))
    ),
]


def test_the_bars_are_met_when_the_numbers_are_good():
    found = results.bars(GOOD, "cpu")
    assert len(found) == 8 and all(bar["met"] is True for bar in found), found
    speed = next(bar for bar in found if "tokens/s" in bar["bar"])
    assert speed["value"] == pytest.approx(1.3)


@pytest.mark.parametrize(
    "index, key, value, bar",
    [
        (1, "peak_ratio", 0.16, "ratio to CPOTrainer"),
        (2, "peak_bytes", 200.0, "smallest peak"),
        (0, "loss_difference", 1e-3, "loss stage: loss"),
        (3, "microbatches", 36, "microbatches"),
        (5, "padded_ratio", 1.01, "padded"),
        (6, "head_ratio", 1.01, "head rows"),
        (7, "tokens_per_second", 11.0, "tokens/s"),
        (7, "loss_difference", 1e-2, "step: loss"),
    ],
)
def test_a_bar_that_is_missed_says_so(index, key, value, bar):
    spoilt = [{**r, key: value} if k == index else r for k, r in enumerate(GOOD)]
    missed = [found["bar"] for found in results.bars(spoilt, "cpu") if not found["met"]]
    assert len(missed) == 1 and bar in missed[0]


def test_without_a_gpu_nothing_of_a_gpu_is_claimed():
    rows = benchmarks.counts(benchmarks.lengths(8), 4096) + benchmarks.not_measured()
    found = results.report(rows, "cuda")
    assert found["status"] == "not measured: no GPU"
    assert [b for b in found["bars"] if "gemma" in b["bar"]]
    assert all(b["met"] is None for b in found["bars"] if "128 pairs" not in b["bar"])


def test_the_bars_of_a_gpu():
    gemma = {"shapes": "gemma-2-9b", "vocabulary": 256_000, "cap_gib": 23.0}
    free = {**gemma, "cap_gib": None}
    speeds = ((PACKED, 1, 10.0), (SHARED, 1, 12.0), (CPO, 2, 8.0), (CPO, 4, 6.0), (FUSED, 2, 10.0))
    rows = [
        row("one pair", PACKED, **gemma, padded_ratio=1.0, head_ratio=1.0),
        row("one pair", CPO, "out of memory", **gemma),
        row("one pair", PACKED, **free, peak_ratio=0.4, padded_ratio=1.0, head_ratio=1.0),
        *(
            row("step", name, **gemma, batch=batch, tokens_per_second=speed, head_ratio=1.0)
            | {"padded_ratio": 1.0}
            for name, batch, speed in speeds
        ),
        *GOOD[3:5],
    ]
    found = results.bars(rows, "cuda")
    assert [bar["met"] for bar in found] == [True] * 8
    assert [bar["value"] for bar in found[:5]] == pytest.approx([1, 0, 0.4, 1.5, 1.2])
    rows[1] = row("one pair", CPO, **gemma)
    assert results.bars(rows, "cuda")[1]["met"] is False
    rows[1] = row("one pair", CPO, "not available: trl", **gemma)
    assert results.bars(rows, "cuda")[1]["met"] is None


# ---------------------------------------------------------------------- a small run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The program as on a GPU, with a model of 2,000 tokens on the CPU."""
    folder = tmp_path_factory.mktemp("benchmarks")
    flags = ["--shapes", "trial-gemma2", "--repeats", "1", "--pairs", "4", "--cap-gib", "23"]
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr(sys, "stdout", out)
        benchmarks.main([*flags, "--json", "--folder", str(folder)])
    return folder, json.loads(out.getvalue())


def test_a_small_run_measures_every_contender(small):
    rows = small[1]["rows"]
    ran = [r for r in rows if r["measurement"] in ("one pair", "step")]
    assert {r["status"] for r in ran} == {"ok"}, [r["status"] for r in ran]
    tried = {(r["measurement"], r["contender"], r["batch"]) for r in ran}
    stock = {("step", name, batch) for name in (CPO, FUSED) for batch in (1, 2, 4)}
    ours = {("step", name, 4) for name in (PACKED, SHARED)}
    assert tried == stock | ours | {("one pair", n, 1) for n in (PACKED, SHARED, CPO, FUSED)}
    for r in ran:
        assert r["loss_difference"] < 1e-4 and r["tokens_per_second"] > 0
        assert r["peak_bytes"] > 0 or sys.platform != "linux"
    packed = [r for r in ran if r["contender"] == PACKED]
    assert {(r["padded_ratio"], r["head_ratio"]) for r in packed} == {(1.0, 1.0)}
    assert {r["cap_gib"] for r in ran if r["measurement"] == "one pair"} == {None, 23.0}


def test_a_small_run_is_kept(small):
    folder, told = small
    name = "cpu-trial-gemma2"
    kept = list(csv.DictReader(io.StringIO((folder / f"{name}.csv").read_text())))
    assert list(kept[0]) == list(results.COLUMNS) and len(kept) == len(told["rows"])
    for written, meant in zip(kept, told["rows"]):
        assert written["status"] == meant["status"] and written["contender"] == meant["contender"]
        if meant.get("loss") is not None:
            assert float(written["loss"]) == pytest.approx(meant["loss"], rel=1e-5)
    about = json.loads((folder / f"{name}.json").read_text())
    assert {"date", "hardware", "versions", "bars"} <= set(about)
    assert about["versions"]["torch"][0].isdigit() and about["hardware"]["cpus"] >= 1
    ET.parse(folder / f"{name}.svg")


def test_the_paths_for_machines_without_trl_give_the_same_loss(tmp_path):
    policy, weights = models.random_policy("trial-gemma2", "cpu")
    pairs = models.random_pairs([(5, 9, 7), (5, 3, 12), (5, 8, 8)], 2000)
    stand_in = contenders.by_hand(policy, pairs, 3, "cpu", liger=False)()
    gradients = []
    for step in (
        contenders.ours_by_hand(policy, pairs, True, 40, "cpu"),
        contenders.stock(policy, pairs, 3, "cpu", tmp_path, fused=False),
    ):
        policy.zero_grad(set_to_none=True)
        assert step()["loss"] == pytest.approx(stand_in["loss"], rel=1e-5)
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert weights.startswith("float32") and len(gradients[0]) == len(gradients[1]) > 10
    largest = max(float(g.abs().max()) for g in gradients[1])
    assert largest > 0
    for one, other in zip(*gradients):
        assert float((one - other).abs().max()) < 1e-3 * largest


def test_without_trl_the_program_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr(contenders, "installed", lambda package: False)
    for package in ("trl", "trl.experimental.cpo", "trl.kernels", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, package, None)
    policy, _ = models.random_policy("trial-gemma2", "cpu")
    found = benchmarks.whole_step("step", policy, [(5, 9, 7)] * 2, "cpu", 1, 64, (1,))
    status = {r["contender"]: r["status"] for r in found}
    assert status[CPO].startswith("not available: trl") and status[FUSED] == status[CPO]
    assert status[PACKED] == status[SHARED] == status[STAND_IN] == "ok"
    ours = next(r for r in found if r["contender"] == PACKED)
    assert "needs trl" in ours["note"] and ours["loss_difference"] < 1e-5
    stage = benchmarks.loss_stage("trial-gemma2", "cpu", 128, 1)
    assert {r["contender"]: r["status"] for r in stage}[STAND_IN] == "ok"


def test_a_machine_without_a_gpu_keeps_what_another_measured(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmarks.main(["--device", "cuda", "--folder", str(tmp_path)])
    assert "not measured" in capsys.readouterr().out
    assert "not measured: no GPU" in (tmp_path / "cuda.csv").read_text()
    assert not (tmp_path / "cuda.svg").exists()
    (tmp_path / "cuda.svg").write_text("<svg/>")
    with pytest.raises(SystemExit, match="no GPU"):
        benchmarks.main(["--device", "cuda", "--folder", str(tmp_path)])
