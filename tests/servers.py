"""An OpenAI-compatible server on loopback, for tests of what surrounds an engine."""

import math
from contextlib import contextmanager

from scripted_server import reply, running, steps

MODEL = "undecided"
#: What it replies to every request: a verdict for which both answers are equally good.
EITHER = {" 1": math.log(0.5), " 2": math.log(0.5)}
TOKENS = steps(("Ranking", {}), (":", {}), (" 1", EITHER))
VERDICT = reply("Ranking: 1", TOKENS, "length")


class Always(dict):
    def get(self, *_):
        return [(200, VERDICT, {"slow": "0"})]


@contextmanager
def undecided_server():
    """A server with `url`, and with `status`: any but 200 refuses every request."""
    with running() as server:
        server.answers = Always()
        yield server
