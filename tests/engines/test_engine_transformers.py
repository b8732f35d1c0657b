"""The transformers engine: precision, 4 bit, the context, memory that runs out, and sampling."""

import math
import shutil

import pytest
import torch
from small import all_of, save_random_adapter

from sao_utils import templates
from sao_utils.engines import base, loading
from sao_utils.engines.base import EngineError, Sampling
from sao_utils.engines.loading import model_folder
from sao_utils.engines.registry import load_engine
from sao_utils.engines.transformers import _nucleus, transformers_engine
from sao_utils.oracles import tiny_world as world
from sao_utils.recipe import Model

TINY = Model(path="tiny", dtype="float32", batch_tokens=2048)
WORDS = "I am new to chess and rowing so please tell me about the right tool".split()
CHATS = [[{"role": "user", "content": " ".join(WORDS[: 2 + k])}] for k in range(12)]
VERDICTS = (" 1 > 2", " 2 > 1")


@pytest.fixture(scope="module")
def engine():
    return load_engine(TINY)


@pytest.fixture
def own_engine():
    """An engine that a test may spoil."""
    return transformers_engine(TINY, None)


def save_beside_the_tiny_tokenizer(model, folder):
    """A random model with the tiny model's tokenizer and template; its outputs are far from flat."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{model_folder('tiny')}/{name}", folder / name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() > 1 else None
    model.save_pretrained(folder)
    return Model(path=str(folder), dtype="float32")


def small_gemma_2(folder, **settings):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    vocabulary = len(loading.load_tokenizer(TINY))
    sizes = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=96, head_dim=32)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **settings))
    return save_beside_the_tiny_tokenizer(model, folder)


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "asked, capability, expected, why",
    [
        ("auto", (7, 5), "float16", "Tesla T4 has compute capability 7.5, bfloat16 needs 8.0"),
        ("bfloat16", (7, 5), "float16", "bfloat16 needs 8.0"),
        ("auto", (8, 0), "bfloat16", "compute capability 8.0"),
        ("float32", (8, 6), "float32", "model.dtype says so"),
        ("auto", None, "float32", "there is no GPU"),
        ("auto", "AMX", "bfloat16", "the CPU computes in bfloat16"),
        ("float32", "AMX", "float32", "there is no GPU"),
        ("bfloat16", None, "bfloat16", "without a GPU"),
    ],
)
def test_the_dtype_follows_the_machine_with_the_reason(
    monkeypatch, asked, capability, expected, why
):
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: capability == "AMX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: isinstance(capability, tuple))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    dtype, reason = loading.precision(Model(path="tiny", dtype=asked))
    assert dtype == expected and why in reason


# ---------------------------------------------------------------------------- 4 bit, Gemma-2


def test_4_bit_weights_judge_nearly_alike_and_carry_an_adapter(engine, tmp_path):
    save_random_adapter(TINY, tmp_path)
    nf4 = TINY.model_copy(update={"quantisation": "nf4"})

    asked = world.held_out_questions("dev", 1, 0)[:8]
    chats = [[{"role": "user", "content": text}] for text in asked]
    first, second = (
        all_of(engine.generate(chats, Sampling(0.9, 60), range(s, s + 8))) for s in (0, 9)
    )
    ranked = [
        templates.ranking_prompt(q, first[k].text, second[k].text) for k, q in enumerate(asked)
    ]
    chats = [[{"role": "user", "content": text}] for text in ranked]

    def odds(model, folder=None):
        made = transformers_engine(model, folder)
        found = all_of(made.choose(chats, "ranking:", VERDICTS))
        return torch.tensor([found[k] for k in range(8)]).exp(), made

    whole, _ = odds(TINY)
    quantised, made = odds(nf4)
    assert sum(type(m).__name__ == "Linear4bit" for m in made.model.modules()) == 35
    assert 1e-4 < (whole - quantised).abs().mean() < 0.1
    (whole_tuned, _), (tuned, made) = odds(TINY, tmp_path), odds(nf4, tmp_path)
    moved = (whole - whole_tuned).abs().mean()
    assert moved > 0.1 and (tuned - whole_tuned).abs().mean() < moved / 2
    assert all_of(made.generate(CHATS[:2], Sampling(0.6, 8), [1, 2]))[0].tokens


def test_gemma_2_keeps_its_softcap_in_attention(tmp_path):
    """torch's own attention knows none; without it these verdicts differ."""
    made = load_engine(small_gemma_2(tmp_path, attn_logit_softcapping=2.0, query_pre_attn_scalar=1))
    assert made.model.config._attn_implementation == "eager"
    capped = all_of(made.choose(CHATS, "ranking:", VERDICTS))
    for layer in made.model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    free = all_of(made.choose(CHATS, "ranking:", VERDICTS))
    assert max(abs(capped[k][0] - free[k][0]) for k in free) > 0.01


# ---------------------------------------------------------------------------- ended rows


def test_a_batch_is_thinned_out_as_rows_end_and_no_reply_changes(engine, monkeypatch):
    asked = [[{"role": "user", "content": text}] for text in world.held_out_questions("dev", 1, 0)]
    asked, fed = asked[:14], []
    forward = engine.model.forward

    def counted(*args, **kwargs):
        fed.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counted)
    sampling, seeds = Sampling(0.8, 100, 0.95), list(range(14))
    together = all_of(engine.generate(asked, sampling, seeds))
    assert fed[0] == 14 and sorted(fed, reverse=True) == fed and fed[-1] <= 7
    needed = sum(reply.tokens + reply.finished for reply in together.values())
    assert needed <= sum(fed) < 2 * needed and sum(fed) < 0.9 * 14 * len(fed)
    monkeypatch.setattr("sao_utils.engines.transformers.FEW", 10**9)
    assert all_of(engine.generate(asked, sampling, seeds)) == together


def test_a_reply_ends_behind_the_text_that_stops_it_and_is_the_same_before(engine):
    seeds = list(range(len(CHATS)))
    whole, cut = (
        all_of(engine.generate(CHATS, Sampling(0.6, 60, stop=stop), seeds)) for stop in ("", "ing")
    )
    ends = 0
    for k in seeds:
        before, there, after = whole[k].text.partition("ing")
        assert cut[k].text == before + there
        assert cut[k].finished if there else cut[k] == whole[k]
        ends += bool(after)
    assert 0 < ends < len(CHATS)


@pytest.mark.parametrize("known", [True, False])
def test_thinning_out_keeps_a_sliding_window_and_does_without_a_known_cache(
    tmp_path, monkeypatch, known
):
    """Gemma-2 keeps the last tokens only in every other layer."""
    if not known:
        monkeypatch.setattr("transformers.cache_utils.DynamicLayer", type("Other", (), {}))
    made = load_engine(small_gemma_2(tmp_path, sliding_window=6))
    made.stops = list(range(300))  # random weights end somewhere
    chats = CHATS * 2
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, 40)
        together = all_of(made.generate(chats, sampling, list(range(24))))
        assert len({reply.tokens for reply in together.values()}) > 3
        for k in (0, 7, 12, 23):
            assert all_of(made.generate([chats[k]], sampling, [k]))[0] == together[k]


# ---------------------------------------------------------------------------- context


def test_replies_end_where_the_context_does_and_no_row_feels_another(tmp_path, capsys):
    """GPT-2 has no position beyond its context: one token more would be an IndexError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    vocabulary, context = len(loading.load_tokenizer(TINY)), 40
    sizes = dict(vocab_size=vocabulary, n_positions=context, n_embd=32, n_layer=2, n_head=2)
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    made = load_engine(save_beside_the_tiny_tokenizer(GPT2LMHeadModel(config), tmp_path))
    assert base.context_limit(made.model.config) == context
    made.stops = []
    chats = CHATS + [[{"role": "user", "content": " ".join(WORDS * 3)}]]
    lengths = [len(ids) for ids in base.encode(chats, made.tokenizer)]
    assert lengths[-1] > context > lengths[-2] + 2
    new = context - 12
    replies = all_of(made.generate(chats, Sampling(0.7, new), list(range(13))))
    assert base.unanswered(replies[12].tokens, replies[12].finished)
    assert "1 of 13 prompts are longer" in capsys.readouterr().out
    odds = all_of(made.choose(chats, "ranking:", VERDICTS))
    assert odds[12] == [-math.inf, -math.inf] and odds[0][0] < 0
    assert [replies[k].tokens for k in range(12)] == [min(new, context - n) for n in lengths[:12]]
    assert len({replies[k].tokens for k in range(12)}) > 2
    for k in (0, 11):
        assert all_of(made.generate([chats[k]], Sampling(0.7, new), [k]))[0] == replies[k]


# ---------------------------------------------------------------------------- memory


def limit_rows(engine, most):
    """Make the model's forward run out of memory above `most` rows, as a GPU does."""
    forward, seen = engine.model.forward, []

    def limited(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **kwargs)

    engine.model.forward = limited
    return seen


def test_out_of_memory_halves_the_batch_and_loses_no_row(engine, own_engine, capsys):
    sampling, seeds = Sampling(0.8, 12, 0.95), list(range(12))
    expected = all_of(engine.generate(CHATS, sampling, seeds))
    seen = limit_rows(own_engine, 4)
    assert all_of(own_engine.generate(CHATS, sampling, seeds)) == expected
    out = capsys.readouterr().out
    assert out.count("Out of memory") == 2 and "model.batch_tokens=" in out  # 12, 6, 3
    assert seen[:2] == [12, 6] and max(seen[2:]) <= 4
    again = len(seen)
    all_of(own_engine.generate(CHATS, sampling, seeds))  # the smaller budget stays
    assert max(seen[again:]) <= 4


def test_nothing_that_fits_names_the_keys_and_keeps_the_rows_before(own_engine):
    own_engine.batch_tokens = 1  # a row a batch
    limit_rows(own_engine, 1)
    batches = own_engine.generate(CHATS, Sampling(0.0, 4), [0] * 12)
    assert len(next(batches)) == 1
    limit_rows(own_engine, 0)
    with pytest.raises(EngineError, match="model.quantisation=nf4.*max_new_tokens"):
        next(batches)


@pytest.mark.parametrize("verb", ["generate", "choose"])
def test_a_model_that_computes_no_numbers_is_told_before_a_row_is_made(own_engine, verb):
    """As Gemma-2 does in float16."""
    own_engine.model.lm_head.weight.data.fill_(math.nan)
    work = {
        "generate": own_engine.generate(CHATS, Sampling(0.0, 4), [0] * len(CHATS)),
        "choose": own_engine.choose(CHATS, "ranking:", VERDICTS),
    }
    with pytest.raises(EngineError, match="computes NaN for 12 of 12 rows.*model.dtype=bfloat16"):
        next(work[verb])
    own_engine.batch_tokens = 1  # a row a batch
    with pytest.raises(EngineError, match="computes NaN for 8 of 8 rows"):
        all_of(own_engine.choose(CHATS, "ranking:", VERDICTS))


def poison(engine, word):
    """Let the model compute NaN for each row that holds a word, as an overflow in float16 does."""
    (token,) = engine.tokenizer(word, add_special_tokens=False)["input_ids"]
    forward = engine.model.forward

    def poisoned(*args, **kwargs):
        out = forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        held = (ids == token).any(1) if ids.shape[1] > 1 else poisoned.held
        poisoned.held = held[: len(ids)]
        out.logits[poisoned.held] = math.nan
        return out

    engine.model.forward = poisoned


@pytest.mark.parametrize("batch_tokens", [2048, 1])  # at 1 each row is a batch
def test_a_row_without_numbers_has_no_reply_and_does_not_end_the_others(
    engine, own_engine, capsys, batch_tokens
):
    poison(own_engine, " about")
    own_engine.batch_tokens = batch_tokens
    sampling, seeds = Sampling(0.8, 12), list(range(12))
    bad = [k for k, chat in enumerate(CHATS) if "about" in chat[0]["content"]]
    assert len(bad) == 2
    found = all_of(own_engine.generate(CHATS, sampling, seeds))
    expected = all_of(engine.generate(CHATS, sampling, seeds))
    for k in range(12):
        assert found[k] == (base.Completion("", 0, False) if k in bad else expected[k])
    assert f"computes NaN for {len(bad)} of " in capsys.readouterr().out
    odds = all_of(own_engine.choose(CHATS, "ranking:", VERDICTS))
    assert sorted(k for k in odds if odds[k] == [-math.inf] * 2) == bad


# ---------------------------------------------------------------------------- sampling


def sorted_nucleus(p, top_p):
    """By the book: sort all, keep the fewest that hold top_p."""
    ordered, index = p.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(p).scatter(-1, index, ordered)


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_the_nucleus_is_the_sorted_one_whether_a_few_tokens_hold_it_or_all(top_p):
    torch.manual_seed(0)
    p = (torch.randn(16, 5000) / 0.2).softmax(-1)
    for first in (1, 64, 5000):
        assert torch.equal(_nucleus(p, top_p, first), sorted_nucleus(p, top_p))
