"""An OpenAI-compatible server on loopback that answers as it is told, and notes what it is asked."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sao_utils.recipe import Model

KEY = "sk-very-secret-0123456789"


def reply(text, logprobs=None, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choice |= {"finish_reason": finish, "logprobs": logprobs}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m"} | {
        "choices": [choice],
        "usage": usage,
    }


def steps(*tokens):
    """The log-probabilities that a server reports, from (token, alternatives)."""
    return {
        "content": [
            {"token": token, "logprob": top.get(token, 0.0), "bytes": None}
            | {"top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top.items()]}
            for token, top in tokens
        ]
    }


class Server(ThreadingHTTPServer):
    """Answers a request by `self.answers[last message]`: a list of (status, body, headers)."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.requests, self.at_once, self.most = {}, [], 0, 0
        self.lock, self.models = threading.Lock(), (404, {"error": {"message": "no list"}}, {})
        self.status = 200  # any other refuses everything
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(*self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, text = self.server, body["messages"][-1]["content"]
        with server.lock:
            server.requests.append({**body, "key": self.headers["Authorization"]})
            server.at_once += 1
            server.most = max(server.most, server.at_once)
            planned = server.answers.get(text, [(200, reply(f"You said {text}"), {})])
            status, answer, headers = planned.pop(0) if len(planned) > 1 else planned[0]
        time.sleep(float(headers.pop("slow", 0.02)))
        with server.lock:
            server.at_once -= 1
        self.send(status, answer, headers)

    def send(self, status, answer, headers):
        if self.server.status != 200:
            status, answer = self.server.status, {"error": {"message": "this key is not known"}}
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def running():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("SAO_TEST_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.05)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.2)
    with running() as server:
        yield server


def settings(server, **more):
    return Model(path="m", engine="api", url=server.url, key_variable="SAO_TEST_KEY", **more)


def failure(status, message, **headers):
    return status, {"error": {"message": message, "code": None}}, headers
