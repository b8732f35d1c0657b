"""vLLM's build for CPUs in tests: what it needs, and its server of a model."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest

#: What the build needs: one thread, nothing compiled, the engine inside of its process.
CPU_BUILD = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

needs_vllm = pytest.mark.skipif(
    not os.environ.get("SAO_VLLM_PYTHON"),
    reason="SAO_VLLM_PYTHON names no Python with vLLM (make test-vllm)",
)


@contextmanager
def serving(folder, name, log):
    """The address of vLLM's own server of the model in a folder; `wait_for` waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [os.environ["SAO_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
            + ["--model", str(folder), "--served-model-name", name]
            + ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(address):
    until = time.monotonic() + 150
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{address.removesuffix('/v1')}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("vLLM's server did not start")
