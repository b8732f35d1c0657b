"""The benchmarks of generation and judging run, and their counts and ratios are what they say."""

import csv
import importlib.util
import json
import os

import psutil
import pytest
import torch

from sao_utils.bench import engines as engine_benchmarks
from sao_utils.bench import training as benchmarks
from sao_utils.bench.engines import batching, main, of_shape
from sao_utils.bench.overhead import RAW, RAW_CHAT, STAGE


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


@pytest.mark.vllm
@pytest.mark.skipif(
    not os.environ.get("SAO_VLLM_PYTHON"),
    reason="SAO_VLLM_PYTHON names no Python with vLLM (make test-vllm)",
)
def test_the_overhead_over_vllm_is_measured_on_the_same_replies(tmp_path):
    before = dict(os.environ)
    main(["--engine", "vllm", "--quick", "--folder", str(tmp_path)])
    assert os.environ == before | {"HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]}
    below = [word for child in psutil.Process().children() for word in child.cmdline()]
    assert not any(word.endswith(("vllm_child.py", "vllm_raw.py")) for word in below)
    stage, raw, chat = read(tmp_path, "engines-cpu-vllm-quick")
    assert [row["contender"] for row in (stage, raw, chat)] == [STAGE, RAW, RAW_CHAT]
    assert {row["status"] for row in (stage, raw, chat)} == {"ok"}
    assert stage["rows"] == raw["rows"] == chat["rows"] and int(stage["tokens"]) > 100
    assert raw["note"].startswith("vLLM 0.")
    for ratio, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        for row, other in ((stage, raw), (chat, chat)):
            seconds = float(other[clock]) / float(stage[clock])
            assert float(row[ratio]) == pytest.approx(seconds, rel=1e-3)
    # What vLLM does counts as the stage's, though another process does it.
    assert float(stage["cpu_seconds"]) > 0.5 * float(raw["cpu_seconds"]) > 0
    bars = json.loads((tmp_path / "engines-cpu-vllm-quick.json").read_text())["bars"]
    values = [float(row[key]) for row in (stage, chat) for key in ("ratio", "cpu_ratio")]
    assert [bar["value"] for bar in bars] == pytest.approx(values, rel=1e-3)
    assert [bar["met"] for bar in bars] == [value >= 0.98 for value in values]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_overhead_over_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SAO_VLLM_PYTHON", raising=False)
    with pytest.raises(SystemExit, match="vLLM is not installed: pip install"):
        main(["--engine", "vllm", "--quick", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


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
    from sao_utils.engines.transformers import TransformersEngine

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
