"""The tasks of lm-eval: right values and errors, nothing twice, plain words when something lacks."""

import json
import math
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats

from sao_utils import store as rows
from sao_utils.engines.registry import load_engine
from sao_utils.evaluation import tasks as harness
from sao_utils.evaluation import tiny_tasks
from sao_utils.evaluation.task_differences import (
    differences,
    leave_out,
    mean,
    paired_difference,
)
from sao_utils.evaluation.tasks import Task
from sao_utils.methods import sao
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.plan.hardware import data
from sao_utils.recipe import Model, RecipeError
from sao_utils.statistics.power import outside_the_noise

TASKS = Path(harness.__file__).parents[1] / "tiny" / "tasks"
LIMIT = 6
SETTINGS = {
    "arms": ["self"],
    "prompts.count": 16,
    "pairs.min_margin": 0,
    "prompts.min_usable": 0,
    "pairs.require_consistent": False,
    "training.batch_size": 4,
    "training.warmup_ratio": 0,
    "training.learning_rate": 5e-3,
    "training.probe_steps": 0,
    "evaluation.tasks": ["tiny"],
    "evaluation.task_limit": LIMIT,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run with one trained adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAO_RESULTS", str(tmp_path_factory.mktemp("results")))
        return rows.open_run("tiny", "tasks", SETTINGS)


@pytest.fixture(scope="module")
def scored(run):
    return harness.score_tasks(run, sao.candidates(run))


def with_settings(run, **changes):
    """The run with other settings of its section "evaluation"."""
    evaluation = run.recipe.evaluation.model_copy(update=changes)
    return rows.Run(run.recipe.model_copy(update={"evaluation": evaluation}), run.folder)


def row(scored, model, task):
    return next(r for r in scored if r["model"] == model and r["task"] == task)


def items(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def log_likelihood(engine, context, answer):
    """Summed log-probability of an answer's tokens after a context, one sequence at a time."""
    import torch

    start, whole = (
        engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (context, context + answer)
    )
    assert whole[: len(start)] == start
    with torch.inference_mode():
        logits = engine.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(start), len(whole)))


# ---------------------------------------------------------------------- the tiny tasks


def test_the_data_beside_the_tasks_is_what_the_grammar_makes():
    for name, made in tiny_tasks.items().items():
        assert items(name) == made


def test_every_item_has_one_true_choice_about_what_is_asked_first():
    for name in ("facts", "myths"):
        found = [(world.parse_question(i["question"]), i) for i in items(name)]
        facts = [(question.hobby, question.aspects[0]) for question, _ in found]
        assert len(set(facts)) == len(facts)  # another fact each: the items are independent
        for fact, (question, item) in zip(facts, found):
            values = [inspect_answer(question, choice).flaws["wrong"] for choice in item["choices"]]
            assert [k for k, wrong in enumerate(values) if not wrong] == [item["answer"]]
            has_myth = any(f" {world.MYTH[fact]}" in choice for choice in item["choices"])
            assert has_myth or name == "facts"
            assert world.SPLIT[question.combination] == "train"
    recalled = [world.parse_question(item["question"]) for item in items("recall")]
    assert {world.SPLIT[question.combination] for question in recalled} == {"test"}


def test_the_leaderboard_names_tasks_and_metrics_that_lm_eval_has():
    from lm_eval import tasks

    some = ("arc", "gsm8k", "hellaswag", "mmlu", "truthfulqa", "winogrande")  # all of them: 20 s
    folders = [Path(tasks.__file__).parent / name for name in some]
    index = tasks.TaskManager(include_path=folders, include_defaults=False).task_index
    for task in harness.LEADERBOARD:
        metric, _, kind = task.metric.partition(",")
        folder = index[task.name].yaml_path.parent
        text = "".join(path.read_text() for path in folder.glob("*yaml"))
        assert f"metric: {metric}\n" in text
        assert not kind or f'name: "{kind}"' in text


@pytest.mark.parametrize(
    "names", ["a.jsonl", ["a.jsonl"], {"test": "a.jsonl"}, {"test": ["a.jsonl"]}]
)
def test_the_data_of_a_local_task_is_named_as_the_library_datasets_takes_it(tmp_path, names):
    config = {"task": "mine", "dataset_kwargs": {"data_files": names}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    [task] = harness.tasks_of([str(tmp_path / "mine.yaml")])
    assert harness._config(task)[1] == [tmp_path / "a.jsonl"]


def test_names_of_tasks_are_read_and_files_that_are_none_refused(tmp_path):
    assert harness.tasks_of(["leaderboard"]) == list(harness.LEADERBOARD)
    assert harness.tasks_of(["gsm8k"]) == [Task("gsm8k", 5, "exact_match,strict-match")]
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    (tmp_path / "tag.yaml").write_text("task: mine\nprocess_docs: !function utils.f\n")
    refused = {"recipe": "no task of lm-eval", "none": "There is no task file", "tag": "!function"}
    for name, message in refused.items():
        with pytest.raises(RecipeError, match=message):
            harness.tasks_of([str(tmp_path / f"{name}.yaml")])


def test_a_local_task_is_found_from_wherever_a_notebook_runs(results, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text((TASKS / "tiny_myths.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    own = rows.open_run("tiny", "own", {"evaluation.tasks": ["own.yaml", "mmlu"]})
    assert own.recipe.evaluation.tasks == (str(tmp_path / "own.yaml"), "mmlu")


def test_the_tasks_of_bigbench_come_along_whole_with_their_licence_and_canary(run):
    folder = TASKS.parents[1] / "evaluation" / "bigbench"
    sizes = {name: size for name, size in data("sizes")["tasks"].items() if "bigbench_" in name}
    for name, size in sizes.items():
        lines = (folder / f"{name.removeprefix('bigbench_')}.jsonl").read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert (len(found), sum(len(i["choices"]) for i in found)) == (
            size["items"],
            size["passes"],
        )
        assert all(len(set(i["choices"])) > i["answer"] >= 0 for i in found)
        assert all(len(i["canary"]) == 36 for i in found)  # so that nobody trains on it unawares
    assert "Apache License" in (folder / "LICENSE").read_text()
    some = with_settings(run, tasks=("bigbench",))
    done = harness.score_tasks(some, sao.candidates(some, ["base"]))
    assert {(r["task"], r["n"], r["metric"]) for r in done} == {(t, LIMIT, "acc") for t in sizes}


# ---------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", ["base", "self"])
def test_scores_are_what_the_log_likelihoods_say(run, scored, name):
    engine = load_engine(sao.candidates(run, [name])[0].model)
    right = []
    for item in items("myths")[:LIMIT]:
        context = f"<|user|>{item['question']}<|assistant|>"
        found = [log_likelihood(engine, context, choice) for choice in item["choices"]]
        right.append(float(np.argmax(found) == item["answer"]))
    done = row(scored, name, "tiny_myths")
    assert done["scores"] == {"tiny_myths": right} and done["value"] == np.mean(right)
    assert done["error"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(LIMIT))
    assert (done["n"], done["shots"], done["metric"]) == (LIMIT, 0, "acc")


def test_a_group_is_the_plain_mean_of_its_subjects(run, tmp_path):
    """As MMLU: groups within a group, whose own aggregate weighs subjects by their size."""
    from lm_eval.tasks import TaskManager

    for task in harness.tasks_of(["tiny"]):
        config, _ = harness._config(task)
        (tmp_path / f"{task.name}.yaml").write_text(yaml.safe_dump(config))
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    inner = {"group": "inner", "task": ["tiny_facts", "tiny_myths"]}
    outer = {"group": "outer", "task": ["inner", "tiny_endings"]}
    for group in (inner, outer):
        text = yaml.safe_dump({**group, "aggregate_metric_list": aggregate})
        (tmp_path / f"{group['group']}.yaml").write_text(text)
    opened = TaskManager(include_path=tmp_path, include_defaults=False).load(["outer"])
    found = harness._evaluate(load_engine(run.recipe.model), opened, Task("outer", 1, "acc"), 5)
    assert len(found["scores"]) == 3 and found["n"] == 15 and found["shots"] == 1
    by_subject = [np.mean(values) for values in found["scores"].values()]
    assert found["value"] == pytest.approx(np.mean(by_subject))


# ---------------------------------------------------------------------- nothing twice


def test_nothing_is_scored_twice_and_a_stop_costs_one_task(run, scored, monkeypatch):
    real, done = harness._evaluate, []

    def stops(engine, opened, task, limit):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task.name)
        return real(engine, opened, task, limit)

    monkeypatch.setattr(harness, "_evaluate", stops)
    assert harness.score_tasks(run, sao.candidates(run)) == scored and done == []
    shorter = with_settings(run, task_limit=2)  # another limit is another task
    before = len(rows.read_rows(run.rows("tasks")))
    with pytest.raises(KeyboardInterrupt):
        harness.score_tasks(shorter, sao.candidates(run))
    monkeypatch.setattr(harness, "_evaluate", real)
    kept = len(rows.read_rows(run.rows("tasks")))
    found = harness.score_tasks(shorter, sao.candidates(run))
    assert kept == before + 3
    assert len(rows.read_rows(run.rows("tasks"))) == before + len(found)


def test_a_task_whose_files_change_is_another_task(tmp_path):
    for name in ("tiny_myths.yaml", "myths.jsonl"):
        shutil.copy(TASKS / name, tmp_path)
    (task,) = harness.tasks_of([str(tmp_path / "tiny_myths.yaml")])
    before = harness._edition(task)
    with open(tmp_path / "myths.jsonl", "a") as file:
        file.write(json.dumps(items("myths")[0]) + "\n")
    assert harness._edition(task) != before


# ---------------------------------------------------------------------- what may lack


def test_a_task_that_cannot_be_run_is_named_and_the_others_go_on(
    run, scored, tmp_path, capsys, monkeypatch
):
    from lm_eval import tasks

    some = tasks.TaskManager(
        include_path=Path(tasks.__file__).parent / "arc", include_defaults=False
    )
    monkeypatch.setattr(harness, "_manager", lambda every_task: some)  # the whole one takes 20 s
    text = (TASKS / "tiny_myths.yaml").read_text().replace("task: tiny_myths", "task: nodata")
    (tmp_path / "nodata.yaml").write_text(text)
    text = (TASKS / "tiny_facts.yaml").read_text()
    shutil.copy(TASKS / "facts.jsonl", tmp_path)
    for name, metrics in (("bare", None), ("f1", [{"metric": "f1"}])):
        config = {**yaml.safe_load(text), "task": name, "metric_list": metrics}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    local = [str(TASKS / "tiny_facts.yaml")]
    local += [str(tmp_path / f"{name}.yaml") for name in ("nodata", "bare", "f1")]
    given = with_settings(run, tasks=(*local, "arc_challenge", "no_such"))
    found = harness.score_tasks(given, sao.candidates(run))
    problems = {r["task"]: r.get("problem", "") for r in found}
    assert problems["tiny_facts"] == "" == problems["bare"]
    assert row(found, "base", "bare")["scores"]["bare"] == next(
        iter(row(found, "base", "tiny_facts")["scores"].values())
    )
    assert "scored by f1, which is no mean" in problems["f1"]
    assert "allenai/ai2_arc" in problems["arc_challenge"]
    assert "HF_HUB_OFFLINE" in problems["arc_challenge"]
    assert "no task 'no_such'" in problems["no_such"]
    assert "beside its file" in problems["nodata"]
    assert capsys.readouterr().out.count("Not measured") == 4
    compared = {entry["task"]: entry["problem"] for entry in differences(found)}
    assert compared == {name: problem or None for name, problem in problems.items()}


def test_without_lm_eval_the_message_says_how_to_install_it(run, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", missing)
    with pytest.raises(RecipeError, match=r"pip install -c constraints.txt -e '.\[eval\]'"):
        harness.score_tasks(run, sao.candidates(run))


def test_other_models_do_them_too_and_those_behind_a_server_are_named(run, scored, capsys):
    others = {
        "twin": Model(path="tiny", dtype=run.recipe.model.dtype),
        "remote": Model(path="gpt", engine="api", url="http://localhost:9/v1"),
    }
    given = with_settings(run, tasks=(str(TASKS / "tiny_facts.yaml"),))
    given = rows.Run(given.recipe.model_copy(update={"others": others}), run.folder)
    found = harness.score_tasks(given, sao.candidates(given))
    base, twin = (row(found, name, "tiny_facts") for name in ("base", "twin"))
    assert base == row(scored, "base", "tiny_facts") and twin["scores"] == base["scores"]
    remote = row(found, "remote", "tiny_facts")
    assert remote["value"] is None and "behind a server" in remote["problem"]
    assert "A model behind a server" in capsys.readouterr().out
    compared = {entry["model"]: entry for entry in differences(found)}
    assert compared["twin"]["difference"].value == 0
    assert "behind a server" in compared["remote"]["problem"]


def test_a_vllm_model_is_scored_by_transformers():
    vllm = Model(path="m", engine="vllm", quantisation="fp8")
    assert harness._with_transformers(vllm) == Model(path="m", engine="transformers")


# ---------------------------------------------------------------------- without some items


def made_up(task, model, scores, items="same"):
    value, error = mean({task: scores})
    row = {"task": task, "model": model, "metric": "acc", "limit": None, "items": items}
    return {**row, "value": value, "error": error, "scores": {task: scores}}


def test_what_each_item_asks_is_kept_once(scored):
    for task, name in (("tiny_facts", "facts"), ("tiny_recall", "recall")):
        asked = [item["question"] for item in items(name)[:LIMIT]]
        assert row(scored, "base", task)["asked"] == {task: asked}
    assert not any("asked" in found for found in scored if found["model"] != "base")


def test_what_an_item_asks_is_the_field_that_a_task_names_or_its_prompt():
    class Task:
        def __init__(self, named, text):
            self.config, self.text = SimpleNamespace(doc_to_decontamination_query=named), text

        def doc_to_text(self, doc):
            return self.text

    doc = {"sentence": "_ ran.", "question": "Who ran?"}
    assert harness.asked_by(Task("sentence", "x"), doc) == "_ ran."
    assert harness.asked_by(Task("Q: {{question}}", "x"), doc) == "Who ran?"
    assert harness.asked_by(Task(None, "A prompt"), {}) == "A prompt"


def test_items_are_left_out_of_all_models_alike():
    base = made_up("a", "base", [1.0, 0.0, 0.0, 1.0]) | {"asked": {"a": ["p", "q", "r", "p"]}}
    tuned = made_up("a", "self", [1.0, 1.0, 0.0, 0.0])
    untold = {"task": "b", "model": "base", "value": None, "problem": "no data"}
    found = leave_out([base, tuned, untold], {"p"})
    assert [r.get("scores") for r in found] == [{"a": [0.0, 0.0]}, {"a": [1.0, 0.0]}, None]
    assert [r["value"] for r in found] == [0.0, 0.5, None]
    assert leave_out([base, tuned], ()) == [base, tuned]
    (nothing,) = differences(leave_out([base, tuned], set("pqr")))
    assert nothing["problem"] == "no item is left"


# ---------------------------------------------------------------------- before and after


def test_one_training_gives_the_paired_t_test():
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2, 80).astype(float)
    tuned = np.where(rng.random(80) < 0.2, 1, base)
    theirs = stats.ttest_rel(tuned, base)
    low, high = theirs.confidence_interval(0.95)
    gap, error, freedom = paired_difference({"t": list(base)}, [{"t": list(tuned)}])
    assert (gap.value, gap.low, gap.high) == pytest.approx((np.mean(tuned - base), low, high))
    assert (gap.value / error, freedom) == pytest.approx((theirs.statistic, theirs.df))
    (_,), (p,) = outside_the_noise([gap.value], [error], [freedom], [80])
    assert p == pytest.approx(theirs.pvalue)
    unpaired = stats.ttest_ind(tuned, base).confidence_interval(0.95)
    assert gap.high - gap.low < unpaired.high - unpaired.low


def test_the_score_after_several_trainings_holds_what_other_seeds_would_have_changed():
    rng = np.random.default_rng(6)
    base = made_up("a", "base", list(rng.integers(0, 2, 60).astype(float)))
    shares = (0.3, 0.5, 0.7)
    apart = [made_up("a", "self", list((rng.random(60) < p).astype(float))) for p in shares]
    alike = [made_up("a", "self", apart[1]["scores"]["a"])] * 3
    (wide,), (narrow,) = (differences([base, *tuned]) for tuned in (apart, alike))

    def width(entry, key):
        return entry[key].high - entry[key].low

    half = stats.t.ppf(0.975, 59) * apart[1]["error"]
    assert width(narrow, "tuned") == pytest.approx(2 * half)
    assert width(wide, "tuned") > 1.5 * width(narrow, "tuned")
    assert wide["base"] == narrow["base"] and wide["base"].value == base["value"]


def test_a_quick_look_at_which_all_items_moved_alike_is_no_certainty():
    for trainings in (1, 3):
        tuned = [made_up("a", "self", [1.0] * 5)] * trainings
        (entry,) = differences([made_up("a", "base", [0.0] * 5), *tuned])
        assert entry["p"] == pytest.approx(0.0625) and not entry["outside"]
        assert entry["difference"].low < 0.7 < entry["difference"].high == 1


def test_one_item_is_too_little_to_tell():
    (entry,) = differences([made_up("a", "base", [1.0]), made_up("a", "self", [0.0])])
    assert entry["difference"].value == -1 and math.isnan(entry["difference"].low)
    assert not entry["outside"] and math.isnan(entry["p"])


def test_the_more_tasks_are_tried_the_more_a_difference_must_stand_out():
    base = [0.0] * 60
    alone = [made_up("a", "base", base), made_up("a", "self", [1.0] * 7 + base[7:])]
    (only,) = differences(alone)
    assert 0.001 < only["p"] < 0.025 and only["outside"]
    others = [made_up(f"t{k}", m, base) for k in range(49) for m in ("base", "self")]
    first, *_ = among = differences([*alone, *others])
    assert first["difference"] == only["difference"]
    assert first["p"] == pytest.approx(50 * only["p"])
    assert not any(entry["outside"] for entry in among)


def test_answers_to_other_items_are_not_compared():
    found = differences(
        [made_up("a", "base", [1.0, 0.0]), made_up("a", "self", [1.0, 1.0], items="other")]
    )
    assert "did other items" in found[0]["problem"] and "difference" not in found[0]
