"""The API engine against a real server on loopback that limits, refuses, fails and dawdles.

What it says when a language model stands behind the server: tests/test_engine_vllm.py.
"""

import math
import time
from email.utils import formatdate

import pytest
from scripted_server import KEY, failure, reply, settings, steps

from sao_utils import store as rows
from sao_utils.engines import api as engine_api
from sao_utils.engines import requests as module
from sao_utils.engines import verdicts
from sao_utils.engines.api import HARMLESS, ApiEngine, asked_to_wait
from sao_utils.engines.base import Completion, EngineError, Sampling
from sao_utils.engines.loading import model_name
from sao_utils.engines.registry import load_engine
from sao_utils.methods import sao
from sao_utils.recipe import Model

CHOICES = (" 1 > 2", " 2 > 1")
LIKELY = {" 1": math.log(0.9), " 2": math.log(0.08), " 3": math.log(0.01)}


def engine_for(server, **more):
    model = settings(server, **more)
    return ApiEngine(model, None, model_name(model))


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def all_of(batches):
    return dict(pair for batch in batches for pair in batch)


def test_completions_carry_text_tokens_and_whether_they_ended(server):
    server.answers["b"] = [(200, reply("cut", finish="length"), {})]
    found = all_of(engine_for(server).generate(chats("a", "b"), Sampling(0.6, 7, 0.9), [2**62, 5]))
    assert found == {0: Completion("You said a", 3, True), 1: Completion("cut", 3, False)}
    asked = next(r for r in server.requests if r["messages"][-1]["content"] == "a")
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.6, 0.9, 7)
    assert asked["model"] == "m" and asked["seed"] == 2**62 % 2**31
    assert asked["key"] == f"Bearer {KEY}"


def test_no_more_requests_at_a_time_than_asked_for(server):
    texts = [str(k) for k in range(12)]
    found = all_of(
        engine_for(server, concurrency=3).generate(chats(*texts), Sampling(0, 5), [0] * 12)
    )
    assert [found[k].text for k in range(12)] == [f"You said {k}" for k in range(12)]
    assert server.most == 3


def test_a_slow_row_does_not_hold_up_the_others(server):
    server.answers["slow"] = [(200, reply("late"), {"slow": "1.0"})]
    order = [
        index
        for batch in engine_for(server).generate(chats("slow", "a", "b"), Sampling(0, 5), [0] * 3)
        for index, _ in batch
    ]
    assert order[-1] == 0


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(server):
    server.answers["a"] = [
        failure(429, "slow down", **{"Retry-After": "1"}),
        (200, reply("at last"), {}),
    ]
    started = time.monotonic()
    found = all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))
    assert found[0].text == "at last" and time.monotonic() - started >= 1.0


def test_a_rate_limit_that_outlasts_the_clients_tries_is_still_waited_for(server, capsys):
    tries = [failure(429, "slow down")] * (engine_api.RETRIES + 2)
    server.answers["a"] = [*tries, (200, reply("at last"), {})]
    assert all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))[0].text == "at last"
    assert "limits the rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked",
    [
        lambda: {"Retry-After": "1.2"},
        lambda: {"retry-after-ms": "1200"},
        lambda: {"Retry-After": formatdate(time.time() + 2.5, usegmt=True)},  # of whole seconds
    ],
    ids=["seconds", "milliseconds", "date"],
)
def test_a_wait_longer_than_the_client_takes_is_slept_and_not_asked_through(
    server, monkeypatch, asked
):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_AFTER_DELAY", 0.1)
    server.answers["a"] = [failure(429, "slow", **asked()), (200, reply("at last"), {})]
    started = time.monotonic()
    found = all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))
    assert found[0].text == "at last" and time.monotonic() - started >= 1.2
    assert len(server.requests) == 2


def test_a_rate_limit_without_end_is_asked_a_few_times_and_told(server, monkeypatch):
    monkeypatch.setattr(engine_api, "PATIENCE", 3.0)
    monkeypatch.setattr(engine_api, "PAUSE", 1.0)
    server.answers["a"] = [failure(429, "slow down")]
    with pytest.raises(EngineError, match="slow down(.|\n)*run again later"):
        all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))
    assert len(server.requests) <= 3 * (1 + engine_api.RETRIES)
    server.answers["b"], before = [failure(429, "slow", **{"Retry-After": "4000.5"})], time.time()
    with pytest.raises(EngineError, match="run again later"):
        all_of(engine_for(server).generate(chats("b"), Sampling(0, 5), [0]))
    assert time.time() - before < 2  # longer than we have patience: told at once
    assert sum(r["messages"][-1]["content"] == "b" for r in server.requests) == 1


def test_a_fault_of_another_row_wakes_those_that_wait(server, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_AFTER_DELAY", 0.1)
    server.answers["wait"] = [failure(429, "slow", **{"Retry-After": "600"})]
    server.answers["bad"] = [failure(401, "no key", slow="0.3")]
    started = time.monotonic()
    with pytest.raises(EngineError):
        all_of(engine_for(server).generate(chats("wait", "bad"), Sampling(0, 5), [0] * 2))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"retry-after": "200.5"}, 200.5),
        ({"retry-after": "30", "retry-after-ms": "180000"}, 180),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "inf", "retry-after-ms": "x"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_what_a_server_asks_to_wait_is_read_in_every_form(headers, seconds):
    assert asked_to_wait(headers) == seconds


def test_a_date_to_wait_for_is_read():
    asked = {"retry-after": formatdate(time.time() + 300, usegmt=True)}
    assert asked_to_wait(asked) == pytest.approx(300, abs=3)


def test_a_used_up_quota_stops_at_once(server):
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    server.answers["a"] = [(429, body, {})]
    with pytest.raises(EngineError, match="quota is used up"):
        all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))


def test_a_server_that_stumbles_is_asked_again(server):
    server.answers["a"] = [failure(500, "oops"), failure(503, "busy"), (200, reply("fine"), {})]
    assert all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))[0].text == "fine"


def test_a_row_that_the_server_refuses_is_empty_and_the_others_go_on(server, capsys):
    server.answers["long"] = [failure(400, "This model's maximum context length is 10 tokens.")]
    server.answers["rude"] = [(200, reply("", finish="content_filter"), {})]
    found = all_of(engine_for(server).generate(chats("a", "long", "rude"), Sampling(0, 5), [0] * 3))
    assert found[1] == found[2] == Completion("", 0, False) and found[0].finished
    told = capsys.readouterr().out
    assert "refused 1 of 3 rows" in told and "maximum context length" in told
    verdicts = all_of(engine_for(server).choose(chats("long"), "ranking:", CHOICES))
    assert verdicts[0] == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    "words",
    [
        "Content Exists Risk",
        "data_inspection_failed",
        "Your prompt was flagged",
        "Prompt is too big",
    ],
)
def test_a_refusal_in_any_words_is_the_rows_own_when_a_harmless_one_is_answered(server, words):
    server.answers["bad"] = [failure(400, words)]
    for texts in (("a", "bad", "b"), ("bad",)):  # also when only that row is left
        found = all_of(engine_for(server).generate(chats(*texts), Sampling(0, 5), [0] * 3))
        refused = texts.index("bad")
        assert found.pop(refused) == Completion("", 0, False)
        assert all(row.finished for row in found.values())
    harmless = [r for r in server.requests if r["messages"][-1]["content"] == HARMLESS]
    bad = next(r for r in server.requests if r["messages"][-1]["content"] == "bad")
    assert len(harmless) == 2
    assert {**harmless[0], "messages": None} == {**bad, "messages": None}  # the same settings


@pytest.mark.parametrize("words", ["temperature must be 1, by policy", "no seed in this context"])
def test_a_fault_of_the_settings_loses_no_row(server, words, results):
    server.answers = type("All", (dict,), {"get": lambda *_: [failure(400, f"{words} {KEY}")]})()
    run = rows.open_run("tiny", "fault")
    requests = [{"chat": chat, "sampling": Sampling(0.0, 3)} for chat in chats("a", "b")]
    with pytest.raises(EngineError, match=f"{words}(.|\\n)*change the setting") as told:
        module.replies(run, "s", settings(server), requests)
    assert KEY not in str(told.value)
    assert rows.read_rows(run.rows("s")) == []


@pytest.mark.parametrize(
    "words",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context "
        "length is 512 tokens and your request has 60 input tokens.",
        "max_tokens is too large: 2048. This model supports at most 512 completion tokens.",
    ],
)
def test_a_reply_longer_than_the_servers_context_is_asked_for_as_long_as_it_goes(
    server, capsys, words
):
    server.answers["a"] = [failure(400, words), (200, reply("cut", finish="length"), {})]
    server.answers["b"] = [failure(400, words), (200, reply("ended"), {})]
    engine = engine_for(server)
    found = all_of(engine.generate(chats("a", "b"), Sampling(0.6, 2048), [0] * 2))
    assert found == {0: Completion("cut", 3, False), 1: Completion("ended", 3, True)}
    asked = [r for r in server.requests if r["messages"][-1]["content"] == "a"]
    assert [r.get("max_tokens") for r in asked] == [2048, None]
    assert not any("max_completion_tokens" in r for r in server.requests)
    assert "2 of 2 replies got fewer tokens" in capsys.readouterr().out


def test_a_row_that_is_too_large_for_what_stands_before_a_server_does_not_end_the_others(server):
    server.answers["huge"] = [failure(413, "Request Entity Too Large")]
    engine = engine_for(server)
    made = all_of(engine.generate(chats("huge", "b"), Sampling(0.6, 7), [1, 2]))
    assert made == {0: Completion("", 0, False), 1: Completion("You said b", 3, True)}


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": None, "completion_tokens": None}])
def test_a_server_that_counts_no_tokens_is_counted_by_words(server, usage):
    server.answers["a"] = [(200, {**reply("two words"), "usage": usage}, {})]
    engine = engine_for(server)
    made = all_of(engine.generate(chats("a"), Sampling(0.6, 7), [1]))
    assert made == {0: Completion("two words", 2, True)} and engine.usage == {}


def test_a_judge_that_says_nothing_of_a_row_does_not_end_the_others(server):
    server.answers["a"] = [(200, reply("", {"content": []}), {})]
    server.answers["b"] = [(200, reply("ranking: 1", steps(("ranking:", {}), (" 1", LIKELY))), {})]
    made = all_of(engine_for(server).choose(chats("a", "b"), "ranking:", CHOICES))
    assert made[0] == [-math.inf, -math.inf] and made[1][0] > made[1][1] > -math.inf


def test_half_a_character_at_the_end_of_a_cut_reply_can_be_kept(server, results):
    server.answers["a"] = [(200, reply("Hello \ud83d\ude00 \ud83d", finish="length"), {})]
    run, model = rows.open_run("tiny", "halves"), settings(server)
    request = {"chat": [{"role": "user", "content": "a"}], "sampling": Sampling(0.0, 3)}
    (row,) = module.replies(run, "s", model, [request])
    assert row["text"] == "Hello \U0001f600 \ufffd"
    assert rows.read_rows(run.rows("s")) == [row]


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "SAO_TEST_KEY"),
        (403, "SAO_TEST_KEY"),
        (404, "model's name"),
        (500, "kept"),
        (400, "odd"),
    ],
)
def test_other_faults_stop_with_advice_and_keep_what_is_finished(server, status, words):
    server.answers["bad"] = [failure(status, f"odd: your key {KEY}", slow="0.3")]
    server.answers[HARMLESS] = [failure(status, "odd")]
    finished = []
    with pytest.raises(EngineError, match=words) as stopped:
        for batch in engine_for(server, concurrency=2).generate(
            chats("a", "bad", "b", "c"), Sampling(0, 5), [0] * 4
        ):
            finished += [index for index, _ in batch]
    assert {0, 2, 3} <= {*finished}
    assert KEY not in str(stopped.value) and stopped.value.__cause__ is None


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": f"all machines are busy, {KEY}"}},
        "busy",
        {"choices": [], "busy": KEY},
        {"choices": [{"index": 0, "message": None, "finish_reason": "busy"}]},
    ],
    ids=["error", "text", "empty", "no message"],
)
def test_a_fault_that_is_sent_as_an_answer_is_told_as_a_fault(server, body):
    """Servers that pass requests on to others do that, with status 200."""
    server.answers["a"] = [(200, body, {})]
    with pytest.raises(EngineError, match="no reply in its answer.*busy(.|\n)*run again") as told:
        all_of(engine_for(server).generate(chats("a"), Sampling(0, 5), [0]))
    assert KEY not in str(told.value)


def test_a_key_is_taken_out_before_a_long_message_is_cut(server):
    told = engine_for(server)._stop(ValueError("y" * (500 - len(KEY) // 2) + KEY))
    assert "***" in str(told) and KEY[:8] not in str(told)


def test_a_server_that_is_gone_or_a_wrong_key_is_told_when_the_engine_is_loaded(server):
    server.models = failure(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(EngineError, match="SAO_TEST_KEY") as stopped:
        engine_for(server)
    assert KEY not in str(stopped.value)
    with pytest.raises(EngineError, match="Is the server running"):
        load_engine(settings(server).model_copy(update={"url": "http://127.0.0.1:9/v1"}))


def test_a_far_server_without_a_key_says_which_variable_to_set(monkeypatch):
    monkeypatch.delenv("SAO_TEST_KEY", raising=False)
    model = Model(path="m", engine="api", url="https://far.invalid/v1", key_variable="SAO_TEST_KEY")
    with pytest.raises(EngineError, match="environment variable SAO_TEST_KEY"):
        load_engine(model)


def test_openais_key_goes_to_openai_only(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    unnamed = settings(server).model_copy(update={"key_variable": None})
    engine = ApiEngine(unnamed, None, "x")
    assert engine._client.api_key == "none"
    monkeypatch.delenv("OPENAI_API_KEY")
    openai = unnamed.model_copy(update={"url": "https://api.openai.com/v1"})
    with pytest.raises(EngineError, match="environment variable OPENAI_API_KEY"):
        ApiEngine(openai, None, "x")


def test_an_adapter_cannot_go_to_a_server(server, tmp_path):
    with pytest.raises(EngineError, match="adapter"):
        ApiEngine(settings(server), tmp_path, "x")


def test_newer_models_get_their_limit_under_its_newer_name(server):
    advice = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.answers["a"] = [failure(400, advice), (200, reply("fine"), {})]
    engine = engine_for(server)
    assert all_of(engine.generate(chats("a"), Sampling(0, 5), [0]))[0].text == "fine"
    assert server.requests[-1]["max_completion_tokens"] == 5
    assert "max_tokens" not in server.requests[-1]


def test_a_verdict_is_read_where_the_reply_names_its_choice(server):
    first = {"ranking": -0.1, "1": -4.0}
    server.answers["a"] = [
        (200, reply("x", steps(("ranking", first), (":", {":": 0.0}), (" 1", LIKELY))), {})
    ]
    server.answers["b"] = [(200, reply("x", steps(("No", {"No": -0.1, "1": -3.0}))), {})]
    found = all_of(engine_for(server).choose(chats("a", "b"), "ranking:", CHOICES))
    assert found[0] == pytest.approx([math.log(0.9), math.log(0.08)])
    assert found[1] == [-math.inf, -math.inf]
    asked = server.requests[0]
    assert asked["temperature"] == 0 and asked["logprobs"] and asked["top_logprobs"] == 20
    assert asked["messages"][-1]["role"] == "user" and "continue_final_message" not in asked


def test_a_vllm_server_is_made_to_begin_with_the_prefix(server):
    card = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm"}
    server.models = (200, {"object": "list", "data": [card]}, {})
    server.answers["ranking:"] = [(200, reply("x", steps((" 1", LIKELY))), {})]
    found = all_of(engine_for(server).choose(chats("a"), "ranking:", CHOICES))
    assert found[0] == pytest.approx([math.log(0.9), math.log(0.08)])
    asked = server.requests[0]
    assert asked["messages"][-1] == {"role": "assistant", "content": "ranking:"}
    assert asked["continue_final_message"] and not asked["add_generation_prompt"]


def test_a_bare_blank_before_the_choice_is_passed_over():
    tokens = [(" ", {" ": -0.1, "1": -9.0}), ("2", {"2": -0.2, "1": -1.8, " 1": -5.0})]
    first, second = verdicts.read_verdict(tokens, "", CHOICES)
    assert second == pytest.approx(-0.2)
    assert first == pytest.approx(math.log(math.exp(-1.8) + math.exp(-5.0)))


def test_a_choice_too_unlikely_to_be_reported_gets_the_least_alternative():
    found = verdicts.read_verdict([(" 1", {" 1": -0.001, "x": -8.0})], "", CHOICES)
    assert found == pytest.approx([-0.001, -8.0])


def of(*steps):
    """Tokens with their alternatives, from probabilities."""
    return [(next(iter(p)), {token: math.log(q) for token, q in p.items()}) for p in steps]


@pytest.mark.parametrize("sure, left", [(0.99, 0.01), (1.0, verdicts.SURE)])
def test_a_choice_that_a_server_reports_alone_wins_by_what_is_left(sure, left):
    found = verdicts.read_verdict(of({" ": 1.0}, {"1": sure}), "", CHOICES)
    assert found == pytest.approx([math.log(sure), math.log(left)])


def test_a_choice_that_may_be_as_likely_as_the_other_is_not_guessed_at():
    found = verdicts.read_verdict(of({"x": 0.5, "1": 0.1}), "", CHOICES)
    assert found == [pytest.approx(math.log(0.1)), -math.inf]


def test_a_token_counts_for_the_choice_that_it_begins():
    said = of({"1": 0.6, "10": 0.1, "1>": 0.1, " 2 >": 0.1, "2nd": 0.05})
    assert verdicts.read_verdict(said, "", CHOICES) == pytest.approx([math.log(0.7), math.log(0.1)])


@pytest.mark.parametrize(
    "said, expected",
    [
        ([{"Model": 0.95, "The": 0.03}, {" m": 0.9, " M": 0.1}], [0, 0]),
        ([{"My": 0.9, "The": 0.05}], [0, 0]),
        ([{"m": 0.97}], [0.97, 0]),
        ([{"m": 0.97, "The": 0.01, "Both": 0.005}], [0.97, 0]),
        ([{" M": 0.6, "m": 0.3, "**m": 0.1}], [0.4, 0.6]),
    ],
)
def test_a_choice_of_one_letter_is_that_letter_and_nothing_else(said, expected):
    """As in alpaca_eval: a missing letter has probability 0."""
    found = verdicts.read_verdict(of(*said), "", ("m", "M"))
    assert [math.exp(p) for p in found] == pytest.approx(expected)


def test_a_server_without_log_probabilities_is_told_to_be_sampled(server):
    with pytest.raises(EngineError, match="judging.method=sampled.*AlpacaEval.*another judge"):
        all_of(engine_for(server).choose(chats("a"), "ranking:", CHOICES))
    bare = steps((" 1", {}))
    bare["content"][0]["top_logprobs"] = None
    server.answers["a"] = [(200, reply("1", bare), {})]
    with pytest.raises(EngineError, match="judging.method=sampled"):
        all_of(engine_for(server).choose(chats("a"), "ranking:", CHOICES))
    server.answers["a"] = [failure(400, "logprobs are not supported")]
    with pytest.raises(EngineError, match="judging.method=sampled"):
        all_of(engine_for(server).choose(chats("a"), "ranking:", CHOICES))


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
    for file in run.folder.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()
    engine = load_engine(run.recipe.judging_model)
    assert KEY not in repr(engine) + str(vars(engine))


def test_every_sampling_setting_is_in_a_request_so_that_no_models_own_default_shows(server):
    """A vLLM server takes a model's generation_config for what a request leaves out."""
    engine = ApiEngine(settings(server), None, "n")
    all_of(engine.generate(chats("a"), Sampling(0.6, 3, 0.95), [7]))
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 3)
    assert body["presence_penalty"] == body["frequency_penalty"] == 0
    assert "top_k" not in body, "another server may refuse what is no name of OpenAI's"
    engine._forces = True  # a vLLM server
    all_of(engine.generate(chats("b"), Sampling(0.6, 3), [7]))
    body = server.requests[-1]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)


def test_template_options_are_sent_to_a_server(server):
    model = settings(server, template_options={"enable_thinking": False})
    all_of(ApiEngine(model, None, "n").generate(chats("a"), Sampling(0.0, 3), [0]))
    assert server.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
