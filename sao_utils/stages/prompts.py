"""Stage 1: personas, and the prompt that each of them would write (SAO, Algorithm 1, steps 1-2)."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from sao_utils import templates
from sao_utils.engines.base import NO_REPLY, Sampling, model_name, unanswered
from sao_utils.engines.requests import replies
from sao_utils.evaluation.questions import evaluated_prompts, read_column
from sao_utils.oracles import tiny_world as world
from sao_utils.recipe import RecipeError
from sao_utils.stages.overlap import near_duplicates, shared_ngrams
from sao_utils.store import Run, complete, make_rows, read_rows, row_id

HUB_PERSONAS = "proj-persona/PersonaHub"  # CC BY-NC-SA 4.0: read on request, never bundled
TRIES, PAUSE = 3, 10.0  # to read it, and seconds between them
IN_EVALUATION = "in an evaluation set"
MADE = ("tokens", "finished", "max_context")  # what a row keeps of a reply, beside its text


def draw_personas(run: Run) -> list[dict]:
    """The personas of every seed.

    Returns:
        Rows {id, seed, persona}, `personas.count` for each seed. Those of a file, and of the hub, are
        drawn by lot, without repetition within a seed (of the hub: over all seeds); a persona that
        the source holds twice counts once. Those of the hub are kept in rows/personas.jsonl, so
        that the rest of a run needs no hub.

    Raises:
        RecipeError: the file is missing, empty, has no column "persona" or fewer personas than asked
            for; the hub cannot be reached.
    """
    settings, seeds = run.recipe.personas, run.recipe.seeds
    if settings.source == "tiny":
        texts = {seed: _tiny_personas(settings.count, seed) for seed in seeds}
    elif settings.source == "hub":
        texts = {seed: _hub_personas(run, seed) for seed in seeds}
    else:
        every = read_column(settings.source, "persona")
        different = list(dict.fromkeys(every))
        repeats = len(every) - len(different)
        if repeats:
            warnings.warn(
                f"{Path(settings.source).name}: {repeats} of {len(every)} rows repeat a persona and "
                "are left out.",
                stacklevel=2,
            )
        texts = {seed: _pick([*different], settings.count, seed, settings.source) for seed in seeds}
    return [
        {"id": row_id("persona", seed, k, text), "seed": seed, "persona": text}
        for seed in seeds
        for k, text in enumerate(texts[seed])
    ]


def _tiny_personas(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [world.draw_persona(rng, held_out=True)[0] for _ in range(count)]


def _pick(different: list[str], count: int, seed: int, source: str) -> list[str]:
    """The first `count` of a list that is shuffled in place, by the seed."""
    if len(different) < count:
        raise RecipeError(
            f"{source} has {len(different)} different personas that no earlier seed has taken, "
            f"personas.count asks for {count}. Lower the count."
        )
    # Not `sample`, which draws others for another count: a run whose count is raised goes on.
    random.Random(seed).shuffle(different)
    return different[:count]


def _hub_personas(run: Run, seed: int) -> list[str]:
    """The kept personas of a seed; or new ones that no other seed of the run has."""
    count, path = run.recipe.personas.count, run.rows("personas")
    job = {"id": row_id("hub personas", HUB_PERSONAS, count, seed), "seed": seed, "count": count}

    def fetch(jobs: list[dict]) -> Iterator[list[dict]]:
        revision = _hub_revision()
        taken = {
            text
            for row in read_rows(path)
            if row.get("count") == count and row["seed"] != seed
            for text in row["texts"]
        }
        different = dict.fromkeys(text for text in _stream_from_hub(revision) if text not in taken)
        texts = _pick(list(different), count, seed, HUB_PERSONAS)
        yield [{**job, "revision": revision, "texts": texts}]

    return complete(path, [job], fetch, "personas")[0]["texts"]


def _hub_revision() -> str | None:
    """The commit of Persona-Hub, asked for first since it says within seconds if there is no hub."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(HUB_PERSONAS, timeout=10).sha
    except Exception as error:  # offline, no name server, a proxy, gone: the cure is the same
        raise RecipeError(
            f"Persona-Hub ({HUB_PERSONAS} on the hub) cannot be reached: {type(error).__name__}. "
            "personas.source=hub needs the internet once a run; or give a .jsonl or .csv file with a "
            'column "persona".'
        ) from error


def _stream_from_hub(revision: str | None) -> Iterator[str]:
    """Every persona of Persona-Hub's list (200,000 lines), read as a stream.

    Where a read fails, `datasets` tries it again for some two minutes. A connection that is lost for
    longer is opened anew, and goes on behind the last row (what lies before it in its file is
    fetched again, but not given twice).

    Raises:
        RecipeError: after so many `TRIES`.
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
        except Exception as error:  # of no common kind: the HTTP library has changed before
            said = (
                f"Reading Persona-Hub stopped after {read:,} rows ({type(error).__name__}: {error})"
            )
            if not left:
                raise RecipeError(
                    f"{said}, {TRIES} times. Run again once the connection is better; or give a .jsonl "
                    'or .csv file with a column "persona" as personas.source.'
                ) from error
            print(f"{said}; going on in {PAUSE:.0f} s.", flush=True)
            time.sleep(PAUSE)
            if stream is not None:
                stream.load_state_dict(stream.state_dict())


def write_prompts(run: Run) -> list[dict]:
    """Let the model write each persona's prompt.

    Returns:
        Rows {id, seed, persona, reply, prompt, discarded, tokens, finished}. `discarded` is None,
        or says why the row goes no further: "malformed" (the reply does not begin as the template
        asks), "cut off" (at the token limit), `engines.NO_REPLY`, "evaluation question" (tiny
        world: it asks for a held-out combination, so training on it would leak), "in an evaluation
        set" (it shares `personas.ngram` words in a row with one of the evaluation's prompts, see
        `questions.evaluated_prompts`), or
        "near-duplicate" (of an earlier prompt of its seed, by `personas.max_similarity`). The last
        two depend on all prompts; the rows on disk do not have them.
    """
    recipe = run.recipe
    settings = recipe.personas
    template = "persona" if settings.with_persona else "no_persona"
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    made_with = (
        "prompt",
        templates.fingerprint(template),
        vars(sampling),
        model_name(recipe.model),
    )
    jobs = [{**person, "id": row_id(*made_with, person["id"])} for person in draw_personas(run)]
    asked = evaluated_prompts(run) if settings.ngram else []  # a file that is missing: said now

    def work(outstanding):
        by_id = {job["id"]: job for job in outstanding}
        requests = []
        for job in outstanding:
            content = templates.render(template, persona=job["persona"])
            chat = [{"role": "user", "content": content}]
            requests.append({"id": job["id"], "chat": chat, "sampling": sampling})
        for batch in replies(run, "prompts", recipe.model, requests):
            yield [_prompt_row(by_id[reply["id"]], reply) for reply in batch]

    rows = make_rows(run, "prompts", jobs, work, recipe.model.max_context)
    return _discard_overlaps(run, rows, asked)


def _discard_overlaps(run: Run, rows: list[dict], asked: list[str]) -> list[dict]:
    settings = run.recipe.personas
    if settings.ngram is not None:
        rows = _discard(rows, IN_EVALUATION, lambda p: shared_ngrams(p, asked, settings.ngram))
    if settings.max_similarity is not None:
        repeated = lambda p: near_duplicates(p, settings.max_similarity)  # noqa: E731
        by_seed = ([row for row in rows if row["seed"] == seed] for seed in run.recipe.seeds)
        rows = [row for part in by_seed for row in _discard(part, "near-duplicate", repeated)]
    return rows


def _discard(rows: list[dict], reason: str, find: Callable[[list[str]], list]) -> list[dict]:
    """The rows, `discarded` with the reason where `find` finds something in a prompt kept so far."""
    kept = [row for row in rows if row["discarded"] is None]
    hits = zip(kept, find([row["prompt"] for row in kept]))
    found = {row["id"] for row, hit in hits if hit is not None}
    return [{**row, "discarded": reason} if row["id"] in found else row for row in rows]


def evaluation_overlap(run: Run, n: int = 8) -> dict:
    """Which prompts share n words in a row with one of the evaluation's (`evaluated_prompts`).

    Only looks: what is discarded is up to `personas.ngram`.

    Args:
        n: GPT-3 took 8 to 13, by the length of a set's items (Brown et al. 2020, appendix C).

    Returns:
        {prompts, questions: how many were compared, matches: a row {id, seed, prompt, question,
        shared} for each prompt that has some; `shared` are the words of `overlap.shared_ngrams`}.
    """
    asked = evaluated_prompts(run)
    rows = [row for row in write_prompts(run) if row["discarded"] in (None, IN_EVALUATION)]
    found = shared_ngrams([row["prompt"] for row in rows], asked, n)
    matches = [
        {key: row[key] for key in ("id", "seed", "prompt")}
        | {"question": asked[hit[0]], "shared": hit[1]}
        for row, hit in zip(rows, found)
        if hit is not None
    ]
    return {"prompts": len(rows), "questions": len(asked), "matches": matches}


def _prompt_row(job: dict, reply: dict) -> dict:
    prompt, discarded = templates.parse_user_prompt(reply["text"]), None
    if unanswered(reply["tokens"], reply["finished"]):
        discarded = NO_REPLY
    elif prompt is None:
        discarded = "malformed"
    elif not reply["finished"]:
        discarded = "cut off"
    elif _is_held_out(prompt):
        discarded = "evaluation question"
    found = {"reply": reply["text"], "prompt": prompt, "discarded": discarded}
    return {**job, **found, **{key: reply[key] for key in MADE if key in reply}}


def _is_held_out(prompt: str) -> bool:
    """Whether a prompt is a question of the tiny world from a combination kept for evaluation."""
    question = world.parse_question(prompt)
    return question is not None and world.SPLIT[question.combination] != "train"


def repetition_rate(prompts: list[str]) -> float:
    """Share of prompts that say what an earlier one said, up to case and white space.

    Ours: the paper reports a repetition rate without defining it. 0 for an empty list.
    """
    seen = {" ".join(prompt.lower().split()) for prompt in prompts}
    return 1 - len(seen) / len(prompts) if prompts else 0.0


def near_duplicate_rate(prompts: list[str], similarity: float = 0.7) -> float:
    """Share of prompts that nearly say what an earlier one said (`overlap.near_duplicates`). Ours."""
    found = near_duplicates(prompts, similarity)
    return sum(earlier is not None for earlier in found) / len(found) if found else 0.0
