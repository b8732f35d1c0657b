"""The measurements for a GPU: each part's own code at small shapes on a CPU, and what a part's end leaves."""

import parts
import pytest
import torch

from sao_utils.bench import __main__ as command
from sao_utils.bench import gpu
from sao_utils.bench.contenders import CPO, FUSED, PACKED, SHARED

# ---------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    "part, seconds, status",
    [
        (parts.dies, 100, "failed: exit code 9"),
        (parts.takes_too_long, 5, "failed: not done within 5 s"),
        (parts.breaks, 100, "out of memory"),
    ],
)
def test_a_part_that_does_not_end_well_leaves_its_rows_and_the_reason(part, seconds, status):
    *before, last = gpu.in_process("whole", part, seconds)
    assert last == {"measurement": "whole", "status": status}
    # A busy machine may not come to the first row within seconds.
    assert before == [{"measurement": "first", "status": "ok"}] or (seconds < 100 and not before)


def test_all_parts_together_take_twelve_minutes_at_most():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 720


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(results, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^There is no GPU here: nothing was measured.$"):
        command.main(["gpu"])
    assert not results.exists()


# ---------------------------------------------------------------------- parts, on a CPU


def test_the_loop_is_measured_stage_by_stage_beside_its_estimates():
    rows = {row["contender"]: row for row in gpu.loop("cpu", small=True)}
    assert list(rows) == ["prompts", "responses", "verdicts", "training self-0"]
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["tokens_per_second"] > 0 and row["planned_bytes"] > 0
    assert rows["prompts"]["rows"] == 40
    assert rows["verdicts"]["tokens"] > rows["responses"]["tokens"]  # each is read twice


def test_the_same_device_gives_the_same_gradients_in_4_bit():
    (row,) = gpu.nf4("cpu", small=True)
    assert row["gradient_difference"] < 1e-6 and row["loss_difference"] < 1e-6


def test_gradients_that_differ_are_found(monkeypatch):
    true, drawn = gpu._gradients, []

    def off(folder, device):
        loss, gradients = true(folder, device)
        drawn.append(device)
        return loss, [gradient * (1 + 0.01 * len(drawn)) for gradient in gradients]

    monkeypatch.setattr(gpu, "_gradients", off)
    (row,) = gpu.nf4("cpu", small=True)
    assert row["gradient_difference"] == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_steps_and_replies_are_measured_at_small_shapes():
    rows = list(gpu.train("cpu", small=True))
    ran = {(row["measurement"], row["contender"]) for row in rows if row["status"] == "ok"}
    counted = {("counts", of) for of in (PACKED, SHARED, CPO)}
    contenders = (PACKED, SHARED, CPO, FUSED)
    steps = {(name, of) for name in ("one pair", "step") for of in contenders}
    assert ran - counted == steps | {("loss stage", PACKED), ("loss stage", CPO)}
    written = list(gpu.write("cpu", small=True))
    assert [(row["measurement"], row["status"]) for row in written] == [
        ("generate", "ok"),
        ("judge", "ok"),
    ]
