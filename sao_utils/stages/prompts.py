"""Stage 1b: prompts, from one of several sources (SAO, Algorithm 1, step 2).

`persona` is the paper's way: the model reads the paper's template with a persona in it. `no_persona` is
the paper's ablation. `pre_query` lets the model write the user's turn after an empty user header, with
the persona in the system turn: Magpie's way (Xu et al. 2024, arXiv 2406.08464), which works for small
models. `file` takes existing prompts. `keywords` is SynPO's way (arXiv 2410.06961): a model trained for
the purpose, the self-prompt generator, writes a prompt and its solution around three keywords. All
sources give the same rows and count what they discard. A share of the prompts that a model wrote
(`prompts.instructions`) gets an additional instruction that an oracle can check.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from sao_utils import oracles, templates
from sao_utils.engines.base import NO_REPLY, Sampling, unanswered
from sao_utils.engines.loading import model_name
from sao_utils.engines.requests import MADE, batches_of_replies
from sao_utils.files import is_table, read_column, texts_of
from sao_utils.recipe import Model, Prompts, RecipeError
from sao_utils.stages.overlap import near_duplicates, shared_ngrams
from sao_utils.store import Run, make_rows, read_rows, replace_rows, row_id

IN_EVALUATION = "in an evaluation set"
NEAR_DUPLICATE = "near-duplicate"
#: template -> parser of its replies; replies to all other templates must begin with "User prompt:"
PARSERS = {None: lambda text: text.strip() or None, "keywords": templates.parse_question}
#: template -> stop string of its replies: the solution that SynPO's generator writes next is not used
STOPS = {"keywords": "</question>"}
FEW = 20  # with fewer prompts than this, the usable share is not checked (ours)


class StageFailed(RuntimeError):
    """A stage ran, but its output is of no use; the message says what to change."""


def write_prompts(run: Run, about: list[dict], policy: Model, round: int = 0) -> list[dict]:
    """The prompts of every seed, by `prompts.source`.

    Args:
        about: rows of `draw_personas`, or of `keyword_lists` if the source is `keywords`; one prompt is
            written for each. Not used if the source is `file`.
        policy: the model that writes the prompts.

    Returns:
        Rows {id, seed, round, source, persona or keywords, model, temperature, reply, prompt, discarded,
        tokens, finished}. `discarded` is None, or the reason why the row is not used further: "malformed"
        (the reply does not have the form that the template asks for), "cut off" (at the token limit),
        `NO_REPLY`, or "evaluation question" (an oracle reserves it for evaluation, so training on it
        would leak). `select_prompts` discards more.
    """
    settings = run.recipe.prompts
    if settings.source == "file":
        return make_rows(run, "prompts", _own_prompts(run, round), lambda rows: iter([rows]))
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    template = None if settings.source == "pre_query" else settings.source
    fingerprint = template and templates.fingerprint(template)
    made_with = ("prompt", fingerprint, sampling.named(), model_name(policy))
    of_round = (round,) if round else ()
    share = settings.instructions
    made_with += (share,) if share else ()
    facts = {
        "round": round,
        "source": settings.source,
        "model": policy.label,
        "temperature": settings.temperature,
    }
    jobs = [{**row, **facts, "id": row_id(*made_with, row["id"], *of_round)} for row in about]

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        by_id = {job["id"]: job for job in outstanding}
        asked = replace(sampling, stop=STOPS.get(template, ""))
        requests = [
            {"id": job["id"], "chat": _chat(template, job), "sampling": asked}
            for job in outstanding
        ]
        for batch in batches_of_replies(run, "prompts", policy, requests):
            yield [_row(by_id[reply["id"]], reply, template, share) for reply in batch]

    return make_rows(run, "prompts", jobs, work, policy.max_context)


def _chat(template: str | None, job: dict) -> list[dict]:
    """The chat that the model is given: a filled template, or an open user turn for it to write."""
    if template == "keywords":
        return generator_chat(job["keywords"])
    persona = job["persona"]
    if template:
        return [{"role": "user", "content": templates.render(template, persona=persona)}]
    system = [{"role": "system", "content": templates.render("pre_query", persona=persona)}]
    return (system if persona else []) + [{"role": "user", "content": "", "open": True}]


def generator_chat(keywords: list[str]) -> list[dict]:
    """The chat that SynPO's self-prompt generator is given, both in training and when it writes."""
    content = templates.render("keywords", keywords=", ".join(keywords))
    return [{"role": "user", "content": content}]


def _row(job: dict, reply: dict, template: str | None, share: float) -> dict:
    text = reply["text"]
    prompt = PARSERS.get(template, templates.parse_user_prompt)(text)
    if prompt is not None:
        prompt = oracles.instructed(prompt, share, random.Random(job["id"]))
    if unanswered(reply["tokens"], reply["finished"]):
        discarded = NO_REPLY
    elif prompt is None:
        discarded = "malformed"
    elif not reply["finished"]:
        discarded = "cut off"
    else:
        held_out = oracles.is_held_out(prompt, by_topic=share > 0)
        discarded = "evaluation question" if held_out else None
    kept = {key: reply[key] for key in MADE if key in reply}
    return {**job, "reply": text, "prompt": prompt, "discarded": discarded, **kept}


def _own_prompts(run: Run, round: int) -> list[dict]:
    """Existing prompts: for each seed, `prompts.count` of those in `prompts.data`, at random."""
    settings = run.recipe.prompts
    if settings.data == "tiny":
        every = list(oracles.tiny_paragraphs())
    elif is_table(settings.data):
        every = read_column(settings.data, settings.column)
    else:
        every = hub_column(settings)
    if len(every) < settings.count * (round + 1):
        print(
            f"{settings.data} has {len(every)} prompts; prompts.count={settings.count} asks for more in "
            f"round {round + 1}: it takes what is left."
        )
    rows = []
    for seed in run.recipe.seeds:
        numbered = list(enumerate(every))
        random.Random(seed).shuffle(numbered)
        rows += [
            {
                "id": row_id("own prompt", seed, k, text, round),
                "seed": seed,
                "round": round,
                "source": "file",
                "persona": None,
                "prompt": text,
                "discarded": "evaluation question" if oracles.is_held_out(text) else None,
            }
            for k, text in numbered[settings.count * round : settings.count * (round + 1)]
        ]
    return rows


def hub_column(settings: Prompts) -> list[str]:
    """A column of a data set on the hub. Raises RecipeError if it cannot be loaded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(settings.data, settings.config, split=settings.split)
    except Exception as error:  # offline, gated, no such name, split or configuration
        raise RecipeError(
            f"prompts.data: '{settings.data}' is no file (.jsonl, .json, .csv, .tsv, .parquet), and "
            f"could not be loaded from the hub ({type(error).__name__}: {error}). Check "
            "prompts.data, prompts.config and prompts.split."
        ) from error
    if settings.column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise RecipeError(f"{settings.data} has no column '{settings.column}'. It has: {there}.")
    return texts_of(
        rows.select_columns([settings.column]).to_list(), settings.column, settings.data
    )


def select_prompts(run: Run, prompts: list[dict], avoid: list[str]) -> list[dict]:
    """Apply the filters that need all prompts at once, and record the result in the rows.

    Args:
        prompts: rows of `write_prompts`.
        avoid: the evaluation's prompts, which training must not see; only used if
            `prompts.max_shared_words` is set.

    Returns:
        The rows, more of them now with a reason in `discarded`: "in an evaluation set" (it shares
        `prompts.max_shared_words` words in a row with one of `avoid`), or "near-duplicate" (of an
        earlier prompt of its seed, by `prompts.max_similarity`).

    Raises:
        StageFailed: the share of prompts that are left is below `prompts.min_usable`.
    """
    settings, path = run.recipe.prompts, run.rows("prompts")
    words, similarity = settings.max_shared_words, settings.max_similarity
    key = row_id([row["id"] for row in prompts], words, similarity, avoid if words else [])
    if words is None and similarity is None:
        key = None
    if any(row.get("selection") != key for row in prompts):
        prompts = [_without_selection(row) for row in prompts]
        if words is not None:
            prompts = _discard(prompts, IN_EVALUATION, lambda p: shared_ngrams(p, avoid, words))
        if similarity is not None:
            repeated = lambda p: near_duplicates(p, similarity)  # noqa: E731
            by_seed = ([r for r in prompts if r["seed"] == seed] for seed in run.recipe.seeds)
            prompts = [row for part in by_seed for row in _discard(part, NEAR_DUPLICATE, repeated)]
        if key is not None:
            prompts = [{**row, "selection": key} for row in prompts]
        ids = {row["id"] for row in prompts}
        latest = {row["id"]: row for row in read_rows(path)}
        others = [row for row in latest.values() if row["id"] not in ids]
        replace_rows(path, [*prompts, *others])
    _refuse_if_few(prompts, settings.min_usable)
    return prompts


def _without_selection(row: dict) -> dict:
    """A row as `write_prompts` made it, without the result of an earlier selection."""
    row = {key: value for key, value in row.items() if key != "selection"}
    chosen_out = row["discarded"] in (IN_EVALUATION, NEAR_DUPLICATE)
    return {**row, "discarded": None} if chosen_out else row


def _discard(rows: list[dict], reason: str, find: Callable[[list[str]], list]) -> list[dict]:
    """The rows; those kept so far in whose prompt `find` finds something get `reason` as `discarded`."""
    kept = [row for row in rows if row["discarded"] is None]
    hits = zip(kept, find([row["prompt"] for row in kept]))
    found = {row["id"] for row, hit in hits if hit is not None}
    return [{**row, "discarded": reason} if row["id"] in found else row for row in rows]


def _refuse_if_few(rows: list[dict], least: float) -> None:
    usable = sum(row["discarded"] is None for row in rows)
    if len(rows) < FEW or usable >= least * len(rows):
        return
    reasons = Counter(row["discarded"] for row in rows if row["discarded"])
    lines = [f"  {count:6,} {reason}" for reason, count in reasons.most_common()]
    examples = [row for row in rows if row["discarded"] == reasons.most_common(1)[0][0]][:2]
    lines += [
        f"  for example: {(row.get('reply') or row['prompt'] or '')[:300]!r}" for row in examples
    ]
    raise StageFailed(
        f"Only {usable:,} of {len(rows):,} prompts are usable, less than prompts.min_usable = "
        f"{least:g}. Discarded:\n"
        + "\n".join(lines)
        + "\nIf most are malformed, the model does not "
        "follow the persona template: try prompts.source=pre_query, or another model. If most are cut "
        "off, raise prompts.max_new_tokens. To go on all the same, lower prompts.min_usable."
    )


def repetition_rate(prompts: list[str]) -> float:
    """Share of prompts that repeat an earlier one, ignoring case and differences in white space.

    Our definition: the paper reports a repetition rate without defining it. 0 for an empty list.
    """
    return 1 - len(set(map(normalised, prompts))) / len(prompts) if prompts else 0.0


def normalised(prompt: str) -> str:
    """A prompt in lower case, with single spaces between words."""
    return " ".join(prompt.lower().split())


def near_duplicate_rate(prompts: list[str], similarity: float = 0.7) -> float:
    """Share of prompts that nearly repeat an earlier one (`overlap.near_duplicates`). Ours."""
    found = near_duplicates(prompts, similarity)
    return sum(earlier is not None for earlier in found) / len(found) if found else 0.0


def evaluation_overlap(prompts: list[dict], avoid: list[str], n: int = 8) -> dict:
    """Which prompts share n consecutive words with one of the evaluation's prompts.

    This only reports: discarding is done by `select_prompts`, if `prompts.max_shared_words` is set.

    Args:
        prompts: rows of `select_prompts`.
        avoid: the evaluation's prompts.
        n: GPT-3 used 8 to 13, depending on the length of a set's items (Brown et al. 2020, appendix C).

    Returns:
        {prompts, questions: how many of each were compared, matches: a row {id, seed, prompt, question,
        shared} for each prompt with an overlap; `shared` holds the words from `overlap.shared_ngrams`}.
    """
    rows = [row for row in prompts if row["discarded"] in (None, IN_EVALUATION)]
    found = shared_ngrams([row["prompt"] for row in rows], avoid, n)
    matches = [
        {key: row[key] for key in ("id", "seed", "prompt")}
        | {"question": avoid[hit[0]], "shared": hit[1]}
        for row, hit in zip(rows, found)
        if hit is not None
    ]
    return {"prompts": len(rows), "questions": len(avoid), "matches": matches}
