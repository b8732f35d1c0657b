"""What a model costs: the arithmetic against known numbers, the profiler and autograd."""

import json

import families
import pytest
import torch

from sao_utils.plan import hardware, hours, memory
from sao_utils.plan.hardware import find_gpu
from sao_utils.plan.workload import Lengths, Work
from sao_utils.recipe import Model, Training
from sao_utils.training.shapes import shape_of

GIB = 2**30


def shape(name):
    return shape_of(hardware.architecture(Model(path=name)))


GEMMA, LLAMA = "google/gemma-2-9b-it", "meta-llama/Meta-Llama-3-8B-Instruct"
QWEN, QWEN_3B = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct"


# ---------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "parameters", "kv"),
    [
        (GEMMA, 9_241_705_984, 336),
        (LLAMA, 8_030_261_248, 128),
        (QWEN, 1_543_714_304, 28),
        (QWEN_3B, 3_085_938_688, 36),
        ("smollm2", 134_515_008, 22.5),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 56),
    ],
)
def test_known_models_have_the_parameters_that_their_cards_tell(name, parameters, kv):
    assert shape(name).parameters == parameters
    assert shape(name).kv_bytes() == kv * 1024


def test_an_adapter_has_the_parameters_that_peft_gives_it():
    from sao_utils.training.setup import add_adapter

    tokenizer = families.make_tokenizer("gemma")
    model = families.random_model("gemma", tokenizer)
    rate = dict(learning_rate=1e-3, sft_learning_rate=1e-3, batch_size=1)
    adapted = add_adapter(model, Training(**rate, lora_rank=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape_of(model.config).adapter(4) == trained


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_activations_are_what_autograd_keeps(family, method, tmp_path):
    """In bfloat16 as on a GPU: bytes saved for the backward pass, a layer and token.

    What does not grow with the width (masks, an adapter's inner values) is left out of the estimate;
    at this width it is a few percent.
    """
    kept, tokens = {}, 0
    for layers in (1, 3):
        saved, tokens, config = _saved_bytes(family, method, layers, tmp_path)
        kept[layers] = saved
    found = (kept[3] - kept[1]) / 2 / tokens
    assert shape_of(config).kept_bytes(method == "full") == pytest.approx(found, rel=0.07)


def _saved_bytes(family, method, layers, folder):
    from sao_utils.training import packing
    from sao_utils.training.setup import add_adapter, pair_trainer

    sizes = dict(num_hidden_layers=layers, hidden_size=384, intermediate_size=1152)
    torch.manual_seed(0)
    model = families.random_model(family, families.make_tokenizer(family), **sizes)
    if family == "gemma":
        model.set_attn_implementation("eager")
    rate = dict(
        learning_rate=1e-3, sft_learning_rate=1e-3, batch_size=1, method=method, lora_rank=1
    )
    settings, policy = Training(**rate, gradient_checkpointing="off"), model
    if method == "lora":
        policy = add_adapter(model.to(torch.bfloat16), settings)
    pair = {"id": "a", "prompt_ids": [5] * 60, "chosen_ids": [7] * 375, "rejected_ids": [8] * 375}
    trainer = pair_trainer(policy, None, [pair], settings, "simpo", 0, folder)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    sizes = {p.numel() for p in policy.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        # 16-bit copies of weights do not grow with the tokens.
        if storage.data_ptr() not in weights and storage.nbytes() // 2 not in sizes:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ((microbatch, group),) = trainer._microbatches([pair])
    with packing.packed(model), torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer._loss(policy, microbatch, group)
    return sum(seen.values()), microbatch.fed, model.config


@pytest.mark.parametrize("verb", ["generate", "judge"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_engines_peak_is_what_was_planned(family, verb):
    """Every tensor that is made and freed, as torch's profiler counts them on a CPU."""
    from sao_utils.engines.base import Sampling, encode
    from sao_utils.engines.transformers import TransformersEngine

    tokenizer = families.make_tokenizer(family)
    tokenizer.padding_side, tokenizer.pad_token = "left", families.FAMILIES[family]["special"][0]
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    model = families.random_model(family, tokenizer, **sizes)
    if family == "gemma":
        model.set_attn_implementation("eager")
    engine = TransformersEngine(model, tokenizer, 100_000)
    engine.stops = []
    words, new, count = {"generate": (30, 60, 16), "judge": (150, 0, 8)}[verb]
    chats = [[{"role": "user", "content": "1 " * words}]] * count
    length = len(encode(chats[:1], tokenizer)[0])
    settings = Model(path="tiny", dtype="float32", batch_tokens=count * (length + new))
    if verb == "generate":
        parts = memory.generation_memory(model.config, settings, length, new)
        work = engine.generate(chats, Sampling(0.6, new), list(range(count)))
    else:
        parts = memory.judging_memory(model.config, settings, length)
        work = engine.choose(chats, "ranking:", (" 1 > 2", " 2 > 1"))
    peak = _profiled(lambda: list(work))
    assert sum(parts.values()) - parts["weights"] == pytest.approx(peak / GIB, rel=0.03)


def _profiled(work):
    """Bytes of all tensors that are alive at a time, at most."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---------------------------------------------------------------------------- hours

#: GPU, model, quantisation -> hours of 10,000 prompts, 20,000 responses and verdicts, and a training of
#: 9 million tokens, computed by hand from the data sheet and the shares of it that are assumed.
TABLE = [
    ("4090", GEMMA, "fp8", 4.2),
    ("4090", LLAMA, "none", 3.3),
    ("4090", QWEN_3B, "none", 1.3),
    ("T4", LLAMA, "bitsandbytes", 9.8),
    ("T4", QWEN, "none", 2.1),
]


@pytest.mark.parametrize(("gpu", "name", "bits", "total"), TABLE)
def test_hours_agree_with_a_hand_computed_table(gpu, name, bits, total):
    card = find_gpu(gpu)
    model = Model(path=name, engine="vllm", quantisation=bits, dtype="bfloat16", max_context=2048)
    found = 0.0
    for rows, lengths in ((10_000, (90, 60)), (20_000, (60, 375)), (20_000, (930, 0))):
        read, written = lengths
        work = Work("", "model", model, rows, Lengths(read, written, read, written))
        found += hours.work_hours(work, card, memory.work_memory(work, card))
    rate = dict(learning_rate=1e-3, sft_learning_rate=1e-3, batch_size=1, quantisation="nf4")
    work = Work("training", "model", model, 10_000, Lengths(900, 0, 2048, 0))
    found += hours.training_hours(work, card, Training(**rate), True)
    assert found == pytest.approx(total, rel=0.2)


# ---------------------------------------------------------------------------- the machine


def test_the_machines_own_gpu_is_known_by_its_drivers_name(monkeypatch):
    for named, name in (("Tesla T4", "T4"), ("NVIDIA A100-SXM4-80GB", "A100-80")):
        monkeypatch.setattr(hardware, "gpu_name", lambda: named)  # noqa: B023
        assert find_gpu(None).name == name
    monkeypatch.setattr(hardware, "gpu_name", lambda: "NVIDIA GeForce GT 1")
    with pytest.raises(ValueError, match="GeForce GT 1' is not known; --gpu .*: T4, 3090"):
        find_gpu(None)


def test_a_shape_comes_from_a_folder_or_a_message_says_where_to_get_it(tmp_path):
    config = {**hardware.architecture(Model(path=QWEN)), "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hardware.architecture(Model(path=str(tmp_path))) == config
    with pytest.raises(ValueError, match="hf download some/model config.json"):
        hardware.architecture(Model(path="some/model"))
    config["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mamba' is not known here"):
        hardware.model_shape(Model(path=str(tmp_path))).weight_bytes("bfloat16")
