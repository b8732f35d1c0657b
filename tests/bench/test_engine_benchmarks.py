"""The benchmarks of generation and judging run, and their ratios are what they say."""

import pytest

from sao_utils.bench import engines


def test_the_overhead_is_measured_on_the_same_replies():
    stage, raw = engines.overhead(40, 1)
    assert (stage["contender"], raw["contender"]) == (engines.STAGE, engines.RAW)
    assert stage["status"] == raw["status"] == "ok", (stage, raw)
    assert stage["rows"] == raw["rows"] and stage["tokens"] == raw["tokens"] > 100
    assert stage["ratio"] == pytest.approx(raw["seconds"] / stage["seconds"])
    assert stage["cpu_ratio"] == pytest.approx(raw["cpu_seconds"] / stage["cpu_seconds"])
    assert stage["rows_per_second"] == pytest.approx(stage["rows"] / stage["seconds"])


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
