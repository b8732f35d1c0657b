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
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sao_utils import templates
from sao_utils.engines import Engine, Sampling, load_engine, model_name
from sao_utils.questions import cluster
from sao_utils.recipe import Judging
from sao_utils.responses import response_pairs
from sao_utils.rows import Run, make_rows, row_id, seed_of
from sao_utils.tiny import world

ORDERS = ("12", "21")


def judge(run: Run) -> list[dict]:
    """Judge the two responses of every prompt.

    Returns:
        One row a prompt: {id, seed, prompt_id, prompt, responses [a, b], lengths [tokens of a, b],
        finished [a, b], quality [a, b] | None} and the verdict's keys of
        `verdict_rows`. Identical responses are not judged: their outcome is "identical".
    """
    pairs = [
        {
            "id": row_id("pair", a["id"], b["id"]),
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


def oracle_quality(prompt: str, *answers: str) -> list[int] | None:
    """Minus the number of flaws of each answer (tiny world); None for any other prompt."""
    question = world.parse_question(prompt)
    if question is None:
        return None
    return [world.inspect_answer(question, answer).quality for answer in answers]


def verdict_rows(run: Run, stage: str, pairs: list[dict]) -> list[dict]:
    """Let the recipe's judge (by default its model, never a tuned one) judge pairs in both orders.

    One row an order is kept in `rows/<stage>.jsonl`.

    Args:
        pairs: rows with at least {id, prompt, responses [a, b]}.

    Returns:
        The pairs with {outcome, margin, margin_12, margin_21, mass, first_wins} added:
        outcome: "consistent" | "inconsistent" | "tie" | "invalid" | "identical";
        margin...: see above, in nats (sampled verdicts: 1, 0 or -1); None when not judged;
        mass: the smaller of the two orders' probabilities on any valid verdict;
        first_wins: for each order, whether the answer shown first was preferred.
    """
    settings, judging_model = run.recipe.judging, run.recipe.judging_model
    used = (
        settings
        if settings.method == "sampled"
        else settings.model_copy(
            update={
                "temperature": 0.0,
                "top_p": 1.0,
                "max_new_tokens": 1,
            }  # of no effect here: keep ids stable
        )
    )
    made_with = ("verdict", templates.fingerprint("ranking"), used, model_name(judging_model))
    jobs = [
        {"id": row_id(*made_with, pair["id"], order), "pair": k, "order": order}
        for k, pair in enumerate(pairs)
        if pair["responses"][0] != pair["responses"][1]
        for order in ORDERS
    ]

    def work(outstanding: list[dict]) -> Iterator[list[dict]]:
        chats = []
        for job in outstanding:
            pair = pairs[job["pair"]]
            shown = pair["responses"] if job["order"] == "12" else pair["responses"][::-1]
            content = templates.ranking_prompt(pair["prompt"], *shown)
            chats.append([{"role": "user", "content": content}])
        ids = [job["id"] for job in outstanding]
        engine = load_engine(judging_model)
        ask = _force if settings.method == "logprob" else _sample
        for batch in ask(engine, chats, settings, [seed_of(i) for i in ids]):
            yield [{"id": ids[k], "order": outstanding[k]["order"], **reply} for k, reply in batch]

    rows = make_rows(run, stage, jobs, work)
    by_pair: dict[int, list[dict]] = {}
    for job, row in zip(jobs, rows):
        by_pair.setdefault(job["pair"], []).append(row)
    return [{**pair, **_combine(by_pair.get(k), settings)} for k, pair in enumerate(pairs)]


def _force(engine: Engine, chats, settings: Judging, seeds):
    """First-minus-second log-odds of the forced verdict, and the probability on both verdicts."""
    for batch in engine.choose(chats, templates.VERDICT_PREFIX, templates.VERDICTS):
        yield [
            (k, {"log_odds": first - second, "mass": math.exp(first) + math.exp(second)})
            for k, (first, second) in batch
        ]


def _sample(engine: Engine, chats, settings: Judging, seeds):
    """The paper's way: sampled text, parsed. Log-odds 1 or -1; None when it is malformed."""
    sampling = Sampling(settings.temperature, settings.max_new_tokens, settings.top_p)
    for batch in engine.generate(chats, sampling, seeds):
        replies = []
        for k, completion in batch:
            winner = templates.parse_ranking(completion.text)
            odds = None if winner is None else 3.0 - 2.0 * winner
            replies.append(
                (
                    k,
                    {"log_odds": odds, "mass": float(winner is not None)}
                    | {"text": completion.text, "tokens": completion.tokens},
                )
            )
        yield replies


def _combine(orders: list[dict] | None, settings: Judging) -> dict:
    """One verdict on a pair from the rows of its two orders."""
    nothing = {"margin": None, "margin_12": None, "margin_21": None, "first_wins": None}
    if orders is None:
        return {"outcome": "identical", "mass": None, **nothing}
    mass = min(row["mass"] for row in orders)
    odds_12, odds_21 = (row["log_odds"] for row in orders)
    if (
        odds_12 is None
        or odds_21 is None
        or not math.isfinite(odds_12 + odds_21)
        or mass < settings.min_mass
    ):
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


def agreement(verdicts: list[dict]) -> dict[str, list]:
    """What the oracle can say of the judge, as parallel lists over the pairs it can decide.

    Only judged pairs of different oracle quality count. Returns {right: verdict by the mean margin
    is the oracle's (a margin of 0 counts one half), right_12 and right_21: the same for each order
    alone, longer_better, longer_chosen: whether the longer answer is the better / the preferred
    one (None for equal lengths), combination: the cluster}.
    """
    found: dict[str, list] = {
        key: []
        for key in (
            "right",
            "right_12",
            "right_21",
            "longer_better",
            "longer_chosen",
            "combination",
        )
    }
    for row in verdicts:
        if (
            row["margin"] is None
            or row["quality"] is None
            or row["quality"][0] == row["quality"][1]
        ):
            continue
        first_better = row["quality"][0] > row["quality"][1]
        for key, margin in (
            ("right", "margin"),
            ("right_12", "margin_12"),
            ("right_21", "margin_21"),
        ):
            found[key].append(0.5 if row[margin] == 0 else float((row[margin] > 0) == first_better))
        longer = row["lengths"][0] - row["lengths"][1]
        found["longer_better"].append((longer > 0) == first_better if longer else None)
        found["longer_chosen"].append((longer > 0) == (row["margin"] > 0) if longer else None)
        found["combination"].append(cluster(row["prompt"]))
    return found
