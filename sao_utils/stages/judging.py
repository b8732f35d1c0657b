"""Stage 3: the model ranks its own two answers, in both orders (SAO, Algorithm 1, step 4).

The paper's ranking prompt is used unchanged. The paper does not say how a verdict is decoded, in
which order the answers are shown, or what happens to ties and malformed verdicts. Ours: both
orders; by default the log-probabilities of the two possible verdicts after the forced beginning
"ranking:"; every outcome counted. With a = first answer, b = second answer:

    margin_12 = log p("1 > 2" | a, b) - log p("2 > 1" | a, b)
    margin_21 = log p("2 > 1" | b, a) - log p("1 > 2" | b, a)
    margin    = (margin_12 + margin_21) / 2

so each is positive when a is preferred, and what the judge gives to a position cancels. Only the
first token in which the verdicts part is scored ("1" or "2"): the rest follows from it.

How good a judge is shows on pairs of which the better answer is known: the tiny world's oracle
knows it (`oracle_quality`), and so does a user's file (`labelled_pairs`, `judge_labelled`).
"""

from __future__ import annotations

import math

from sao_utils import templates
from sao_utils.engines.base import Sampling
from sao_utils.engines.requests import ask
from sao_utils.evaluation.questions import cluster, read_table
from sao_utils.oracles import tiny_world as world
from sao_utils.recipe import Judging, Model, RecipeError
from sao_utils.stages.responses import response_pairs
from sao_utils.statistics.intervals import Interval, clustered_mean
from sao_utils.statistics.ratings import kappa
from sao_utils.store import Run, row_id, seed_of

ORDERS = ("12", "21")
#: column "label" of a user's file -> the quality of response_a and of response_b.
LABELS = {"a": (1, 0), "1": (1, 0), "b": (0, 1), "2": (0, 1), "tie": (0, 0)}
ABOUT_EQUAL = 0.1  # lengths that differ by less than this share of the longer (ours)


def judge(run: Run) -> list[dict]:
    """Judge the two responses of every prompt.

    Returns:
        One row a prompt: {id, seed, prompt_id, prompt, responses [a, b], lengths [tokens of a, b],
        finished [a, b], quality [a, b] | None} and the verdict's keys of
        `verdict_rows`. Identical responses are not judged: their outcome is "identical".
    """
    pairs = [
        {
            "id": row_id("pair", a["id"], b["id"], *_limits(a, b)),
            "seed": a["seed"],
            "prompt_id": a["prompt_id"],
            "prompt": a["prompt"],
            "responses": [a["text"], b["text"]],
            "lengths": [a["tokens"], b["tokens"]],
            "finished": [a["finished"], b["finished"]],
            "quality": oracle_quality(a["prompt"], a["text"], b["text"]),
        }
        for a, b in response_pairs(run)
    ]
    return verdict_rows(run, "verdicts", pairs)


def _limits(*rows: dict) -> list[int | None]:
    """The limits that ended responses: once they are made again, they are another pair."""
    return [row["max_context"] for row in rows if "max_context" in row]


def oracle_quality(prompt: str, *answers: str) -> list[int] | None:
    """Minus the number of flaws of each answer (tiny world); None for any other prompt."""
    question = world.parse_question(prompt)
    if question is None:
        return None
    return [world.inspect_answer(question, answer).quality for answer in answers]


def verdict_rows(run: Run, stage: str, pairs: list[dict], judge: Model | None = None) -> list[dict]:
    """Let the recipe's judge (by default its model, never a tuned one) judge pairs in both orders.

    The judge's replies are kept in `rows/<stage>.jsonl`, one an order (see `asking.ask`).

    Args:
        pairs: rows with at least {id, prompt, responses [a, b]}.
        judge: another judge than the recipe's; verdicts of several judges may share a stage.

    Returns:
        The pairs with {outcome, margin, margin_12, margin_21, mass, first_wins} added:
        outcome: "consistent" | "inconsistent" | "tie" | "invalid" | "identical";
        margin...: see above, in nats (sampled verdicts: 1, 0 or -1); None when not judged;
        mass: the smaller of the two orders' probabilities on any valid verdict;
        first_wins: for each order, whether the answer shown first was preferred.
    """
    settings = run.recipe.judging
    shown = [
        (k, order)
        for k, pair in enumerate(pairs)
        if pair["responses"][0] != pair["responses"][1]
        for order in ORDERS
    ]
    requests = [_request(pairs[k], order, settings) for k, order in shown]
    by_pair: dict[int, list[dict]] = {}
    for (k, _), reply in zip(shown, ask(run, stage, judge or run.recipe.judging_model, requests)):
        by_pair.setdefault(k, []).append(_forced(reply) if "logps" in reply else _sampled(reply))
    return [{**pair, **_combine(by_pair.get(k), settings)} for k, pair in enumerate(pairs)]


def _request(pair: dict, order: str, settings: Judging) -> dict:
    """What the judge is asked about one order of a pair (see `asking`)."""
    responses = pair["responses"] if order == "12" else pair["responses"][::-1]
    content = templates.ranking_prompt(pair["prompt"], *responses)
    chat = [{"role": "user", "content": content}]
    if settings.method == "logprob":
        return {"chat": chat, "prefix": templates.VERDICT_PREFIX, "choices": templates.VERDICTS}
    return {
        "chat": chat,
        "sampling": Sampling(settings.temperature, settings.max_new_tokens, settings.top_p),
    }


def _forced(reply: dict) -> dict:
    """First-minus-second log-odds of the forced verdict, and the probability on both verdicts.

    Log-odds are None where an engine gives no finite log-probability of both verdicts: a server
    names the likeliest tokens only, and a prompt may be longer than the context.
    """
    known = [p for p in reply["logps"] if p is not None]
    first, second = reply["logps"]
    odds = first - second if len(known) == 2 else None
    return {"log_odds": odds, "mass": sum(map(math.exp, known))}


def _sampled(reply: dict) -> dict:
    """The paper's way: sampled text, parsed. Log-odds 1 or -1; None when it is malformed."""
    winner = templates.parse_ranking(reply["text"])
    return {
        "log_odds": None if winner is None else 3.0 - 2.0 * winner,
        "mass": float(winner is not None),
    }


def _combine(orders: list[dict] | None, settings: Judging) -> dict:
    """One verdict on a pair from the rows of its two orders."""
    nothing = {"margin": None, "margin_12": None, "margin_21": None, "first_wins": None}
    if orders is None:
        return {"outcome": "identical", "mass": None, **nothing}
    mass = min(row["mass"] for row in orders)
    odds_12, odds_21 = (row["log_odds"] for row in orders)
    odds = (odds_12, odds_21)
    if not all(o is not None and math.isfinite(o) for o in odds) or mass < settings.min_mass:
        return {"outcome": "invalid", "mass": mass, **nothing}
    margin_12, margin_21 = odds_12, -odds_21
    if margin_12 * margin_21 > 0:
        outcome = "consistent"
    else:
        outcome = "inconsistent" if margin_12 * margin_21 < 0 else "tie"
    return {
        "outcome": outcome,
        "mass": mass,
        "margin": (margin_12 + margin_21) / 2,
        "margin_12": margin_12,
        "margin_21": margin_21,
        "first_wins": [odds_12 > 0, odds_21 > 0],
    }


def first_shown(row: dict) -> list[bool | float]:
    """Whether a pair's two orders prefer what is shown first; 0.5 where an order's odds are even."""
    odds = (row["margin_12"], -row["margin_21"])
    return [0.5 if of == 0 else of > 0 for of in odds]


def agreement(verdicts: list[dict]) -> dict[str, list]:
    """What is known of a judge's errors, as parallel lists over the pairs with a known better answer.

    Only judged pairs of different quality count. A margin of 0 is half right.

    Returns:
        right: whether the mean margin names the better answer; right_12, right_21: the same for
        each order alone; gold_first, gold_second: for the order in which the better answer is shown
        first, second; size: of the mean margin (nats); longer_better, longer_chosen: whether the
        longer answer is the better, the preferred one (None for equal lengths); better_is: "longer",
        "about equal" (`ABOUT_EQUAL`) or "shorter"; subset: of a labelled pair, else None;
        combination: the cluster.
    """
    keys = (
        "right right_12 right_21 gold_first gold_second size longer_better longer_chosen better_is"
    )
    found: dict[str, list] = {key: [] for key in (*keys.split(), "subset", "combination")}
    for row in verdicts:
        if row["margin"] is None or row["quality"] is None or len(set(row["quality"])) == 1:
            continue
        first_better = row["quality"][0] > row["quality"][1]
        right_12 = _names(first_better, row["margin_12"])
        right_21 = _names(first_better, row["margin_21"])
        longer, longest = row["lengths"][0] - row["lengths"][1], max(row["lengths"])
        if abs(longer) <= ABOUT_EQUAL * longest:
            better_is = "about equal"
        else:
            better_is = "longer" if (longer > 0) == first_better else "shorter"
        facts = {
            "right": _names(first_better, row["margin"]),
            "right_12": right_12,
            "right_21": right_21,
            "gold_first": right_12 if first_better else right_21,
            "gold_second": right_21 if first_better else right_12,
            "size": abs(row["margin"]),
            "longer_better": (longer > 0) == first_better if longer else None,
            "longer_chosen": _names(longer > 0, row["margin"]) if longer else None,
            "better_is": better_is,
            "subset": row.get("subset"),
            "combination": cluster(row["prompt"]),
        }
        for key, fact in facts.items():
            found[key].append(fact)
    return found


def _names(first: bool, margin: float) -> bool | float:
    """Whether a margin prefers the first answer if `first`, else the second; 0.5 for a margin of 0."""
    return 0.5 if margin == 0 else (margin > 0) == first


def judges_agree(
    rows_a: list[dict], rows_b: list[dict], resamples: int = 10_000
) -> dict[str, Interval]:
    """How far two judges, or two ways to ask one judge, agree on the same pairs.

    Args:
        rows_a, rows_b: rows of `verdict_rows`; matched by id. Pairs that one of them did not
            judge, or not validly, are left out: n says how many are compared.

    Returns:
        agreement, kappa (Cohen's): of the verdict on a pair, which is a, b, or neither (a tie, or
        orders that disagree); agreement_one_order, kappa_one_order: of the two verdicts that each
        judge gave, one an order. {} when nothing can be compared.
    """
    other = {row["id"]: row for row in rows_b if row["margin"] is not None}
    both = [
        (row, other[row["id"]])
        for row in rows_a
        if row["margin"] is not None and row["id"] in other
    ]
    if not both:
        return {}
    clusters = [cluster(row["prompt"]) for row, _ in both]
    verdicts = [[_verdict(row) for row in rows] for rows in zip(*both)]
    single = [[first for row in rows for first in row["first_wins"]] for rows in zip(*both)]
    found = {}
    for suffix, (a, b), by in (
        ("", verdicts, clusters),
        ("_one_order", single, [name for name in clusters for _ in ORDERS]),
    ):
        same = [x == y for x, y in zip(a, b)]
        found[f"agreement{suffix}"] = clustered_mean(same, by, resamples)
        found[f"kappa{suffix}"] = kappa(a, b, by, resamples)
    return found


def _verdict(row: dict) -> str:
    if row["outcome"] != "consistent":
        return "neither"
    return "a" if row["margin"] > 0 else "b"


# ---------------------------------------------------------------------- a user's labelled pairs


def labelled_pairs(source: str) -> list[dict]:
    """The pairs of a user's .jsonl or .csv file whose better answer is known.

    Columns: `prompt`, `chosen`, `rejected` (as in RewardBench), or `prompt`, `response_a`,
    `response_b`, `label` (one of `LABELS`); and `subset`, if there is one. In a .jsonl file the
    prompt and the answers may be lists of messages {role, content}, as in trl's conversational
    data sets; the answer is then the last message, and those before it (they need no column
    `prompt`) are what is answered. Several messages become one text with the roles in front.

    Returns:
        Rows {id, subset, prompt, responses [a, b], lengths [words of a, b], quality [a, b] (1: the
        better, 0: the worse; equal: a tie), discarded}. Which answer is a is drawn by a seed
        from the pair itself, so that position says nothing of quality. `discarded` is None, "empty
        answer", "identical answers", "repeated pair", or "contradicting labels" (of a repeated
        pair, all of it).

    Raises:
        RecipeError: no such file, no rows, a column that is missing or holds something else, or a
            label that is not known; the message names row and column.
    """
    pairs = [
        _labelled_pair(row, f"{source}, row {k}") for k, row in enumerate(read_table(source), 1)
    ]
    if not pairs:
        raise RecipeError(f"{source} has no rows.")
    labels: dict[str, set] = {}
    for pair in pairs:
        labels.setdefault(pair["id"], set()).add(tuple(pair["quality"]))
    seen = set()
    for pair in pairs:
        if not all(text.strip() for text in pair["responses"]):
            pair["discarded"] = "empty answer"
        elif pair["responses"][0] == pair["responses"][1]:
            pair["discarded"] = "identical answers"
        elif len(labels[pair["id"]]) > 1:
            pair["discarded"] = "contradicting labels"
        elif pair["id"] in seen:
            pair["discarded"] = "repeated pair"
        seen.add(pair["id"])
    return pairs


def _labelled_pair(row: dict, where: str) -> dict:
    """One row of a user's file as a pair; `where` begins the message of what is wrong with it."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        columns, quality = ("chosen", "rejected"), (1, 0)
    else:
        columns, label = ("response_a", "response_b"), str(row.get("label")).strip().lower()
        if label not in LABELS:
            raise RecipeError(
                f"{where}: column 'label' is {row.get('label')!r}, not one of {', '.join(LABELS)} (a "
                "0 is a tie in some files, and the first answer in others). A file has the columns "
                "prompt, chosen, rejected, or prompt, response_a, response_b, label."
            )
        quality = LABELS[label]
    (before, first), (same, second) = (_answer(row, column, where) for column in columns)
    if before != same:
        raise RecipeError(f"{where}: '{columns[0]}' and '{columns[1]}' answer different messages.")
    turns = before or _messages(row, "prompt", where)
    prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{r}: {text}" for r, text in turns)
    if not prompt.strip():
        raise RecipeError(f"{where}: column 'prompt' is empty.")
    rated = sorted(zip((first, second), quality))
    identity = row_id("labelled", prompt, rated[0][0], rated[1][0])
    if seed_of(identity) % 2:
        rated.reverse()
    responses, qualities = ([pair[k] for pair in rated] for k in (0, 1))
    return {
        "id": identity,
        "subset": None if row.get("subset") is None else str(row["subset"]),
        "prompt": prompt,
        "responses": responses,
        "lengths": [len(text.split()) for text in responses],
        "quality": qualities,
        "discarded": None,
    }


def _answer(row: dict, column: str, where: str) -> tuple[list[tuple[str, str]], str]:
    """The messages (role, text) before an answer, and the answer."""
    *before, (role, text) = _messages(row, column, where, "assistant")
    if role != "assistant":
        raise RecipeError(f"{where}: the last message of column '{column}' is not the assistant's.")
    return before, text


def _messages(row: dict, column: str, where: str, role: str = "user") -> list[tuple[str, str]]:
    """A column's messages as (role, text); a plain text is one message of `role`."""
    value = row.get(column)
    if isinstance(value, str):
        return [(role, value)]
    try:
        messages = [(message["role"], message["content"]) for message in value]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(part, str) for pair in messages for part in pair):
        fault = "neither a text nor a list of messages with role and content"
        raise RecipeError(
            f"{where}: column '{column}' is {fault if value is not None else 'missing'}."
        )
    return messages


def judge_labelled(run: Run, pairs: list[dict], judge: Model | None = None) -> list[dict]:
    """Judge labelled pairs in both orders; verdicts are kept in rows/labelled.jsonl.

    Args:
        pairs: rows of `labelled_pairs`; discarded ones are left out.
        judge: another judge than the recipe's.

    Returns:
        The pairs with the verdict's keys of `verdict_rows`.
    """
    return verdict_rows(run, "labelled", [p for p in pairs if p["discarded"] is None], judge)
