"""Small models of the families that the recipes name: true structure, random or memorised weights.

The shapes are those of architectures.yaml, shrunk; every structural field (grouped queries, tied
embeddings, biases, softcaps, sliding window, rope) stays. Tokenizers and templates are our own and
write the format that each family documents.
"""

from importlib.resources import files

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from sao_utils import templates

GEMMA = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{{ bos_token }}
{%- for message in messages -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""
QWEN = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant of this family.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
LLAMA_SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]

#: name -> true model, special tokens, roles of them, template, what closes a turn, what opens the
#: reply, all stops of generation_config.json, and the sizes it is shrunk to.
FAMILIES = {
    "gemma": dict(
        model="google/gemma-2-9b-it",
        special=GEMMA_SPECIAL,
        roles=dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
        template=GEMMA,
        closes="<end_of_turn>",
        opens="<start_of_turn>model\n",
        stops=["<eos>", "<end_of_turn>"],
        shrunk=dict(
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, sliding_window=48
        ),  # heads * head size is not the hidden size, as in Gemma-2-9B
    ),
    "llama": dict(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        special=LLAMA_SPECIAL,
        roles=dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        template=LLAMA,
        closes="<|eot_id|>",
        opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stops=["<|end_of_text|>", "<|eot_id|>"],
        shrunk=dict(num_attention_heads=8, num_key_value_heads=2),
    ),
    "qwen": dict(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        roles=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        template=QWEN,
        closes="<|im_end|>",
        opens="<|im_start|>assistant\n",
        stops=["<|im_end|>", "<|endoftext|>"],
        shrunk=dict(num_attention_heads=8, num_key_value_heads=2),
    ),
}
#: recipe -> the family of its model.
RECIPES = {
    "colab-t4": "qwen",
    "gpu-24gb": "gemma",
    "gpu-24gb-llama": "llama",
    "paper": "gemma",
    "paper-llama": "llama",
}
PROMPT = "Which tea would you drink at 7 or at 12 o'clock?"
ANSWER = "Green tea at 7, and black tea at 12."
TEXTS = [
    templates.render("persona", persona="A tea lover."),
    templates.ranking_prompt(PROMPT, ANSWER, "None."),
    QWEN,
    "ranking: 1 > 2 ranking: 2 > 1 User prompt: 0 1 2 3 4 5 6 7 8 9",
]


def true_config(family: str) -> dict:
    text = (files("sao_utils") / "plan" / "architectures.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)[FAMILIES[family]["model"]]


def small_config(family: str, vocabulary: int, **changes):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=vocabulary)
    shrunk = FAMILIES[family]["shrunk"]
    return AutoConfig.for_model(**{**true_config(family), **sizes, **shrunk, **changes})


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits (Llama-3: up to three); Gemma writes spaces as a letter.

    Like the true ones of Gemma and Llama-3 it puts a BOS before every text unless told not to.
    """
    made = FAMILIES[family]
    if family == "gemma":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), "isolated")
        decoder = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(decoder)
        alphabet, more = [], [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        digits = r"\d{1,3}" if family == "llama" else r"\d"
        words = Regex(r" ?\p{L}+|" + digits + r"| ?[^\s\p{L}\d]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = pre_tokenizers.Split(words, "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, more = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=made["special"] + more,
        initial_alphabet=alphabet,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    bos = made["roles"].get("bos_token")
    if bos:
        single, pair = f"{bos} $A", f"{bos} $A {bos} $B"
        number = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(single, pair, number)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **made["roles"])
    others = [t for t in made["special"] if t not in made["roles"].values()]
    wrapped.add_special_tokens({"additional_special_tokens": others})
    wrapped.chat_template = made["template"]
    return wrapped


def random_model(family: str, tokenizer, **changes):
    torch.manual_seed(0)
    config = small_config(family, len(tokenizer), **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stops = tokenizer.convert_tokens_to_ids(FAMILIES[family]["stops"])
    model.generation_config = GenerationConfig(eos_token_id=stops)
    return model


def memorise(model, tokenizer, dialogue: list[tuple[str, str]], steps: int) -> None:
    """Teach a model to reply as in (user, assistant) pairs: it sees what training sees."""
    from sao_utils.training.encoding import encode

    rows = []
    for user, assistant in dialogue:
        pair = {"id": "memorised", "prompt": [{"role": "user", "content": user}]}
        pair["chosen"] = [{"role": "assistant", "content": assistant}]
        rows.append(encode(pair, "chosen", tokenizer))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in rows])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows])
    labels = torch.tensor([k + [-100] * (longest - len(k)) for _, k in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


def save(model, tokenizer, folder) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
