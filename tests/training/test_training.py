"""Training against the equation, hand computation, and the traps of the libraries."""

import json
import math
import os
import subprocess
import sys
import time
from importlib.resources import files

import pytest
import torch

from sao_utils.engines.loading import load_model
from sao_utils.recipe import Model, Training, load_recipe
from sao_utils.store import Run, read_rows
from sao_utils.tiny import pretrain
from sao_utils.training import fit as training
from sao_utils.training.fit import encode, fit, make_trainer
from sao_utils.training.losses import TrainingFailed, simpo_loss

ANSWERS = [
    ("Use a small trowel.", "You could use a spoon, or a fork, or a spade. That is all I know."),
    ("Start in spring, at noon.", "In winter."),
    ("Go to the river. Take care of the slippery stones.", "Go to the river."),
    ("A net.", "A hat, a coat and a scarf."),
    ("By the old mill, early in the day.", "By the sea."),
    ("Never alone.", "Alone, at night, in the fog, without a lamp."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.build_tokenizer(800)


def save_model(folder, tokenizer, change=None):
    """A random model whose next-token distributions are far from flat."""
    model = pretrain.build_model(tokenizer, seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 4
        if change:
            change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def pairs():
    return [pair(f"pair-{i}", *answers) for i, answers in enumerate(ANSWERS)]


def pair(name, chosen, rejected, prompt="What do I need, and when?"):
    def message(role, content):
        return [{"role": role, "content": content}]

    return {
        "id": name,
        "prompt": message("user", prompt),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
        "discarded": None,
    }


def settings(**changes):
    defaults = dict(
        learning_rate=1e-3,
        sft_learning_rate=2e-3,
        batch_size=6,
        lora_rank=4,
        lora_alpha=8,
    )
    return Training(**{**defaults, **changes})


def load(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()


def log_probabilities(model, tokenizer, prompt, answer):
    """Of each answer token, the end token included: independent of the module under test."""
    start = tokenizer(f"<|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    reply = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + reply])).logits[0].double()
    logits = logits[len(start) - 1 : -1]
    normaliser = logits.exp().sum(-1).log()
    return logits[torch.arange(len(reply)), reply] - normaliser


# ---------------------------------------------------------------------------- the loss


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

    def sums(side):
        lengths = torch.tensor([float(len(x)) for x in logps[side]])
        return torch.stack([x.sum() for x in logps[side]]), lengths

    ours = simpo_loss(*sums("chosen"), *sums("rejected"), beta=10, gamma=3)
    assert torch.allclose(ours, losses, rtol=1e-12)


def test_none_of_trls_defaults_is_in_use(base, pairs, tmp_path):
    trainer = make_trainer(base, pairs, settings(beta=8, gamma=2), "simpo", 5, tmp_path)
    assert (trainer.loss_type, trainer.cpo_alpha, trainer.alpha) == ("simpo", 0.0, 0.0)
    assert (trainer.beta, trainer.simpo_gamma, trainer.label_smoothing) == (8, 2, 0.0)
    arguments = trainer.args
    assert arguments.use_cpu and not arguments.bf16 and not arguments.fp16
    assert arguments.report_to == [] and arguments.seed == 5 and arguments.max_grad_norm == 1.0
    assert arguments.logging_nan_inf_filter is False


def test_sft_learns_the_tokens_of_the_chosen_answer_only(base, tokenizer, pairs, tmp_path):
    only_chosen = [{k: v for k, v in p.items() if k != "rejected"} for p in pairs]
    fit(base, only_chosen, settings(warmup_ratio=0), "sft", 0, tmp_path / "a")
    (row,) = read_rows(tmp_path / "a" / "log.jsonl")
    model, prompt = load(base), pairs[0]["prompt"][0]["content"]
    logps = torch.cat([log_probabilities(model, tokenizer, prompt, a) for a, _ in ANSWERS])
    assert row["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert row["learning_rate"] == 2e-3
    assert row["chosen_tokens"] == pytest.approx(len(logps) / 6)
    assert row["rewards_chosen"] is None


# ---------------------------------------------------------------------------- tokens

PLAIN = pretrain.CHAT_TEMPLATE
CHATML_LIKE = PLAIN.replace("<|end|>{%", "<|end|>\n{%")
NO_END = PLAIN.replace("<|end|>{%", "{%")
TWO_ENDS = PLAIN.replace("<|end|>{%", "<|end|>.<|end|>{%")


@pytest.fixture
def templated(tokenizer, monkeypatch):
    def use(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return use


@pytest.mark.parametrize("template", [PLAIN, CHATML_LIKE, NO_END])
def test_an_answer_ends_in_exactly_one_end_token(templated, pairs, template):
    assert CHATML_LIKE != PLAIN != NO_END
    tokenizer = templated(template)
    ids, labels = encode(pairs[0], "chosen", tokenizer)
    end = tokenizer.eos_token_id
    assert ids.count(end) == 1 and ids[-1] == end
    answer = [token for token in labels if token != -100]
    assert tokenizer.decode(answer) == ANSWERS[0][0] + "<|end|>"
    prompt = tokenizer.apply_chat_template(
        pairs[0]["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids[: -len(answer)] == prompt, "trained on another prompt than is generated from"


def test_a_turn_that_closes_with_another_token_than_eos_ends_there(templated, pairs):
    """As Gemma's <end_of_turn>: an eos after it could never be generated, but would be scored."""
    tokenizer = templated(PLAIN.replace("<|end|>{%", "<|user|>\n{%"))
    ids, labels = encode(pairs[0], "chosen", tokenizer)
    answer = [token for token in labels if token != -100]
    assert tokenizer.decode(answer) == ANSWERS[0][0] + "<|user|>"
    assert tokenizer.eos_token_id not in ids


def test_an_end_token_inside_an_answer_is_data(tokenizer):
    ids, _ = encode(pair("p", "Yes.<|end|><|user|>More?", "No."), "chosen", tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1


def test_what_cannot_be_trained_on_is_refused_by_name(base, templated, pairs, tmp_path):
    def attempt(*bad):
        fit(base, [*pairs, *bad], settings(), "simpo", 0, tmp_path / "a")

    with pytest.raises(ValueError, match="Pair long, rejected .* 2048.*max_tokens"):
        attempt(pair("long", "Yes.", "no " * 3000))
    with pytest.raises(ValueError, match="Pair blank, chosen .*empty"):
        attempt(pair("blank", " \n", "No."))
    with pytest.raises(ValueError, match="no pairs .*funnel"):
        fit(base, [], settings(), "simpo", 0, tmp_path / "a")
    with pytest.raises(ValueError, match="pair-0, chosen .*2 end tokens"):
        encode(pairs[0], "chosen", templated(TWO_ENDS))
    assert not list(tmp_path.glob("**/done.json"))


# ---------------------------------------------------------------------------- breaking down


def test_training_that_diverges_stops_and_says_what_to_try(base, pairs, tmp_path):
    wild = settings(learning_rate=1e30, epochs=6, batch_size=3, warmup_ratio=0)
    with pytest.raises(TrainingFailed, match=r"step \d+ of 12: .* (nan|inf).*lower learning rate"):
        fit(base, pairs, wild, "simpo", 0, tmp_path / "a")
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left <= {"log.jsonl", "probe.jsonl", "checkpoints"}
    assert not list((tmp_path / "a").glob("checkpoints/checkpoint-*"))
    assert all(math.isfinite(row["loss"]) for row in read_rows(tmp_path / "a" / "log.jsonl"))


def test_a_broken_base_model_is_told_from_a_high_learning_rate(tokenizer, pairs, tmp_path):
    def poison(model):
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan

    broken = save_model(tmp_path / "model", tokenizer, poison)
    with pytest.raises(TrainingFailed, match="step 1 of 1: the loss is nan.*base model itself"):
        fit(broken, pairs, settings(), "simpo", 0, tmp_path / "a")


# ---------------------------------------------------------------------------- what is left behind


def test_the_adapter_is_safetensors_and_loads_with_plain_peft(base, tokenizer, pairs, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

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
        patch.setattr(training, "write_whole", killed)
        fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    done = json.loads((tmp_path / "a" / "done.json").read_text())
    assert (done["pairs"], done["steps"], done["algorithm"]) == (6, 3, "simpo")
    assert [row["step"] for row in read_rows(tmp_path / "a" / "log.jsonl")] == [1, 2, 3]

    class Work(Exception):
        pass

    def work(*_):
        raise Work

    monkeypatch.setattr(training, "make_trainer", work)
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")  # does no work
    # A setting of the other algorithm changes nothing here.
    other = steps.model_copy(update={"sft_learning_rate": 0.5})
    fit(base, pairs, other, "simpo", 0, tmp_path / "a")
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


def test_the_stage_trains_on_what_was_not_discarded_and_notes_it(
    base, pairs, tmp_path, monkeypatch, capsys
):
    def build_pairs(run, arm, seed):
        return [*pairs, {**pairs[0], "id": "x", "discarded": "too long"}]

    monkeypatch.setattr(training, "build_pairs", build_pairs)
    training_overrides = {f"training.{k}": v for k, v in settings().model_dump().items()}
    recipe = load_recipe("tiny", {"model.path": base.path, **training_overrides})
    run = Run(recipe, tmp_path)
    assert training.train(run, "self", 0) == tmp_path / "adapters" / "self-0"
    assert "Training self-0: 1 steps, about" in capsys.readouterr().out
    training.train(run, "sft_random", 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    note = manifest["stages"]["training self-0"]
    assert note["pairs"] == 6 and note["steps"] == 1 and note["seconds"] > 0
    for arm, algorithm in (("self", "simpo"), ("sft_random", "sft")):
        done = json.loads((tmp_path / "adapters" / f"{arm}-0" / "done.json").read_text())
        assert (done["algorithm"], done["pairs"]) == (algorithm, 6)
    training.train(run, "self", 0)  # does no work, and leaves the note
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"] == manifest["stages"]


# ---------------------------------------------------------------------------- 4 bit


def gradients_before_and_after_an_evaluation(base, pairs, tokenizer):
    """Of every LoRA weight of an NF4 model, with a forward in evaluation mode in between."""
    from peft import LoraConfig, get_peft_model

    model = training.load_base(base, settings(quantisation="nf4"))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora)
    ids = torch.tensor([encode(pairs[0], "chosen", tokenizer)[0]])

    def gradients():
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    return before, gradients()


def test_4_bit_gradients_survive_an_evaluation_on_a_cpu(base, pairs, tokenizer):
    before, after = gradients_before_and_after_an_evaluation(base, pairs, tokenizer)
    assert len(before) == 5 * 7 * 2
    for name, gradient in before.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, after[name]), name


def test_without_the_guard_4_bit_gradients_are_wrong(base, pairs, tokenizer, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes leaves the weights as they are")
    monkeypatch.setattr(training.engines, "guard_nf4_on_cpu", lambda base: None)
    before, after = gradients_before_and_after_an_evaluation(base, pairs, tokenizer)
    first = next(name for name in before if "layers.0" in name)
    error = (before[first] - after[first]).norm() / before[first].norm()
    assert error > 0.5, "bitsandbytes has mended this: the guard can go"


@pytest.mark.parametrize("algorithm", ["simpo", "sft"])
def test_4_bit_training_keeps_the_adapter_in_float32(base, pairs, tmp_path, algorithm):
    from safetensors.torch import load_file

    quantised = settings(quantisation="nf4", epochs=4)
    fit(base, pairs, quantised, algorithm, 0, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    losses = [row["loss"] for row in read_rows(tmp_path / "a" / "log.jsonl")]
    assert losses[-1] < losses[0]
    if algorithm == "sft":  # bfloat16 keeps 8 bits; the rest would be zero
        bits = torch.cat([w.flatten().view(torch.int32) for w in weights.values()])
        assert (bits & 0xFFFF).count_nonzero() > len(bits) / 2


# ---------------------------------------------------------------------------- going on after a kill

CHILD = """
import json, sys
from pathlib import Path
from sao_utils.recipe import Model, Training
from sao_utils.training import fit
told = json.load(open(sys.argv[1]))
if told["fsdp"]:  # accelerate itself offers FSDP on GPUs only, torch on CPUs too
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    original, plugin = AcceleratorState.__init__, FullyShardedDataParallelPlugin()
    def with_fsdp(self, *given, **named):
        original(self, *given, **named)
        self._shared_state["distributed_type"] = DistributedType.FSDP
        if plugin.mixed_precision_policy is None and told["fsdp"] == "bf16":
            plugin.set_mixed_precision("bf16")
        self._shared_state["fsdp_plugin"] = plugin
    AcceleratorState.__init__ = with_fsdp
if told["file_limit"]:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_limit"], told["file_limit"]))
fit(Model(**told["model"]), told["pairs"], Training(**told["settings"]), told["algorithm"], 0,
    Path(told["folder"]))
"""


def child(
    base, pairs, settings, folder, algorithm="simpo", file_limit=0, fsdp=False, command=(), **env
):
    """Start a training in a process of its own; its settings go by a file."""
    told = dict(model=base.model_dump(), pairs=pairs, settings=settings.model_dump())
    told |= dict(folder=str(folder), algorithm=algorithm, file_limit=file_limit, fsdp=fsdp)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, script = folder.parent / f"{folder.name}.json", folder.parent / "child.py"
    file.write_text(json.dumps(told))
    script.write_text(CHILD)
    words = [sys.executable, *command, str(script), str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def comparable(folder):
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_rows(folder / "log.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_killed_in_the_middle_goes_on_to_the_same_end(base, pairs, tmp_path, dropout):
    steps = settings(
        batch_size=2, epochs=20, checkpoint_minutes=1e-6, lora_dropout=dropout, probe_steps=7
    )
    whole = fit(base, pairs, steps, "simpo", 0, tmp_path / "whole")
    killed = child(base, pairs, steps, tmp_path / "killed")
    deadline = time.time() + 120
    while not list(tmp_path.glob("killed/checkpoints/checkpoint-1[0-9]/complete")):
        assert killed.poll() is None and time.time() < deadline, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()  # SIGKILL: nothing can be tidied up
    killed.communicate()
    before = len(read_rows(tmp_path / "killed" / "log.jsonl"))
    assert 10 <= before < 60 and not (tmp_path / "killed" / "done.json").exists()
    fit(base, pairs, steps, "simpo", 0, tmp_path / "killed")
    assert comparable(tmp_path / "killed") == comparable(whole)
    weights = [tmp_path / n / "adapter_model.safetensors" for n in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    probes = [read_rows(tmp_path / n / "probe.jsonl") for n in ("killed", "whole")]
    assert probes[0] == probes[1] and [row["step"] for row in probes[0]] == [*range(0, 60, 7), 60]
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_a_half_written_checkpoint_and_one_of_other_settings_are_not_used(
    base, pairs, tmp_path, capsys, monkeypatch
):
    steps = settings(batch_size=2, epochs=4, checkpoint_minutes=1e-6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(training, "_save", stop)  # as late as it can be
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
    told = full.communicate(timeout=200)[0]
    assert full.returncode != 0
    assert "could not be written to disk" in told and "free some disk" in told, told
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
        with pytest.raises(TrainingFailed, match="step 8 of 12: .*checkpoint of step 7 is kept"):
            fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    fit(base, pairs, steps, "simpo", 0, tmp_path / "a")
    fit(base, pairs, steps, "simpo", 0, tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")


# ---------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_give_the_loss_curve_of_one(base, pairs, tmp_path, way, method):
    """`accelerate launch` with gloo on the CPU; five pairs a step do not divide by two."""
    steps = settings(batch_size=5, epochs=4, method=method, token_budget=60)
    one = fit(base, pairs, steps, "simpo", 0, tmp_path / "one")
    launch = ["-m", "accelerate.commands.launch", f"--main_process_port={free_port()}"]
    launch += ["--num_processes=2", "--mixed_precision=no"]
    if way == "fsdp":
        launch.append(f"--config_file={files('sao_utils') / 'launch' / 'fsdp.yaml'}")
    else:
        launch += ["--multi_gpu", "--num_machines=1", "--dynamo_backend=no"]
    environment = {"ACCELERATE_USE_CPU": "true"}
    two = child(
        base, pairs, steps, tmp_path / "two", fsdp=way == "fsdp", command=launch, **environment
    )
    told = two.communicate(timeout=120)[0]
    assert two.returncode == 0, told[-4000:]
    assert f"2 processes, {'FSDP' if way == 'fsdp' else 'MULTI_CPU'}" in told, told[-4000:]
    wanted, found = comparable(one), comparable(tmp_path / "two")
    assert len(wanted) == len(found) == 8
    for a, b in zip(wanted, found):
        for key in ("loss", "margin", "accuracy", "chosen_tokens", "grad_norm", "learning_rate"):
            assert b[key] == pytest.approx(a[key], rel=2e-4, abs=1e-6), (a["step"], key)
        for key in ("real_tokens", "completion_tokens"):
            assert b[key] == a[key]
    assert found[-1]["loss"] < found[0]["loss"]
    from safetensors.torch import load_file

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
    one = fit(base, pairs, steps, "simpo", 0, tmp_path / "one")
    launch = ["-m", "accelerate.commands.launch", f"--main_process_port={free_port()}"]
    launch += ["--num_processes=2", "--mixed_precision=no"]
    launch.append(f"--config_file={files('sao_utils') / 'launch' / 'fsdp.yaml'}")
    environment = {"ACCELERATE_USE_CPU": "true"}
    two = child(base, pairs, steps, tmp_path / "two", fsdp="bf16", command=launch, **environment)
    told = two.communicate(timeout=120)[0]
    assert two.returncode == 0, told[-4000:]
    (wanted,), (found,) = comparable(one), comparable(tmp_path / "two")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert found["margin"] != pytest.approx(wanted["margin"], rel=1e-6), "was it bfloat16 at all?"
    assert found["margin"] == pytest.approx(wanted["margin"], rel=0.05, abs=0.05)


def free_port():
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


# ---------------------------------------------------------------------------- what else there is


@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
def test_the_other_algorithms_learn_from_the_same_pairs(base, pairs, tmp_path, algorithm):
    fit(base, pairs, settings(epochs=8), algorithm, 0, tmp_path / "a")
    log = read_rows(tmp_path / "a" / "log.jsonl")
    assert log[-1]["margin"] > log[0]["margin"] and log[-1]["loss"] < log[0]["loss"]
    if algorithm == "dpo":  # the policy begins as its own reference
        assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
        assert log[0]["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"workers": 2}, {"engine": "vllm", "quantisation": "fp8", "max_context": 512}]
)
def test_pairs_are_scored_by_the_weights_whatever_engine_generates(
    base, tokenizer, pairs, tmp_path, changes
):
    recipe = load_recipe("tiny").model_copy(update={"model": base.model_copy(update=changes)})
    rows = training.pair_logps(Run(recipe, tmp_path), pairs[:3])
    model = load_model(base)
    for row, pair in zip(rows, pairs[:3], strict=True):
        for side in ("chosen", "rejected"):
            ids, labels = (torch.tensor(x) for x in training.encode(pair, side, tokenizer))
            with torch.no_grad():
                logps = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
            answer = labels[1:] != -100
            each = logps[answer].gather(1, ids[1:][answer, None])
            assert row[f"logp_{side}"] == pytest.approx(each.sum().item(), abs=1e-3)
            assert row[f"len_{side}"] == len(each)


def test_full_fine_tuning_leaves_a_model_that_the_engine_loads(base, pairs, tmp_path):
    from sao_utils.engines.base import Sampling
    from sao_utils.engines.loading import model_name
    from sao_utils.engines.registry import load_engine

    folder = fit(base, pairs, settings(method="full", epochs=3), "simpo", 0, tmp_path / "a")
    assert not (folder / "adapter_config.json").exists()
    engine = load_engine(base, folder)
    assert engine.name == model_name(base, folder) != model_name(base)
    before = dict(load(base).named_parameters())
    moved = [n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    ((_, reply),) = next(iter(engine.generate([pairs[0]["prompt"]], Sampling(0.0, 4), [0])))
    assert reply.tokens <= 4


def test_paged_8_bit_adamw_or_a_message(base, pairs, tmp_path):
    """bitsandbytes has this optimiser for GPUs first; where it runs, it must learn."""
    eight = settings(optimiser="paged_adamw_8bit", epochs=4)
    try:
        fit(base, pairs, eight, "simpo", 0, tmp_path / "a")
    except TrainingFailed as error:
        assert "training.optimiser=adamw" in str(error)
    else:
        log = read_rows(tmp_path / "a" / "log.jsonl")
        assert log[-1]["margin"] > log[0]["margin"]


def test_activations_are_computed_twice_only_where_they_do_not_fit():
    from transformers import Gemma2Config

    from sao_utils.training.fit import needs_checkpointing

    gemma = Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    )
    assert needs_checkpointing(gemma, 4096, None) == (False, "there is no GPU")
    assert needs_checkpointing(gemma, 4096, 15 * 2**30)[0]
    assert not needs_checkpointing(gemma, 4096, 130 * 2**30)[0]


def test_the_probe_sees_repetition_emptiness_and_breaking_off(tokenizer, base, pairs):
    from sao_utils.training.fit import probe, repetition

    assert repetition("Yes. No. yes. Yes!") == 0.5
    assert repetition("") == repetition("One. Two.") == 0
    rows = probe(load(base), tokenizer, [pairs[0]["prompt"]] * 2)
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["prompt"] == "What do I need, and when?"
    assert rows[0]["finished"] == (rows[0]["tokens"] < training.PROBE_TOKENS)


def test_a_run_without_pairs_says_why_none_are_left(monkeypatch, small_run):
    monkeypatch.setattr(training, "build_pairs", lambda run, arm, seed: [])
    monkeypatch.setattr(training, "funnel", lambda run, arm: [("personas", 3), ("malformed", -3)])
    told = "no pairs to train the arm 'self' on. Discarded, .*: 3 malformed"
    with pytest.raises(ValueError, match=told):
        training.train(small_run, "self", 0)
