"""What a run asks of which model: counted against a run that is made, and paid to a server on loopback."""

import math
import re

import pytest
from scripted_server import reply, settings, steps

from sao_utils import store
from sao_utils.engines.requests import BYTES, estimated_tokens, spent
from sao_utils.evaluation import arena_hard, mt_bench
from sao_utils.evaluation import tasks as evaluation_tasks
from sao_utils.methods import sao
from sao_utils.plan import planning, workload
from sao_utils.plan.workload import AROUND, SAMPLED, TRIED
from sao_utils.recipes import load_recipe
from sao_utils.report.results import results as table_of
from sao_utils.stages.judging import judge_pairs
from sao_utils.stages.responses import write_responses

PAID = {"path": "m", "engine": "api", "url": "http://127.0.0.1:9/v1", "price_in": 1.0}


def bill(recipe="tiny", **changes):
    """At the assumed lengths, by who is paid."""
    works = workload.workload(load_recipe(recipe, changes))
    return {who: about for who, (about, _) in workload.bill(works).items()}


def test_the_bill_names_who_is_paid_for_what():
    def judged_by(price, **more):
        return bill(**{f"judge.{key}": value for key, value in {**PAID, **price}.items()}, **more)

    assert bill() == {} == judged_by({"price_in": None})
    judge = judged_by({})
    both = judged_by({}, judges={"x": PAID})
    assert both["judge"] == pytest.approx(judge["judge"]) and both["judges.x"] > 0
    assert judged_by({"price_in": 2.0})["judge"] == pytest.approx(2 * judge["judge"])


def test_others_are_paid_for_their_answers():
    changes = {"others": {"x": PAID}, "evaluation.benchmarks": [], "evaluation.tasks": []}
    (other,) = [w for w in workload.workload(load_recipe("tiny", changes)) if w.who == "others.x"]
    assert (other.stage, other.rows) == ("answers", 880 * 2)  # two temperatures
    assert bill(**changes)["others.x"] == pytest.approx(other.rows * other.lengths.read / 1e6)


def test_the_longest_prompts_and_pairs_of_files_are_read_at_most(tmp_path):
    (tmp_path / "mine.csv").write_text(f"prompt\nWhy?\n{'x' * 40_000}\n")
    changes = {"prompts.source": "file", "prompts.data": str(tmp_path / "mine.csv")}
    works = {w.stage: w for w in workload.workload(load_recipe("tiny", changes))}
    assert works["responses"].lengths.most_read == 40_000 / BYTES
    assert works["verdicts"].lengths.most_read > 40_000 / BYTES
    longest = tmp_path / "labelled.csv"
    longest.write_text(f"prompt,chosen,rejected\n{'x' * 40_000},Yes.,{'x' * 80_000}\n")
    changes = {"judging.labelled": str(longest), "evaluation.questions": str(tmp_path / "mine.csv")}
    works = {w.stage: w for w in workload.workload(load_recipe("tiny", changes))}
    assert works["labelled"].lengths.most_read > 200_000 / BYTES
    assert works["comparisons"].lengths.most_read > 20_000 / BYTES  # in the mean of both


# ---------------------------------------------------------------------------- published sizes


def published(**changes):
    recipe = load_recipe("gpu-24gb", {f"evaluation.{key}": v for key, v in changes.items()})
    return workload.workload(recipe)


def parts(works, stage):
    return {work.part: work for work in works if work.stage == stage}


def test_the_benchmarks_have_their_published_sizes():
    works = published(benchmarks=["alpaca_eval", "arena_hard", "mt_bench"])
    answers, verdicts = parts(works, "benchmark_answers"), parts(works, "benchmark_verdicts")
    two = 2  # base and tuned model
    assert [work.rows / two for work in answers.values()] == [805, 500, 160]
    assert [work.rows / two for work in verdicts.values()] == [805, 1000, 160]
    limits = [0, arena_hard.VERDICT_TOKENS, mt_bench.VERDICT_TOKENS]
    assert [work.lengths.most_written for work in verdicts.values()] == limits
    limited = published(benchmarks=["mt_bench"], benchmark_limit=10)
    assert parts(limited, "benchmark_answers")["mt_bench"].rows == two * 20


def test_the_leaderboards_tasks_have_the_requests_that_lm_eval_makes():
    tasks = parts(published(tasks=["leaderboard"]), "tasks")
    assert [*tasks] == [task.name for task in evaluation_tasks.LEADERBOARD]
    assert tasks["hellaswag"].requests == 40_168 and tasks["hellaswag"].rows == 2
    assert tasks["mmlu"].requests == 14_042  # choices of one token share a pass
    assert tasks["mmlu"].model.engine == "transformers"
    assert tasks["mmlu"].model.quantisation == "none"
    limited = parts(published(tasks=["leaderboard"], task_limit=10), "tasks")
    assert limited["mmlu"].requests == 57 * 10 and limited["gsm8k"].requests == 10


# ---------------------------------------------------------------------------- against a run


def test_the_reference_run_is_counted_as_it_was():
    """Stages whose rows do not hang on what a model said, row by row."""
    took = planning.actual(planning.REFERENCE)
    planned: dict[str, int] = {}
    for work in workload.workload(load_recipe(str(planning.REFERENCE / "recipe.yaml"))):
        planned[work.stage] = planned.get(work.stage, 0) + work.rows
    assert planned.keys() == took.keys()
    for stage in ("prompts", "labelled", "tasks", "answers", "benchmark_answers"):
        assert planned[stage] == took[stage]["made"]
    for stage in planned:
        if "made" in took[stage]:
            assert planned[stage] == pytest.approx(took[stage]["made"], rel=0.01)


SMALL = {
    "prompts.count": 20,
    "arms": ["self"],
    "training.probe_steps": 0,
    "evaluation.temperatures": [0.0],
    "evaluation.bootstrap": 200,
    "evaluation.benchmark_limit": 6,
    "evaluation.tasks": [],
    "evaluation.benchmarks": ["tiny_alpaca", "tiny_arena", "tiny_mt"],
}


def verdict(text):
    """Log-probabilities of a judge that likes the later text in the alphabet, wherever it is shown."""
    one, two = (re.search(rf"<Response {k}> (.*?) </", text, re.DOTALL)[1] for k in (1, 2))
    likely = {" 1": -0.1, " 2": -2.5} if one > two else {" 1": -2.5, " 2": -0.1}
    return steps(("ranking:", {}), (max(likely, key=likely.get), likely))


class Talker(dict):
    """Answers of a server that writes a share of all that it may, says how much that was, and how much
    it has read: a token has `BYTES` bytes."""

    def __init__(self, server, share):
        super().__init__()
        self.server, self.share, self.read, self.written = server, share, 0, 0

    def get(self, text, _):
        body = self.server.requests[-1]
        new = math.floor(self.share * body["max_tokens"])
        words = f"User prompt: {len(self.server.requests)}?".ljust(BYTES * new, "x")[: BYTES * new]
        answer = reply(words, verdict(text) if body.get("logprobs") else None)
        asked = "".join(message["content"] for message in body["messages"])
        read = estimated_tokens(asked) + AROUND
        self.read, self.written = self.read + read, self.written + new
        usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return [(200, {**answer, "usage": usage}, {"slow": "0"})]


def paid_for(server):
    """Settings of a model that is paid."""
    return settings(server, price_in=1.0, price_out=5.0, concurrency=1).model_dump()


def test_what_judges_and_others_get_is_at_most_what_was_told(results, server, tmp_path):
    """All that notebooks 03, 05 and 06 buy of a judge, a second judge and another model."""
    server.answers, paid = Talker(server, 1.0), paid_for(server)
    questions, labels = tmp_path / "questions.csv", tmp_path / "labelled.csv"
    texts = [f"What does one need for hobby number {k} and how long is it?\n" for k in range(6)]
    questions.write_text("".join(["prompt\n", *texts]))
    labels.write_text("prompt,chosen,rejected\n2 + 3?,It is 5.,6.\nA colour?,Blue.,Seven.\n")
    changes = {**SMALL, **{f"judge.{key}": value for key, value in paid.items()}}
    changes |= {"others": {"rival": {**paid, "path": "rival"}}}
    changes |= {"judges": {"second": {**paid, "path": "second"}}}
    changes |= {"evaluation.questions": str(questions), "judging.labelled": str(labels)}
    run = store.open_run("tiny", "paid", changes)
    works = workload.workload(run.recipe)
    table_of(run, "judge")
    who = {work.who: work.rows for work in works if work.stage == "labelled"}
    assert who == {"judge": 4, "judges.second": 4}
    sampled = store.variant(run, "sampled", {"judging.method": "sampled", "pairs.min_margin": 1})
    few = sao.trial_size(run.recipe, SAMPLED)
    judge_pairs(sampled, sao.rows(run, "verdicts")[:few], run.recipe.judging_model)
    table_of(run, "length", "win rate", "comparison", "benchmark")
    owed = workload.bill(works)
    assert owed.keys() == {"judge", "others.rival", "judges.second"}
    most = sum(most for _, most in owed.values())  # 2.2 times: our model's own answers are short
    cost = (server.answers.read * 1.0 + server.answers.written * 5.0) / 1e6
    assert 0.4 * most < cost <= most
    assert spent(run) == spent(sampled) == pytest.approx(cost)


def test_a_server_that_writes_prompts_and_responses_is_counted(results, server):
    """The whole bill of a generator that writes, with what notebooks 01 and 02 try beside the run."""
    server.answers = Talker(server, 1.0)
    changes = {f"model.{key}": value for key, value in paid_for(server).items()}
    run = store.open_run("tiny", "written", {**SMALL, **changes})
    works = workload.workload(run.recipe)
    sao.rows(run, "responses")
    assert {w.stage for w in works} == {"prompts", "responses", "verdicts", "labelled", "variants"}
    sao.rows(store.variant(run, "no-persona", {"prompts.source": "no_persona"}), "prompts")
    few = [row for row in sao.rows(run, "prompts") if not row["discarded"]]
    few = few[: sao.trial_size(run.recipe, TRIED)]
    for temperature in (0.2, 1.0):
        trial = store.variant(run, f"T-{temperature}", {"responses.temperature": temperature})
        write_responses(trial, few, run.recipe.model)
    judged = [w for w in works if "verdicts" in w.stage + w.part or w.stage == "labelled"]
    made = [w for w in works if w not in judged]
    most = sum(w.dollars[1] for w in made if w.stage in ("prompts", "responses", "variants"))
    paid = (server.answers.read * 1.0 + server.answers.written * 5.0) / 1e6
    assert spent(run) == pytest.approx(paid)
    assert 0.5 * most < paid <= most


def test_a_servers_model_is_followed_from_personas_to_pairs_without_a_tokenizer(results, server):
    server.answers = Talker(server, 0.5)
    model = settings(server, concurrency=1).model_dump() | {"path": "nobody/of-this-name"}
    changes = {f"model.{key}": value for key, value in model.items()} | {"pairs.max_tokens": 200}
    steps = sao.funnel(store.open_run("tiny", "followed", {**SMALL, **changes}))
    assert steps[0] == ("asked for", 20) and steps[-1] == ("pairs", 20)
    short = store.open_run("tiny", "followed", {**SMALL, **changes, "pairs.max_tokens": 50})
    assert ("too long", -20) in sao.funnel(short)
