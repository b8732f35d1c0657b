"""What a run asks of which model: counted against a run that is made, and paid to a server on loopback."""

import json
import math
import re
from pathlib import Path

import pytest
from scripted_server import reply, settings, steps

from sao_utils import store
from sao_utils.engines.requests import BYTES, spent
from sao_utils.evaluation import tasks as evaluation_tasks
from sao_utils.methods import evaluate, sao
from sao_utils.plan import evaluation_work, workload
from sao_utils.plan.work import AROUND, REFERENCE, SAMPLED, tokens
from sao_utils.recipes import load_recipe
from sao_utils.report.results import results as table_of
from sao_utils.stages.judging import judge_pairs

PAID = {"path": "m", "engine": "api", "url": "http://127.0.0.1:9/v1", "price_in": 1.0}


def bill(recipe="tiny", **changes):
    """At the assumed lengths, by who is paid."""
    load = workload.workload(load_recipe(recipe, changes))
    return {who: about for who, (about, _) in load.bill.items()}


def test_the_bill_names_who_is_paid_for_what():
    def judged_by(price, **more):
        return bill(**{f"judge.{key}": value for key, value in {**PAID, **price}.items()}, **more)

    assert bill() == {} == judged_by({"price_in": None})
    judge = judged_by({})
    assert set(judge) == {"judge"}
    both = judged_by({}, judges={"x": PAID})
    assert both["judge"] == pytest.approx(judge["judge"]) and both["judges.x"] > 0
    assert judged_by({"price_in": 2.0})["judge"] == pytest.approx(2 * judge["judge"])


def test_others_are_paid_for_answers_and_benchmarks_and_judges_for_contests_and_benchmarks():
    plain = {"evaluation.benchmarks": [], "evaluation.tasks": []}
    works = workload.workload(load_recipe("tiny", {"others": {"x": PAID}, **plain})).works
    (other,) = [work for work in works if work.who == "others.x"]
    assert (other.stage, other.rows) == ("answers", 880 * 2)  # two temperatures
    assert bill(others={"x": PAID}, **plain)["others.x"] == pytest.approx(
        other.rows * other.read / 1e6
    )
    more = bill(others={"x": PAID}, **{"evaluation.benchmarks": ["tiny_mt"]})["others.x"]
    assert more > bill(others={"x": PAID}, **plain)["others.x"]
    few = bill(judges={"x": PAID}, **plain)["judges.x"]
    assert bill(judges={"x": PAID})["judges.x"] > few > 0


def test_a_users_own_files_are_counted_by_their_texts(tmp_path):
    gold, people = tmp_path / "gold.jsonl", tmp_path / "people.csv"
    pair = {"prompt": "p" * 400, "chosen": "c" * 4000, "rejected": "r" * 400}
    gold.write_text(json.dumps(pair) + "\n")
    people.write_text("persona\n" + "short\n" * 9 + "x" * 4000 + "\n")
    changes = {"judging.labelled": str(gold), "prompts.personas": str(people), "prompts.count": 2}
    works = {(w.stage, w.part): w for w in workload.workload(load_recipe("tiny", changes)).works}
    labelled, prompts = works["labelled", ""], works["prompts", ""]
    assert labelled.rows == 2 and labelled.read > 1200
    assert 100 < prompts.read < 300 and prompts.most_read > 500  # at most the long persona is drawn


# ---------------------------------------------------------------------------- published sizes


def published(**changes):
    recipe = load_recipe("gpu-24gb", {f"evaluation.{key}": v for key, v in changes.items()})
    return workload.workload(recipe)


def parts(load, stage):
    return {work.part: work for work in load.works if work.stage == stage}


def test_the_benchmarks_have_their_published_sizes_where_their_files_are_not_here():
    load = published(benchmarks=["alpaca_eval", "arena_hard", "mt_bench"])
    answers, verdicts = parts(load, "benchmark_answers"), parts(load, "benchmark_verdicts")
    two = 2  # base and tuned model
    assert [work.rows / two for work in answers.values()] == [805, 500, 160]
    assert [work.rows / two for work in verdicts.values()] == [805, 1000, 160]
    assert [work.most_written for work in verdicts.values()] == [0, 4096, 2048]
    assert sum("by its published size" in note for note in load.notes) == 3
    limited = published(benchmarks=["mt_bench"], benchmark_limit=10)
    assert parts(limited, "benchmark_answers")["mt_bench"].rows == two * 20


def test_the_texts_of_a_benchmark_are_counted_where_they_are_here(tmp_path):
    folder = tmp_path / "arena-hard-v0.1"
    (folder / "model_answer").mkdir(parents=True)
    questions = [{"question_id": k, "turns": [{"content": "é" * 40 * k}]} for k in (1, 2, 3)]
    baseline = [
        {"question_id": k, "choices": [{"turns": [{"content": "b" * 400}]}]} for k in (1, 2, 3)
    ]
    for path, content in (
        (folder / "question.jsonl", questions),
        (folder / "model_answer" / "gpt-4-0314.jsonl", baseline),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    prompt = {"system_prompt": "Be fair.", "prompt_template": ["{question_1}{answer_1}{answer_2}"]}
    (folder / "judge_config.yaml").write_text(json.dumps(prompt))
    load = published(benchmarks=["arena_hard"], data=str(tmp_path))
    (answers,) = parts(load, "benchmark_answers").values()
    (verdicts,) = parts(load, "benchmark_verdicts").values()
    assert (answers.rows, answers.read, answers.longest) == (2 * 3, 40, 60)  # two bytes a letter
    assert verdicts.rows == 2 * 2 * 3
    # The system turn; question and baseline in one text, and an answer.
    assert verdicts.read == pytest.approx(tokens("Be fair.") + 40 + 100 + 375)
    assert load.notes == []


def test_the_leaderboards_tasks_have_the_requests_that_lm_eval_makes():
    load = published(tasks=["leaderboard"])
    exams = parts(load, "tasks")
    assert [name.split(":")[0] for name in exams] == [
        exam.name for exam in evaluation_tasks.LEADERBOARD
    ]
    assert "hellaswag: 40,168 requests" in exams and "arc_challenge: 4,687 requests" in exams
    mmlu = exams["mmlu: 56,168 requests"]
    assert mmlu.rows == 2 and mmlu.requests == 2 * 14_042  # choices of one token share a pass
    assert mmlu.model.engine == "transformers" and mmlu.model.quantisation == "none"
    limited = parts(published(tasks=["leaderboard"], task_limit=10), "tasks")
    assert limited["mmlu: 2,280 requests"].requests == 2 * 57 * 10
    assert "gsm8k: 10 requests" in limited


def test_exams_are_sat_by_who_is_compared_and_by_others_with_weights():
    alone = {"arms": ["random", "oracle"], "seeds": [0, 1]}
    for changes, sitters in (({}, 2), (alone, 1 + 2 * 2)):
        others = {"x": {"path": "tiny"}, "far": PAID}
        load = workload.workload(load_recipe("tiny", {**changes, "others": others}))
        sat = [work for work in load.works if work.stage == "tasks"]
        assert {(work.who, work.rows) for work in sat} == {("model", sitters), ("others.x", 1)}
        assert any("cannot do" in note and "others.far" in note for note in load.notes)


def test_a_run_that_samples_its_verdicts_does_not_sample_them_again():
    for method, again in (("logprob", True), ("sampled", False)):
        changes = {"judging.method": method, "pairs.min_margin": 0}
        works = workload.workload(load_recipe("tiny", changes)).works
        assert any(work.part == "verdicts, sampled" for work in works) == again


def test_local_exams_are_counted_as_lm_eval_asks_them():
    """The tiny world's, against the number of requests that lm-eval builds."""
    pytest.importorskip("lm_eval")
    for exam in evaluation_tasks.tasks_of(["tiny"]):
        (task,) = evaluation_tasks._open(exam)["tasks"].values()
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        assert evaluation_work._task_size(exam)["requests"] == len(task.instances)


# ---------------------------------------------------------------------------- against a run


def test_the_reference_run_is_counted_as_it_was():
    """Stages whose rows do not hang on what a model said, row by row."""
    took = workload.actual(REFERENCE)
    planned: dict[str, int] = {}
    for work in workload.workload(load_recipe(str(REFERENCE / "recipe.yaml"))).works:
        planned[work.stage] = planned.get(work.stage, 0) + work.rows
    assert planned.keys() == {name for name in took if not name.startswith("training")}
    # What two benchmarks ask alike has a row for each, and is asked once.
    took["benchmark_answers"]["made"] -= 6 * 55
    for stage in ("prompts", "labelled", "tasks", "benchmark_answers"):
        assert planned[stage] == took[stage]["made"]
    for stage in planned:
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
        read = math.ceil(tokens(asked)) + AROUND
        self.read, self.written = self.read + read, self.written + new
        usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return [(200, {**answer, "usage": usage}, {"slow": "0"})]


def buyer(server, **changes):
    """A run whose judge, and another judge and model, are paid; it has a few questions of its own."""
    paid = settings(server, price_in=1.0, price_out=5.0, concurrency=1).model_dump()
    return {
        **SMALL,
        **{f"judge.{key}": value for key, value in paid.items()},
        "others": {"rival": {**paid, "path": "rival"}},
        "judges": {"second": {**paid, "path": "second"}},
        **changes,
    }


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "questions.jsonl"
    texts = [f"What does one need for hobby number {k}, and how long is it?" for k in range(6)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_what_judges_and_others_get_is_at_most_what_was_told(results, server, asked):
    """All that notebooks 03, 05 and 06 buy of a judge, a second judge and another model."""
    server.answers = Talker(server, 1.0)
    labels = Path(asked).with_name("labelled.csv")
    labels.write_text("prompt,chosen,rejected\n2 + 3?,It is 5.,6.\nA colour?,Blue.,Seven.\n")
    changes = {"evaluation.questions": asked, "judging.labelled": str(labels)}
    run = store.open_run("tiny", "paid", buyer(server, **changes))
    load = workload.workload(run.recipe)
    table_of(run, "judge")
    who = {work.who: work.rows for work in load.works if work.stage == "labelled"}
    assert who == {"judge": 4, "judges.second": 4}
    assert len(store.read_rows(run.rows("labelled"))) == 8
    sampled = store.variant(run, "sampled", {"judging.method": "sampled", "pairs.min_margin": 1})
    judge_pairs(sampled, sao.rows(run, "verdicts")[:SAMPLED], run.recipe.judging_model)
    evaluate.answers(run)
    table_of(run, "win rate", "comparison", "benchmark")
    assert load.bill.keys() == {"judge", "others.rival", "judges.second"}
    most = sum(
        most for _, most in load.bill.values()
    )  # 2.2 times: our model's own answers are short
    paid = (server.answers.read * 1.0 + server.answers.written * 5.0) / 1e6
    assert 0.4 * most < paid <= most
    assert spent(run) == spent(sampled) == pytest.approx(paid)


def test_a_server_that_writes_prompts_and_responses_is_counted(results, server):
    """The whole bill of a generator that writes, with what notebooks 01 and 02 try beside the run."""
    server.answers = Talker(server, 1.0)
    model = settings(server, price_in=1.0, price_out=5.0, concurrency=1).model_dump()
    changes = {f"model.{key}": value for key, value in model.items()}
    run = store.open_run("tiny", "written", {**SMALL, **changes})
    works = workload.workload(run.recipe).works
    sao.rows(run, "responses")
    assert {w.stage for w in works} == {"prompts", "responses", "verdicts", "labelled", "variants"}
    sao.rows(store.variant(run, "no-persona", {"prompts.source": "no_persona"}), "prompts")
    for temperature in (0.2, 0.6, 1.0):
        warm = {"responses.temperature": temperature}
        sao.rows(store.variant(run, f"T-{temperature}", warm), "responses")
    judged = [w for w in works if "verdicts" in w.stage + w.part or w.stage == "labelled"]
    made = [w for w in works if w not in judged]
    most = sum(w.dollars[1] for w in made if w.stage in ("prompts", "responses", "variants"))
    paid = (server.answers.read * 1.0 + server.answers.written * 5.0) / 1e6
    assert spent(run) == pytest.approx(paid)
    assert 0.5 * most < paid <= most


@pytest.mark.parametrize("name", ["m", "nobody/of-this-name"])
def test_a_servers_model_is_followed_from_personas_to_pairs_without_a_tokenizer(
    results,
    server,
    name,
):
    server.answers = Talker(server, 0.5)
    model = settings(server, concurrency=1).model_dump() | {"path": name}
    changes = {f"model.{key}": value for key, value in model.items()} | {"pairs.max_tokens": 200}
    steps = sao.funnel(store.open_run("tiny", "followed", {**SMALL, **changes}))
    assert steps[0] == ("asked for", 20) and steps[-1] == ("pairs", 20)
    short = store.open_run("tiny", "followed", {**SMALL, **changes, "pairs.max_tokens": 50})
    assert ("too long", -20) in sao.funnel(short)
