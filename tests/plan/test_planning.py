"""The plan: what a run takes, what does not fit, and what is shown beside a run."""

import subprocess
import sys

import families
import pytest
from typer.testing import CliRunner

from sao_utils import cli
from sao_utils.methods import sao as sao_method
from sao_utils.plan import hardware, measure, planning
from sao_utils.plan.hardware import find_gpu
from sao_utils.plan.memory import training_memory
from sao_utils.plan.planning import plan
from sao_utils.plan.render import render
from sao_utils.recipe import Model
from sao_utils.recipes import load_recipe, recipe_names

GEMMA, LLAMA = "google/gemma-2-9b-it", "meta-llama/Meta-Llama-3-8B-Instruct"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"
LARGE = {"model.path": "Qwen/Qwen2.5-7B-Instruct", "model.revision": None, "model.engine": "vllm"}
LARGE |= {"model.quantisation": "awq", "model.max_context": 2048}
FAR = {"path": "m", "engine": "api", "url": "http://127.0.0.1:9/v1", "price_in": 1.0}


# ---------------------------------------------------------------------------- what fits

HOME = {
    "colab-t4": ("T4", 1),
    "gpu-24gb": ("4090", 1),
    "gpu-24gb-llama": ("3090", 1),
    "paper": ("A100-80", 4),
    "paper-llama": ("A100-80", 4),
}


@pytest.mark.parametrize("name", families.RECIPES)
def test_each_recipe_fits_the_gpu_that_it_is_made_for(name):
    gpu, count = HOME[name]
    made = plan(load_recipe(name), find_gpu(gpu), count)
    assert made.problems == []
    assert all(stage.hours > 0 and stage.memory for stage in made.stages)
    peak = max(sum(stage.memory.values()) for stage in made.stages)
    assert 0.1 * find_gpu(gpu).memory < peak < find_gpu(gpu).memory
    assert "It fits the GPU." in render(made)


@pytest.mark.parametrize(
    ("name", "gpu", "changes", "message"),
    [
        ("gpu-24gb", "T4", {}, "vLLM does not promise to run on the T4"),
        ("gpu-24gb", "T4", {}, "Gemma overflows in float16: another model.path"),
        ("gpu-24gb", "4090", {"model.dtype": "float16"}, "model.dtype=bfloat16"),
        ("paper", "L4", {}, "the L4 has 19.8: 1.4 too little. Try model.quantisation=fp8, or"),
        ("paper", "L4", {}, "the L4 has 21.4: 141.9 too little. Try training.method=lora"),
        ("gpu-24gb", "L4", {"training.quantisation": "none"}, "Try training.quantisation=nf4"),
        ("colab-t4", "T4", {"others": {"x": {"path": GEMMA}}}, "Try others.x.quantisation=nf4"),
        ("colab-t4", "T4", {**LARGE, "evaluation.tasks": ["leaderboard"]}, "evaluation.tasks=[]"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_lacking_and_keys_to_try(
    name, gpu, changes, message
):
    made = plan(load_recipe(name, changes), find_gpu(gpu))
    assert message in "\n".join(made.problems)
    assert message in render(made)


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_that_comes_along_can_be_planned(name):
    assert plan(load_recipe(name), find_gpu("H100")).stages


def test_a_laptop_has_room_for_its_recipe_and_is_told_what_to_fetch(results):
    made = plan(load_recipe("laptop"))
    assert max(sum(stage.memory.values()) for stage in made.stages) < 8
    assert "not on this machine yet: `sao fetch smollm2`" in render(made)


def test_weights_that_are_there_take_no_more_disk(results):
    early = {"judge.path": "tiny-early", "judge.dtype": "float32"}
    assert not any(kind.startswith("weights") for kind in plan(load_recipe("tiny", early)).disk)
    assert "weights of smollm2" in plan(load_recipe("laptop")).disk


def test_a_sampled_verdict_is_planned_as_writing_with_its_cache():
    found = {}
    for method in ("logprob", "sampled"):
        recipe = load_recipe("colab-t4", {"judging.method": method, "pairs.min_margin": 0})
        stages = plan(recipe, find_gpu("T4")).stages
        (found[method],) = (stage for stage in stages if stage.work.stage == "verdicts")
    assert found["sampled"].memory["cache"] > 1
    assert "cache" not in found["logprob"].memory
    assert found["sampled"].hours > found["logprob"].hours


def test_several_gpus_share_the_states_and_the_hours_of_full_training():
    changes = {"training.token_budget": 2048, "training.gradient_checkpointing": "on"}
    recipe = load_recipe("paper", changes)
    one, four = (
        training_memory(recipe.model, recipe.training, 2048, find_gpu("A100-80"), processes)[0]
        for processes in (1, 4)
    )
    assert four["trained"] == pytest.approx(one["trained"] / 4)
    assert four["working"] == one["working"]
    together, alone = (plan(recipe, find_gpu("A100-80"), processes) for processes in (4, 1))
    for four, one in zip(together.stages, alone.stages):
        assert one.hours == pytest.approx(four.hours * (4 if one.work.trains else 1))


# ---------------------------------------------------------------------------- what is shown


def test_the_whole_evaluation_is_planned_with_hours_memory_and_disk():
    changes = {
        "evaluation.tasks": ["leaderboard", "triviaqa"],
        "evaluation.benchmarks": ["alpaca_eval", "arena_hard", "mt_bench"],
        "others": {"rival": {"path": LLAMA, "engine": "vllm", "dtype": "bfloat16"}},
        "judges": {"small": {"path": QWEN, "engine": "vllm", "dtype": "bfloat16"}},
    }
    made = plan(load_recipe("gpu-24gb", changes), find_gpu("4090"))
    assert made.problems == []
    stages = {(stage.work.stage, stage.work.label): stage for stage in made.stages}
    assert stages["benchmark_answers", "alpaca_eval, others.rival"].work.rows == 805
    small, own = (
        stages["benchmark_verdicts", f"arena_hard{part}"] for part in (", judges.small", "")
    )
    assert small.work.rows == own.work.rows == 2 * 500 * 3 and small.hours < own.hours / 2
    for name in (GEMMA, LLAMA, QWEN):
        weights = 2 * hardware.model_shape(Model(path=name)).parameters / 2**30
        assert made.disk[f"weights of {name}"] == weights
    text = render(made)
    assert "triviaqa, size not known" in text and "It fits the GPU" in text
    assert "US$" not in text


def test_what_a_server_does_takes_no_hours_here_and_its_price_is_shown():
    made = plan(load_recipe("gpu-24gb", {"judges": {"far": FAR}}), find_gpu("4090"))
    text = render(made).splitlines()
    (line,) = [line for line in text if line.startswith("  judges.far ") and "most" not in line]
    assert "not planned" in line and line.endswith("0.07")
    (total,) = [line for line in text if line.startswith("all ")]
    assert "> 3." in total and total.endswith("0.07")
    assert any("pays servers at most US$" in line for line in text)


def test_planning_needs_neither_torch_nor_the_network():
    code = "import sys; from sao_utils.plan import hardware, planning, render"
    code += "; from sao_utils.recipes import load_recipe as load"
    code += "; made = planning.plan(load('paper'), hardware.find_gpu('H100'), 4)"
    code += "; print(render.render(made))"
    code += "; assert not {'torch', 'transformers', 'requests'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "training self-0" in done.stdout


# ---------------------------------------------------------------------------- on a CPU, beside a run


def test_a_small_run_is_planned_beside_what_it_took(small_run):
    sao_method.pairs(small_run)
    made = plan(small_run.recipe)
    took = planning.actual(small_run.folder)
    planned = {stage.work.stage: stage for stage in made.stages}
    assert planned["prompts"].work.rows == took["prompts"]["made"] == 40
    # The rates of the reference run hold here too, but for 40 prompts only roughly.
    work = planned["responses"].work
    assert work.rows == pytest.approx(took["responses"]["made"], rel=0.3)
    assert work.tokens == pytest.approx(took["responses"]["tokens"], rel=0.4)
    assert all(stage.hours is not None and stage.memory for stage in made.stages)
    text = render(made, took).splitlines()
    (line,) = [line.split() for line in text if line.startswith("responses")]
    assert f"{took['responses']['made']:,}" in line and f"{work.rows:,}" in line
    assert "time taken" in text[2]


def test_hours_on_a_cpu_are_from_a_trial(monkeypatch):
    changes = {"training.learning_rate": 1e-3, "training.report_to": "wandb"}  # nothing is reported
    recipe = load_recipe("tiny", changes)
    monkeypatch.setattr(planning, "REFERENCE", planning.REFERENCE / "none")
    made = plan(recipe)
    assert {stage.hours for stage in made.stages} == {None}
    assert "Hours on this CPU need a trial" in render(made)
    for name in ("ROWS", "TOKENS"):
        monkeypatch.setattr(measure, name, 2)
    hours = {s.work.stage: s.hours for s in plan(recipe, measure=True).stages}
    for stage in ("responses", "verdicts", "answers", "training self-0", "training random-0"):
        assert hours[stage] > 0


def sao(*words, code=0):
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_plans_a_recipe_or_says_what_is_wrong():
    text = sao("plan", "--recipe", "gpu-24gb", "--gpu", "4090", "--set", "prompts.count=500")
    assert "on 4090" in text and "500" in text
    assert "does not fit" in sao("plan", "--recipe", "paper", "--gpu", "L4", code=1)
    assert "is not known" in sao("plan", "--recipe", "tiny", "--gpu", "abacus", code=2)
    missing = ("--set", "evaluation.questions=elsewhere.jsonl")
    assert "elsewhere.jsonl" in sao("plan", "--recipe", "tiny", *missing, code=2)


def test_a_trial_wants_a_model_that_is_here_and_asks_no_server(results):
    trial = ("plan", "--measure", "--recipe")
    assert "sao fetch smollm2" in sao(*trial, "laptop", code=2)
    far = [f"--set=model.{key}={value}" for key, value in FAR.items()]
    assert "model.engine=transformers only, not api" in sao(*trial, "tiny", *far, code=2)
