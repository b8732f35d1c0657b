"""What a recipe will cost, before anything runs: rows, tokens, hours, GPU memory, disk.

Arithmetic on the shape of the model and the data sheet of the GPU; needs neither torch nor network
nor weights. What training keeps for its backward pass and the peaks of the transformers engine are
checked on a CPU; nothing has been compared with a real GPU yet. Sizes are GiB, times hours.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from sao_utils.costs import (
    CONTEXT,
    DECODE_SHARE,
    GIB,
    VLLM_TOKENS,
    Gpu,
    architecture,
    dtype_of,
    generation_memory,
    judging_memory,
    microbatch,
    model_shape,
    reading_hours,
    training_hours,
    training_memory,
    writing_hours,
)
from sao_utils.questions import QUESTION_SEED, SETS, read_column
from sao_utils.recipe import Model, Recipe, RecipeError
from sao_utils.responses import PER_PROMPT
from sao_utils.rows import results_folder
from sao_utils.shapes import Shape


@dataclass(frozen=True)
class Rates:
    """What is assumed of lengths (tokens) and of what the filters keep (shares)."""

    source: str
    instruction: float = 90  # the persona template with its persona
    prompt: float = 60
    response: float = 375
    spread: float = 0.7  # of response lengths: standard deviation over mean, lognormal
    verdict: float = 930  # the ranking prompt with both responses
    # Of it, in the mean of both orders: what vLLM's prefix cache holds, in blocks of 16 tokens. The
    # first order begins like all others (16), the second like the first up to its response 1 (96).
    shared: float = 56
    pair: float = 900  # trained on: prompt and response twice
    prompts_kept: float = 0.95
    judged: float = 1.0  # of the prompts: those whose two answers differ
    pairs_kept: float = 0.6


@dataclass(frozen=True)
class Stage:
    """One stage, named as in a run's manifest.

    tokens: written by the model, or with `verdicts` and `duels` read, or trained on.
    hours: None where it cannot be told. memory: GiB by part; empty without a GPU.
    """

    name: str
    rows: int
    tokens: int
    hours: float | None
    memory: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """problems: what does not fit, each with the key to change. notes: assumptions, and the rest."""

    recipe: str
    model: str
    machine: str
    stages: list[Stage]
    disk: dict[str, float]
    problems: list[str]
    notes: list[str]


# ---------------------------------------------------------------------------- the plan


def plan(recipe: Recipe, gpu: Gpu | None = None, processes: int = 1) -> Plan:
    """Plan a run of a recipe.

    Args:
        gpu: of which kind (`find_gpu`); None: a CPU, for which only the tiny recipe has times, those
            of the committed reference run.
        processes: GPUs that train together, and that generate if model.workers says so.

    Raises:
        PlanError: the model's shape is not known.
    """
    rates, measured = _rates(recipe)
    shape = None if recipe.model.engine == "api" else model_shape(recipe.model)
    problems, notes = [], [_told(rates)]
    counts = _counts(recipe, rates)
    stages = []
    for name, rows in counts.items():
        if name == "training":
            stages += [
                _trained(recipe, shape, gpu, rates, rows, arm, seed, processes)
                for arm in recipe.arms
                for seed in recipe.seeds
            ]
        elif rows is not None:
            work = _judged if name in ("verdicts", "duels") else _written
            stages.append(work(recipe, gpu, rates, name, rows, processes))
    if gpu is None:
        stages = [_as_measured(stage, measured) for stage in stages]
        if not measured:
            notes.append(
                "Without a GPU only the recipe tiny has times, and those come from "
                "results/reference of a checkout: hours are not planned. --gpu plans for a GPU."
            )
    else:
        problems = _problems(recipe, shape, gpu, processes, stages)
        notes += _assumptions(recipe, gpu, processes)
    machine = "CPU" if gpu is None else f"{processes} x {gpu.name}" if processes > 1 else gpu.name
    disk = _disk(recipe, shape, stages, len(recipe.arms) * len(recipe.seeds))
    notes += _left_out(recipe, counts, disk)
    return Plan(recipe.name, recipe.model.path, machine, stages, disk, problems, notes)


def _rates(recipe: Recipe) -> tuple[Rates, dict]:
    """Assumed rates, or for the tiny model those of the reference run, with its manifest's stages."""
    kept = 0.6 if recipe.pairs.require_consistent else 0.9
    cut = PER_PROMPT * max(0, Rates.response - recipe.responses.max_new_tokens)
    assumed = Rates("assumed", verdict=Rates.verdict - cut, pair=Rates.pair - cut, pairs_kept=kept)
    stages = actual(results_folder() / "reference") if recipe.model.path == "tiny" else {}
    trained = [stages[name] for name in stages if name.startswith("training self")]
    if not trained or not {"prompts", "responses", "verdicts"} <= stages.keys():
        return assumed, {}
    prompts, responses, verdicts = (stages[k] for k in ("prompts", "responses", "verdicts"))
    asked = responses["made"] / PER_PROMPT
    pairs = sum(stage["pairs"] for stage in trained)
    prompt = prompts["tokens"] / prompts["made"]
    response = responses["tokens"] / responses["made"]
    return Rates(
        "of the reference run",
        prompt=prompt,
        response=response,
        verdict=Rates.verdict + (prompt - Rates.prompt) + PER_PROMPT * (response - Rates.response),
        pair=sum(stage["tokens"] for stage in trained) / pairs,
        prompts_kept=asked / prompts["made"],
        judged=verdicts["made"] / 2 / asked,
        pairs_kept=pairs / asked,
    ), stages


def _counts(recipe: Recipe, rates: Rates) -> dict[str, int | None]:
    """Rows of each stage, None where that cannot be told; of "training", pairs of one seed."""
    prompts = recipe.personas.count * len(recipe.seeds)
    kept = prompts * rates.prompts_kept
    asked = _questions(recipe)
    tuned = len(recipe.arms) * len(recipe.seeds)
    return {
        "prompts": prompts,
        "responses": round(PER_PROMPT * kept),
        "verdicts": round(2 * kept * rates.judged),
        "training": round(kept / len(recipe.seeds) * rates.pairs_kept),
        "answers": asked and asked * len(recipe.evaluation.temperatures) * (1 + tuned),
        "duels": asked and asked * tuned * 2,
    }


def _questions(recipe: Recipe) -> int | None:
    """How many evaluation questions there are, if that can be told without a network."""
    settings = recipe.evaluation
    if settings.questions in (*QUESTION_SEED, "everyday"):
        return len(SETS[settings.questions](settings))
    if not Path(settings.questions).is_file():
        return None
    try:
        return len(read_column(settings.questions, "prompt"))
    except RecipeError:
        return None


def _written(recipe, gpu, rates, name, rows, processes) -> Stage:
    """A stage in which the model writes replies."""
    model = recipe.model
    prompt, length, section = {
        "prompts": (rates.instruction, rates.prompt, recipe.personas),
        "responses": (rates.prompt, rates.response, recipe.responses),
        "answers": (rates.prompt, rates.response, recipe.evaluation),
    }[name]
    most = section.max_new_tokens
    new = min(length, most)
    hours, memory = None, {}
    if gpu is not None and model.engine != "api":
        memory = generation_memory(architecture(model), model, prompt, most, gpu.memory)
        shared = prompt / 2 if name == "responses" else 0
        hours = writing_hours(model, gpu, memory, rows, prompt, new, most, rates.spread, shared)
        if hours is not None:
            hours /= max(1, min(model.workers, processes))
    return Stage(name, rows, round(rows * new), hours, memory)


def _judged(recipe, gpu, rates, name, rows, processes) -> Stage:
    """A stage in which the judge reads two replies, and with judging.method=sampled writes a few
    tokens: "ranking: 1 > 2" and its end are about eight."""
    model, tokens = recipe.judging_model, rates.verdict
    hours, memory = None, {}
    if gpu is not None and model.engine != "api":
        shape = model_shape(model)
        limit = (recipe.responses if name == "verdicts" else recipe.evaluation).max_new_tokens
        longest = min(_longest_ranking(limit), shape.context or math.inf)  # the first batch
        memory = judging_memory(architecture(model), model, longest, gpu.memory)
        few = min(8, recipe.judging.max_new_tokens) if recipe.judging.method == "sampled" else 0
        hours = reading_hours(model, gpu, memory, rows, tokens, few, rates.shared)
        if hours is not None:
            hours /= max(1, min(model.workers, processes))
    return Stage(name, rows, round(rows * tokens), hours, memory)


def _longest_ranking(max_new_tokens: int) -> float:
    """Tokens of a ranking prompt with two responses at their limit."""
    return Rates.verdict + PER_PROMPT * (max_new_tokens - Rates.response)


def _trained(recipe, shape, gpu, rates, pairs, arm, seed, processes) -> Stage:
    settings = recipe.training
    share = 0.5 if arm == "sft_random" else 1.0  # one answer of each pair
    tokens = pairs * rates.pair * share * settings.epochs
    hours, memory = None, {}
    if gpu is not None and shape is not None:
        config = architecture(recipe.model)
        memory = training_memory(
            config, recipe.model, settings, gpu.memory, recipe.pairs.max_tokens, processes
        )
        kept = shape.kept_bytes(settings.method == "full") * shape.layers
        kept *= microbatch(settings, recipe.pairs.max_tokens)
        twice = memory["activations"] * GIB < 0.999 * kept
        answers = pairs * 2 * rates.response * share * settings.epochs
        hours = training_hours(shape, gpu, settings, tokens, answers, twice)
        hours /= gpu.reached * processes
    return Stage(f"training {arm}-{seed}", pairs, round(tokens), hours, memory)


def _as_measured(stage: Stage, measured: dict) -> Stage:
    """With the seconds a row (in training, a token) of the reference run, on two CPU cores."""
    alike = [s for name, s in measured.items() if name.split("-")[0] == stage.name.split("-")[0]]
    if not alike:
        return stage
    key, amount = ("tokens", stage.tokens) if "training" in stage.name else ("made", stage.rows)
    seconds = sum(s["seconds"] for s in alike) / sum(s[key] for s in alike) * amount
    return Stage(stage.name, stage.rows, stage.tokens, seconds / 3600, {})


# ---------------------------------------------------------------------------- what does not fit


def _problems(recipe, shape, gpu, processes, stages) -> list[str]:
    found = []
    for key, model in (("model", recipe.model), ("judge", recipe.judge)):
        if model is not None and model.engine != "api":
            found += _misfits(key, model, recipe, gpu, processes)
    for label, of, model in (
        ("Generating", ("prompts", "responses", "answers"), "model"),
        ("Judging", ("verdicts", "duels"), "judge" if recipe.judge else "model"),
    ):
        memory = max((s.memory for s in stages if s.name in of), key=lambda m: sum(m.values()))
        if memory:
            found += _engine_memory(label, model, getattr(recipe, model), gpu, memory)
    if shape is not None:
        found += _training_memory_problems(recipe, gpu, processes, stages)
    return list(dict.fromkeys(found))


def _misfits(key: str, model: Model, recipe: Recipe, gpu: Gpu, processes: int) -> list[str]:
    """Workers without a GPU, what the GPU cannot compute, and contexts that are too short."""
    found, old = [], gpu.capability < 8.0
    if model.workers > processes:
        fewer = processes if processes > 1 else 0
        found.append(
            f"Each of {model.workers} workers takes a GPU, and there is {processes}: "
            f"{key}.workers={fewer}, or --gpus {model.workers}."
        )
    if model.engine == "vllm" and old:
        found.append(
            f"vLLM does not promise to run on the {gpu.name} (compute capability {gpu.capability}): "
            f"{key}.engine=transformers"
            + (f" with {key}.quantisation=nf4." if model.quantisation != "none" else ".")
        )
    if model.dtype == "bfloat16" and old:
        found.append(
            f"The {gpu.name} (compute capability {gpu.capability}) has no bfloat16: {key}.dtype=auto "
            "computes in float16."
        )
    gemma = model_shape(model).family.startswith("gemma")
    if gemma and old:
        found.append(
            f"Gemma overflows in float16, and the {gpu.name} has nothing else of 16 bit: take another "
            f"{key}.path, such as Qwen/Qwen2.5-1.5B-Instruct."
        )
    elif gemma and model.dtype == "float16":
        found.append(f"Gemma overflows in float16: {key}.dtype=bfloat16.")
    if model.quantisation == "fp8" and gpu.capability < 7.5:
        found.append(f"fp8 weights need compute capability 7.5: {key}.quantisation=gptq.")
    context = model_shape(model).context or math.inf
    if model.engine == "vllm":
        if model.max_context and model.max_context > context:
            found.append(f"{model.path} takes {context} tokens: {key}.max_context={context}.")
    context = min(context, model.max_context or math.inf)
    shown = _longest_ranking(recipe.responses.max_new_tokens)
    if model is recipe.judging_model and shown > context:
        fitting = int((context - shown) // PER_PROMPT) + recipe.responses.max_new_tokens
        found.append(
            f"Two responses at their limit and the ranking prompt are about {shown:,.0f} tokens, the "
            f"judge takes {context:,}: such pairs get no verdict. responses.max_new_tokens={fitting} "
            "or less."
        )
    return found


def _engine_memory(label: str, key: str, model: Model, gpu: Gpu, memory: dict) -> list[str]:
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    bits = dtype_of(model) if model.quantisation == "none" else model.quantisation
    told = f"{label}: {model.path} in {bits} ({weights:.1f} GiB of weights)"
    fewer = {"transformers": "nf4", "vllm": "fp8"}[model.engine]
    smaller = f"{key}.quantisation={fewer}"
    if model.quantisation != "none":
        smaller = f"a smaller {key}.path"
    if model.engine == "vllm":  # it wants room for one row of the whole context
        shape, share = model_shape(model), model.gpu_memory * gpu.memory
        context = model.max_context or shape.context or VLLM_TOKENS
        if memory["working"] + weights + context * shape.kv_bytes(dtype_of(model)) / GIB > share:
            return [
                f"{told} leaves no room for one context of {context} tokens on the {gpu.name} "
                f"({share:.1f} GiB): {smaller}, or a lower {key}.max_context."
            ]
    elif weights > 0.95 * room:
        return [f"{told} does not fit the {gpu.name} ({room:.1f} GiB): {smaller}."]
    elif need > room:
        part = (room - weights) / (need - weights)
        fitting = max(1, int(model.batch_tokens * part) // 1024 * 1024)
        return [
            f"{label} needs {need:.1f} GiB, the {gpu.name} has {room:.1f}: "
            f"{key}.batch_tokens={fitting}."
        ]
    return []


def _training_memory_problems(recipe, gpu, processes, stages) -> list[str]:
    settings, room = recipe.training, gpu.memory - CONTEXT
    stage = next(s for s in stages if s.name.startswith("training"))
    need = sum(stage.memory.values())
    if need <= room:
        return []
    advice = []
    if settings.method == "full":
        config, longest = architecture(recipe.model), recipe.pairs.max_tokens
        for number in (2, 4, 8, 16, 32, 64):
            parts = training_memory(config, recipe.model, settings, gpu.memory, longest, number)
            if number > processes and sum(parts.values()) <= room:
                advice.append(f"{number} GPUs (--gpus {number}, see sao_utils/launch)")
                break
        advice.append("training.method=lora with training.quantisation=nf4")
    elif settings.quantisation == "none":
        advice.append("training.quantisation=nf4")
    if settings.gradient_checkpointing == "off":
        advice.append("training.gradient_checkpointing=on")
    elif stage.memory["activations"] + stage.memory["working"] > 0.3 * room:
        pair = PER_PROMPT * recipe.pairs.max_tokens  # goes alone if it is longer than the budget
        if settings.token_budget > pair:
            advice.append(f"training.token_budget={max(pair, settings.token_budget // 2)}")
        else:
            advice.append(f"pairs.max_tokens={recipe.pairs.max_tokens // 2}")
    told = ", or ".join(advice) or "a smaller model.path"
    return [f"Training needs {need:.1f} GiB, the {gpu.name} has {room:.1f}: {told}."]


# ---------------------------------------------------------------------------- disk and words


def _disk(recipe: Recipe, shape: Shape | None, stages: list[Stage], trained: int) -> dict:
    """GiB by kind; rows at five bytes a token and 500 a row."""
    written = [s for s in stages if not s.name.startswith("training")]
    read = ("verdicts", "duels")  # their rows hold numbers only
    size = sum(500 * s.rows + (0 if s.name in read else 5 * s.tokens) for s in written)
    disk = {"rows": size / GIB}
    if shape is not None:
        from_hub = {
            model.path: 2 * model_shape(model).parameters / GIB
            for model in (recipe.model, recipe.judging_model)
            if model.engine != "api" and model.path != "tiny" and not Path(model.path).is_dir()
        }
        disk |= {"weights from the hub": sum(from_hub.values())} if from_hub else {}
        full = recipe.training.method == "full"
        each = shape.parameters if full else shape.adapter(recipe.training.lora_rank)
        disk["trained weights"] = 4 * each * trained / GIB
        disk["checkpoints, while it trains"] = 2 * 12 * each / GIB  # two, with Adam's moments
    return disk


def _left_out(recipe: Recipe, counts: dict, disk: dict[str, float]) -> list[str]:
    """What the plan does not hold, and a disk that is too small for it."""
    notes = []
    if counts["answers"] is None:
        notes.append("The evaluation is not planned: its questions are not on this machine.")
    more = {
        f"evaluation.{key}": getattr(recipe.evaluation, key) for key in ("harness", "benchmarks")
    }
    more |= {"others": recipe.others, "judges": recipe.judges}
    if named := [key for key, value in more.items() if value]:
        notes.append(f"Not planned: what {', '.join(named)} add to the evaluation.")
    folder = results_folder().absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free / GIB
    if sum(disk.values()) > free:
        notes.append(
            f"Of disk it takes {sum(disk.values()):.1f} GiB; here are {free:.1f} free. Set SAO_RESULTS "
            "to a folder on a larger disk (and HF_HOME, for weights from the hub)."
        )
    return notes


def _told(rates: Rates) -> str:
    return (
        f"Lengths and filters ({rates.source}): prompt {rates.prompt:.0f} tokens, response "
        f"{rates.response:.0f}, ranking prompt {rates.verdict:.0f}, pair {rates.pair:.0f}; kept "
        f"{rates.prompts_kept:.0%} of prompts, {rates.pairs_kept:.0%} of pairs."
    )


def _assumptions(recipe: Recipe, gpu: Gpu, processes: int) -> list[str]:
    notes = [
        f"Speed: decoding at {DECODE_SHARE:.0%} of what {gpu.bandwidth:,} GB/s and "
        f"{gpu.compute} TFLOP/s allow, all else at {gpu.reached:.0%}; loading is not counted. Not "
        "yet compared with a real GPU."
    ]
    model = recipe.model
    if "fp8" in (model.quantisation, recipe.judging_model.quantisation) and gpu.capability < 8.9:
        notes.append(
            f"fp8 on the {gpu.name} (compute capability {gpu.capability}; 8.9 computes in 8 bit) only "
            "stores the weights in 8 bit: the memory is as planned, computing is not faster."
        )
    if processes > 1 and model.workers < processes:
        notes.append(
            f"Only training uses {processes} GPUs: model.workers={processes} lets all generate."
        )
    return notes


def render(made: Plan, actual: dict | None = None) -> str:
    """A plan as lines of text; beside it what a run's manifest says, if one is given.

    Args:
        actual: the manifest's "stages": name -> {seconds, made or pairs, tokens}.
    """
    head = ["", "rows", "tokens", "time", "GPU memory"]
    table = [head + (["rows made", "tokens", "time taken"] if actual is not None else [])]
    for stage in made.stages:
        memory = f"{sum(stage.memory.values()):.1f} GiB" if stage.memory else ""
        row = [stage.name, f"{stage.rows:,}", f"{stage.tokens:,}", _time(stage.hours), memory]
        if actual is not None:
            row += _actual(actual.get(stage.name))
        table.append(row)
    hours = [stage.hours for stage in made.stages]
    total = None if None in hours else sum(hours)
    peak = max((sum(s.memory.values()) for s in made.stages), default=0)
    row = ["all", "", "", _time(total), f"{peak:.1f} GiB" if peak else ""]
    if actual is not None:
        row += ["", "", _time(sum(s["seconds"] for s in actual.values()) / 3600)]
    table.append(row)
    if not peak:
        table = [row[:4] + row[5:] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{made.recipe}: {made.model} on {made.machine}", ""]
    for first, *cells in table:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    disk = [f"{name} {_size(size)}" for name, size in made.disk.items()]
    lines += ["", f"Disk: {'; '.join(disk)}."]
    if made.problems:
        lines += ["", "What does not fit, and the key to change:"]
        lines += [f"- {problem}" for problem in made.problems]
    elif peak:
        lines += ["", "It fits the GPU."]
    return "\n".join([*lines, "", *made.notes])


def _size(size: float) -> str:
    return f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"


def _time(hours: float | None) -> str:
    if hours is None:
        return "not planned"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _actual(stage: dict | None) -> list[str]:
    if stage is None:
        return ["", "", ""]
    rows = stage.get("made", stage.get("pairs", 0))
    tokens = f"{stage['tokens']:,}" if stage.get("tokens") else ""
    return [f"{rows:,}", tokens, _time(stage["seconds"] / 3600)]


def actual(folder: Path) -> dict:
    """What the manifest in the folder of a run says of each stage; {} if nothing has run."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")).get("stages", {}) if path.is_file() else {}
