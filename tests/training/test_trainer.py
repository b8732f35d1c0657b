"""The trainer against trl's own trainers as shipped, and packing against one pair at a time.

trl keeps SimPO and ORPO in `trl.experimental`: the golden tests here tell the day they change.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from sao_utils.bench import contenders
from sao_utils.engines.loading import load_tokenizer
from sao_utils.recipe import Model, Training
from sao_utils.training import TrainingFailed
from sao_utils.training.setup import add_adapter, load_base, pair_trainer

COMMON = dict(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "mistral, sliding window": MistralConfig(**COMMON, sliding_window=9),
    # Gemma-2 caps both the attention scores and the logits; the caps are low here, to matter.
    "gemma2": Gemma2Config(
        **COMMON, sliding_window=9, attn_logit_softcapping=0.7, final_logit_softcapping=1.5
    ),
}


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    if config.model_type == "gemma2":  # torch's fused attention has no cap
        model.set_attn_implementation("eager")
    return model


def with_adapter(model, settings, seed=0):
    adapted = add_adapter(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zeros at the start: half of the gradients would be zero
            weight.data.normal_(0, 0.05, generator=generator)
    return adapted


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 257, (n,), generator=generator).tolist()

    sizes = [(7, 5, 12), (3, 14, 2), (11, 1, 6), (5, 9, 9), (16, 20, 11)]
    return [
        {"id": str(k), "prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
        for k, (p, c, r) in enumerate(sizes)
    ]


def settings(**changes):
    plain = dict(learning_rate=1e-3, sft_learning_rate=1e-3, batch_size=5, lora_rank=4)
    plain |= dict(beta=2.0, gamma=0.5)  # beta 10 would multiply the rounding of float32
    return Training(**{**plain, "token_budget": 90, **changes})


def step(trainer, batch):
    """Loss, gradients and counts of one step."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # transformers sets it in its loop
    loss = trainer.training_step(trainer.model, batch).item()
    return loss, gradients_of(trainer.model)


def gradients_of(model):
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def ours(policy, rows, settings, folder, algorithm="simpo"):
    return pair_trainer(policy, None, rows, settings, algorithm, 0, folder)


def assert_close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys() and len(wanted) > 10
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm()
        assert error <= tolerance * gradient.norm() + 1e-7 * scale, name


# ---------------------------------------------------------------------------- trl's trainers


@pytest.mark.parametrize("family", CONFIGS)
def test_simpo_equals_trls_cpo_trainer(family, rows, tmp_path, monkeypatch):
    """In loss and gradients, against the benchmarks' CPOTrainer, which is as shipped."""
    monkeypatch.setattr(contenders, "BETA", 2.0)
    monkeypatch.setattr(contenders, "GAMMA", 0.5)
    set_to = settings()
    # In float32 both sum in other orders, by CPU over 1e-6 apart. In double Gemma-2's padding gives NaN.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = with_adapter(random_model(CONFIGS[family]), set_to).to(dtype)
    loss = contenders.stock(model, rows, False, len(rows), "cpu", tmp_path)()["loss"]
    policy = with_adapter(random_model(CONFIGS[family]), set_to).to(dtype)
    trainer = ours(policy, rows, set_to, tmp_path)
    found, of_ours = step(trainer, rows)
    assert trainer.packed and trainer.row["microbatches"] > 1
    assert found == pytest.approx(loss, rel=1e-6)
    assert_close(of_ours, gradients_of(model))


def test_dpo_equals_trls_dpo_trainer(rows, tmp_path):
    """Against trl's stable trainer, whose reference is the adapter as it was at the start."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    set_to = settings(dpo_beta=0.3)
    tokenizer = load_tokenizer(Model(path="tiny"))
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.3, max_length=None
    )
    args.gradient_checkpointing = False
    model = with_adapter(random_model(CONFIGS["llama"]), set_to)
    trl = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    nudge(trl.model)
    batch = trl.data_collator([{k: row[k] for k in row if k != "id"} for row in rows])
    loss, gradients = step(trl, batch)

    trainer = ours(
        with_adapter(random_model(CONFIGS["llama"]), set_to), rows, set_to, tmp_path, "dpo"
    )
    nudge(trainer.model)
    found, of_ours = step(trainer, trainer.train_dataset)
    assert abs(loss - 0.6931) > 1e-3, "the policy must have left its reference"
    assert found == pytest.approx(loss, rel=1e-6)
    assert_close(of_ours, {k: g for k, g in gradients.items() if ".ref." not in k})


def nudge(policy):
    for name, weight in policy.named_parameters():
        if "lora_B.default" in name:
            weight.data.mul_(1.5)


def test_orpo_equals_trls_odds_ratio_beside_the_likelihood_of_the_answer(rows, tmp_path):
    """trl's own likelihood counts the prompt and weighs long answers more; the paper's does not."""
    from trl.experimental.orpo import ORPOTrainer

    set_to = settings(orpo_lambda=0.4)
    policy = with_adapter(random_model(CONFIGS["llama"]), set_to)
    with torch.no_grad():
        chosen, rejected = answer_means(policy, rows)
    trl = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    ratios = ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)[0]
    found, _ = step(ours(policy, rows, set_to, tmp_path, "orpo"), rows)
    assert found == pytest.approx((-chosen - ratios).mean().item(), rel=1e-6)


# ---------------------------------------------------------------------------- packing


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("way", ["packed", "shared prompt", "padded", "checkpointed"])
def test_a_step_equals_its_pairs_one_at_a_time(family, way, rows, tmp_path):
    set_to = settings(
        share_prompt=way in ("shared prompt", "checkpointed"),
        gradient_checkpointing="on" if way == "checkpointed" else "off",
    )
    trainer = ours(with_adapter(random_model(CONFIGS[family]), set_to), rows, set_to, tmp_path)
    assert trainer.packed
    trainer.packed = way != "padded"
    loss, gradients = step(trainer, rows)

    alone = settings(share_prompt=False, token_budget=1)
    single = ours(with_adapter(random_model(CONFIGS[family]), set_to), rows, alone, tmp_path)
    losses, sums = [], {}
    for row in rows:
        one, found = step(single, [row])
        losses.append(one)
        sums = {name: sums.get(name, 0) + g / len(rows) for name, g in found.items()}
    assert loss == pytest.approx(sum(losses) / len(rows), rel=1e-6)
    assert_close(gradients, sums)


def test_an_attention_that_cannot_be_replaced_gets_padded_batches(rows, tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    truth, gradients = step(ours(random_model(CONFIGS["llama"]), rows, settings(), tmp_path), rows)

    class Stubborn:
        def get_interface(self, name, default):
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Stubborn())
    trainer = ours(random_model(CONFIGS["llama"]), rows, settings(), tmp_path)
    assert not trainer.packed and "off by" in trainer.packing_reason
    found, of_ours = step(trainer, rows)
    assert found == pytest.approx(truth, rel=1e-6)
    assert_close(of_ours, gradients)


def test_a_model_with_other_logits_is_refused_before_training(rows, tmp_path):
    model = random_model(CONFIGS["llama"])
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden) * 2
    with pytest.raises(TrainingFailed, match="LlamaForCausalLM computes its logits"):
        ours(model, rows, settings(), tmp_path)


def answer_means(model, rows):
    """Mean log-probability of each chosen and each rejected answer, from the full logits."""
    means = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            means.append(scores.gather(1, ids[0, 1:, None])[-len(row[side]) :].mean())
    return torch.stack(means).chunk(2)


def by_full_logits(model, rows):
    """SimPO's loss and gradients by the formula, from the full logits of each sequence alone."""
    chosen, rejected = answer_means(model, rows)
    loss = -torch.nn.functional.logsigmoid(2 * (chosen - rejected) - 0.5).mean()
    loss.backward()
    return loss.item(), gradients_of(model)


def test_4_bit_weights_with_an_adapter_equal_the_plain_formula(rows, tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path / "base")
    base = Model(path=str(tmp_path / "base"), dtype="float32")
    policy = with_adapter(load_base(base, settings(quantisation="nf4")), settings())
    loss, gradients = by_full_logits(policy, rows)
    found, of_ours = step(ours(policy, rows, settings(), tmp_path), rows)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_close(of_ours, gradients)


def test_full_fine_tuning_reaches_every_weight_the_tied_head_too(rows, tmp_path):
    loss, gradients = by_full_logits(random_model(CONFIGS["qwen2"]), rows)
    model = random_model(CONFIGS["qwen2"])
    found, of_ours = step(ours(model, rows, settings(method="full"), tmp_path), rows)
    assert found == pytest.approx(loss, rel=1e-6)
    assert_close(of_ours, gradients)
    assert of_ours["model.embed_tokens.weight"].abs().min(1).values.count_nonzero() > 200
