"""What a recipe will take, before anything runs: rows, tokens, hours, GPU memory, disk, money.

What is asked of which model is counted by `workload`, what that costs on a GPU by `costs`; here
both come together: the stages, what does not fit and which key to change, and the plan as text.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sao_utils.plan.costs import (
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
from sao_utils.plan.workload import Rates, Work, longest_ranking, workload
from sao_utils.recipe import Model, Recipe
from sao_utils.stages.responses import PER_PROMPT
from sao_utils.store import results_folder
from sao_utils.training.shapes import Shape

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
    problems, notes = [*load.problems], [_told(load.rates)]
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
        problems += _problems(recipe, shape, gpu, processes, trained, load.works)
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
    groups: dict[tuple[str, bool], list[Work]] = {}  # lm-eval takes memory of its own
    for work in works:
        if work.model.engine != "api":
            groups.setdefault((work.who, work.verb == "exam"), []).append(work)
    for (who, exam), group in groups.items():
        found += _exam_memory(group, gpu) if exam else _engine_memory(who, group, gpu)
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


def _peak(works: list[Work], gpu: Gpu, **changes) -> tuple[Work, dict[str, float]]:
    """The work that takes most of the GPU, with its parts; by its model with `changes`."""
    changed = [replace(w, model=w.model.model_copy(update=changes)) for w in works]
    changed = [replace(w, model=_running(w.model, gpu)) for w in changed]
    return max(
        ((work, _memory(work, gpu)) for work in changed), key=lambda found: sum(found[1].values())
    )


def _room_for_context(model: Model, gpu: Gpu, memory: dict) -> int:
    """Tokens of keys and values for which vLLM has room beside the weights."""
    left = model.gpu_memory * gpu.memory - memory["working"] - memory["weights"]
    return int(left * GIB / model_shape(model).kv_bytes(dtype_of(model)))


def _context(model: Model) -> int:
    return model.max_context or model_shape(model).context or VLLM_TOKENS


def _fits(works: list[Work], gpu: Gpu, **changes) -> bool:
    work, memory = _peak(works, gpu, **changes)
    model = work.model
    if model.engine == "vllm":  # it wants room for one row of the whole context
        return _room_for_context(model, gpu, memory) >= _context(model)
    room = gpu.memory - CONTEXT
    return memory["weights"] <= 0.95 * room and sum(memory.values()) <= room


def _batches(works: list[Work], gpu: Gpu, **changes) -> dict:
    """The changes with the batch_tokens, the most of some, with which they fit; {} if none do."""
    work, memory = _peak(works, gpu, **changes)
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    if weights >= room or work.model.engine != "transformers":
        return {}
    tokens = int(work.model.batch_tokens * min(1, (room - weights) / (need - weights)))
    while tokens:
        tokens = tokens // 1024 * 1024 or 1
        if _fits(works, gpu, **changes, batch_tokens=tokens):
            return {**changes, "batch_tokens": tokens}
        tokens //= 2
    return {}


def _engine_memory(key: str, works: list[Work], gpu: Gpu) -> list[str]:
    """Of a model, whatever it is asked; advised is only what makes it fit."""
    if _fits(works, gpu):
        return []
    work, memory = _peak(works, gpu)
    model, weights, room = work.model, memory["weights"], gpu.memory - CONTEXT
    advice = []
    if model.quantisation == "none":
        for bits in {"transformers": ("nf4",), "vllm": ("fp8", "bitsandbytes")}[model.engine]:
            changes = {"quantisation": bits}
            if model.engine != works[0].model.engine:
                changes["engine"] = model.engine
            changes = changes if _fits(works, gpu, **changes) else _batches(works, gpu, **changes)
            if changes:
                advice.append(_setting(key, changes))
                break
    told = f"{model.path} in {_bits(model)} ({weights:.1f} GiB of weights)"
    if model.engine == "vllm":
        shorter = _room_for_context(model, gpu, memory) // 16 * 16
        longest = max(w.longest + w.most_written for w in works)
        if shorter >= longest and _fits(works, gpu, max_context=shorter):
            advice.append(_setting(key, {"max_context": shorter}))
        share = model.gpu_memory * gpu.memory
        told += (
            f" leaves no room for one context of {_context(model)} tokens on the {gpu.name} "
            f"({share:.1f} GiB)"
        )
    elif weights > 0.95 * room:
        told += f" does not fit the {gpu.name} ({room:.1f} GiB)"
    else:
        need = sum(memory.values())
        told = f"{DOES[work.verb]} needs {need:.1f} GiB, the {gpu.name} has {room:.1f}"
        if fewer := _batches(works, gpu):
            advice = [_setting(key, fewer)]
    return [f"{told}: {', or '.join(advice) or f'a smaller {key}.path'}."]


def _setting(section: str, changes: dict) -> str:
    """Keys to set together, as problems tell them."""
    first, *more = (f"{section}.{key}={value}" for key, value in changes.items())
    return f"{first} with {' and '.join(more)}" if more else first


def _exam_memory(works: list[Work], gpu: Gpu) -> list[str]:
    """lm-eval takes 16-bit weights of what vLLM runs, and batches of any size."""
    work, memory = _peak(works, gpu)
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    if need <= room:
        return []
    return [
        f"{DOES['exam']}: {work.model.path} in {_bits(work.model)} ({weights:.1f} GiB of weights) "
        f"takes {need:.1f} GiB of the {gpu.name} ({room:.1f}): evaluation.harness=[]."
    ]


def _bits(model: Model) -> str:
    if model.quantisation != "none":
        return model.quantisation
    return "float32" if dtype_of(model) == "float32" else "16 bit"


def _training_memory_problems(recipe, gpu, processes, trained) -> list[str]:
    """Advised is only what makes it fit: each alone, or where nothing does, all together."""
    config, room = architecture(recipe.model), gpu.memory - CONTEXT
    pairs = recipe.pairs.max_tokens

    def fits(number: int = processes, longest: int = pairs, **changes) -> bool:
        settings = recipe.training.model_copy(update=changes)
        parts = training_memory(config, recipe.model, settings, gpu.memory, longest, number)
        return sum(parts.values()) <= room

    need = sum(trained[0].memory.values())
    if need <= room:
        return []
    settings, advice = recipe.training, []
    alone: list[dict] = []
    if settings.method == "full":
        more = (n for n in (2, 4, 8, 16, 32, 64) if n > processes and fits(n))
        advice += [f"{n} GPUs (--gpus {n}, see sao_utils/launch)" for n in more][:1]
        alone.append({"method": "lora", "quantisation": "nf4"})
    elif settings.quantisation == "none":
        alone.append({"quantisation": "nf4"})
    if settings.gradient_checkpointing == "off":
        alone.append({"gradient_checkpointing": "on"})
    advice += [_setting("training", changes) for changes in alone if fits(**changes)]
    # A pair goes alone if it is longer than the budget: a smaller budget then changes nothing.
    budgets = _halves(settings.token_budget, PER_PROMPT * pairs)
    lengths = _halves(pairs, int(Rates.pair / PER_PROMPT))  # with less, most pairs drop out
    budget = next((n for n in budgets if fits(token_budget=n)), None)
    length = next((n for n in lengths if fits(longest=n)), None)
    if budget:
        advice.append(f"training.token_budget={budget}")
    elif length:
        advice.append(f"pairs.max_tokens={length}")
    if not advice:
        every = {key: value for changes in alone for key, value in changes.items()}
        for length in (pairs, *lengths):
            every |= {"token_budget": min(settings.token_budget, PER_PROMPT * length)}
            if fits(longest=length, **every):
                shorter = f" and pairs.max_tokens={length}" if length < pairs else ""
                advice.append(_setting("training", every) + shorter)
                break
    told = ", or ".join(advice) or "a smaller model.path"
    return [f"Training needs {need:.1f} GiB, the {gpu.name} has {room:.1f}: {told}."]


def _halves(number: int, least: int) -> list[int]:
    """Smaller numbers, each half of the one before, and at last the least."""
    found = []
    while number > least:
        number = max(least, number // 2)
        found.append(number)
    return found


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
