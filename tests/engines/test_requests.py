"""Requests to models: by content, once, resumable; a server's replies bought once, under a cap.

The server is a real one on loopback (test_engine_api.py), standing in for one that is paid.
"""

import json
import subprocess
import sys
import threading
import time

import pytest
from scripted_server import Server, failure, reply, settings, steps

from sao_utils import store as rows
from sao_utils.engines import requests as module
from sao_utils.engines.base import Sampling, encode
from sao_utils.engines.loading import load_tokenizer
from sao_utils.engines.requests import CostError, estimate, replies, spent
from sao_utils.methods import sao
from sao_utils.recipe import Model

TINY = Model(path="tiny", dtype="float32")
SHORT = Sampling(0.6, 8)
PRICES = {"price_in": 2.0, "price_out": 10.0}  # US$ per million tokens


def prompts(run):
    return sao.rows(run, "prompts")


def responses(run):
    return sao.rows(run, "responses")


def write(*texts, sampling=SHORT):
    return [{"chat": [{"role": "user", "content": t}], "sampling": sampling} for t in texts]


def choose(*texts):
    chats = [[{"role": "user", "content": t}] for t in texts]
    return [{"chat": c, "prefix": "ranking:", "choices": (" 1 > 2", " 2 > 1")} for c in chats]


def open_run(name="asked", **overrides):
    return rows.open_run("tiny", name, {f"evaluation.{k}": v for k, v in overrides.items()})


def test_replies_come_in_the_order_asked_and_equal_requests_are_one(results):
    run, requests = open_run(), write("Hello?", "What is tea?", "Hello?") + choose("a", "b", "a")
    found = replies(run, "s", TINY, requests)
    assert found[0] == found[2] != found[1] and found[3] == found[5] != found[4]
    assert len(rows.read_rows(run.rows("s"))) == 4
    assert {*found[0]} == {"id", "text", "tokens", "finished"} and {*found[3]} == {
        "id",
        "logps",
    }
    assert all(p < 0 for p in found[4]["logps"])


def test_what_is_asked_beside_a_request_does_not_change_its_reply(results):
    run = open_run()
    alone = replies(run, "alone", TINY, write("What is tea?"))
    among = replies(run, "among", TINY, write("Hello?", "What is tea?") + choose("What is tea?"))
    assert alone[0] == among[1]


def test_another_temperature_model_or_choice_is_another_request(results):
    asked = write("a") + write("a", sampling=Sampling(0.0, 8)) + choose("a")
    asked += [{**choose("a")[0], "prefix": "Ranking:"}, *choose("a ")]
    other = TINY.model_copy(update={"dtype": "auto"})
    ids = {i for model in (TINY, other) for i in module._ids(model, asked)}
    assert len(ids) == 10


def test_a_killed_stage_goes_on_where_it_was(results):
    run, requests = open_run(), write("a", "b", "c")
    whole = replies(run, "s", TINY, requests)
    path = run.rows("s")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:10])
    assert replies(run, "s", TINY, requests) == whole
    assert path.read_bytes().splitlines(keepends=True)[0] == lines[0]


def test_a_request_of_neither_kind_is_refused(results):
    with pytest.raises(ValueError, match="sampling"):
        replies(open_run(), "s", TINY, [{"chat": []}])


def test_tokens_are_counted_by_the_tokenizer_where_there_is_one(results):
    run, requests = open_run(), write("Hello?", "What is tea?")
    cost = estimate(run, TINY, requests, "s")
    chats = [request["chat"] for request in requests]
    assert cost.tokens_in == sum(map(len, encode(chats, load_tokenizer(TINY))))
    assert (cost.requests, cost.new, cost.tokens_out, cost.dollars) == (2, 2, 16, None)
    replies(run, "s", TINY, requests)
    assert estimate(run, TINY, requests, "s").new == 0


def test_nothing_is_bought_twice_by_a_run_or_another_run(results, server, capsys):
    model, requests = settings(server, **PRICES), write("a", "b", "a")
    first = replies(open_run("one"), "s", model, requests)
    said = capsys.readouterr().out
    assert "2 of 2 requests are new" in said and "US$ 0.0002" in said
    assert replies(open_run("one"), "s", model, requests) == first
    assert replies(open_run("two"), "other", model, requests) == first
    assert len(server.requests) == 2 and capsys.readouterr().out == ""
    (results / "one" / "rows" / "s.jsonl").unlink()
    assert replies(open_run("one"), "s", model, requests) == first and len(server.requests) == 2
    assert spent(open_run("one")) == pytest.approx(2 * (5 * 2 + 3 * 10) / 1e6)  # as the server says
    assert spent(open_run("two")) == 0
    assert estimate(open_run("two"), model, requests).new == 0


def test_the_estimate_is_shown_before_anything_is_sent(results, server, capsys):
    model = settings(server, **PRICES)
    cost = estimate(open_run(), model, write("x" * 40, "y" * 41) + choose("z" * 31))
    assert cost.tokens_in == 10 + 11 + 10 and cost.tokens_out == 8 + 8 + 16
    assert cost.dollars == pytest.approx((31 * 2 + 32 * 10) / 1e6) and not server.requests


def test_an_estimate_above_the_cap_sends_nothing(results, server):
    model = settings(server, price_out=1e6)
    with pytest.raises(CostError, match="max_cost") as error:
        replies(open_run(max_cost=7), "s", model, write("a"))
    assert "Raise" in str(error.value) and not server.requests


def test_the_cap_stops_by_what_was_really_used_and_keeps_the_rows(results, server):
    model = settings(server, price_in=1e6, concurrency=1)  # 5 tokens read each, as the server says
    requests = write(*(f"{k}" for k in range(20)))  # 1 each, by their characters
    run = open_run(max_cost=22)
    with pytest.raises(CostError, match="spent US\\$ 20"):
        replies(run, "s", model, requests)
    assert len(server.requests) == module.WAVES and spent(run) == 20
    with pytest.raises(CostError):  # also in a new process: what was spent is known from the rows
        replies(open_run(max_cost=22), "s", model, requests)
    assert len(server.requests) == 4
    found = replies(open_run(max_cost=1000), "s", model, requests)
    assert len(server.requests) == 20
    assert [r["text"] for r in found] == [f"You said {k}" for k in range(20)]


def test_a_server_that_counts_no_tokens_is_counted_by_characters(results, server):
    silent = {**reply("yes"), "usage": None}
    server.answers["a" * 40] = [(200, silent, {})]
    run, model = open_run(), settings(server, **PRICES)
    (row,) = replies(run, "s", model, write("a" * 40))
    assert (row["tokens_in"], row["tokens_out"]) == (10, 8)
    assert spent(run) == pytest.approx((10 * 2 + 8 * 10) / 1e6)


def test_text_that_takes_more_tokens_a_character_is_estimated_by_its_bytes(results, server):
    model = settings(server, **PRICES)
    assert estimate(open_run(), model, write("tea " * 10)).tokens_in == 10
    assert estimate(open_run(), model, write("茶" * 40)).tokens_in == 30


def test_a_fault_keeps_what_was_bought_before(results, server):
    server.answers["bad"] = [failure(401, "no key")]
    model = settings(server, concurrency=1)
    with pytest.raises(RuntimeError):
        replies(open_run(), "s", model, write("a", "bad", "b"))
    server.answers.clear()
    before = len(server.requests)
    replies(open_run(), "s", model, write("a", "bad"))
    assert len(server.requests) == before + 1


def test_a_refused_choice_has_no_log_probabilities_and_costs_nothing(results, server):
    server.answers["long"] = [failure(400, "maximum context length is 8192 tokens")]
    (row,) = replies(open_run(), "s", settings(server, **PRICES), choose("long"))
    assert row["logps"] == [None, None] and row["dollars"] == 0
    for path in results.rglob("*.jsonl"):
        assert "Infinity" not in path.read_text()


@pytest.mark.parametrize("kind", [write, choose])
def test_what_a_server_refused_is_asked_again_once_its_limit_is_another(results, server, kind):
    sure = reply("ranking: 1", steps(("ranking:", {}), (" 1", {" 1": -0.1, " 2": -3.0})))
    server.answers = {"short": [(200, sure, {})]}
    server.answers["long"] = [failure(400, "maximum context length is 512 tokens")]
    small, requests = settings(server, **PRICES), kind("long", "short")
    replies(open_run(), "s", small, requests)
    before = len(server.requests)
    refused, _ = replies(open_run(), "s", small, requests)
    assert refused["max_context"] is None and len(server.requests) == before  # once under one limit
    server.answers["long"] = server.answers["short"]
    large = small.model_copy(update={"max_context": 4096})
    assert estimate(open_run(), large, requests, "s").new == 1
    (first, _), (second, _) = (replies(open_run(), "s", large, requests) for _ in range(2))
    assert first == second and "max_context" not in first and first["id"] == refused["id"]
    assert len(server.requests) == before + 1
    manifest = json.loads((open_run().folder / "manifest.json").read_text())
    assert manifest["stages"]["s"]["made"] == 2
    assert spent(open_run()) == pytest.approx(2 * (5 * 2 + 3 * 10) / 1e6)


class Writer(dict):
    """Answers of a server that writes prompts and answers, each another one."""

    def get(self, text, _):
        self.written = getattr(self, "written", 0) + 1
        return [(200, reply(f"User prompt: What is {self.written}?"), {})]


def writer(server, name="written", count=6, **evaluation):
    paid = settings(server, price_in=1e6, price_out=0, concurrency=1).model_dump()  # 5 a request
    changes = {f"model.{key}": value for key, value in paid.items()} | {"prompts.count": count}
    changes |= {f"evaluation.{key}": value for key, value in evaluation.items()}
    return rows.open_run("tiny", name, changes)


def test_prompts_and_responses_of_a_server_are_bought_once_and_counted(results, server):
    server.answers = Writer()
    made = responses(writer(server, "one"))
    assert len(made) == 12 and len({row["text"] for row in made}) == 12  # two of each prompt
    assert len(server.requests) == 18 and spent(writer(server, "one")) == 18 * 5
    assert len({body["seed"] for body in server.requests}) == 18
    assert not {"dollars", "run", "tokens_in"} & {*made[0]}, "what was paid stays with the cache"
    assert responses(writer(server, "two")) == made
    assert len(server.requests) == 18 and spent(writer(server, "two")) == 0


def test_the_cap_holds_for_prompts_and_responses_of_a_server_and_for_variants(results, server):
    server.answers = Writer()
    with pytest.raises(CostError, match="Nothing more was sent"):
        responses(writer(server, max_cost=10))
    assert not server.requests
    run = writer(server, max_cost=1100)  # a persona's prompt is estimated at some 120 tokens
    assert len(prompts(run)) == 6 and spent(run) == 30
    beside = rows.variant(run, "without", {"prompts.source": "no_persona"})
    prompts(beside)
    assert spent(run) == spent(beside) == 60
    small = rows.variant(run, "hot", {"prompts.temperature": 1.0, "evaluation.max_cost": 60})
    with pytest.raises(CostError, match="spent US\\$ 60"):
        prompts(small)
    assert len(server.requests) == 12


BUYER = """
import sys, time
from pathlib import Path
from sao_utils.engines import requests as module
from sao_utils import store as rows
from sao_utils.engines.base import Sampling
from sao_utils.recipe import Model
import openai
url, stage, folder = sys.argv[1:]
run = rows.open_run("tiny", "asked", {"evaluation.max_cost": 22})
model = Model(path="m", engine="api", url=url, price_in=1e6, concurrency=1)
asked = [dict(chat=[dict(role="user", content=str(k))], sampling=Sampling(0.6, 8)) for k in range(20)]
Path(folder, stage).touch()
while not Path(folder, "go").exists():
    time.sleep(0.01)
module.replies(run, stage, model, asked)
"""


def test_two_processes_that_buy_from_two_servers_keep_under_the_cap_together(
    results,
    server,
    tmp_path,
):
    other = Server()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    for each in (server, other):
        each.answers = {str(k): [(200, reply("yes"), {"slow": "0.3"})] for k in range(20)}
    urls = {"one": server.url, "two": other.url}
    buyers = [
        subprocess.Popen(
            [sys.executable, "-c", BUYER, url, stage, tmp_path], stderr=subprocess.PIPE, text=True
        )
        for stage, url in urls.items()
    ]
    while not all((tmp_path / stage).exists() for stage in urls):
        assert all(buyer.poll() is None for buyer in buyers)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    said = [buyer.communicate(timeout=60)[1] for buyer in buyers]
    other.shutdown()
    other.server_close()
    assert all("CostError" in text and "has spent US$ 20" in text for text in said)
    assert len(server.requests) + len(other.requests) == module.WAVES
    assert spent(open_run()) == 20


def test_a_process_waits_while_another_one_buys_and_takes_what_that_bought(
    results,
    server,
    monkeypatch,
    capsys,
):
    fcntl = pytest.importorskip("fcntl")
    model, requests = settings(server), write("a", "b")
    (bought,) = replies(open_run("first"), "s", model, requests[:1])
    path, seen = module._cache(model), []
    content = path.read_bytes()
    path.write_bytes(b"")
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def other_process_ends():
            seen.append(len(server.requests))
            file.write(content)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(module, "PAUSE", 0.05)
        threading.Timer(0.3, other_process_ends).start()
        assert replies(open_run("second"), "s", model, requests)[0] == bought
    asked = [request["messages"][-1]["content"] for request in server.requests]
    assert seen == [1] and asked == ["a", "b"]
    assert "waiting" in capsys.readouterr().out


def test_no_key_is_written_anywhere(results, server):
    replies(open_run(), "s", settings(server, **PRICES), write("a"))
    written = [p.read_text() for p in results.rglob("*") if p.is_file()]
    assert written and not any("sk-very-secret" in text for text in written)
    assert all(json.loads(line) for p in results.rglob("*.jsonl") for line in p.open())
