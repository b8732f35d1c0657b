"""The benchmarks of generation and judging run, and their ratios are what they say."""

import os

import pytest
import torch

from sao_utils.bench import engines, overhead
from sao_utils.bench.measuring import attempt


def check_overhead(rows):
    stage, raw = rows
    assert stage["contender"] == overhead.STAGE
    assert stage["status"] == raw["status"] == "ok", rows
    assert stage["rows"] == raw["rows"] and stage["tokens"] == raw["tokens"] > 100
    assert stage["ratio"] == pytest.approx(raw["seconds"] / stage["seconds"])
    assert stage["rows_per_second"] == pytest.approx(stage["rows"] / stage["seconds"])


def test_the_overhead_is_measured_on_the_same_replies():
    rows = overhead.overhead(40, 1)
    check_overhead(rows)
    assert rows[0]["cpu_ratio"] == pytest.approx(rows[1]["cpu_seconds"] / rows[0]["cpu_seconds"])


@pytest.mark.vllm
@pytest.mark.skipif(
    not os.environ.get("SAO_VLLM_PYTHON"),
    reason="SAO_VLLM_PYTHON names no Python with vLLM (make test-vllm)",
)
def test_the_overhead_over_vllm_is_measured_on_the_same_replies(monkeypatch):
    for name in overhead.CPU_BUILD:
        monkeypatch.setenv(name, "")  # so that what is set is undone
    check_overhead(overhead.overhead(40, 1, "vllm"))


@pytest.mark.parametrize("nf4", [False, True])
def test_shapes_of_real_models_are_measured_by_batch(nf4):
    rows = list(engines.by_batch("trial-gemma2", nf4, "cpu", (2, 4), (12, 4, 20)))
    assert all(row["status"] == "ok" for row in rows), rows
    weights = "nf4" if nf4 else "float32"
    kinds = [(row["measurement"], row["weights"].split(",")[0], row["batch"]) for row in rows]
    assert kinds == [(verb, weights, n) for verb in ("generate", "judge") for n in (2, 4)]
    for row in rows:
        assert row["rows"] == row["batch"] and row["planned_bytes"] > 0
        if row["measurement"] == "generate":
            assert row["tokens"] == 4 * row["batch"]  # random weights end none
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])


def test_a_shape_that_does_not_fit_is_a_row(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines, "random_base", full)
    base = {"measurement": "generate", "shapes": "trial-gemma2"}
    (row,) = attempt(base, engines.by_batch, "trial-gemma2", False, "cpu")
    assert row == {**base, "status": "out of memory"}
