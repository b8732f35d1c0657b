"""The benchmarks of generation and judging run, and their counts and ratios are what they say."""

import csv
import json

import pytest
import torch

from sao_utils import benchmarks, engine_benchmarks
from sao_utils.engine_benchmarks import RAW, STAGE, batching, main, of_shape


def read(folder, name):
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_batches_by_tokens_pad_little_and_bound_the_largest_batch():
    ours, unsorted, ordered = batching()
    assert ours["largest_batch"] <= 32_768 < ordered["largest_batch"]
    assert 1 <= ours["padded_ratio"] < 1.1 < 2 < unsorted["padded_ratio"]
    assert ours["batches"] < ordered["batches"] == unsorted["batches"] == 63
    sizes = [min(2047, prompt + answer) for prompt, answer, _ in benchmarks.lengths(2000)]
    assert ours["tokens"] == sum(sizes)
    by_hand = [sizes[i : i + 32] for i in range(0, 2000, 32)]
    padded = sum(len(batch) * max(batch) for batch in by_hand) / sum(sizes)
    assert unsorted["padded_ratio"] == pytest.approx(padded)


def test_the_overhead_is_measured_on_the_same_replies(tmp_path):
    main(["--quick", "--folder", str(tmp_path)])
    rows = {row["contender"]: row for row in read(tmp_path, "engines-cpu-quick")}
    stage, raw = rows[STAGE], rows[RAW]
    assert stage["status"] == raw["status"] == "ok"
    assert stage["rows"] == raw["rows"] and int(stage["tokens"]) > 100
    ratio = float(raw["seconds"]) / float(stage["seconds"])
    assert float(stage["ratio"]) == pytest.approx(ratio, rel=1e-3)
    found = json.loads((tmp_path / "engines-cpu-quick.json").read_text())
    assert found["bars"][0]["value"] == pytest.approx(ratio, rel=1e-3)
    assert 0.3 < float(stage["engine_share"]) < 1
    assert found["versions"]["torch"] and found["hardware"]["cpus"]


def test_shapes_of_real_models_are_measured_by_batch_with_plain_and_4_bit_weights(tmp_path):
    main(["--quick", "--shapes", "trial-gemma2", "--folder", str(tmp_path)])
    rows = read(tmp_path, "engines-cpu-quick")
    rows = [row for row in rows if row["measurement"] != "counts"]
    assert all(row["status"] == "ok" for row in rows), rows
    kinds = {(row["measurement"], row["weights"].split(",")[0], row["batch"]) for row in rows}
    assert len(kinds) == len(rows) == 2 * 2 * 2
    for row in rows:
        batch = int(row["batch"])
        assert int(row["rows"]) == batch and float(row["planned_bytes"]) > 0
        if row["measurement"] == "generate":
            assert int(row["tokens"]) == 4 * batch  # random weights end none
        speed = float(row["tokens"]) / float(row["seconds"])
        assert float(row["tokens_per_second"]) == pytest.approx(speed, rel=1e-3)


def test_a_shape_that_does_not_fit_is_a_row_and_ends_only_its_own_batches(monkeypatch):
    from sao_utils.engine_transformers import TransformersEngine

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersEngine, "_pad", full)
    verbs = list(of_shape("trial-gemma2", False, (2, 4), "cpu", (12, 4, 20)))
    assert len(verbs) == 2 and all("not hold even one row" in row["status"] for (row,) in verbs)
    monkeypatch.setattr(engine_benchmarks, "random_base", full)
    ((row,),) = of_shape("trial-gemma2", False, (2,), "cpu", (12, 4, 20))
    assert row["status"] == "out of memory"


def test_without_a_gpu_the_rows_say_so_and_what_another_machine_measured_is_kept(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--device", "cuda", "--folder", str(tmp_path)])
    rows = [row for row in read(tmp_path, "engines-cuda") if row["measurement"] != "counts"]
    assert {row["status"] for row in rows} == {"not measured: no GPU"}
    assert {row["shapes"] for row in rows} == set(engine_benchmarks.ON_GPU)
    about = json.loads((tmp_path / "engines-cuda.json").read_text())
    (tmp_path / "engines-cuda.json").write_text(json.dumps({**about, "status": "measured"}))
    with pytest.raises(SystemExit, match="is kept"):
        main(["--device", "cuda", "--folder", str(tmp_path)])
