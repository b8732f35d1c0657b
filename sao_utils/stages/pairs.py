"""Stage 4: preference pairs (SAO, Algorithm 1, step 5), the controls' pairs, and the funnel."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from sao_utils.engines.base import NO_REPLY, disarm, load_tokenizer, unanswered
from sao_utils.engines.requests import tokens_about
from sao_utils.recipe import Arm, Pairs
from sao_utils.stages.judging import judge
from sao_utils.stages.prompts import write_prompts
from sao_utils.store import Run, row_id

AT_ONCE = 500  # pairs that are tokenised together: a token takes some 140 bytes until it is counted


def build_pairs(run: Run, arm: Arm, seed: int) -> list[dict]:
    """The training pairs of one arm and seed.

    "self": what the model itself preferred. "random": the same pairs, winner drawn by lot.
    "oracle": the pairs that the oracle can decide, its verdict. "sft_random": the pairs of "self"
    with one answer drawn by lot as "chosen", to be imitated: what training on own answers does
    without any judgement.

    Returns:
        One row a judged prompt, in trl's conversational form: {id, arm, seed, prompt, chosen,
        rejected (each a list of messages), margin, lengths, discarded}. `discarded` is None or the
        reason.
    """
    settings = run.recipe.pairs
    verdicts = [row for row in judge(run) if row["seed"] == seed]
    rows = []
    for verdict, tokens in zip(verdicts, _count_tokens(run, verdicts)):
        first_wins, discarded = _preference(verdict, arm, settings)
        if arm in ("random", "sft_random") and discarded is None:
            first_wins = random.Random(f"{verdict['id']} {arm} {seed}").random() < 0.5
        if discarded is None:
            discarded = _unusable(verdict, tokens, settings)
        better, worse = (0, 1) if first_wins else (1, 0)
        rows.append(
            {
                "id": row_id("preference", arm, verdict["id"], first_wins),
                "arm": arm,
                "seed": seed,
                "prompt": [{"role": "user", "content": verdict["prompt"]}],
                "chosen": [{"role": "assistant", "content": verdict["responses"][better]}],
                "rejected": [{"role": "assistant", "content": verdict["responses"][worse]}],
                "margin": None if verdict["margin"] is None else abs(verdict["margin"]),
                "lengths": [verdict["lengths"][better], verdict["lengths"][worse]],
                "discarded": discarded,
            }
        )
    return rows


def _preference(verdict: dict, arm: Arm, settings: Pairs) -> tuple[bool, str | None]:
    """Whether the first answer is preferred, and why the pair is not used (None: it is)."""
    if any(map(unanswered, verdict["lengths"], verdict["finished"])):
        return True, NO_REPLY
    if verdict["outcome"] == "identical":
        return True, "identical answers"
    if arm == "oracle":
        if verdict["quality"] is None:
            return True, "no oracle for this prompt"
        a, b = verdict["quality"]
        return a > b, "tie" if a == b else None
    if verdict["outcome"] in ("invalid", "tie"):
        return True, {"invalid": "invalid verdict", "tie": "tie"}[verdict["outcome"]]
    margin, first_wins = verdict["margin"], verdict["margin"] > 0
    # Sampled verdicts that disagree cancel to 0: they name no winner, whatever the filter.
    if verdict["outcome"] == "inconsistent" and (settings.require_consistent or margin == 0):
        return first_wins, "orders disagree"
    if abs(margin) < settings.min_margin:
        return first_wins, "margin too small"
    return first_wins, None


def _unusable(verdict: dict, tokens: list[int], settings: Pairs) -> str | None:
    """Why a pair cannot be trained on, whoever labelled it."""
    if not all(text.strip() for text in verdict["responses"]):
        return "empty answer"  # a mean log-probability over no tokens is 0/0
    if not all(verdict["finished"]):
        return "cut off"  # the end token would be appended to it, and breaking off be learned
    if max(tokens) > settings.max_tokens:
        return "too long"  # truncation would take the end token away
    return None


def _count_tokens(run: Run, verdicts: list[dict]) -> Iterator[list[int]]:
    """Tokens of prompt and response together, as in training, for both responses of each verdict.

    Of a model behind a server, which cannot be trained, they are an estimate.
    """
    if run.recipe.model.engine == "api":
        for row in verdicts:
            yield [tokens_about(row["prompt"] + text) for text in row["responses"]]
        return
    tokenizer = load_tokenizer(run.recipe.model)
    for start in range(0, len(verdicts), AT_ONCE):
        chats = [
            disarm(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": text},
                ],
                tokenizer,
            )
            for row in verdicts[start : start + AT_ONCE]
            for text in row["responses"]
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        yield from map(list, zip(counts[0::2], counts[1::2]))


def funnel(run: Run, arm: Arm = "self") -> list[tuple[str, int]]:
    """What became of every persona, over all seeds, from the persona to the training pair.

    Returns:
        (label, count) rows: "personas", minus each reason, "prompts", minus each reason, "pairs".
        The counts of the reasons are negative, so that they add up: nothing is lost unseen.
    """
    prompts = write_prompts(run)
    kept = [row for row in prompts if row["discarded"] is None]
    pairs = [row for seed in run.recipe.seeds for row in build_pairs(run, arm, seed)]
    used = [row for row in pairs if row["discarded"] is None]
    return [
        ("personas", len(prompts)),
        *_reasons(prompts),
        ("prompts", len(kept)),
        *_reasons(pairs),
        ("pairs", len(used)),
    ]


def _reasons(rows: list[dict]) -> list[tuple[str, int]]:
    counts = Counter(row["discarded"] for row in rows if row["discarded"] is not None)
    return [(reason, -count) for reason, count in counts.most_common()]
