"""Models of real shapes with random weights, and pairs of random tokens: only shapes matter for speed."""

from __future__ import annotations

import warnings

#: name -> model type; vocabulary, width, MLP, layers, heads, key-value heads, head width; tied head?
#: The first group is for CPUs, the second for GPUs, the last for trying out the program in seconds.
SHAPES = {
    "small-llama": ("llama", (32_000, 256, 768, 2, 4, 2, 64), False),
    "small-qwen2": ("qwen2", (151_936, 256, 768, 2, 4, 2, 64), True),
    "small-gemma2": ("gemma2", (256_000, 256, 768, 2, 4, 2, 64), True),
    "smollm2-135m": ("llama", (49_152, 576, 1536, 30, 9, 3, 64), True),
    "qwen2.5-1.5b": ("qwen2", (151_936, 1536, 8960, 28, 12, 2, 128), True),
    "llama-3-8b": ("llama", (128_256, 4096, 14_336, 32, 32, 8, 128), False),
    "gemma-2-9b": ("gemma2", (256_000, 3584, 14_336, 42, 16, 8, 256), True),
    "quick-llama": ("llama", (32_000, 64, 192, 2, 2, 1, 32), False),
    "quick-gemma2": ("gemma2", (256_000, 64, 192, 2, 2, 1, 32), True),
    "trial-gemma2": ("gemma2", (2_000, 64, 192, 2, 2, 1, 32), True),
}


def random_policy(shape: str, device: str):
    """A model of the given shape with random weights and a LoRA adapter, and how its weights are stored.

    On a GPU the weights are NF4, with gradient checkpointing. On a CPU they are float32.

    Returns:
        peft's model in training mode, and "nf4" or "float32" with the kind of attention.
    """
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    base, kept = random_base(shape, device, nf4=device == "cuda")
    if device == "cuda":
        with warnings.catch_warnings():  # transformers 5.23 renames the method
            warnings.simplefilter("ignore", FutureWarning)
            base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    add_fused_lm_head(base)  # before peft; without `fused_lm_head=True` it changes nothing
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
    return get_peft_model(base, lora).train(), kept


def random_base(shape: str, device: str, nf4: bool):
    """A model of the given shape with random weights, and how they are stored: see `random_policy`.

    It is built layer by layer, so that the 16-bit model need not fit into memory. Without NF4 its
    weights are bfloat16 on a GPU, float32 on a CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sao_utils.engines.registry import free_gpu

    free_gpu()  # releases the previous model
    kind, sizes, tied = SHAPES[shape]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    options = dict(zip([*names, "num_key_value_heads", "head_dim"], sizes))
    options |= dict(tie_word_embeddings=tied, max_position_embeddings=8192, use_cache=False)
    options |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "qwen2":
        options.pop("head_dim")  # qwen2 has no such setting
    whole = AutoConfig.for_model(kind, **options)
    first = AutoConfig.for_model(kind, **{**options, "num_hidden_layers": 1})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(first, dtype=dtype)
    # All parts of the model share one configuration object, so it changes in place.
    for key in ("num_hidden_layers", "layer_types"):
        if hasattr(whole, key):
            vars(base.config)[key] = getattr(whole, key)
    layers, layer = base.model.layers, type(base.model.layers[0])
    del layers[0]
    for index in range(whole.num_hidden_layers):
        with torch.device(device):
            new = layer(base.config, index).to(dtype)
        layers.append(_in_nf4(new, dtype) if nf4 else new)
    base.is_loaded_in_4bit = nf4  # peft checks it
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_(std=sizes[1] ** -0.5)
        base.get_output_embeddings().weight.normal_(std=sizes[1] ** -0.5)
    kept = "nf4" if nf4 else str(dtype).split(".")[-1]
    return base, f"{kept}, attention {base.config._attn_implementation}"


def _in_nf4(module, dtype):
    """The layer with its linear maps in NF4 with double quantisation, as in training."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            options = dict(compress_statistics=True, quant_type="nf4")
            shape = (child.in_features, child.out_features, child.bias is not None)
            linear = Linear4bit(*shape, compute_dtype=dtype, **options, device="meta")
            linear.bias = child.bias
            weight = Params4bit(child.weight.data.cpu(), **options, requires_grad=False)
            linear.weight = weight.to(child.weight.device)  # the move quantises
            setattr(parent, name, linear)
    return module


def random_pairs(sizes: list[tuple[int, int, int]], vocabulary: int, seed: int = 0) -> list[dict]:
    """Pairs of these lengths with random tokens, in the form that `setup.pair_trainer` takes."""
    import numpy as np

    draw = np.random.default_rng(seed).integers
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {"id": str(k), **{key: draw(3, vocabulary, n).tolist() for key, n in zip(keys, size)}}
        for k, size in enumerate(sizes)
    ]
