"""What a recipe will take, before anything runs: rows, tokens, hours, memory, disk, money.

`workload` counts the requests to each model; `memory` and `hours` say what they cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sao_utils.engines.loading import model_folder
from sao_utils.plan.hardware import Gpu, model_shape
from sao_utils.plan.hours import DECODE_SHARE, training_hours, work_hours
from sao_utils.plan.measure import measured
from sao_utils.plan.memory import room_gib, training_memory, work_memory
from sao_utils.plan.rounds import work_of
from sao_utils.plan.workload import Rates, Work, rates_of
from sao_utils.recipe import Recipe
from sao_utils.store import FETCHED, fetched
from sao_utils.training.shapes import GIB

#: The committed run of a checkout, whose times hold for the tiny model on two CPU cores.
REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
#: Least compute capability for vLLM and for bfloat16.
CAPABILITY = 8.0


@dataclass(frozen=True)
class Stage:
    """One stage, or part of one. hours: None if not known. memory: GiB by part; empty if a server does
    the work."""

    work: Work
    hours: float | None
    memory: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """machine: its description. disk: GiB by kind. problems: what does not fit, with keys to try. notes:
    assumptions, and models still to be fetched."""

    recipe: Recipe
    machine: str
    stages: list[Stage]
    disk: dict[str, float]
    problems: list[str]
    notes: list[str]


def plan(recipe: Recipe, gpu: Gpu | None = None, processes: int = 1, measure: bool = False) -> Plan:
    """Plan a run of a recipe.

    Args:
        gpu: the kind of GPU (`find_gpu`); None for a CPU. On a CPU only the tiny recipe has times, those
            of the committed reference run, unless `measure` is set.
        measure: whether to try the model on this machine for a minute (`measure.measured`), so that a
            CPU has times, too.
        processes: GPUs that train together; one of them generates.

    Raises:
        ValueError: a model's shape is not known, or its engine cannot be measured.
        EngineError: the model to be measured is missing.
        RecipeError: a file that the recipe names is missing or cannot be read.
    """
    works, times = work_of(recipe), {}
    if gpu is None and measure:
        times = measured(recipe)
    elif gpu is None and recipe.model.path == "tiny":
        times = actual(REFERENCE)
    stages = [_stage(work, recipe, gpu, processes, times) for work in works]
    problems = [*_misfits(recipe, gpu), *_lacking(stages, recipe, gpu)]
    if gpu:
        speed = (
            f"Speed: decoding at {DECODE_SHARE:.0%} of what {gpu.bandwidth:,} GB/s allow, all else at "
            f"{gpu.reached:.0%} of {gpu.compute} TFLOP/s; loading is not counted. Not yet compared "
            "with a real GPU."
        )
    elif not times:
        speed = "Hours on this CPU need a trial of a minute (--measure); --gpu plans for a GPU."
    else:
        source = "a trial on this machine" if measure else "the reference run on two CPU cores"
        speed = f"Hours: by {source}."
    lacking = {m.path for m in recipe.models.values() if m.path in FETCHED and not fetched(m.path)}
    fetch = [f"{path} is not on this machine yet: `sao fetch {path}`." for path in sorted(lacking)]
    machine = "CPU" if gpu is None else f"{processes} x {gpu.name}" if processes > 1 else gpu.name
    notes = [*fetch, _assumptions(rates_of(recipe)), speed]
    return Plan(recipe, machine, stages, _disk(recipe, works), problems, notes)


def actual(folder: Path) -> dict[str, dict]:
    """What the manifest in a run's folder says of each stage; {} if nothing has run.

    What notebooks tried beside the run is summed up as "variants".
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    stages = json.loads(path.read_text(encoding="utf-8")).get("stages", {})
    beside = [
        stage
        for other in sorted((folder / "variants").glob("*/manifest.json"))
        for stage in json.loads(other.read_text(encoding="utf-8")).get("stages", {}).values()
    ]
    if beside:
        total = {key: sum(s.get(key, 0) for s in beside) for key in ("seconds", "made", "tokens")}
        stages["variants"] = total
    return stages


# ---------------------------------------------------------------------------- time and memory


def _stage(work: Work, recipe: Recipe, gpu: Gpu | None, processes: int, times: dict) -> Stage:
    engine = work.model.engine
    if engine == "api" or (engine == "vllm" and gpu is None) or not work.requests:
        return Stage(work, None, {})
    hours = None
    if work.trains:
        longest, settings = recipe.pairs.max_tokens, recipe.training
        memory, choice = training_memory(work.model, settings, longest, gpu, processes)
        if gpu:
            hours = training_hours(work, gpu, settings, choice.twice) / processes
    else:
        memory = work_memory(work, gpu)
        if gpu:
            hours = work_hours(work, gpu, memory)
    if gpu is None and work.model.path == recipe.model.path:
        hours = _hours_as_measured(work, times)
    return Stage(work, hours, memory)


def _hours_as_measured(work: Work, times: dict[str, dict]) -> float | None:
    """Hours from the measured seconds per row (in training, per token) of such a stage; None if none."""
    arm = work.stage.split("-")[0]
    alike = [row for name, row in times.items() if name.split("-")[0] == arm]
    if not alike and work.trains:  # a trial trains one arm only
        alike = [row for name, row in times.items() if name.startswith("training")]
    key, amount = ("tokens", work.tokens) if work.trains else ("made", work.rows)
    made = sum(row.get(key, 0) for row in alike)
    return sum(row["seconds"] for row in alike) / made * amount / 3600 if made else None


# ---------------------------------------------------------------------------- what does not fit

#: What a model does -> what to try if memory does not suffice.
KEYS = {
    "transformers": "{who}.quantisation=nf4, or a smaller {who}.batch_tokens or {who}.path",
    "vllm": "{who}.quantisation=fp8, or a smaller {who}.max_context or {who}.path",
    "tasks": "evaluation.tasks=[], or a smaller {who}.path",
    "lora": "training.quantisation=nf4, training.gradient_checkpointing=on, or a smaller "
    "training.token_budget, pairs.max_tokens or {who}.path",
    "full": "training.method=lora with training.quantisation=nf4, more GPUs (--gpus), or a smaller "
    "{who}.path",
}


def _lacking(stages: list[Stage], recipe: Recipe, gpu: Gpu | None) -> list[str]:
    """The largest shortage of memory of each model and of training, with keys to try."""
    worst: dict[tuple, tuple[float, str]] = {}
    for stage in stages:
        work, need, room = stage.work, sum(stage.memory.values()), room_gib(gpu)
        kind = recipe.training.method if work.trains else work.model.engine
        kind = "tasks" if work.stage == "tasks" else kind
        if kind == "vllm" and gpu:
            room = work.model.gpu_memory * gpu.memory
        lack = need - room
        if lack > 0.01 and lack > worst.get((work.who, kind), (0, ""))[0]:
            there = f"the {gpu.name} has" if gpu else "of this machine's memory are free"
            text = (
                f"{work.stage} with {work.model.path} needs {need:.1f} GiB, {there} {room:.1f}: "
                f"{lack:.1f} too little. Try {KEYS[kind].format(who=work.who)}."
            )
            worst[work.who, kind] = lack, text
    return [text for _, text in worst.values()]


def _misfits(recipe: Recipe, gpu: Gpu | None) -> list[str]:
    """What the GPU cannot do."""
    found = []
    for who, model in recipe.models.items() if gpu else ():
        old = gpu.capability < CAPABILITY
        if model.engine == "vllm" and old:
            found.append(
                f"vLLM does not promise to run on the {gpu.name} (compute capability "
                f"{gpu.capability}): {who}.engine=transformers."
            )
        gemma = model.engine != "api" and "gemma" in model_shape(model).family
        if gemma and (old or model.dtype == "float16"):
            change = f"another {who}.path" if old else f"{who}.dtype=bfloat16"
            found.append(f"Gemma overflows in float16: {change}.")
    return found


# ---------------------------------------------------------------------------- disk and words


def _disk(recipe: Recipe, works: list[Work]) -> dict[str, float]:
    """GiB by kind; rows are counted at five bytes per token written, plus 500 per row."""
    disk = {"rows": sum(work.rows * (500 + 5 * work.lengths.written) for work in works) / GIB}
    models = {work.model.path: work.model for work in works if work.model.engine != "api"}
    for path, model in models.items():
        if not Path(model_folder(path)).is_dir():
            disk[f"weights of {path}"] = 2 * model_shape(model).parameters / GIB
    trained = sum(work.trains for work in works)
    if trained:
        shape, full = model_shape(recipe.model), recipe.training.method == "full"
        each = shape.parameters if full else shape.adapter(recipe.training.lora_rank)
        disk["trained weights"] = 4 * each * trained / GIB
        disk["checkpoints, while it trains"] = 2 * 12 * each / GIB  # two, with Adam's moments
    return disk


def _assumptions(rates: Rates) -> str:
    return (
        f"Lengths and filters ({rates.source}): prompt {rates.prompt:.0f} tokens, response "
        f"{rates.response:.0f}, ranking prompt {rates.verdict:.0f}, pair {rates.pair:.0f}; kept "
        f"{rates.prompts_kept:.0%} of prompts, {rates.pairs_kept:.0%} of pairs."
    )
