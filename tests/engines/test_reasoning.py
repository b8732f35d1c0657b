"""Models that think: reasoning is parted from the reply, kept, and goes nowhere else."""

import json
import shutil
from types import SimpleNamespace

import pytest

from sao_utils.engines.api import _completion
from sao_utils.engines.base import Completion, unanswered
from sao_utils.engines.loading import load_tokenizer, model_folder, model_name
from sao_utils.engines.reasoning import opens_reasoning, read_reply, split_reasoning
from sao_utils.engines.registry import load_engine
from sao_utils.methods import sao
from sao_utils.recipe import Model
from sao_utils.store import open_run, read_rows


@pytest.mark.parametrize(
    "text, opened, reasoning, reply",
    [
        ("A plain reply.", False, "", "A plain reply."),
        ("<think>Hm.</think>\n\nYes.", False, "Hm.", "Yes."),
        ("Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("<think>a <think>b</think> c</think> d", False, "a <think>b</think> c", "d"),
        ("<think>a</think></think> b", False, "a", "b"),
        ("<think>It never ends", False, "It never ends", ""),
        ("It never ends", True, "It never ends", ""),
        ("Write <think> to think.", False, "", "Write <think> to think."),
    ],
)
def test_replies_that_carry_break_and_nest_the_markers(text, opened, reasoning, reply):
    assert split_reasoning(text, opened) == (reasoning, reply)


TEMPLATE = """{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking
 %}<think>

</think>

{% elif open_thinking is defined %}<think>
{% endif %}{% endif -%}"""


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """The tiny model with a chat template that takes enable_thinking, as Qwen3's does."""
    folder = tmp_path_factory.mktemp("models") / "thinks"
    shutil.copytree(model_folder("tiny"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return lambda **options: Model(path=str(folder), dtype="float32", template_options=options)


def test_template_options_reach_every_use_of_the_template_and_the_models_name(thinking):
    chat = [{"role": "user", "content": "Hi"}]

    def prompt(**options):
        tokenizer = load_tokenizer(thinking(**options))
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    assert prompt().endswith("<|assistant|>")
    assert prompt(enable_thinking=False).endswith("</think>\n\n")
    assert model_name(thinking()) != model_name(thinking(enable_thinking=False))
    assert not opens_reasoning(load_tokenizer(thinking(enable_thinking=False)))
    assert opens_reasoning(load_tokenizer(thinking(open_thinking=True)))


def test_a_reply_that_is_all_reasoning_counts_as_no_reply():
    tokenizer = load_tokenizer(Model(path="tiny"))
    ids = tokenizer("a net and a bow", add_special_tokens=False)["input_ids"]
    lost = read_reply(tokenizer, ids, True, opened=True)
    assert unanswered(lost.tokens, lost.finished) and lost.text == "" and lost.reasoning
    kept = read_reply(tokenizer, ids, True, opened=False)
    assert (kept.text, kept.tokens, kept.reasoning) == ("a net and a bow", len(ids), "")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", None])
def test_a_servers_reasoning_is_parted_whether_it_names_it_or_not(name):
    thought = {name: "Hm."} if name else {}
    content = "Yes." if name else "<think>Hm.</think>Yes."
    message = SimpleNamespace(content=content, **thought)
    choice = SimpleNamespace(message=message, finish_reason="stop")
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=9)
    found = _completion(SimpleNamespace(choices=[choice], usage=usage))
    assert (found.text, found.reasoning, found.finished) == ("Yes.", "Hm.", True)


def test_reasoning_is_kept_in_its_row_and_in_no_prompt_verdict_or_pair(results, monkeypatch):
    """An engine that thinks before it says what the tiny model says."""
    tiny = load_engine(Model(path="tiny", dtype="float32", batch_tokens=24576))

    class Thinks:
        name, tokenizer = "thinks", tiny.tokenizer

        def generate(self, chats, sampling, seeds):
            for batch in tiny.generate(chats, sampling, seeds):
                yield [
                    (k, Completion(r.text, r.tokens, r.finished, "SECRET thought"))
                    for k, r in batch
                ]

        def choose(self, chats, prefix, choices):
            assert not any("SECRET" in m["content"] for chat in chats for m in chat)
            yield from tiny.choose(chats, prefix, choices)

    monkeypatch.setattr("sao_utils.engines.requests.load_engine", lambda _: Thinks())
    run = open_run("tiny", "thinks", {"prompts.count": 24})
    made = sao.rows(run, "pairs")
    for stage in ("prompts", "responses"):
        rows = read_rows(run.rows(stage))
        assert rows and all(row["reasoning"] == "SECRET thought" for row in rows)
    assert not any("SECRET" in (row["prompt"] or "") for row in sao.rows(run, "prompts"))
    assert made and "SECRET" not in json.dumps(made)
    assert "SECRET" not in run.rows("verdicts").read_text()
