"""`fit` against the equation and hand computation, and what it leaves behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_cases import ANSWERS, load, log_probabilities, settings

from sao_utils.disk import Busy
from sao_utils.engines.loading import model_name
from sao_utils.engines.registry import load_engine
from sao_utils.recipe import RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.store import Run, read_rows
from sao_utils.training import fit as fitting
from sao_utils.training import setup
from sao_utils.training.encoding import encode
from sao_utils.training.fit import alone, fit, read_done
from sao_utils.training.logps import pair_logps
from sao_utils.training.reward import fit_reward


@pytest.mark.parametrize("budget", [4096, 60])
def test_the_trainers_loss_equals_hand_computation(base, tokenizer, pairs, tmp_path, budget):
    fit(base, pairs, settings(beta=10, gamma=3, token_budget=budget), "simpo", 0, tmp_path / "a")
    (row,) = read_rows(tmp_path / "a" / "log.jsonl")

    # The adapter begins as the identity, so the first step sees the base model.
    model, prompt = load(base), pairs[0]["prompt"][0]["content"]
    logps = {
        side: [log_probabilities(model, tokenizer, prompt, a[k]) for a in ANSWERS]
        for k, side in enumerate(("chosen", "rejected"))
    }
    better, worse = (
        torch.stack([10 * x.sum() / len(x) for x in logps[s]]) for s in ("chosen", "rejected")
    )
    losses = torch.log1p(torch.exp(-(better - worse - 3)))
    assert losses.std() > 0.5, "the case is too easy"
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert row["rewards_chosen"] == pytest.approx(better.mean().item(), rel=1e-5)
    assert row["rewards_rejected"] == pytest.approx(worse.mean().item(), rel=1e-5)
    assert row["margin"] == pytest.approx((better - worse).mean().item(), rel=1e-4)
    assert row["accuracy"] == pytest.approx((better > worse).double().mean().item())
    assert row["chosen_tokens"] == pytest.approx(sum(map(len, logps["chosen"])) / 6)
    assert row["rejected_tokens"] == pytest.approx(sum(map(len, logps["rejected"])) / 6)


def test_sft_learns_the_tokens_of_the_chosen_answer_only(base, tokenizer, pairs, tmp_path):
    rows = [{key: pair[key] for key in ("id", "prompt", "chosen")} for pair in pairs]
    fit(base, rows, settings(warmup_ratio=0), "sft", 0, tmp_path / "a")
    (row,) = read_rows(tmp_path / "a" / "log.jsonl")
    model, prompt = load(base), pairs[0]["prompt"][0]["content"]
    logps = torch.cat([log_probabilities(model, tokenizer, prompt, a) for a, _ in ANSWERS])
    assert row["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert row["learning_rate"] == 2e-3
    assert row["chosen_tokens"] == pytest.approx(len(logps) / 6)
    assert row["rewards_chosen"] is None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_goes_on_from_the_model_that_another_one_has_trained(
    base, tokenizer, pairs, tmp_path, method
):
    how = settings(method=method, epochs=3, warmup_ratio=0)
    first = fit(base, pairs, how, "sft", 0, tmp_path / "first")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    start = base.model_copy(update={"adapter": str(first)})
    second = fit(start, pairs, how, "sft", 0, tmp_path / "second")
    seen = read_rows(second / "log.jsonl")[0]["loss"]

    if method == "lora":
        from peft import PeftModel

        trained = PeftModel.from_pretrained(load(base), first).eval()
    else:
        trained = load(base.model_copy(update={"path": str(first)}))
    prompt = pairs[0]["prompt"][0]["content"]
    logps = torch.cat([log_probabilities(trained, tokenizer, prompt, a) for a, _ in ANSWERS])
    assert seen == pytest.approx(-logps.mean().item(), rel=1e-4)
    assert seen < read_rows(first / "log.jsonl")[0]["loss"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert read_done(first)["fingerprint"] != read_done(second)["fingerprint"]


@pytest.mark.parametrize("how", [(settings(), "simpo", 0), (0,)], ids=["pairs", "reward"])
def test_two_processes_do_not_train_into_the_same_folder(base, pairs, tmp_path, how):
    train = fit if len(how) > 1 else fit_reward
    with alone(tmp_path / "a"), pytest.raises(Busy, match="is making a of this run"):
        train(base, pairs, *how, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("key, other", [("lora_rank", 8), ("lora_alpha", 16)])
def test_a_training_that_goes_on_from_an_adapter_of_another_shape_is_refused(
    base, pairs, tmp_path, key, other
):
    """As with iterations.start=previous: peft would keep the adapter's values, and say nothing."""
    first = fit(base, pairs, settings(), "simpo", 0, tmp_path / "first")
    start, before = base.model_copy(update={"adapter": str(first)}), getattr(settings(), key)
    with pytest.raises(RecipeError, match=f"training.{key} is {other}.* has {before}.*start=base"):
        fit(start, pairs, settings(**{key: other}), "simpo", 0, tmp_path / "second")
    assert not (tmp_path / "second" / "done.json").exists()


def test_the_adapter_is_safetensors_and_loads_with_plain_peft(base, tokenizer, pairs, tmp_path):
    from peft import PeftModel

    folder = fit(base, pairs, settings(epochs=3), "simpo", 0, tmp_path / "a")
    assert folder == tmp_path / "a"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "done.json",
        "log.jsonl",
        "probe.jsonl",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.path
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert len(weights) == 5 * 7 * 2, "a LoRA pair on all seven projections of five layers"
    ids = torch.tensor([encode(pairs[0], "chosen", tokenizer)[0]])
    with torch.no_grad():
        before = load(base)(ids).logits
        after = PeftModel.from_pretrained(load(base), str(folder)).eval()(ids).logits
    assert (after - before).abs().max() > 0.01
    rewards = [row["margin"] for row in read_rows(folder / "log.jsonl")]
    assert len(rewards) == 3 and rewards[-1] > rewards[0]


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(base, pairs, tmp_path):
    def weights(name, seed):
        batches = settings(batch_size=2)
        fit(base, pairs, batches, "simpo", seed, tmp_path / name)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = weights("a", 0)
    assert weights("b", 0) == first
    assert weights("c", 1) != first


def test_a_finished_training_is_kept_and_a_killed_one_made_anew(base, pairs, tmp_path, monkeypatch):
    def killed(path, text):
        if path.name == "done.json":
            raise KeyboardInterrupt

    steps = settings(batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "write_whole", killed)
        fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    done = read_done(tmp_path / "a")
    assert (done["pairs"], done["steps"], done["algorithm"]) == (6, 3, "simpo")
    assert [row["step"] for row in read_rows(tmp_path / "a" / "log.jsonl")] == [1, 2, 3]

    class Work(Exception):
        pass

    def work(*_):
        raise Work

    monkeypatch.setattr(setup, "make_trainer", work)
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")  # does no work
    unrelated = {"sft_learning_rate": 0.5, "token_budget": 512, "probe_steps": 3}
    fit(base, pairs, steps.model_copy(update=unrelated), "simpo", 0, tmp_path / "a")
    for change in (
        dict(pairs=pairs[:5]),
        dict(settings=steps.model_copy(update={"gamma": 1.0})),
        dict(seed=1),
        dict(algorithm="sft"),
    ):
        wanted = dict(pairs=pairs, settings=steps, algorithm="simpo", seed=0) | change
        (tmp_path / "a" / "done.json").write_text(json.dumps(done))
        with pytest.raises(Work):
            fit(base, folder=tmp_path / "a", **wanted)
        assert not (tmp_path / "a" / "done.json").exists()


@pytest.mark.parametrize("changes", [{"quantisation": "nf4"}, {"optimiser": "paged_adamw_8bit"}])
def test_the_savings_of_qlora_leave_a_float32_adapter_that_learns(base, pairs, tmp_path, changes):
    fit(base, pairs, settings(epochs=4, **changes), "simpo", 0, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    margins = [row["margin"] for row in read_rows(tmp_path / "a" / "log.jsonl")]
    assert margins[-1] > margins[0]


def test_a_training_in_bfloat16_follows_float32_and_its_adapter_is_float32(
    base, pairs, tmp_path, monkeypatch
):
    """As on a CPU with AMX; others compute the same in bfloat16, slowly."""
    monkeypatch.setattr(setup.loading, "cpu_has_bfloat16", lambda: True)
    logs = []
    for dtype in ("float32", "auto"):
        model = base.model_copy(update={"dtype": dtype})
        folder = fit(model, pairs, settings(epochs=4), "simpo", 0, tmp_path / dtype)
        weights = load_file(folder / "adapter_model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.float32}
        logs.append([row["loss"] for row in read_rows(folder / "log.jsonl")])
    assert logs[0] != logs[1] and logs[1][-1] < logs[1][0] / 2
    assert logs[1] == pytest.approx(logs[0], rel=0.05, abs=0.05)


@pytest.mark.parametrize("changes", [{}, {"engine": "vllm", "quantisation": "fp8"}])
def test_pairs_are_scored_by_the_weights_whatever_engine_generates(
    base, tokenizer, pairs, tmp_path, changes
):
    recipe = load_recipe("tiny").model_copy(update={"model": base.model_copy(update=changes)})
    rows = pair_logps(Run(recipe, tmp_path), pairs[:3])
    model, prompt = load(base), pairs[0]["prompt"][0]["content"]
    for row, answers in zip(rows, ANSWERS[:3], strict=True):
        for side, answer in zip(("chosen", "rejected"), answers):
            logps = log_probabilities(model, tokenizer, prompt, answer)
            assert row[f"logp_{side}"] == pytest.approx(logps.sum().item(), abs=1e-3)
            assert row[f"len_{side}"] == len(logps)


def test_full_fine_tuning_leaves_a_model_that_the_engine_loads(base, pairs, tmp_path):
    folder = fit(base, pairs, settings(method="full", epochs=3), "simpo", 0, tmp_path / "a")
    assert not (folder / "adapter_config.json").exists()
    tuned = base.model_copy(update={"adapter": str(folder)})
    engine = load_engine(tuned)
    assert model_name(tuned) != model_name(base)
    before = dict(load(base).named_parameters())
    moved = [n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
