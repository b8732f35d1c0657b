"""Published benchmarks, and the tiny world's counterparts of them, through the same code.

`alpaca_eval`, `arena_hard` and `mt_bench` say how each is loaded, judged, scored and written down;
here models answer, judges judge, and everything comes together. A judge of the recipe is any
model: the figures are comparable with published ones only where a row has neither a note nor a
judge_note, and worth something where it has no remarks.
The files that are left under benchmarks/ are those of the benchmarks' own programs: model_outputs.json
of alpaca_eval, and data/<name>/model_answer and model_judgment of arena-hard-auto and FastChat.

The counterparts (all of them ours, to see the machinery at work; no evidence about large models):

- tiny_alpaca: 110 held-out questions against the villagers' answers, judged with SAO's ranking
  prompt by log-probability;
- tiny_arena: 55 of them, two games against the base model's answers; the judge's log-odds become
  the five labels;
- tiny_mt: 40 conversations of two turns, graded by the oracle, since the tiny judge can compare but
  not grade. The tiny model has seen one turn only in pre-training: second turns fall apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import combinations
from types import ModuleType

from sao_utils.disk import write_whole
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import load_tokenizer
from sao_utils.engines.requests import replies
from sao_utils.evaluation import alpaca_eval, arena_hard, mt_bench
from sao_utils.evaluation.answers import Candidate
from sao_utils.evaluation.benchmark_files import OFFICIAL
from sao_utils.evaluation.comparisons import doubts
from sao_utils.evaluation.tiny_benchmarks import COUNTERPART, TINY, chat_of, choose_label
from sao_utils.recipe import Evaluation, Model, RecipeError
from sao_utils.statistics.intervals import Interval, win_rate
from sao_utils.statistics.ratings import kappa
from sao_utils.store import Run

#: benchmark -> how it is judged, scored and written down.
PROTOCOLS: dict[str, ModuleType] = {
    "alpaca_eval": alpaca_eval,
    "arena_hard": arena_hard,
    "mt_bench": mt_bench,
    "tiny_alpaca": alpaca_eval,
    "tiny_arena": arena_hard,
    "tiny_mt": mt_bench,
}
DIFFERS = "protocol differs: "


def load(settings: Evaluation, name: str) -> dict:
    """The items of a benchmark, what the judge is shown, and how the protocol differs (`notes`).

    Raises:
        RecipeError: its files are not there, or hold no question that can be asked.
    """
    loaded = TINY[name]() if name in TINY else PROTOCOLS[name].load(settings)
    if not loaded["items"]:
        raise RecipeError(f"{name}: its files hold no question with all it takes.")
    limit, there = settings.benchmark_limit, len(loaded["items"])
    if name not in TINY and there != PROTOCOLS[name].PROMPTS:
        loaded["notes"] += (f"{there} usable prompts, there {PROTOCOLS[name].PROMPTS}",)
    if limit is not None and limit < there:
        loaded["notes"] += (f"the first {limit} of {there} prompts",)
        loaded["items"] = loaded["items"][:limit]
    return loaded


def run_benchmark(
    run: Run,
    name: str,
    candidates: Sequence[Candidate],
    judges: dict[str, Model],
    leave_out: Collection[str] = (),
    keep_files: bool = True,
) -> list[dict]:
    """Run a benchmark: every candidate answers, every judge judges.

    Answers and verdicts are kept in rows/benchmark_answers.jsonl and benchmark_verdicts.jsonl; the
    files that the benchmark's own program reads go to benchmarks/<name>/, unless it is a part only.

    Args:
        candidates: "base" must be one for tiny_arena.
        judges: by name; the oracle judges tiny_mt.
        leave_out: first turns of items that shall not count.
        keep_files: whether the benchmark's own files are written (of the whole benchmark only).

    Returns:
        Rows {benchmark, model, judge, metric, interval, n,
        note (how the protocol differs from the published one, but for the judge), judge_note (who
        judges there, "" where it is this judge), remarks (sentences on what makes it doubtful),
        counts}; `counts` is of the model and judge, of the benchmark's files too. Rates are shares,
        grades 1 to 10; valid_rate is the share of verdicts that count. The programs' own measures of
        chance are beside our intervals: standard_error with AlpacaEval's win_rate, bootstrap with
        Arena-Hard's score; where AlpacaEval's file df_gamed.csv is there, lc_win_rate_published is
        its own length control, without interval.
        A model of several seeds is
        "<arm>-<seed>". Two judges have a metric kappa, "<one>~<other>" being the judge.

    Raises:
        RecipeError: no such benchmark, or its files are not there.
    """
    if name not in PROTOCOLS:
        raise RecipeError(f"There is no benchmark '{name}'. There are: {', '.join(PROTOCOLS)}.")
    benchmark, protocol = load(run.recipe.evaluation, name), PROTOCOLS[name]
    whole = keep_files and not leave_out
    benchmark["items"] = [i for i in benchmark["items"] if i["turns"][0] not in leave_out]
    if not benchmark["items"]:
        return []
    answers = write_answers(run, name, benchmark, candidates)
    if name == "tiny_arena":
        base = answers["base"]
        benchmark["baseline"] = {identity: a["turns"][0] for identity, a in base.items()}
        benchmark["argue"] = partial(choose_label, min_mass=run.recipe.judging.min_mass)
    found, labels = [], {}
    if "grade" in benchmark:
        judges = {"oracle": None}
    for judge, model in judges.items():
        merged: list[str] = []
        judgments, counts = protocol.judge(
            _requester(run, model, merged), benchmark, answers, judge
        )
        if whole:
            _write_files(run, name, protocol.files(answers, benchmark, judgments, judge))
        for model_name, of in judgments.items():
            verdicts = labels.setdefault(model_name, {})[judge] = protocol.labels(of)
            tally = benchmark["counts"] + counts[model_name]
            tally["prompts"] = len(benchmark["items"])
            texts = [text for a in answers[model_name].values() for text in a["turns"]]
            tally["empty answers"] = sum(not text.strip() for text in texts)
            figures = _figures(name, benchmark, answers, model_name, of)
            if verdicts:  # also where no verdict is valid
                valid = [float(verdict is not None) for verdict in verdicts.values()]
                figures["valid_rate"] = win_rate(valid, [key[0] for key in verdicts]).rate
            notes = _notes(run, name, benchmark, model, tally) + (*merged,)
            about, own = benchmark.get("about", {}), protocol.remarks(of)
            remarks = _remarks(judge, model_name, figures, verdicts, tally, len(texts))
            remarks += _of_files(benchmark["counts"])
            for metric, interval in figures.items():
                row = {
                    "benchmark": name,
                    "model": model_name,
                    "judge": judge,
                    "metric": metric,
                    "interval": interval,
                    "n": interval.n,
                    "note": "; ".join((*notes, *about.get(metric, ()))),
                    "judge_note": _judge_note(name, model),
                    "remarks": [*own.get(metric, ()), *remarks],
                    "counts": dict(tally),
                }
                if protocol is alpaca_eval and metric == "win_rate":
                    row["standard_error"] = alpaca_eval.standard_error(of)
                if protocol is arena_hard and metric == "score":
                    row["bootstrap"] = arena_hard.bootstrap(of, benchmark["baseline_name"])
                found.append(row)
    return found + _agreements(name, labels, len(benchmark["items"]))


def _agreements(name: str, labels: dict[str, dict[str, dict]], items: int) -> list[dict]:
    """Cohen's kappa of each two judges on each model's verdicts; a judge is then "<one>~<other>".

    Only of what both judged: that they both never saw a pair of identical answers is no agreement.
    """
    found = []
    for model_name, by_judge in labels.items():
        for one, other in combinations(by_judge, 2):
            both = [(key, by_judge[one][key], by_judge[other][key]) for key in by_judge[one]]
            valid = [pair for pair in both if None not in pair]
            if not valid:
                continue
            keys, first, second = zip(*valid)
            interval = kappa(first, second, clusters=[key[0] for key in keys])
            row = {
                "benchmark": name,
                "model": model_name,
                "judge": f"{one}~{other}",
                "metric": "kappa",
                "interval": interval,
                "n": interval.n,
                "note": "agreement of two judges beyond chance, verdict by verdict",
                "judge_note": "",
                "remarks": [],
                "counts": {
                    "verdicts": len(both),
                    "left out as invalid": len(both) - len(valid),
                    "identical answers, not judged": items - len({key[0] for key, *_ in both}),
                },
            }
            found.append(row)
    return found


def write_answers(
    run: Run, name: str, benchmark: dict, candidates: Sequence[Candidate]
) -> dict[str, dict]:
    """Every candidate's answers, each turn after its own earlier answers.

    Returns:
        model -> id -> {id (of the last reply), turns [text], tokens [n], finished [...]}.
    """
    settings, several = run.recipe.evaluation, len(run.recipe.seeds) > 1
    given: dict[str, dict] = {}
    for candidate in candidates:
        of_seed = several and candidate.seed is not None
        label = f"{candidate.name}-{candidate.seed}" if of_seed else candidate.name
        if label in given:
            raise RecipeError(f"others: '{label}' is what a seed's model is called; rename it.")
        mine = {
            item["id"]: {"turns": [], "tokens": [], "finished": []} for item in benchmark["items"]
        }
        for turn in range(max(len(item["turns"]) for item in benchmark["items"])):
            items = [item for item in benchmark["items"] if len(item["turns"]) > turn]
            requests = [
                {
                    "chat": chat_of(item["turns"][: turn + 1], mine[item["id"]]["turns"]),
                    "sampling": Sampling(
                        _temperature(settings, name, item), settings.max_new_tokens, settings.top_p
                    ),
                    "of": {"benchmark": name, "model": label, "item": item["id"], "turn": turn + 1},
                }
                for item in items
            ]
            made = replies(run, "benchmark_answers", candidate.model, requests)
            for item, reply in zip(items, made):
                answer = mine[item["id"]]
                answer["id"] = reply["id"]
                answer["turns"].append(reply["text"])
                answer["tokens"].append(reply["tokens"])
                answer["finished"].append(reply["finished"])
        given[label] = mine
    return given


def _temperature(settings: Evaluation, name: str, item: dict) -> float:
    """Arena-Hard's and MT-Bench's own; AlpacaEval leaves it to the model: the recipe's first."""
    if name == "mt_bench":
        return mt_bench.temperature(item)
    return 0.0 if name in ("arena_hard", "tiny_arena", "tiny_mt") else settings.temperatures[0]


def _requester(
    run: Run, judge: Model | None, notes: list[str]
) -> Callable[[list[dict]], list[dict]]:
    """What sends requests to a judge; a model without a system role gets that text before the user's.

    Args:
        notes: where it is put down that this was so.
    """

    def send(requests: list[dict]) -> list[dict]:
        if any(request["chat"][0]["role"] == "system" for request in requests):
            if not _knows_system(judge):
                requests = [{**r, "chat": _merged(r["chat"])} for r in requests]
                notes[:] = [f"{DIFFERS}the judge knows no system prompt: the user's text has it"]
        return replies(run, "benchmark_verdicts", judge, requests)

    return send


def _knows_system(model: Model) -> bool:
    if model.engine == "api":  # the server's business
        return True
    from jinja2 import TemplateError

    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        load_tokenizer(model).apply_chat_template(chat, tokenize=False)
    except TemplateError:
        return False
    return True


def _merged(chat: list[dict]) -> list[dict]:
    system, user, *rest = chat
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _figures(
    name: str, benchmark: dict, answers: dict, model_name: str, judgments: list[dict]
) -> dict[str, Interval]:
    protocol = PROTOCOLS[name]
    if protocol is alpaca_eval:
        return alpaca_eval.figures(judgments, benchmark["difficulty"], benchmark["gamed"])
    if protocol is mt_bench:
        return mt_bench.figures(judgments)
    lengths = {identity: a["tokens"][0] for identity, a in answers[model_name].items()}
    return arena_hard.figures(judgments, benchmark["baseline_name"], lengths)


def _notes(
    run: Run, name: str, benchmark: dict, judge: Model | None, counts: Counter
) -> tuple[str, ...]:
    """How this run differs from the published protocol, but for who judges."""
    if name in TINY:
        return (COUNTERPART, *benchmark["notes"])
    notes, protocol, settings = benchmark["notes"], PROTOCOLS[name], run.recipe.evaluation
    if judge.quantisation != "none":
        notes += (f"the judge's weights are quantised ({judge.quantisation})",)
    limit, theirs = settings.max_new_tokens, getattr(protocol, "MAX_TOKENS", None)
    if theirs is not None and limit != theirs:
        notes += (f"answers of at most {limit} tokens, there {theirs}",)
    if name == "mt_bench" and settings.top_p != 1:
        notes += (f"answers drawn with top_p {settings.top_p:g}, which is not set there",)
    for reason, note in getattr(protocol, "DIFFERENCES", {}).items():
        if counts[reason]:
            notes += (note.format(counts[reason]),)
    return tuple(DIFFERS + note for note in notes)


def _judge_note(name: str, judge: Model | None) -> str:
    """Who judges in the published benchmark, where it is another."""
    if name in TINY or judge.path in PROTOCOLS[name].JUDGES:
        return ""
    return f"judged by {judge.path}, there by {PROTOCOLS[name].JUDGES[0]}"


def _remarks(
    judge: str,
    model: str,
    figures: dict[str, Interval],
    verdicts: dict[tuple, float | None],
    counts: Counter,
    answers: int,
) -> list[str]:
    """What makes all that a judge says of a model doubtful, in plain sentences; [] if nothing."""
    invalid, asked = sum(verdict is None for verdict in verdicts.values()), len(verdicts)
    first = figures["first_rate"].value if "first_rate" in figures else 0.5
    found = doubts(judge, invalid, asked, first, "requests")
    if (doubtful := counts["doubtful verdict"]) > asked / 20:
        found.append(
            f"{doubtful} of {asked} verdicts are doubtful: the judge would rather have said "
            "something else."
        )
    if empty := counts["empty answers"]:
        found.append(f"{empty} of {answers} answers of '{model}' are empty.")
    return found


def _of_files(counts: Counter) -> list[str]:
    """What was found amiss in a benchmark's files."""
    fault = ", ".join(f"{reason} ({count})" for reason, count in counts.items() if count)
    return [f"In the benchmark's files: {fault}."] if fault else []


def _write_files(run: Run, name: str, files: dict[str, list[dict]]) -> None:
    for path, rows in files.items():
        if path.endswith(".json"):
            text = json.dumps(rows, ensure_ascii=False, indent=2)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(run.folder / "benchmarks" / OFFICIAL.get(name, name) / path, text)
