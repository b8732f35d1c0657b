"""What a training prints and notes between its steps: time left, probe."""

import re
import time
from types import SimpleNamespace

import pytest
from training_cases import load, settings

from sao_utils.store import read_rows
from sao_utils.training import probe as probing
from sao_utils.training.fit import fit
from sao_utils.training.probe import TOKENS, plan_probes, probe, repetition
from sao_utils.training.watch import Watch


def test_the_estimate_counts_the_probes(tmp_path):
    """A step of 20 s and a probe of 25 s, after the second of four steps."""
    pair = {"prompt": [{"role": "user", "content": "x"}]}
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    watcher = Watch(tmp_path / "self-0", settings(probe_steps=2), None, [pair], [row])
    watcher.began, watcher.seconds, watcher.probing = time.time() - 65, 20.0, 25.0
    watcher.probed = 8, frozenset({0, 2, 4})
    left = 2 * 20 + 2 * 25
    assert watcher._estimate(SimpleNamespace(global_step=2, max_steps=4)) == (
        f"Training self-0: 4 steps, about {(65 + left) / 60:.0f} min in all, {left} s to go; "
        "3 probes of 8 prompts"
    )


@pytest.mark.parametrize("every, probed", [(4, [0, 4, 6]), (0, [])])
def test_a_training_prints_its_estimate_and_keeps_its_probes(
    base, pairs, tmp_path, capsys, monkeypatch, every, probed
):
    monkeypatch.setattr(probing, "SHARE", 100)
    steps = settings(batch_size=2, epochs=2, probe_steps=every)
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    assert re.search(r"6 steps, about \d+ s in all, \d+ s to go", capsys.readouterr().out)
    assert [row["step"] for row in read_rows(tmp_path / "a" / "probe.jsonl")] == probed


@pytest.mark.parametrize(
    "given, prompts, steps",
    [
        ((20, 8, 60, 500_000, 100), 8, {0, 20, 40, 60}),
        ((20, 8, 54, 65_000, 70), 5, {0, 54}),
        ((1, 8, 3, 10_500, 160), 0, set()),
        ((0, 8, 60, 500_000, 100), 0, set()),
    ],
)
def test_probes_take_about_five_percent_of_the_time_at_most(given, prompts, steps):
    assert plan_probes(*given, "cpu") == (prompts, steps)
    *_, tokens, answer = given
    assert prompts * len(steps) * answer * probing.COST["cpu"] <= 0.05 * tokens


def test_the_probe_sees_repetition_emptiness_and_breaking_off(tokenizer, base, pairs):
    assert repetition("Yes. No. yes. Yes!") == 0.5
    assert repetition("") == repetition("One. Two.") == 0
    rows = probe(load(base), tokenizer, [pairs[0]["prompt"]] * 2)
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["prompt"] == "What do I need, and when?"
    assert rows[0]["finished"] == (rows[0]["tokens"] < TOKENS)
