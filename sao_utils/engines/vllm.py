"""The vLLM engine: runs a model in a process of its own, which holds the GPU until it ends.

Inside this process vLLM would reseed the caller's random numbers, could change classes of
transformers, and would never release the GPU. The kit's own tokenizer, in this process, makes the
token ids and decodes the replies, so that every engine sees the same prompts; the child
(`vllm_child.py`) takes ids and returns ids. One load serves prompts, responses and verdicts.

Two samples of a prompt are two requests, each with its own seed, so that each row is seeded by its own
id and can be remade alone. The prefix cache computes their shared prompt once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from sao_utils.engines.base import (
    NOTHING,
    Completion,
    EngineError,
    encode,
    first_divergent_token,
    over_long,
    turn_ends,
)
from sao_utils.engines.loading import load_tokenizer, model_folder, model_name
from sao_utils.engines.reasoning import opens_reasoning, read_reply
from sao_utils.recipe import Model

#: vLLM's sampling settings at values that have no effect. For settings that a request leaves out, vLLM's
#: server takes those of the model's generation_config (Qwen2.5: repetition_penalty 1.05, top_k 20).
NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
ENDED = "its process has ended, or was killed (by the system, if its memory was full)"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts


class VllmEngine:
    """Runs a model with vLLM. The Python of the child is $SAO_VLLM_PYTHON, or this one."""

    def __init__(self, model: Model, adapter: Path | None):
        self.model, name = model, model_name(model, adapter)
        self.tokenizer = load_tokenizer(model)
        self.opened = opens_reasoning(self.tokenizer)
        lora = adapter is not None and (adapter / "adapter_config.json").exists()
        self.adapter = {"name": name, "path": str(adapter.resolve())} if lora else None
        self.rank = _lora_rank(adapter) if lora else 0
        self.weights = model_name(model) if lora else name
        if adapter and not lora:  # a fully fine-tuned model
            model = model.model_copy(update={"path": str(adapter), "revision": None})
        self.arguments = _engine_arguments(model)
        self._child()

    def generate(self, chats, sampling, seeds):
        stops = {*self._child().ready["stops"], self.tokenizer.eos_token_id}.difference([None])
        stops.update(turn_ends(chats, self.tokenizer))
        asked = {  # all but the seed: a model's own defaults may replace what is left out
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(stops),
            **NEUTRAL,
        }
        for batch in self._rows(asked, chats, [], seeds):
            yield [(i, self._completion(*reply) if reply else NOTHING) for i, reply in batch]

    def choose(self, chats, prefix, choices):
        if not chats:
            return
        shared, firsts = first_divergent_token(chats[0], prefix, choices, self.tokenizer)
        asked = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": firsts}
        nothing = [-math.inf] * len(choices)
        for batch in self._rows(asked, chats, shared, [0] * len(chats)):
            yield [(i, logps or nothing) for i, logps in batch]

    def _completion(self, reply: list[int], ended: bool) -> Completion:
        """The completion for a reply's token ids; the last is a stop token if the reply `ended` by itself."""
        kept = reply[:-1] if ended else reply
        return read_reply(self.tokenizer, kept, ended, self.opened)

    def _rows(self, asked: dict, chats: list, shared: list[int], seeds: list) -> Iterator[list]:
        """Batches of (index, the child's reply) to the chats, each followed by the ids `shared`.

        Prompts that do not fit into the context get None as reply, and come last.
        """
        child = self._child()
        prompts = [ids + shared for ids in encode(chats, self.tokenizer)]
        too_long = over_long(prompts, child.ready["max_context"])
        fitting = sorted(set(range(len(prompts))).difference(too_long))
        rows = [[i, prompts[i], seeds[i]] for i in fitting]
        yield from child.call({"sampling": asked, "adapter": self.adapter, "rows": rows})
        if too_long:
            yield [(i, None) for i in too_long]

    def _child(self) -> _Child:
        """The one child process, with this model; starts it, in place of any other, if need be.

        Two would not fit on a GPU. A process that accepts adapters serves the bare model, too.
        """
        global _current
        child = _current() if _current else None
        fits = child and child.weights == self.weights and child.arguments == self.arguments
        if not (fits and child.rank >= self.rank and child.alive()):
            if child:
                child.end()
            child = _Child(self.model, self.arguments, self.weights, self.rank)
            _current = weakref.ref(child)
        self.child = child  # only the engines that use the child keep it alive
        return child


def _engine_arguments(model: Model) -> dict:
    """vLLM's EngineArgs for a model."""
    # awq and gptq: vLLM picks the fastest kernel if it detects them from the weights itself.
    told = model.quantisation in ("fp8", "bitsandbytes")
    return {
        "model": model_folder(model.path),
        "revision": model.revision,
        "dtype": model.dtype,
        "max_model_len": model.max_context,
        "gpu_memory_utilization": model.gpu_memory,
        "quantization": model.quantisation if told else None,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }


def _lora_rank(adapter: Path) -> int:
    """The smallest of vLLM's LoRA ranks that fits an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    return next((known for known in LORA_RANKS if known >= rank), rank)


_current: weakref.ref[_Child] | None = None


def end_child() -> None:
    """End the vLLM process, if there is one, even if something still refers to it."""
    if child := _current and _current():
        child.end()


class _Child:
    """A process that runs vLLM with one model. It ends with its last engine, or with this process."""

    def __init__(self, model: Model, arguments: dict, weights: str, rank: int):
        self.model, self.arguments, self.weights, self.rank = model, arguments, weights, rank
        python = os.environ.get("SAO_VLLM_PYTHON") or sys.executable
        ours = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        with tempfile.NamedTemporaryFile(prefix="sao-vllm-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                # -P: modules beside the child's file must not shadow those that vLLM imports
                [python, "-P", str(Path(__file__).with_name("vllm_child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **ours},
                start_new_session=True,  # a group, to be killed as a whole; the terminal's Ctrl-C misses it
                encoding="utf-8",
            )
        self.end = weakref.finalize(self, _end, self.process, self.log)
        lora = {"enable_lora": True, "max_lora_rank": rank} if rank else {}
        try:
            self._send({**arguments, **lora})
            self.ready = self._receive()["ready"]
        except BaseException:
            self.end()
            raise

    def alive(self) -> bool:
        return self.end.alive and self.process.poll() is None

    def call(self, call: dict) -> Iterator[list]:
        """Send all rows, and yield the replies as they come."""
        try:
            self._send(call)
            while (batch := self._receive()) is not None:
                yield batch
        except BaseException:  # the child may still be working on rows that nobody waits for
            self.end()
            raise

    def _send(self, message: object) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:  # the child has died; its last message says why
            while True:
                self._receive()

    def _receive(self) -> object:
        """The next message. Raises EngineError if it is an error or there are no more."""
        line = self.process.stdout.readline()
        message = json.loads(line) if line.endswith("\n") else {"error": ENDED}
        if isinstance(message, dict) and "error" in message:
            raise EngineError(self._fault(message["error"]))
        return message

    def _fault(self, error: str) -> str:
        if "No module named 'vllm'" in error:
            return (
                "vLLM is not installed: pip install -e '.[gpu]', or set model.engine=transformers. "
                "($SAO_VLLM_PYTHON may name the Python of another environment that has it.)"
            )
        log = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        tail = "\n".join(line[:500] for line in log.splitlines()[-30:])
        return (
            f"vLLM stopped with {self.model.path}: {error}\nRows made so far are kept; run again to go "
            "on. If memory is full: close other notebooks, set a smaller model.max_context, "
            f"model.quantisation=fp8, or another model.gpu_memory (now {self.model.gpu_memory}). A GPU "
            f"older than compute capability 8.0 needs model.engine=transformers.\nThe end of its log:\n{tail}"
        )


def _end(process: subprocess.Popen, log: Path) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # frees the GPU at once
    except ProcessLookupError:
        pass
    process.wait()
    log.unlink(missing_ok=True)
