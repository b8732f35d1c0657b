"""What a run found, as numbers with 95 % intervals, and the tables made of them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from itertools import compress

import numpy as np

from sao_utils.engines.loading import model_name
from sao_utils.evaluation import answers as evaluation
from sao_utils.evaluation import comparisons as contests
from sao_utils.evaluation import tasks as harness
from sao_utils.evaluation.benchmarks import published
from sao_utils.evaluation.leakage import leakage, own_set
from sao_utils.evaluation.questions import cluster
from sao_utils.oracles import tiny_world as world
from sao_utils.report.formatting import NOT_COMPARABLE, in_words, unit
from sao_utils.report.publish import write_card
from sao_utils.stages.judging import (
    ORDERS,
    agreement,
    first_shown,
    judge,
    judge_labelled,
    labelled_pairs,
    oracle_quality,
)
from sao_utils.stages.pairs import build_pairs, funnel
from sao_utils.stages.prompts import near_duplicate_rate, repetition_rate, write_prompts
from sao_utils.statistics.intervals import (
    Interval,
    clustered_difference,
    clustered_mean,
    wilson,
    win_rate,
)
from sao_utils.store import Run, note, write_whole

#: metrics of benchmarks that are kept with the other results; `benchmark_rows` has all.
HEADLINES = (
    "win_rate",
    "lc_win_rate_published",
    "lc_win_rate",
    "score",
    "score.turn_1",
    "score.turn_2",
    "valid_rate",
    "first_rate",
    "kappa",
)
FEWEST = 10  # questions without which no result is given "without overlap" (ours)


def scores(run: Run, leaks: list[dict] | None = None) -> dict[str, Interval]:
    """Every number of a run, by flat key.

    Args:
        leaks: rows of `leakage_effect`, if they are there already: it takes a while.

    `oracle_good_rate.*`: share of held-out questions answered without a flaw, by greedy decoding
    ("tuned" is the arm "self"); `oracle_good_rate_t0.6.*`: the same at T = 0.6. `gain` is tuned minus
    base, `gain_over_<arm>` tuned minus that control, `<arm>_gain` control minus base; paired by
    question, clustered by combination, and over all seeds (`gain.seed<k>`: one seed alone).
    `flaw_rate.<flaw>.*`: see `flaw_rates`. `self_judge.*`, `judge.*`: see `judge_scores`. `self_win_rate*`:
    the base model's verdict on tuned against base answers, see `win_rates`. `answer_length.*`: tokens.
    `contest.*`, `league.*`: `contest_scores`; `benchmark.*`: `benchmark_rows`; `harness.*`:
    `harness_scores`; `leakage.*`: `leakage_scores`. What needs an oracle counts the questions that it knows.
    """
    return {
        **prompt_scores(run),
        **judge_scores(run),
        **good_rates(run),
        **flaw_rates(run),
        **win_rates(run),
        **answer_lengths(run),
        **contest_scores(run),
        **benchmark_scores(run),
        **harness_scores(run),
        **leakage_scores(run, leaks),
    }


def prompt_scores(run: Run) -> dict[str, Interval]:
    """How the prompt stage went: share of usable replies, and how often prompts repeat.

    The repetition rate of a seed is 1 - distinct / all of its prompts, the near-duplicate rate that of
    `personas.near_duplicate_rate`; with several seeds it is their mean. Each is a property of the
    whole set, not a mean over prompts: no interval (NaN), and n is the number of prompts of one seed.
    """
    rows = write_prompts(run)
    parsed = [row["prompt"] is not None for row in rows]
    by_seed = [
        [r["prompt"] for r in rows if r["seed"] == seed and r["prompt"]]
        for seed in run.recipe.seeds
    ]
    found = {"prompts.parsed": clustered_mean(parsed, [row["persona"] for row in rows])}
    for rate in (repetition_rate, near_duplicate_rate):
        mean = float(np.mean([rate(prompts) for prompts in by_seed]))
        found[f"prompts.{rate.__name__}"] = Interval(mean, math.nan, math.nan, len(by_seed[0]))
    return found


def judge_scores(run: Run) -> dict[str, Interval]:
    """How right and how biased the self-judge is: `judge_quality` on the pairs that the run makes.

    With a file of labelled pairs (`judging.gold`) also on these, as `self_judge.labelled.*`, and so
    for each of the recipe's `judges`, as `judge.<name>.labelled.*`. `labelled_pairs.usable` and
    `.<reason>` count the rows of the file that are judged, and those that are not (no interval).
    """
    resamples, gold = run.recipe.evaluation.bootstrap, run.recipe.judging.gold
    found = judge_quality(judge(run), resamples)
    if gold is not None:
        pairs = labelled_pairs(gold)
        for reason, count in Counter(pair["discarded"] or "usable" for pair in pairs).items():
            key = f"labelled_pairs.{_plain(reason)}"
            found[key] = Interval(float(count), math.nan, math.nan, len(pairs))
        for name, model in contests.judge_models(run).items():
            prefix = "self_judge" if name == "self" else f"judge.{name}"
            labelled = judge_labelled(run, pairs, model)
            found |= judge_quality(labelled, resamples, f"{prefix}.labelled")
    return found


def judge_quality(
    verdicts: list[dict], resamples: int = 10_000, prefix: str = "self_judge"
) -> dict[str, Interval]:
    """How right and how biased a judge is on pairs (rows as `judging.judge` returns them).

    Of all judged pairs: valid_rate, share with a valid verdict; consistent_rate, share whose
    orders agree; mass, mean probability on the two verdicts (the smaller of both orders). Of the
    valid ones: flip_rate, share whose orders name different answers; first_position_rate, how
    often the answer shown first wins; longer_chosen_all, how often the longer answer is preferred.

    Of pairs whose better answer is known: flip_rate_unequal, the flip rate of these; accuracy, share
    where the mean of both orders names it; accuracy_one_order: of single orders;
    accuracy_gold_first, accuracy_gold_second: of the order that shows it first, second;
    accuracy_better_longer, _about_equal, _shorter: by the length of the better answer;
    accuracy.<subset>: of each subset of labelled pairs; longer_chosen, longer_better: how often the
    longer answer is preferred by the judge, and is the better one; length_bias: the first minus
    the second, paired.

    Clustered by question combination, or by prompt where it is no question of the tiny world. What
    has no pairs has no key.
    """
    judged = [row for row in verdicts if row["outcome"] != "identical"]
    valid = [row for row in judged if row["outcome"] != "invalid"]
    uneven = [row for row in valid if len(set(row.get("lengths", "="))) == 2]
    first_wins = [prefers for row in valid for prefers in first_shown(row)]
    longer_wins = [
        0.5
        if row["margin"] == 0
        else (row["margin"] > 0) == (row["lengths"][0] > row["lengths"][1])
        for row in uneven
    ]
    found = {
        "valid_rate": ([row["outcome"] != "invalid" for row in judged], judged),
        "consistent_rate": ([row["outcome"] == "consistent" for row in judged], judged),
        "mass": ([row["mass"] for row in judged], judged),
        "flip_rate": ([row["outcome"] == "inconsistent" for row in valid], valid),
        "first_position_rate": (first_wins, [row for row in valid for _ in ORDERS]),
        "longer_chosen_all": (longer_wins, uneven),
    }
    found = {
        key: (values, [cluster(r["prompt"]) for r in rows]) for key, (values, rows) in found.items()
    }
    known = agreement(judged)
    clusters = known["combination"]
    flips = [a != b for a, b in zip(known["right_12"], known["right_21"])]
    found["flip_rate_unequal"] = (flips, clusters)
    found["accuracy"] = (known["right"], clusters)
    found["accuracy_one_order"] = (known["right_12"] + known["right_21"], clusters * 2)
    for key in ("gold_first", "gold_second"):
        found[f"accuracy_{key}"] = (known[key], clusters)
    for key in ("longer_chosen", "longer_better"):
        found[key] = _where(known[key], clusters, [v is not None for v in known[key]])
    for name in ("longer", "about equal", "shorter"):
        group = _where(known["right"], clusters, [name == is_ for is_ in known["better_is"]])
        found[f"accuracy_better_{name.replace(' ', '_')}"] = group
    for name in sorted(set(known["subset"]) - {None}):
        key = _plain(name)
        group = _where(known["right"], clusters, [name == subset for subset in known["subset"]])
        found[f"accuracy.{key}"] = group
    # A margin of 0 counts half: shares, but not all booleans. The mass may be a hair above 1.
    scored = {
        f"{prefix}.{key}": clustered_mean(values, by, resamples, bounds=(0, 1))
        if key == "mass"
        else win_rate(values, by).rate
        for key, (values, by) in found.items()
        if values
    }
    chosen, by = found["longer_chosen"]
    if chosen:
        better, _ = found["longer_better"]
        scored[f"{prefix}.length_bias"] = clustered_difference(
            chosen, better, by, resamples, bounds=(0, 1)
        )
    return scored


def _where(values: list, clusters: list, there: list[bool]) -> tuple[list, list]:
    """The values, and the clusters, of the places that are `there`."""
    return list(compress(values, there)), list(compress(clusters, there))


def _plain(name: str) -> str:
    """A name as a part of a key: keys go into tables, and dots part them."""
    return re.sub(r"[^\w-]+", "_", name)


def calibration(
    verdicts: list[dict], bins: int = 8, resamples: int = 10_000
) -> list[tuple[float, Interval]]:
    """Whether a judge that is surer is more often right.

    Returns:
        For each of at most `bins` groups of pairs with a known better answer, as large as each
        other and in order of the size of the mean margin: (mean size in nats, accuracy). A judge
        that knows how sure it is has accuracy sigmoid(size). No group is smaller than 20 pairs,
        unless there are fewer.
    """
    known = agreement(verdicts)
    order = np.argsort(known["size"], kind="stable")
    groups = np.array_split(order, max(1, min(bins, len(order) // 20))) if len(order) else []
    return [
        (
            float(np.mean([known["size"][k] for k in group])),
            win_rate(
                [known["right"][k] for k in group], [known["combination"][k] for k in group]
            ).rate,
        )
        for group in groups
    ]


def good_rates(run: Run) -> dict[str, Interval]:
    """The oracle's good rate of every model, and the differences that the claim is about."""
    settings, seeds, found = run.recipe.evaluation, run.recipe.seeds, {}
    answers = [row for row in evaluation.answer(run) if row["good"] is not None]
    for temperature in settings.temperatures:
        prefix = good_rate_key(temperature)
        good: dict[str, dict] = {}  # model -> (seed, question) -> good
        clusters: dict[str, str] = {}  # question -> combination
        for row in answers:
            if row["temperature"] == temperature:
                key = (row["seed"], row["question_id"])
                good.setdefault(row["model"], {})[key] = row["good"]
                clusters[row["question_id"]] = row["combination"]

        def values(model, seed, good=good, clusters=clusters):
            of_seed = seed if model in run.recipe.arms else None
            return [good[model][of_seed, q] for q in clusters]

        def compare(a, b=None, over=seeds, values=values, clusters=clusters):
            first = [v for seed in over for v in values(a, seed)]
            by = [*clusters.values()] * len(over)
            runs = [seed for seed in over for _ in clusters]
            if b is None:
                return clustered_mean(first, by, settings.bootstrap, runs=runs)
            second = [v for seed in over for v in values(b, seed)]
            return clustered_difference(
                first, second, by, settings.bootstrap, runs=runs, bounds=(0, 1)
            )

        for model in good:
            name = "tuned" if model == "self" else model
            trained = seeds if model in run.recipe.arms else seeds[:1]
            found[f"{prefix}.{name}"] = compare(model, over=trained)
        controls = [model for model in good if model not in ("base", "self")]
        for model in controls:
            found[f"{prefix}.{model}_gain"] = compare(model, "base")
        if "self" in good:
            found[f"{prefix}.gain"] = compare("self", "base")
            for model in controls:
                found[f"{prefix}.gain_over_{model}"] = compare("self", model)
            if len(seeds) > 1:
                for seed in seeds:
                    found[f"{prefix}.gain.seed{seed}"] = compare("self", "base", over=[seed])
                    for model in controls:
                        key = f"{prefix}.gain_over_{model}.seed{seed}"
                        found[key] = compare("self", model, over=[seed])
    return found


def good_rate_key(temperature: float) -> str:
    """How the keys of `good_rates` begin at a temperature, up to the dot."""
    return "oracle_good_rate" + ("" if temperature == 0 else f"_t{temperature:g}")


def flaw_rates(run: Run) -> dict[str, Interval]:
    """What is wrong with the answers of the base and of the tuned model, at the first temperature.

    Share of answers with each kind of flaw: a gain in one may hide a loss in another, and a win rate
    "at equal length" forgives an answer that repeats itself.
    """
    settings = run.recipe.evaluation
    found: dict[str, tuple[list, list, list]] = {}
    for row in evaluation.answer(run):
        question = world.parse_question(row["question"])
        if question is None or row["temperature"] != settings.temperatures[0]:
            continue
        name = {"base": "base", "self": "tuned"}.get(row["model"])
        if name:
            for flaw, count in world.inspect_answer(question, row["text"]).flaws.items():
                values, by, runs = found.setdefault(f"flaw_rate.{flaw}.{name}", ([], [], []))
                values.append(count > 0)
                by.append(row["combination"])
                runs.append(row["seed"])
    return {
        key: clustered_mean(values, by, settings.bootstrap, runs=runs)
        for key, (values, by, runs) in sorted(found.items())
    }


def win_rates(run: Run) -> dict[str, Interval]:
    """The self-judged win rate against the base, raw and at equal length, of every arm.

    `self_win_rate` and `self_win_rate_lc` of the arm "self" are the contest's own figures, under
    shorter names: `contest.self_vs_base.self.win_rate` and `.win_rate_lc`; the other arms' have
    their name behind a dot; `.seed<k>`: one training alone, of several. Length is in characters
    (`contests.rate_at_equal_length`). Invalid verdicts are left out of the win rates; `valid` is the
    share of the others.
    """
    found = {}
    duels = contests.duel(run)
    resamples = run.recipe.evaluation.bootstrap
    for arm in run.recipe.arms:
        every = [row for row in duels if row["model"] == arm]
        rows = [row for row in every if row["win"] is not None]
        suffix = "" if arm == "self" else f".{arm}"
        if every:
            valid = [row["win"] is not None for row in every]
            by = [row["combination"] for row in every]
            runs = [row["seed"] for row in every]
            found[f"self_win_rate_valid{suffix}"] = clustered_mean(valid, by, resamples, runs=runs)
        if rows:
            found[f"self_win_rate{suffix}"] = contests.rate_of(rows)
            found[f"self_win_rate_lc{suffix}"] = contests.rate_at_equal_length(rows)
        for seed in run.recipe.seeds if len(run.recipe.seeds) > 1 else ():
            if alone := [row for row in rows if row["seed"] == seed]:
                found[f"self_win_rate{suffix}.seed{seed}"] = contests.rate_of(alone)
                equal = contests.rate_at_equal_length(alone)
                found[f"self_win_rate_lc{suffix}.seed{seed}"] = equal
    return found


def answer_lengths(run: Run) -> dict[str, Interval]:
    """Mean tokens of the answers at the first temperature."""
    settings = run.recipe.evaluation
    found: dict[str, tuple[list, list, list]] = {}
    for row in evaluation.answer(run):
        if row["temperature"] == settings.temperatures[0]:
            values, by, runs = found.setdefault(row["model"], ([], [], []))
            values.append(row["tokens"])
            by.append(row["combination"])
            runs.append(row["seed"])
    return {
        "answer_length." + ("tuned" if model == "self" else model): clustered_mean(
            values, by, settings.bootstrap, runs=runs
        )
        for model, (values, by, runs) in found.items()
    }


def contest_scores(run: Run) -> dict[str, Interval]:
    """What the tuned model's contest with the base came to, and how right its judge was.

    Of the arm "self" `contests.scoreboard`; by how much it beats each control (`contests.compared`);
    and on the pairs of answers of which the oracle knows the better one, the judge's `accuracy*` and
    `longer_*` as in `judge_quality`. The training pairs were one model's own answers; here two models'
    meet, and the tuned one's were trained to please. Then `several_judges`; of all arms their strength
    (`contests.league`, each against the base). {} without the arm "self".
    """
    recipe = run.recipe
    if "self" not in recipe.arms:
        return {}
    rows = contests.contest(run, "self", "base")
    found = {**contests.scoreboard(run, rows), **judge_on_contest(run, rows)}
    for arm in recipe.arms:
        found |= contests.compared(run, "self", arm) if arm != "self" else {}
    found |= several_judges(run)
    if any(row["win"] is not None for row in rows):
        found |= contests.league(run, names=["base", *recipe.arms], star=True)
    return found


def several_judges(run: Run) -> dict[str, Interval]:
    """The tuned model's contest with the base by several judges (`contests.judges_agreement`).

    And how right the others were (`judge_on_contest`). They are the recipe's `judges`; where it names
    none, the tuned model, which costs no more than a second look: did it learn to judge otherwise?
    {} without the arm "self".
    """
    if "self" not in run.recipe.arms:
        return {}
    names = ["self", *(run.recipe.judges or ["tuned"])]
    found = contests.judges_agreement(run, "self", "base", names)
    for name in names[1:]:
        found |= judge_on_contest(run, contests.contest(run, "self", "base", name))
    return found


def judge_on_contest(run: Run, rows: list[dict]) -> dict[str, Interval]:
    """How right the judge of a contest was: `accuracy*`, `longer_*`, `length_bias` of `judge_quality`.

    Args:
        rows: of one call of `contests.contest`. {} where the oracle knows no better answer.
    """
    known = [{**row, "quality": oracle_quality(row["prompt"], *row["responses"])} for row in rows]
    name = contests.name_of(run, rows[0])
    found = judge_quality(known, run.recipe.evaluation.bootstrap, name)
    wanted = ("accuracy", "longer_", "length_bias")
    return {key: got for key, got in found.items() if key[len(name) + 1 :].startswith(wanted)}


def benchmark_rows(run: Run) -> dict[str, dict]:
    """The rows of `published.published` of every benchmark that the recipe names, by their keys."""
    names = run.recipe.evaluation.benchmarks
    return {key: row for name in names for key, row in published(run, name).items()}


def benchmark_scores(run: Run) -> dict[str, Interval]:
    """`benchmark.<name>.<model>.<judge>.<metric>` of `HEADLINES`, without the controls."""
    return {
        f"benchmark.{key}": row["interval"]
        for key, row in benchmark_rows(run).items()
        if row["metric"] in HEADLINES and not is_control(run, row["model"])
    }


def is_control(run: Run, model: str) -> bool:
    """Whether a model of a benchmark is a control: an arm beside "self", with its seed or without."""
    arm, arms = model.split("-")[0], run.recipe.arms
    if "self" not in arms or model in run.recipe.others:
        return False
    return arm in arms and arm != "self"


def examined(run: Run) -> tuple[str, ...]:
    """Who sits the exams: beside "self" no controls, which would double what they cost."""
    arms = run.recipe.arms
    return ("base", *(["self"] if "self" in arms else arms), *run.recipe.others)


def harness_scores(run: Run) -> dict[str, Interval]:
    """The exams of `evaluation.harness`, without the controls: `harness.<task>.base`, `.tuned`, `.gain`.

    Intervals are over items, and over trainings where there are several (`harness.paired_difference`;
    gains are not corrected for the number of tasks: `harness.before_after` says which are noise).
    What could not be run has no key.
    """
    if not run.recipe.evaluation.harness:
        return {}
    found = {}
    for row in harness.differences(harness.score(run, names=examined(run))):
        if row["problem"] or row["model"] != "self":
            continue
        task = f"harness.{row['task']}"
        found[f"{task}.base"] = share(row["base"])
        found[f"{task}.tuned"] = share(row["tuned"])
        found[f"{task}.gain"] = row["difference"]
    return found


def share(found: Interval) -> Interval:
    """A share's interval within 0..1; Wilson's where all items fared alike."""
    if found.value in (0, 1):
        return wilson(found.value * found.n, found.n)
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high), found.n)


def leakage_effect(run: Run, benchmarks: bool = True) -> list[dict]:
    """What the evaluation shares with the training prompts, and what it says without that.

    Args:
        benchmarks: whether those of the recipe are looked at beside the run's own questions.

    Returns:
        The rows of `leakage.leakage`, each with {effect: key -> (on all questions, without those that
        overlap)}. Of the run's own questions: `good_rate.gain` (tuned minus base, by the oracle) and
        `win_rate` of tuned against base; of a benchmark the win rates, score or grade that each judge
        gives the tuned model (of the first seed); of an exam `gain`, tuned minus base. None for the
        second where fewer than FEWEST questions are left.
    """
    effects: dict = {}  # (set, left out) -> its results
    found, met = [], contests.contest(run, "self", "base") if "self" in run.recipe.arms else []
    for row in leakage(run, benchmarks):
        both = []
        for left_out in (frozenset(), frozenset(match["question"] for match in row["matches"])):
            key = (row["set"], left_out)
            if left_out and row["items"] - len(row["matches"]) < FEWEST:
                effects[key] = {}
            if key not in effects:
                effects[key] = _headline(run, met, *key)
            both.append(effects[key])
        effect = {key: (value, both[1].get(key)) for key, value in both[0].items()}
        found.append({**row, "effect": effect})
    return found


def _headline(
    run: Run, met: list[dict], questions: str, left_out: frozenset[str]
) -> dict[str, Interval]:
    """What the tuned model is judged by, on the questions of a set that are not left out.

    Args:
        met: the tuned model's contest with the base, on the run's own questions.
    """
    settings = run.recipe.evaluation
    if "self" not in run.recipe.arms:
        return {}
    if questions != own_set(run) and questions not in settings.benchmarks:
        sat = [
            row for row in harness.score(run, names=("base", "self")) if row["task"] == questions
        ]
        (gain,) = harness.differences(harness.leave_out(sat, left_out))
        return {} if gain["problem"] else {"gain": gain["difference"]}
    if questions != own_set(run):
        metrics, tuned = (
            ("win_rate", "lc_win_rate", "score"),
            ("self", f"self-{run.recipe.seeds[0]}"),
        )
        rows = published(run, questions, names=("base", "self"), leave_out=left_out).values()
        return {
            f"{row['judge']}.{row['metric']}": row["interval"]
            for row in rows
            if row["metric"] in metrics and row["model"] in tuned
        }
    rows = [row for row in met if row["prompt"] not in left_out]
    quality = [oracle_quality(row["prompt"], *row["responses"]) for row in rows]
    known = [(row, a == 0, b == 0) for row, (a, b) in _where_known(rows, quality)]
    found = {}
    if known:
        of, tuned, base = zip(*known)
        by, runs = [row["combination"] for row in of], [row["seed"] for row in of]
        found["good_rate.gain"] = clustered_difference(
            tuned, base, by, settings.bootstrap, runs=runs, bounds=(0, 1)
        )
    valid = [row for row in rows if row["win"] is not None]
    if valid:
        found["win_rate"] = contests.rate_of(valid)
    return found


def _where_known(rows: list[dict], quality: list) -> list[tuple]:
    return [(row, of) for row, of in zip(rows, quality) if of is not None]


def leakage_scores(run: Run, leaks: list[dict] | None = None) -> dict[str, Interval]:
    """`leakage.<set>.<by>.share`, and `.<result>_without`: `leakage_effect` of all that is asked.

    Args:
        leaks: its rows, if they are there already.

    The share is of all questions of a set, no sample of them: no interval (NaN).
    """
    found = {}
    for row in leakage_effect(run) if leaks is None else leaks:
        if not row["items"]:
            continue
        name = f"leakage.{_plain(row['set'])}.{_plain(row['by'])}"
        found[f"{name}.share"] = Interval(row["share"], math.nan, math.nan, row["items"])
        for key, (_, without) in row["effect"].items():
            if without is not None:
                found[f"{name}.{key}_without"] = without
    return found


def check(statement: str, holds: bool, otherwise: str) -> bool:
    """Print whether what a notebook shows is healthy, and what to do if it is not."""
    print(f"ok    {statement}" if holds else f"LOOK  not so: {statement}\n      {otherwise}")
    return holds


# ---------------------------------------------------------------------- tables


def print_scores(found: dict[str, Interval]) -> None:
    """Print one line a score: its key without the part before the first dot, value, unit, n."""
    names = {key: key.split(".", 1)[-1] for key in found}
    width = max(map(len, names.values()), default=0)
    for key, interval in found.items():
        shown = f"{in_words(key, interval)} {unit(key)}".rstrip()
        print(f"{names[key]:{width}}  {shown}, n = {interval.n}")


def write_tables(run: Run, leaks: list[dict] | None = None) -> dict[str, Interval]:
    """Compute all scores and write them into the run's `tables/`.

    results.json (flat keys, each {value, low, high, n}), results.csv, results.md, funnel.csv, and the
    recipe that they belong to; and the results into the trained models' cards.
    Returns the scores. `leaks`: as for `scores`.
    """
    found = scores(run, leaks)
    folder = run.folder / "tables"
    note(run, model=model_name(run.recipe.model))
    write_whole(folder / "recipe.yaml", (run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    plain = {key: {k: _rounded(v) for k, v in asdict(i).items()} for key, i in found.items()}
    write_whole(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    lines = [f"{k},{i['value']},{i['low']},{i['high']},{i['n']}" for k, i in plain.items()]
    write_whole(folder / "results.csv", "\n".join(["key,value,low,high,n", *lines]) + "\n")
    write_whole(folder / "results.md", markdown(found) + "\n")
    counts = [f"{arm},{label},{n}" for arm in run.recipe.arms for label, n in funnel(run, arm)]
    write_whole(folder / "funnel.csv", "\n".join(["arm,step,count", *counts]) + "\n")
    for name, seed, _ in evaluation.models(run):
        if name != "base":  # the cards of the trained models now have results to tell
            write_card(run, name, seed)
    return found


def _rounded(value: float | int) -> float | int | None:
    if isinstance(value, int):
        return value
    return round(value, 6) if math.isfinite(value) else None


def markdown(found: dict[str, Interval]) -> str:
    """All scores as a Markdown table."""
    head = "| result | value [95 % interval] | n |\n|---|---|---|\n"
    rows = [f"| {k} | {in_words(k, i)} {unit(k)} | {i.n} |" for k, i in found.items()]
    return head + "\n".join(rows) + f"\n\n{NOT_COMPARABLE}"


def judge_matrix(run: Run) -> tuple[list[list[int]], list[str]]:
    """How verdicts fall against the oracle: rows (oracle: a better, b better, tie), columns (judge:
    a in both orders, b in both orders, orders disagree, tie or invalid). Counts.
    """
    rows = [[0] * 4 for _ in range(3)]
    for v in judge(run):
        if v["quality"] is None or v["outcome"] == "identical":
            continue
        a, b = v["quality"]
        row = 0 if a > b else 1 if b > a else 2
        if v["outcome"] == "consistent":
            column = 0 if v["margin"] > 0 else 1
        else:
            column = 2 if v["outcome"] == "inconsistent" else 3
        rows[row][column] += 1
    return rows, ["a in both", "b in both", "orders disagree", "tie or invalid"]


def pair_lengths(run: Run, arm: str = "self") -> dict[str, list[int]]:
    """Tokens of the chosen and of the rejected answers of an arm's pairs, over all seeds."""
    rows = [r for s in run.recipe.seeds for r in build_pairs(run, arm, s) if r["discarded"] is None]
    return {
        "chosen": [row["lengths"][0] for row in rows],
        "rejected": [row["lengths"][1] for row in rows],
    }
