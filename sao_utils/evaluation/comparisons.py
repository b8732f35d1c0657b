"""Comparisons of two models' answers to the same questions by any judge, and what its verdicts add up to.

A judge sees both answers in the paper's ranking prompt, in both orders (`stages.judging`). A question is
won or lost if both orders agree, and counts as half won if they disagree or tie, or if the answers are
identical (our choice: the papers do not say).
"""

from __future__ import annotations

from sao_utils.recipe import Model
from sao_utils.stages.judging import first_shown, judge_pairs
from sao_utils.statistics.intervals import Interval, clustered_difference, clustered_mean, win_rate
from sao_utils.statistics.length_control import length_controlled_win_rate
from sao_utils.statistics.ratings import Strength, bradley_terry
from sao_utils.store import Run, row_id

#: metric -> the outcome of `judge_pairs` whose share it is
OUTCOMES = {
    "won in both orders": "consistent",
    "orders disagree": "inconsistent",
    "ties": "tie",
    "identical answers": "identical",
}


def compare_answers(
    run: Run, answers_a: list[dict], answers_b: list[dict], judge: str, model: Model
) -> list[dict]:
    """Let a judge compare two models' answers to the same questions, in both orders.

    Args:
        answers_a, answers_b: rows of `answer_questions`, each of one model at one temperature. Trained
            models take part with every seed, against the same seed of the other model, or against the
            other's only set of answers.
        judge: the judge's name in tables.
        model: the judge itself.

    Returns:
        One row per question and seed: {id, model (a), opponent (b), judge, seed, temperature, question_id,
        combination, prompt, responses [a, b], response_ids, lengths [tokens of a, b], win}, and the
        keys of `judge_pairs`. `win` is 1 or 0 if both orders agree, 0.5 for identical answers, ties and
        orders that disagree, and None for invalid verdicts.
    """
    of_a, of_b = (
        {(row["seed"], row["question_id"]): row for row in rows} for rows in (answers_a, answers_b)
    )
    seeds = sorted({seed for seed, _ in (*of_a, *of_b) if seed is not None})
    pairs = []
    for seed in seeds or [None]:
        for question in dict.fromkeys(question for _, question in of_a):
            first, second = (of.get((seed, question)) or of[None, question] for of in (of_a, of_b))
            pairs.append(
                {
                    "id": row_id("comparison", first["id"], second["id"]),
                    "model": first["model"],
                    "opponent": second["model"],
                    "judge": judge,
                    "seed": seed,
                    "round": first["round"],
                    "temperature": first["temperature"],
                    "question_id": question,
                    "combination": first["combination"],
                    "prompt": first["question"],
                    "responses": [first["text"], second["text"]],
                    "response_ids": [first["id"], second["id"]],
                    "lengths": [first["tokens"], second["tokens"]],
                }
            )
    judged = judge_pairs(run, pairs, model, "comparisons")
    return [{**row, "win": _win(row)} for row in judged]


def _win(row: dict) -> float | None:
    if row["outcome"] == "invalid":
        return None
    if row["outcome"] == "consistent":
        return float(row["margin"] > 0)
    return 0.5


def valid(rows: list[dict]) -> list[dict]:
    """The rows of a comparison without those whose verdict is invalid."""
    return [row for row in rows if row["win"] is not None]


def rate(rows: list[dict]) -> Interval:
    """The win rate of a comparison over its valid verdicts (`intervals.win_rate`)."""
    of = valid(rows)
    return win_rate(_column(of, "win"), _column(of, "combination"), _column(of, "seed"))


def rate_at_equal_length(rows: list[dict]) -> Interval:
    """The length-controlled win rate of a comparison over its valid verdicts (`length_control`).

    Length is counted in characters, as in AlpacaEval: a judge is shown text, and two models may split
    the same text into different tokens.
    """
    of = valid(rows)
    return length_controlled_win_rate(
        _column(of, "win"), _longer(of), _column(of, "combination"), runs=_column(of, "seed")
    )


def _column(rows: list[dict], key: str) -> list:
    return [row[key] for row in rows]


def _longer(rows: list[dict]) -> list[int]:
    return [len(row["responses"][0]) - len(row["responses"][1]) for row in rows]


def scores(rows: list[dict], resamples: int) -> dict[str, Interval]:
    """The results of a comparison apart from its win rates, by metric. n counts questions times seeds.

    Returns:
        Over valid verdicts, if there are any: the shares of `OUTCOMES`, and "first position", the share
        of single verdicts (two per question, which n counts here) that prefer the answer shown first.
        Over all questions: "valid verdicts", "empty answers", "empty answers of the opponent", and
        "length difference" (characters of a minus those of b).
    """

    def mean(values: list, of: list[dict]) -> Interval:
        return clustered_mean(
            values, _column(of, "combination"), resamples, runs=_column(of, "seed")
        )

    good, found = valid(rows), {}
    if good:
        for name, outcome in OUTCOMES.items():
            found[name] = mean([row["outcome"] == outcome for row in good], good)
    if judged := [row for row in good if row["margin"] is not None]:
        shown = [
            (float(prefers), row["combination"], row["seed"])
            for row in judged
            for prefers in first_shown(row)
        ]
        found["first position"] = win_rate(*zip(*shown))
    found["valid verdicts"] = mean([row["win"] is not None for row in rows], rows)
    for k, name in enumerate(("empty answers", "empty answers of the opponent")):
        found[name] = mean([not row["responses"][k].strip() for row in rows], rows)
    return found | {"length difference": mean(_longer(rows), rows)}


def difference_in_win_rate(
    rows_a: list[dict], rows_b: list[dict], resamples: int
) -> dict[int | None, Interval]:
    """How much more often one model wins against an opponent than another model does, paired by question.

    Args:
        rows_a, rows_b: the two models' comparisons with the same opponent, by the same judge.

    Returns:
        seed -> difference between the win rates (as shares); the key None stands for all trainings
        together. {} if no question has a valid verdict in both.
    """
    wins = {(row["seed"], row["question_id"]): row for row in rows_b}
    pairs = [
        (row, wins.get((row["seed"], row["question_id"])) or wins.get((None, row["question_id"])))
        for row in rows_a
    ]
    pairs = [(x, y) for x, y in pairs if y and None not in (x["win"], y["win"])]
    if not pairs:
        return {}
    seeds = dict.fromkeys(x["seed"] for x, _ in pairs)
    found = {}
    for seed in (None, *seeds) if len(seeds) > 1 else (None,):
        of = [pair for pair in pairs if seed in (None, pair[0]["seed"])]
        a, b = zip(*of)
        found[seed] = clustered_difference(
            _column(a, "win"),
            _column(b, "win"),
            _column(a, "combination"),
            resamples,
            runs=_column(a, "seed"),
            bca=True,
        )
    return found


def strengths(comparisons: list[list[dict]], resamples: int) -> dict[str, Strength]:
    """The strengths of several models (Bradley-Terry, `ratings.bradley_terry`), the strongest first.

    Args:
        comparisons: rows of `compare_answers`, all by one judge; "base" must take part.

    Returns:
        model -> elo (base: 1000) and win_rate (expected, against base); n is the number of the model's
        valid verdicts. {} if there are none at all.
    """
    rows = [row for of in comparisons for row in valid(of)]
    if not rows:
        return {}
    games = [(row["model"], row["opponent"], row["win"], row["combination"]) for row in rows]
    return bradley_terry(games, "base", min(1000, resamples), runs=_column(rows, "seed"))


def remarks(rows: list[dict]) -> list[str]:
    """What makes a comparison's win rate doubtful, in plain sentences; [] if nothing does."""
    n, bad = len(rows), sum(row["win"] is None for row in rows)
    first = [prefers for row in rows if row["margin"] is not None for prefers in first_shown(row)]
    found = doubts(rows[0]["judge"], bad, n, sum(first) / len(first) if first else 0.5)
    for k, name in enumerate((rows[0]["model"], rows[0]["opponent"])):
        if empty := sum(not row["responses"][k].strip() for row in rows):
            found.append(f"{empty} of {n} answers of '{name}' are empty.")
    return found


def doubts(judge: str, invalid: int, asked: int, first: float, what: str = "prompts") -> list[str]:
    """What makes a judge's verdicts doubtful, in plain sentences; [] if nothing does.

    Args:
        judge: the judge's name.
        invalid, asked: the number of invalid verdicts, and the number of verdicts asked for.
        first: the share of the judge's verdicts that prefer the answer shown first.
        what: what `asked` counts, for the sentence.
    """
    found = []
    if invalid > asked / 20:
        found.append(f"The judge '{judge}' gave no valid verdict on {invalid} of {asked} {what}.")
    if not 0.2 <= first <= 0.8:
        where, share = ("first", first) if first > 0.5 else ("second", 1 - first)
        found.append(
            f"The judge '{judge}' prefers what is shown {where} in {share:.0%} of its verdicts: they "
            "depend little on the answers."
        )
    return found
