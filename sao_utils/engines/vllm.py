"""The vLLM engine: runs a model in a process of its own, which holds the GPU until it ends.

Inside of this process vLLM would reseed the caller's random numbers, could change classes of
transformers, and would never let go of the GPU. Here the kit's own tokenizer makes the token ids and
reads the replies, so that every engine sees the same prompts; the child (`vllm_child.py`) gets ids
and gives ids. One load serves prompts, responses and verdicts.

Two samples of a prompt are two requests beside each other, each with its own seed. vLLM itself
makes n = 2 into two such requests, and the prefix cache computes a shared prompt once; this way
each row is seeded by its own id, and can be made again alone.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from sao_utils.engines.base import (
    Completion,
    EngineError,
    Sampling,
    encode,
    first_divergent_token,
    over_long,
)
from sao_utils.engines.loading import load_tokenizer, model_folder, model_name
from sao_utils.engines.reasoning import opens_reasoning, read_reply
from sao_utils.recipe import Model

ENCODED = 256  # chats at a time: vLLM takes these in while the next are encoded
#: Seconds without a message or a new line in the log after which the child counts as hung.
PATIENCE = 1200.0
#: Settings of vLLM that change nothing. A model's generation_config may name others (Qwen2.5:
#: repetition_penalty 1.05, top_k 20), which vLLM's server takes for what a request leaves out.
NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
ENDED = "its process has ended"


class VllmEngine:
    """Runs a model with vLLM. The Python of the child is $SAO_VLLM_PYTHON, or this one."""

    def __init__(self, model: Model, adapter: Path | None, name: str):
        self.model, self.name = model, name
        self.tokenizer = load_tokenizer(model)
        self.opened = opens_reasoning(self.tokenizer)
        self.arguments, lora = engine_arguments(model, adapter)
        self.adapter = {"name": name, "path": lora["path"]} if lora else None
        self.rank = lora["rank"] if lora else 0
        self.weights = model_name(model) if lora else name
        self._child()

    def generate(self, chats, sampling, seeds):
        child = self._child()
        for batch in self._rows(child, self.sampling_params(sampling), chats, [], seeds, None):
            yield [
                (i, self.completion(*reply) if reply else Completion("", 0, False))
                for i, *reply in batch
            ]

    def sampling_params(self, sampling: Sampling) -> dict:
        """The arguments of vLLM's `SamplingParams`, but for the seed."""
        stops = {*self.child.ready["stops"], self.tokenizer.eos_token_id}.difference([None])
        return sampling_params(sampling) | {"stop_token_ids": sorted(stops)}

    def choose(self, chats, prefix, choices):
        shared, firsts = (
            first_divergent_token(chats[0], prefix, choices, self.tokenizer) if chats else ([], [])
        )
        asked = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": firsts}
        seeds = [0] * len(chats)
        nothing = [-math.inf] * len(choices)
        for batch in self._rows(self._child(), asked, chats, shared, seeds, nothing):
            yield [(i, odds) for i, odds in batch]

    def completion(self, reply: list[int], ended: bool) -> Completion:
        """A reply from its token ids, of which the last ended it if it did so by itself."""
        kept = reply[:-1] if ended else reply
        return read_reply(self.tokenizer, kept, ended, self.opened)

    def _rows(
        self, child: _Child, asked: dict, chats: list, shared: list[int], seeds: list, nothing
    ) -> Iterator[list]:
        """Batches of the child's replies to chats that go on with the ids `shared`.

        Those that do not fit into the context come last.
        """
        too_long: list[int] = []

        def rows() -> Iterator[tuple]:
            prompts: list[list[int]] = []
            for start in range(0, len(chats), ENCODED):
                for ids in encode(chats[start : start + ENCODED], self.tokenizer):
                    prompts.append(ids + shared)
                    # One that is too long would end all of them.
                    if len(prompts[-1]) < child.ready["max_context"]:
                        i = len(prompts) - 1
                        yield i, prompts[-1], seeds[i]
            too_long.extend(over_long(prompts, child.ready["max_context"]))

        yield from child.call({"sampling": asked, "adapter": self.adapter}, rows())
        if too_long:
            yield [(i,) if nothing is None else (i, nothing) for i in too_long]

    def _child(self) -> _Child:
        """The process that has this model, started if there is none; the only one there is.

        Two would not fit on a GPU. One that can take adapters serves the model without one, too.
        """
        global _current
        child = _current() if _current else None
        fits = child and child.weights == self.weights and child.arguments == self.arguments
        if not (fits and child.rank >= self.rank and child.alive()):
            if child:
                child.end()
            child = _Child(self.model, self.arguments, self.weights, self.rank)
            _current = weakref.ref(child)
        self.child = child  # the engines that use it keep it alive, and nobody else
        return child


def sampling_params(sampling: Sampling) -> dict:
    """Every setting of vLLM's sampling: what is left out, a model's own defaults may fill in."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        **NEUTRAL,
    }


def vllm_python() -> str:
    """The Python that has vLLM."""
    return os.environ.get("SAO_VLLM_PYTHON") or sys.executable


def vllm_environment() -> dict[str, str]:
    """The environment of a process with vLLM."""
    ours = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return {**os.environ, **ours}


def engine_arguments(model: Model, adapter: Path | None) -> tuple[dict, dict | None]:
    """What vLLM is started with, and the LoRA adapter that it is to serve.

    Returns:
        vLLM's EngineArgs, and {path, rank} of the adapter; None without one, and for a folder that
        holds a whole model (then that is the model).
    """
    lora = adapter is not None and (adapter / "adapter_config.json").exists()
    arguments = {
        "model": model_folder(str(adapter) if adapter and not lora else model.path),
        "revision": None if adapter and not lora else model.revision,
        "dtype": model.dtype,
        "max_model_len": model.max_context,
        "gpu_memory_utilization": model.gpu_memory,
        # awq and gptq: vLLM finds the fastest kernel if it reads them off the weights itself
        "quantization": model.quantisation
        if model.quantisation in ("fp8", "bitsandbytes")
        else None,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if not lora:
        return arguments, None
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    return arguments, {"path": str(adapter.resolve()), "rank": rank}


_current: weakref.ref[_Child] | None = None


def end_child() -> None:
    """End the process with vLLM, if there is one, also when something still refers to it."""
    if child := _current and _current():
        child.end()


class _Child:
    """A process with vLLM and one model. It ends with its last engine, or with this process."""

    def __init__(self, model: Model, arguments: dict, weights: str, rank: int):
        self.model, self.arguments, self.weights, self.rank = model, arguments, weights, rank
        self.capability = None
        with tempfile.NamedTemporaryFile(prefix="sao-vllm-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                # -P: the modules beside the child's file must not hide those of vLLM
                [vllm_python(), "-P", str(Path(__file__).with_name("vllm_child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=vllm_environment(),
                start_new_session=True,  # a group to end as a whole; no Ctrl-C of the terminal's
                encoding="utf-8",
            )
        self.end = weakref.finalize(self, _end, self.process, self.log)
        self.messages: queue.Queue = queue.Queue()
        threading.Thread(
            target=_listen, args=(self.process.stdout, self.messages), daemon=True
        ).start()
        lora = {"enable_lora": True, "max_lora_rank": lora_rank(rank)} if rank else {}
        try:
            self._say([{**arguments, **lora}])
            self._notice(self._hear())
            self.ready = self._hear()["ready"]
            wanted = model.quantisation
            if wanted in ("awq", "gptq") and wanted not in (self.ready["quantisation"] or ""):
                raise EngineError(
                    f"{model.path} is not stored in {wanted}. Take a model that is, or set "
                    "model.quantisation=none."
                )
        except BaseException:
            self.end()
            raise

    def alive(self) -> bool:
        return self.end.alive and self.process.poll() is None

    def call(self, call: dict, rows: Iterable[tuple]) -> Iterator[list]:
        """Send all rows as they come, and pass the replies on as they come."""
        done = False
        try:
            self._say(chain([call], rows, [None]))
            while (batch := self._hear()) is not None:
                if batch:
                    yield batch
            done = True
        finally:
            if not done:  # it is still at work on rows that nobody waits for
                self.end()

    def _say(self, messages: Iterable[object]) -> None:
        try:
            for message in messages:
                self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has died; what it said last tells why
            while True:
                self._hear()

    def _hear(self) -> object:
        """The next message. Raises EngineError when there is none any more."""
        heard, size = time.monotonic(), 0
        while True:
            try:
                message = self.messages.get(timeout=min(5.0, PATIENCE))
                break
            except queue.Empty:
                if size < self.log.stat().st_size:
                    heard, size = time.monotonic(), self.log.stat().st_size
                if time.monotonic() - heard > PATIENCE:
                    message = {"error": f"nothing was heard of it for {PATIENCE:.0f} seconds"}
                    break
        if isinstance(message, dict) and "error" in message:
            if message["error"] == ENDED:
                with suppress(subprocess.TimeoutExpired):  # pipes close a moment before the end
                    self.process.wait(5)
                if self.process.returncode == -signal.SIGKILL:
                    message["error"] += ": it was killed (by the system, if its memory was full)"
            tail = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
            raise EngineError(
                explain(message["error"], tail, self.model, self.capability)
            ) from None
        return message

    def _notice(self, machine: dict) -> None:
        """Say what an old GPU cannot do before minutes are spent on trying."""
        self.capability = machine["capability"]
        if self.capability and tuple(self.capability) < (8, 0):
            print(
                f"{machine['gpu']} has compute capability {'.'.join(map(str, self.capability))}: "
                "vLLM runs in float16 only there, and not with Gemma. If it fails, set "
                "model.engine=transformers.",
                flush=True,
            )


def _end(process: subprocess.Popen, log: Path) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # frees the GPU at once
    except ProcessLookupError:
        pass
    process.wait()
    log.unlink(missing_ok=True)


def _listen(stream, messages: queue.Queue) -> None:
    try:
        for line in stream:
            messages.put(json.loads(line))
    except ValueError:  # it was killed in the middle of a line
        pass
    messages.put({"error": ENDED})


def lora_rank(rank: int) -> int:
    """The least of the ranks that vLLM knows which is not below that of the adapter."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def explain(error: str, log: str, model: Model, capability: list[int] | None = None) -> str:
    """What to do about a fault of vLLM.

    Args:
        error: what the child said last.
        log: what it printed; the end goes into the message.
        capability: compute capability of the GPU, if there is one.
    """
    if error == "missing":
        return (
            "vLLM is not installed: pip install -e '.[gpu]', or set model.engine=transformers. "
            "($SAO_VLLM_PYTHON may name the Python of another environment that has it.)"
        )
    text = f"{error}\n{log}".lower()
    if (
        "out of memory" in text
        or "no available memory for the cache" in text
        or ("less than desired gpu memory" in text)
    ):
        advice = (
            "The GPU's memory is too small, or something else is using it. Close other notebooks, set "
            f"a smaller model.max_context, model.gpu_memory (now {model.gpu_memory}) lower if "
            "others use the GPU and higher if not, or model.quantisation=fp8."
        )
    elif model.quantisation == "bitsandbytes":
        advice = (
            "vLLM 0.30 has bitsandbytes only as a plugin: pip install vllm-bnb-plugin, or set "
            "model.quantisation=fp8."
        )
    elif capability and tuple(capability) < (8, 0):
        advice = "This GPU is too old for much of vLLM: set model.engine=transformers."
    elif "max_model_len" in text and "larger" in text:
        advice = f"Set a smaller model.max_context (now {model.max_context})."
    else:
        advice = (
            "The rows made so far are kept; run again to go on. If it fails again, "
            "model.engine=transformers does without vLLM."
        )
    lines = [line[:500] for line in log.splitlines() if line.strip()]
    tail = "\n".join(lines[-30:])
    return f"vLLM stopped with {model.path}: {error}\n{advice}\nThe end of its log:\n{tail}"
