"""The plan: what a run takes, what does not fit, and what is told beside a run."""

import json
import re
import subprocess
import sys

import families
import pytest
from typer.testing import CliRunner

from sao_utils import cli
from sao_utils.methods import sao as sao_method
from sao_utils.plan import hardware, memory, planning, work, workload
from sao_utils.plan.hardware import PlanError, find_gpu
from sao_utils.plan.planning import plan
from sao_utils.plan.render import render
from sao_utils.plan.training import training_gib
from sao_utils.recipe import Model, RecipeError
from sao_utils.recipes import load_recipe, recipe_names
from sao_utils.stages.personas import draw_personas
from sao_utils.store import open_run
from sao_utils.training.shapes import shape_of

GIB = 2**30
GEMMA, LLAMA = "google/gemma-2-9b-it", "meta-llama/Meta-Llama-3-8B-Instruct"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


def shape(name):
    return shape_of(hardware.architecture(Model(path=name)))


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
    ("name", "gpu", "changes", "told"),
    [
        ("gpu-24gb", "T4", {}, "model.engine=transformers with model.quantisation=nf4"),
        (
            "gpu-24gb-llama",
            "L4",
            {"model.max_context": None, "model.gpu_memory": 0.75},
            "no room for one context of 8192 tokens on the L4",
        ),
        ("colab-t4", "T4", {"model.batch_tokens": 320_000}, "Judging needs"),
        ("gpu-24gb", "T4", {}, "model.dtype=auto"),
        ("gpu-24gb", "T4", {}, "Gemma overflows in float16"),
        (
            "gpu-24gb",
            "T4",
            {"model.engine": "transformers", "model.quantisation": "none"},
            "google/gemma-2-9b-it in 16 bit (17.2 GiB of weights) does not fit the T4 (14.0 GiB): "
            "model.quantisation=nf4",
        ),
        ("paper", "L4", {}, "on the L4 (19.8 GiB): model.quantisation=fp8."),
        (
            "gpu-24gb-llama",
            "L4",
            {"model.max_context": None, "model.gpu_memory": 0.76},
            "fp8, or model.max_context=4",
        ),
        ("paper", "A100-80", {}, "4 GPUs (--gpus 4"),
        ("paper", "A100-80", {}, "training.method=lora"),
        ("gpu-24gb", "L4", {"training.quantisation": "none"}, "training.quantisation=nf4"),
        ("gpu-24gb", "4090", {"training.token_budget": 131072}, "training.token_budget=16384"),
        (
            "gpu-24gb",
            "4090",
            {"training.gradient_checkpointing": "off"},
            "training.gradient_checkpointing=on",
        ),
        ("colab-t4", "T4", {"model.batch_tokens": 500_000}, "model.batch_tokens="),
        ("gpu-24gb", "4090", {"model.max_context": 16_384}, "model.max_context=8192"),
        ("gpu-24gb", "4090", {"responses.max_new_tokens": 2048}, "responses.max_new_tokens=1"),
        ("paper", "A100-80", {}, "model.workers=0, or --gpus 4"),
        ("gpu-24gb", "4090", {"model.dtype": "float16"}, "model.dtype=bfloat16"),
        (
            "gpu-24gb",
            "4090",
            {"training.token_budget": 8192, "pairs.max_tokens": 16_384},
            "pairs.max_tokens=4096",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_key_to_change(name, gpu, changes, told):
    made = plan(load_recipe(name, changes), find_gpu(gpu))
    assert told in "\n".join(made.problems)
    assert told in render(made)


def test_the_advice_helps():
    """Each key=value that a problem names, set, makes that problem go away."""
    for name, gpu, changes in (
        ("colab-t4", "T4", {"model.batch_tokens": 500_000}),
        ("gpu-24gb", "4090", {"training.token_budget": 131072}),
        ("gpu-24gb", "4090", {"responses.max_new_tokens": 2048}),
        ("gpu-24gb", "L4", {"training.quantisation": "none"}),
        ("gpu-24gb", "4090", {"training.gradient_checkpointing": "off"}),
        ("gpu-24gb", "4090", {"training.token_budget": 8192, "pairs.max_tokens": 16_384}),
        ("gpu-24gb", "4090", {"model.dtype": "float16", "model.workers": 4}),
        ("gpu-24gb", "4090", {"model.max_context": 16}),
        ("gpu-24gb-llama", "T4", {}),
        ("paper-llama", "T4", {"training.method": "lora", "training.quantisation": "nf4"}),
        ("gpu-24gb-llama", "L4", {"model.max_context": None, "model.gpu_memory": 0.7}),
    ):
        changes, problems = dict(changes), None
        for _ in range(6):
            problems = plan(load_recipe(name, changes), find_gpu(gpu)).problems
            if not problems:
                break
            key, value = re.search(r"([a-z_]+\.[a-z_]+)=(\w+)", problems[0]).groups()
            changes[key] = value
        assert problems == [], (name, changes)


#: What a problem is about, whatever its figures are. All that a model takes of a GPU is one problem.
KINDS = (
    "workers takes a GPU",
    "vLLM does not promise",
    "has no bfloat16",
    "overflows in float16",
    r"Training needs",
    r"lm-eval's tasks",
    r"GiB of weights|Generating needs|Judging needs",
    "such pairs get no verdict",
    r"takes \d+ tokens",
)


def kind(problem):
    return next(k for k in KINDS if re.search(k, problem))


def alternatives(problem):
    """({key: value}, GPUs) of each thing to do that a problem names."""
    for told in problem.split(": ")[-1].split(", or "):
        number = re.search(r"--gpus (\d+)", told)
        changes = dict(re.findall(r"([a-z_]+\.[a-z_]+)=(\[\]|[\w/.-]*\w)", told))
        if other := re.search(r"another (\w+\.path), such as (\S+)\.$", told):
            changes[other[1]] = other[2]
        assert changes or number, problem
        yield changes, int(number[1]) if number else None


def check_each_alternative(name, gpu, count, changes):
    """Returns how many there were."""
    checked = 0
    for problem in plan(load_recipe(name, changes), gpu, count).problems:
        for settings, number in alternatives(problem):
            after = plan(load_recipe(name, {**changes, **settings}), gpu, number or count)
            assert kind(problem) not in map(kind, after.problems), (problem, settings, number)
            checked += 1
    return checked


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("gpu", hardware.gpus())
@pytest.mark.parametrize("name", recipe_names())
def test_each_alternative_alone_makes_its_problem_go_away(name, gpu, count):
    checked = check_each_alternative(name, find_gpu(gpu), count, {})
    assert checked >= (2 if name.startswith("paper") and find_gpu(gpu).memory < 40 else 0)


@pytest.mark.parametrize(
    ("name", "gpu", "changes"),
    [
        ("colab-t4", "T4", {"model.batch_tokens": 500_000}),
        ("gpu-24gb", "4090", {"training.token_budget": 131_072}),
        ("gpu-24gb", "4090", {"responses.max_new_tokens": 2048}),
        ("gpu-24gb", "4090", {"model.engine": "transformers", "model.quantisation": "none"}),
        ("gpu-24gb", "L4", {"training.quantisation": "none"}),
        ("gpu-24gb", "T4", {"training.quantisation": "none", "training.token_budget": 65_536}),
        ("gpu-24gb", "T4", {"training.token_budget": 65_536, "pairs.max_tokens": 8192}),
        ("gpu-24gb", "4090", {"training.gradient_checkpointing": "off"}),
        ("gpu-24gb", "4090", {"training.token_budget": 8192, "pairs.max_tokens": 16_384}),
        ("gpu-24gb", "4090", {"model.max_context": 16}),
        ("gpu-24gb-llama", "L4", {"model.max_context": None, "model.gpu_memory": 0.76}),
        ("paper", "4090", {"training.method": "lora", "training.token_budget": 65_536}),
    ],
)
def test_each_alternative_alone_helps_a_changed_recipe_too(name, gpu, changes):
    assert check_each_alternative(name, find_gpu(gpu), 1, changes)


def test_no_length_of_pairs_is_advised_where_the_states_alone_fill_the_gpu():
    for count in (1, 4):
        told = plan(load_recipe("paper"), find_gpu("4090"), count).problems[-1]
        assert "16 GPUs" in told and told.endswith("quantisation=nf4.")


@pytest.mark.filterwarnings("ignore:.*repeat a persona")
@pytest.mark.parametrize("gpu", [None, "4090"])
def test_a_file_with_too_few_personas_is_a_problem_as_it_is_for_the_run(tmp_path, gpu):
    people = tmp_path / "people.csv"
    people.write_text("persona\n" + "".join(f"person {k % 6}\n" for k in range(9)))
    for count, seeds, enough in ((500, [0], False), (7, [0], False), (6, [0, 1], True)):
        changes = {"prompts.personas": str(people), "prompts.count": count, "seeds": seeds}
        made = plan(load_recipe("gpu-24gb", changes), find_gpu(gpu) if gpu else None)
        assert any("has 6 different personas" in told for told in made.problems) != enough
        assert ("prompts.count=6, or a longer file" in render(made)) != enough
        run = open_run("gpu-24gb", f"of-{count}", changes)
        if enough:
            assert len(draw_personas(run)) == 6 * len(seeds)
        else:
            with pytest.raises(RecipeError, match="6 different personas"):
                draw_personas(run)


def test_a_file_of_personas_that_cannot_be_read_is_a_problem_and_a_missing_one_is_noted(tmp_path):
    people = tmp_path / "people.csv"
    changes = {"prompts.personas": str(people)}
    made = plan(load_recipe("gpu-24gb", changes))
    assert made.problems == [] and "are not on this machine" in "\n".join(made.notes)
    people.write_text("name\nAnn\n")
    (told,) = plan(load_recipe("gpu-24gb", changes)).problems
    assert "has no column 'persona'" in told


def test_the_advice_does_not_contradict_itself():
    """A model that goes to another engine gets that engine's 4 bits, and a context that is far too
    short is made longer, not the answers shorter than nothing."""
    told = plan(load_recipe("gpu-24gb-llama"), find_gpu("T4")).problems
    keys = [re.findall(r"model\.\w+=\w+", problem) for problem in told]
    both = ["model.quantisation=nf4", "model.engine=transformers"]
    assert keys == [["model.engine=transformers"], ["model.dtype=auto"], both]
    (short,) = plan(load_recipe("gpu-24gb", {"model.max_context": 16}), find_gpu("4090")).problems
    assert short.endswith("no verdict. model.max_context=2228.")
    changes = {"model.max_context": 16, "responses.max_new_tokens": 8192}
    (none,) = plan(load_recipe("gpu-24gb", changes), find_gpu("4090")).problems
    assert none.endswith("no verdict. Take another model.path.")


def test_a_sampled_verdict_is_planned_as_writing_with_its_cache():
    found = {}
    for method in ("logprob", "sampled"):
        recipe = load_recipe("colab-t4", {"judging.method": method, "pairs.min_margin": 0})
        made = plan(recipe, find_gpu("T4"))
        (found[method],) = (stage for stage in made.stages if stage.name == "verdicts")
    config = hardware.architecture(recipe.model)
    longest = work.longest_ranking(recipe.responses.max_new_tokens)
    expected = memory.generation_memory(config, recipe.model, longest, 16)
    assert found["sampled"].memory == expected and expected["KV cache"] > 1
    assert "KV cache" not in found["logprob"].memory
    assert found["sampled"].hours > found["logprob"].hours


def test_a_pair_longer_than_the_budget_goes_alone_and_sets_the_peak():
    recipe = load_recipe("gpu-24gb")
    peaks = []
    for budget, longest in ((4096, 2048), (512, 2048), (512, 256)):
        changes = {"token_budget": budget, "gradient_checkpointing": "on"}
        settings = recipe.training.model_copy(update=changes)
        parts, _ = training_gib(recipe.model, settings, longest, find_gpu("4090"))
        peaks.append(sum(parts.values()))
    assert peaks[0] == peaks[1] > peaks[2]


def test_short_replies_make_short_ranking_prompts():
    short = plan(load_recipe("gpu-24gb", {"responses.max_new_tokens": 75}), find_gpu("4090"))
    tokens = {stage.name: stage.tokens / stage.rows for stage in short.stages}
    assert tokens["responses"] == 75
    assert tokens["verdicts"] == 930 - 2 * 300 and tokens["training self-0"] == 900 - 2 * 300


def test_gemmas_judging_peaks_with_the_longest_answers_not_with_the_usual():
    """Its attention scores grow with the square of a prompt; the longest are judged first."""
    changes = {"model.engine": "transformers", "model.quantisation": "nf4"}
    peaks = []
    for limit in (375, 1024):
        recipe = load_recipe("gpu-24gb", {**changes, "responses.max_new_tokens": limit})
        made = {stage.name: stage.memory for stage in plan(recipe, find_gpu("A100-80")).stages}
        peaks.append(made["verdicts"]["working"])
    expected = memory.judging_memory(hardware.architecture(recipe.model), recipe.model, 2228)
    assert peaks[1] == expected["working"] > 1.5 * peaks[0]


def test_what_cannot_be_counted_is_named():
    changes = {"evaluation.questions": "elsewhere.jsonl", "evaluation.tasks": ["triviaqa"]}
    told = render(plan(load_recipe("gpu-24gb", changes), find_gpu("4090")))
    assert "its questions are not on this machine" in told
    assert "Not planned: the tasks triviaqa, whose size is not known here" in told


EVERYTHING = {
    "evaluation.tasks": ["leaderboard"],
    "evaluation.benchmarks": ["alpaca_eval", "arena_hard", "mt_bench"],
    "others": {"rival": {"path": LLAMA, "engine": "vllm", "dtype": "bfloat16"}},
    "judges": {"small": {"path": QWEN, "engine": "vllm", "dtype": "bfloat16"}},
}


def test_the_whole_evaluation_is_planned_with_hours_memory_and_disk():
    made = plan(load_recipe("gpu-24gb", EVERYTHING), find_gpu("4090"))
    assert made.problems == [] and made.bill == {}
    stages = {(stage.name, stage.part): stage for stage in made.stages}
    assert all(stage.hours > 0 and stage.memory for stage in stages.values())
    assert stages["benchmark_answers", "alpaca_eval, others.rival"].rows == 805
    small, own = (
        stages["benchmark_verdicts", f"arena_hard{part}"] for part in (", judges.small", "")
    )
    assert small.rows == own.rows == 2 * 500 * 3 and small.hours < own.hours / 3
    assert made.disk["weights from the hub"] * GIB / 2 == pytest.approx(
        sum(shape(name).parameters for name in (GEMMA, LLAMA, QWEN))
    )
    text = render(made)
    assert "mmlu: 56,168 requests" in text and "It fits the GPU" in text and "US$" not in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"others": {"rival": {"path": GEMMA}}}, "others.rival.quantisation=nf4"),
        ({"judges": {"second": {"path": GEMMA, "engine": "vllm"}}}, "judges.second.engine="),
        ({"judges": {"second": {"path": QWEN, "dtype": "bfloat16"}}}, "judges.second.dtype=auto"),
        (
            {"model.path": "Qwen/Qwen2.5-7B-Instruct", "evaluation.tasks": ["leaderboard"]}
            | {"model.engine": "vllm", "model.quantisation": "awq", "model.max_context": 2048},
            "lm-eval's tasks: Qwen/Qwen2.5-7B-Instruct in 16 bit",
        ),
    ],
)
def test_other_models_and_judges_and_exams_must_fit_too(changes, told):
    made = plan(load_recipe("colab-t4", {"model.revision": None, **changes}), find_gpu("T4"))
    assert told in "\n".join(made.problems)


def test_what_a_server_does_takes_no_hours_here_and_its_price_is_told():
    judge = {"path": "m", "engine": "api", "url": "http://127.0.0.1:9/v1", "price_in": 1.0}
    made = plan(load_recipe("gpu-24gb", {"judges": {"far": judge}}), find_gpu("4090"))
    text = render(made).splitlines()
    (line,) = [line for line in text if line.startswith("  judges.far ") and "most" not in line]
    assert "not planned" in line and line.endswith("0.07")
    (total,) = [line for line in text if line.startswith("all ")]
    assert "> 3." in total and total.endswith("0.07")
    assert any("at most US$ 0.18" in line for line in text)


def test_the_disk_holds_each_model_of_the_hub_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hardware.architecture(Model(path=QWEN))))
    found = {}
    for judge in (QWEN, LLAMA, str(tmp_path)):
        made = plan(load_recipe("colab-t4", {"judge.path": judge}), find_gpu("A100-80"))
        found[judge] = made.disk["weights from the hub"] * GIB / 2
    qwen, llama = shape(QWEN).parameters, shape(LLAMA).parameters
    assert list(found.values()) == pytest.approx([qwen, qwen + llama, qwen])


def test_a_disk_that_is_too_small_is_told(monkeypatch):
    usage = planning.shutil.disk_usage("/")
    for free, told in ((1 * GIB, True), (10_000 * GIB, False)):
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=free))  # noqa: B023
        assert ("Set SAO_RESULTS" in render(plan(load_recipe("gpu-24gb")))) == told


def test_fp8_on_an_older_card_is_told_to_save_memory_only():
    notes = {gpu: plan(load_recipe("gpu-24gb"), find_gpu(gpu)).notes for gpu in ("3090", "4090")}
    told = "only stores the weights in 8 bit"
    assert [any(told in note for note in notes[gpu]) for gpu in notes] == [True, False]


def test_several_gpus_generate_together_only_with_workers():
    together = plan(load_recipe("paper"), find_gpu("A100-80"), 4)
    alone = plan(load_recipe("paper", {"model.workers": 0}), find_gpu("A100-80"), 4)
    for one, four in zip(alone.stages, together.stages):
        share = 1 if "training" in one.name else 4
        assert one.hours == pytest.approx(share * four.hours)
    assert any("model.workers=4 lets all generate" in note for note in alone.notes)
    assert not any("model.workers" in note for note in together.notes)


def test_more_processes_share_the_states_of_full_fine_tuning():
    recipe = load_recipe(
        "paper", {"training.token_budget": 2048, "training.gradient_checkpointing": "on"}
    )
    one, four = (
        training_gib(recipe.model, recipe.training, 2048, find_gpu("A100-80"), processes=n)[0]
        for n in (1, 4)
    )
    assert one["trained"] == pytest.approx(18 * shape(GEMMA).parameters / GIB)
    assert four["trained"] == pytest.approx(one["trained"] / 4)
    assert four["working"] == one["working"]


def test_an_architecture_that_is_not_known_is_told(tmp_path):
    config = {**hardware.architecture(Model(path=QWEN)), "model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("colab-t4", {"model.path": str(tmp_path), "model.revision": None})
    with pytest.raises(PlanError, match="'mamba' is not known here"):
        plan(recipe, find_gpu("T4"))


def test_a_server_that_generates_and_judges_is_not_planned():
    changes = {"model.engine": "api", "model.url": "http://localhost:1/v1", "model.path": "some"}
    changes |= {"model.quantisation": "none"}
    made = plan(load_recipe("gpu-24gb", changes), find_gpu("4090"))
    assert all(stage.hours is None for stage in made.stages)
    assert "not planned" in render(made)


def test_planning_needs_neither_torch_nor_the_network():
    code = "import sys; from sao_utils.plan import hardware, planning, render"
    code += "; from sao_utils.recipes import load_recipe as load"
    code += "; made = planning.plan(load('paper'), hardware.find_gpu('H100'), 4)"
    code += "; print(render.render(made))"
    code += "; assert not {'torch', 'transformers', 'requests'} & sys.modules.keys()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "training self-0" in told.stdout


# ---------------------------------------------------------------------------- beside a run


def test_a_small_run_is_planned_beside_what_it_took(small_run, monkeypatch):
    sao_method.pairs(small_run)
    made = plan(small_run.recipe)
    took = workload.actual(small_run.folder)
    planned = {stage.name: stage for stage in made.stages}
    assert planned["prompts"].rows == took["prompts"]["made"] == 40
    # The rates of the reference run hold here too, but for 40 prompts only roughly.
    assert planned["responses"].rows == pytest.approx(took["responses"]["made"], rel=0.3)
    assert planned["responses"].tokens == pytest.approx(took["responses"]["tokens"], rel=0.4)
    text = render(made, took).splitlines()
    (line,) = [line.split() for line in text if line.startswith("responses")]
    assert f"{took['responses']['made']:,}" in line and f"{planned['responses'].rows:,}" in line
    assert "time taken" in text[2]


def test_without_the_reference_run_a_cpus_hours_are_not_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "REFERENCE", tmp_path)
    made = plan(load_recipe("tiny"))
    assert {stage.hours for stage in made.stages} == {None}
    assert "Hours on a CPU take a trial" in render(made)
    monkeypatch.undo()
    assert all(stage.hours is not None for stage in plan(load_recipe("tiny")).stages)


def sao(*words, code=0):
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_plans_a_recipe_and_a_run(small_run, monkeypatch):
    monkeypatch.setenv("SAO_RESULTS", str(small_run.folder.parent))
    told = sao("plan", "--recipe", "gpu-24gb", "--gpu", "4090", "--set", "prompts.count=500")
    assert "on 4090" in told and "500" in told
    assert "time taken" in sao("plan", "--run", "small")
    assert "does not fit" in sao("plan", "--recipe", "paper", "--gpu", "L4", code=1)
    assert "exit code 1" in sao("plan", "--help")
    assert "either --recipe or --run" in sao("plan", code=2)
    assert "is not known" in sao("plan", "--recipe", "tiny", "--gpu", "abacus", code=2)
    assert "There is no run" in sao("plan", "--run", "none", code=2)
