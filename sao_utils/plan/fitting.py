"""What does not fit a GPU, and which key to change: named only if it makes the problem go away."""

from __future__ import annotations

import math
from dataclasses import replace

from sao_utils.plan.hardware import CONTEXT, GIB, Gpu, architecture, model_shape
from sao_utils.plan.memory import (
    VLLM_TOKENS,
    dtype_of,
    generation_memory,
    judging_memory,
    task_memory,
)
from sao_utils.plan.training import training_gib
from sao_utils.plan.work import Rates, Work, longest_ranking
from sao_utils.recipe import Model, Recipe
from sao_utils.stages.responses import PER_PROMPT


def work_memory(work: Work, gpu: Gpu) -> dict[str, float]:
    """GiB by part that a model takes for its work on a GPU."""
    model = work.model
    config, context = architecture(model), model_shape(model).context or math.inf
    longest = min(work.longest, context, model.max_context or math.inf)
    if work.verb == "task":
        return task_memory(config, model, longest)
    if writes(work):
        return generation_memory(config, model, longest, work.most_written, gpu.memory)
    return judging_memory(config, model, longest, gpu.memory)


def writes(work: Work) -> bool:
    """Also a judge does, whose verdict is sampled."""
    return work.verb == "write" or (work.verb == "judge" and work.most_written > 0)


#: `Work.verb` -> what a model does, as problems tell it.
DOES = {"write": "Generating", "judge": "Judging", "task": "lm-eval's tasks"}
#: Compute capability from which on vLLM runs.
VLLM_CAPABILITY = 8.0
#: Tokens of a response; a lower limit is no advice. Ours.
SHORTEST = 32


def problems_of(recipe, shape, gpu, processes, trained, works) -> list[str]:
    """Of every model that runs here, and of training."""
    found = []
    here = {work.who: work.model for work in works if work.model.engine != "api"}
    for who, model in {**here, "model": recipe.model}.items():
        if model.engine != "api":
            found += _misfits(who, model, recipe, gpu, processes)
    groups: dict[tuple[str, bool], list[Work]] = {}  # lm-eval takes memory of its own
    for work in works:
        if work.model.engine != "api":
            groups.setdefault((work.who, work.verb == "task"), []).append(work)
    for (who, task), group in groups.items():
        found += _task_memory(group, gpu) if task else _engine_memory(who, group, gpu)
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
        ((work, work_memory(work, gpu)) for work in changed),
        key=lambda found: sum(found[1].values()),
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
    fault = f"{model.path} in {_bits(model)} ({weights:.1f} GiB of weights)"
    if model.engine == "vllm":
        shorter = _room_for_context(model, gpu, memory) // 16 * 16
        longest = max(w.longest + w.most_written for w in works)
        if shorter >= longest and _fits(works, gpu, max_context=shorter):
            advice.append(_setting(key, {"max_context": shorter}))
        share = model.gpu_memory * gpu.memory
        fault += (
            f" leaves no room for one context of {_context(model)} tokens on the {gpu.name} "
            f"({share:.1f} GiB)"
        )
    elif weights > 0.95 * room:
        fault += f" does not fit the {gpu.name} ({room:.1f} GiB)"
    else:
        need = sum(memory.values())
        fault = f"{DOES[work.verb]} needs {need:.1f} GiB, the {gpu.name} has {room:.1f}"
        if fewer := _batches(works, gpu):
            advice = [_setting(key, fewer)]
    return [f"{fault}: {', or '.join(advice) or f'a smaller {key}.path'}."]


def _setting(section: str, changes: dict) -> str:
    """Keys to set together, as problems tell them."""
    first, *more = (f"{section}.{key}={value}" for key, value in changes.items())
    return f"{first} with {' and '.join(more)}" if more else first


def _task_memory(works: list[Work], gpu: Gpu) -> list[str]:
    """lm-eval takes 16-bit weights of what vLLM runs, and batches of any size."""
    work, memory = _peak(works, gpu)
    weights, need, room = memory["weights"], sum(memory.values()), gpu.memory - CONTEXT
    if need <= room:
        return []
    return [
        f"{DOES['task']}: {work.model.path} in {_bits(work.model)} ({weights:.1f} GiB of weights) "
        f"takes {need:.1f} GiB of the {gpu.name} ({room:.1f}): evaluation.tasks=[]."
    ]


def _bits(model: Model) -> str:
    if model.quantisation != "none":
        return model.quantisation
    return "float32" if dtype_of(model) == "float32" else "16 bit"


def _training_memory_problems(recipe, gpu, processes, trained) -> list[str]:
    """Advised is only what makes it fit: each alone, or where nothing does, all together."""
    room, pairs = gpu.memory - CONTEXT, recipe.pairs.max_tokens

    def fits(number: int = processes, longest: int = pairs, **changes) -> bool:
        settings = recipe.training.model_copy(update=changes)
        parts, _ = training_gib(recipe.model, settings, longest, gpu, number)
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
    given = settings.token_budget
    budgets = [] if given == "auto" else _halves(given, PER_PROMPT * pairs)
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
            if given != "auto":
                every |= {"token_budget": min(given, PER_PROMPT * length)}
            if fits(longest=length, **every):
                shorter = f" and pairs.max_tokens={length}" if length < pairs else ""
                advice.append(_setting("training", every) + shorter)
                break
    keys = ", or ".join(advice) or "a smaller model.path"
    return [f"Training needs {need:.1f} GiB, the {gpu.name} has {room:.1f}: {keys}."]


def _halves(number: int, least: int) -> list[int]:
    """Smaller numbers, each half of the one before, and at last the least."""
    found = []
    while number > least:
        number = max(least, number // 2)
        found.append(number)
    return found
