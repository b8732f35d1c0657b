"""Requests to models: each is made once, stored by its content, and priced in advance.

A request is `{"chat": ..., "sampling": Sampling}` (write a reply) or `{"chat": ..., "prefix": ...,
"choices": ...}` (log-probabilities of given replies). Its id and its seed are hashes of the model and
all of this, so equal requests are one request. Replies paid for are also kept in `results/cache`, which
all runs share, so that none is bought twice.

Cost estimates are our own: tokens read are estimated as bytes / 4 (a Chinese character has three bytes
and takes about one token); for tokens written, the limit is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sao_utils.disk import turn
from sao_utils.engines.api import VERDICT_TOKENS
from sao_utils.engines.base import unanswered
from sao_utils.engines.loading import model_name
from sao_utils.engines.registry import load_engine
from sao_utils.recipe import Model
from sao_utils.store import (
    Run,
    complete,
    make_rows,
    read_rows,
    results_folder,
    row_id,
    seed_of,
    standing,
)

#: What a stage that keeps rows of its own copies from a reply, besides its text.
MADE = ("tokens", "finished", "reasoning", "max_context")
BYTES = 4  # per token in English, roughly
WAVES = 4  # times `model.concurrency` requests are sent between two checks of the cap


class CostError(RuntimeError):
    """Asking would cost more than `evaluation.max_cost`; the message says what to do."""


def replies(run: Run, stage: str, model: Model, requests: list[dict]) -> list[dict]:
    """The model's replies, in the order of the requests.

    They are stored in the run's `rows/<stage>.jsonl`; several models may share a stage. All new requests
    go to the engine at once (with `evaluation.max_cost` and a price, a few waves at a time). Requests
    with equal content share one reply, even across calls; each still gets a row.

    Args:
        requests: {"chat", "sampling"} or {"chat", "prefix", "choices"}; optionally with "of", a dict of
            further columns for the row, whose id is then a hash of the content and "of".

    Returns:
        {id, **of, request, text, tokens, finished} for a request with `sampling`, with "reasoning" if the
        model reasons; {id, **of, logps} for one with `choices`: a log-probability in nats for each, None
        where there is none (`Engine.choose`). Rows that were bought also have {tokens_in, tokens_out,
        dollars, run}; rows that failed because of their length have {max_context} and are made again
        under another limit.

    Raises:
        CostError: the estimate, or what the run has spent, exceeds `evaluation.max_cost`. What was
            bought is kept.
        ValueError: a request of neither kind.
    """
    contents = _ids(model, requests)
    ids = [
        row_id(content, request["of"]) if "of" in request else content
        for content, request in zip(contents, requests)
    ]
    jobs = {
        i: {**request, "id": i, "content": content}
        for i, content, request in zip(ids, contents, requests)
    }

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        there = {
            row["request"]: row
            for row in standing(run.rows(stage), model.max_context).values()
            if "request" in row
        }
        if known := [job for job in outstanding if job["content"] in there]:
            yield [_row(job, there[job["content"]]) for job in known]
        waiting: dict[str, list[dict]] = {}
        for job in outstanding:
            if job["content"] not in there:
                waiting.setdefault(job["content"], []).append(job)
        unique = [{**same[0], "id": content} for content, same in waiting.items()]
        for batch in batches_of_replies(run, stage, model, unique) if unique else ():
            yield [_row(job, reply) for reply in batch for job in waiting[reply["id"]]]

    made = make_rows(run, stage, list(jobs.values()), work, model.max_context)
    rows = {row["id"]: row for row in made}
    return [rows[i] for i in ids]


def _row(job: dict, reply: dict) -> dict:
    """A job's row: the columns of its "of", the id of the request, and the reply."""
    keys = ("text", *MADE, "logps", "tokens_in", "tokens_out", "dollars", "run")
    of = {**job["of"], "request": job["content"]} if "of" in job else {}
    return {"id": job["id"], **of, **{key: reply[key] for key in keys if key in reply}}


def batches_of_replies(
    run: Run, stage: str, model: Model, requests: list[dict]
) -> Iterator[list[dict]]:
    """Replies, a batch at a time and in any order, to requests whose ids (and thus seeds) are given.

    For a stage that keeps rows of its own (`store.make_rows`). Replies from a server are bought as in
    `replies`: once per id for all runs, under the cap. They come as a single batch.

    Args:
        requests: as in `replies`, each with its own "id"; here two equal requests stay two requests.

    Returns, raises: as in `replies`.
    """
    if model.engine != "api":
        yield from _generate(model, requests)
        return
    cache, label = _cache(model), f"{stage}, {model.path}"
    with turn(cache.with_suffix(".lock")):  # another process may be buying the same
        bought = complete(cache, requests, partial(_bought, run, model), label, model.max_context)
    yield bought


def spent(run: Run) -> float:
    """US$ that the run and its variants have paid so far, based on the tokens that servers counted."""
    files, purse = sorted((results_folder() / "cache").glob("*.jsonl")), _purse(run)
    rows = (row for path in files for row in read_rows(path))
    return math.fsum(row.get("dollars") or 0 for row in rows if row.get("run") == purse)


def _ids(model: Model, requests: list[dict]) -> list[str]:
    name = model_name(model)
    return [row_id("asked", name, request["chat"], _verb(request)) for request in requests]


def _verb(request: dict) -> tuple:
    """What distinguishes two requests with the same chat."""
    if ("sampling" in request) == ("choices" in request):
        raise ValueError("a request has either 'sampling', or 'prefix' and 'choices'")
    if "sampling" in request:
        return ("generate", tuple(sorted(request["sampling"].named().items())))
    return ("choose", request["prefix"], tuple(request["choices"]))


def _generate(model: Model, jobs: list[dict]) -> Iterator[list[dict]]:
    """Rows from the engine, a batch at a time, with the token counts that a server reports."""
    engine, groups = load_engine(model), {}
    for job in jobs:
        groups.setdefault(_verb(job), []).append(job)
    for (verb, *_), group in groups.items():
        chats = [job["chat"] for job in group]
        if verb == "generate":
            seeds = [seed_of(job["id"]) for job in group]
            batches = engine.generate(chats, group[0]["sampling"], seeds)
        else:
            batches = engine.choose(chats, group[0]["prefix"], tuple(group[0]["choices"]))
        for batch in batches:
            used = getattr(engine, "usage", {})
            yield [_made(model, group[k], reply, used.get(k)) for k, reply in batch]


def _made(model: Model, job: dict, reply, used: tuple[int, int] | None) -> dict:
    """The row of a reply (of `generate` or `choose`).

    A reply that was cut off by the context, or refused by a server, has {"max_context": the limit in
    force}, and `store.complete` makes it again under another limit. A reply that a server cut short
    has no such key: it says nothing about the context, and was paid for.
    """
    if "sampling" in job:
        row = {"text": reply.text, "tokens": reply.tokens, "finished": reply.finished}
        if reply.reasoning:
            row["reasoning"] = reply.reasoning
        short = not reply.finished and reply.tokens < job["sampling"].max_new_tokens
        if model.engine == "api":
            short = unanswered(reply.tokens, reply.finished)
    else:
        row = {"logps": [p if math.isfinite(p) else None for p in reply]}
        short = used == (0, 0) if model.engine == "api" else set(row["logps"]) == {None}
    if short:
        row["max_context"] = model.max_context
    if used:
        row["tokens_in"], row["tokens_out"] = used
    return {"id": job["id"], **row}


def _bought(run: Run, model: Model, jobs: list[dict]) -> Iterator[list[dict]]:
    """Rows from a server, with what each cost. Stops before the cap is exceeded, as far as can be known."""
    by_id = {job["id"]: job for job in jobs}
    cap = run.recipe.evaluation.max_cost if model.priced else None
    if model.priced:
        read, written = _tokens(jobs)
        cost = dollars(model, read, written)
        print(
            f"{model.path}: {len(jobs):,} requests are new: about {read:,} tokens in, at most "
            f"{written:,} out, about US$ {cost:,.4f}",
            flush=True,
        )
        _check(run, cost, cap)
    size = len(jobs) if cap is None else WAVES * model.concurrency
    for start in range(0, len(jobs), size):
        wave = jobs[start : start + size]
        _check(run, dollars(model, *_tokens(wave)), cap)
        for batch in _generate(model, wave):
            for row in batch:
                if "tokens_in" not in row:
                    row["tokens_in"], row["tokens_out"] = _tokens([by_id[row["id"]]])
                row["dollars"] = dollars(model, row["tokens_in"], row["tokens_out"])
                row["run"] = _purse(run)
            yield batch  # when this resumes, the caller has written it to disk


def _check(run: Run, more: float | None, cap: float | None) -> None:
    so_far = 0.0 if cap is None else spent(run)
    if cap is not None and so_far + more > cap:
        raise CostError(
            f"This may cost US$ {more:,.4f}; the run has spent US$ {so_far:,.4f}, and "
            f"evaluation.max_cost is {cap:g}. Nothing more was sent; what was bought is kept. Raise "
            "evaluation.max_cost, ask fewer questions, or allow fewer new tokens."
        )


def estimated_tokens(text: str) -> int:
    """Approximate number of tokens in a text, for when there is no tokenizer."""
    return math.ceil(len(text.encode(errors="replace")) / BYTES)


def _tokens(requests: list[dict]) -> tuple[int, int]:
    """Approximate (tokens read, most tokens written) by a server."""
    texts = [[m["content"] for m in r["chat"]] + [r.get("prefix", "")] for r in requests]
    read = sum(estimated_tokens("".join(of)) for of in texts)
    limits = [r["sampling"].max_new_tokens if "sampling" in r else VERDICT_TOKENS for r in requests]
    return read, sum(limits)


def dollars(model: Model, tokens_in: float, tokens_out: float) -> float | None:
    """US$ for tokens read and written; None without a price."""
    if model.price_in is None and model.price_out is None:
        return None
    return (tokens_in * (model.price_in or 0) + tokens_out * (model.price_out or 0)) / 1e6


def _cache(model: Model) -> Path:
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", model.path).strip("-.")[-60:]
    return results_folder() / "cache" / f"{plain}-{row_id(model_name(model))[:8]}.jsonl"


def _purse(run: Run) -> str:
    """The run's name; for a variant, the name of its run, with which it shares the cap."""
    folder, every = run.folder.resolve(), results_folder().resolve()
    return folder.relative_to(every).parts[0] if folder.is_relative_to(every) else folder.name
