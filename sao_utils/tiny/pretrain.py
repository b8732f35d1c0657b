"""Train the tiny model again from the grammar: `python -m sao_utils.tiny pretrain`.

A Llama-architecture model of 1.2 M parameters learns, from scratch, to answer questions (as badly as the
villagers), to write the prompts of personas and to rank two answers with the paper's prompt.
Training is seeded; the defaults are those of the model that comes with the kit. With one thread, the same
kind of machine gives the same weights again.

Three things enable a model this small to judge: answers that differ in one flaw only (minimal pairs), a
higher weight on the verdict's digit, and auxiliary losses on hidden states. They predict, at the end of
each sentence, whether it is right, wrong, repeated, off topic or extra, and, at the end of each answer,
how many flaws of each kind it has. The auxiliary heads are thrown away afterwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sao_utils import templates
from sao_utils.oracles import tiny_world as world
from sao_utils.tiny import corpus

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}{{ raise_exception('the tiny model knows the roles user and assistant only') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCE_KINDS = ("right", "wrong", "repeated", "off_topic", "extra", "frame")
SENTENCE_LAYER, ANSWER_LAYER = 3, 4  # the layers whose output the auxiliary heads read
USER_WEIGHT, VERDICT_WEIGHT = 0.1, 4.0


def phrases() -> list[str]:
    """The fixed lines of the prompt templates. As single tokens, they halve the cost of ranking."""
    found = set()
    for name in ("persona", "no_persona", "ranking"):
        marks = dict.fromkeys(("persona", "prompt", "response_1", "response_2"), "\0")
        found.update(re.findall(r"[^\n\0]+\n*|\n+", templates.render(name, **marks)))
    # Longest first. Among equal lengths any fixed order will do; this one is the committed tokenizer's.
    return sorted(found, key=lambda text: (-len(text), hashlib.sha512(text.encode()).hexdigest()))


def build_tokenizer(vocab_size: int, seed: int = 7):
    """A byte-level BPE tokenizer trained on the corpus; the templates' fixed lines are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = []
    for _ in range(4000):
        item = corpus.answer_item(rng)
        texts += [item.user, item.reply, corpus.prompt_item(rng).reply, world.draw_persona(rng)[0]]
    texts += [templates.VERDICT_PREFIX + verdict for verdict in templates.VERDICTS] * 500
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(phrases())
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


@dataclass
class Batch:
    """Padded token ids [B, T], loss weights [B, T] for predicting each token, and auxiliary targets."""

    ids: torch.Tensor
    weights: torch.Tensor
    sentences: torch.Tensor  # [n, 3]: row, position, index into SENTENCE_KINDS
    answers: torch.Tensor  # [m, 2 + len(FLAWS)]: row, position, flaws (0, 1, 2 or more)


def encode(items: list[corpus.Item], tokenizer) -> list[tuple]:
    """Tokenise items; returns (ids, weights, sentence targets, answer targets) for each."""
    texts = [f"{USER}{i.user}{ASSISTANT}{i.reply}{END}" for i in items]
    encoded = []
    for item, enc in zip(
        items, tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ):
        ends = np.array([end for _, end in enc.offsets])
        reply_start = len(USER) + len(item.user) + len(ASSISTANT)
        weights = np.where(ends <= reply_start, 0.0 if item.is_ranking else USER_WEIGHT, 1.0)
        if item.is_ranking:
            digit = reply_start + len(templates.VERDICT_PREFIX) + 2
            weights[np.searchsorted(ends, digit)] = VERDICT_WEIGHT
        sentences, answers = [], []
        for start, text, inspection in item.answers:
            offset = len(USER) + start + (0 if item.is_ranking else len(ASSISTANT))
            for end, kind in inspection.sentences:
                sentences.append((np.searchsorted(ends, offset + end), SENTENCE_KINDS.index(kind)))
            # The token after the answer: the closing marker, or the end of the turn.
            position = np.searchsorted(ends, offset + len(text)) + 1
            answers.append((position, *(min(2, inspection.flaws[f]) for f in world.FLAWS)))
        encoded.append((enc.ids, weights, sentences, answers))
    return encoded


def collate(rows: list[tuple], pad_id: int) -> Batch:
    """Right-pad encoded items into one batch."""
    longest = max(len(ids) for ids, *_ in rows)
    ids = torch.full((len(rows), longest), pad_id)
    weights = torch.zeros(len(rows), longest)
    sentences, answers = [], []
    for i, (tokens, w, s, a) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        weights[i, : len(tokens)] = torch.tensor(w)
        sentences += [(i, *target) for target in s]
        answers += [(i, *target) for target in a]
    sentences = torch.tensor(sentences, dtype=torch.long).view(-1, 3)
    answers = torch.tensor(answers, dtype=torch.long).view(-1, 2 + len(world.FLAWS))
    return Batch(ids, weights, sentences, answers)


def batches(rng: random.Random, tokenizer, makers: dict, tokens: int, pool: int = 16):
    """Yield batches of about `tokens` tokens without end, each of items of similar length.

    Args:
        makers: item maker -> its share of the items.
        pool: how many batches' worth of items are drawn, sorted by length and shuffled at a time.
    """
    pad_id = tokenizer.pad_token_id
    kinds, shares = list(makers), list(makers.values())
    while True:
        drawn, total = [], 0
        while total < tokens * pool:
            chosen = rng.choices(kinds, shares, k=256)
            drawn += encode([make(rng) for make in chosen], tokenizer)
            total = sum(len(row[0]) for row in drawn)
        drawn.sort(key=lambda row: len(row[0]))
        groups, group = [], []
        for row in drawn:
            if group and (len(group) + 1) * len(row[0]) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad_id)


def build_model(tokenizer, seed: int):
    """The untrained model; its architecture is ordinary Llama, so any engine can serve it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.04,
        )
    )


def losses(model, heads: torch.nn.ModuleDict, batch: Batch) -> dict[str, torch.Tensor]:
    """Weighted next-token loss of one batch in bfloat16, and the auxiliary mean cross-entropies."""
    weights = batch.weights[:, 1:].flatten()
    rows = weights.nonzero().squeeze(1)  # logits are computed only where the loss counts
    weights, targets = weights[rows], batch.ids[:, 1:].flatten()[rows]
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16):
        out = model.model(batch.ids, use_cache=False, output_hidden_states=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1].flatten(0, 1)[rows])
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    result = {"text": (nll * weights).sum() / weights.sum()}
    if len(batch.answers):
        for name, layer, at in (
            ("sentence", SENTENCE_LAYER, batch.sentences),
            ("answer", ANSWER_LAYER, batch.answers),
        ):
            found = heads[name](out.hidden_states[layer][at[:, 0], at[:, 1]].float())
            wanted = at[:, 2:].flatten()
            result[name] = F.cross_entropy(found.view(len(wanted), -1), wanted)
    verdict = weights == VERDICT_WEIGHT
    if verdict.any():
        result["verdict"] = nll[verdict].mean()
    return result


def pretrain(
    out: Path,
    steps: int = 3600,
    seed: int = 0,
    tokens: int = 9000,
    peak: float = 3e-3,
    report: int = 100,
    checkpoints: Sequence[int] = (),
) -> None:
    """Train, and save model and tokenizer to `out`, with a log of the losses (pretraining.jsonl).

    Args:
        tokens: tokens per step, including padding: a third in chats, the rest in rankings.
        peak: the highest learning rate.
        report: steps between two lines of the log.
        checkpoints: steps after which the unfinished model, a weaker judge, is saved to out/step-<n>.
    """
    torch.set_num_threads(1)  # otherwise sums may differ between runs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer(1100)
    model = build_model(tokenizer, seed).to(device)
    width = model.config.hidden_size
    heads = torch.nn.ModuleDict(
        {
            "sentence": torch.nn.Linear(width, len(SENTENCE_KINDS)),
            "answer": torch.nn.Linear(width, 3 * len(world.FLAWS)),
        }
    ).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    rng, kinds = random.Random(seed), {corpus.answer_item: 0.75, corpus.prompt_item: 0.25}
    talk = batches(rng, tokenizer, kinds, tokens // 3)
    rng = random.Random(seed + 1)
    rank = batches(rng, tokenizer, {corpus.ranking_item: 1.0}, tokens - tokens // 3)
    out.mkdir(parents=True, exist_ok=True)
    started, seen, recent = time.time(), 0, []
    with open(out / "pretraining.jsonl", "w", encoding="utf-8") as log:
        for step in range(steps):
            # 100 steps of warm-up, then linear decay to 2 % of the peak.
            rate = peak * min((step + 1) / 100, max(0.02, 1 - step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            values = {}
            for name, source in (("talk", talk), ("rank", rank)):
                batch = Batch(*(t.to(device) for t in vars(next(source)).values()))
                parts = losses(model, heads, batch)
                sum(parts.values()).backward()
                values.update({f"{name}.{k}": v.item() for k, v in parts.items()})
                seen += batch.ids.numel()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(values)
            if step + 1 in checkpoints:
                save(copy.deepcopy(model), tokenizer, out / f"step-{step + 1}")
            if (step + 1) % report == 0:
                mean = {k: round(float(np.mean([r[k] for r in recent])), 4) for k in recent[0]}
                seconds = round(time.time() - started)
                row = {"step": step + 1, "tokens": seen, "seconds": seconds, **mean}
                print(json.dumps(row), file=log, flush=True)
                print(row, flush=True)
                recent = []
    save(model, tokenizer, out)


def save(model, tokenizer, folder: Path) -> None:
    """Write the model in bfloat16 (rounding costs nothing measurable here), and the tokenizer."""
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
