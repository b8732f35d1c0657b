"""Stage 3: a judge ranks two answers, shown in both orders (SAO, Algorithm 1, step 4).

The paper's ranking prompt is used unchanged. The paper does not say how a verdict is decoded, in
which order the answers are shown, or what happens to ties and malformed verdicts. Our choices:
both orders are judged; by default, a verdict is the log-probabilities of the two possible verdicts
after the forced beginning "ranking:"; every outcome is counted. With a = first answer, b = second
answer:

    margin_12 = log p("1 > 2" | a, b) - log p("2 > 1" | a, b)
    margin_21 = log p("2 > 1" | b, a) - log p("1 > 2" | b, a)
    margin    = (margin_12 + margin_21) / 2

so each is positive when a is preferred, and the judge's position bias cancels in the mean. Only the
first token in which the verdicts differ ("1" or "2") is scored: the rest follows from it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from sao_utils import oracles, templates
from sao_utils.engines.base import Sampling
from sao_utils.engines.requests import replies
from sao_utils.recipe import Judging, Model
from sao_utils.store import Run, read_rows, row_id

ORDERS = ("12", "21")


def response_pairs(responses: list[dict]) -> list[dict]:
    """The first two responses to each prompt, side by side: rows of `side_by_side`.

    Args:
        responses: rows of `write_responses`.
    """
    by_prompt: dict[str, list[dict]] = {}
    for row in responses:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    return side_by_side([rows[:2] for rows in by_prompt.values()])


def side_by_side(couples: Iterable[Sequence[dict]]) -> list[dict]:
    """Two responses to the same prompt as one row.

    Args:
        couples: pairs of rows of `write_responses` or `improve`.

    Returns:
        Rows {id, seed, round, prompt_id, response_ids [a, b], prompt, responses [a, b], lengths
        [tokens of a, b], finished [a, b], quality [a, b]: the oracle's, or None if no oracle knows
        the prompt}.
    """
    return [
        {
            "id": row_id("pair", a["id"], b["id"], *limits(a, b)),
            "seed": a["seed"],
            "round": a["round"],
            "prompt_id": a["prompt_id"],
            "response_ids": [a["id"], b["id"]],
            "prompt": a["prompt"],
            "responses": [a["text"], b["text"]],
            "lengths": [a["tokens"], b["tokens"]],
            "finished": [a["finished"], b["finished"]],
            "quality": oracles.quality(a["prompt"], a["text"], b["text"]),
        }
        for a, b in couples
    ]


def limits(*rows: dict) -> list[int | None]:
    """The context limits that cut responses off.

    They are part of the ids of rows made from these responses: once a response is made again under
    another limit, so are the rows that depend on it.
    """
    return [row["max_context"] for row in rows if "max_context" in row]


def judge_pairs(run: Run, pairs: list[dict], judge: Model, stage: str = "verdicts") -> list[dict]:
    """Let a model judge pairs in both orders, as the recipe's `judging` section says.

    Its verdicts are kept in `rows/<stage>.jsonl`, one row for each order: {id, pair_id, prompt_id,
    response_ids (in the order shown), order, judge, method, temperature, seed, round, and either logps
    (of the two verdicts) or text}. Identical responses are not judged.

    Args:
        pairs: rows with at least {id, prompt, responses [a, b]}.
        judge: the judging model; verdicts of several judges may share a stage.

    Returns:
        The pairs with {outcome, margin, margin_12, margin_21, mass} added:
        outcome: "consistent" | "inconsistent" | "tie" | "invalid" | "identical";
        margin...: as defined in the module docstring, in nats (1, 0 or -1 for sampled verdicts); None
            if the pair was not judged or its verdict is invalid;
        mass: the total probability of the valid verdicts, in the order in which it is smaller; None if
            the pair was not judged.
    """
    settings = run.recipe.judging
    shown = [
        (k, order)
        for k, pair in enumerate(pairs)
        if pair["responses"][0] != pair["responses"][1]
        for order in ORDERS
    ]
    requests = [_request(pairs[k], order, judge, settings) for k, order in shown]
    by_pair: dict[int, list[dict]] = {}
    for (k, _), reply in zip(shown, replies(run, stage, judge, requests)):
        by_pair.setdefault(k, []).append(_log_odds(reply))
    return [{**pair, **_combine(by_pair.get(k), settings)} for k, pair in enumerate(pairs)]


def judged_pairs(run: Run) -> list[dict]:
    """The pairs whose verdicts in both orders are on disk: rows as of `judge_pairs`, then `weaken`.

    Nothing is judged here, and pairs of identical responses, which are never judged, are left out. If an
    earlier recipe left verdicts of other judges or methods, those of the current recipe take precedence,
    then the last ones.
    """
    settings, judge = run.recipe.judging, run.recipe.judging_model.label
    responses = {row["id"]: row for row in read_rows(run.rows("responses"))}
    orders: dict[tuple, dict[str, dict]] = {}
    for row in read_rows(run.rows("verdicts")):
        by = (row["pair_id"], row["judge"], row["method"], row["temperature"])
        orders.setdefault(by, {})[row["order"]] = row
    found = {}
    of_recipe = (judge, settings.method)
    for (pair_id, *_), both in sorted(orders.items(), key=lambda item: item[0][1:3] == of_recipe):
        ids = both["12"]["response_ids"] if len(both) == 2 else None
        if ids and all(one in responses for one in ids):
            [pair] = side_by_side([[responses[one] for one in ids]])
            verdicts = [_log_odds(both[order]) for order in ORDERS]
            found[pair_id] = {**pair, **_combine(verdicts, settings)}
    return weaken(list(found.values()), settings)


def _request(pair: dict, order: str, judge: Model, settings: Judging) -> dict:
    """The request to judge one order of a pair (see `engines.requests`)."""
    turn = 1 if order == "12" else -1
    content = templates.ranking_prompt(pair["prompt"], *pair["responses"][::turn])
    sampled = settings.method == "sampled"
    of = {
        "pair_id": pair["id"],
        "prompt_id": pair.get("prompt_id"),
        "response_ids": pair["response_ids"][::turn] if "response_ids" in pair else None,
        "order": order,
        "judge": judge.label,
        "method": settings.method,
        "temperature": settings.temperature if sampled else None,
        "seed": pair.get("seed"),
        "round": pair.get("round", 0),
    }
    request = {"chat": [{"role": "user", "content": content}], "of": of}
    if sampled:
        sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
        return {**request, "sampling": sampling}
    return {**request, "prefix": templates.VERDICT_PREFIX, "choices": templates.VERDICTS}


def _log_odds(reply: dict) -> dict:
    return _forced(reply) if "logps" in reply else _sampled(reply)


def _forced(reply: dict) -> dict:
    """Log-odds of the first answer over the second, and the total probability of both verdicts.

    The log-odds are None if the engine does not give the log-probability of both verdicts: a server
    reports only the likeliest tokens, and a prompt may be longer than the context.
    """
    known = [p for p in reply["logps"] if p is not None]
    first, second = reply["logps"]
    odds = first - second if len(known) == 2 else None
    return {"log_odds": odds, "mass": sum(map(math.exp, known))}


def _sampled(reply: dict) -> dict:
    """The paper's way: sampled text, parsed. The log-odds are 1 or -1, or None if it is malformed."""
    winner = templates.parse_ranking(reply["text"])
    return {
        "log_odds": None if winner is None else 3.0 - 2.0 * winner,
        "mass": float(winner is not None),
    }


def _combine(orders: list[dict] | None, settings: Judging) -> dict:
    """One verdict on a pair from the rows of its two orders."""
    nothing = {"margin": None, "margin_12": None, "margin_21": None}
    if orders is None:
        return {"outcome": "identical", "mass": None, **nothing}
    mass = min(row["mass"] for row in orders)
    odds_12, odds_21 = (row["log_odds"] for row in orders)
    odds = (odds_12, odds_21)
    if not all(o is not None and math.isfinite(o) for o in odds) or mass < settings.min_mass:
        return {"outcome": "invalid", "mass": mass, **nothing}
    return {"mass": mass, **_verdict(odds_12, -odds_21)}


def _verdict(margin_12: float, margin_21: float) -> dict:
    """The outcome and mean margin that follow from the margins of both orders."""
    if margin_12 * margin_21 > 0:
        outcome = "consistent"
    else:
        outcome = "inconsistent" if margin_12 * margin_21 < 0 else "tie"
    return {
        "outcome": outcome,
        "margin": (margin_12 + margin_21) / 2,
        "margin_12": margin_12,
        "margin_21": margin_21,
    }


def weaken(verdicts: list[dict], settings: Judging) -> list[dict]:
    """Verdicts as a worse judge would give them, for studies (ours).

    The noise and the bias are those of the recipe's `judging` section. Which verdicts and orders are
    flipped is drawn with a seed specific to each pair, so a larger noise share flips the same ones and
    more.

    Args:
        verdicts: rows of `judge_pairs`; neither they nor the rows on disk are changed.
    """
    found = []
    for row in verdicts:
        if row["margin"] is not None:
            lots = random.Random(f"noise {row['id']}")
            turned = -1 if lots.random() < settings.label_noise else 1
            first, second = (
                turned
                * row[f"margin_{order}"]
                * (-1 if lots.random() < settings.order_noise else 1)
                for order in ORDERS
            )
            bias = settings.position_bias
            row = {**row, **_verdict(first + bias, second - bias)}
        found.append(row)
    return found


def first_shown(row: dict) -> list[bool | float]:
    """For each of a pair's two orders, whether the answer shown first is preferred; 0.5 if odds are even."""
    odds = (row["margin_12"], -row["margin_21"])
    return [0.5 if of == 0 else of > 0 for of in odds]
