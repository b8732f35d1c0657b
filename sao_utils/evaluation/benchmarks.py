"""Published benchmarks, and the tiny world's counterparts of them, through the same code.

Here models answer and judges judge. A protocol defines how: a module (`alpaca_eval`, `arena_hard`,
`mt_bench`) with

- load(settings): the benchmark;
- requests(benchmark, item, turns): what a judge is asked about a model's answers to an item;
- judgments(benchmark, item, turns, judged, model, judge): rows in the format of the benchmark's own
  program, from pairs (request, reply);
- verdicts(judgments): (id of the item, verdict, or None if invalid) for each verdict;
- figures(judgments, benchmark): metric -> interval;
- files(benchmark, answers, judgments, judge): the files that the program reads, as {path: rows}.

A judge in the recipe can be any model. Figures are comparable with published ones only if the judge is
the published one and the row has no note, and trustworthy only if it has no remarks. The counterparts
show the machinery at work; they are no evidence about large models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import ModuleType

from sao_utils.disk import json_lines, write_whole
from sao_utils.engines.base import Sampling
from sao_utils.engines.loading import load_tokenizer
from sao_utils.engines.requests import replies
from sao_utils.evaluation import alpaca_eval, arena_hard, mt_bench
from sao_utils.evaluation.answers import Candidate
from sao_utils.evaluation.benchmark_files import BENCHMARKS, OFFICIAL
from sao_utils.evaluation.comparisons import doubts
from sao_utils.evaluation.tiny_benchmarks import TINY, chat_of, choose_labels
from sao_utils.recipe import Evaluation, Model, RecipeError
from sao_utils.statistics.intervals import win_rate
from sao_utils.store import Run

#: benchmark -> the protocol by which it is judged, scored and written to files
PROTOCOLS: dict[str, ModuleType] = {
    "alpaca_eval": alpaca_eval,
    "arena_hard": arena_hard,
    "mt_bench": mt_bench,
    "tiny_alpaca": alpaca_eval,
    "tiny_arena": arena_hard,
    "tiny_mt": mt_bench,
}
DIFFERS = "protocol differs: "
#: metric -> how it differs from that of the benchmark's own program
METRICS = {
    "lc_win_rate": "length control by an unpenalised fit without alpaca_eval's gamed baselines"
}
LOW_MASS = 0.5  # probability on m and M below which a preference is doubtful (ours)


def load(settings: Evaluation, name: str) -> dict:
    """Load a benchmark by name.

    Returns:
        {items: rows {id, turns, category}, show: a function that makes a request to the judge, notes: how
        the protocol differs from the published one}, and, for benchmarks that compare answers,
        {baseline: id -> text, baseline_name}. `ask`, if present, is a function that sends requests and
        returns the verdicts.

    Raises:
        RecipeError: its files are missing or incomplete.
    """
    published = BENCHMARKS[name]
    try:
        benchmark = TINY[name]() if name in TINY else PROTOCOLS[name].load(settings)
    except RecipeError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{name}: its files ({settings.data}) lack something, or are not its own: {error!r}."
        ) from None
    ids = [item["id"] for item in benchmark["items"]]
    if not ids or len(set(ids)) < len(ids):
        raise RecipeError(f"{name}: its files hold no question, or two of the same id.")
    for identity in ids if "baseline" in benchmark else ():
        if benchmark["baseline"].get(identity) is None:
            who = benchmark["baseline_name"]
            raise RecipeError(f"{name}: there is no answer of {who} to question {identity}.")
    notes, limit, there = [*benchmark.get("notes", ())], settings.benchmark_limit, len(ids)
    if there != published["prompts"]:
        notes.append(f"{there} prompts, there {published['prompts']}")
    if limit is not None and limit < there:
        notes.append(f"the first {limit} of {there} prompts")
    most, theirs = settings.max_new_tokens, published.get("max_tokens")
    if theirs not in (None, most):
        notes.append(f"answers of at most {most} tokens, there {theirs}")
    benchmark["items"] = benchmark["items"][:limit]
    benchmark["notes"] = tuple(notes if name in TINY else (DIFFERS + note for note in notes))
    return benchmark


def run_benchmark(
    run: Run,
    name: str,
    candidates: Sequence[Candidate],
    judges: dict[str, Model],
    leave_out: Collection[str] | None = None,
) -> list[dict]:
    """Run a benchmark: every candidate answers, every judge judges.

    Answers and verdicts are kept in rows/benchmark_answers.jsonl and benchmark_verdicts.jsonl; the
    files that the benchmark's own program reads go to benchmarks/<name>/.

    Args:
        candidates: for tiny_arena, "base" must be among them.
        judges: judges by name; not used for tiny_mt, which the oracle judges.
        leave_out: first turns of items that are excluded; if it is given, the benchmark's own files are
            not written.

    Returns:
        Rows {benchmark, model, judge, metric, interval, note: how the protocol differs from the
        published one, apart from the judge, remarks: sentences on what makes the figure doubtful}. Rates
        are shares, grades 1 to 10; valid_rate is the share of verdicts that count. In a run of several
        seeds, a trained model is named "<arm>-<seed>".

    Raises:
        RecipeError: the benchmark's files are missing.
    """
    benchmark, protocol = load(run.recipe.evaluation, name), PROTOCOLS[name]
    out = leave_out or ()
    benchmark["items"] = [item for item in benchmark["items"] if item["turns"][0] not in out]
    if not benchmark["items"]:
        return []
    answers = write_answers(run, name, benchmark, candidates)
    if name == "tiny_arena":
        base = answers["base"]
        benchmark["baseline"] = {identity: a["turns"][0] for identity, a in base.items()}
        benchmark["ask"] = partial(choose_labels, min_mass=run.recipe.judging.min_mass)
    if "by_oracle" in benchmark:
        judges = {"oracle": None}
    found = []
    for judge, model in judges.items():
        merge, notes = name not in TINY and not knows_system(model), benchmark["notes"]
        if merge:
            notes += (f"{DIFFERS}the judge knows no system prompt: the user's text has it",)
        send = _sender(run, model, merge)
        judgments = judge_answers(send, protocol, benchmark, answers, judge)
        if leave_out is None:
            _write_files(run, name, protocol.files(benchmark, answers, judgments, judge))
        for label, rows in judgments.items():
            if rows:
                about = {"benchmark": name, "model": label, "judge": judge}
                found += _rows(protocol, benchmark, answers[label], rows, about, notes)
    return found


def judge_answers(
    send: Callable[[list[dict]], list[dict]],
    protocol: ModuleType,
    benchmark: dict,
    answers: dict[str, dict],
    judge: str,
) -> dict[str, list[dict]]:
    """Judgments of every model's answers, in the format of the benchmark's own program.

    The baseline itself is not judged: its win rate is one half.

    Args:
        send: sends requests to the judge; see `engines.requests.replies`.
        answers: in the format of `write_answers`.
        judge: the judge's name.
    """
    jobs = [
        (model, item, protocol.requests(benchmark, item, given[item["id"]]["turns"]))
        for model, given in answers.items()
        if model != benchmark.get("baseline_name")
        for item in benchmark["items"]
    ]
    requests = [request for *_, of_item in jobs for request in of_item]
    made = iter(benchmark["ask"](send, requests) if "ask" in benchmark else send(requests))
    judgments: dict[str, list[dict]] = {model: [] for model in answers}
    for model, item, of_item in jobs:
        judged = [(request, next(made)) for request in of_item]
        turns = answers[model][item["id"]]["turns"]
        judgments[model] += protocol.judgments(benchmark, item, turns, judged, model, judge)
    return judgments


def _rows(
    protocol: ModuleType,
    benchmark: dict,
    answers: dict[str, dict],
    judgments: list[dict],
    about: dict,
    notes: tuple[str, ...],
) -> list[dict]:
    """The rows of `run_benchmark` for one model and judge."""
    figures, verdicts = protocol.figures(judgments, benchmark), protocol.verdicts(judgments)
    valid = [verdict for _, verdict in verdicts if verdict is not None]
    if verdicts:  # also where no verdict is valid
        counted = [float(verdict is not None) for _, verdict in verdicts]
        figures["valid_rate"] = win_rate(counted, [item for item, _ in verdicts])
    first = figures["first_rate"].value if "first_rate" in figures else 0.5
    asked = len(verdicts)
    remarks = doubts(about["judge"], asked - len(valid), asked, first, "requests")
    doubtful = sum(0 < (row.get("mass") or 0) < LOW_MASS for row in judgments)
    if doubtful > asked / 20:
        said = "less than half of the judge's probability is on the two labels"
        remarks.append(f"{doubtful} of {asked} verdicts are doubtful: {said}.")
    texts = [text for answer in answers.values() for text in answer["turns"]]
    if empty := sum(not text.strip() for text in texts):
        remarks.append(f"{empty} of {len(texts)} answers of '{about['model']}' are empty.")
    if protocol is mt_bench and len(valid) > 1 and len(set(valid)) == 1:
        remarks.append("The judge gave one and the same grade to all.")
    found = []
    for metric, interval in figures.items():
        own = METRICS.get(metric)
        if own and benchmark.get("gamed") is not None:
            own += ", with the prompts' difficulties"
        note = "; ".join(filter(None, (*notes, own)))
        row = {"metric": metric, "interval": interval, "note": note, "remarks": remarks}
        found.append({**about, **row})
    return found


def write_answers(
    run: Run, name: str, benchmark: dict, candidates: Sequence[Candidate]
) -> dict[str, dict]:
    """Every candidate's answers; each turn continues the conversation with the candidate's own answers.

    Returns:
        model -> item's id -> {id (of the last reply), turns [text], tokens [n]}, one entry per turn.
    """
    settings, several = run.recipe.evaluation, len(run.recipe.seeds) > 1
    given: dict[str, dict] = {}
    for candidate in candidates:
        of_seed = several and candidate.seed is not None
        label = f"{candidate.name}-{candidate.seed}" if of_seed else candidate.name
        if label in given:  # its answers would be mixed up with the other's
            raise RecipeError(f"others: '{label}' is what a seed's model is called; rename it.")
        mine = {item["id"]: {"turns": [], "tokens": []} for item in benchmark["items"]}
        for turn in range(max(len(item["turns"]) for item in benchmark["items"])):
            items = [item for item in benchmark["items"] if len(item["turns"]) > turn]
            requests = [
                {
                    "chat": chat_of(item["turns"][: turn + 1], mine[item["id"]]["turns"]),
                    "sampling": Sampling(
                        temperature(settings, name, item), settings.max_new_tokens, settings.top_p
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
        given[label] = mine
    return given


def temperature(settings: Evaluation, name: str, item: dict) -> float:
    """The temperature for answers to an item: the benchmark's own, else the recipe's first."""
    own = BENCHMARKS[name].get("temperature", settings.temperatures[0])
    return own.get(item["category"], 0.7) if isinstance(own, dict) else own


def _sender(run: Run, judge: Model | None, merge: bool) -> Callable[[list[dict]], list[dict]]:
    """A function that sends requests to a judge; with `merge`, system turns are merged (`merge_system`)."""

    def send(requests: list[dict]) -> list[dict]:
        if merge:
            requests = [{**r, "chat": merge_system(r["chat"])} for r in requests]
        return replies(run, "benchmark_verdicts", judge, requests)

    return send


def merge_system(chat: list[dict]) -> list[dict]:
    """The chat with the system turn's text moved to the start of the first user turn."""
    system, user, *rest = chat
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def knows_system(model: Model) -> bool:
    """Whether the chat template accepts a system turn (Gemma's does not). A server's is assumed to."""
    if model.engine == "api":
        return True
    from jinja2 import TemplateError

    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        load_tokenizer(model).apply_chat_template(chat, tokenize=False)
    except TemplateError:
        return False
    return True


def _write_files(run: Run, name: str, files: dict[str, list[dict]]) -> None:
    for path, rows in files.items():
        if path.endswith(".json"):
            text = json.dumps(rows, ensure_ascii=False, indent=2)
        else:
            text = json_lines(rows)
        write_whole(run.folder / "benchmarks" / OFFICIAL.get(name, name) / path, text)
