"""A small sentence encoder with random weights, as a sentence-embedding model is kept on a disk."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = "[PAD] [UNK] [CLS] [SEP] how do I bake bread is baked at home prove that two and are four".split()


def save_encoder(folder):
    """Keep a random BERT and its tokenizer in a folder, in safetensors; returns both."""
    torch.manual_seed(0)
    vocabulary = {word: k for k, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    encoder = BertModel(config).eval()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return encoder, tokenizer
