"""Parts of a benchmark that do not end well. They are imported by processes of their own: nothing heavy."""

import os
import time


def dies():
    yield {"measurement": "first", "status": "ok"}
    os._exit(9)


def takes_too_long():
    yield {"measurement": "first", "status": "ok"}
    time.sleep(600)


def breaks():
    yield {"measurement": "first", "status": "ok"}
    raise MemoryError
