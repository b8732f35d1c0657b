"""What a training prints and notes between its steps: time left, probe."""

import re
import time
from types import SimpleNamespace

import torch
from training_cases import load, settings

from sao_utils.store import read_rows
from sao_utils.training import probe as probing
from sao_utils.training.fit import fit
from sao_utils.training.probe import TOKENS, ProbePlan, plan_probes, probe, repetition
from sao_utils.training.watch import Watch


def test_the_estimate_counts_probes_and_checkpoints(tmp_path):
    """A step of 20 s and a probe of 25 s, after the second of four steps."""
    pair = {"prompt": [{"role": "user", "content": "x"}]}
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    watcher = Watch(tmp_path / "self-0", settings(probe_steps=2), None, [pair], [row])
    watcher.began, watcher.seconds, watcher.probing = time.time() - 65, 20.0, 25.0
    watcher.probes = ProbePlan(8, frozenset({0, 2, 4}), "8 prompts every 2 steps")
    state = SimpleNamespace(global_step=2, max_steps=4)
    line = watcher._estimate(state, torch.nn.Linear(8, 8))
    left = 2 * 20 + 2 * 25
    assert line == (
        f"Training self-0: 4 steps, about {(65 + left) / 60:.0f} min in all, {left} s to go. "
        "Probe: 8 prompts every 2 steps"
    )
    big = SimpleNamespace(
        parameters=lambda: [torch.nn.Parameter(torch.empty(10**9, device="meta"))]
    )
    assert "4 min to go" in watcher._estimate(state, big), "two times 12 GB are written"


def test_a_training_prints_its_estimate_and_keeps_its_probes(
    base, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(probing, "SHARE", 100)
    fit(base, pairs, settings(batch_size=2, epochs=2, probe_steps=4), "simpo", 0, tmp_path / "a")
    assert re.search(
        r"6 steps, about \d+ s in all, \d+ s to go. Probe: 1 prompts every 4",
        capsys.readouterr().out,
    )
    assert [row["step"] for row in read_rows(tmp_path / "a" / "probe.jsonl")] == [0, 4, 6]


def test_probes_take_about_five_percent_of_the_time_at_most():
    every = plan_probes(20, 8, 60, 500_000, 100, "cpu")
    assert (every.prompts, every.steps) == (8, {0, 20, 40, 60})
    ends = plan_probes(20, 8, 54, 65_000, 70, "cpu")
    assert (ends.prompts, ends.steps) == (5, {0, 54})
    none = plan_probes(1, 8, 3, 10_500, 160, "cpu")
    assert (none.prompts, none.steps) == (0, frozenset())
    assert "5%" in ends.reason and "5%" in none.reason
    for plan, tokens, answer in ((every, 500_000, 100), (ends, 65_000, 70)):
        written = plan.prompts * len(plan.steps) * answer
        assert written * probing.COST["cpu"] <= 0.05 * tokens


def test_no_probe_is_made_without_probe_steps(base, pairs, tmp_path):
    fit(base, pairs, settings(), "simpo", 0, tmp_path / "a")
    assert read_rows(tmp_path / "a" / "probe.jsonl") == []


def test_the_probe_sees_repetition_emptiness_and_breaking_off(tokenizer, base, pairs):
    assert repetition("Yes. No. yes. Yes!") == 0.5
    assert repetition("") == repetition("One. Two.") == 0
    rows = probe(load(base), tokenizer, [pairs[0]["prompt"]] * 2)
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["prompt"] == "What do I need, and when?"
    assert rows[0]["finished"] == (rows[0]["tokens"] < TOKENS)
