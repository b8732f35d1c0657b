"""Trainings that are killed, run out of disk or break down, and trainings in several processes."""

import math
import time
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file
from training_cases import child, comparable, settings

from sao_utils.store import read_rows
from sao_utils.training import TrainingFailed, probe
from sao_utils.training import fit as fitting
from sao_utils.training.fit import fit


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_killed_in_the_middle_goes_on_to_the_same_end(
    base, pairs, tmp_path, dropout, monkeypatch
):
    monkeypatch.setattr(probe, "SHARE", 100)  # of the time: so small a training would not be probed
    steps = settings(
        batch_size=2, epochs=8, checkpoint_minutes=1e-6, lora_dropout=dropout, probe_steps=7
    )
    whole = fit(base, pairs, steps, "simpo", 0, tmp_path / "whole")
    killed = child(base, pairs, steps, tmp_path / "killed")
    deadline = time.time() + 300
    while not list(tmp_path.glob("killed/checkpoints/checkpoint-1[0-9]/complete")):
        assert killed.poll() is None and time.time() < deadline, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()  # SIGKILL: nothing can be tidied up
    killed.communicate()
    before = len(read_rows(tmp_path / "killed" / "log.jsonl"))
    assert 10 <= before < 24 and not (tmp_path / "killed" / "done.json").exists()
    fit(base, pairs, steps, "simpo", 0, tmp_path / "killed")
    assert comparable(tmp_path / "killed") == comparable(whole)
    weights = [tmp_path / n / "adapter_model.safetensors" for n in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    probes = [read_rows(tmp_path / n / "probe.jsonl") for n in ("killed", "whole")]
    assert probes[0] == probes[1] and [row["step"] for row in probes[0]] == [*range(0, 24, 7), 24]
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_a_half_written_checkpoint_and_one_of_other_settings_are_not_used(
    base, pairs, tmp_path, capsys, monkeypatch
):
    steps = settings(batch_size=2, epochs=4, checkpoint_minutes=1e-6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(fitting, "_save", stop)  # as late as it can be
        fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    kept = tmp_path / "a" / "checkpoints"
    assert len(list(kept.glob("checkpoint-*/complete"))) == 2
    (kept / "checkpoint-11" / "complete").unlink()
    capsys.readouterr()
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    assert "going on from checkpoint-10" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(tmp_path / "a" / "log.jsonl")] == [*range(1, 13)]
    # The same folder with another learning rate begins anew.
    (tmp_path / "b" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "checkpoint-3" / "complete").touch()
    (tmp_path / "b" / "checkpoints" / "fingerprint").write_text("another")
    fit(base, pairs, steps, "simpo", 0, tmp_path / "b")
    assert "going on" not in capsys.readouterr().out
    assert comparable(tmp_path / "b") == comparable(tmp_path / "a")


@pytest.mark.slow
def test_a_full_disk_ends_with_a_message_and_the_last_checkpoint_whole(base, pairs, tmp_path):
    steps = settings(batch_size=2, epochs=20, checkpoint_minutes=1e-6)
    # The optimiser's state is the biggest file; the limit lets none of it be written.
    full = child(base, pairs, steps, tmp_path / "full", file_limit=300_000)
    output = full.communicate(timeout=200)[0]
    assert full.returncode != 0
    assert "could not be written to disk" in output and "free some disk" in output, output
    left = list((tmp_path / "full" / "checkpoints").glob("checkpoint-*"))
    assert all((path / "complete").exists() for path in left)
    fit(base, pairs, steps, "simpo", 0, tmp_path / "full")
    assert len(read_rows(tmp_path / "full" / "log.jsonl")) == 60


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    base, pairs, tmp_path, monkeypatch
):
    steps = settings(batch_size=2, epochs=4, checkpoint_minutes=1e-6)
    from sao_utils.training.trainer import PairTrainer

    step = PairTrainer.training_step

    def poisoned(self, *given):
        loss = step(self, *given)
        return loss * math.nan if self.state.global_step == 7 else loss

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "training_step", poisoned)
        with pytest.raises(
            TrainingFailed, match="step 8 of 12: .*nan.*checkpoints are kept.*lower learn"
        ):
            fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    fit(base, pairs, steps, "simpo", 0, tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")


def in_two_processes(base, pairs, steps, folder, way):
    """The log of `accelerate launch` with gloo on the CPU; `way` is ddp, fsdp, or fsdp in bf16."""
    launch = ["-m", "accelerate.commands.launch", "--main_process_port=0"]  # any that is free
    launch += ["--num_processes=2", "--mixed_precision=no"]
    if way == "ddp":
        launch += ["--multi_gpu", "--num_machines=1", "--dynamo_backend=no"]
    else:
        launch.append(f"--config_file={files('sao_utils') / 'launch' / 'fsdp.yaml'}")
    fsdp = {"ddp": False, "fsdp": True}.get(way, way)
    process = child(
        base, pairs, steps, folder, fsdp=fsdp, command=launch, ACCELERATE_USE_CPU="true"
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    assert f"2 processes, {'MULTI_CPU' if way == 'ddp' else 'FSDP'}" in output, output[-4000:]
    return comparable(folder)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_give_the_loss_curve_of_one(base, pairs, tmp_path, way, method):
    """Five pairs a step do not divide by two."""
    steps = settings(batch_size=5, epochs=4, method=method, token_budget=60)
    wanted = comparable(fit(base, pairs, steps, "simpo", 0, tmp_path / "one"))
    found = in_two_processes(base, pairs, steps, tmp_path / "two", way)
    assert len(wanted) == len(found) == 8
    for a, b in zip(wanted, found):
        for key in ("loss", "margin", "accuracy", "chosen_tokens", "grad_norm", "learning_rate"):
            assert b[key] == pytest.approx(a[key], rel=2e-4, abs=1e-6), (a["step"], key)
        for key in ("real_tokens", "completion_tokens"):
            assert b[key] == a[key]
    assert found[-1]["loss"] < found[0]["loss"]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    first, second = (load_file(tmp_path / n / name) for n in ("one", "two"))
    if method == "full" and way == "fsdp":  # it writes the tied head out
        head = second.pop("lm_head.weight")
        assert torch.equal(head, second["model.embed_tokens.weight"])
    assert first.keys() == second.keys()
    for key, weight in first.items():
        assert torch.allclose(second[key].float(), weight.float(), atol=2e-4), key


@pytest.mark.slow
def test_fsdp_in_bfloat16_keeps_log_probabilities_in_float32(base, pairs, tmp_path):
    """The shipped mixed_precision: bf16; accelerate's policy would round them to 8 bits."""
    steps = settings(batch_size=6, method="full", token_budget=60, beta=2.0, gamma=0.5)
    (wanted,) = comparable(fit(base, pairs, steps, "simpo", 0, tmp_path / "one"))
    (found,) = in_two_processes(base, pairs, steps, tmp_path / "two", "bf16")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert found["margin"] != pytest.approx(wanted["margin"], rel=1e-6), "was it bfloat16 at all?"
    assert found["margin"] == pytest.approx(wanted["margin"], rel=0.05, abs=0.05)
