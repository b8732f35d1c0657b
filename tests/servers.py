"""An OpenAI-compatible server on loopback, for tests of what surrounds an engine."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "undecided"
#: What it replies to every request: a verdict for which both answers are equally good.
TOKENS = ("Ranking", ":", " 1", " >", " 2")
EITHER = [{"token": t, "logprob": math.log(0.5), "bytes": None} for t in (" 1", " 2")]
STEPS = [{"token": t, "logprob": 0.0, "bytes": None, "top_logprobs": EITHER} for t in TOKENS]
CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "".join(TOKENS)},
    "finish_reason": "length",
    "logprobs": {"content": STEPS},
}
REPLY = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [CHOICE]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send(REPLY)

    def send(self, answer):
        if self.server.status != 200:
            answer = {"error": {"message": "this key is not known"}}
        data = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def undecided_server():
    """A server with `url`, and with `status`: any but 200 refuses every request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.url = 200, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
