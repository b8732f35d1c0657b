"""Ray Data: generation and judging by several workers, on one machine or on a cluster.

Rows are equal to those of one process: their ids, seeds and prompts are made here, and a worker runs
the same engine. With `model.engine=vllm`, Ray's own vLLM batch processor serves the model, a GPU
each worker. Ray Data starts its workers anew for each call, so a model is loaded once a stage and
worker, not once a run.

A cluster is used when RAY_ADDRESS is set; each of its machines needs the kit and the model's files
under the same path. Otherwise Ray is started here, for as long as an engine is in use.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sao_utils.engines.base import (
    Completion,
    EngineError,
    Sampling,
    context_limit,
    encode,
    first_divergent_token,
    over_long,
)
from sao_utils.engines.loading import load_tokenizer, model_folder, model_name
from sao_utils.engines.reasoning import opens_reasoning, read_reply
from sao_utils.engines.transformers import TransformersEngine
from sao_utils.engines.vllm import engine_arguments, lora_rank, sampling_params
from sao_utils.recipe import Model

SHARE = 64  # rows that a worker gets at a time, and that are on disk when it is done with them
DEATHS = 3  # so many workers may be killed (memory, machines) before a call gives up
TRIES = 3  # to start Ray
STORE = 512 * 2**20  # bytes of Ray's shared memory on this machine; what is more goes to disk


class RayEngine:
    """Spreads the two verbs over `model.workers` processes. Results come as they are made."""

    def __init__(self, model: Model, adapter: Path | None, name: str):
        self.model, self.adapter, self.name = model, adapter, name
        self.tokenizer = load_tokenizer(model)
        self.ray = _start(model.workers)
        weakref.finalize(self, _stop, self.ray)
        there = self.ray.cluster_resources()
        self.gpus = there.get("GPU", 0)
        kind, have = ("GPU", self.gpus) if model.engine == "vllm" else ("CPU", there.get("CPU", 0))
        if have < model.workers:
            raise EngineError(
                f"Ray has {have:.0f} {kind}s, and model.workers={model.workers} needs one each. Set "
                "fewer workers, RAY_ADDRESS to a larger cluster, or workers=0 to do without Ray."
            )

    def generate(self, chats, sampling, seeds):
        if self.model.engine == "vllm":
            yield from self._generate_with_vllm(chats, sampling, seeds)
            return
        for done in self._spread("generate", vars(sampling), chats, seeds):
            yield [(i, Completion(*reply)) for i, reply in done]

    def choose(self, chats, prefix, choices):
        if self.model.engine == "vllm":
            yield from self._choose_with_vllm(chats, prefix, choices)
            return
        for done in self._spread("choose", {"prefix": prefix, "choices": choices}, chats, None):
            yield [(i, odds) for i, odds in done]

    # ------------------------------------------------------------ the kit's engine in each worker

    def _spread(self, verb: str, settings: dict, chats: list, seeds: list[int] | None) -> Iterator:
        """The results of each share of the work, as workers finish it."""
        # Like lengths together, the longest first: shorter batches, and no long one at the end.
        order = sorted(range(len(chats)), key=lambda i: -sum(len(m["content"]) for m in chats[i]))
        size = max(1, min(SHARE, math.ceil(len(chats) / self.model.workers)))
        shares = [order[k : k + size] for k in range(0, len(order), size)]
        # As text: a table of Ray's would guess at types.
        work = [
            {"share": json.dumps([[i, chats[i], seeds[i] if seeds else None] for i in share])}
            for share in shares
        ]
        if not work:
            return
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
        for row in self._results(data.iter_rows()):
            yield json.loads(row["done"])

    def _results(self, results: Iterator) -> Iterator:
        """Pass results on; what a worker raises becomes an EngineError."""
        try:
            yield from results
        except self.ray.exceptions.RayError as error:
            fault = str(getattr(error, "cause", None) or error).strip().splitlines() or [
                repr(error)
            ]
            raise EngineError(
                f"A Ray worker failed: {fault[-1].strip()}\nThe rows made so far are kept; run again to go "
                "on, or set model.workers=0 to see the fault in one process."
            ) from error

    # ------------------------------------------------------------ Ray's vLLM batch processor

    def _generate_with_vllm(self, chats, sampling: Sampling, seeds):
        stops = self._stops()
        asked = sampling_params(sampling) | {"stop_token_ids": stops}
        opened = opens_reasoning(self.tokenizer)
        prompts = encode(chats, self.tokenizer)
        for batch in self._process(prompts, asked, seeds, Completion("", 0, False)):
            done = []
            for i, reply in batch:
                if not isinstance(reply, Completion):
                    ended = reply["ids"][-1] in stops if reply["ids"] else False
                    kept = reply["ids"][:-1] if ended else reply["ids"]
                    reply = read_reply(self.tokenizer, kept, ended, opened)
                done.append((i, reply))
            yield done

    def _choose_with_vllm(self, chats, prefix: str, choices: tuple[str, ...]):
        shared, firsts = (
            first_divergent_token(chats[0], prefix, choices, self.tokenizer) if chats else ([], [])
        )
        prompts = [prompt + shared for prompt in encode(chats, self.tokenizer)]
        asked = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": firsts}
        nothing = {"odds": [-math.inf] * len(choices)}
        for batch in self._process(prompts, asked, [0] * len(prompts), nothing):
            yield [(i, reply["odds"]) for i, reply in batch]

    def _process(
        self, prompts: list[list[int]], asked: dict, seeds: list[int], nothing
    ) -> Iterator:
        """Batches of (index, reply) by vLLM; a prompt that fills the context gets `nothing`."""
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        arguments, lora = engine_arguments(self.model, self.adapter)
        limit = self.model.max_context or context_limit(self._config())
        too_long = over_long(prompts, limit)
        if too_long:  # one such prompt would end all of them
            yield [(i, nothing) for i in too_long]
        rows = [
            {
                "row": i,
                "tokenized_prompt": prompt,
                "sampling_params": {**asked, "seed": seed, "detokenize": False},
            }
            | ({"model": lora["path"]} if lora else {})
            for i, (prompt, seed) in enumerate(zip(prompts, seeds))
            if len(prompt) < limit
        ]
        if not rows:
            return
        extra = {"enable_lora": True, "max_lora_rank": lora_rank(lora["rank"])} if lora else {}
        config = vLLMEngineProcessorConfig(
            model_source=arguments.pop("model"),
            engine_kwargs=arguments | extra,
            concurrency=(self.model.workers, self.model.workers),
            batch_size=SHARE,
            chat_template_stage=False,  # token ids go in and come out: the kit's own tokenising
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        )
        reply = partial(reply_of, asked=asked.get("logprob_token_ids", []))
        blocks = math.ceil(len(rows) / SHARE)
        data = build_processor(config, postprocess=reply)(
            self.ray.data.from_items(rows, override_num_blocks=blocks)
        )
        for batch in self._results(data.iter_batches(batch_size=None, batch_format="pandas")):
            yield [
                (int(row["row"]), {"ids": list(row["ids"]), "odds": list(row["odds"])})
                for row in batch.to_dict("records")
            ]

    def _config(self):
        from transformers import AutoConfig

        path = model_folder(self.model.path)
        return AutoConfig.from_pretrained(path, revision=self.model.revision)

    def _stops(self) -> list[int]:
        """The tokens that end a reply: the model's own, and the tokenizer's."""
        from transformers import GenerationConfig

        path = model_folder(self.model.path)
        try:
            brought = GenerationConfig.from_pretrained(
                path, revision=self.model.revision
            ).eos_token_id
        except OSError:
            brought = self._config().eos_token_id
        brought = brought if isinstance(brought, list) else [brought]
        return sorted({*brought, self.tokenizer.eos_token_id}.difference([None]))


def reply_of(row: dict, asked: list[int]) -> dict:
    """What the kit needs of a row of Ray's vLLM processor: {row, new ids, asked log-probabilities}."""
    odds = []
    if asked:
        found = {int(token): value for token, value in row["logprobs"][0].items() if value}
        odds = [float(found[token]["logprob"]) for token in asked]
    return {"row": row["row"], "ids": [int(i) for i in row["generated_tokens"]], "odds": odds}


class Worker:
    """The kit's own engine in a process of Ray's; a call does one share of the work."""

    def __init__(self, model: dict, adapter: str | None, name: str, verb: str, settings: dict):
        of, folder = Model(**model), Path(adapter) if adapter else None
        if model_name(of, folder) != name:
            raise EngineError(
                f"A machine of the cluster has other files of {model['path']} than this one. Copy the "
                "same model and adapter to the same path on all of them."
            )
        self.engine = TransformersEngine(of, folder, name)
        self.verb, self.settings = verb, settings

    def __call__(self, row: dict) -> dict:
        numbers, chats, seeds = zip(*json.loads(row["share"]))
        if self.verb == "generate":
            batches = self.engine.generate(list(chats), Sampling(**self.settings), list(seeds))
            done = [(i, list(vars(reply).values())) for batch in batches for i, reply in batch]
        else:
            settings = self.settings | {"choices": tuple(self.settings["choices"])}
            done = [pair for batch in self.engine.choose(list(chats), **settings) for pair in batch]
        return {"done": json.dumps([(numbers[i], result) for i, result in done])}


_engines = 0  # that are in use
_ours = False  # whether this module started Ray, and so stops it


def _start(workers: int):
    """Ray, connected to a cluster or started here, without dashboard, telemetry and chatter."""
    global _engines, _ours
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
        for tries_left in reversed(range(TRIES)):
            try:
                ray.init(**settings, logging_level=logging.ERROR, log_to_driver=False)
                break
            except Exception as error:  # of no kind of its own: "timed out", on a busy machine
                ray.shutdown()
                if not tries_left:
                    raise EngineError(
                        f"Ray does not start: {error}\nTry again when less is running, or set "
                        "model.workers=0 to do without."
                    ) from error
        _ours = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    _engines += 1
    return ray


def _stop(ray) -> None:
    """Stop Ray, or leave the cluster, after the last engine."""
    global _engines, _ours
    _engines -= 1
    if _ours and not _engines:
        ray.shutdown()
        _ours = False
