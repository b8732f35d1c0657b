"""The API engine against a real server on loopback that limits, refuses, fails and dawdles.

What it says when a language model stands behind the server: tests/test_engine_vllm.py.
"""

import math
import time

import pytest
from scripted_server import KEY, failure, reply, settings, steps
from small import all_of

from sao_utils import store as rows
from sao_utils.engines import api as engine_api
from sao_utils.engines import requests as module
from sao_utils.engines.api import HARMLESS, ApiEngine
from sao_utils.engines.base import NOTHING, Completion, EngineError, Sampling
from sao_utils.engines.registry import load_engine
from sao_utils.engines.verdicts import SURE, read_verdict
from sao_utils.methods import sao

CHOICES, LETTERS = (" 1 > 2", " 2 > 1"), ("m", "M")
LIKELY = {" 1": math.log(0.9), " 2": math.log(0.08), " 3": math.log(0.01)}
VLLM = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm"}


def engine_for(server, **more):
    return ApiEngine(settings(server, **more))


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def generate(engine, *texts):
    return all_of(engine.generate(chats(*texts), Sampling(0.0, 5), [0] * len(texts)))


def choose(engine, *texts):
    return all_of(engine.choose(chats(*texts), "ranking:", CHOICES))


# ---------------------------------------------------------------------------- requests


def test_a_request_has_every_setting_and_a_completion_text_tokens_and_whether_it_ended(server):
    """A vLLM server takes a model's generation_config for what a request leaves out."""
    server.answers["b"] = [(200, reply("cut", finish="length"), {})]
    engine = engine_for(server, template_options={"enable_thinking": False})
    found = all_of(engine.generate(chats("a", "b"), Sampling(0.6, 7, 0.9), [2**62, 5]))
    assert found == {0: Completion("You said a", 3, True), 1: Completion("cut", 3, False)}
    asked = next(r for r in server.requests if r["messages"][-1]["content"] == "a")
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.6, 0.9, 7)
    assert asked["presence_penalty"] == asked["frequency_penalty"] == 0
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked["model"] == "m" and asked["seed"] == 2**62 % 2**31
    assert asked["key"] == f"Bearer {KEY}"
    assert "top_k" not in asked, "another server may refuse what is no name of OpenAI's"
    server.models = (200, {"object": "list", "data": [VLLM]}, {})
    generate(engine_for(server), "c")
    asked = server.requests[-1]
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (-1, 0.0, 1.0)


def test_no_more_requests_at_a_time_than_allowed_and_a_slow_one_holds_up_no_other(server):
    texts = ["slow", *(str(k) for k in range(11))]
    server.answers["slow"] = [(200, reply("late"), {"slow": "1.0"})]
    engine = engine_for(server, concurrency=3)
    batches = list(engine.generate(chats(*texts), Sampling(0, 5), [0] * 12))
    assert server.most == 3 and batches[-1][0][0] == 0
    assert all_of(batches[:-1]) == {
        k: Completion(f"You said {k - 1}", 3, True) for k in range(1, 12)
    }


def test_openai_has_its_own_name_for_the_limit_and_nobody_gets_a_key_unasked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setattr(engine_api, "OPENAI", "127.0.0.1")
    unnamed = settings(server).model_copy(update={"key_variable": None})
    generate(ApiEngine(unnamed), "a")
    asked = server.requests[-1]
    assert asked["max_completion_tokens"] == 5 and "max_tokens" not in asked
    assert "sk-openai" not in asked["key"]


# ---------------------------------------------------------------------------- refusals, faults


def test_a_rate_limit_is_waited_for_as_the_server_says_and_a_stumble_is_asked_again(server):
    fine = (200, reply("at last"), {})
    server.answers["a"] = [failure(429, "slow down", **{"Retry-After": "1"}), fine]
    server.answers["b"] = [failure(500, "oops"), failure(503, "busy"), fine]
    started = time.monotonic()
    assert {r.text for r in generate(engine_for(server), "a", "b").values()} == {"at last"}
    assert time.monotonic() - started >= 1.0
    server.answers["c"] = [failure(429, "slow down")]
    with pytest.raises(EngineError, match="slow down(.|\n)*model.concurrency(.|\n)*run again"):
        generate(engine_for(server), "c")
    assert len(server.requests) == 2 + 3 + 1 + engine_api.RETRIES


def test_a_row_that_the_server_refuses_gets_no_reply_and_the_others_go_on(server, capsys):
    """In whichever words: a harmless question with the same settings is answered."""
    server.answers["bad"] = [failure(400, "Content Exists Risk")]
    server.answers["rude"] = [(200, reply("", finish="content_filter"), {})]
    engine = engine_for(server)
    found = generate(engine, "a", "bad", "rude")
    assert found[1] == found[2] == NOTHING and found[0].finished
    assert engine.usage == {0: (5, 3), 1: (0, 0), 2: (5, 3)}
    printed = capsys.readouterr().out
    assert "refused 1 of 3 rows" in printed and "Content Exists Risk" in printed
    asked = {r["messages"][-1]["content"]: {**r, "messages": None} for r in server.requests}
    assert asked[HARMLESS] == asked["bad"]
    assert choose(engine_for(server), "bad")[0] == [-math.inf, -math.inf]


def test_a_fault_of_the_settings_loses_no_row(server, results):
    words = "temperature must be 1, by policy"
    server.answers = type("All", (dict,), {"get": lambda *_: [failure(400, f"{words} {KEY}")]})()
    run = rows.open_run("tiny", "fault")
    requests = [{"chat": chat, "sampling": Sampling(0.0, 3)} for chat in chats("a", "b")]
    with pytest.raises(EngineError, match=f"{words}(.|\\n)*change the setting") as told:
        module.replies(run, "s", settings(server), requests)
    assert KEY not in str(told.value)
    assert rows.read_rows(run.rows("s")) == []


@pytest.mark.parametrize(
    "answer, words",
    [
        (failure(401, f"odd: your key {KEY}", slow="0.3"), "key_variable"),
        (failure(404, f"odd {KEY}", slow="0.3"), "model's name"),
        ((200, {"error": {"message": f"odd {KEY}"}}, {"slow": "0.3"}), "no reply in its answer"),
    ],
    ids=["key", "model", "fault as an answer"],
)
def test_other_faults_stop_with_advice_and_keep_what_is_finished(server, answer, words):
    server.answers["bad"] = [answer]
    finished = []
    with pytest.raises(EngineError, match=f"(?s){words}") as stopped:
        for batch in engine_for(server, concurrency=2).generate(
            chats("a", "bad", "b", "c"), Sampling(0, 5), [0] * 4
        ):
            finished += [index for index, _ in batch]
    assert {0, 2, 3} <= {*finished}
    assert "odd" in str(stopped.value) and "run again" in str(stopped.value)
    assert KEY not in str(stopped.value) and stopped.value.__cause__ is None


def test_a_server_that_is_gone_or_a_wrong_or_missing_key_is_told_at_once(server, monkeypatch):
    server.models = failure(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(EngineError, match="key_variable") as stopped:
        engine_for(server)
    assert KEY not in str(stopped.value)
    with pytest.raises(EngineError, match="Is the server running"):
        load_engine(settings(server).model_copy(update={"url": "http://127.0.0.1:9/v1"}))
    monkeypatch.delenv("SAO_TEST_KEY")
    with pytest.raises(EngineError, match="environment variable SAO_TEST_KEY"):
        engine_for(server)


# ---------------------------------------------------------------------------- verdicts


def test_a_verdict_is_read_where_the_reply_names_its_choice(server):
    first = {"ranking": -0.1, "1": -4.0}
    server.answers["a"] = [
        (200, reply("x", steps(("ranking", first), (":", {":": 0.0}), (" 1", LIKELY))), {})
    ]
    server.answers["b"] = [(200, reply("x", steps(("No", {"No": -0.1, "1": -3.0}))), {})]
    server.answers["silent"] = [(200, reply("", {"content": []}), {})]
    found = choose(engine_for(server), "a", "b", "silent")
    assert found[0] == pytest.approx([math.log(0.9), math.log(0.08)])
    assert found[1] == found[2] == [-math.inf, -math.inf]
    asked = server.requests[0]
    assert asked["temperature"] == 0 and asked["logprobs"] and asked["top_logprobs"] == 20
    assert asked["messages"][-1]["role"] == "user" and "continue_final_message" not in asked


def test_a_vllm_server_is_made_to_begin_with_the_prefix(server):
    server.models = (200, {"object": "list", "data": [VLLM]}, {})
    server.answers["ranking:"] = [(200, reply("x", steps((" 1", LIKELY))), {})]
    assert choose(engine_for(server), "a")[0] == pytest.approx([math.log(0.9), math.log(0.08)])
    asked = server.requests[0]
    assert asked["messages"][-1] == {"role": "assistant", "content": "ranking:"}
    assert asked["continue_final_message"] and not asked["add_generation_prompt"]


@pytest.mark.parametrize(
    "choices, said, expected",
    [
        # A bare blank comes first.
        (CHOICES, [{" ": 0.9, "1": 0.01}, {"2": 0.8, "1": 0.15, " 1": 0.05}], [0.2, 0.8]),
        (CHOICES, [{"1": 0.6, "10": 0.1, "1>": 0.1, " 2 >": 0.1, "2nd": 0.05}], [0.7, 0.1]),
        # One that is not reported has the least of those that are, or what is left.
        (CHOICES, [{" 1": 0.99, "x": 0.001}], [0.99, 0.001]),
        (CHOICES, [{" 1": 0.99}], [0.99, 0.01]),
        (CHOICES, [{" 1": 1.0}], [1.0, SURE]),
        (CHOICES, [{"x": 0.5, "1": 0.1}], [0.1, 0]),  # may be as likely as the other
        # Of one letter, as in alpaca_eval: nothing but that letter, and a missing one has none.
        (LETTERS, [{"Model": 0.95, "The": 0.03}, {" m": 0.9, " M": 0.1}], [0, 0]),
        (LETTERS, [{"m": 0.97, "The": 0.01, "Both": 0.005}], [0.97, 0]),
        (LETTERS, [{" M": 0.6, "m": 0.3, "**m": 0.1}], [0.4, 0.6]),
        # A server may say -9999 for what it does not reckon with.
        (LETTERS, [{"m": 0.9, "M": 0}], [0.9, 0]),
        (CHOICES, [{" 1": 0.9, " 2": 0}], [0.9, 0.1]),
        (CHOICES, [{" 1": 0.9, "x": 0}], [0.9, 0.1]),
        (CHOICES, [{" 1": 0, " 2": 0}], [0, 0]),
    ],
)
def test_a_choice_has_the_probability_of_the_tokens_that_begin_it(choices, said, expected):
    found = read_verdict(tokens(said), "", choices)
    assert [math.exp(p) for p in found] == pytest.approx(expected)


def tokens(steps):
    """Tokens with their alternatives, from probabilities."""
    logps = lambda p: {token: math.log(q) if q else -9999.0 for token, q in p.items()}  # noqa: E731
    return [(next(iter(p)), logps(p)) for p in steps]


def test_a_server_without_log_probabilities_is_told_to_be_sampled(server):
    bare = steps((" 1", {}))
    bare["content"][0]["top_logprobs"] = None
    for logprobs in (None, bare):
        server.answers["a"] = [(200, reply("1", logprobs), {})]
        with pytest.raises(EngineError, match="judging.method=sampled.*AlpacaEval.*another judge"):
            choose(engine_for(server), "a")


def test_a_judge_behind_a_url_judges_a_stage_and_its_key_is_nowhere(server, results):
    judge = {f"judge.{key}": value for key, value in settings(server).model_dump().items()}
    run = rows.open_run("tiny", "api", {**judge, "prompts.count": 6})
    likely = steps(("ranking", {"ranking": 0.0}), (":", {":": 0.0}), (" 1", LIKELY))
    every_prompt = type("Any", (dict,), {"get": lambda *_: [(200, reply("x", likely), {})]})
    server.answers = every_prompt()
    verdicts = sao.rows(run, "verdicts")
    judged = [row for row in verdicts if row["outcome"] != "identical"]
    assert judged and {row["outcome"] for row in judged} == {"inconsistent"}
    assert all(row["margin_12"] == pytest.approx(math.log(0.9 / 0.08)) for row in judged)
    assert len(server.requests) == 2 * len(judged)
    for file in results.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()
    engine = load_engine(run.recipe.judging_model)
    assert KEY not in repr(engine) + str(vars(engine))
