"""Stage 1a: personas, one line of text each (SAO, Algorithm 1, step 1)."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path

import yaml

from sao_utils import oracles
from sao_utils.files import read_column
from sao_utils.recipe import RecipeError
from sao_utils.store import Run, complete, read_rows, row_id

HUB_PERSONAS = "proj-persona/PersonaHub"  # CC BY-NC-SA 4.0: read on request, never bundled
TRIES, PAUSE = 3, 10.0  # attempts to read it, and seconds between them


def draw_personas(run: Run, round: int = 0) -> list[dict]:
    """The personas of every seed, by `prompts.personas` and `prompts.count`; each round has others.

    Returns:
        Rows {id, seed, persona}, `prompts.count` for each seed; with `prompts.personas: null` the
        persona is None. Personas from a file or from the hub are drawn at random, without repetition
        within a seed (from the hub: across all seeds); a persona that the source holds twice counts once.
        Those from the hub are kept in rows/personas.jsonl, so that the rest of a run needs no hub.

    Raises:
        RecipeError: the file is missing, is empty, has no column "persona" or has fewer personas than
            asked for; or the hub cannot be reached.
    """
    settings, seeds = run.recipe.prompts, run.recipe.seeds
    source, count = settings.personas, settings.count
    if source is None:
        texts = {seed: [None] * count for seed in seeds}
    elif source == "tiny":
        drawn = {seed: oracles.tiny_personas(count * (round + 1), seed) for seed in seeds}
        texts = {seed: drawn[seed][count * round :] for seed in seeds}
    elif source == "everyday":
        texts = {seed: _pick(_everyday_personas(), count, seed, source, round) for seed in seeds}
    elif source == "hub":
        texts = {seed: _hub_personas(run, seed, round) for seed in seeds}
    else:
        every = read_column(source, "persona")
        different = list(dict.fromkeys(every))
        if repeats := len(every) - len(different):
            warnings.warn(
                f"{Path(source).name}: {repeats} of {len(every)} rows repeat a persona and are left "
                "out.",
                stacklevel=2,
            )
        texts = {seed: _pick([*different], count, seed, source, round) for seed in seeds}
    return [
        {"id": row_id("persona", seed, k + count * round, text), "seed": seed, "persona": text}
        for seed in seeds
        for k, text in enumerate(texts[seed])
    ]


def _pick(different: list[str], count: int, seed: int, source: str, round: int = 0) -> list[str]:
    """The `count` personas of a round, from a list that is shuffled in place with the seed."""
    if len(different) < count * (round + 1):
        raise RecipeError(
            f"{source} has {len(different) - count * round} different personas that no earlier seed or "
            f"round has taken, prompts.count asks for {count}. Lower the count."
        )
    # Not `sample`, whose draws depend on the count: this way, a first round with a raised count goes on.
    random.Random(seed).shuffle(different)
    return different[count * round : count * (round + 1)]


def _everyday_personas() -> list[str]:
    """Every combination of who a person is, what they like, and what is on their mind."""
    text = (files("sao_utils") / "prompts" / "everyday_personas.yaml").read_text(encoding="utf-8")
    parts = yaml.safe_load(text)
    combinations = product(parts["who"], parts["interest"], parts["situation"])
    return [f"{_article(who)} {who} who {likes} and {has}." for who, likes, has in combinations]


def _article(noun: str) -> str:
    return "An" if noun[0] in "aeiou" else "A"


def _hub_personas(run: Run, seed: int, round: int) -> list[str]:
    """The personas of a seed and round that are on disk; else new ones that the run has not used yet."""
    count, path = run.recipe.prompts.count, run.rows("personas")
    of_round = (round,) if round else ()
    job = {"id": row_id("hub personas", HUB_PERSONAS, count, seed, *of_round)}
    job |= {"seed": seed, "round": round, "count": count}

    def fetch(jobs: list[dict]) -> Iterator[list[dict]]:
        revision = _hub_revision()
        taken = {
            text
            for row in read_rows(path)
            if row.get("count") == count and (row["seed"], row.get("round", 0)) != (seed, round)
            for text in row["texts"]
        }
        different = dict.fromkeys(text for text in _stream_from_hub(revision) if text not in taken)
        texts = _pick(list(different), count, seed, HUB_PERSONAS)
        yield [{**job, "revision": revision, "texts": texts}]

    return complete(path, [job], fetch, "personas")[0]["texts"]


def _hub_revision() -> str | None:
    """The commit of Persona-Hub. This is asked first, because it fails within seconds without a hub."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(HUB_PERSONAS, timeout=10).sha
    except Exception as error:  # offline, no DNS, a proxy, deleted: the remedy is the same
        raise RecipeError(
            f"Persona-Hub ({HUB_PERSONAS} on the hub) cannot be reached: {type(error).__name__}. "
            "prompts.personas=hub needs the internet once a run; or give a file with a column "
            '"persona".'
        ) from error


def _stream_from_hub(revision: str | None) -> Iterator[str]:
    """Every persona of Persona-Hub's list (200,000 lines), read as a stream.

    If a read fails, `datasets` retries for some two minutes. A connection that is lost for longer is
    opened again and continues after the last row (the part of the file before it is downloaded again,
    but not yielded twice).

    Raises:
        RecipeError: reading failed `TRIES` times.
    """
    from datasets import load_dataset

    stream, read = None, 0
    for left in reversed(range(TRIES)):
        try:
            if stream is None:
                stream = load_dataset(
                    HUB_PERSONAS, "persona", split="train", streaming=True, revision=revision
                )
            for row in stream:
                read += 1
                if text := (row["persona"] or "").strip():
                    yield text
            return
        except Exception as error:  # no common base class: the HTTP library has changed before
            fault = (
                f"Reading Persona-Hub stopped after {read:,} rows ({type(error).__name__}: {error})"
            )
            if not left:
                raise RecipeError(
                    f"{fault}, {TRIES} times. Run again once the connection is better; or give a file "
                    'with a column "persona" as prompts.personas.'
                ) from error
            print(f"{fault}; going on in {PAUSE:.0f} s.", flush=True)
            time.sleep(PAUSE)
            if stream is not None:
                stream.load_state_dict(stream.state_dict())
