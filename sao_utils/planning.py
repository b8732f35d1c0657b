"""What a recipe will take, before anything runs: rows, tokens, hours, GPU memory, disk, money.

What is asked of which model is counted by `workload`, what that costs on a GPU by `costs`; here
both come together: the stages, what does not fit and which key to change, and the plan as text.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sao_utils.costs import (
    CONTEXT,
    DECODE_SHARE,
    GIB,
    VLLM_TOKENS,
    Gpu,
    architecture,
    dtype_of,
    exam_hours,
    exam_memory,
    generation_memory,
    judging_memory,
    microbatch,
    model_shape,
    reading_hours,
    training_hours,
    training_memory,
    writing_hours,
)
from sao_utils.recipe import Model, Recipe
from sao_utils.responses import PER_PROMPT
from sao_utils.rows import results_folder
from sao_utils.shapes import Shape
from sao_utils.workload import Rates, Work, longest_ranking, workload

#: Stages that come after the training.
AFTER = ("answers", "duels", "harness", "benchmark_answers", "benchmark_verdicts")


@dataclass(frozen=True)
class Stage:
    """One stage, named as in a run's manifest, or `part` of one.

    tokens: written by the model; in stages of `workload.READ` read, in training trained on. hours: None
    where it cannot be told. memory: GiB by part; empty without a GPU. dollars: what a server gets for
    it, at the assumed lengths and at most; None without a price.
    """

    name: str
    rows: int
    tokens: int
    hours: float | None
    memory: dict[str, float]
    part: str = ""
    dollars: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """problems: what does not fit, each with the key to change. notes: assumptions, and the rest. bill:
    key of the recipe -> US$ that a server gets, at the assumed lengths and at most."""

    recipe: str
    model: str
    machine: str
    stages: list[Stage]
    disk: dict[str, float]
    problems: list[str]
    notes: list[str]
    bill: dict[str, tuple[float, float]]


# ---------------------------------------------------------------------------- the plan


def plan(recipe: Recipe, gpu: Gpu | None = None, processes: int = 1) -> Plan:
    """Plan a run of a recipe.

    Args:
        gpu: of which kind (`find_gpu`); None: a CPU, for which only the tiny recipe has times, those
            of the committed reference run.
        processes: GPUs that train together, and that generate if model.workers says so.

    Raises:
        PlanError: a model's shape is not known.
    """
    load = workload(recipe)
    shape = None if recipe.model.engine == "api" else model_shape(recipe.model)
    problems, notes = [], [_told(load.rates)]
    trained = [
        _trained(recipe, shape, gpu, load.rates, load.pairs, arm, seed, processes)
        for arm in recipe.arms
        for seed in recipe.seeds
    ]
    asked = [_asked(work, gpu, load.rates, processes) for work in load.works]
    if gpu is None:  # nothing is known of how long other models take
        own = [work.model.path == recipe.model.path for work in load.works]
        asked = [_as_measured(stage, load.measured) if k else stage for stage, k in zip(asked, own)]
        trained = [_as_measured(stage, load.measured) for stage in trained]
    place = next((k for k, work in enumerate(load.works) if work.stage in AFTER), len(asked))
    stages = [*asked[:place], *trained, *asked[place:]]
    if gpu is None and not load.measured:
        notes.append(
            "Without a GPU only the recipe tiny has times, and those come from "
            "results/reference of a checkout: hours are not planned. --gpu plans for a GPU."
        )
    if gpu is not None:
        problems = _problems(recipe, shape, gpu, processes, trained, load.works)
        notes += _assumptions(recipe, gpu, processes, load.works)
    machine = "CPU" if gpu is None else f"{processes} x {gpu.name}" if processes > 1 else gpu.name
    disk = _disk(recipe, shape, load.works, len(recipe.arms) * len(recipe.seeds))
    notes += [*load.notes, *_too_little_disk(disk)]
    return Plan(recipe.name, recipe.model.path, machine, stages, disk, problems, notes, load.bill)


def _asked(work: Work, gpu: Gpu | None, rates: Rates, processes: int) -> Stage:
    """The stage, or part of one, in which a model is asked."""
    model, hours, memory = work.model, None, {}
    if gpu is not None and model.engine != "api":
        memory = _memory(work, gpu)
        if work.verb == "exam":
            hours = exam_hours(model, gpu, work.requests, work.read, work.written)
        elif _writes(work):
            told = (work.rows, work.read, work.written, work.most_written, rates.spread)
            hours = writing_hours(model, gpu, memory, *told, work.shared)
        else:
            told = (work.rows, work.read, work.shared)
            hours = reading_hours(model, gpu, memory, *told)
        if hours is not None and work.verb != "exam":
            hours /= max(1, min(model.workers, processes))
    return Stage(work.stage, work.rows, work.tokens, hours, memory, work.part, work.dollars)


def _memory(work: Work, gpu: Gpu) -> dict[str, float]:
    """GiB by part that a model takes for its work on a GPU."""
    model = work.model
    config, context = architecture(model), model_shape(model).context or math.inf
    longest = min(work.longest, context, model.max_context or math.inf)
    if work.verb == "exam":
        return exam_memory(config, model, longest)
    if _writes(work):
        return generation_memory(config, model, longest, work.most_written, gpu.memory)
    return judging_memory(config, model, longest, gpu.memory)


def _writes(work: Work) -> bool:
    """Also a judge does, whose verdict is sampled."""
    return work.verb == "write" or (work.verb == "judge" and work.most_written > 0)


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
    return replace(stage, hours=seconds / 3600)


# ---------------------------------------------------------------------------- what does not fit

#: `Work.verb` -> what a model does, as problems tell it.
DOES = {"write": "Generating", "judge": "Judging", "exam": "lm-eval's tasks"}
#: Compute capability from which on vLLM runs.
VLLM_CAPABILITY = 8.0
#: Tokens of a response; a lower limit is no advice. Ours.
SHORTEST = 32


def _problems(recipe, shape, gpu, processes, trained, works) -> list[str]:
    """Of every model that runs here, and of training."""
    found = []
    here = {work.who: work.model for work in works if work.model.engine != "api"}
    for who, model in {**here, "model": recipe.model}.items():
        if model.engine != "api":
            found += _misfits(who, model, recipe, gpu, processes)
    most: dict[tuple[str, bool], tuple[Work, dict]] = {}  # lm-eval takes memory of its own
    longest: dict[str, float] = {}
    for work in works:
        if work.model.engine == "api":
            continue
        work = replace(work, model=_running(work.model, gpu))
        memory, key = _memory(work, gpu), (work.who, work.verb == "exam")
        if key not in most or sum(memory.values()) > sum(most[key][1].values()):
            most[key] = work, memory
        longest[work.who] = max(longest.get(work.who, 0), work.longest + work.most_written)
    for (who, exam), (work, memory) in most.items():
        if exam:
            found += _exam_memory(work.model, gpu, memory)
        else:
            found += _engine_memory(DOES[work.verb], who, work.model, gpu, memory, longest[who])
    if shape is not None and trained:
        found += _training_memory_problems(recipe, gpu, processes, trained)
    return list(dict.fromkeys(found))


def _running(model: Model, gpu: Gpu) -> Model:
    """The model by an engine that runs on the GPU, as `_misfits` advises."""
    if model.engine != "vllm" or gpu.capability >= VLLM_CAPABILITY:
        return model
    bits = "none" if model.quantisation == "none" else "nf4"
    return model.model_copy(update={"engine": "transformers", "quantisation": bits})


def _misfits(key: str, model: Model, recipe: Recipe, gpu: Gpu, processes: int) -> list[str]:
    """Workers without a GPU, what the GPU cannot compute, and contexts that are too short."""
    found, old = [], gpu.capability < 8.0
    if model.workers > processes:
        fewer = processes if processes > 1 else 0
        found.append(
            f"Each of {model.workers} workers takes a GPU, and there is {processes}: "
            f"{key}.workers={fewer}, or --gpus {model.workers}."
        )
    if (runs := _running(model, gpu)) is not model:
        found.append(
            f"vLLM does not promise to run on the {gpu.name} (compute capability {gpu.capability}): "
            f"{key}.engine=transformers"
            + (f" with {key}.quantisation=nf4." if runs.quantisation != "none" else ".")
        )
    if model.dtype == "bfloat16" and old:
        found.append(
            f"The {gpu.name} (compute capability {gpu.capability}) has no bfloat16: {key}.dtype=auto "
            "computes in float16."
        )
    own = model_shape(model)
    gemma = own.family.startswith("gemma")
    if gemma and old:
        found.append(
            f"Gemma overflows in float16, and the {gpu.name} has nothing else of 16 bit: take another "
            f"{key}.path, such as Qwen/Qwen2.5-1.5B-Instruct."
        )
    elif gemma and model.dtype == "float16":
        found.append(f"Gemma overflows in float16: {key}.dtype=bfloat16.")
    holds = own.context or math.inf
    if runs.engine == "vllm" and (model.max_context or 0) > holds:
        found.append(f"{model.path} takes {holds} tokens: {key}.max_context={holds}.")
    context = min(holds, model.max_context or math.inf)
    section = "evaluation" if key.startswith("judges.") else "responses"
    limit = getattr(recipe, section).max_new_tokens
    shown = longest_ranking(limit)
    if (model is recipe.judging_model or section == "evaluation") and shown > context:
        fitting, advice = int((context - shown) // PER_PROMPT) + limit, []
        if fitting >= SHORTEST:
            advice.append(f"{section}.max_new_tokens={fitting} or less")
        if shown <= holds:
            advice.append(f"{key}.max_context={math.ceil(shown)}")
        found.append(
            f"Two responses at their limit and the ranking prompt are about {shown:,.0f} tokens, the "
            f"judge takes {context:,}: such pairs get no verdict. "
            f"{', or '.join(advice) or f'Take another {key}.path'}."
        )
    return found


def _engine_memory(
    label: str, key: str, model: Model, gpu: Gpu, memory: dict, longest: float
) -> list[str]:
    """longest: tokens of the longest prompt with its reply, of all that the model is asked."""
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    told = f"{model.path} in {_bits(model)} ({weights:.1f} GiB of weights)"
    fewer = {"transformers": "nf4", "vllm": "fp8"}[model.engine]
    smaller = f"{key}.quantisation={fewer}"
    if model.quantisation != "none":
        smaller = f"a smaller {key}.path"
    if model.engine == "vllm":  # it wants room for one row of the whole context
        shape, share = model_shape(model), model.gpu_memory * gpu.memory
        context = model.max_context or shape.context or VLLM_TOKENS
        left = (share - memory["working"] - weights) * GIB / shape.kv_bytes(dtype_of(model))
        if left < context:
            if (shorter := int(left) // 16 * 16) >= longest:
                smaller += f", or {key}.max_context={shorter}"
            return [
                f"{told} leaves no room for one context of {context} tokens on the {gpu.name} "
                f"({share:.1f} GiB): {smaller}."
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


def _exam_memory(model: Model, gpu: Gpu, memory: dict) -> list[str]:
    """lm-eval takes 16-bit weights of what vLLM runs, and batches of any size."""
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    if need <= room:
        return []
    return [
        f"{DOES['exam']}: {model.path} in {_bits(model)} ({weights:.1f} GiB of weights) takes "
        f"{need:.1f} GiB of the {gpu.name} ({room:.1f}): evaluation.harness=[]."
    ]


def _bits(model: Model) -> str:
    if model.quantisation != "none":
        return model.quantisation
    return "float32" if dtype_of(model) == "float32" else "16 bit"


def _training_memory_problems(recipe, gpu, processes, trained) -> list[str]:
    settings, room = recipe.training, gpu.memory - CONTEXT
    stage = trained[0]
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


def _disk(recipe: Recipe, shape: Shape | None, works: list[Work], trained: int) -> dict:
    """GiB by kind; rows at five bytes a token that was written, and 500 a row."""
    size = sum(work.rows * (500 + 5 * work.written) for work in works)
    disk = {"rows": size / GIB}
    models = {work.model.path: work.model for work in works if work.model.engine != "api"}
    from_hub = {
        path: 2 * model_shape(model).parameters / GIB
        for path, model in models.items()
        if path != "tiny" and not Path(path).is_dir()
    }
    disk |= {"weights from the hub": sum(from_hub.values())} if from_hub else {}
    if shape is not None and trained:
        full = recipe.training.method == "full"
        each = shape.parameters if full else shape.adapter(recipe.training.lora_rank)
        disk["trained weights"] = 4 * each * trained / GIB
        disk["checkpoints, while it trains"] = 2 * 12 * each / GIB  # two, with Adam's moments
    return disk


def _too_little_disk(disk: dict[str, float]) -> list[str]:
    folder = results_folder().absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free / GIB
    if sum(disk.values()) <= free:
        return []
    return [
        f"Of disk it takes {sum(disk.values()):.1f} GiB; here are {free:.1f} free. Set SAO_RESULTS "
        "to a folder on a larger disk (and HF_HOME, for weights from the hub)."
    ]


def _told(rates: Rates) -> str:
    return (
        f"Lengths and filters ({rates.source}): prompt {rates.prompt:.0f} tokens, response "
        f"{rates.response:.0f}, ranking prompt {rates.verdict:.0f}, pair {rates.pair:.0f}; kept "
        f"{rates.prompts_kept:.0%} of prompts, {rates.pairs_kept:.0%} of pairs."
    )


def _assumptions(recipe: Recipe, gpu: Gpu, processes: int, works: list[Work]) -> list[str]:
    notes = [
        f"Speed: decoding at {DECODE_SHARE:.0%} of what {gpu.bandwidth:,} GB/s and "
        f"{gpu.compute} TFLOP/s allow, all else at {gpu.reached:.0%}; loading is not counted. Not "
        "yet compared with a real GPU."
    ]
    model = recipe.model
    if "fp8" in {work.model.quantisation for work in works} and gpu.capability < 8.9:
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
        actual: the stages of a run (`workload.actual`): name -> {seconds, made or pairs, tokens}.
    """
    columns = ["rows", "tokens", "time", "GPU memory", "US$ about"]
    took = ["rows made", "tokens", "time taken"] if actual is not None else []
    table = [["", *columns, *took]]
    by_name: dict[str, list[Stage]] = {}
    for stage in made.stages:
        by_name.setdefault(stage.name, []).append(stage)
    for name, parts in by_name.items():
        beside = _actual((actual or {}).get(name)) if took else []
        table.append([name, *_cells(parts), *beside])
        if len(parts) > 1 or parts[0].part:
            own = "the run's own"
            table += [[f"  {p.part or own}", *_cells([p]), *[""] * len(took)] for p in parts]
    every = _cells(made.stages)
    total = [_time(sum(s["seconds"] for s in actual.values()) / 3600)] if took else []
    table.append(["all", "", "", *every[2:], *(["", "", *total] if took else [])])
    shown = [k for k in range(len(table[0])) if k < 4 or k > 5 or any(row[k] for row in table[1:])]
    table = [[row[k] for k in shown] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{made.recipe}: {made.model} on {made.machine}", ""]
    for first, *cells in table:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())
    disk = [f"{name} {_size(size)}" for name, size in made.disk.items()]
    lines += ["", f"Disk: {'; '.join(disk)}."]
    if made.bill:
        lines += ["", *told_bill(made.bill)]
    if made.problems:
        lines += ["", "What does not fit, and the key to change:"]
        lines += [f"- {problem}" for problem in made.problems]
    elif any(stage.memory for stage in made.stages):
        lines += ["", "It fits the GPU."]
    return "\n".join([*lines, "", *made.notes])


def told_bill(bill: dict[str, tuple[float, float]]) -> list[str]:
    """Who is paid how much, as lines of text; the most that a run can cost first."""
    about, most = (sum(amounts) for amounts in zip(*bill.values()))
    return [
        f"A whole run pays servers at most US$ {most:,.2f}, with every reply as long as it may be; "
        f"about US$ {about:,.2f} at the assumed lengths:",
        *(
            f"  {who:<30} at most US$ {most:>10,.2f}, about {about:>10,.2f}"
            for who, (about, most) in bill.items()
        ),
    ]


def _cells(stages: list[Stage]) -> list[str]:
    """Rows, tokens, time, memory and price of stages together."""
    hours = [stage.hours for stage in stages]
    known = [time for time in hours if time is not None]
    peak = max((sum(stage.memory.values()) for stage in stages), default=0)
    paid = [stage.dollars[0] for stage in stages if stage.dollars]
    return [
        f"{sum(stage.rows for stage in stages):,}",
        f"{sum(stage.tokens for stage in stages):,}",
        _time(sum(known), len(known) < len(hours)) if known else _time(None),
        f"{peak:.1f} GiB" if peak else "",
        f"{sum(paid):,.2f}" if paid else "",
    ]


def _size(size: float) -> str:
    return f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.1f} MiB"


def _time(hours: float | None, more: bool = False) -> str:
    """more: something that takes time is left out, such as a server's."""
    if hours is None:
        return "not planned"
    if hours < 1 / 60:
        told = f"{3600 * hours:.0f} s"
    else:
        told = f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"
    return f"> {told}" if more else told


def _actual(stage: dict | None) -> list[str]:
    if stage is None:
        return ["", "", ""]
    rows = stage.get("made", stage.get("pairs", 0))
    tokens = f"{stage['tokens']:,}" if stage.get("tokens") else ""
    return [f"{rows:,}", tokens, _time(stage["seconds"] / 3600)]
