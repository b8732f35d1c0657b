"""What a recipe will take, before anything runs: rows, tokens, hours, GPU memory, disk, money.

What is asked of which model is counted by `workload`, what that costs on a GPU by `costs`; here
both come together: the stages, what does not fit and which key to change, and the plan as text.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sao_utils.plan.fitting import problems_of, work_memory, writes
from sao_utils.plan.hardware import GIB, Gpu, model_shape
from sao_utils.plan.hours import (
    DECODE_SHARE,
    reading_hours,
    task_hours,
    training_hours,
    writing_hours,
)
from sao_utils.plan.measure import measured
from sao_utils.plan.training import available_gib, training_gib
from sao_utils.plan.work import Rates, Work
from sao_utils.plan.workload import workload
from sao_utils.recipe import Recipe
from sao_utils.store import results_folder
from sao_utils.training.shapes import Shape

#: Stages that come after the training.
AFTER = ("answers", "comparisons", "tasks", "benchmark_answers", "benchmark_verdicts")


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


def plan(recipe: Recipe, gpu: Gpu | None = None, processes: int = 1, measure: bool = False) -> Plan:
    """Plan a run of a recipe.

    Args:
        gpu: of which kind (`find_gpu`); None: a CPU, for which only the tiny recipe has times, those
            of the committed reference run, unless we `measure`.
        measure: whether the model is tried on this machine for a minute (`measure.measured`), so that a
            CPU has times, too.
        processes: GPUs that train together, and that generate if model.workers says so.

    Raises:
        PlanError: a model's shape is not known.
    """
    load = workload(recipe)
    shape = None if recipe.model.engine == "api" else model_shape(recipe.model)
    problems, notes = [*load.problems], [_lengths_in_words(load.rates)]
    trained = [
        _trained(recipe, shape, gpu, load.rates, load.pairs, arm, seed, processes)
        for arm in recipe.arms
        for seed in recipe.seeds
    ]
    requested = [_requested(work, gpu, load.rates, processes) for work in load.works]
    if gpu is None:  # nothing is known of how long other models take
        times = measured(recipe) if measure else load.measured
        own = [work.model.path == recipe.model.path for work in load.works]
        requested = [_as_measured(stage, times) if k else stage for stage, k in zip(requested, own)]
        trained = [_as_measured(stage, times) for stage in trained]
        if times and measure:
            notes.append("Hours: from a minute's trial of the model on this machine.")
        need, free = sum(trained[0].memory.values()) if trained else 0, available_gib()
        if need > free:
            problems.append(
                f"Training needs about {need:.1f} GiB, of this machine's memory {free:.1f} are free: "
                "close other programs, lower pairs.max_tokens, or take a smaller model.path."
            )
    place = next((k for k, work in enumerate(load.works) if work.stage in AFTER), len(requested))
    stages = [*requested[:place], *trained, *requested[place:]]
    if gpu is None and not load.measured and not measure:
        notes.append("Hours on a CPU take a trial of a minute: --measure. --gpu plans for a GPU.")
    if gpu is not None:
        problems += problems_of(recipe, shape, gpu, processes, trained, load.works)
        notes += _assumptions(recipe, gpu, processes, load.works)
    machine = "CPU" if gpu is None else f"{processes} x {gpu.name}" if processes > 1 else gpu.name
    disk = _disk(recipe, shape, load.works, len(recipe.arms) * len(recipe.seeds))
    notes += [*load.notes, *_too_little_disk(disk)]
    return Plan(recipe.name, recipe.model.path, machine, stages, disk, problems, notes, load.bill)


def _requested(work: Work, gpu: Gpu | None, rates: Rates, processes: int) -> Stage:
    """The stage, or part of one, in which a model gets requests."""
    model, hours, memory = work.model, None, {}
    if gpu is not None and model.engine != "api":
        memory = work_memory(work, gpu)
        if work.verb == "task":
            hours = task_hours(model, gpu, work.requests, work.read, work.written)
        elif writes(work):
            arguments = (work.rows, work.read, work.written, work.most_written, rates.spread)
            hours = writing_hours(model, gpu, memory, *arguments, work.shared)
        else:
            arguments = (work.rows, work.read, work.shared)
            hours = reading_hours(model, gpu, memory, *arguments)
        if hours is not None and work.verb != "task":
            hours /= max(1, min(model.workers, processes))
    return Stage(work.stage, work.rows, work.tokens, hours, memory, work.part, work.dollars)


def _trained(recipe, shape, gpu, rates, pairs, arm, seed, processes) -> Stage:
    settings = recipe.training
    share = 0.5 if arm == "sft_random" else 1.0  # one answer of each pair
    tokens = pairs * rates.pair * share * settings.epochs
    hours, memory = None, {}
    if shape is not None:
        longest = recipe.pairs.max_tokens
        memory, choice = training_gib(recipe.model, settings, longest, gpu, processes)
    if gpu is not None and shape is not None:
        answers = pairs * 2 * rates.response * share * settings.epochs
        hours = training_hours(shape, gpu, settings, tokens, answers, choice.twice)
        hours /= gpu.reached * processes
    return Stage(f"training {arm}-{seed}", pairs, round(tokens), hours, memory)


def _as_measured(stage: Stage, measured: dict) -> Stage:
    """With the seconds a row (in training, a token) of the reference run, on two CPU cores."""
    arm = stage.name.split("-")[0]
    alike = [s for name, s in measured.items() if name.split("-")[0] == arm]
    if arm.startswith("training") and not alike:  # a trial trains one arm only
        alike = [s for name, s in measured.items() if name.startswith("training")]
    alike = [s for s in alike if s.get("made") or s.get("tokens")]
    if not alike:
        return stage
    key, amount = ("tokens", stage.tokens) if "training" in stage.name else ("made", stage.rows)
    seconds = sum(s["seconds"] for s in alike) / sum(s[key] for s in alike) * amount
    return replace(stage, hours=seconds / 3600)


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


def _lengths_in_words(rates: Rates) -> str:
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
