"""Requests to models: by content, once, resumable; a server's replies bought once, under a cap.

The server is a real one on loopback (test_engine_api.py), standing in for one that is paid.
"""

import json
import threading
import time

import pytest
from scripted_server import failure, reply, settings, steps

from sao_utils import store as rows
from sao_utils.disk import turn
from sao_utils.engines import requests as module
from sao_utils.engines.base import Sampling
from sao_utils.engines.requests import CostError, replies, spent
from sao_utils.methods import sao
from sao_utils.recipe import Model

TINY = Model(path="tiny", dtype="float32")
SHORT = Sampling(0.6, 8)
PRICES = {"price_in": 2.0, "price_out": 10.0}  # US$ per million tokens


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
    assert {*found[0]} == {"id", "text", "tokens", "finished"} and {*found[3]} == {"id", "logps"}
    assert all(p < 0 for p in found[4]["logps"])
    alone = replies(run, "alone", TINY, write("What is tea?"))
    assert alone[0] == found[1], "what is asked beside a request does not change its reply"


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


def test_nothing_is_bought_twice_by_a_run_or_another_run(results, server, capsys):
    model, requests = settings(server, **PRICES), write("a", "b", "a")
    first = replies(open_run("one"), "s", model, requests)
    said = capsys.readouterr().out
    assert "2 requests are new" in said and "US$ 0.0002" in said
    assert replies(open_run("one"), "s", model, requests) == first
    assert replies(open_run("two"), "other", model, requests) == first
    assert len(server.requests) == 2 and capsys.readouterr().out == ""
    (results / "one" / "rows" / "s.jsonl").unlink()
    assert replies(open_run("one"), "s", model, requests) == first and len(server.requests) == 2
    assert spent(open_run("one")) == pytest.approx(2 * (5 * 2 + 3 * 10) / 1e6)  # as the server says
    assert spent(open_run("two")) == 0


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


def test_a_server_that_counts_no_tokens_is_counted_by_bytes(results, server):
    silent = {**reply("yes"), "usage": None}
    server.answers["a" * 40] = [(200, silent, {})]
    server.answers["茶" * 40] = server.answers["a" * 40]
    run, model = open_run(), settings(server, **PRICES)
    row, other = replies(run, "s", model, write("a" * 40, "茶" * 40))
    assert (row["tokens_in"], row["tokens_out"]) == (10, 8) and other["tokens_in"] == 30
    assert spent(run) == pytest.approx((40 * 2 + 16 * 10) / 1e6)


@pytest.mark.parametrize("kind", [write, choose])
def test_what_a_server_refused_is_asked_again_once_its_limit_is_another(results, server, kind):
    sure = reply("ranking: 1", steps(("ranking:", {}), (" 1", {" 1": -0.1, " 2": -3.0})))
    server.answers = {"short": [(200, sure, {})]}
    server.answers["long"] = [failure(400, "maximum context length is 512 tokens")]
    small, requests = settings(server, **PRICES), kind("long", "short")
    replies(open_run(), "s", small, requests)
    before = len(server.requests)
    refused, _ = replies(open_run(), "s", small, requests)
    if kind is choose:
        assert refused["logps"] == [None, None] and refused["dollars"] == 0
    assert refused["max_context"] is None and len(server.requests) == before  # once under one limit
    server.answers["long"] = server.answers["short"]
    large = small.model_copy(update={"max_context": 4096})
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


def test_prompts_and_responses_of_a_server_are_bought_once_and_under_the_cap(results, server):
    server.answers = Writer()
    with pytest.raises(CostError, match="Nothing more was sent"):
        sao.rows(writer(server, "one", max_cost=10), "responses")
    assert not server.requests
    run = writer(server, "one")
    made = sao.rows(run, "responses")
    assert len(made) == 12 and len({row["text"] for row in made}) == 12  # two of each prompt
    assert len(server.requests) == 18 and spent(run) == 18 * 5
    assert len({body["seed"] for body in server.requests}) == 18
    assert not {"dollars", "run", "tokens_in"} & {*made[0]}, "what was paid stays with the cache"
    assert sao.rows(writer(server, "two"), "responses") == made
    assert len(server.requests) == 18 and spent(writer(server, "two")) == 0
    beside = rows.variant(run, "without", {"prompts.source": "no_persona"})
    sao.rows(beside, "prompts")
    assert spent(run) == spent(beside) == 24 * 5


def test_a_process_waits_while_another_one_buys_and_takes_what_that_bought(results, server):
    model, requests = settings(server), write("a", "b")
    (bought,) = replies(open_run("first"), "s", model, requests[:1])
    path = module._cache(model)
    content = path.read_bytes()
    path.write_bytes(b"")
    with turn(path.with_suffix(".lock")):
        threading.Timer(0.3, lambda: path.write_bytes(content)).start()
        other = threading.Thread(target=replies, args=(open_run("second"), "s", model, requests))
        other.start()
        time.sleep(1)
        assert len(server.requests) == 1
    other.join()
    assert replies(open_run("second"), "s", model, requests)[0] == bought
    assert [request["messages"][-1]["content"] for request in server.requests] == ["a", "b"]
