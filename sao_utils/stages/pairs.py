"""Stage 4: preference pairs (SAO, Algorithm 1, step 5), and the pairs of the controls."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from sao_utils.engines.base import NO_REPLY, escape_special_tokens, unanswered
from sao_utils.engines.loading import load_tokenizer, model_name
from sao_utils.engines.requests import estimated_tokens
from sao_utils.recipe import Arm, Model, Pairs, ScoredPairs
from sao_utils.stages.scoring import repetition
from sao_utils.store import Run, read_rows, replace_rows, row_id

AT_ONCE = 500  # pairs tokenised together: each token takes some 140 bytes until it is counted


def build_pairs(run: Run, verdicts: list[dict], policy: Model, arm: Arm = "self") -> list[dict]:
    """The training pairs of one arm, over all seeds, filtered by the recipe's `pairs` section.

    "self": the judge's preferences. "random": the same pairs, with the winner drawn at random. "oracle":
    the pairs that the oracle can decide, with its verdict. "sft_random": the pairs of "self" with one
    answer drawn at random as "chosen", to be imitated: the effect of training on the model's own answers
    without any judgement.

    The pairs are kept in rows/pairs.jsonl (rows/pairs_<arm>.jsonl for the other arms). This file holds
    what is trained on, in trl's conversational format, ready for `datasets.load_dataset("json",
    data_files=...)` and trl's trainers. What is not trained on is kept beside it, with the reason, in
    discarded_pairs.jsonl (discarded_pairs_<arm>.jsonl for the other arms).

    Args:
        verdicts: rows of `judge_pairs` on `response_pairs`.
        policy: the model to be trained: tokens are counted with its tokenizer.

    Returns:
        One row for each judged prompt: {id, arm, seed, round, prompt_id, response_ids [chosen, rejected],
        prompt, chosen, rejected (each a list of messages), outcome, margin, lengths [tokens of chosen,
        rejected], discarded}. `discarded` is None or the reason.
    """
    settings, rows = run.recipe.pairs, []
    for verdict, tokens in zip(verdicts, _count_tokens(policy, verdicts)):
        first_wins, discarded = _preference(verdict, arm, settings)
        if arm in ("random", "sft_random") and discarded is None:
            lot = random.Random(f"{verdict['id']} {arm} {verdict['seed']}")
            first_wins = lot.random() < 0.5
        if discarded is None:
            discarded = _unusable(verdict, tokens, settings)
        rows.append(_row(verdict, arm, first_wins, discarded))
    _keep(run, arm, rows)
    return rows


def build_scored_pairs(
    run: Run, scored: list[dict], policy: Model, name: str, settings: ScoredPairs
) -> list[dict]:
    """SynPO's filter (arXiv 2410.06961, Algorithm 1): the first response of each pair is the chosen one.

    A pair is used if its gap is above `threshold` and neither text repeats itself too much; if more than
    `max_pairs` are left, that many are drawn. The rows are written (to rows/pairs_<name>.jsonl) and
    returned as by `build_pairs`, with an additional "gap".

    Args:
        scored: rows of `score_gaps` or `best_and_worst`, of one seed and round.
        policy: the model whose tokenizer counts the tokens.
        name: the name of the method.
    """
    rows = []
    for pair, tokens in zip(scored, _count_tokens(policy, scored)):
        discarded = None
        if any(map(unanswered, pair["lengths"], pair["finished"])):
            discarded = NO_REPLY
        elif pair["responses"][0] == pair["responses"][1]:
            discarded = "identical answers"
        elif pair["gap"] is None:
            discarded = "not scored"
        elif pair["gap"] <= settings.threshold:
            discarded = "gap too small"
        elif max(map(repetition, pair["responses"])) > settings.max_repetition:
            discarded = "repetitive"
        else:
            discarded = _unusable(pair, tokens, run.recipe.pairs)
        rows.append({**_row(pair, name, True, discarded), "gap": pair["gap"]})
    used = [row for row in rows if row["discarded"] is None]
    if settings.max_pairs is not None and len(used) > settings.max_pairs:
        lots = random.Random(f"pairs {used[0]['seed']} {used[0]['round']}")
        drawn = {row["id"] for row in lots.sample(used, settings.max_pairs)}
        for row in used:
            row["discarded"] = None if row["id"] in drawn else "not drawn"
    _keep(run, name, rows)
    return rows


def _row(verdict: dict, arm: str, first_wins: bool, discarded: str | None) -> dict:
    turn = 1 if first_wins else -1
    chosen, rejected = verdict["responses"][::turn]
    return {
        "id": row_id("preference", arm, verdict["id"], first_wins),
        "arm": arm,
        **{key: verdict[key] for key in ("seed", "round", "prompt_id")},
        "response_ids": verdict["response_ids"][::turn],
        "prompt": [{"role": "user", "content": verdict["prompt"]}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "outcome": verdict["outcome"],
        "margin": None if verdict["margin"] is None else abs(verdict["margin"]),
        "lengths": verdict["lengths"][::turn],
        "discarded": discarded,
    }


def _keep(run: Run, arm: str, rows: list[dict]) -> None:
    """Write rows to disk, replacing those of the same seed and round."""
    seeds = list(run.recipe.seeds)
    anew = {(row["seed"], row["round"]) for row in rows}
    used, rest = [], []
    for row in rows:
        part = {key: value for key, value in row.items() if key != "discarded"}
        used.append(part) if row["discarded"] is None else rest.append(row)
    for path, part in zip(_files(run, arm), (used, rest)):
        kept = [row for row in read_rows(path) if row["seed"] in seeds]
        kept = [row for row in kept if (row["seed"], row["round"]) not in anew] + part
        kept.sort(key=lambda row: (row["round"], seeds.index(row["seed"])))
        replace_rows(path, kept)


def _files(run: Run, arm: str) -> tuple[Path, Path]:
    """The files of the pairs that are trained on, and of the discarded ones."""
    suffix = "" if arm == "self" else f"_{arm}"
    return run.rows(f"pairs{suffix}"), run.rows(f"discarded_pairs{suffix}")


def kept_pairs(run: Run, arm: str) -> list[dict]:
    """The pairs of an arm or method that are on disk, of all rounds, in the format of `build_pairs`."""
    used, rest = map(read_rows, _files(run, arm))
    return [{**row, "discarded": None} for row in used] + rest


def _preference(verdict: dict, arm: Arm, settings: Pairs) -> tuple[bool, str | None]:
    """Whether the first answer is preferred, and why the pair is not used (None if it is)."""
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
    # Sampled verdicts that disagree have a margin of 0: they name no winner, whatever the filter.
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
        return "cut off"  # with an end token appended, it would teach the model to break off
    if max(tokens) > settings.max_tokens:
        return "too long"  # truncation would remove the end token
    return None


_COUNTED: dict[tuple[str, str], list[int]] = {}  # every arm counts the same pairs


def _count_tokens(policy: Model, verdicts: list[dict]) -> Iterator[list[int]]:
    """Tokens of prompt and response together, as in training, for both responses of each verdict.

    For a model behind a server, which cannot be trained anyway, they are an estimate.
    """
    if policy.engine == "api":
        for row in verdicts:
            yield [estimated_tokens(row["prompt"] + text) for text in row["responses"]]
        return
    name = model_name(policy)
    new = [row for row in verdicts if (name, row["id"]) not in _COUNTED]
    tokenizer = load_tokenizer(policy) if new else None
    for start in range(0, len(new), AT_ONCE):
        part = new[start : start + AT_ONCE]
        chats = [
            escape_special_tokens(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": text},
                ],
                tokenizer,
            )
            for row in part
            for text in row["responses"]
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        _COUNTED.update(((name, r["id"]), c) for r, c in zip(part, zip(counts[::2], counts[1::2])))
    for row in verdicts:
        yield list(_COUNTED[name, row["id"]])
