"""Ray Data: generation and judging by several workers, on one machine or on a cluster.

Rows are equal to those of one process: their ids and seeds are made here, and a worker runs the same
engine; with `model.engine=vllm` on a GPU of its own. Ray Data starts its workers anew for each call,
so a model is loaded once a stage and worker, not once a run.

A cluster is used when RAY_ADDRESS is set; each of its machines needs the kit and the model's files
under the same path. Otherwise Ray is started here, and ends with this process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from sao_utils.engines.base import Completion, EngineError, Sampling
from sao_utils.engines.loading import load_tokenizer, model_name
from sao_utils.engines.transformers import TransformersEngine
from sao_utils.engines.vllm import VllmEngine
from sao_utils.recipe import Model

#: Rows that a worker gets at a time, and that are on disk when it is done with them.
SHARE = {"transformers": 64, "vllm": 1024}
DEATHS = 3  # so many workers may be killed (memory, machines) before a call gives up
STORE = 512 * 2**20  # bytes of Ray's shared memory on this machine; what is more goes to disk


class RayEngine:
    """Spreads the two verbs over `model.workers` processes. Results come as they are made."""

    def __init__(self, model: Model, adapter: Path | None, name: str):
        self.model, self.adapter, self.name = model, adapter, name
        self.tokenizer = load_tokenizer(model)
        self.ray = _start(model.workers)
        there = self.ray.cluster_resources()
        self.gpus = there.get("GPU", 0)
        kind, have = ("GPU", self.gpus) if model.engine == "vllm" else ("CPU", there.get("CPU", 0))
        if have < model.workers:
            raise EngineError(
                f"Ray has {have:.0f} {kind}s, and model.workers={model.workers} needs one each. Set "
                "fewer workers, RAY_ADDRESS to a larger cluster, or workers=0 to do without Ray."
            )

    def generate(self, chats, sampling, seeds):
        for done in self._spread("generate", {"sampling": vars(sampling)}, chats, seeds):
            yield [(i, Completion(*reply)) for i, reply in done]

    def choose(self, chats, prefix, choices):
        settings = {"prefix": prefix, "choices": choices}
        yield from self._spread("choose", settings, chats, [0] * len(chats))

    def _spread(self, verb: str, settings: dict, chats: list, seeds: list[int]) -> Iterator[list]:
        """The results of each share of the work, as workers finish it."""
        if not chats:
            return
        # Like lengths together, the longest first: shorter batches, and no long one at the end.
        order = sorted(range(len(chats)), key=lambda i: -sum(len(m["content"]) for m in chats[i]))
        size = min(SHARE[self.model.engine], math.ceil(len(chats) / self.model.workers))
        shares = [order[k : k + size] for k in range(0, len(order), size)]
        # As text: a table of Ray's would guess at types.
        work = [{"share": json.dumps([(i, chats[i], seeds[i]) for i in share])} for share in shares]
        known = {
            "model": self.model.model_dump(mode="json") | {"workers": 0},
            "adapter": str(self.adapter.resolve()) if self.adapter else None,
            "name": self.name,
            "verb": verb,
            "settings": settings,
        }
        with warnings.catch_warnings():  # the two limits have no other place in this version
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            data = self.ray.data.from_items(work, override_num_blocks=len(work)).map(
                Worker,
                fn_constructor_kwargs=known,
                compute=self.ray.data.ActorPoolStrategy(size=self.model.workers),
                num_cpus=1,
                num_gpus=min(1, self.gpus / self.model.workers),
                max_restarts=DEATHS,
                max_task_retries=DEATHS,
            )
        try:
            for row in data.iter_rows():
                yield json.loads(row["done"])
        except self.ray.exceptions.RayError as error:
            raise EngineError(
                f"A Ray worker failed: {getattr(error, 'cause', None) or error}\nThe rows made so far "
                "are kept; run again to go on, or set model.workers=0 to see the fault in one process."
            ) from error


class Worker:
    """The kit's own engine in a process of Ray's; a call does one share of the work."""

    def __init__(self, model: dict, adapter: str | None, name: str, verb: str, settings: dict):
        of, folder = Model(**model), Path(adapter) if adapter else None
        if model_name(of, folder) != name:
            raise EngineError(
                f"A machine of the cluster has other files of {model['path']} than this one. Copy the "
                "same model and adapter to the same path on all of them."
            )
        kind = VllmEngine if of.engine == "vllm" else TransformersEngine
        self.engine = kind(of, folder, name)
        self.verb, self.settings = verb, settings

    def __call__(self, row: dict) -> dict:
        numbers, chats, seeds = zip(*json.loads(row["share"]))
        if self.verb == "generate":
            sampling = Sampling(**self.settings["sampling"])
            batches = self.engine.generate(chats, sampling, seeds)
            done = [(i, list(vars(reply).values())) for batch in batches for i, reply in batch]
        else:
            batches = self.engine.choose(chats, **self.settings)
            done = [pair for batch in batches for pair in batch]
        return {"done": json.dumps([(numbers[i], result) for i, result in done])}


def _start(workers: int):
    """Ray, connected to a cluster or started here, without dashboard, telemetry and chatter."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise EngineError(
            "model.workers needs Ray, which is not installed: pip install -c constraints.txt -e '.[ray]'. "
            "Or set model.workers=0."
        ) from None
    if not ray.is_initialized():
        here = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, workers),
            "object_store_memory": STORE,
            "include_dashboard": False,
        }
        settings = {} if os.environ.get("RAY_ADDRESS") else here
        for tries_left in (2, 1, 0):
            try:
                ray.init(**settings, logging_level=logging.ERROR, log_to_driver=False)
                break
            except Exception:  # of no kind of its own: "timed out", on a busy machine
                ray.shutdown()
                if not tries_left:
                    raise
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray
